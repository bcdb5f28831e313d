"""memory_recall on drawn cases: any shape, strides, dtype and num_valid, in every implementation that a CPU can run."""

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
from strided import Layout, empty, fill, layouts, places, same_bits, storage_of
from tolerance import assert_accurate

from hmt_kernels import memory_recall, memory_recall_step
from hmt_kernels.memory_recall import cuda

interpreter_bf16.install()

SHORT = (torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    batch: int
    queries: int
    slots: int
    dim: int
    dtype: torch.dtype
    num_valid: list[int] | None
    scale: float  # times 1 / sqrt(D)
    layouts: dict[str, Layout]
    with_d_lse: bool
    seed: int


@st.composite
def drawn(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], most_queries: int, steps: bool = False) -> Case:
    """A case of memory_recall; with `steps`, of memory_recall_step, which writes into rows of the memory's own."""
    batch, slots = draw(st.integers(0, 3)), draw(st.integers(0, 130))
    queries = 1 if steps else draw(st.one_of(st.just(1), st.integers(0, 5), st.integers(0, most_queries)))
    dim = 8 * draw(st.integers(1, 17))
    counts = st.lists(st.integers(-3, slots + 3), min_size=batch, max_size=batch)
    shapes = {"query": (batch, queries, dim), "memory": (batch, slots, dim), "d_recalled": (batch, queries, dim)}
    drawn_layouts = {name: draw(layouts(shape)) for name, shape in shapes.items()}
    if steps:
        gap, room = 8 * draw(st.integers(0, 2)), 8 * draw(st.integers(0, 2))
        drawn_layouts["memory"] = Layout(
            (max(slots, 1) * (dim + gap) + room, dim + gap, 1), draw(st.sampled_from((0, 8)))
        )
    return Case(
        batch, queries, slots, dim, draw(st.sampled_from(dtypes)), draw(st.one_of(st.none(), counts)),
        draw(st.sampled_from((0.0, 0.1, 1.0, -1.0, 3.0))), drawn_layouts, draw(st.booleans()),
        draw(st.integers(0, 2**16)),
    )  # fmt: skip


class Inputs(NamedTuple):
    query: torch.Tensor
    memory: torch.Tensor
    counts: torch.Tensor | None
    scale: float
    d_recalled: torch.Tensor
    d_lse: torch.Tensor | None


def make(case: Case) -> Inputs:
    """The tensors of a case; what only dead slots address is NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    shapes = {"query": case.queries, "memory": case.slots, "d_recalled": case.queries}
    tensors = {}
    for name, rows in shapes.items():
        tensor = empty((case.batch, rows, case.dim), case.layouts[name], case.dtype)
        tensors[name] = fill(tensor, torch.randn(tensor.numel(), generator=generator))
    counts = None
    if case.num_valid is not None:
        counts = torch.tensor(case.num_valid, dtype=torch.int32)
        poison_dead_slots(tensors["memory"], case.num_valid)
    d_lse = torch.randn(case.batch, case.queries, generator=generator).double() if case.with_d_lse else None
    return Inputs(
        tensors["query"], tensors["memory"], counts, case.scale * case.dim**-0.5, tensors["d_recalled"], d_lse
    )


def poison_dead_slots(memory: torch.Tensor, num_valid: list[int]) -> None:
    place = places(memory)
    dead = torch.ones(len(storage_of(memory)), dtype=torch.bool)
    for row, count in zip(place, num_valid, strict=True):
        dead[row[: max(count, 0)].flatten()] = False
    storage_of(memory)[dead] = float("nan")


def run(impl: str, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """recalled, lse, slot, d_query, d_memory"""
    query, memory, counts, scale, d_recalled, d_lse = inputs
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    d_lse = None if d_lse is None else d_lse.to(lse_dtype)
    if impl == "cuda":  # the module itself: the operator gives it CUDA tensors only
        recalled, lse, slot = cuda.forward(query, memory, counts, scale)
        return recalled, lse, slot, *cuda.backward(d_recalled, d_lse, query, memory, counts, recalled, lse, scale)
    query, memory = query.requires_grad_(), memory.requires_grad_()
    out = memory_recall(query, memory, counts, softmax_scale=scale, impl=impl)
    if d_lse is None:
        grads = torch.autograd.grad(out.recalled, (query, memory), d_recalled)
    else:
        grads = torch.autograd.grad((out.recalled, out.lse), (query, memory), (d_recalled, d_lse))
    for x in (query, memory):
        x.requires_grad_(False)
    return *(x.detach() for x in out), *grads


def oracle(inputs: Inputs, num_valid: list[int] | None, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    query, memory = (x.detach().to(dtype).requires_grad_() for x in (inputs.query, inputs.memory))
    if not len(query):
        stats = query.new_zeros(query.shape[:2])
        return query.detach(), stats, stats.int(), torch.zeros_like(query), torch.zeros_like(memory)
    recalled, lse, slot = oracles.recall(query, memory, num_valid, inputs.scale)
    d_lse = torch.zeros_like(lse) if inputs.d_lse is None else inputs.d_lse.to(dtype)
    grads = torch.autograd.grad((recalled, lse), (query, memory), (inputs.d_recalled.to(dtype), d_lse))
    return recalled.detach(), lse.detach(), slot, *grads


def check(impl: str, case: Case) -> None:
    inputs = make(case)
    before = [storage_of(x).clone() for x in (inputs.query, inputs.memory, inputs.d_recalled)]
    results = run(impl, inputs)
    for x, kept in zip((inputs.query, inputs.memory, inputs.d_recalled), before, strict=True):
        assert same_bits(storage_of(x), kept), "an input has been written to"
    exact, rounded = (oracle(inputs, case.num_valid, dtype) for dtype in (torch.float64, case.dtype))
    lse_dtype = torch.promote_types(case.dtype, torch.float32)
    rounded_lse = oracle(inputs, case.num_valid, lse_dtype)[1]  # lse is float32 even where the inputs are shorter
    assert [x.dtype for x in results] == [case.dtype, lse_dtype, torch.int32, case.dtype, case.dtype]
    assert all(x.is_contiguous() for x in results)
    assert_accurate(results[0], rounded[0], exact[0], "recalled")
    assert_accurate(results[1], rounded_lse, exact[1], "lse")
    assert_accurate(results[3], rounded[3], exact[3], "d_query")
    assert_accurate(results[4], rounded[4], exact[4], "d_memory")
    check_slots(inputs, case, results[2])


def check_slots(inputs: Inputs, case: Case, slot: torch.Tensor) -> None:
    """The slot reported is live and its exact score is the largest, up to the rounding of one score."""
    for b in range(case.batch):
        live = case.slots if case.num_valid is None else min(max(case.num_valid[b], 0), case.slots)
        if not live:
            assert slot[b].eq(-1).all()
            continue
        assert slot[b].ge(0).all() and slot[b].lt(live).all()
        scores = inputs.scale * inputs.query[b].double() @ inputs.memory[b, :live].double().T
        chosen = scores.gather(1, slot[b, :, None].long())[:, 0]
        terms = abs(inputs.scale) * (inputs.query[b].double().abs() @ inputs.memory[b, :live].double().abs().T)
        assert (scores.amax(1) - chosen <= 1e-6 * terms.amax(1)).all()


def check_step(impl: str, case: Case, length: int) -> None:
    """A step writes its slot and two positions, nothing else, and recalls what memory_recall does afterwards."""
    query, memory, counts, scale, new_memory, _ = make(case)
    index = torch.randint(-1, case.slots + 1, (case.batch,), dtype=torch.int32)
    out = empty((case.batch, length, case.dim), case.layouts["out"], case.dtype)
    expected, places_out = memory.clone(), places(out)
    for b, slot in enumerate(index.tolist()):
        if 0 <= slot < case.slots:
            expected[b, slot] = new_memory[b, 0]
    untouched = torch.ones(len(storage_of(out)), dtype=torch.bool)
    untouched[places_out[:, [0, -1]].flatten()] = False
    result = memory_recall_step(query, memory, new_memory[:, 0], index, counts, softmax_scale=scale, out=out, impl=impl)
    wanted = memory_recall(query, expected, counts, softmax_scale=scale, impl=impl)
    assert same_bits(memory, expected)
    assert all(torch.equal(x, y) for x, y in zip(result, wanted, strict=True))
    assert torch.equal(out[:, :1], wanted.recalled) and torch.equal(out[:, -1:], wanted.recalled)
    assert storage_of(out)[untouched].isnan().all()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_new_memory(monkeypatch)


@pytest.fixture
def emulated(emulate):
    emulate(cuda)


@cases(in_ci=70, share=0.3)
@given(drawn((*SHORT, torch.float64), most_queries=130))
def test_reference(case):
    check("reference", case)


@cases(in_ci=100, share=0.5)
@given(drawn(SHORT, most_queries=64))
def test_cpu(case):
    check("cpu", case)


@cases(in_ci=12, share=0.05)
@given(drawn(SHORT, most_queries=20))
def test_triton_interpreted(case):
    check("triton", case)


@cases(in_ci=30, share=0.15)
@given(drawn(SHORT, most_queries=20))
def test_cuda_emulated(emulated, case):
    check("cuda", case)


@cases(in_ci=60, share=0.1)
@given(drawn(SHORT, most_queries=1, steps=True), st.sampled_from(("reference", "cpu")), st.integers(1, 9))
def test_step(case, impl, length):
    out = Layout((length * case.dim + 8, case.dim, 1), 8)
    check_step(impl, case._replace(layouts={**case.layouts, "out": out}), length)
