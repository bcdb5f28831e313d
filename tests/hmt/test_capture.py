"""When nothing is captured, and what a captured pass is compared with before it is replayed."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from backbones import hmt_model, token_ids
from test_layer_graphs import pair
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from hmt import HMTForCausalLM, capture, layer_graphs, static_step

pytestmark = pytest.mark.usefixtures("as_captured")
IDS = token_ids(1, 16 * 4)


def test_a_cpu_takes_the_ordinary_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that nothing is captured for would only cost time."""
    model = hmt_model(cuda_graphs=True)
    monkeypatch.setattr(capture, "DEVICES", ("cuda",))
    model(IDS, labels=IDS).loss.backward()
    model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert model not in layer_graphs._graphs and model not in static_step._steps


def test_a_turn_that_cannot_begin_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(device: torch.device) -> torch.cuda.Stream:
        raise RuntimeError("CUDA error")

    turn = capture.Turn(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "current_stream", failing)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA error"), turn:
            pass


def forward_mode(function: Callable) -> Callable:
    return lambda parameters: torch.func.jvp(function, (parameters,), (parameters,))


@pytest.mark.parametrize("transform", [torch.func.grad, forward_mode])
def test_torch_func(transform: Callable) -> None:
    """It hands tensors without addresses to the layers."""
    ours, theirs = pair()
    results = []
    for model in (ours, theirs):
        model.config.rematerialize = False
        model.backbone.set_attn_implementation("eager")  # which forward differentiation knows

        def loss(parameters: dict, model: HMTForCausalLM = model) -> torch.Tensor:
            return torch.func.functional_call(model, parameters, (IDS[:, :16],)).logits.square().mean()

        results.append(transform(loss)({name: p.detach() for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results)


def backward_hook(model: HMTForCausalLM) -> object:
    return model.backbone.model.layers[1].register_full_backward_hook(lambda module, given, out: (given[0] * 0.5,))


def backward_pre_hook(model: HMTForCausalLM) -> object:
    return model.backbone.model.layers[1].register_full_backward_pre_hook(lambda module, out: (out[0] * 0.5,))


def forward_hook(model: HMTForCausalLM) -> object:
    return model.backbone.model.layers[1].register_forward_hook(lambda module, given, out: out * 0.5)


def global_hook(model: HMTForCausalLM) -> object:
    mlp = model.backbone.model.layers[1].mlp
    return nn.modules.module.register_module_forward_hook(lambda module, _, out: out * 0.5 if module is mlp else None)


def replaced_forward(model: HMTForCausalLM) -> None:
    mlp = model.backbone.model.layers[1].mlp
    mlp.forward = lambda x, forward=mlp.forward: forward(x) * 0.5


def fewer_layers(model: HMTForCausalLM) -> None:
    model.backbone.config.num_hidden_layers = 1


@pytest.mark.parametrize(
    "change", [backward_hook, backward_pre_hook, forward_hook, global_hook, replaced_forward, fewer_layers]
)
def test_what_changes_a_pass_after_a_capture_is_seen(change: Callable) -> None:
    results = []
    for model in pair():
        before = model(IDS, labels=IDS).loss
        before.backward()
        gradient = model.memory.grad.clone()
        handle = change(model)
        try:
            model.zero_grad()
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            assert not torch.allclose(model.memory.grad, gradient)
        finally:
            if handle is not None:
                handle.remove()
        results.append((loss, model.memory.grad))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dropped", ["activations", "layers"])
def test_functions_that_draw_random_numbers_are_not_captured(dropped: str) -> None:
    """OPT drops out without a module for it, and skips whole layers: found by what a pass does to the generators."""
    torch.manual_seed(0)
    rates = {"dropout": 0.3, "layerdrop": 0.0} if dropped == "activations" else {"dropout": 0.0, "layerdrop": 0.5}
    shape = {"vocab_size": 128, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    backbone = AutoModelForCausalLM.from_config(OPTConfig(**shape, **rates))
    settings = {"segment_length": 16, "num_sensory": 3, "queue_size": 3, "cuda_graphs": True}
    model = HMTForCausalLM.from_backbone(backbone, **settings).double().train()
    with torch.no_grad():
        assert len({float(model(IDS).logits.sum()) for _ in range(8)}) > 4

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return model(IDS).logits.square().mean()

    loss().backward()
    weight = model.backbone.model.decoder.layers[0].fc1.weight
    direction = torch.randn_like(weight)
    slope = (weight.grad * direction).sum()
    weight.data.add_(direction, alpha=1e-8)
    up = loss()
    weight.data.sub_(direction, alpha=2e-8)
    torch.testing.assert_close(slope, (up - loss()) / 2e-8, rtol=1e-3, atol=1e-7)
    assert not any(
        graph is not None for graphs in layer_graphs._graphs[model].values() for graph in graphs.graphs.values()
    )


def test_the_detection_of_anomalies_goes_without() -> None:
    ours, _ = pair()
    with torch.autograd.detect_anomaly(check_nan=True):
        ours(IDS, labels=IDS).loss.backward()
    assert ours not in layer_graphs._graphs


@torch.no_grad()
def test_an_error_without_a_message_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(layer_graphs.LayerGraphs, "_make", failing)
    monkeypatch.setattr(capture, "not_here", lambda model: None)
    monkeypatch.setattr(capture, "USES_BEFORE", 0)
    with pytest.warns(UserWarning, match="without a CUDA graph .*: NotImplementedError"):
        hmt_model(cuda_graphs=None).read(IDS)


@torch.no_grad()
def test_a_model_that_is_gone_is_not_kept() -> None:
    """Not by a forward that was replaced on it, as accelerate does, nor by those of its layers."""
    ours, _ = pair()
    ours.forward = functools.partial(type(ours).forward, ours)
    replaced_forward(ours)
    ours(IDS)
    assert ours in layer_graphs._graphs
    gone = weakref.ref(ours)
    del ours
    gc.collect()
    assert gone() is None


def test_nothing_is_kept_of_weights_that_are_gone() -> None:
    ours, _ = pair()
    for change in (ours.float, ours.double):
        change()
        ours.zero_grad()
        ours(IDS, labels=IDS).loss.backward()
    assert len([graphs for graphs in layer_graphs._graphs[ours].values() if graphs.sums]) == 1


def test_a_model_in_a_checkpoint() -> None:
    """A capture runs a backward pass, which must not unpack, and so recompute, what the checkpoint has packed."""
    results = []

    def run() -> None:
        for model in pair():
            loss = torch.utils.checkpoint.checkpoint(
                lambda ids, model=model: model(ids, labels=ids).loss, IDS, use_reentrant=False
            )
            loss.backward()
            results.append((loss.detach(), model.memory.grad))

    thread = threading.Thread(target=run, daemon=True)  # it used to wait for itself
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)


def test_the_callers_hooks_do_not_see_what_a_capture_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    packed: list[torch.Size] = []
    try_, inside = layer_graphs.LayerGraphs._try, []

    def watched(*arguments: object) -> object:
        before = len(packed)
        result = try_(*arguments)
        inside.append(len(packed) - before)
        return result

    monkeypatch.setattr(layer_graphs.LayerGraphs, "_try", watched)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x):
        ours(IDS, labels=IDS)
    assert packed and inside and not any(inside)
