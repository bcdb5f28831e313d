"""HMT-pytorch's own training script with the classes of hmt.compat in place of its own: the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import save_tiny_model

from benchmarks import peer, peer_training
from benchmarks.peer_training import OURS, STEPS, THEIRS
from benchmarks.results import Row, row

NOVEL = Path(__file__).parent.parent / "examples" / "data" / "persuasion.txt"
LINES = 300  # of each part
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that reads bytes, and three parts of a novel as the text files that `datasets` takes for splits."""
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("script")
    save_tiny_model(folder / "model")
    (folder / "texts").mkdir()
    lines = [line for line in NOVEL.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, name in enumerate(("train", "validation", "test")):
        part = lines[number * LINES : (number + 1) * LINES]
        (folder / "texts" / f"{name}.txt").write_text("\n".join(part), encoding="utf-8")
    return folder


@pytest.mark.skipif(peer.missing() is not None, reason=str(peer.missing()))
def test_script_trains_with_the_classes_of_compat(folder: Path, rows: list[Row]) -> None:
    theirs, ours = (peer_training.run(folder, classes) for classes in (THEIRS, OURS))
    assert theirs.keys() == ours.keys() >= {"train loss", "train ppl", "eval loss"}
    for name in ("eval loss", "train loss"):
        pairs = list(zip(theirs[name], ours[name], strict=True))
        for step, (a, b) in enumerate(pairs):
            rows += [
                row("peer training", f"step {step}", name, who, [x], "nats") for who, x in ((THEIRS, a), (OURS, b))
            ]
            apart, goal = f"{name}, difference", f"<= {TOLERANCE:g}"
            rows.append(row("peer training", f"step {step}", apart, OURS, [abs(a - b)], "nats", goal=goal))
        assert max(abs(a - b) for a, b in pairs) <= TOLERANCE
    assert len(ours["train loss"]) == STEPS
    assert sum(ours["train loss"][-5:]) < sum(ours["train loss"][:5])  # it does train
