"""What PEFT has put into a model by itself: saved as an adapter of ours, or refused before it is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import VOCAB, backbone, hmt_model
from test_adapters import randomize
from torch import nn

from hmt.adapters import FILE, load_adapter, save_adapter, select

peft = pytest.importorskip("peft")
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


PLAIN = {
    "as-usual": ("llama", {}),
    "frozen": ("llama", {}),  # as PEFT loads what is not to be trained further
    "rank-stabilised": ("llama", {"use_rslora": True}),
    "ranks-by-layer": ("llama", {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 32}}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied-head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
}
REFUSED = {
    "magnitudes": (peft.LoraConfig(**LORA, use_dora=True), "lora_magnitude_vector"),
    "biases": (peft.LoraConfig(**LORA, bias="lora_only"), "bias='lora_only'"),
    "other-weights": (peft.LoraConfig(**LORA, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "copies": (peft.LoraConfig(**LORA, modules_to_save=["lm_head"]), "lm_head.modules_to_save"),
    "tokens": (peft.LoraConfig(**LORA, trainable_token_indices=[5]), "trainable_tokens_delta"),
    "memory": (peft.LoraConfig(**(LORA | {"target_modules": ["q_proj", "wq"]})), "recall.wq"),
    "scales": (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "ia3_l"),
    "singular-values": (peft.AdaLoraConfig(init_r=2, total_step=9, target_modules=["q_proj"]), "lora_[AE].default"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_factors_come_back_and_so_does_the_memory_that_peft_froze(case: str, tmp_path: Path) -> None:
    name, changes = PLAIN[case]
    model = peft.get_peft_model(hmt_model(name), peft.LoraConfig(**(LORA | changes))).get_base_model()
    assert not model.memory.requires_grad
    randomize(model)
    if case == "frozen":
        model.requires_grad_(False)
    save_adapter(model, tmp_path, "nowhere")
    ids = torch.randint(3, VOCAB, (2, 50))
    loaded = load_adapter(tmp_path, backbone(name)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, atol=2e-5, rtol=1e-4)


def test_a_wrapped_model_is_saved_as_what_it_wraps(tmp_path: Path) -> None:
    model = peft.get_peft_model(hmt_model(), peft.LoraConfig(**LORA))
    save_adapter(model.get_base_model(), tmp_path / "inner", "nowhere")
    for name, wrapped in (("peft", model), ("compiled", torch.compile(model))):
        save_adapter(wrapped, tmp_path / name, "nowhere")
        assert (tmp_path / name / FILE).read_bytes() == (tmp_path / "inner" / FILE).read_bytes()


def test_experts_whose_factors_stand_beside_no_linear_layer_are_refused(tmp_path: Path) -> None:
    model = hmt_model("mixtral-window")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    peft.inject_adapter_in_model(config, model.backbone)
    with pytest.raises(ValueError, match=r"plain LoRA .*mlp\.experts"):
        save_adapter(model, tmp_path, "nowhere")


def test_a_start_is_seen_wherever_the_factors_were_put(tmp_path: Path) -> None:
    model = hmt_model()
    peft.inject_adapter_in_model(peft.LoraConfig(**LORA, init_lora_weights="pissa"), model.backbone.model)
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        save_adapter(model, tmp_path, "nowhere")


def test_factors_of_a_head_beside_weights_that_are_trained_too_are_refused(tmp_path: Path) -> None:
    model = hmt_model("llama-tied")
    select(model, "lora", target_modules=["lm_head"])
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="factors of a head"):
        save_adapter(model, tmp_path, "nowhere")


def test_factors_are_not_added_to_quantised_weights(tmp_path: Path) -> None:
    model = hmt_model()
    select(model, "lora")
    save_adapter(model, tmp_path, "nowhere")
    plain = backbone()
    layer = plain.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), False)
    with pytest.raises(ValueError, match="cannot be added to quantised weights"):
        load_adapter(tmp_path, plain)


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_adapter_does_not_hold_is_refused(case: str, tmp_path: Path) -> None:
    config, named = REFUSED[case]
    name = "qwen2" if case == "biases" else "llama"
    model = peft.get_peft_model(hmt_model(name), config).get_base_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=f"whole weights or plain LoRA .*{named}.*merge_and_unload"):
        save_adapter(model, tmp_path, "nowhere")
    assert not (tmp_path / FILE).exists()


def test_factors_of_another_name_are_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(hmt_model(), peft.LoraConfig(**LORA), adapter_name="mine").get_base_model()
    with pytest.raises(ValueError, match=r"whole weights or plain LoRA .*lora_A\.mine\.weight"):
        save_adapter(model, tmp_path, "nowhere")


def test_tensors_that_no_model_takes_are_refused(tmp_path: Path) -> None:
    model = hmt_model()
    model.backbone.model.extra = nn.Parameter(torch.zeros(3))
    select(model, "full")
    save_adapter(model, tmp_path, "nowhere")
    with pytest.raises(ValueError, match=r"does not fit the backbone LlamaForCausalLM: .*backbone\.model\.extra"):
        load_adapter(tmp_path, backbone())
