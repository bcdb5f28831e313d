"""How well texts are predicted the more of them has been read, and whether one way of reading beats another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from hmt.data import Document, windows
from hmt.model import HMTForCausalLM
from hmt.modes import reading_as
from hmt.scoring import perplexity_of, score


@dataclass(frozen=True)
class Curve:
    """Losses of all segments of some readings, each reading beginning with an empty memory.

    Attributes:
        nll: [R, S] summed negative log likelihood in nats of the predictions made in each segment.
        count: [R, S] how many these are.
        digest: of the tokens that were read.
    """

    nll: Tensor
    count: Tensor
    digest: str = ""

    @property
    def perplexity(self) -> float:
        return perplexity_of(float(self.nll.sum() / self.count.sum()))

    def by_segment(self) -> list[float]:
        """Perplexity in the first segment of all readings, in the second, and so on as far as any of them goes."""
        count = self.count.sum(0)
        return (self.nll.sum(0) / count)[count > 0].exp().tolist()


@dataclass(frozen=True)
class Difference:
    """Nats per token by which reading a loses less than reading b (negative: a is better), with its interval."""

    mean: float
    low: float
    high: float
    confidence: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def read_curve(
    model: HMTForCausalLM,
    documents: Sequence[Document],
    segments: int,
    *,
    mode: str | None = None,
    summary_source: str | None = None,
    limit: int | None = None,
) -> Iterator[Curve]:
    """Read every stretch of `segments` segments anew, and yield the curve of all stretches read so far.

    Args:
        mode: read as "rmt" or "baseline" with the weights of an HMT; None is the model's own mode.
        summary_source: "previous" shows a memory that sees no later token, "current" what its seeing them is worth.
        limit: read only so many stretches.

    Raises:
        ValueError: no text of at least two tokens, or questions; a mode that the model cannot read in.
    """
    if any(document.answer_start is not None for document in documents):
        raise ValueError(
            "documents must be plain texts, got questions with answers, which hmt evaluate --task qa is for"
        )
    stretches = windows(documents, segments * model.config.segment_length)[:limit]
    if not stretches:
        raise ValueError("documents must hold a text of at least two tokens, got none")
    nll = torch.zeros(len(stretches), segments, dtype=torch.float64)
    count = torch.zeros(len(stretches), segments, dtype=torch.long)
    digest = hashlib.sha256()
    for row, (number, start, stop) in enumerate(stretches):
        ids = documents[number].ids[None, start:stop]
        digest.update(f"{len(ids[0])} ".encode() + ids.cpu().long().numpy().tobytes())
        with reading_as(model, mode, summary_source):
            parts = list(score(model, ids, segments_per_step=1))
        for segment, part in enumerate(parts[:segments]):
            nll[row, segment], count[row, segment] = part.nll, part.num_scored
        yield Curve(nll[: row + 1], count[: row + 1], digest.hexdigest())


def incomparable(a: Curve, b: Curve) -> str | None:
    """Why two readings cannot be compared, if so."""
    if a.digest != b.digest or not torch.equal(a.count, b.count):
        return "a and b must be curves of the same tokens, got others, which another tokenizer gives, for one"
    if (segments := int((a.count > 0).sum())) < 2:
        return f"a and b must hold at least two segments to resample, got {segments}"
    return None


def compare(a: Curve, b: Curve, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Difference of two readings of the same texts with a paired bootstrap interval over segments.

    Both curves lose much on the same hard segments; pairing takes that out, so that small differences can be seen.
    Segments count as independent draws, which those of one text are only nearly.

    Raises:
        ValueError: curves of other tokens, or fewer than two segments (see `incomparable`).
    """
    if reason := incomparable(a, b):
        raise ValueError(reason)
    scored = a.count > 0
    delta, count = (a.nll - b.nll)[scored], a.count[scored].double()
    return Difference(*bootstrap(delta, count, confidence, resamples, seed), confidence)


def bootstrap(
    total: Tensor, count: Tensor, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """sum(total) / sum(count) of the draws in two tensors [R], and its interval when the draws are resampled."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.float64)
    for part in means.split(256):  # the draws of all resamples of a long text would not fit
        draws = torch.randint(len(total), (len(part), len(total)), generator=generator)
        part.copy_(total[draws].sum(1) / count[draws].sum(1))
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return float(total.sum() / count.sum()), low, high


def report(curves: Mapping[str, Curve], segment_length: int) -> dict[str, Any]:
    """Curves by name, and every pair of them compared that can be, as what JSON can hold."""
    reasons = {pair: incomparable(curves[pair[0]], curves[pair[1]]) for pair in combinations(curves, 2)}
    differences = {pair: compare(curves[pair[0]], curves[pair[1]]) for pair, reason in reasons.items() if not reason}
    return {
        "task": "perplexity",
        "segment_length": segment_length,
        "readings": {
            name: {
                "perplexity": curve.perplexity,
                "tokens_predicted": int(curve.count.sum()),
                "stretches": len(curve.nll),
                "perplexity_by_segment": curve.by_segment(),
            }
            for name, curve in curves.items()
        },
        "comparisons": [
            {
                "a": a,
                "b": b,
                "nats_per_token": difference.mean,
                "interval": [difference.low, difference.high],
                "confidence": difference.confidence,
                "significant": difference.significant,
            }
            for (a, b), difference in differences.items()
        ],
        "not_compared": [{"a": a, "b": b, "reason": reason} for (a, b), reason in reasons.items() if reason],
    }


def draw(found: dict[str, Any], figure: Any) -> None:
    """Perplexity of every segment against the tokens read by its end."""
    axes = figure.subplots()
    for name, reading in found["readings"].items():
        values = reading["perplexity_by_segment"]
        axes.plot([(i + 1) * found["segment_length"] for i in range(len(values))], values, marker=".", label=name)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("perplexity of the segment")
    axes.legend()
