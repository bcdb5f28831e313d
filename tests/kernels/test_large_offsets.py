"""Elements more than 2^31 elements apart, in memory that is mapped but touched in a few places only.

Of two rows the stride itself is beyond int32, of three its product with the last row's number.
"""

from __future__ import annotations

import mmap

import interpreter_bf16
import pytest
import torch

from hmt_kernels import memory_recall, memory_recall_step, segment_attention
from hmt_kernels.memory_recall import cuda as cuda_recall
from hmt_kernels.segment_attention import cuda as cuda_attention

interpreter_bf16.install()

SIZES = (2, 3)
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: pages exist from their first write on


def far_apart(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The values of x with the rows of one dimension, of a size among SIZES, spread over more than 2^31 elements."""
    size = x.shape[dim]
    stride = 2**32 // size + 64
    assert size in SIZES and x.numel() < stride
    strides = list(torch.empty(x.shape, dtype=x.dtype).stride())
    strides[dim] = stride
    count = ((size - 1) * stride + x.numel()) * x.element_size()
    try:
        room = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | NO_RESERVE)
    except OSError as error:
        pytest.skip(f"this machine maps no {count} bytes: {error}")
    return torch.frombuffer(room, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@pytest.fixture
def emulated(emulate):
    for module in (cuda_recall, cuda_attention):
        emulate(module)


def agree(results, expected, impl):
    for result, same in zip(results, expected, strict=True):
        if impl in ("reference", "sdpa"):  # what a library multiplies may depend on strides
            torch.testing.assert_close(result, same)
        else:
            assert torch.equal(result, same)


def recall(impl, query, memory, d_recalled):
    counts = torch.tensor([2, 1, 3][: len(query)], dtype=torch.int32)
    if impl == "cuda":
        out = cuda_recall.forward(query, memory, counts, 0.2)
        return *out, *cuda_recall.backward(d_recalled, None, query, memory, counts, *out[:2], 0.2)
    query, memory = query.detach().requires_grad_(), memory.detach().requires_grad_()
    out = memory_recall(query, memory, counts, softmax_scale=0.2, impl=impl)
    return *out, *torch.autograd.grad(out.recalled, (query, memory), d_recalled)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "row"])
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton", "cuda"])
def test_recall(impl, dim, dtype, size, emulated):
    tensors = [torch.randn(size, size, 64).to(dtype) for _ in range(3)]
    far = [far_apart(x, dim) for x in tensors]
    agree(recall(impl, *far), recall(impl, *tensors), impl)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "row"])
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_step(impl, dim, size):
    query, memory, new = torch.randn(size, 1, 64), torch.randn(size, size, 64), torch.randn(size, 64)
    out = torch.zeros(size, size, 64)
    index = torch.tensor([1, 0, size - 1][:size], dtype=torch.int32)

    def run(memory, out):
        lse, slot = memory_recall_step(query, memory, new, index, softmax_scale=0.2, out=out, impl=impl)[1:]
        return lse, slot, memory, out

    agree(run(far_apart(memory, dim), far_apart(out, dim)), run(memory, out), impl)


def attend(impl, q, k, v, cos, sin, span, do):
    if impl == "cuda":
        arguments = (q, k, v, cos, sin, span)
        o, lse = cuda_attention.forward(*arguments, None, 0.2)
        return o, *cuda_attention.backward(do, None, *arguments, o, lse, None, 0.2)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = segment_attention(q, k, v, cos=cos, sin=sin, pad_span=span, softmax_scale=0.2, impl=impl)
    return o, *torch.autograd.grad(o, (q, k, v), do)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "token"])
@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton", "cuda"])
def test_attention(impl, dim, size, emulated):
    tensors = [torch.randn(size, size, size, 64).bfloat16() for _ in range(4)]
    angles = torch.rand(size, size, 32)
    tables = [torch.cat((x, x), dim=-1).bfloat16() for x in (angles.cos(), angles.sin())]
    span = torch.tensor([[0, 1], [1, 1], [1, 2]][:size], dtype=torch.int32)
    q, k, v, do = (far_apart(x, dim) for x in tensors)
    # the two ends of a span are one dimension, of size 2
    far_tables, far_span = [far_apart(x, dim % 2) for x in tables], far_apart(span, dim % 2)
    near = attend(impl, *tensors[:3], *tables, span, tensors[3])
    agree(attend(impl, q, k, v, *far_tables, far_span, do), near, impl)
