"""Which past segment each segment of a text recalled most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hmt.model import HMTForCausalLM
from hmt.modes import reading_as


@torch.no_grad()
def recall_ages(model: HMTForCausalLM, input_ids: Tensor, *, summary_source: str | None = None) -> Iterator[Tensor]:
    """Read ids [1, T]; yield for some segments at a time how many segments ago each one's strongest memory was written.

    The first segment has nothing to recall: its age is 0.

    Raises:
        ValueError: a model that does not recall.

    Example:
        >>> ages = torch.cat(list(recall_ages(model, book_ids)))
        >>> recalled_segment = torch.arange(len(ages)) - ages
    """
    if model.config.mode != "hmt":
        raise ValueError(f"the model must be of mode 'hmt' to recall segments, got mode {model.config.mode!r}")
    state = None
    for part in input_ids.split(model.config.summary_batch_size * model.config.segment_length, dim=1):
        with reading_as(model, None, summary_source):
            out = model(part.to(model.device), state=state, logits_to_keep=1, output_trace=True)
        state = out.state
        segments = -(-part.shape[1] // model.config.segment_length)
        yield out.trace["age"][0].cpu() if "age" in out.trace else torch.zeros(segments, dtype=torch.int32)


def report(ages: Mapping[str, Sequence[Tensor]], segment_length: int) -> dict[str, Any]:
    """The ages of each text by reading, and how often each age occurs, as what JSON can hold."""
    readings = {}
    for name, texts in ages.items():
        counts = Counter(age for text in texts for age in text.tolist() if age)
        readings[name] = {
            "ages": [text.tolist() for text in texts],
            "histogram": {str(age): counts[age] for age in sorted(counts)},
        }
    return {"task": "recall-map", "segment_length": segment_length, "readings": readings}


def draw(found: dict[str, Any], figure: Any) -> None:
    """For each reading the recalled segment against the segment that recalled it, and the histogram of ages."""
    readings = found["readings"]
    figure.set_size_inches(10, 4 * len(readings))
    for (name, reading), (left, right) in zip(
        readings.items(), figure.subplots(len(readings), 2, squeeze=False), strict=True
    ):
        points = [(n, n - age) for ages in reading["ages"] for n, age in enumerate(ages) if age]
        last = max((n for n, _ in points), default=1)
        left.plot([1, last], [0, last - 1], color="gray", linewidth=0.8, label="previous segment")
        counts = Counter(points)
        if points:
            shades = [count / max(counts.values()) for count in counts.values()]
            left.scatter(*zip(*counts, strict=True), s=9, alpha=shades, linewidths=0)
        left.set(xlabel="segment", ylabel="segment recalled", title=name)
        left.legend(loc="upper left")
        ages = {int(age): count for age, count in reading["histogram"].items()}
        total = sum(ages.values()) or 1
        right.bar(list(ages), [count / total for count in ages.values()], width=1.0)
        right.set(xlabel="age of the recalled segment", ylabel="share of segments", title=name)
        for axis in (left.xaxis, left.yaxis, right.xaxis):
            axis.get_major_locator().set_params(integer=True)
