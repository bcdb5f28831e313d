"""Training: rematerialised segments, truncated gradients, dropout, accumulation, autocast, and several processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backbones import hmt_model, token_ids
from live_memory import peak_bytes
from transformers import AutoModelForCausalLM, LlamaConfig

from hmt import HMTForCausalLM

LENGTH = 16 * 5 + 7  # five full segments and an open one


def gradients(model: HMTForCausalLM, run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of what `run` returns, by name, with the loss itself under "loss"."""
    model.zero_grad()
    loss = run()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def with_padding(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[1, :21] = 0
    mask[0, 40:43] = 0
    return mask


BACKBONES = [
    (name, "hmt", False) for name in ("llama", "mistral-window", "opt-projected", "gemma3", "gpt2", "mamba2", "rwkv")
]


@pytest.mark.parametrize(
    ("name", "mode", "offload"),
    [*BACKBONES, ("llama", "rmt", False), ("llama", "baseline", False), ("llama", "hmt", True), ("gpt2", "rmt", True)],
)
def test_rematerialisation_changes_no_gradient(name: str, mode: str, offload: bool) -> None:
    """In float64, with padding, an open last segment and the queue running over."""
    model = hmt_model(name, mode=mode, queue_size=2).double()
    ids = token_ids(2, LENGTH)
    mask = with_padding(ids)
    results = []
    for on in (False, True):
        model.config.rematerialize, model.config.offload_states = on, on and offload
        results.append(gradients(model, lambda: model(ids, attention_mask=mask, labels=ids).loss))
    own = {"hmt": {"memory", "summary_prompt", "recall.wq.weight", "recall.wk.weight"}, "rmt": {"memory"}}
    assert own.get(mode, set()) <= results[0].keys()
    assert_same(results[1], results[0], 1e-12)


@pytest.mark.parametrize("asked", ["logits", "state", "trace"])
def test_gradients_of_everything_that_is_returned(asked: str) -> None:
    """Not only of a loss: logits, the queue and recalled embeddings are differentiable through all segments."""
    model = hmt_model().double()
    ids = token_ids(2, LENGTH)

    def run() -> torch.Tensor:
        out = model(ids, output_trace=True)
        return {"logits": out.logits, "state": out.state.queue, "trace": out.trace["recalled"]}[asked].square().sum()

    results = []
    for model.config.rematerialize in (False, True):
        results.append(gradients(model, run))
    assert_same(results[1], results[0], 1e-12)


def test_weights_that_functional_call_lends() -> None:
    """A recomputation in the backward pass would come when they have been given back."""
    model, ids = hmt_model().double(), token_ids(2, LENGTH)
    lent = {name: (1.3 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    loss = torch.func.functional_call(model, lent, (ids,), {"labels": ids}).loss
    found = torch.autograd.grad(loss, list(lent.values()), allow_unused=True)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    expected = gradients(model, lambda: model(ids, labels=ids).loss)
    actual = {name: g for name, g in zip(lent, found, strict=True) if g is not None}
    assert_same({"loss": loss.detach(), **actual}, expected, 1e-6)


def dropout_model() -> HMTForCausalLM:
    model = hmt_model("gpt2").double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    return model


def test_dropout_is_repeated_in_the_backward_pass() -> None:
    model, ids = dropout_model(), token_ids(2, LENGTH)
    results = []
    for on in (False, True):
        model.config.rematerialize = on
        torch.manual_seed(7)
        results.append(gradients(model, lambda: model(ids, labels=ids).loss))
        results[-1]["next random number"] = torch.rand(1).double()
    assert_same(results[1], results[0], 1e-12)
    torch.manual_seed(8)
    other = gradients(model, lambda: model(ids, labels=ids).loss)
    assert not torch.allclose(other["loss"], results[0]["loss"], atol=1e-6)


def test_with_the_backbones_own_checkpointing() -> None:
    model, ids = hmt_model().double().train(), token_ids(2, LENGTH)
    expected = gradients(model, lambda: model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable()
    assert_same(gradients(model, lambda: model(ids, labels=ids).loss), expected, 1e-12)


def test_under_autocast() -> None:
    model, ids = hmt_model(attn_implementation="sdpa"), token_ids(2, LENGTH)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, labels=ids).loss

    results = []
    for model.config.rematerialize in (False, True):
        results.append(gradients(model, run))
    assert_same(results[1], results[0], 1e-6)
    exact = gradients(model, lambda: model(ids, labels=ids).loss)
    assert abs(exact["loss"] - results[1]["loss"]) > 1e-7  # autocast was on


def test_gradient_accumulation() -> None:
    """Two halves of a batch, divided by the labels of the whole, sum up to the whole."""
    model, ids = hmt_model().double(), token_ids(4, LENGTH)
    whole = gradients(model, lambda: model(ids, labels=ids).loss)
    count = 4 * (LENGTH - 1)
    model.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for part in ids.split(2):
        half = model(part, labels=part, num_items_in_batch=count).loss
        half.backward()
        loss += half.detach()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same({"loss": loss, **found}, whole, 1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("mode", ["hmt", "rmt"])
@pytest.mark.parametrize("rematerialize", [True, False], ids=["remat", "kept"])
def test_bptt_depth_is_detaching_by_hand(depth: int, mode: str, rematerialize: bool) -> None:
    """Runs of `depth` segments, each read from the detached state of the one before."""
    model = hmt_model(mode=mode, summary_source="previous", rematerialize=rematerialize).double()
    ids = token_ids(2, LENGTH)
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)

    def by_hand() -> torch.Tensor:
        state, total = None, 0
        for part, labels in zip(ids.split(16 * depth, dim=1), following.split(16 * depth, dim=1), strict=True):
            out = model(part, shift_labels=labels, state=state, num_items_in_batch=1)
            state, total = out.state.detach(), total + out.loss
        return total

    expected = gradients(model, by_hand)
    complete = gradients(model, lambda: model(ids, labels=ids, num_items_in_batch=1).loss)
    model.config.bptt_depth = depth
    truncated = gradients(model, lambda: model(ids, labels=ids, num_items_in_batch=1).loss)
    # the loss is summed in float32, whatever the model is
    assert_same(truncated, expected, 1e-6)
    weight = "backbone.model.layers.0.mlp.up_proj.weight"
    assert (truncated[weight] - complete[weight]).norm() > 1e-4 * complete[weight].norm()


def test_bptt_depth_counts_segments_of_the_text_not_of_the_call() -> None:
    model = hmt_model(summary_source="previous", bptt_depth=2).double()
    ids = token_ids(2, LENGTH)
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)

    def in_two_calls() -> torch.Tensor:
        first = model(ids[:, :48], shift_labels=following[:, :48], num_items_in_batch=1)
        second = model(ids[:, 48:], shift_labels=following[:, 48:], num_items_in_batch=1, state=first.state)
        return first.loss + second.loss

    whole = gradients(model, lambda: model(ids, labels=ids, num_items_in_batch=1).loss)
    assert_same(gradients(model, in_two_calls), whole, 1e-6)


def deep_model(**settings: object) -> HMTForCausalLM:
    """Twelve narrow layers: as in real models, what a segment leaves behind is small beside its activations."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=12, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    backbone = AutoModelForCausalLM.from_config(config)
    return HMTForCausalLM.from_backbone(backbone, segment_length=48, num_sensory=4, queue_size=16, **settings)


def training_peak(model: HMTForCausalLM, segments: int) -> int:
    ids = token_ids(1, 48 * segments) % 64
    model.zero_grad(set_to_none=False)
    return peak_bytes(lambda: model(ids, labels=ids).loss.backward())


def test_peak_memory_does_not_grow_with_depth() -> None:
    model = deep_model()
    training_peak(model, 1)
    kept = deep_model(rematerialize=False)
    training_peak(kept, 1)
    four, sixteen = training_peak(model, 4), training_peak(model, 16)
    assert sixteen <= 1.05 * four, f"{four:,} bytes at 4 segments, {sixteen:,} at 16"
    all_kept = training_peak(kept, 4)
    assert all_kept >= 3 * four, f"{four:,} bytes, {all_kept:,} with all activations kept"


def test_one_segment_is_not_recomputed() -> None:
    """Nor is the last of several: the backward pass begins with it."""
    model = hmt_model()
    calls = []
    model.backbone.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for segments, expected in ((1, 1), (3, 3 + 1 + 2 + 1)):  # passes, summary batches, both again
        calls.clear()
        ids = token_ids(1, 16 * segments)
        model(ids, labels=ids).loss.backward()
        assert len(calls) == expected
