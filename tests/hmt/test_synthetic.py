"""The recall task asks what it says: one fact per segment, each asked at most once, at the distance it reports."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hmt.synthetic import ASK, FACT, NOTHING, RecallExamples, RecallTask, recall_accuracy


@pytest.mark.parametrize(("segments", "limit"), [(2, None), (12, None), (12, 3)])
def test_every_answer_stands_in_the_segment_asked_about_alone(segments: int, limit: int | None) -> None:
    task = RecallTask(num_keys=14, num_values=5, segment_length=9)
    batch = task.sample(40, segments, limit, torch.Generator().manual_seed(1))
    ids = batch.input_ids.view(40, segments, 9)
    labels = batch.labels.view(40, segments, 9)
    assert torch.equal((labels != -100).sum(-1), (batch.distance > 0).long())
    for row in range(40):
        facts = {int(ids[row, s, 4]): (s, int(ids[row, s, 5])) for s in range(segments)}
        assert len(facts) == segments and (ids[row, :, 3] == FACT).all()
        asked = [s for s in range(segments) if ids[row, s, 0] == ASK]
        assert len({int(ids[row, s, 1]) for s in asked}) == len(asked)
        for s in range(segments):
            distance = int(batch.distance[row, s])
            assert (distance > 0) == (s in asked) and distance <= (limit or segments)
            if distance:
                stated, value = facts[int(ids[row, s, 1])]
                assert stated == s - distance and value == ids[row, s, 2] == labels[row, s, 2]
            else:
                assert (ids[row, s, :3] == NOTHING).all()
    assert ids.max() < task.vocab_size


def test_distances_reach_across_the_text_and_seeds_repeat() -> None:
    task = RecallTask()
    one, same, other = (task.sample(200, 24, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one.input_ids, same.input_ids) and not torch.equal(one.input_ids, other.input_ids)
    counts = torch.bincount(one.distance.flatten(), minlength=24)
    assert (counts[1:17] > 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecallTask(num_values=1), "num_values"),
        (lambda: RecallTask(segment_length=5), "segment_length"),
        (lambda: RecallTask().sample(1, 1), "num_segments"),
        (lambda: RecallTask(num_keys=3).sample(1, 4), "num_segments"),
        (lambda: RecallTask().sample(1, 4, 0), "max_distance"),
    ],
    ids=["values", "length", "one", "keys", "distance"],
)
def test_mistakes_are_explained(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_examples_of_a_training_depend_on_their_number_and_the_seed() -> None:
    task = RecallTask()
    examples = RecallExamples(task, [2, 2, 5], per_step=3, seed=4)
    assert len(examples) == 9
    lengths = [len(examples[i]["input_ids"]) for i in range(9)]
    assert lengths == [16] * 6 + [40] * 3
    again = RecallExamples(task, [2, 2, 5], per_step=3, seed=4)
    assert all(torch.equal(again[i]["labels"], examples[i]["labels"]) for i in reversed(range(9)))
    texts = {tuple(RecallExamples(task, [5], 3, seed)[i]["input_ids"].tolist()) for seed in (0, 1) for i in range(3)}
    assert len(texts) == 6


class Oracle(torch.nn.Module):
    """Knows the answer to every question up to a distance, and says the same wrong thing to all others."""

    def __init__(self, task: RecallTask, reach: int):
        super().__init__()
        self.task, self.reach, self.device = task, reach, torch.device("cpu")

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        segments = ids.view(len(ids), -1, self.task.segment_length)
        answers = torch.full_like(segments, NOTHING)
        for row in range(len(ids)):
            for s in range(segments.shape[1]):
                for distance in range(1, min(self.reach, s) + 1):
                    if segments[row, s, 0] == ASK and segments[row, s - distance, 4] == segments[row, s, 1]:
                        answers[row, s, 1] = segments[row, s - distance, 5]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(answers.flatten(1), self.task.vocab_size).float())


@pytest.mark.parametrize("reach", [0, 2, 9])
def test_accuracy_is_counted_by_distance(reach: int) -> None:
    task = RecallTask()
    found = recall_accuracy(Oracle(task, reach), task, num_segments=9, num_texts=70, seed=3, batch_size=32)
    assert list(found) == list(range(1, 9))
    assert sum(asked for _, asked in found.values()) == 70 * 4
    assert all(right == (asked if distance <= reach else 0) for distance, (right, asked) in found.items())
