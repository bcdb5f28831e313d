"""The step of a segment in Triton: one launch writes a new memory to its slot and recalls into both prompt slots."""

from __future__ import annotations

import interpreter_bf16
import oracles
import pytest
import torch
from tolerance import assert_accurate

from hmt_kernels.memory_recall import triton as implementation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if implementation.INTERPRETED:
    interpreter_bf16.install()


def make_step(batch, slots, dim, dtype, length):
    query, memory, new_memory = (
        torch.randn(shape, dtype=dtype, device=DEVICE) for shape in ((batch, 1, dim), (batch, slots, dim), (batch, dim))
    )
    return query, memory, new_memory, torch.full((batch, length, dim), 7.0, dtype=dtype, device=DEVICE)


# B, N, D, dtype, T, slots to write, num_valid: a growing queue, a full one, a queue of one, a slot that is not recalled
STEPS = {
    "growing": (2, 300, 576, torch.bfloat16, 5, [3, 0], [4, 1]),
    "full": (2, 1100, 64, torch.float32, 3, [1099, 500], None),
    "one-slot": (1, 1, 8, torch.float16, 1, [0], None),
    "beyond-num-valid": (2, 40, 64, torch.float32, 2, [39, 3], [12, 3]),
    "empty": (1, 9, 64, torch.float32, 2, [4], [0]),
}


@pytest.mark.parametrize("name", STEPS)
def test_step_writes_and_recalls(name):
    batch, slots, dim, dtype, length, indices, num_valid = STEPS[name]
    query, memory, new_memory, out = make_step(batch, slots, dim, dtype, length)
    expected = memory.clone()
    expected[range(batch), indices] = new_memory
    memory[range(batch), indices] = float("nan")  # the old memory must not be read
    counts = None if num_valid is None else torch.tensor(num_valid, dtype=torch.int32, device=DEVICE)
    index = torch.tensor(indices, dtype=torch.int32, device=DEVICE)

    recalled, lse, slot = implementation.step(query, memory, new_memory, index, counts, dim**-0.5, out)
    assert torch.equal(memory, expected)
    exact = oracles.recall(query.double(), expected.double(), num_valid, dim**-0.5)
    rounded = oracles.recall(query, expected, num_valid, dim**-0.5)
    rounded_lse = oracles.recall(query.float(), expected.float(), num_valid, dim**-0.5)[1]
    assert recalled.data_ptr() == out.data_ptr() and recalled.shape == (batch, 1, dim)
    assert_accurate(out[:, :1], rounded[0], exact[0], "first prompt slot")
    assert torch.equal(out[:, 0], out[:, -1])
    assert (out[:, 1:-1] == 7.0).all()
    assert_accurate(lse, rounded_lse, exact[1], "lse")
    assert torch.equal(slot, exact[2])


def test_step_equals_writing_and_then_recalling_at_one_index():
    query, memory, new_memory, out = make_step(2, 70, 1024, torch.float32, 4)
    expected = memory.clone()
    expected[:, 69] = new_memory
    _, lse, slot = implementation.step(query, memory, new_memory, 69, None, 0.05, out)
    recalled, expected_lse, expected_slot = implementation.forward(query, expected, None, 0.05)
    assert torch.equal(memory, expected) and torch.equal(slot, expected_slot)
    torch.testing.assert_close(out[:, :1], recalled)
    torch.testing.assert_close(lse, expected_lse)


def test_the_new_memory_wins_a_tie_only_if_its_slot_is_lower():
    query, memory, _, out = make_step(1, 70, 64, torch.float32, 2)
    memory[:, 30] = query[:, 0] * 9
    for index, strongest in ((4, 4), (60, 4)):
        _, _, slot = implementation.step(query, memory, query[:, 0] * 9, index, None, 0.1, out)
        assert slot.tolist() == [[strongest]]
    memory[:, 4] = 0.0
    _, _, slot = implementation.step(query, memory, query[:, 0] * 9, 60, None, 0.1, out)
    assert slot.tolist() == [[30]]


def test_an_index_outside_the_queue_writes_nothing():
    query, memory, new_memory, out = make_step(2, 9, 64, torch.float32, 2)
    room = torch.cat((memory, torch.full_like(memory, 5.0)), dim=1)
    index = torch.tensor([9, -1], dtype=torch.int32, device=DEVICE)
    implementation.step(query, room[:, :9], new_memory, index, None, 0.1, out)
    assert torch.equal(room[:, :9], memory) and (room[:, 9:] == 5.0).all()
    torch.testing.assert_close(out[:, :1], implementation.forward(query, memory, None, 0.1)[0])


def test_bad_arguments():
    query, memory, new_memory, out = make_step(2, 9, 64, torch.float32, 2)
    with pytest.raises(ValueError, match="one query per batch row"):
        implementation.step(query.expand(2, 3, 64), memory, new_memory, 0, None, 0.1, out)
    for index in (-1, 9):
        with pytest.raises(ValueError, match="slot_index must be from 0 to N - 1 = 8"):
            implementation.step(query, memory, new_memory, index, None, 0.1, out)
    with pytest.raises(ValueError, match="memory must have contiguous rows"):
        implementation.step(query, memory[:1].expand(2, 9, 64), new_memory, 0, None, 0.1, out)
    with pytest.raises(ValueError, match="out must have contiguous rows"):
        implementation.step(query, memory, new_memory, 0, None, 0.1, out.mT.contiguous().mT)
