"""examples/read_novel.py from the quantised file to the last generated token, with a tiny model in SmolLM2's place."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gguf
import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent.parent / "examples" / "read_novel.py"
ALPHABET = [chr(33 + i) for i in range(94)] + ["Ġ", "Ċ", "th"]
SHAPES = {
    "attn_norm": (32,),
    "ffn_norm": (32,),
    "attn_q": (32, 32),
    "attn_k": (16, 32),
    "attn_v": (16, 32),
    "attn_output": (32, 32),
    "ffn_gate": (64, 32),
    "ffn_up": (64, 32),
    "ffn_down": (32, 64),
}


def write_tiny_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(ALPHABET))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(ALPHABET)
    writer.add_token_types([1] * len(ALPHABET))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)
    tensors = {"token_embd": (len(ALPHABET), 32), "output": (len(ALPHABET), 32), "output_norm": (32,)}
    tensors |= {f"blk.0.{name}": shape for name, shape in SHAPES.items()}
    for name, shape in tensors.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, whose model package holds the tiny file and whose novel is short."""
    spec = importlib.util.spec_from_file_location("read_novel", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(module, "MODEL", tmp_path / "cache" / "tiny")
    monkeypatch.setattr(module, "NOVEL", tmp_path / "novel.txt")
    module.NOVEL.write_text("the baronet was vain " * 200)
    return module


def test_example_converts_the_model_once_reads_and_continues(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FULL", "1")
    example.main()
    first = capsys.readouterr().out
    assert "Converting tiny.gguf once" in first
    assert "untrained" in first
    assert "perplexity" in first and "tokens/s" in first
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in example.MODEL.iterdir()}

    example.main()
    assert "Converting" not in capsys.readouterr().out


def test_example_says_what_to_do_without_its_model(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make demo"):
        example.main()
    assert not example.MODEL.exists()
