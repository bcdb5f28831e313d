"""The CUDA kernels of segment_attention: on the CPU through the emulation, and on the device too where there is one."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import NamedTuple

import oracles
import pytest
import torch
from tolerance import assert_accurate

from hmt_kernels import dispatch, segment_attention
from hmt_kernels.segment_attention import cuda, reference

ON_DEVICE = cuda.missing() is None
DTYPES = [torch.float16, torch.bfloat16]
# shape is (B, Hq, Hkv, Tq, Tk, D); rotary (rows, R); the rest as in the operator. Tiles have 64 rows, or 32 in the
# backward pass with D above 64; the rows of the query heads that share a key head are taken together.
CASES = {
    "one-key": {"shape": (1, 1, 1, 1, 1, 64)},
    "short-batch": {"shape": (3, 1, 1, 17, 17, 96)},
    "almost-a-tile": {"shape": (2, 3, 3, 63, 63, 64), "rotary": (1, 64)},
    "two-tiles": {"shape": (1, 2, 2, 128, 128, 128)},
    "last-tile-short": {"shape": (1, 3, 1, 200, 200, 80), "rotary": (1, 20)},
    "eight-heads": {"shape": (1, 8, 1, 33, 33, 128), "rotary": (1, 128)},
    "three-heads-twice": {"shape": (2, 6, 2, 70, 70, 96), "rotary": (2, 24)},
    "shorter-queries": {"shape": (2, 4, 2, 20, 150, 64), "rotary": (2, 16)},
    "decoding": {"shape": (3, 8, 2, 1, 200, 128), "rotary": (3, 32)},
    "decoding-first-key": {"shape": (2, 2, 1, 1, 1, 80), "rotary": (1, 80)},
    "one-angle": {"shape": (1, 2, 1, 17, 17, 64), "rotary": (1, 2)},
    "negative-scale": {"shape": (1, 2, 1, 70, 70, 64), "softmax_scale": -0.3},
    "zero-scale": {"shape": (1, 2, 1, 70, 70, 64), "softmax_scale": 0.0},
    "window-1": {"shape": (1, 2, 1, 70, 70, 64), "window_size": 1},
    "window-of-a-tile": {"shape": (1, 2, 2, 200, 200, 64), "window_size": 64},
    "window": {"shape": (2, 3, 1, 130, 130, 96), "window_size": 37},
    "window-beyond": {"shape": (1, 2, 1, 63, 63, 64), "window_size": 2**40},
    "window-shorter-queries": {"shape": (1, 4, 1, 17, 200, 128), "window_size": 70},
    "window-decoding": {"shape": (2, 4, 2, 1, 200, 64), "window_size": 8},
    "hole-start": {"shape": (2, 2, 1, 150, 150, 64), "pad_span": [(0, 64), (0, 70)]},
    "hole-middle": {"shape": (3, 2, 1, 200, 200, 64), "pad_span": [(64, 128), (30, 150), (65, 66)]},
    "hole-end": {"shape": (2, 2, 1, 150, 150, 128), "pad_span": [(128, 150), (20, 150)]},
    "hole-everything": {"shape": (2, 2, 1, 128, 128, 80), "pad_span": [(0, 128), (1, 128)]},
    "hole-empty": {"shape": (3, 2, 1, 17, 17, 64), "pad_span": [(0, 0), (5, 5), (7, 3)]},
    "hole-outside": {"shape": (2, 2, 1, 70, 70, 64), "pad_span": [(-5, 3), (66, 2**31 - 1)]},
    "hole-wider-than-window": {"shape": (2, 2, 1, 200, 200, 64), "pad_span": [(3, 190), (64, 192)], "window_size": 40},
    "hole-decoding": {"shape": (3, 4, 1, 1, 130, 64), "pad_span": [(2, 129), (0, 130), (64, 130)]},
    "a-whole-segment": {"shape": (1, 1, 1, 546, 546, 64), "rotary": (1, 64), "pad_span": [(300, 450)]},
    "everything": {
        "shape": (2, 6, 2, 63, 200, 80), "rotary": (2, 32), "pad_span": [(20, 180), (128, 130)], "window_size": 101,
        "softmax_scale": 0.2,
    },
}  # fmt: skip


class Backend(NamedTuple):
    device: str
    module: object  # with set_seed and fail_next_launch, or the native module


class Inputs(NamedTuple):
    arguments: tuple  # of cuda.forward, on the device
    oracle_settings: dict
    d_out: torch.Tensor
    d_lse: torch.Tensor


@pytest.fixture
def emulated(emulate):
    return Backend("cpu", emulate(cuda))


@pytest.fixture(params=["emulated", "device"] if ON_DEVICE else ["emulated"])
def backend(request):
    return request.getfixturevalue("emulated") if request.param == "emulated" else Backend("cuda", cuda._C)


@contextlib.contextmanager
def poisoned():
    """torch.empty gives NaN: whatever a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def make_inputs(case, dtype, device, rotary=None, pad_span=None, window_size=None, softmax_scale=None):
    batch, q_heads, kv_heads, q_len, k_len, dim = case
    sizes = ((q_heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    q, k, v = (torch.randn(batch, heads, length, dim, device=device).to(dtype) for heads, length in sizes)
    cos = sin = angles = span = None
    if rotary is not None:
        angles = 6.0 * torch.rand(rotary[0], k_len, rotary[1] // 2, dtype=torch.float64, device=device)
        table = torch.cat((angles, angles), dim=-1)
        cos, sin = table.cos().to(dtype), table.sin().to(dtype)
    if pad_span is not None:
        span = torch.tensor(pad_span, dtype=torch.int32, device=device)
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    settings = {"angles": angles, "pad_span": pad_span, "window_size": window_size, "softmax_scale": scale}
    d_lse = torch.randn(q.shape[:3], device=device)
    return Inputs((q, k, v, cos, sin, span, window_size, scale), settings, torch.randn_like(q), d_lse)


def run(inputs):
    """o, lse, dq, dk, dv"""
    *tensors, window_size, scale = inputs.arguments
    with poisoned():
        o, lse = cuda.forward(*inputs.arguments)
        grads = cuda.backward(inputs.d_out, inputs.d_lse, *tensors, o, lse, window_size, scale)
    return o, lse, *grads


def oracle(inputs, dtype):
    qkv = [x.to(dtype).requires_grad_() for x in inputs.arguments[:3]]
    o, lse = oracles.attention(*qkv, **inputs.oracle_settings)
    grads = torch.autograd.grad((o, lse), qkv, (inputs.d_out.to(dtype), inputs.d_lse.to(dtype)))
    return o, lse, *grads


# The dtypes in turn, and both where it matters to the emulation's time least or to rounding most.
BOTH = ("one-key", "almost-a-tile", "decoding-first-key", "hole-decoding", "window-1")
CASES_AND_DTYPES = [
    (case, dtype) for i, case in enumerate(CASES) for j, dtype in enumerate(DTYPES) if case in BOTH or (i + j) % 2
]


@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES, ids=str)
def test_forward_and_backward_are_accurate(case, dtype, backend):
    settings = dict(CASES[case])
    inputs = make_inputs(settings.pop("shape"), dtype, backend.device, **settings)
    results = run(inputs)
    assert [x.dtype for x in results] == [dtype, torch.float32, dtype, dtype, dtype]
    exact, rounded = oracle(inputs, torch.float64), oracle(inputs, dtype)
    for name, *values in zip(("o", "softmax_lse", "dq", "dk", "dv"), results, rounded, exact, strict=True):
        assert_accurate(*values, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 20, 130])
def test_rows_without_a_visible_key_are_exactly_zero(q_len, dtype, backend):
    inputs = make_inputs((2, 4, 2, q_len, 130, 64), dtype, backend.device, (1, 64), [(0, 130), (0, 0)])
    inputs.d_lse[0] = -torch.inf  # what the gradient of lse * lse would be
    o, lse, *grads = run(inputs)
    assert torch.equal(lse[0], torch.full_like(lse[0], -torch.inf)) and lse[1].isfinite().all()
    for result in (o, *grads):
        assert torch.equal(result[0], torch.zeros_like(result[0]))
        assert result[1].isfinite().all() and result[1].any()


@pytest.mark.parametrize("which", [0, 1], ids=["q", "k"])
def test_nan_is_seen_where_it_belongs(which, backend):
    inputs = make_inputs((2, 2, 1, 70, 70, 64), torch.float16, backend.device)
    tensors = [x.clone() for x in inputs.arguments[:3]]
    tensors[which][1, 0, 30, 5] = torch.nan
    o, lse, *_ = cuda.forward(*tensors, *inputs.arguments[3:])
    expected_o, expected_lse = reference.forward(*tensors, *inputs.arguments[3:])
    assert torch.equal(o.isnan(), expected_o.isnan()) and torch.equal(lse.isnan(), expected_lse.isnan())
    assert expected_lse.isnan().any() and not expected_lse.isnan().all()


def test_a_missing_gradient_of_lse_is_zero(backend):
    inputs = make_inputs((1, 2, 1, 20, 70, 64), torch.float16, backend.device)
    expected = run(inputs._replace(d_lse=torch.zeros_like(inputs.d_lse)))
    assert all(torch.equal(*pair) for pair in zip(run(inputs._replace(d_lse=None)), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_and_values_do_not_overflow(dtype, backend):
    inputs = make_inputs((1, 2, 1, 70, 70, 64), dtype, backend.device, softmax_scale=1.0)
    q, k, v, *rest = inputs.arguments
    inputs = inputs._replace(arguments=(16 * q, 16 * k, 16 * v, *rest))  # scores in the thousands: softmax is one-hot
    o, lse, *grads = run(inputs)
    exact, rounded = oracle(inputs, torch.float64), oracle(inputs, dtype)
    assert_accurate(o, rounded[0], exact[0], "o")
    assert_accurate(lse, rounded[1], exact[1], "softmax_lse")
    assert all(grad.isfinite().all() for grad in grads)


# Keyed by name: how q, k, v, o and their gradients lie in memory.
LAYOUTS = {
    "tokens-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "features-first": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat((x, x, x), dim=3)[..., x.shape[3] : 2 * x.shape[3]],
    "every-other-feature": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "unaligned": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
    "unaligned-rows": lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits_laid_out_as_the_inputs(layout, backend):
    settings = {"rotary": (2, 20), "pad_span": [(10, 20), (0, 0)], "window_size": 60}
    inputs = make_inputs((2, 4, 2, 20, 70, 80), torch.bfloat16, backend.device, **settings)
    expected = run(inputs)
    change = LAYOUTS[layout]
    q, k, v, cos, sin, span, *rest = inputs.arguments
    changed = (*map(change, (q, k, v)), cos.mT.contiguous().mT, sin[:, :, [*range(20)]], span.T.contiguous().T, *rest)
    results = run(Inputs(changed, {}, change(inputs.d_out), inputs.d_lse.mT.contiguous().mT))
    for result, same in zip(results, expected, strict=True):
        assert torch.equal(result, same)
    for result, like in zip((results[0], *results[2:]), (changed[0], *changed[:3]), strict=True):
        assert result.stride() == torch.empty_like(like).stride()
    assert results[1].is_contiguous()


def test_expanded_inputs_and_the_gradient_of_a_sum(backend):
    inputs = make_inputs((1, 4, 2, 20, 70, 64), torch.float16, backend.device, (1, 64), [(3, 9)])
    q, k, v, cos, sin, span, *rest = inputs.arguments
    ones, zeros = torch.ones((), dtype=q.dtype, device=q.device), torch.zeros(3, 4, 20, device=q.device)
    expanded = (
        *(x.expand(3, -1, -1, -1) for x in (q, k, v)),
        cos.expand(3, -1, -1),
        sin.expand(3, -1, -1),
        span.expand(3, 2),
        *rest,
    )
    results = run(Inputs(expanded, {}, ones.expand(3, 4, 20, 64), zeros))
    single = run(Inputs(inputs.arguments, {}, torch.ones_like(q), None))
    assert all(torch.equal(result, same.expand_as(result)) for result, same in zip(results, single, strict=True))


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rotary_dim", [20, 64])
def test_rotary_tables_of_another_dtype(rotary_dim, table_dtype, backend):
    inputs = make_inputs((2, 2, 1, 20, 33, 64), torch.bfloat16, backend.device, (2, rotary_dim))
    q, k, v, cos, sin, *rest = inputs.arguments
    cos, sin = cos.to(torch.float16), sin.to(torch.float16)  # values that all three dtypes hold
    expected = run(inputs._replace(arguments=(q, k, v, cos, sin, *rest)))
    results = run(inputs._replace(arguments=(q, k, v, cos.to(table_dtype), sin.to(table_dtype), *rest)))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_unaligned_rotary_tables(backend):
    inputs = make_inputs((1, 2, 1, 20, 33, 64), torch.bfloat16, backend.device, (1, 32))
    q, k, v, cos, sin, *rest = inputs.arguments
    aligned = [x.float() for x in (cos, sin)]
    shifted = [torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x) for x in aligned]
    expected = run(inputs._replace(arguments=(q, k, v, *aligned, *rest)))
    results = run(inputs._replace(arguments=(q, k, v, *shifted, *rest)))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_batch_rows_may_lie_more_than_two_gigabytes_apart(backend):
    inputs = make_inputs((2, 2, 1, 5, 17, 64), torch.bfloat16, backend.device, (1, 64))
    expected = run(inputs)
    apart = []
    for x in inputs.arguments[:3]:
        storage = torch.empty(2**31 + x[0].numel(), dtype=x.dtype, device=x.device)  # touched at its two ends only
        apart.append(storage.as_strided(x.shape, (2**31, *x.stride()[1:])).copy_(x))
    results = run(inputs._replace(arguments=(*apart, *inputs.arguments[3:])))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("case", ["short-batch", "hole-decoding"])
def test_repeats_and_orders_give_the_same_bits(case, backend):
    settings = dict(CASES[case])
    inputs = make_inputs(settings.pop("shape"), torch.float16, backend.device, **settings)
    expected = run(inputs)
    for seed in range(1, 20):
        if backend.device == "cpu":
            backend.module.set_seed(seed)
        assert all(torch.equal(*pair) for pair in zip(run(inputs), expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 5, 64), (2, 2, 1, 0, 5, 64), (2, 2, 1, 0, 0, 64)], ids=str)
def test_empty_batch_or_queries(shape, backend):
    inputs = make_inputs(shape, torch.float16, backend.device, (1, 64))
    o, lse, *grads = run(inputs)
    assert o.shape == inputs.arguments[0].shape and lse.shape == o.shape[:3]
    for x, grad in zip(inputs.arguments[:3], grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_the_operator_calls_the_kernels(emulated, monkeypatch):
    monkeypatch.setitem(dispatch._missing, ("segment_attention", "cuda"), None)
    monkeypatch.setattr(dispatch._modules["segment_attention", "cuda"], "loaded", cuda)
    monkeypatch.setattr(dispatch, "_remembered", {})
    monkeypatch.setattr(cuda, "unavailable", lambda *args: None)
    settings = {"rotary": (2, 64), "pad_span": [(5, 10), (0, 0)], "window_size": 30}
    inputs = make_inputs((2, 4, 2, 20, 70, 64), torch.bfloat16, "cpu", **settings)
    q, k, v, cos, sin, span, window, scale = inputs.arguments
    qkv = [x.requires_grad_() for x in (q, k, v)]
    o, lse = segment_attention(
        *qkv, cos=cos, sin=sin, pad_span=span, window_size=window, softmax_scale=scale, return_lse=True, impl="cuda"
    )
    grads = torch.autograd.grad((o, lse), qkv, (inputs.d_out, inputs.d_lse))
    expected = run(inputs._replace(arguments=tuple(x.detach() for x in (q, k, v)) + inputs.arguments[3:]))
    assert all(torch.equal(*pair) for pair in zip((o, lse, *grads), expected, strict=True))


@pytest.mark.parametrize("failing", ["rotate", "fwd", "bwd"])
def test_a_failed_launch_is_raised_with_kernel_and_shapes(failing, emulated):
    inputs = make_inputs((2, 4, 2, 3, 7, 64), torch.bfloat16, "cpu", (1, 64) if failing == "rotate" else None)
    *tensors, window_size, scale = inputs.arguments
    o, lse = cuda.forward(*inputs.arguments)
    text = rf"segment_attention_{failing}\(B=2, Hq=4, Hkv=2, Tq=3, Tk=7, D=64, bfloat16\): a failure"
    emulated.module.fail_next_launch()
    with pytest.raises(RuntimeError, match=text):
        if failing == "bwd":
            cuda.backward(inputs.d_out, None, *tensors, o, lse, window_size, scale)
        else:
            cuda.forward(*inputs.arguments)


def test_a_launch_that_has_no_kernel_is_refused(emulated):
    for dim, dtype, reason in ((32, torch.float16, "head dimension"), (64, torch.float32, "dtype")):
        inputs = make_inputs((1, 1, 1, 3, 3, dim), dtype, "cpu")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match=f"no kernel for this {reason}"):
            patch.setitem(cuda._DTYPES, torch.float32, 0)
            cuda.forward(*inputs.arguments)


REASONS = {
    "cpu": ({"device": "cpu"}, "it needs CUDA tensors, got cpu"),
    "old-card": ({"capability": (7, 5)}, "it needs compute capability 8.0 or higher"),
    "float32": ({"dtype": torch.float32}, "it takes float16 and bfloat16, got torch.float32"),
    "head-dimension": ({"dim": 32}, "it takes a head dimension of 64, 80, 96, 128, got 32"),
    "rows": (
        {"heads": 128, "k_len": 2**20},
        "it takes Tk (Hq / Hkv)^2 below 2^31, got Tk = 1048576 and Hq / Hkv = 128",
    ),
    "nothing": ({}, None),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_the_kernels_cannot_run_is_said(case, monkeypatch):
    changes, reason = REASONS[case]
    given = {"device": "cuda", "capability": (8, 6), "dtype": torch.float16, "dim": 128, "heads": 8, "k_len": 100}
    given |= changes
    monkeypatch.setattr(cuda, "compute_capability", lambda device: given["capability"])
    q, k = (
        SimpleNamespace(
            device=torch.device(given["device"]), dtype=given["dtype"], shape=(2, heads, length, given["dim"])
        )
        for heads, length in ((given["heads"], 10), (1, given["k_len"]))
    )
    assert cuda.unavailable(q, k, k, None, None, None, None) == reason


def test_what_the_machine_lacks_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module, reason in (
        (None, "the native module hmt_kernels._C is not built"),
        (object(), "the native module was built without CUDA"),
        (type("_C", (), {"segment_attention_cuda_fwd": None}), "PyTorch sees no CUDA device"),
    ):
        monkeypatch.setattr(cuda, "_C", module)
        assert cuda.missing() == reason


if ON_DEVICE:

    def test_a_captured_call_replays():
        inputs = make_inputs((2, 8, 2, 100, 200, 128), torch.bfloat16, "cuda", (1, 128), [(20, 60), (0, 0)])
        run(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run(inputs)
        for _ in range(3):
            for x in inputs.arguments[:3]:
                x.normal_()
            graph.replay()
            assert all(torch.equal(*pair) for pair in zip(results, run(inputs), strict=True))
