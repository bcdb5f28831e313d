"""save_pretrained / from_pretrained, Auto classes, and files of HMT-pytorch."""

from __future__ import annotations

from pathlib import Path

import golden
import pytest
import torch
from backbones import CONFIGS, backbone, hmt_model, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hmt import HMTConfig, HMTForCausalLM
from hmt.checkpoints import load_hmt_pytorch
from hmt.compat import MemoryCell, RecurrentWrapper

EMBEDDING = "memory_cell.model.model.embed_tokens.weight"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", ["hmt", "rmt", "baseline"])
@torch.no_grad()
def test_save_and_load(name: str, mode: str, tmp_path: Path) -> None:
    """Tied and untied weights come back exactly, through the Auto classes, with the backbone's attention restored."""
    model = hmt_model(name, mode=mode, summary_source="previous", queue_size=5)
    ids = token_ids(2, 60)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, HMTConfig)
    assert (config.mode, config.queue_size, config.segment_length) == (mode, 5, 16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, HMTForCausalLM)
    assert loaded.backbone.config._attn_implementation == model.backbone.config._attn_implementation
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(loaded(ids).logits, expected)
    tied = model.backbone.config.tie_word_embeddings
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("attention", ["hmt", "sdpa", "eager"])
def test_attention_asked_for_is_loaded(attention: str, tmp_path: Path) -> None:
    hmt_model().save_pretrained(tmp_path)
    loaded = HMTForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert loaded.backbone.config._attn_implementation == attention


def test_dtype_is_loaded(tmp_path: Path) -> None:
    hmt_model().save_pretrained(tmp_path)
    loaded = HMTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded(token_ids(1, 40)).logits.dtype == torch.bfloat16


def test_resized_embeddings_survive(tmp_path: Path) -> None:
    model = hmt_model("llama")
    model.resize_token_embeddings(140)
    assert model.config.vocab_size == model.backbone.config.vocab_size == 140
    with torch.no_grad():
        assert model(torch.full((1, 20), 139)).logits.shape[-1] == 140
    model.save_pretrained(tmp_path)
    assert HMTForCausalLM.from_pretrained(tmp_path).get_output_embeddings().weight.shape[0] == 140


@pytest.mark.parametrize("name", ["a_llama_evict", "d1_rmt_sensory4", "d4_baseline_sensory0", "e3_opt_proj_leftpad"])
@pytest.mark.parametrize("kind", ["pth", "module-prefix", "safetensors", "state_dict"])
@torch.no_grad()
def test_hmt_pytorch_files(name: str, kind: str, tmp_path: Path) -> None:
    """A reference checkpoint in each form gives the reference's logits."""
    case = golden.load(name)
    weights = case.weights
    source: object = weights
    if kind == "module-prefix":
        weights = {f"module.{key}": value for key, value in weights.items()}
    if kind in ("pth", "module-prefix"):
        source = tmp_path / "model.pth"
        torch.save(weights, source)
    elif kind == "safetensors":
        from safetensors.torch import save_file

        source = tmp_path / "model.safetensors"
        save_file(weights, source)
    model = load_hmt_pytorch(
        source,
        golden.build_backbone(case),
        segment_length=case.segment_size,
        num_sensory=case.num_sensory,
        queue_size=case.ltm_context,
    )
    assert model.config.mode == case.mode
    logits = model(case.inputs["input_ids"], attention_mask=case.inputs.get("attention_mask")).logits
    torch.testing.assert_close(logits, case.outputs["logits"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_lora_factors_are_merged() -> None:
    case = golden.load("a_llama_evict")
    rank, alpha = 8, 32.0
    weights, expected = {}, {}
    generator = torch.Generator().manual_seed(0)
    for key, value in case.weights.items():
        inner = key.removeprefix("memory_cell.model.")
        if inner == key:
            weights[key] = value
            continue
        prefix = "memory_cell.model.base_model.model."
        if inner.endswith(("q_proj.weight", "v_proj.weight")):
            a = torch.randn(rank, value.shape[1], generator=generator) * 0.1
            b = torch.randn(value.shape[0], rank, generator=generator) * 0.1
            layer = prefix + inner.removesuffix(".weight")
            weights |= {f"{layer}.base_layer.weight": value, f"{layer}.lora_A.default.weight": a}
            weights[f"{layer}.lora_B.default.weight"] = b
            expected[inner] = value + alpha / rank * b @ a
        else:
            weights[prefix + inner] = value
    settings = {"segment_length": 32, "num_sensory": 4, "queue_size": 5}
    model = load_hmt_pytorch(weights, golden.build_backbone(case), lora_alpha=alpha, **settings)
    assert len(expected) == 4
    for key, value in expected.items():
        torch.testing.assert_close(model.backbone.state_dict()[key], value)
    with pytest.raises(ValueError, match="lora_alpha"):
        load_hmt_pytorch(weights, golden.build_backbone(case), **settings)
    for part in ("base_layer.weight", "lora_A.default.weight"):
        kept = {key: value for key, value in weights.items() if not key.endswith(f"0.self_attn.q_proj.{part}")}
        with pytest.raises(ValueError, match=r"must hold lora_A, lora_B .* but lacks some of model\.layers\.0"):
            load_hmt_pytorch(kept, golden.build_backbone(case), lora_alpha=alpha, **settings)


@pytest.mark.parametrize("extra", ["lora_A.other.weight", "lora_B.default.bias"])
def test_factors_that_cannot_be_merged_are_refused(extra: str) -> None:
    layer = "memory_cell.model.base_model.model.model.layers.0.self_attn.q_proj"
    names = ("lora_A.default.weight", "lora_B.default.weight", extra)
    weights = {f"{layer}.{name}": torch.zeros(2, 2) for name in names}
    with pytest.raises(ValueError, match=f"one pair of LoRA factors of a layer and no biases, got .*{extra}"):
        load_hmt_pytorch(weights, backbone(), lora_alpha=8, segment_length=32, num_sensory=4)


def test_recall_keeps_its_precision_beside_layers_of_less(tmp_path: Path) -> None:
    """Loaded in float16, or by a quantizer of transformers, for which the same list counts."""
    model = hmt_model().eval()
    model.save_pretrained(tmp_path)
    loaded = HMTForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert (loaded.recall.wq.weight.dtype, loaded.memory.dtype) == (torch.float32, torch.float16)
    ids = token_ids(2, 70)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits.float(), model(ids).logits, atol=0.01, rtol=0.01)
    kept = HfQuantizer.get_modules_to_not_convert(loaded, None, loaded._keep_in_fp32_modules)
    assert not should_convert_module("recall.wq", kept)
    assert should_convert_module("backbone.model.layers.0.self_attn.q_proj", kept)


# what HMT-pytorch's --use_lora adapts
TARGETS = ["embed_tokens", "gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", TARGETS), ("llama-tied", TARGETS), ("qwen2", TARGETS), ("opt-projected", TARGETS),
        ("llama-tied", ["q_proj", "lm_head"]), ("llama-tied", ["embed_tokens", "lm_head"]),
        ("gpt2", ["c_proj", "c_attn"]),
    ],
    ids=["llama", "llama-tied", "qwen2", "opt-projected", "tied-head", "tied-head-and-embedding", "gpt2"],
)  # fmt: skip
@torch.no_grad()
def test_lora_as_hmt_pytorch_trains_it(name: str, targets: list[str], tmp_path: Path) -> None:
    """The embedding has factors too; an LM head that shares its weights has none, and must stay as it was."""
    peft = pytest.importorskip("peft")
    lm = backbone(name)
    width = lm.get_input_embeddings().weight.shape[1]
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=8, lora_alpha=32, lora_dropout=0.1)
    adapted = peft.get_peft_model(lm, lora)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.normal_(std=0.05)
    trained = RecurrentWrapper(
        MemoryCell(adapted, num_mem_tokens=1, num_prepend=4),
        emb=lm.get_input_embeddings(), word_emb_dim=width, hidden_dim=96, ltm_context=5,
        segment_size=32, max_n_segments=9, mask_size=32, n_cell_out=9,
    ).eval()  # fmt: skip
    ids = token_ids(2, 100)
    expected = trained(ids, labels=ids, segment_size=32)[0].logits
    settings = {"segment_length": 32, "num_sensory": 4, "queue_size": 5}
    model = load_hmt_pytorch(trained.state_dict(), backbone(name), lora_alpha=32, **settings).eval()
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(HMTForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("width", "scale"), [(64, 4096**-0.5), (4096, 1 / 4096)])
def test_wide_recall_keeps_its_scale(width: int, scale: float) -> None:
    """Over wide embeddings it was trained with 1/h."""
    shape = {"hidden_size": width, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 8, "vocab_size": 16}
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_hidden_layers=1))
    weights = {f"memory_cell.model.{k}": v for k, v in lm.state_dict().items()}
    weights |= {"mem": torch.zeros(1, width), "memory_cell.memory": torch.zeros(1, width)}
    for key in ("wq", "wk"):
        weights[f"cross_attn.{key}.weight"] = torch.zeros(4096, width)
    model = load_hmt_pytorch(weights, lm, segment_length=16, num_sensory=2)
    assert model.recall.softmax_scale == scale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"bert.pooler": torch.zeros(1)}, "no HMT-pytorch checkpoint"),
        (lambda w: w | {"memory_cell.model.model.extra": torch.zeros(1)}, "unexpected keys model.extra"),
        (lambda w: {k: v for k, v in w.items() if "embed_tokens" not in k}, "missing keys model.embed_tokens"),
        (lambda w: {k: v for k, v in w.items() if "cross_attn" not in k}, "missing keys recall.wq"),
        (lambda w: "nowhere.pth", "no file"),
        (lambda w: __file__, "must be a file of torch.save, .* is damaged or none"),
        (lambda w: w | {"mem": torch.zeros(1, 63)}, r"summary_prompt has the shape \[1, 63\], not \[1, 64\]"),
        (lambda w: w | {EMBEDDING: torch.zeros(99, 64)}, r"embed_tokens.weight has the shape \[99, 64\], not \["),
    ],
    ids=["foreign", "unexpected", "missing", "no-recall", "no-file", "garbage", "width", "vocabulary"],
)
def test_refused_checkpoints(change, message: str) -> None:
    case = golden.load("a_llama_evict")
    lm = golden.build_backbone(case)
    with torch.no_grad():
        lm.get_input_embeddings().weight.zero_()  # it has none of the file's yet
    before = {name: weight.clone() for name, weight in lm.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_hmt_pytorch(change(case.weights), lm, segment_length=32, num_sensory=4)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.state_dict().items())


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"mem": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="damaged or none: Weights only load failed"):
        load_hmt_pytorch(tmp_path / "evil.pth", backbone(), segment_length=16, num_sensory=2)
    assert not (tmp_path / "executed").exists()
