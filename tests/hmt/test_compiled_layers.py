"""Compiled layers read, score, train and generate as the layers do, and one compilation serves all of a kind."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from backbones import CONFIGS, backbone, hmt_model, token_ids
from transformers import AutoModelForCausalLM

import hmt
from hmt import HMTForCausalLM, compiled_layers

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> Iterator[list[torch.fx.GraphModule]]:
    """All that is compiled, without breaks, by the stages of torch.compile that come before its code generator."""
    made: list[torch.fx.GraphModule] = []
    compile_, compiled = torch.compile, compiled_layers._compiled.__wrapped__

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=backend, fullgraph=True))
    monkeypatch.setattr(compiled_layers, "_compiled", functools.cache(compiled))
    yield made


def pair(name: str = "llama", **settings: object) -> tuple[HMTForCausalLM, HMTForCausalLM]:
    """The same model of five layers with compiled ones and without."""
    models = []
    for compiles in (True, False):
        torch.manual_seed(0)
        config = CONFIGS[name]()
        config.num_hidden_layers = 5
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[0]] * 5
        plain = AutoModelForCausalLM.from_config(config).eval()
        shape = {"segment_length": 16, "num_sensory": 3, "queue_size": 3, "summary_batch_size": 4, **settings}
        models.append(HMTForCausalLM.from_backbone(plain, compile_layers=compiles, **shape))
    models[0].load_state_dict(models[1].state_dict())
    return models[0], models[1]


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_training(name: str, graphs: list) -> None:
    """Loss, logits, memories and every gradient."""
    ours, theirs = pair(name)
    padded = name in ("llama", "gemma2")
    ids = token_ids(2, 16 * 3 + 5)
    mask = torch.ones_like(ids)
    mask[1, 20:24] = 1 - padded
    outs = [model(ids, mask, labels=ids, logits_to_keep=0) for model in (ours, theirs)]
    for out in outs:
        out.loss.backward()
    torch.testing.assert_close(outs[0].logits, outs[1].logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outs[0].state.queue, outs[1].state.queue, atol=1e-5, rtol=1e-5)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    assert graphs


@torch.no_grad()
def test_one_compilation_serves_all_layers_and_lengths(graphs: list) -> None:
    """Batches of one and of several rows, and the first two lengths of each; then nothing is compiled any more."""
    ours, theirs = pair()
    counts = []
    for number, length in enumerate((16, 3 * 16, 5, 16 * 4 + 3, 16 * 6 + 9, 2 * 16, 11, 16 * 9 + 2)):
        for rows in (1, 2, 3):
            ids = token_ids(rows, length, seed=number)
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
        counts.append(len(graphs))
    assert counts[-1] == counts[-4] <= 6


@torch.no_grad()
def test_models_of_one_kind_share_what_is_compiled(graphs: list) -> None:
    (first, _), (second, theirs) = pair(), pair()
    ids = token_ids(1, 16 * 4)
    first.read(ids), first.read(ids)
    count = len(graphs)
    for parameter in (*second.parameters(), *theirs.parameters()):
        parameter.mul_(1.1)
    torch.testing.assert_close(second.read(ids).queue, theirs.read(ids).queue, atol=1e-5, rtol=1e-5)
    assert len(graphs) == count > 0


def test_generation_decodes_without(graphs: list) -> None:
    ours, theirs = pair()
    ids = token_ids(2, 21)
    found, expected = (model.generate(ids, max_new_tokens=40, **GREEDY) for model in (ours, theirs))
    assert torch.equal(found, expected)
    count = len(graphs)
    ours.generate(ids, max_new_tokens=40, **GREEDY)
    assert len(graphs) == count > 0


def test_what_is_not_compiled(graphs: list) -> None:
    """Layers that checkpoint themselves, and those whose attention somebody has replaced since."""
    ours, theirs = pair()
    ids = token_ids(1, 16 * 3)
    ours.train().gradient_checkpointing_enable()
    torch.testing.assert_close(ours(ids, labels=ids).loss, theirs(ids, labels=ids).loss, atol=1e-5, rtol=1e-5)
    ours.eval().gradient_checkpointing_disable()
    hmt.fuse_rotary(ours, everywhere=True)
    torch.testing.assert_close(ours(ids, labels=ids).loss, theirs(ids, labels=ids).loss, atol=1e-5, rtol=1e-5)
    assert not graphs


@torch.no_grad()
def test_copies_compile_with_their_own_weights(graphs: list, tmp_path: Path) -> None:
    ours, _ = pair()
    ids = token_ids(1, 16 * 4)
    expected = ours.read(ids).queue
    ours.save_pretrained(tmp_path)
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), HMTForCausalLM.from_pretrained(tmp_path)]
    for parameter in ours.parameters():
        parameter.mul_(1.1)
    count = len(graphs)
    for twin in twins:
        assert twin.config.compile_layers
        torch.testing.assert_close(twin.read(ids).queue, expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == count > 0
    plain = HMTForCausalLM.from_pretrained(tmp_path, compile_layers=False)
    torch.testing.assert_close(plain.read(ids).queue, expected, atol=1e-5, rtol=1e-5)
    compiled_layers.restore(ours.backbone)
    assert not any("forward" in vars(module) for module in ours.backbone.model.layers[:-1])


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="compile_layers must be false with fused_rotary=True"):
        hmt_model(compile_layers=True, fused_rotary=True)
    with pytest.raises(ValueError, match="compile_layers must be false for a recurrent backbone, got Mamba"):
        hmt_model("mamba", compile_layers=True)
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="compile_layers must be false for Linear: it marks no layers"):
        compiled_layers.compile_layers(linear)  # type: ignore[arg-type]
    assert "forward" not in vars(backbone().model.layers[0])


def test_with_the_code_generator(fresh_compiler: None) -> None:
    """In training with recomputed segments, by inductor."""
    ours, theirs = pair(mode="rmt", num_sensory=0)  # one shape: inductor is slow
    ids = token_ids(1, 16 * 3)
    losses = [model.train()(ids, labels=ids).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
