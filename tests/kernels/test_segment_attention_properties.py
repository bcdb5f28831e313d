"""segment_attention on drawn cases: any shape, strides, dtype, hole, window and rotary tables, wherever a CPU can."""

from __future__ import annotations

from typing import NamedTuple

import interpreter_bf16
import oracles
import pytest
import torch
from budget import cases
from hypothesis import given
from hypothesis import strategies as st
from kernel_runs import poison_new_memory
from strided import Layout, empty, fill, layouts, same_bits, storage_of
from tolerance import assert_accurate

from hmt_kernels import segment_attention
from hmt_kernels.segment_attention import cuda

interpreter_bf16.install()

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SHORT, EVERY = (FP32, FP16, BF16), (FP64, FP32, FP16, BF16)
# tables no less precise than q, so that the rounding of q, k and v is what counts
TABLES = {FP64: (FP64,), FP32: (FP32, FP64), FP16: (FP16, FP32, FP64), BF16: (BF16, FP16, FP32, FP64)}


class Case(NamedTuple):
    shape: tuple[int, int, int, int, int, int]  # B, Hq, Hkv, Tq, Tk, D
    dtype: torch.dtype
    rotary: tuple[int, int, torch.dtype] | None  # rows, R, dtype of the tables
    pad_span: list[tuple[int, int]] | None
    window_size: int | None
    scale: float  # times 1 / sqrt(D)
    layouts: dict[str, Layout]
    with_d_lse: bool
    seed: int


@st.composite
def drawn(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], dims: st.SearchStrategy[int], longest: int = 130) -> Case:
    batch, kv_heads = draw(st.integers(0, 3)), draw(st.integers(1, 2))
    q_heads, k_len, dim = kv_heads * draw(st.integers(1, 3)), draw(st.integers(0, longest)), draw(dims)
    q_len = min(k_len, draw(st.one_of(st.just(1), st.just(k_len), st.integers(0, k_len))))
    dtype, rotary = draw(st.sampled_from(dtypes)), None
    if dim >= 2 and draw(st.booleans()):
        width = draw(st.one_of(st.just(dim // 2), st.integers(1, dim // 2)))
        rotary = draw(st.sampled_from((1, batch or 1))), 2 * width, draw(st.sampled_from(TABLES[dtype]))
    edge = st.one_of(st.integers(-3, k_len + 3), st.sampled_from((-(2**31), 2**31 - 1)))
    spans = st.lists(st.tuples(edge, edge), min_size=batch, max_size=batch)
    q, k = (batch, q_heads, q_len, dim), (batch, kv_heads, k_len, dim)
    shapes = {"q": q, "k": k, "v": k, "d_out": q}
    drawn_layouts = {name: draw(layouts(shape)) for name, shape in shapes.items()}
    if rotary is not None:
        drawn_layouts["tables"] = draw(layouts((rotary[0], k_len, rotary[1]), shares=False))
    return Case(
        (batch, q_heads, kv_heads, q_len, k_len, dim), dtype, rotary,
        draw(st.one_of(st.none(), spans)),
        draw(st.one_of(st.none(), st.none(), st.integers(1, k_len + 3), st.just(2**40))),
        draw(st.sampled_from((0.0, 0.1, 1.0, -1.0, 3.0))), drawn_layouts, draw(st.booleans()),
        draw(st.integers(0, 2**16)),
    )  # fmt: skip


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    pad_span: torch.Tensor | None
    window_size: int | None
    scale: float
    d_out: torch.Tensor
    d_lse: torch.Tensor | None
    angles: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor]:
        given = (self.q, self.k, self.v, self.cos, self.sin, self.pad_span, self.d_out)
        return [x for x in given if x is not None]


def make(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    batch, q_heads, kv_heads, q_len, k_len, dim = case.shape
    shapes = {"q": (q_heads, q_len), "k": (kv_heads, k_len), "v": (kv_heads, k_len), "d_out": (q_heads, q_len)}
    tensors = {}
    for name, (heads, length) in shapes.items():
        tensor = empty((batch, heads, length, dim), case.layouts[name], case.dtype)
        tensors[name] = fill(tensor, torch.randn(tensor.numel(), generator=generator))
    cos = sin = angles = None
    if case.rotary is not None:
        rows, width, dtype = case.rotary
        angles = 6.0 * torch.rand(rows, k_len, width // 2, dtype=torch.float64, generator=generator)
        table = torch.cat((angles, angles), dim=-1)
        cos, sin = (fill(empty(table.shape, case.layouts["tables"], dtype), x) for x in (table.cos(), table.sin()))
    span = None if case.pad_span is None else torch.tensor(case.pad_span, dtype=torch.int32).reshape(batch, 2)
    d_lse = torch.randn(batch, q_heads, q_len, generator=generator).double() if case.with_d_lse else None
    scale = case.scale * dim**-0.5
    return Inputs(
        tensors["q"], tensors["k"], tensors["v"], cos, sin, span, case.window_size, scale, tensors["d_out"], d_lse,
        angles,
    )  # fmt: skip


def run(impl: str, inputs: Inputs) -> tuple[torch.Tensor | None, ...]:
    """o, lse, dq, dk, dv; no lse from "sdpa"."""
    qkv = inputs[:3]
    d_lse = None if inputs.d_lse is None else inputs.d_lse.to(torch.promote_types(inputs.q.dtype, torch.float32))
    if impl == "cuda":  # the module itself: the operator gives it CUDA tensors only
        o, lse = cuda.forward(*inputs[:8])
        return o, lse, *cuda.backward(inputs.d_out, d_lse, *inputs[:6], o, lse, *inputs[6:8])
    for x in qkv:
        x.requires_grad_()
    settings = {name: getattr(inputs, name) for name in ("cos", "sin", "pad_span", "window_size")}
    settings |= {"softmax_scale": inputs.scale, "return_lse": impl != "sdpa", "impl": impl}
    result = segment_attention(*qkv, **settings)
    o, lse = (result, None) if impl == "sdpa" else result
    if d_lse is None:
        grads = torch.autograd.grad(o, qkv, inputs.d_out)
    else:
        grads = torch.autograd.grad((o, lse), qkv, (inputs.d_out, d_lse))
    for x in qkv:
        x.requires_grad_(False)
    return o.detach(), None if lse is None else lse.detach(), *grads


def oracle(inputs: Inputs, case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    qkv = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
    if 0 in inputs.q.shape:
        o = torch.zeros_like(qkv[0])
        return o.detach(), o.detach()[..., 0], *(torch.zeros_like(x) for x in qkv)
    o, lse = oracles.attention(
        *qkv, angles=inputs.angles, pad_span=case.pad_span, window_size=case.window_size, softmax_scale=inputs.scale
    )
    d_lse = torch.zeros_like(lse) if inputs.d_lse is None else inputs.d_lse.to(dtype)
    grads = torch.autograd.grad((o, lse), qkv, (inputs.d_out.to(dtype), d_lse))
    return o.detach(), lse.detach(), *grads


def check(impl: str, case: Case) -> None:
    inputs = make(case)
    before = [storage_of(x).clone() for x in inputs.tensors()]
    if impl == "sdpa":
        inputs = inputs._replace(d_lse=None)
    results = run(impl, inputs)
    for x, kept in zip(inputs.tensors(), before, strict=True):
        assert same_bits(storage_of(x), kept), "an input has been written to"
    exact, rounded = (oracle(inputs, case, dtype) for dtype in (torch.float64, case.dtype))
    for name, actual, r, e in zip(("o", "softmax_lse", "dq", "dk", "dv"), results, rounded, exact, strict=True):
        if actual is not None:
            wider = torch.promote_types(case.dtype, torch.float32)
            assert actual.dtype == (wider if name == "softmax_lse" else case.dtype)
            assert_accurate(actual, r, e, name)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_new_memory(monkeypatch)


@pytest.fixture
def emulated(emulate):
    emulate(cuda)


@cases(in_ci=70, share=0.35)
@given(drawn(EVERY, st.integers(1, 130)))
def test_reference(case):
    check("reference", case)


@cases(in_ci=100, share=0.5)
@given(drawn(EVERY, st.integers(1, 130)))
def test_sdpa(case):
    check("sdpa", case)


@cases(in_ci=12, share=0.05)
@given(drawn(SHORT, st.integers(1, 16).map(lambda n: 8 * n)))
def test_triton_interpreted(case):
    check("triton", case)


@cases(in_ci=25, share=0.1)
@given(drawn((FP16, BF16), st.sampled_from(cuda.DIMS)))
def test_cuda_emulated(emulated, case):
    check("cuda", case)
