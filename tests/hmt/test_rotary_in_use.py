"""A fused model in use: caches, fallbacks, checkpointing, autocast, adapters, hooks, the compiler, CUDA."""

from __future__ import annotations

import pytest
import torch
from backbones import token_ids
from rotary_models import attentions, fused, padded, plain
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hmt


def _two_runs(model: PreTrainedModel) -> torch.Tensor:
    mask = padded(2, 21, slice(2, 4))
    mask[0, 9] = 0
    return model(token_ids(2, 21), attention_mask=mask, use_cache=False).logits[mask.bool()]


def _packed(model: PreTrainedModel) -> torch.Tensor:
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
    return model(token_ids(1, 21), position_ids=positions, use_cache=False).logits


def _dropout(model: PreTrainedModel) -> torch.Tensor:
    model.train()
    for attention in attentions(model):
        attention.attention_dropout = 0.3
    torch.manual_seed(3)
    return model(token_ids(1, 21), use_cache=False).logits


def _other_attention(model: PreTrainedModel) -> torch.Tensor:
    model.set_attn_implementation("eager")
    return model(token_ids(1, 21), use_cache=False).logits


def _cached(model: PreTrainedModel) -> torch.Tensor:
    out = model(token_ids(1, 21))
    return torch.cat([out.logits, model(token_ids(1, 3), past_key_values=out.past_key_values).logits], dim=1)


@pytest.mark.parametrize("run", [_two_runs, _packed, _dropout, _other_attention, _cached])
def test_falls_back_to_the_layers_own_forward(run, calls: list) -> None:
    ours, theirs = run(fused()), run(plain())
    assert calls == []
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "phi3-partial", "gpt-neox"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@torch.no_grad()
def test_generates_the_same_tokens(name: str, cache: str, calls: list) -> None:
    ours, theirs = fused(name), plain(name)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if cache == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    elif cache == "none":
        settings |= {"use_cache": False}
    mask = padded(2, 20)
    a, b = (model.generate(token_ids(2, 20), attention_mask=mask, **settings) for model in (ours, theirs))
    assert torch.equal(a, b)
    assert bool(calls) == (cache == "none")


def test_gradient_checkpointing() -> None:
    ours, theirs = fused(), plain()
    ids = token_ids(2, 15)
    ours.train().gradient_checkpointing_enable()
    for model in (ours, theirs):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_autocast(name: str) -> None:
    ours, theirs = fused(name, torch.float32), plain(name, torch.float32)
    ids = token_ids(2, 19)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = (model(ids, use_cache=False).logits for model in (ours, theirs))
    exact = fused(name)(ids, use_cache=False).logits
    error, expected = ((x.double() - exact).abs().max() for x in (a, b))
    assert error <= 2 * expected


class LowRank(nn.Module):
    """What PEFT puts in the place of a linear layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features, dtype=torch.float64) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, 4, dtype=torch.float64) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.mT @ self.up.mT


@pytest.mark.parametrize(("name", "targets"), [("llama", ["q_proj", "v_proj", "o_proj"]), ("phi3", ["qkv_proj"])])
def test_adapters_added_later_take_part(name: str, targets: list[str], calls: list) -> None:
    models = fused(name), plain(name)
    for model in models:
        model.requires_grad_(False)
        torch.manual_seed(0)
        for attention in attentions(model):
            for target in targets:
                setattr(attention, target, LowRank(getattr(attention, target)))
    ids = token_ids(2, 13)
    losses = [model(ids, labels=ids, use_cache=False).loss for model in models]
    assert len(calls) == 2
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], atol=1e-12, rtol=1e-12)
    for (key, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if a.requires_grad:
            assert a.grad.abs().max() > 0, key
            torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-8)


def test_hooks_still_run() -> None:
    model = fused()
    seen = []
    for name in ("self_attn", "self_attn.q_proj", "self_attn.o_proj"):
        model.model.layers[0].get_submodule(name).register_forward_hook(lambda *args, name=name: seen.append(name))
    model(token_ids(1, 5), use_cache=False)
    assert seen == ["self_attn.q_proj", "self_attn.o_proj", "self_attn"]


def test_compiles_without_a_graph_break(fresh_compiler: None) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **sizes), attn_implementation="hmt").eval()
    ids = token_ids(1, 12) % 64
    expected = model(ids, use_cache=False).logits.detach()
    hmt.fuse_rotary(model, everywhere=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3-partial", "gpt-neox"])
def test_on_cuda_the_default_fuses(name: str, calls: list) -> None:
    ours, theirs = plain(name, torch.float32).cuda(), plain(name, torch.float32).cuda()
    hmt.fuse_rotary(ours)
    ids = token_ids(2, 37).cuda()
    losses = [model(ids, labels=ids, use_cache=False).loss for model in (ours, theirs)]
    assert len(calls) == 2
    torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=1e-3)
    for loss in losses:
        loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-2, rtol=1e-2)
