"""Static segment steps read and score as the ordinary path does; what a CUDA graph needs of them holds on CPU too."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from backbones import hmt_model, token_ids

from hmt import HMTForCausalLM, capture, static_step
from hmt.passes import read_segments
from hmt.tokens import Tokens
from hmt_kernels import use_impl


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The addresses of all buffers at every step."""
    taken: list[tuple[int, ...]] = []
    step = static_step.segment_step

    def watched(model: HMTForCausalLM, buffers: static_step.StepBuffers) -> None:
        taken.append(tuple(tensor.data_ptr() for tensor in vars(buffers).values()))
        step(model, buffers)

    monkeypatch.setattr(static_step, "segment_step", watched)
    return taken


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Steps are captured, on a CPU, as a graph captures them: what runs later reads the addresses of the capture."""
    made: list[Callable[[], None]] = []

    def prepare(model: HMTForCausalLM, queue: torch.Tensor, dependencies: tuple) -> static_step.StaticStep:
        turn = capture.Turn(queue.device)
        buffers, frozen = static_step.new_buffers(model, queue), copy.deepcopy(model)
        for ours, theirs in zip(frozen.parameters(), model.parameters(), strict=True):
            ours.data = theirs.data
        made.append(lambda: static_step.segment_step(frozen, buffers))
        return static_step.StaticStep(buffers, lambda model, replay=made[-1]: replay(), dependencies, turn)

    monkeypatch.setattr(static_step, "_prepare", prepare)
    return made


def pair(name: str = "llama", **settings: object) -> tuple[HMTForCausalLM, HMTForCausalLM]:
    """The same model with static steps and without."""
    ours = hmt_model(name, cuda_graphs=True, **settings)
    theirs = hmt_model(name, **settings)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", ["llama", "opt-projected", "mistral-window", "mamba"])
@pytest.mark.parametrize("source", ["current", "previous"])
@pytest.mark.parametrize("sensory", [3, 0], ids=["sensory", "no-sensory"])
def test_reading(name: str, source: str, sensory: int, steps: list) -> None:
    """Texts of every kind of length, one after the other through the same buffers; states given stay as they were."""
    ours, theirs = pair(name, summary_source=source, num_sensory=sensory)
    for lengths in ((16 * 6,), (7, 16 * 3), (20, 5, 16 * 4 + 3), (16, 16, 15, 1)):
        state = expected = None
        for number, length in enumerate(lengths):
            ids = token_ids(2, length, seed=number)
            before = None if state is None else state.queue.clone()
            old, state = state, ours.read(ids, state)
            assert old is None or torch.equal(old.queue, before)
            expected = theirs.read(ids, expected)
            assert (state.num_closed, state.num_open) == (expected.num_closed, expected.num_open)
            torch.testing.assert_close(state.queue, expected.queue, atol=1e-5, rtol=1e-5)
            for part in ("recent", "open"):
                assert torch.equal(getattr(state, part).ids, getattr(expected, part).ids)
    assert len(steps) == 5 + 2 + 4 + 2 and len(set(steps)) == 1


def test_a_state_with_fewer_sensory_tokens(steps: list) -> None:
    """The segment that follows is read with those, in the ordinary way; later ones by the step."""
    ours, theirs = pair(num_sensory=5)
    state = hmt_model(num_sensory=3).read(token_ids(2, 16 * 2))
    found, expected = (model.read(token_ids(2, 16 * 3, seed=1), state) for model in (ours, theirs))
    torch.testing.assert_close(found.queue, expected.queue, atol=1e-5, rtol=1e-5)
    assert len(steps) == 2


@pytest.mark.parametrize("length", [16 * 6, 16 * 4 + 7], ids=["closed", "open"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@torch.no_grad()
def test_scoring(length: int, padded: bool, steps: list) -> None:
    """Loss, logits and trace; a segment with padding, the first and an open one are read by the ordinary path."""
    ours, theirs = pair()
    ids = token_ids(2, length)
    mask = torch.ones_like(ids)
    mask[1, 35:40] = 1 - padded
    outs = [model(ids, mask, labels=ids, logits_to_keep=0, output_trace=True) for model in (ours, theirs)]
    assert len(steps) == length // 16 - 1 - padded
    for name in ("loss", "logits"):
        torch.testing.assert_close(outs[0][name], outs[1][name], atol=1e-5, rtol=1e-5)
    for name, values in outs[1].trace.items():
        torch.testing.assert_close(outs[0].trace[name], values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generation_closes_segments_with_it(steps: list) -> None:
    ours, theirs = pair()
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = token_ids(2, 21)
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    assert len(steps) == 60 // 16 - 1


def test_training_takes_no_step(steps: list) -> None:
    ours, theirs = pair()
    ids = token_ids(2, 16 * 4)
    losses = [model(ids, labels=ids).loss for model in (ours, theirs)]
    assert torch.equal(*losses) and losses[0].requires_grad and not steps


def new_data(model: HMTForCausalLM) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def new_module(model: HMTForCausalLM) -> None:
    first, second = model.backbone.model.layers
    first.mlp = copy.deepcopy(second.mlp)


def in_place(model: HMTForCausalLM) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def other_scale(model: HMTForCausalLM) -> None:
    model.recall.softmax_scale *= 2


@pytest.mark.parametrize("change", [new_data, new_module, in_place, other_scale, HMTForCausalLM.double])
@torch.no_grad()
def test_a_captured_step_never_runs_with_stale_weights(change: Callable, graphs: list) -> None:
    """What replaying would not notice leads to a new capture; weights changed where they lie need none."""
    ours, theirs = pair()
    ids = token_ids(1, 16 * 5)
    before = ours.read(ids)
    ours.read(ids)
    assert len(graphs) == 1
    for model in (ours, theirs):
        change(model)
    found, expected = ours.read(ids), theirs.read(ids)
    torch.testing.assert_close(found.queue, expected.queue, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found.queue.float(), before.queue)
    assert len(graphs) == (1 if change is in_place else 2)


@torch.no_grad()
def test_another_implementation_leads_to_a_new_capture(graphs: list) -> None:
    model, _ = pair()
    ids = token_ids(1, 16 * 4)
    model.read(ids)
    with use_impl("reference"):
        model.read(ids)
    assert len(graphs) == 2


@torch.no_grad()
def test_hooks_and_adapters_are_not_captured(graphs: list) -> None:
    """What may do something else at every call is called every time."""
    peft = pytest.importorskip("peft")
    model, _ = pair()
    ids, seen = token_ids(1, 16 * 4), []
    handle = model.backbone.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    model.read(ids)
    assert len(seen) >= 4 and not graphs
    handle.remove()
    model.read(ids)
    assert len(graphs) == 1
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).base_model.model.read(ids)
    assert len(graphs) == 1


@torch.no_grad()
def test_steps_of_different_shapes_and_of_two_calls_at_once(graphs: list) -> None:
    """Few shapes are kept; a call that begins while another is under way gets buffers of its own."""
    ours, theirs = pair()
    for rows in (1, 2, 3, 4, 5, 6, 6, 5, 1):
        ids = token_ids(rows, 16 * 3)
        torch.testing.assert_close(ours.read(ids).queue, theirs.read(ids).queue, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 7
    assert len(static_step._steps[ours]) == static_step.KEPT_STEPS
    a, b = token_ids(1, 16 * 4, seed=1), token_ids(1, 16 * 4, seed=2)
    turns = [read_segments(ours, Tokens(ids), ours.new_state()) for ids in (a, b)]
    for results in zip(*turns, strict=True):
        states = [result.state for result in results]
    for state, ids in zip(states, (a, b), strict=True):
        torch.testing.assert_close(state.queue, theirs.read(ids).queue, atol=1e-5, rtol=1e-5)


def test_copies_of_a_model_have_their_own_steps(graphs: list) -> None:
    """Nothing of a step is copied or pickled with its model, or keeps it alive."""
    model, _ = pair()
    ids = token_ids(1, 16 * 4)
    model.read(ids)
    twin = copy.deepcopy(model)
    in_place(twin)
    assert not torch.allclose(twin.read(ids).queue, model.read(ids).queue)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model)).read(ids).queue, model.read(ids).queue)
    count = len(static_step._steps)
    del twin
    gc.collect()
    assert len(static_step._steps) < count


@torch.no_grad()
def test_inference_mode_leaves_buffers_that_can_be_written() -> None:
    ours, theirs = pair()
    ids = token_ids(1, 16 * 4)
    with torch.inference_mode():
        ours.read(ids)
    torch.testing.assert_close(ours.read(ids).queue, theirs.read(ids).queue, atol=1e-5, rtol=1e-5)
