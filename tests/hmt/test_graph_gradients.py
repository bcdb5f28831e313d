"""Gradients of training graphs reach the right parameters, whoever holds, shares or changes them; on a tape."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from backbones import token_ids
from test_layer_graphs import pair
from test_training import assert_same, gradients
from torch import nn

from hmt import HMTForCausalLM

pytestmark = pytest.mark.usefixtures("as_captured")
IDS = token_ids(1, 16 * 4)
TEXTS = [token_ids(1, 16 * 6, seed=seed) for seed in range(4)]


def assert_same_gradients(run: Callable, ours: HMTForCausalLM, theirs: HMTForCausalLM) -> None:
    assert_same(*(gradients(model, lambda model=model: run(model)) for model in (ours, theirs)), 1e-9)


def loss(model: HMTForCausalLM, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, labels=ids).loss


def test_another_parameter_in_the_same_memory() -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        loss(model).backward()
        layer = model.backbone.model.layers[0].mlp.up_proj
        layer.weight = nn.Parameter(layer.weight.data)
    assert_same_gradients(loss, ours, theirs)


@pytest.mark.parametrize("kind", [nn.Parameter, lambda tensor: tensor.clone().requires_grad_()], ids=["shared", "own"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_functional_call(kind: Callable, first: bool) -> None:
    """Its tensors get their gradients, and the model's parameters theirs again afterwards."""
    ours, theirs = pair()
    results = []
    for model in (ours, theirs):
        if not first:
            loss(model).backward()
        parameters = {name: kind(p.detach()) for name, p in model.named_parameters()}
        found = torch.func.functional_call(model, parameters, (IDS,), {"labels": IDS}).loss
        of = torch.autograd.grad(found, list(parameters.values()), allow_unused=True)
        results.append({name: x for name, x in zip(parameters, of, strict=True) if x is not None})
    assert_same(*results, 1e-9)
    assert_same_gradients(loss, ours, theirs)


@pytest.mark.parametrize("shared", ["module", "parameter"])
def test_layers_that_share(shared: str) -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        first, second = model.backbone.model.layers
        if shared == "module":
            second.mlp = first.mlp
        else:
            second.mlp.up_proj.weight = first.mlp.up_proj.weight
    own = ours.backbone.model.layers[0].mlp.up_proj.weight
    assert_same_gradients(loss, ours, theirs)
    assert ours.backbone.model.layers[0].mlp.up_proj.weight is own


def test_weights_that_change_before_the_backward_pass_are_an_error() -> None:
    for model in pair():
        found = loss(model)
        with torch.no_grad():
            for p in model.backbone.model.layers.parameters():
                p.mul_(1.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            found.backward()


def test_forward_in_two_threads_and_one_backward_pass() -> None:
    """Autograd counts the passes of each thread by themselves, so those of both calls come in turns."""

    def run(model: HMTForCausalLM) -> torch.Tensor:
        losses = []
        for ids in TEXTS[:2]:
            thread = threading.Thread(target=lambda ids=ids: losses.append(loss(model, ids)))
            thread.start()
            thread.join()
        return losses[0] + losses[1]

    assert_same_gradients(run, *pair())


def test_backward_passes_that_overlap_are_right_or_refused() -> None:
    ours, theirs = pair()
    names = [name for name, _ in ours.named_parameters() if "layers.0" in name]
    weights = [ours.get_parameter(name) for name in names]
    losses = [loss(ours, ids) for ids in TEXTS]
    gate, results = threading.Barrier(len(TEXTS)), {}

    def run(index: int) -> None:
        gate.wait()
        try:
            results[index] = torch.autograd.grad(losses[index], weights)
        except RuntimeError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, ids in enumerate(TEXTS):
        if isinstance(results[index], str):
            assert "two backward passes of one model overlap" in results[index]
        else:
            expected = torch.autograd.grad(loss(theirs, ids), [theirs.get_parameter(name) for name in names])
            torch.testing.assert_close(results[index], expected, atol=1e-9, rtol=1e-9)
    assert_same_gradients(loss, ours, theirs)


def test_states_through_several_calls_and_parts_of_a_loss() -> None:
    def run(model: HMTForCausalLM) -> torch.Tensor:
        total, state = torch.zeros((), dtype=torch.float64), None
        for ids in TEXTS[:3]:
            out = model(ids[:, :37], labels=ids[:, :37], state=state)
            total, state = total + out.loss, out.state
        total.backward(retain_graph=True, inputs=[model.memory, model.backbone.model.layers[0].mlp.up_proj.weight])
        state.queue.square().mean().backward(retain_graph=True)
        return total

    assert_same_gradients(run, *pair())
