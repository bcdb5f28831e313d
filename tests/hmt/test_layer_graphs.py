"""Passes through fixed buffers read, score and train as the ordinary ones do; on CPU, a tape is in place of graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from backbones import GROUPED, hmt_model, token_ids
from live_memory import peak_bytes
from test_training import LENGTH, assert_same, dropout_model, gradients, with_padding
from transformers import AutoModelForCausalLM, LlamaConfig

from hmt import HMTForCausalLM, capture, layer_graphs, static_step

pytestmark = pytest.mark.usefixtures("as_captured")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every pass that goes through buffers: its direction and how many rows it has."""
    taken: list[tuple[str, int]] = []
    for name in ("run", "run_back"):
        method = getattr(layer_graphs.LayerGraph, name)

        def watched(graph, embeds, *args, name=name, method=method):
            taken.append((name, len(embeds)))
            return method(graph, embeds, *args)

        monkeypatch.setattr(layer_graphs.LayerGraph, name, watched)
    return taken


def pair(name: str = "llama", **settings: object) -> tuple[HMTForCausalLM, HMTForCausalLM]:
    """The same model with graphs and without, in float64."""
    ours = hmt_model(name, cuda_graphs=True, **settings).double()
    theirs = hmt_model(name, cuda_graphs=False, **settings).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize(("mode", "expected"), [("hmt", [1, 1, 3, 4]), ("rmt", [1] * 9), ("baseline", [1] * 9)])
@torch.no_grad()
def test_reading(mode: str, expected: list[int], passes: list) -> None:
    """The first segment, the ragged one, and the summaries of the full ones in batches; in other modes all segments."""
    ours, theirs = pair(mode=mode, summary_batch_size=4)
    ids = token_ids(1, 16 * 8 + 3)
    found, same = ours(ids, labels=ids), theirs(ids, labels=ids)
    torch.testing.assert_close(found.loss, same.loss)
    if mode != "baseline":
        torch.testing.assert_close(found.state.queue, same.state.queue)
    assert sorted(rows for _, rows in passes) == expected
    passes.clear()
    torch.testing.assert_close(
        ours(ids[:, :40], state=found.state).logits, theirs(ids[:, :40], state=same.state).logits
    )


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Sums of other lengths round otherwise, and norms compute in float32; a gradient may be nothing but rounding."""
    assert found.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        error = (found[name] - value).norm() / max(value.norm(), 1e-9 * largest)
        assert error <= 1e-6, f"{name}: relative error {error:.1e}"


CASES = [(name, "hmt") for name in ("llama", "llama-tied", "mistral-window", "opt-projected", "gpt2", "gemma3")]


@pytest.mark.parametrize(("name", "mode"), [*CASES, ("llama", "rmt"), ("llama", "baseline"), ("mamba", "hmt")])
@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
def test_training(name: str, mode: str, offload: bool, passes: list) -> None:
    """Gradients of everything, with padding in some segments, a ragged end and a queue that runs over."""
    if offload and name != "llama":
        pytest.skip("one backbone is enough")
    ours, theirs = pair(name, mode=mode, queue_size=2, offload_states=offload)
    ids = token_ids(2, LENGTH)
    for mask in (None, with_padding(ids)):
        passes.clear()
        found, expected = (
            gradients(model, lambda model=model, mask=mask: model(ids, attention_mask=mask, labels=ids).loss)
            for model in (ours, theirs)
        )
        assert_close(found, expected)
        back = [rows for direction, rows in passes if direction == "run_back"]
        assert len(back) == len(passes) / 2 and len(back) >= (5 if mask is None else 2)


def test_gradients_add_up_over_calls_and_over_losses(passes: list) -> None:
    """Two backward passes, then one of two losses that were computed one after the other."""
    ours, theirs = pair()
    texts = [token_ids(1, 16 * 4, seed=seed) for seed in range(4)]

    def run(model: HMTForCausalLM) -> torch.Tensor:
        for ids in texts[:2]:
            model(ids, labels=ids).loss.backward()
        return sum(model(ids, labels=ids).loss for ids in texts[2:])

    assert_same(*(gradients(model, lambda model=model: run(model)) for model in (ours, theirs)), 1e-10)
    assert passes


def test_gradients_of_the_memory_alone_leave_nothing_behind() -> None:
    """autograd.grad asks the passes, but not for the weights."""
    ours, theirs = pair()
    ids = token_ids(1, 16 * 4)

    def run(model: HMTForCausalLM) -> torch.Tensor:
        loss = model(ids, labels=ids).loss
        torch.autograd.grad(loss, model.memory, retain_graph=True)
        return loss

    assert_same(*(gradients(model, lambda model=model: run(model)) for model in (ours, theirs)), 1e-10)


def test_a_backward_pass_that_fails_leaves_nothing_behind() -> None:
    ours, theirs = pair()
    ids = token_ids(1, 16 * 4)
    loss = ours(ids, labels=ids).loss
    handle = ours.memory.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    assert_same(*(gradients(m, lambda m=m: m(ids, labels=ids).loss) for m in (ours, theirs)), 1e-10)


def test_frozen_weights_and_the_last_that_are_trained() -> None:
    """None of the backbone's, then those of its last layer."""
    ours, theirs = pair()
    ids = token_ids(1, 16 * 4)
    for trained in ("nothing", "layers.1."):
        for model in (ours, theirs):
            for name, p in model.backbone.named_parameters():
                p.requires_grad_(trained in name)
        found, expected = (gradients(m, lambda m=m: m(ids, labels=ids).loss) for m in (ours, theirs))
        assert_same(found, expected, 1e-10)
        assert any(trained in name for name in found) == (trained != "nothing")


def test_gradients_are_not_those_of_the_next_call() -> None:
    """What .grad holds is not the memory that the next backward pass adds up in."""
    ours, _ = pair()
    ids = token_ids(1, 16 * 4)
    ours(ids, labels=ids).loss.backward()
    kept = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    before = {name: gradient.clone() for name, gradient in kept.items()}
    for p in ours.parameters():
        p.grad = None
    ours(token_ids(1, 16 * 4, seed=1)).logits.sum().backward()
    assert all(torch.equal(kept[name], before[name]) for name in kept)


def test_memory_is_of_one_segment_at_any_depth() -> None:
    model = hmt_model("llama-tied", segment_length=64, cuda_graphs=True)
    hidden_states = 64 * 64 * 4

    def train(segments: int) -> None:
        ids = token_ids(1, 64 * segments)
        model(ids, labels=ids).loss.backward()

    train(4)
    few, many = (peak_bytes(lambda count=count: train(count)) for count in (4, 16))
    # of every segment its embeddings are kept, what the LM head reads, and its queue
    assert many - few < 12 * 3.2 * hidden_states


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma3"])
def test_training_with_checkpointed_layers(name: str, passes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched on in between; the state of the random number generator, which a capture forbids, is not looked at."""
    captured = capture.captured

    def strictly(step: Callable, *arguments: object) -> Callable:
        def watched() -> None:
            with mock.patch("torch.get_rng_state", side_effect=AssertionError("a capture forbids it")):
                step()

        return captured(watched, *arguments)

    monkeypatch.setattr(capture, "captured", strictly)
    ours, theirs = (model.train() for model in pair(name))
    for module in [*ours.modules(), *theirs.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = token_ids(2, 16 * 4 + 3)
    expected = gradients(theirs, lambda: theirs(ids, labels=ids).loss)
    for checkpointed in (False, True):
        if checkpointed:
            ours.gradient_checkpointing_enable()
        assert_close(gradients(ours, lambda: ours(ids, labels=ids).loss), expected)
        assert ("run_back", 2) in passes
        passes.clear()


def test_checkpointed_layers_take_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "captured", lambda step, *_: step)  # a tape keeps everything
    config = LlamaConfig(**(GROUPED | {"num_hidden_layers": 8}))
    model = HMTForCausalLM.from_backbone(
        AutoModelForCausalLM.from_config(config), segment_length=64, num_sensory=3, cuda_graphs=True
    ).train()
    ids = token_ids(2, 64 * 3)

    def peak() -> int:
        model.zero_grad()
        return peak_bytes(lambda: model(ids, labels=ids).loss.backward())

    kept = peak()
    model.gradient_checkpointing_enable()
    assert peak() < 0.6 * kept


def dropout(model: HMTForCausalLM) -> None:
    model.train()


def hooked(model: HMTForCausalLM) -> None:
    model.backbone.transformer.h[0].register_forward_hook(lambda *_: None)


def dispatched(model: HMTForCausalLM) -> None:
    model.backbone.transformer.h[0]._hf_hook = object()


def switched_off(model: HMTForCausalLM) -> None:
    model.config.cuda_graphs = False


def on_a_cpu(model: HMTForCausalLM) -> None:
    model.config.cuda_graphs = None


@pytest.mark.parametrize("change", [dropout, hooked, dispatched, switched_off, on_a_cpu])
def test_what_cannot_be_captured_is_not(change: Callable, passes: list) -> None:
    model = dropout_model()
    model.eval()
    model.config.cuda_graphs = True
    ids = token_ids(1, 16 * 4)
    model(ids, labels=ids)
    assert passes
    passes.clear()
    change(model)
    model(ids, labels=ids).loss.backward()
    assert not passes


def test_under_autocast(passes: list) -> None:
    """It keeps casts of the weights, which must not be what a graph goes on reading: they change in between."""
    ours, theirs = (model.float() for model in pair("llama-tied"))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]

    def loss(model: HMTForCausalLM, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, labels=ids).loss

    for step in range(3):
        ids = token_ids(2, 16 * 4, seed=step)
        found, expected = (gradients(model, lambda model=model, ids=ids: loss(model, ids)) for model in (ours, theirs))
        assert_same(found, expected, 2e-2)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(loss(ours, ids), loss(theirs, ids), atol=1e-3, rtol=1e-3)
    assert ("run", 2) in passes and ("run_back", 2) in passes


def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "not_here", lambda model: None)


@torch.no_grad()
def test_by_itself_a_model_captures_what_comes_again(passes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    ours, theirs = pair(num_sensory=3, summary_batch_size=1)
    ours.config.cuda_graphs = None
    ids = token_ids(1, 16 * 5)
    ours.read(ids)
    assert not passes  # four summaries, four segments, and a first one
    state, expected = ours.read(ids), theirs.read(ids)
    assert passes == [("run", 1)] * 8
    torch.testing.assert_close(state.queue, expected.queue)


@torch.no_grad()
def test_shapes_that_push_each_other_out_are_captured_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    monkeypatch.setattr(layer_graphs, "KEPT_GRAPHS", 1)
    model, made = hmt_model(mode="rmt"), []
    monkeypatch.setattr(capture, "captured", lambda step, *_: made.append(1) or step)
    ids = [token_ids(rows, 16) for rows in (1, 2)]
    counts = []
    for turn in range(1, 41):
        for text in ids:
            model.read(text)
        if turn in (4, 5, 20, 40):
            counts.append(len(made))
    # both after four uses; then each other's graph is dropped, and sixteen more uses are not enough until they are
    assert counts == [0, 2, 2, 4]


@torch.no_grad()
def test_graphs_that_nothing_will_use_give_their_memory_back() -> None:
    model, ids = hmt_model(cuda_graphs=True), token_ids(1, 16 * 4)
    model.read(ids)
    assert layer_graphs._graphs[model] and static_step._steps[model]
    model.config.cuda_graphs = False
    model.read(ids)
    assert model not in layer_graphs._graphs and model not in static_step._steps


@torch.no_grad()
def test_threads_take_turns() -> None:
    """Two texts that are read at once, through the same buffers."""
    ours, theirs = pair()
    texts = [token_ids(1, 16 * 12, seed=seed) for seed in range(4)]
    ours.read(texts[0])
    with ThreadPoolExecutor(4) as pool:
        states = list(pool.map(ours.read, texts * 3))
    for state, ids in zip(states, texts * 3, strict=True):
        torch.testing.assert_close(state.queue, theirs.read(ids).queue)


def test_by_itself_a_model_trains_without(passes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    model = hmt_model()
    ids = token_ids(1, 16 * 4)
    for _ in range(6):
        model(ids, labels=ids).loss.backward()
    assert not passes


@pytest.mark.filterwarnings("error::UserWarning")
@torch.no_grad()
def test_a_capture_that_fails_is_said_once_and_done_without(passes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    model = hmt_model(cuda_graphs=False)
    ids = token_ids(1, 16 * 8)
    expected = model.read(ids).queue
    model.config.cuda_graphs = None
    monkeypatch.setattr(capture, "USES_BEFORE", 0)
    monkeypatch.setattr(layer_graphs.LayerGraphs, "_make", lambda *_: (_ for _ in ()).throw(RuntimeError("no\nway")))
    with pytest.warns(UserWarning, match="without a CUDA graph .*: no"):
        assert torch.equal(model.read(ids).queue, expected)
    assert not passes
    model.config.cuda_graphs = True
    with pytest.raises(RuntimeError, match="no"):
        model.read(ids)


@torch.no_grad()
def test_weights_that_move_and_models_that_go(passes: list) -> None:
    ours, theirs = pair()
    ids = token_ids(1, 16 * 4)
    for change in (lambda p: p.data.mul_(1.1), lambda p: setattr(p, "data", p.data * 1.1)):
        ours.read(ids)
        for model in (ours, theirs):
            for p in model.parameters():
                change(p)
        torch.testing.assert_close(ours.read(ids).queue, theirs.read(ids).queue)
    assert len(layer_graphs._graphs[ours]) == 1  # nothing is kept of weights that lie elsewhere now
    for index in range(9):
        ours.read(token_ids(index + 1, 16 * 2))
    graphs = next(reversed(layer_graphs._graphs[ours].values()))
    assert len(graphs.graphs) == layer_graphs.KEPT_GRAPHS
    count = len(layer_graphs._graphs)
    del ours, graphs, model
    gc.collect()
    assert len(layer_graphs._graphs) < count
