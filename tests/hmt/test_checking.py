"""The checking mode: NaN and infinity in inputs, weights and results become errors that name them; off by default."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from backbones import hmt_model, token_ids

import hmt
import hmt_kernels
from hmt import serving
from hmt_kernels import memory_recall, memory_recall_step, segment_attention

NAN, INFINITY = float("nan"), float("inf")


def spoilt(shape: tuple[int, ...], place: tuple[int, ...], value: float = NAN) -> torch.Tensor:
    tensor = torch.ones(shape)
    tensor[place] = value
    return tensor


RECALL = {"query": torch.ones(2, 1, 8), "memory": torch.ones(2, 5, 8), "softmax_scale": 0.5}
STEP = {**RECALL, "new_memory": torch.ones(2, 8), "slot_index": torch.tensor([4, 4], dtype=torch.int32)}
ATTENTION = {name: torch.ones(2, 2, 3, 8) for name in "qkv"} | {name: torch.ones(1, 3, 8) for name in ("cos", "sin")}


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        (memory_recall, {"query": spoilt((2, 1, 8), (1, 0, 3))}, r"query must be finite, got 1 .* nan at \[1, 0, 3\]"),
        (memory_recall, {"memory": spoilt((2, 5, 8), (0, 4, 1), -INFINITY)}, r"memory must .* -inf at \[0, 4, 1\]"),
        (memory_recall_step, {"new_memory": spoilt((2, 8), (0, 0))}, "new_memory must be finite"),
        (memory_recall_step, {"memory": spoilt((2, 5, 8), (0, 3, 1))}, "memory must be finite"),
        (segment_attention, {"q": spoilt((2, 2, 3, 8), (0, 0, 0, 0))}, "q must be finite"),
        (segment_attention, {"k": spoilt((2, 2, 3, 8), (0, 0, 0, 0), INFINITY)}, "k must be finite"),
        (segment_attention, {"v": spoilt((2, 2, 3, 8), (1, 1, 2, 7))}, "v must be finite"),
        (segment_attention, {"cos": spoilt((1, 3, 8), (0, 0, 0))}, "cos must be finite"),
        (segment_attention, {"sin": spoilt((1, 3, 8), (0, 0, 0))}, "sin must be finite"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", ""),
)
def test_operators_name_the_argument(operator, arguments: dict, message: str) -> None:
    good = {memory_recall: RECALL, memory_recall_step: STEP, segment_attention: ATTENTION}[operator]
    if operator is memory_recall_step:
        good = good | {"memory": good["memory"].clone(), "out": torch.zeros(2, 3, 8)}
    operator(**good | arguments)  # off by default
    with hmt.checking():
        operator(**good)
        with pytest.raises(ValueError, match=message):
            operator(**good | arguments)
        with hmt_kernels.checking(False):
            operator(**good | arguments)
    operator(**good | arguments)


def test_dead_and_replaced_slots_may_hold_anything() -> None:
    memory = spoilt((2, 5, 8), (1, 3))
    counts = torch.tensor([5, 3], dtype=torch.int32)
    with hmt_kernels.checking():
        memory_recall(RECALL["query"], memory, counts, softmax_scale=0.5)
        arguments = STEP | {"memory": spoilt((2, 5, 8), (0, 4)), "out": torch.zeros(2, 3, 8)}
        memory_recall_step(**arguments)


def test_wrong_arguments_are_still_named() -> None:
    with hmt_kernels.checking(), pytest.raises(TypeError, match="query must be a tensor"):
        memory_recall(None, torch.ones(2, 5, 8), softmax_scale=0.5)
    with hmt_kernels.checking(), pytest.raises(TypeError, match="k must be a tensor"):
        segment_attention(**ATTENTION | {"k": 3})


@pytest.mark.parametrize("how", ["forward", "read", "step"])
@pytest.mark.parametrize("name", ["memory", "recall.wk.weight", "backbone.model.layers.1.mlp.down_proj.weight"])
def test_weights(name: str, how: str) -> None:
    model = hmt_model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = INFINITY
    ids = token_ids(1, 40)
    run = {
        "forward": lambda: model(ids),
        "read": lambda: model.read(ids),
        "step": lambda: serving.step(model, [model.new_state()], [ids[0]]),
    }[how]
    with torch.no_grad():
        run()
        with hmt.checking(), pytest.raises(ValueError, match=f"the weight {name} must be finite, got 1 NaN or inf"):
            run()


def test_states_ids_and_overflow() -> None:
    model = hmt_model()
    ids = token_ids(1, 40)
    state = model.read(ids)
    with hmt.checking():
        model(ids, state=state)
        state.queue[0, 1, 5] = NAN
        with pytest.raises(ValueError, match=r"state.queue must be finite, .* nan at \[0, 1, 5\]"):
            model(ids, state=state)
        with pytest.raises(ValueError, match="input_ids must lie from 0 to 127, got 5 to 128"):
            model(torch.tensor([[5, 128]]))
        with pytest.raises(ValueError, match="input_ids must lie from 0 to 127, got -1 to 7"):
            serving.step(model, [model.new_state()], [torch.tensor([-1, 7])])
        with torch.no_grad():
            model.backbone.model.norm.weight.fill_(3e38)  # finite, but its products are not
        with pytest.raises(ValueError, match="what the backbone makes of segment 0 must be finite"):
            model(ids[:, :10])
        with pytest.raises(ValueError, match="what the backbone makes of document 0"):
            serving.step(model, [model.new_state()], [ids[0, :10]])


def test_results_and_gradients_are_the_same_while_checking() -> None:
    model = hmt_model()
    ids = token_ids(2, 60)
    plain = model(ids, labels=ids).loss
    with hmt.checking():
        checked = model(ids, labels=ids).loss
    assert torch.equal(plain, checked)
    assert torch.equal(*(torch.autograd.grad(loss, model.memory)[0] for loss in (plain, checked)))


@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False"), ("", "False")])
def test_environment_variable(value: str, expected: str) -> None:
    code = "import hmt_kernels.finite as c; print(c.is_checking())"
    environment = os.environ | {"HMT_CHECK": value}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == expected


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_is_not_checked() -> None:
    recall = torch.compile(
        lambda q, m: memory_recall(q, m, softmax_scale=0.5).recalled, fullgraph=True, backend="aot_eager"
    )
    with hmt_kernels.checking():
        assert recall(spoilt((2, 1, 8), (0, 0, 0)), RECALL["memory"]).isnan().any()
