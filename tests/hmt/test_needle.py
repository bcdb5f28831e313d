"""Needles lie where they should, and what is counted is what the model says after reading."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_model import byte_tokenizer

from hmt.loading import load
from hmt.needle import KEYS, Recalled, draw, make_trial, recall_needles, report, wilson
from hmt.reports import write_report

LENGTH, MARGIN, DISTANCES = 64, 5, (1, 2, 5)


def haystack() -> torch.Tensor:
    return byte_tokenizer()("It was a dark night. " * 60, return_tensors="pt").input_ids[0]


@pytest.mark.parametrize("num_keys", [1, 4])
def test_every_context_hides_the_same_facts_and_asks_at_its_distance(num_keys: int) -> None:
    tokenizer = byte_tokenizer()
    trial = make_trial(haystack(), tokenizer, DISTANCES, LENGTH, random.Random(0), num_keys=num_keys, margin=MARGIN)
    assert trial.contexts.shape == (3, 6 * LENGTH)
    question, answer = tokenizer.decode(trial.question), tokenizer.decode(trial.answer)
    fact = question.lstrip() + answer + "."
    straw = set()
    for distance, row in zip(DISTANCES, trial.contexts, strict=True):
        text = tokenizer.decode(row)
        segment = text[(6 - distance) * LENGTH : (7 - distance) * LENGTH]
        assert f" {fact}" in segment[: LENGTH - MARGIN]
        assert text.count("The password of") == num_keys and text.count(fact) == 1
        told = [key for key in KEYS.split() if f"The password of {key} is " in text]
        assert len(told) == num_keys
        assert all(
            part.count("The password of") <= 1 for part in map("".join, zip(*[iter(text)] * LENGTH, strict=True))
        )
        for part in text.split(" The password of ")[1:]:
            assert tokenizer(part.split(" is ")[1][0]).input_ids[0] in trial.choices[:num_keys]
            text = text.replace(f" The password of {part.split('.')[0]}.", "", 1)
        straw.add(text)
    assert len(straw) == 1 and straw.pop() in "It was a dark night. " * 60
    assert len(set(trial.choices.tolist())) == 10 and trial.choices[0] == trial.answer[0]


def test_trials_differ_and_can_be_repeated() -> None:
    first, again, other = (
        make_trial(haystack(), byte_tokenizer(), [1], LENGTH, random.Random(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.contexts, again.contexts) and torch.equal(first.choices, again.choices)
    assert not torch.equal(first.contexts, other.contexts)


@pytest.mark.parametrize("mode", ["hmt", "rmt", "baseline"])
def test_what_is_counted_is_what_the_model_says(mode: str, model_dir: Path) -> None:
    model, tokenizer, _ = load(str(model_dir), device="cpu", segment_length=LENGTH, num_sensory=MARGIN)
    model.backbone.get_output_embeddings().weight.data.mul_(20)  # so that it has opinions
    *_, found = recall_needles(model, tokenizer, haystack(), DISTANCES, num_keys=2, trials=3, seed=7, mode=mode)
    assert model.config.mode == "hmt" and found.chosen.shape == (3, 3)
    alone, _, _ = load(str(model_dir), device="cpu", segment_length=LENGTH, num_sensory=MARGIN, mode=mode)
    alone.load_state_dict(model.state_dict(), strict=False)
    for number in range(3):
        trial = make_trial(
            haystack(), tokenizer, DISTANCES, LENGTH, random.Random(f"7 {number}"), num_keys=2, margin=MARGIN
        )
        for row, context in enumerate(trial.contexts):
            state = alone.read(context[None])
            with torch.no_grad():
                logits = alone(trial.question[None], state=state).logits[0, -1]
            assert float(found.nats[number, row]) == pytest.approx(
                -float(logits.log_softmax(0)[trial.answer[0]]), rel=1e-4
            )
            assert bool(found.chosen[number, row]) == (int(logits[trial.choices].argmax()) == 0)
            assert bool(found.exact[number, row]) <= (int(logits.argmax()) == int(trial.answer[0]))


def test_a_model_that_always_says_the_answer_is_right(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _ = load(str(model_dir), device="cpu", segment_length=LENGTH, num_sensory=MARGIN)
    trial = make_trial(haystack(), tokenizer, DISTANCES, LENGTH, random.Random("0 0"), margin=MARGIN)
    said = iter(trial.answer.tolist())
    apply_head = model.backbone.get_output_embeddings().forward

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.full(hidden.shape[:-1], next(said)), 257).float() + 0 * apply_head(
            hidden
        )

    monkeypatch.setattr(model.backbone.get_output_embeddings(), "forward", head)
    (found,) = recall_needles(model, tokenizer, haystack(), DISTANCES, trials=1)
    assert found.chosen.all() and found.exact.all()


def test_a_report_counts_by_distance(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    right = torch.tensor([[True, True], [True, False], [True, False], [False, False]])
    results = {"hmt": Recalled(right, right & False, torch.full((4, 2), 2.0))}
    found = report(results, [1, 8], 64, 1, 10)
    reading = found["readings"]["hmt"]
    assert reading["chosen"]["share"] == [0.75, 0.25] and reading["exact"]["share"] == [0.0, 0.0]
    assert reading["chosen"]["interval"][0] == list(wilson(3, 4)) and reading["nats"] == [2.0, 2.0]
    write_report(found, tmp_path / "needle.json", draw)
    assert (tmp_path / "needle.png").read_bytes()[1:4] == b"PNG"


def test_wilson_intervals() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # as statsmodels and R give
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distances": [0]}, "distances must be integers >= 1"),
        ({"distances": []}, "distances must be integers >= 1"),
        ({"distances": [2], "num_keys": 4}, r"num_keys must lie in \[1, 3\]"),
        ({"segment_length": 20}, "segments must have .* tokens to hold a fact, got 20"),
        ({"distances": [30]}, "the text must have .* tokens for a distance of 30"),
        ({"num_choices": 26}, "tell 26 of the values apart"),
    ],
    ids=["zero", "none", "keys", "segments", "text", "choices"],
)
def test_what_cannot_be_hidden_is_refused(change: dict, message: str) -> None:
    settings = {"distances": [1, 2], "segment_length": LENGTH, **change}
    with pytest.raises(ValueError, match=message):
        make_trial(haystack(), byte_tokenizer(), rng=random.Random(0), **settings)
