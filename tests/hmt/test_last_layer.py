"""The last layer for the last rows only: the same results with less work, and everything as before elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from backbones import backbone, hmt_model, token_ids
from transformers import DynamicCache, PreTrainedModel

from hmt import last_layer, rotary
from hmt.backbone import embed, patch_layers, run_layers
from hmt.model import HMTForCausalLM

SHORTENED = ["llama", "mistral-window", "qwen2", "qwen2-window", "qwen2-moe-window", "qwen3", "qwen3-moe"]
WHOLE = ["opt-projected", "gpt2", "gemma3", "gpt-neox", "phi3", "granite", "mixtral-window"]


def prepared(name: str, setting: bool | None = None) -> PreTrainedModel:
    model = backbone(name).double()
    model.set_attn_implementation("hmt")
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    patch_layers(model, setting)
    return model


def mask_of(kind: str, rows: int, length: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[0, 4:11] = False
    if kind == "two runs":
        mask[0, 15] = False
    return mask


def seen_by(module: torch.nn.Module) -> list[int]:
    """Filled with the number of rows that each call of a module gets."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    return rows


@pytest.mark.parametrize("name", SHORTENED)
@pytest.mark.parametrize("kind", ["none", "hole", "two runs"])
@pytest.mark.parametrize("last_rows", [1, 18, 23])
def test_same_rows_and_gradients(name: str, kind: str, last_rows: int) -> None:
    ours, theirs = prepared(name), prepared(name, setting=False)
    rows = seen_by(ours.base_model.layers[-1].mlp)
    mask, weight = mask_of(kind, 2, 23), torch.randn(2, last_rows, 64, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        embeds = embed(model, token_ids(2, 23)).detach().requires_grad_()
        hidden = run_layers(model, embeds, mask, last_rows=last_rows).last_hidden_state
        (hidden * weight).sum().backward()
        results.append((hidden, embeds.grad))
    assert rows == [last_rows]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-8, rtol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_queries_of_other_rows_are_not_computed(name: str) -> None:
    model = prepared(name)
    last, first = model.base_model.layers[-1], model.base_model.layers[0]
    seen = {part: seen_by(last.self_attn.get_submodule(part)) for part in ("q_proj", "k_proj", "v_proj", "o_proj")}
    first_seen = seen_by(first.self_attn.q_proj)
    run_layers(model, embed(model, token_ids(1, 23)), last_rows=3)
    assert seen == {"q_proj": [3], "k_proj": [23], "v_proj": [23], "o_proj": [3]}
    assert first_seen == [23]


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_other_backbones_give_the_same_rows(name: str) -> None:
    model = prepared(name)
    assert not last_layer.takes_last_rows(model.base_model)
    embeds = embed(model, token_ids(2, 23))
    whole, part = (run_layers(model, embeds, last_rows=n).last_hidden_state for n in (None, 5))
    torch.testing.assert_close(part, whole[:, -5:], atol=0, rtol=0)


@torch.no_grad()
def test_a_cache_gets_all_keys() -> None:
    ours, theirs = prepared("llama"), prepared("llama", setting=False)
    ids = token_ids(2, 20)
    outputs = []
    for model, last_rows in ((ours, 6), (theirs, None)):
        cache = DynamicCache(config=model.config)
        hidden = run_layers(model, embed(model, ids), None, cache, last_rows=last_rows).last_hidden_state[:, -6:]
        assert cache.get_seq_length() == 20
        next_hidden = run_layers(model, embed(model, ids[:, :1]), None, cache).last_hidden_state
        outputs.append((hidden, next_hidden, cache.layers[-1].keys, cache.layers[-1].values))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_gradient_checkpointing_recomputes_the_same() -> None:
    ours, theirs = prepared("llama"), prepared("llama", setting=False)
    ours.train().gradient_checkpointing_enable()
    for model in (ours, theirs):
        run_layers(model, embed(model, token_ids(1, 12)), last_rows=2).last_hidden_state.square().sum().backward()
    for a, b in zip(ours.base_model.parameters(), theirs.base_model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-8)


@torch.no_grad()
def test_changing_the_attention_keeps_the_rows() -> None:
    model = prepared("llama")
    embeds = embed(model, token_ids(1, 12))
    expected = run_layers(model, embeds).last_hidden_state[:, -3:]
    for implementation in ("eager", "sdpa", "hmt"):
        model.set_attn_implementation(implementation)
        assert last_layer.takes_last_rows(model.base_model) == (implementation == "hmt")
        hidden = run_layers(model, embeds, last_rows=3).last_hidden_state
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)  # eager's softmax is float32


def test_patches_come_and_go_together() -> None:
    model = prepared("llama")
    keys = list(model.state_dict())
    assert last_layer.takes_last_rows(model.base_model)
    twin = copy.deepcopy(model)
    patch_layers(model, False)
    assert not any("forward" in vars(module) for module in model.modules())
    assert list(model.state_dict()) == keys
    assert last_layer.takes_last_rows(twin.base_model)
    assert twin.base_model.layers[-1].forward.args[0] is twin.base_model.layers[-1]
    rotary.unfuse_rotary(twin)
    assert not last_layer.takes_last_rows(twin.base_model)


def _loss_and_gradients(model: HMTForCausalLM, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    ids = token_ids(2, 53)
    loss = model(ids, attention_mask=mask, labels=ids).loss
    return loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("mode", ["hmt", "rmt", "baseline"])
@pytest.mark.parametrize("pad", [False, True], ids=["whole", "padded"])
def test_same_hmt(mode: str, pad: bool) -> None:
    mask = None
    if pad:
        mask = torch.ones(2, 53, dtype=torch.long)
        mask[1, :20] = 0
    ours, theirs = (hmt_model("qwen3", mode=mode, fused_rotary=setting) for setting in (None, False))
    rows = seen_by(ours.backbone.base_model.layers[-1].mlp)
    results = [_loss_and_gradients(model.double(), mask) for model in (ours, theirs)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    ending = 0 if mode == "baseline" else 1
    assert set(rows) - {1} == {16 + ending, 5}
    assert (1 in rows) == (mode == "hmt")
