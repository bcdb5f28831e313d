"""Curves are the losses of their segments, intervals cover what they should, and reports can be read."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from backbones import VOCAB, hmt_model

from hmt.data import Document
from hmt.evaluation import Curve, compare, draw, read_curve, report
from hmt.loss import shift_left
from hmt.reports import write_report


def texts(*lengths: int) -> list[Document]:
    return [Document(torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n))) for n in lengths]


@pytest.mark.parametrize(("mode", "source"), [(None, None), ("hmt", "previous"), ("rmt", None), ("baseline", None)])
def test_a_curve_holds_the_losses_of_every_segment(mode: str | None, source: str | None) -> None:
    model, documents = hmt_model(), texts(16 * 7 + 5, 20)
    *_, curve = read_curve(model, documents, 4, mode=mode, summary_source=source)
    assert (model.config.mode, model.config.summary_source) == ("hmt", "current")
    alone = hmt_model(mode=mode or "hmt", summary_source=source or "current")
    alone.load_state_dict(model.state_dict(), strict=False)
    stretches = [documents[0].ids[:64], documents[0].ids[64:], documents[1].ids]
    assert curve.count.tolist() == [[16, 16, 16, 15], [16, 16, 16, 4], [16, 3, 0, 0]]
    for row, ids in enumerate(stretches):
        with torch.no_grad():
            logits = alone(ids[None]).logits
        losses = torch.nn.functional.cross_entropy(logits[0], shift_left(ids[None])[0], reduction="none")
        expected = [float(part.sum()) for part in losses.split(16)]
        torch.testing.assert_close(
            curve.nll[row, : len(expected)], torch.tensor(expected).double(), rtol=1e-5, atol=1e-4
        )
    assert curve.perplexity == math.exp(curve.nll.sum() / curve.count.sum())
    by_segment = [math.exp(curve.nll[:, i].sum() / curve.count[:, i].sum()) for i in range(4)]
    assert curve.by_segment() == pytest.approx(by_segment)
    short = next(read_curve(model, documents, 4, mode=mode, summary_source=source))
    assert torch.equal(short.nll[0], curve.nll[0]) and len(short.nll) == 1


def drawn(shift: float, noise: float, seed: int, segments: int = 60) -> tuple[Curve, Curve]:
    """Two curves of 10 tokens a segment whose losses differ by `shift` nats per token and `noise` around it."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.full((segments // 6, 6), 10)
    hard = 100 * torch.rand(count.shape, generator=generator, dtype=torch.float64)
    wobble = 10 * noise * torch.randn(count.shape, generator=generator, dtype=torch.float64)
    return Curve(hard + 10 * shift + wobble, count), Curve(hard, count)


def test_pairing_finds_a_small_difference_between_hard_and_easy_segments() -> None:
    found = compare(*drawn(-0.05, 0.1, seed=0))
    assert found.significant and found.low < found.mean < found.high < 0
    a, b = drawn(-0.05, 0.1, seed=0)
    assert compare(b, a).mean == -found.mean
    unpaired = Curve(b.nll.flatten()[torch.randperm(60)].view(b.nll.shape), b.count)
    assert not compare(a, unpaired).significant


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        found = compare(*drawn(0.03, 0.2, seed=seed), resamples=400, confidence=0.9)
        covered += found.low <= 0.03 <= found.high
    assert 165 <= covered <= 194  # 180 expected, within 3.5 standard deviations


def test_longer_segments_weigh_more() -> None:
    count = torch.tensor([[30, 10, 0]])
    a, b = Curve(torch.tensor([[60.0, 50.0, 0.0]]), count), Curve(torch.tensor([[30.0, 40.0, 0.0]]), count)
    assert compare(a, b).mean == pytest.approx(1.0)


def test_curves_of_different_texts_are_refused() -> None:
    a, b = drawn(0.0, 0.1, seed=0)
    for other in (Curve(b.nll, b.count + 1), Curve(b.nll, b.count, "of other tokens")):
        with pytest.raises(ValueError, match="same tokens"):
            compare(a, other)
    one = Curve(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="at least two segments"):
        compare(one, one)
    with pytest.raises(ValueError, match="at least two tokens"):
        next(read_curve(hmt_model(), texts(1), 2))
    with pytest.raises(ValueError, match="plain texts"):
        next(read_curve(hmt_model(), [Document(torch.arange(9), 4)], 2))
    with pytest.raises(ValueError, match="summary_source must be one of"):
        next(read_curve(hmt_model(), texts(40), 2, summary_source="next"))
    with pytest.raises(ValueError, match="mode must not need more memory"):
        next(read_curve(hmt_model(mode="rmt"), texts(40), 2, mode="hmt"))


def test_readings_that_cannot_be_compared_are_reported_all_the_same() -> None:
    """As those of two tokenizers, which may well come to as many tokens."""
    model, ids = hmt_model(), texts(64)[0].ids
    *_, a = read_curve(model, [Document(ids)], 4)
    *_, same = read_curve(model, [Document(ids)], 4, mode="rmt")
    *_, b = read_curve(model, [Document(ids.flip(0))], 4)
    assert a.digest == same.digest != b.digest
    found = report({"a": a, "same": same, "b": b}, 16)
    assert [(c["a"], c["b"]) for c in found["comparisons"]] == [("a", "same")]
    assert [(c["a"], c["b"]) for c in found["not_compared"]] == [("a", "b"), ("same", "b")]
    assert "other" in found["not_compared"][0]["reason"] and len(found["readings"]) == 3


@pytest.mark.parametrize("plots", [True, False], ids=["matplotlib", "without"])
def test_a_report_is_json_and_a_picture(plots: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if plots:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    a, b = drawn(-0.05, 0.1, seed=0)
    write_report(report({"hmt": a, "rmt": b, "baseline": b}, 10), tmp_path / "out.json", draw)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["readings"]["hmt"]["perplexity"] == pytest.approx(a.perplexity)
    assert found["readings"]["rmt"]["perplexity_by_segment"] == pytest.approx(b.by_segment())
    assert [(c["a"], c["b"], c["significant"]) for c in found["comparisons"]] == [
        ("hmt", "rmt", True),
        ("hmt", "baseline", True),
        ("rmt", "baseline", False),
    ]
    assert (tmp_path / "out.png").is_file() == plots
    if plots:
        assert (tmp_path / "out.png").read_bytes()[1:4] == b"PNG"


def test_a_perplexity_that_no_float_holds_is_infinite() -> None:
    assert Curve(torch.tensor([[800.0]]), torch.tensor([[1]])).perplexity == math.inf
    assert Curve(torch.tensor([[7.0]]), torch.tensor([[1]])).perplexity == math.exp(7)
    assert math.isnan(Curve(torch.tensor([[math.nan]]), torch.tensor([[1]])).perplexity)


def test_pictures_of_reports_do_not_replace_each_other(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = report(dict(zip("ab", drawn(0.1, 0.1, seed=0), strict=True)), 10)
    for name in ("run.v1", "run.v2", "run.json"):
        write_report(found, tmp_path / name, draw)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["run.png", "run.v1.png", "run.v2.png"]


def test_a_report_says_how_sure_it_is_and_of_how_much() -> None:
    a, b = drawn(-0.05, 0.1, seed=0)
    found = report({"a": a, "b": b}, 10)
    (low, high), mean = found["comparisons"][0]["interval"], found["comparisons"][0]["nats_per_token"]
    assert low < mean < high and found["readings"]["a"]["tokens_predicted"] == 600
