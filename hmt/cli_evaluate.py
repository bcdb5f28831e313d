"""The command line's hmt evaluate DATA: several models or modes side by side, in one of several tasks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm.auto import tqdm

from hmt import evaluation, needle, qa, recall_map
from hmt.cli_options import positive
from hmt.cli_train import DATA_HELP, add_data_options
from hmt.config import MODES, HMTConfig
from hmt.data import Document, load_documents
from hmt.loading import Loaded, load, stored_settings
from hmt.modes import check_mode
from hmt.recipes import RECIPES
from hmt.records import read_records
from hmt.reports import check_report, write_report

READINGS = (*MODES, "hmt-causal")
MODE_HELP = "default: each model's own; repeat for several. hmt-causal recalls by the previous segment: no later token"
TASKS = """tasks:
  perplexity  (default) as a function of what has been read; DATA is read in stretches that begin with an empty memory
  needle      facts hidden in DATA are asked for after growing distances; several --keys make a multi-key recall
  qa          DATA holds questions (context, question, answer); answers are generated and get F1 and ROUGE-L
  recall-map  which past segment each segment of DATA recalled
"""
RECIPE_LIST = "\n".join(["", "recipes:", *(f"  {name:14}{recipe.notes}" for name, recipe in RECIPES.items())])
Item = TypeVar("Item")


class Reading(NamedTuple):
    """A model with a mode to read in, and the name of both in tables and plots."""

    label: str
    loaded: Loaded
    documents: list[Document]  # of DATA, none where its questions are asked
    mode: str
    summary_source: str | None


def add_evaluate(commands: Any) -> None:
    """Add `hmt evaluate` to the subcommands."""
    command = commands.add_parser(
        "evaluate",
        help="perplexity by context read, needles in a haystack, questions, or a map of what is recalled",
        description="Compare several models or modes on DATA, with confidence intervals.",
        epilog=TASKS + RECIPE_LIST,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("data", metavar="DATA", help=DATA_HELP)
    command.add_argument("--task", choices=RUNS, default="perplexity", help="see below (default perplexity)")
    command.add_argument("--model", required=True, action="append", help="as for hmt score; repeat for several models")
    command.add_argument("--mode", action="append", choices=READINGS, help=MODE_HELP)
    add_data_options(command, "test")
    command.add_argument("--output", metavar="JSON", help="write results there, and a plot beside it (matplotlib)")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU")
    command.add_argument("--device", help="for example cpu or cuda:0 (default: a GPU when there is one)")
    command.add_argument("--segment-length", type=positive, metavar="L", help="default: each model's own, or 512")
    command.add_argument("--num-sensory", type=int, metavar="K", help="default: each model's own, or 32")
    group = command.add_argument_group("perplexity")
    group.add_argument("--segments", type=positive, default=16, metavar="N", help="segments of a stretch (default 16)")
    group.add_argument("--max-stretches", type=positive, metavar="N", help="read only the first N stretches")
    group = command.add_argument_group("needle")
    group.add_argument("--distances", default="1,2,4,8,16", metavar="N,N", help="in segments (default 1,2,4,8,16)")
    group.add_argument("--keys", type=positive, default=1, metavar="N", help="facts in each text (default 1)")
    group.add_argument("--trials", type=positive, default=20, metavar="N", help="texts (default 20)")
    group.add_argument("--seed", type=int, default=0, help="of the texts (default 0)")
    group = command.add_argument_group("qa")
    group.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="of an answer (default 64)")
    command.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    _check(arguments)
    found, draw = RUNS[arguments.task](arguments)
    if arguments.output:
        write_report(found, arguments.output, draw)
        print(f"written to {arguments.output}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse before long work what would be refused in its middle or at its end."""
    if arguments.output:
        check_report(arguments.output)
    lengths = set()
    for name in arguments.model:
        stored = stored_settings(name)
        lengths.add(arguments.segment_length or stored.get("segment_length", HMTConfig.segment_length))
        own = stored.get("mode", HMTConfig.mode)
        for mode in arguments.mode or [own]:
            kind = mode.partition("-")[0]
            check_mode(kind, own)
            if arguments.task == "recall-map" and kind != "hmt":
                raise ValueError(f"--mode must be hmt or hmt-causal for a recall map, got {mode!r}: it recalls nothing")
    if len(lengths) > 1:
        raise ValueError(f"--segment-length must be given for models of different segments, got {sorted(lengths)}")


def _readings(arguments: argparse.Namespace) -> Iterator[Reading]:
    """Every model in every mode that is asked for; a model is loaded when its turn comes."""
    names = ("segment_length", "num_sensory")
    settings = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    for name in arguments.model:
        loaded = load(name, dtype=dtype, device=arguments.device, **settings)
        documents = [] if arguments.task == "qa" else _documents(arguments, loaded)
        for mode in arguments.mode or [loaded.model.config.mode]:
            kind, _, causal = mode.partition("-")
            label = mode if len(arguments.model) == 1 else f"{name} ({mode})"
            yield Reading(label, loaded, documents, kind, "previous" if causal else None)
        del loaded  # before the next one; who reads lets go of it as well


def _documents(arguments: argparse.Namespace, loaded: Loaded) -> list[Document]:
    field, limit = arguments.text_field, arguments.max_documents
    return load_documents(arguments.data, loaded.tokenizer, split=arguments.split, text_field=field, limit=limit)


def _shown(
    items: Iterable[Item], label: str, unit: str, show: Callable[[Item], dict[str, str]], total: int | None = None
) -> Iterator[Item]:
    """The items as they come, under a progress bar that shows something of the latest."""
    with tqdm(desc=label, unit=unit, total=total, file=sys.stderr) as bar:
        for item in items:
            bar.update()
            bar.set_postfix(show(item))
            yield item


def _perplexity(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    curves: dict[str, evaluation.Curve] = {}
    length = 0
    for label, loaded, documents, mode, source in _readings(arguments):
        length = loaded.model.config.segment_length
        curves_so_far = evaluation.read_curve(
            loaded.model,
            documents,
            arguments.segments,
            mode=mode,
            summary_source=source,
            limit=arguments.max_stretches,
        )
        for curve in _shown(curves_so_far, label, "stretch", lambda c: {"perplexity": f"{c.perplexity:.2f}"}):
            curves[label] = curve
        del loaded, curves_so_far
    found = evaluation.report(curves, length)
    print(f"{'reading':>24}  {'perplexity':>10}  by segment")
    for label, reading in found["readings"].items():
        values = reading["perplexity_by_segment"]
        shown = values if len(values) <= 8 else [values[0], values[1], values[3], values[7], values[-1]]
        print(f"{label:>24}  {reading['perplexity']:>10.3f}  {' '.join(f'{v:.2f}' for v in shown)}")
    for c in found["comparisons"]:
        low, high = c["interval"]
        print(f"{c['a']} - {c['b']}: {c['nats_per_token']:+.4f} nats per token, 95 % in [{low:+.4f}, {high:+.4f}]")
    for c in found["not_compared"]:
        print(f"{c['a']} (a) and {c['b']} (b) are not compared: {c['reason']}")
    return found, evaluation.draw


def _needle(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    try:
        distances = sorted({int(n) for n in arguments.distances.split(",")})
    except ValueError:
        raise ValueError(f"--distances must be numbers with commas between, got {arguments.distances!r}") from None
    results: dict[str, needle.Recalled] = {}
    length, choices = 0, 10
    for label, loaded, documents, mode, source in _readings(arguments):
        length = loaded.model.config.segment_length
        if any(document.answer_start is not None for document in documents):
            raise ValueError(f"DATA must be plain texts to hide needles in, but {arguments.data!r} holds questions")
        trials = needle.recall_needles(
            loaded.model,
            loaded.tokenizer,
            torch.cat([document.ids for document in documents]),
            distances,
            num_keys=arguments.keys,
            num_choices=choices,
            trials=arguments.trials,
            seed=arguments.seed,
            mode=mode,
            summary_source=source,
        )
        for result in _shown(
            trials, label, "trial", lambda r: {"right": f"{r.chosen.double().mean():.0%}"}, arguments.trials
        ):
            results[label] = result
        del loaded, trials
    found = needle.report(results, distances, length, arguments.keys, choices)
    print(f"right choices among {found['choices']} by distance in segments")
    print(f"{'reading':>24}  {' '.join(f'{d:>5}' for d in distances)}")
    for label, reading in found["readings"].items():
        print(f"{label:>24}  {' '.join(f'{share:>5.0%}' for share in reading['chosen']['share'])}")
        print(f"{'whole answers':>24}  {' '.join(f'{share:>5.0%}' for share in reading['exact']['share'])}")
    return found, needle.draw


def _qa(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    records = read_records(arguments.data, split=arguments.split, text_field=arguments.text_field)
    questions = list(islice(records, arguments.max_documents))
    if not questions:
        raise ValueError(f"{arguments.data!r} must hold at least one question, got none")
    qa.rouge_l("", "")  # refuses here where its package is missing, not after the first answer
    answers: dict[str, list[qa.Answer]] = {}
    for label, loaded, _, mode, source in _readings(arguments):
        found_answers = qa.answer_questions(
            loaded.model,
            loaded.tokenizer,
            questions,
            mode=mode,
            summary_source=source,
            max_new_tokens=arguments.max_new_tokens,
        )
        answers[label] = list(_shown(found_answers, label, "question", lambda a: {"f1": f"{a.f1:.2f}"}, len(questions)))
        del loaded, found_answers
    found = qa.report(answers)
    print(f"{'reading':>24}  {'questions':>9}  {'F1':>6}  {'ROUGE-L':>7}")
    for label, reading in found["readings"].items():
        f1, rouge_l = (reading[name]["mean"] for name in qa.METRICS)
        print(f"{label:>24}  {reading['questions']:>9}  {f1:>6.3f}  {rouge_l:>7.3f}")
    return found, qa.draw


def _recall_map(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    ages: dict[str, list[torch.Tensor]] = {}
    length = 0
    for label, loaded, documents, _, source in _readings(arguments):
        length = loaded.model.config.segment_length
        ages[label] = []
        for document in documents:
            parts = recall_map.recall_ages(loaded.model, document.ids[None], summary_source=source)
            total = -(-len(document.ids) // (length * loaded.model.config.summary_batch_size))
            shown = _shown(parts, label, "batch", lambda a: {"age": f"{a.double().mean():.1f}"}, total)
            ages[label].append(torch.cat(list(shown)))
        del loaded, parts, shown
    found = recall_map.report(ages, length)
    for label, reading in found["readings"].items():
        counts = {int(age): count for age, count in reading["histogram"].items()}
        total = sum(counts.values())
        if not total:
            print(f"{label}: nothing to recall in texts of one segment")
            continue
        top = sorted(counts, key=lambda age: -counts[age])[:5]
        shown_ages = ", ".join(f"{age} ({counts[age] / total:.0%})" for age in top)
        print(f"{label}: {total} segments recalled, most often those {shown_ages} segments ago")
    return found, recall_map.draw


RUNS: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], Any]]] = {
    "perplexity": _perplexity,
    "needle": _needle,
    "qa": _qa,
    "recall-map": _recall_map,
}
