"""Questions about a text, answered after reading it, with F1 and ROUGE-L."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hmt.data import encode_question
from hmt.evaluation import bootstrap
from hmt.generation import continue_prompt
from hmt.model import HMTForCausalLM
from hmt.modes import reading_as

METRICS = ("f1", "rouge_l")


@dataclass(frozen=True)
class Answer:
    """What a model answered to a question, what would have been right, and the best score over these."""

    question: str
    prediction: str
    references: list[str]
    context_tokens: int
    f1: float
    rouge_l: float


def normalize(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as SQuAD (arXiv 1606.05250) and LongBench compare them."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words in a prediction; 0 without any common word.

    Example:
        >>> f1("The town of Lyme", "Lyme")
        0.5
    """
    words, right = normalize(prediction), normalize(reference)
    common = sum((Counter(words) & Counter(right)).values())
    return 2 * common / (len(words) + len(right)) if common else 0.0


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (the package rouge-score, without stemming).

    Raises:
        ImportError: without the package `rouge-score`.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs the package `rouge-score`: pip install rouge-score") from error
    return RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure


def first_line(text: str) -> str:
    """An answer ends with its first line: what follows is a next question that the model made up."""
    return next(iter(text.strip().splitlines()), "").strip()


@torch.no_grad()
def answer_questions(
    model: HMTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Mapping[str, Any]],
    *,
    mode: str | None = None,
    summary_source: str | None = None,
    max_new_tokens: int = 64,
) -> Iterator[Answer]:
    """Read the context and question of each record with an empty memory, generate an answer greedily, and score it.

    Args:
        records: context, question, and an answer or list of answers, as `hmt.records.read_records` gives them.
        mode, summary_source: as in `hmt.modes.reading_as`.

    Raises:
        ValueError: a record that is no question.
        ImportError: without the package `rouge-score`.
    """
    for record in records:
        if "question" not in record:
            raise ValueError("data must hold questions (context, question, answer) to be answered, got a plain text")
        references = [record["answer"]] if isinstance(record["answer"], str) else list(record["answer"])
        prompt = encode_question(record, tokenizer)[None].to(model.device)
        with reading_as(model, mode, summary_source):
            tokens = continue_prompt(
                model, tokenizer, prompt, max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0
            )
        prediction = first_line(tokenizer.decode(tokens, skip_special_tokens=True))
        best = [max(score(prediction, reference) for reference in references) for score in (f1, rouge_l)]
        yield Answer(record["question"], prediction, references, prompt.shape[1], *best)


def report(answers: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Mean scores with bootstrap intervals over questions, every pair of readings compared, and all answers."""
    names = list(answers)
    scores = {
        name: {m: torch.tensor([getattr(a, m) for a in found]).double() for m in METRICS}
        for name, found in answers.items()
    }
    readings = {
        name: {
            "questions": len(found),
            **{m: _mean(scores[name][m]) for m in METRICS},
            "answers": [vars(answer) for answer in found],
        }
        for name, found in answers.items()
    }
    comparisons = [
        {"a": a, "b": b, **{m: _mean(scores[a][m] - scores[b][m]) for m in METRICS}}
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    ]
    return {"task": "qa", "readings": readings, "comparisons": comparisons}


def _mean(values: torch.Tensor) -> dict[str, Any]:
    """Mean and, of at least two values, its interval."""
    if len(values) < 2:
        return {"mean": float(values.mean()), "interval": None}
    mean, low, high = bootstrap(values, torch.ones_like(values))
    return {"mean": mean, "interval": [low, high]}


def draw(found: dict[str, Any], figure: Any) -> None:
    """Mean F1 and ROUGE-L of each reading with their intervals."""
    axes = figure.subplots()
    readings = found["readings"]
    width = 0.8 / len(readings)
    for i, (name, reading) in enumerate(readings.items()):
        means = [reading[m]["mean"] for m in METRICS]
        intervals = [reading[m]["interval"] or [mean, mean] for m, mean in zip(METRICS, means, strict=True)]
        errors = [
            [mean - low for mean, (low, _) in zip(means, intervals, strict=True)],
            [high - mean for mean, (_, high) in zip(means, intervals, strict=True)],
        ]
        axes.bar(
            [x + (i - (len(readings) - 1) / 2) * width for x in range(2)],
            means,
            width,
            yerr=errors,
            capsize=3,
            label=name,
        )
    axes.set_xticks(range(2), ["F1", "ROUGE-L"])
    axes.set_ylabel("mean over questions")
    axes.legend()
