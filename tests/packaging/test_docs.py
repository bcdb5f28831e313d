"""The Python of README and docs runs as it is printed, on a tiny model in place of the one it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM

from hmt.compat import MemoryCell, RecurrentWrapper

ROOT = Path(__file__).parents[2]
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune... " * 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where every file is that the documents name."""
    save_tiny_model(tmp_path / "model")
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    emb, width = backbone.get_input_embeddings(), backbone.config.hidden_size
    cell = MemoryCell(backbone, num_mem_tokens=1, num_prepend=32)
    trained = RecurrentWrapper(cell, emb=emb, word_emb_dim=width, hidden_dim=width, ltm_context=300, segment_size=990)
    torch.save(trained.state_dict(), tmp_path / "model_weights.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("document", "expected"),
    [("README.md", "state"), ("docs/from-hmt-pytorch.md", "model"), ("docs/guide.md", "answers")],
    ids=["readme", "migration", "guide"],
)
def test_python_runs_as_printed(document: str, expected: str, folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(re.sub(r'"HuggingFaceTB/[^"]*"', '"model"', block), names)
    assert expected in names
    if document == "docs/from-hmt-pytorch.md":
        assert AutoModelForCausalLM.from_pretrained("out").config.segment_length == 990


DOCUMENTS = [path for pattern in ("*.md", "*/*.md", "*/*/*.md") for path in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize("document", [path.relative_to(ROOT).as_posix() for path in DOCUMENTS])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / document).parent / target).exists(), target
