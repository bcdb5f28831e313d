"""lm-evaluation-harness gets the model's own scores and generations, at any length, in a small local task."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_model import byte_tokenizer

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

from hmt.harness import HMTLM  # noqa: E402

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. "


@pytest.fixture(scope="module")
def lm(model_dir: Path) -> HMTLM:
    model = HMTLM.create_from_arg_string(
        f"pretrained={model_dir},segment_length=32,num_sensory=4", {"device": "cpu", "batch_size": 1}
    )
    model.model.backbone.get_output_embeddings().weight.data.mul_(20)  # so that it has opinions
    return model


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


def losses(lm: HMTLM, ids: list[int]) -> torch.Tensor:
    """Negative log likelihood of every token but the first, from the logits of one pass."""
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def test_it_is_registered_and_reads_any_length(lm: HMTLM) -> None:
    from lm_eval.api.registry import get_model

    assert get_model("hmt") is HMTLM
    assert lm.max_length > 1_000_000 and lm.model.config.segment_length == 32


@pytest.mark.parametrize("repeats", [1, 5], ids=["short", "long"])
def test_likelihoods_are_the_models(lm: HMTLM, repeats: int) -> None:
    context, ids = TEXT * repeats, lm.tok_encode(TEXT * repeats)
    answers = [" Indeed.", " So", lm.tokenizer.decode(greedy(lm, ids, 3))]
    found = lm.loglikelihood(requests(*((context.rstrip(), answer) for answer in answers)))
    for answer, (likelihood, is_greedy) in zip(answers, found, strict=True):
        whole = lm.tok_encode(context.rstrip() + answer)
        number = len(whole) - len(lm.tok_encode(context.rstrip()))
        assert likelihood == pytest.approx(-float(losses(lm, whole)[-number:].sum()), rel=1e-4)
        with torch.no_grad():
            predicted = lm.model(torch.tensor([whole])).logits[0, -number - 1 : -1].argmax(-1)
        assert is_greedy == (predicted.tolist() == whole[-number:])
    rolling = lm.loglikelihood_rolling(requests((context,)))
    assert rolling == [pytest.approx(-float(losses(lm, [lm.prefix_token_id, *ids]).sum()), rel=1e-4)]
    (empty,) = lm.loglikelihood(requests(("", "It is")))
    assert empty[0] == pytest.approx(-float(losses(lm, [lm.prefix_token_id, *lm.tok_encode("It is")]).sum()), rel=1e-4)


def greedy(lm: HMTLM, ids: list[int], number: int) -> list[int]:
    return lm.model.generate(torch.tensor([ids]), max_new_tokens=number, do_sample=False, pad_token_id=0)[
        0, len(ids) :
    ].tolist()


def test_generation_ends_with_a_stop_string(lm: HMTLM) -> None:
    ids = lm.tok_encode(TEXT * 2)
    expected = lm.tokenizer.decode(greedy(lm, ids, 12), skip_special_tokens=True)
    (text,) = lm.generate_until(requests((TEXT * 2, {"until": [], "max_gen_toks": 12, "temperature": 0.0})))
    assert text == expected
    stop = expected[4:6]
    (text,) = lm.generate_until(requests((TEXT * 2, {"until": [stop], "max_gen_toks": 12})))
    assert text == expected[: expected.index(stop)]


def test_tasks_run_to_their_results(lm: HMTLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text, choices = (TEXT * 3).rstrip(), [" yes", " no", " wife"]
    rows = [{"text": text, "choices": choices, "label": label} for label in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
        "metadata": {"version": 0},
    }
    which = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    whole = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    said = {"output_type": "generate_until", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    tasks = [
        {**common, **which, "task": "which"},
        {**common, **whole, "task": "whole", "metric_list": [{"metric": "byte_perplexity"}]},
        {**common, **said, "task": "said", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bypass"}]},
    ]
    manager = TaskManager(include_defaults=False)  # reading the harness's own tasks takes minutes
    found = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)

    assert found["results"]["which"]["acc,none"] == pytest.approx(1 / 3)
    ids, prefix = lm.tok_encode(text), lm.prefix_token_id
    for choice, ((likelihood, _),) in zip(choices, found["samples"]["which"][0]["resps"], strict=True):
        expected = losses(lm, lm.tok_encode(text + choice))[len(ids) - 1 :].sum()
        assert float(likelihood) == pytest.approx(-float(expected), rel=1e-4)
    bits = float(losses(lm, [prefix, *ids]).sum())
    assert found["results"]["whole"]["byte_perplexity,none"] == pytest.approx(math.exp(bits / len(text)), rel=1e-4)
    assert found["samples"]["said"][0]["resps"] == [[lm.generate_until(requests((text, said["generation_kwargs"])))[0]]]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hmt.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        importlib.import_module("hmt.harness")


def test_a_chat_that_has_begun_does_not_begin_again(model_dir: Path, tmp_path: Path) -> None:
    """Its template writes the first token out; a plain text gets it from the tokenizer."""
    folder = shutil.copytree(model_dir, tmp_path / "chat")
    tokenizer = byte_tokenizer(begins=True)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    lm = HMTLM(str(folder), dtype="auto", device="cpu")
    chat = lm.apply_chat_template([{"role": "user", "content": "So?"}])
    assert lm.tok_encode(chat) == lm.tok_encode("So?") == [0, *lm.tok_encode("So?", add_special_tokens=False)]


def test_a_dtype_that_is_none_is_named(model_dir: Path) -> None:
    with pytest.raises(
        ValueError, match="dtype must be a name such as 'bfloat16', 'auto' or None, got 'half precision'"
    ):
        HMTLM(str(model_dir), dtype="half precision")
