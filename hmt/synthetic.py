"""A recall task that only a long memory solves: a fact in every segment, and a question about an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hmt.loss import IGNORE_INDEX
from hmt.model import HMTForCausalLM

NOTHING, ASK, FACT = 0, 1, 2


@dataclass(frozen=True)
class RecallBatch:
    """Texts [B, S L] whose only labels are the answers; distance [B, S] in segments of each question, 0 for none."""

    input_ids: Tensor
    labels: Tensor
    distance: Tensor


@dataclass(frozen=True)
class RecallTask:
    """Texts of segments `ASK key value FACT key value . .`: a question about an earlier fact, then a new fact.

    The first half of a text asks nothing, so that questions are not mostly about the latest facts. The keys of a text
    are distinct and each is asked once at most, so an answer is nowhere but in the segment that stated it, `distance`
    segments back. Values are uniform: guessing is right once in num_values times.

    Args:
        num_keys: distinct keys, at least as many as a text has segments.
        num_values: distinct values.
        segment_length: at least 6 tokens; the rest is filled up.

    Raises:
        ValueError: for a value outside its range, naming the argument.

    Example:
        >>> batch = RecallTask().sample(8, num_segments=20)
        >>> batch.input_ids.shape, batch.distance.shape
        (torch.Size([8, 160]), torch.Size([8, 20]))
    """

    num_keys: int = 32
    num_values: int = 16
    segment_length: int = 8

    def __post_init__(self) -> None:
        for name, low in (("num_keys", 1), ("num_values", 2), ("segment_length", 6)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")

    @property
    def vocab_size(self) -> int:
        return 3 + self.num_keys + self.num_values

    def sample(
        self,
        batch_size: int,
        num_segments: int,
        max_distance: int | None = None,
        generator: torch.Generator | None = None,
    ) -> RecallBatch:
        """Random texts; each question is about a fact not asked before, at most `max_distance` segments back.

        Raises:
            ValueError: fewer than two segments, more segments than keys, or a distance below 1.
        """
        if not 2 <= num_segments <= self.num_keys:
            raise ValueError(f"num_segments must lie in [2, num_keys = {self.num_keys}], got {num_segments}")
        if max_distance is not None and max_distance < 1:
            raise ValueError(f"max_distance must be at least 1 or None, got {max_distance}")
        keys = torch.rand(batch_size, self.num_keys, generator=generator).argsort(dim=1)[:, :num_segments]
        values = torch.randint(self.num_values, (batch_size, num_segments), generator=generator)
        distance = self._distances(batch_size, num_segments, max_distance or num_segments, generator)
        asked = torch.arange(num_segments) - distance

        ids = torch.full((batch_size, num_segments, self.segment_length), NOTHING)
        ids[..., 0], ids[..., 3] = ASK, FACT
        ids[..., 1], ids[..., 4] = 3 + keys.gather(1, asked), 3 + keys
        ids[..., 2], ids[..., 5] = (3 + self.num_keys + x for x in (values.gather(1, asked), values))
        ids[..., :3] *= (distance > 0)[..., None]  # NOTHING is asked there
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[..., 2] = ids[..., 2].where(distance > 0, IGNORE_INDEX)
        return RecallBatch(ids.flatten(1), labels.flatten(1), distance)

    def _distances(self, rows: int, num_segments: int, limit: int, generator: torch.Generator | None) -> Tensor:
        """[rows, S] distances of the questions, 0 for none; any unasked fact within the limit is as likely."""
        distance = torch.zeros(rows, num_segments, dtype=torch.long)
        unasked = torch.ones(rows, num_segments)
        for segment in range((num_segments + 1) // 2, num_segments):
            first = max(0, segment - limit)
            # the previous segment's fact is always unasked, so there is something to choose
            choice = first + torch.multinomial(unasked[:, first:segment], 1, generator=generator)
            distance[:, segment : segment + 1] = segment - choice
            unasked.scatter_(1, choice, 0.0)
        return distance


class RecallExamples(Dataset):
    """Fresh texts for a whole training, `per_step` for each step, of segments[step] segments.

    Example i depends on i and the seed alone, so that a resumed training reads what it would have.
    """

    def __init__(self, task: RecallTask, segments: Sequence[int], per_step: int, seed: int = 0):
        self.task, self.segments, self.per_step, self.seed = task, list(segments), per_step, seed

    def __len__(self) -> int:
        return len(self.segments) * self.per_step

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + index)
        batch = self.task.sample(1, self.segments[index // self.per_step], generator=generator)
        return {"input_ids": batch.input_ids[0], "labels": batch.labels[0]}


@torch.no_grad()
def recall_accuracy(
    model: HMTForCausalLM, task: RecallTask, num_segments: int, num_texts: int, seed: int, batch_size: int = 64
) -> dict[int, tuple[int, int]]:
    """Right answers and questions by distance, over fresh texts."""
    generator = torch.Generator().manual_seed(seed)
    right, asked = torch.zeros(num_segments, dtype=torch.long), torch.zeros(num_segments, dtype=torch.long)
    training = model.training
    model.eval()
    for start in range(0, num_texts, batch_size):
        batch = task.sample(min(batch_size, num_texts - start), num_segments, generator=generator)
        predicted = model(batch.input_ids.to(model.device)).logits.argmax(-1).cpu()
        answer = batch.labels != IGNORE_INDEX  # row by row, segment by segment, as the distances are
        hits = predicted.roll(1, dims=1)[answer] == batch.labels[answer]
        distance = batch.distance[batch.distance > 0]
        asked += torch.bincount(distance, minlength=num_segments)
        right += torch.bincount(distance[hits], minlength=num_segments)
    model.train(training)
    return {d: (int(right[d]), int(asked[d])) for d in range(1, num_segments) if asked[d]}
