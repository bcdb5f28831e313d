"""A recall map holds the ages of one pass over the text, however it is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import hmt_model, token_ids

from hmt.recall_map import draw, recall_ages, report
from hmt.reports import write_report


@pytest.mark.parametrize("source", [None, "previous"])
@pytest.mark.parametrize("length", [16 * 9 + 5, 16 * 4, 7], ids=["batches", "whole", "short"])
def test_ages_are_those_of_one_pass(length: int, source: str | None) -> None:
    model, ids = hmt_model(queue_size=5, summary_batch_size=2), token_ids(1, length)
    ages = torch.cat(list(recall_ages(model, ids, summary_source=source)))
    assert model.config.summary_source == "current"
    model.config.summary_source = source or "current"
    with torch.no_grad():
        trace = model(ids, output_trace=True).trace
    expected = trace["age"][0] if "age" in trace else torch.zeros(1, dtype=torch.int32)
    assert ages.tolist() == expected.tolist()
    assert len(ages) == -(-length // 16) and ages[0] == 0
    assert all(1 <= age <= min(n, 5) for n, age in enumerate(ages.tolist()) if n)


def test_other_modes_recall_nothing() -> None:
    with pytest.raises(ValueError, match="must be of mode 'hmt' to recall segments, got mode 'rmt'"):
        next(recall_ages(hmt_model(mode="rmt"), token_ids(1, 40)))


def test_a_report_holds_map_and_histogram(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ages = {"hmt": [torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1])], "hmt-causal": [torch.tensor([0])]}
    found = report(ages, 16)
    assert found["readings"]["hmt"] == {"ages": [[0, 1, 2, 1], [0, 1]], "histogram": {"1": 3, "2": 1}}
    write_report(found, tmp_path / "map.json", draw)
    assert (tmp_path / "map.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="must be a JSON file"):
        write_report(found, tmp_path / "map.png", draw)


def test_the_model_is_itself_between_two_parts() -> None:
    model = hmt_model(summary_batch_size=2)
    for _ in recall_ages(model, token_ids(1, 100), summary_source="previous"):
        assert model.config.summary_source == "current"
