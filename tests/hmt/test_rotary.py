"""fuse_rotary: the same model with rotary embedding inside the operator, reversible; refused elsewhere, and why."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from backbones import GROUPED, backbone, hmt_model, token_ids
from rotary_models import attentions, fused, padded, plain
from transformers import AutoModelForCausalLM, CohereConfig, GlmConfig, GPTJConfig, PreTrainedModel

import hmt
import hmt_kernels
from hmt import rotary

SUPPORTED = [
    "llama", "llama-yarn", "granite", "mistral-window", "mixtral-window", "qwen2", "qwen2-window", "qwen2-moe-window",
    "qwen3", "qwen3-moe", "phi3", "phi3-partial", "gpt-neox", "gpt-neox-serial",
]  # fmt: skip


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("pad", [False, True], ids=["whole", "padded"])
def test_same_logits_and_gradients(name: str, impl: str, pad: bool, calls: list) -> None:
    ours, theirs = fused(name), plain(name)
    ids, mask = token_ids(2, 37), padded(2, 37) if pad else None
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    with hmt_kernels.use_impl(impl):
        outputs = [model(ids, attention_mask=mask, labels=labels, use_cache=False) for model in (ours, theirs)]
    rotary_dim = {"phi3-partial": 8, "gpt-neox": 4, "gpt-neox-serial": 4}.get(name, 16)
    assert calls == [(37, rotary_dim)] * 2
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-10, rtol=1e-10)
    for out in outputs:
        out.loss.backward()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", SUPPORTED)
def test_changes_only_the_forward_of_attention_layers(name: str) -> None:
    model, before = plain(name), plain(name)
    modules = {key: (type(module), set(vars(module))) for key, module in model.named_modules()}
    hmt.fuse_rotary(model)
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    added = {key: set(vars(module)) - modules[key][1] for key, module in model.named_modules()}
    assert {key for key, names in added.items() if names} == {
        key for key, module in model.named_modules() if any(module is a for a in attentions(model))
    }
    assert all(names in (set(), {"forward"}) for names in added.values())
    hmt.unfuse_rotary(model)
    assert {key: (type(module), set(vars(module))) for key, module in model.named_modules()} == modules


def test_unfuse_leaves_others_alone() -> None:
    model = plain("opt")
    hmt.unfuse_rotary(model)
    model = fused()
    hmt.unfuse_rotary(model)
    hmt.unfuse_rotary(model)
    assert not any(rotary.is_fused(a) for a in attentions(model))


def test_unfuse_refuses_a_wrapped_forward() -> None:
    model = fused()
    attention = attentions(model)[1]
    forward = attention.forward
    attention.forward = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))
    with pytest.raises(RuntimeError, match="LlamaAttention has been wrapped"):
        hmt.unfuse_rotary(model)
    assert rotary.is_fused(attentions(model)[0])
    attention.forward = forward
    hmt.unfuse_rotary(model)
    assert all("forward" not in vars(a) for a in attentions(model))


def deep(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def saved(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [deep, pickled, saved])
def test_a_copy_does_not_call_the_original(duplicate, calls: list) -> None:
    model = fused("qwen3")
    ids = token_ids(1, 11)
    expected = model(ids, use_cache=False).logits.detach()
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    calls.clear()
    torch.testing.assert_close(twin(ids, use_cache=False).logits, expected, atol=0, rtol=0)
    assert len(calls) == 2
    assert all(a.forward.args[0] is a for a in attentions(twin))
    hmt.unfuse_rotary(twin)
    assert "forward" not in vars(attentions(twin)[0]) and rotary.is_fused(attentions(model)[0])


REFUSED = {
    "opt": (lambda: backbone("opt"), "hands no rotary tables"),
    "gpt2": (lambda: backbone("gpt2"), "hands no rotary tables"),
    "gptj": (lambda: AutoModelForCausalLM.from_config(
        GPTJConfig(vocab_size=128, n_embd=64, n_layer=1, n_head=4, rotary_dim=8)), "hands no rotary tables"),
    "gemma2": (lambda: backbone("gemma2"), "caps its attention scores"),
    "gemma3": (lambda: backbone("gemma3"), "Gemma3Attention is not one of"),
    "cohere": (lambda: AutoModelForCausalLM.from_config(CohereConfig(**GROUPED)), "rotates neighbouring features"),
    "glm": (lambda: AutoModelForCausalLM.from_config(
        GlmConfig(**GROUPED, head_dim=16)), "rotates neighbouring features"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_a_reason(name: str) -> None:
    make, reason = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=reason):
        hmt.fuse_rotary(model)
    assert not any("forward" in vars(module) for module in model.modules())
    if name not in ("gptj", "gemma2"):
        with pytest.raises(ValueError, match=reason):
            hmt.HMTForCausalLM.from_backbone(model, fused_rotary=True, segment_length=64)


def test_refuses_other_attention_and_replaced_forwards() -> None:
    model = backbone()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="must be 'hmt', got 'sdpa'"):
        hmt.fuse_rotary(model)
    model.set_attn_implementation("hmt")
    attention = attentions(model)[1]
    attention.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="replaced already"):
        hmt.fuse_rotary(model)
    assert "forward" not in vars(attentions(model)[0])

    class Changed(type(attention)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    del attention.forward
    attention.__class__ = Changed
    with pytest.raises(ValueError, match="Changed is not one of"):
        hmt.fuse_rotary(model)


def test_saves_and_loads(tmp_path) -> None:
    model = hmt_model("qwen3", fused_rotary=True)
    ids = token_ids(2, 40)
    model.save_pretrained(tmp_path)
    loaded = hmt.HMTForCausalLM.from_pretrained(tmp_path).eval()
    assert all(rotary.is_fused(a) for a in attentions(loaded))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    other = hmt.HMTForCausalLM.from_pretrained(tmp_path, fused_rotary=False)
    assert not any("forward" in vars(module) for module in other.modules())


@pytest.mark.parametrize("setting", [None, True, False])
def test_setting_of_an_hmt(setting: bool | None, calls: list) -> None:
    """None decides by device: on the CPU only the last layer, which computes fewer rows, rotates in the operator."""
    ids = token_ids(2, 37)
    model = hmt_model(fused_rotary=setting)
    expected = hmt_model(fused_rotary=False)(ids, labels=ids)
    calls.clear()
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=1e-5)
    rows = {q_rows for q_rows, _ in calls}
    augmented = 16 + 3 + 2
    assert (augmented in rows) == (setting is True)
    assert (1 in rows) == (setting is not False)


@pytest.mark.parametrize("setting", ["auto", 1, "true"])
def test_setting_is_checked(setting: object) -> None:
    with pytest.raises(ValueError, match=f"fused_rotary must be True, False or None, got {setting!r}"):
        hmt.HMTConfig(fused_rotary=setting)
