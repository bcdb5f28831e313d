"""Small files of what was trained: the same logits after loading, whatever is damaged or foreign refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import VOCAB, backbone, hmt_model
from safetensors.torch import save_file
from transformers import TrainingArguments

from hmt import HMTForCausalLM
from hmt.adapters import FILE, SETTINGS, load_adapter, save_adapter, select
from hmt.data import Document
from hmt.loading import load
from hmt.training import HMTTrainer

OWN = {"memory", "summary_prompt", "recall.wq.weight", "recall.wk.weight"}


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Change what is trained, so that it matters whether it is there."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_what_is_trained() -> None:
    model = hmt_model()
    every = {name for name, _ in model.named_parameters()}
    assert select(model, "memory") == sum(p.numel() for n, p in model.named_parameters() if n in OWN)
    assert trainable(model) == OWN
    select(model, "full")
    assert trainable(model) == every


@pytest.mark.parametrize(
    ("name", "what", "mode"),
    [
        ("llama", "lora", "hmt"),
        ("gpt2", "lora", "hmt"),
        ("qwen2", "lora", "baseline"),
        ("opt-projected", "memory", "hmt"),
        ("llama-tied", "memory", "rmt"),
    ],
)
def test_a_loaded_adapter_gives_the_same_logits(name: str, what: str, mode: str, tmp_path: Path) -> None:
    if what == "lora":
        pytest.importorskip("peft")
    model = hmt_model(name, mode=mode, summary_source="previous", summary_fraction=0.25)
    select(model, what, rank=2, alpha=8)
    assert len([n for n in trainable(model) if "lora_" in n]) == (0 if what == "memory" else {"gpt2": 4}.get(name, 8))
    randomize(model)
    ids = torch.randint(3, VOCAB, (2, 50))
    backbone(name).save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "small", str(tmp_path / "base"))
    assert (tmp_path / "small" / FILE).stat().st_size < (tmp_path / "base" / "model.safetensors").stat().st_size
    loaded = load_adapter(tmp_path / "small").eval()
    assert (loaded.config.mode, loaded.config.summary_fraction) == (mode, 0.25)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-4)
    wider = load_adapter(tmp_path / "small", backbone(name), queue_size=7)
    assert wider.config.queue_size == 7
    with pytest.raises(ValueError, match="mode of the adapter"):
        load_adapter(tmp_path / "small", mode="hmt" if mode != "hmt" else "rmt")


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_factors_of_the_embedding_are_not_those_of_a_head_that_shares_its_weights(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = hmt_model(name)
    select(model, "lora", rank=2, target_modules=["embed_tokens", "q_proj"])
    assert len([n for n in trainable(model) if "lora_embedding_" in n]) == 2
    randomize(model)
    ids = torch.randint(3, VOCAB, (2, 50))
    save_adapter(model, tmp_path, "nowhere")
    loaded = load_adapter(tmp_path, backbone(name)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-4)


def test_a_quantised_backbone_is_trained_beside(tmp_path: Path) -> None:
    """Integers take no gradient; what is added does, and is saved alone."""
    model = hmt_model()
    layer = model.backbone.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter((layer.weight / layer.weight.abs().max() * 127).to(torch.int8), False)
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight.to(x.dtype) / 127)
    assert select(model, "memory") == sum(p.numel() for n, p in model.named_parameters() if n in OWN)
    ids = torch.randint(3, VOCAB, (2, 50))
    model(ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == (n in OWN) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="must be 'lora' or 'memory' for a quantised backbone"):
        select(model, "full")
    with pytest.raises(ValueError, match="must not be quantised for its weights to be saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="save_strategy must be 'no' for a quantised backbone"):
        HMTTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), [Document(ids[0])])
    save_adapter(model, tmp_path, "base")
    assert {path.name for path in tmp_path.iterdir()} == {FILE}


@pytest.mark.parametrize("first", ["adapter", "model"])
def test_an_adapter_of_what_has_been_trained_before(first: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = backbone()
    base.generation_config.eos_token_id = [7, 9]
    base.save_pretrained(tmp_path / "base")
    model = HMTForCausalLM.from_backbone(base, segment_length=16, num_sensory=3, queue_size=3)
    if first == "adapter":
        select(model, "lora", rank=2)
        randomize(model)
        save_adapter(model, tmp_path / "first", str(tmp_path / "base"))
        model = load_adapter(tmp_path / "first").eval()
    else:
        randomize(model)
        model.save_pretrained(tmp_path / "first")
    select(model, "lora", rank=3)
    randomize(model)
    save_adapter(model, tmp_path / "second", str(tmp_path / "first"))
    ids = torch.randint(3, VOCAB, (2, 50))
    loaded = load_adapter(tmp_path / "second").eval()
    assert loaded.generation_config.eos_token_id == [7, 9]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=5e-5, rtol=1e-4)


def test_adapters_on_each_other_are_refused(tmp_path: Path) -> None:
    backbone().save_pretrained(tmp_path / "base")
    model = hmt_model()
    select(model, "memory")
    save_adapter(model, tmp_path / "first", str(tmp_path / "base"))
    save_adapter(model, tmp_path / "second", str(tmp_path / "first"))
    for name in ("first", "second", "base"):
        with pytest.raises(ValueError, match="must go to another folder than"):
            save_adapter(model, tmp_path / name, str(tmp_path / "second"))
    save_adapter(model, tmp_path / "third", str(tmp_path / "second"))
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"was trained on '.*base', which is not there"):
        load_adapter(tmp_path / "second")
    (tmp_path / "third").rename(tmp_path / "base")
    with pytest.raises(ValueError, match="adapters must end in a language model"):
        load_adapter(tmp_path / "second")


def test_a_folder_of_both_an_adapter_and_a_model_is_refused(tmp_path: Path) -> None:
    model = hmt_model()
    select(model, "memory")
    save_adapter(model, tmp_path, "nowhere")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a whole model or an adapter, but has both"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="must go to another folder than that of a whole model"):
        save_adapter(model, tmp_path, "nowhere")


def test_a_backbone_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone().save_pretrained(tmp_path / "base")
    model = hmt_model()
    select(model, "memory")
    monkeypatch.chdir(tmp_path)
    save_adapter(model, "small", "base")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert load_adapter(tmp_path / "small").config.segment_length == model.config.segment_length


def test_an_adapter_in_bfloat16_is_half_the_size_and_reads_the_same(tmp_path: Path) -> None:
    model = hmt_model()
    select(model, "memory")
    sizes = {}
    for dtype in (None, torch.bfloat16):
        save_adapter(model, tmp_path / str(dtype), "nowhere", dtype=dtype)
        sizes[dtype] = (tmp_path / str(dtype) / FILE).stat().st_size
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes[None] - sizes[torch.bfloat16] == pytest.approx(2 * numbers, abs=64)
    loaded = load_adapter(tmp_path / "torch.bfloat16", backbone()).eval()
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    ids = torch.randint(3, VOCAB, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=0.02, rtol=0.02)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model = hmt_model()
    select(model, "memory")
    save_adapter(model, tmp_path, "nowhere")
    data = bytearray((tmp_path / FILE).read_bytes())
    with pytest.raises(ValueError, match="does not fit the backbone"):
        load_adapter(tmp_path, backbone("opt-projected"))
    data[-5] ^= 1
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(ValueError, match="does not match its SHA-256"):
        load_adapter(tmp_path, backbone())
    (tmp_path / FILE).write_bytes(data[:-9])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load_adapter(tmp_path, backbone())
    save_file({"memory": torch.zeros(1, 64)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="must be an HMT adapter of version '1'"):
        load_adapter(tmp_path, backbone())


def test_lora_factors_need_the_layers_they_were_trained_beside(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = hmt_model()
    select(model, "lora")
    save_adapter(model, tmp_path, "nowhere")
    with pytest.raises(ValueError, match="no linear layer"):
        load_adapter(tmp_path, backbone("gpt2"))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"segmentlength": 16}, TypeError), ({"num_sensory": 17}, ValueError), ({"fused_rotary": True}, ValueError)],
    ids=str,
)
def test_a_refused_adapter_leaves_the_backbone_as_it_was(wrong: dict, error: type[Exception], tmp_path: Path) -> None:
    """Or its factors would be added twice by who tries again."""
    pytest.importorskip("peft")
    model = hmt_model("gpt2")
    select(model, "lora", rank=2)
    randomize(model)
    save_adapter(model, tmp_path, "gpt2")
    lm = backbone("gpt2")
    before = {name: weight.clone() for name, weight in lm.state_dict().items()}
    with pytest.raises(error):
        load_adapter(tmp_path, lm, **wrong)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.state_dict().items())
    ids = torch.randint(3, VOCAB, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(load_adapter(tmp_path, lm)(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-4)


def test_every_setting_comes_back_with_an_adapter(tmp_path: Path) -> None:
    own = {
        "mode": "hmt", "segment_length": 24, "num_sensory": 5, "queue_size": 7, "summary_fraction": 0.25,
        "summary_source": "previous", "recall_dim": 48, "recall_softmax_scale": 0.3,
    }  # fmt: skip
    assert set(own) == set(SETTINGS)
    save_adapter(hmt_model(**own), tmp_path, "x")
    loaded = load_adapter(tmp_path, backbone())
    assert {name: getattr(loaded.config, name) for name in own} == own and loaded.recall.softmax_scale == 0.3
