"""memory_recall_step: write a memory, recall, fill both prompt slots; as one operator in every implementation."""

from __future__ import annotations

import oracles
import pytest
import torch
from tolerance import assert_accurate
from torch.library import opcheck

from hmt_kernels import memory_recall, memory_recall_step
from hmt_kernels.dispatch import implementations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
USABLE = [name for name, reason in implementations("memory_recall").items() if reason is None]
IMPLEMENTATIONS = [name for name in USABLE if DEVICE == "cpu" or name != "cpu"]
# B, N, D, T, slots to write, num_valid: a growing queue, a full one, a queue of one, one prompt slot, nothing recalled
STEPS = {
    "growing": (2, 300, 576, 5, [3, 0], [4, 1]),
    "full": (2, 1000, 64, 63, [999, 500], None),
    "one-slot": (1, 1, 8, 1, [0], None),
    "outside": (3, 7, 64, 2, [7, -1, 2], [7, 0, 1]),
}


def make_step(batch=2, slots=7, dim=64, length=3, dtype=torch.float32):
    shapes = ((batch, 1, dim), (batch, slots, dim), (batch, dim))
    query, memory, new_memory = (torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes)
    return query, memory, new_memory, torch.full((batch, length, dim), float("nan"), dtype=dtype, device=DEVICE)


def int32(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STEPS)
def test_step_writes_the_memory_and_both_prompt_slots(name, impl, dtype):
    batch, slots, dim, length, indices, num_valid = STEPS[name]
    query, memory, new_memory, out = make_step(batch, slots, dim, length, dtype)
    expected = memory.clone()
    for b, index in enumerate(indices):
        if 0 <= index < slots:
            expected[b, index] = new_memory[b]
            memory[b, index] = float("nan")  # what stood there must not be read

    step = memory_recall_step(
        query, memory, new_memory, int32(indices), int32(num_valid), softmax_scale=0.1, out=out, impl=impl
    )
    assert torch.equal(memory, expected)
    exact = oracles.recall(query.double(), expected.double(), num_valid, 0.1)
    rounded = oracles.recall(query, expected, num_valid, 0.1)
    assert step.recalled.data_ptr() == out.data_ptr()
    assert_accurate(step.recalled, rounded[0], exact[0], "recalled")
    assert torch.equal(out[:, 0], out[:, -1])
    assert out[:, 1:-1].isnan().all()
    assert torch.equal(step.slot, exact[2])
    same = memory_recall(query, expected, int32(num_valid), softmax_scale=0.1, impl=impl)
    torch.testing.assert_close(step.lse, same.lse)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("slots", [9, 1100])
def test_a_new_memory_that_is_not_recalled_is_not_read(slots, impl):
    """Its slot lies outside the queue, or beyond num_valid."""
    query, memory, new_memory, out = make_step(3, slots)
    new_memory[:2] = torch.tensor([float("nan"), float("inf")], device=DEVICE)[:, None]
    counts = int32([5, slots, slots])
    expected = memory_recall(query, memory, counts, softmax_scale=0.1, impl=impl)
    step = memory_recall_step(
        query, memory, new_memory, int32([7, -1, slots]), counts, softmax_scale=0.1, out=out, impl=impl
    )
    torch.testing.assert_close(out[:, :1], expected.recalled)
    torch.testing.assert_close(step.lse, expected.lse)
    assert torch.equal(out[:, 0], out[:, -1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_step_works_on_slices(impl):
    query, memory, new_memory, out = make_step(2, 16, 64, 8)
    expected = memory.clone()
    expected[:, 3] = new_memory
    memory_recall_step(query, memory[:, :9], new_memory, int32([3, 3]), softmax_scale=0.1, out=out[:, :1], impl=impl)
    assert torch.equal(memory, expected)
    assert out[:, 1:].isnan().all()
    recalled = memory_recall(query, expected[:, :9], softmax_scale=0.1, impl="reference").recalled
    torch.testing.assert_close(out[:, :1], recalled)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_written_is_known_to_have_changed(impl):
    """A backward pass that needs the queue as it was says so instead of using another."""
    query, memory, new_memory, out = make_step()
    query.requires_grad_()
    recalled = memory_recall(query, memory, softmax_scale=0.1, impl=impl).recalled
    with torch.no_grad():
        memory_recall_step(query, memory, new_memory, int32([3, 0]), softmax_scale=0.1, out=out, impl=impl)
    assert out._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        recalled.sum().backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_step_in_inference_mode(impl):
    with torch.inference_mode():
        query, memory, new_memory, out = make_step()
        step = memory_recall_step(query, memory, new_memory, int32([3, 0]), softmax_scale=0.1, out=out, impl=impl)
    assert torch.equal(memory[0, 3], new_memory[0])
    assert step.recalled.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl):
    query, memory, new_memory, out = make_step()
    args = (query, memory, new_memory, int32([2, 3]), int32([3, 7]), 0.25, out.zero_(), impl)
    result = opcheck(torch.ops.hmt_kernels.memory_recall_step, args)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled_step_equals_eager(impl):
    def run(query, memory, new_memory, index, out):
        step = memory_recall_step(query, memory, new_memory, index, softmax_scale=0.25, out=out, impl=impl)
        return step.lse * 2, step.slot + 1

    eager = make_step()
    compiled = tuple(x.clone() for x in eager)
    index = int32([2, 3])
    expected = run(*eager[:3], index, eager[3].zero_())
    results = torch.compile(run, fullgraph=True, backend="aot_eager")(*compiled[:3], index, compiled[3].zero_())
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(compiled, eager)


def good_arguments():
    query, memory, new_memory, out = make_step()
    return {
        "query": query,
        "memory": memory,
        "new_memory": new_memory,
        "slot_index": int32([0, 1]),
        "softmax_scale": 0.1,
        "out": out,
    }


def overlapping(rows, row_stride=8):
    """Two times `rows` rows of 64, each sharing elements with the next or, 64 apart, with the other batch's."""
    return {"memory": torch.zeros(1000, device=DEVICE).as_strided((2, rows, 64), (8, row_stride, 1))}


# what is replaced, the error, a part of its message
BAD = {
    "two-queries": ({"query": torch.zeros(2, 2, 64)}, ValueError, r"query must have shape \[B, 1, D\]"),
    "new-memory-rank": ({"new_memory": torch.zeros(2, 1, 64)}, ValueError, r"new_memory must have shape \[B, D\]"),
    "new-memory-dtype": ({"new_memory": torch.zeros(2, 64).half()}, TypeError, "new_memory must have query's dtype"),
    "slot-index-int": ({"slot_index": 3}, TypeError, "slot_index must be an int32 tensor .*got int"),
    "slot-index-none": ({"slot_index": None}, TypeError, "slot_index must be an int32 tensor .*got None"),
    "slot-index-dtype": ({"slot_index": torch.zeros(2, dtype=torch.long)}, TypeError, "slot_index must be int32"),
    "slot-index-shape": (
        {"slot_index": int32([0])},
        ValueError,
        r"slot_index must have shape .*\[2\], got \[1\]",
    ),
    "num-valid-dtype": ({"num_valid": torch.zeros(2)}, TypeError, "num_valid must be int32, got torch.float32"),
    "num-valid-shape": ({"num_valid": int32([1])}, ValueError, r"num_valid must have shape .*\[2\], got \[1\]"),
    "scale-nan": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite in float32, got nan"),
    "out-dtype": ({"out": torch.zeros(2, 3, 64).half()}, TypeError, "out must have query's dtype"),
    "out-list": ({"out": [0.0]}, TypeError, "out must be a tensor .*got list"),
    "out-empty": ({"out": torch.zeros(2, 0, 64)}, ValueError, r"out must have shape \[B, T, D\]"),
    "out-width": ({"out": torch.zeros(2, 3, 32)}, ValueError, r"out must have shape \[B, T, D\]"),
    "out-strides": ({"out": torch.zeros(2, 64, 3).mT}, ValueError, "out must have contiguous rows"),
    "memory-expanded": (
        {"memory": torch.zeros(1, 7, 64, device=DEVICE).expand(2, 7, 64)},
        ValueError,
        "memory must have contiguous",
    ),
    "memory-overlaps": (overlapping(7), ValueError, "memory must have contiguous"),
    "batches-overlap": (overlapping(7, 64), ValueError, "memory must have contiguous"),
    "out-overlaps": ({"out": overlapping(3)["memory"]}, ValueError, "out must have contiguous"),
    "gradient": (
        {"new_memory": torch.zeros(2, 64, requires_grad=True)},
        ValueError,
        "has no gradients, but new_memory",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_by_name(name):
    replaced, error, message = BAD[name]
    replaced = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in replaced.items()}
    if name == "gradient":
        replaced["new_memory"] = replaced["new_memory"].detach().requires_grad_()
    with pytest.raises(error, match=message):
        memory_recall_step(**{**good_arguments(), **replaced})
