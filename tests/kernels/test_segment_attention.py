"""segment_attention: results and gradients against a naive float64 oracle, holes, windows, rotary tables, strides."""

from __future__ import annotations

import oracles
import pytest
import torch
from tolerance import assert_accurate

from hmt_kernels import dispatch, segment_attention
from hmt_kernels.segment_attention import reference, sdpa

IMPLS = ["reference", "sdpa"]
# on a CPU the kernels of Triton are interpreted
EVERYWHERE = [*IMPLS, *(["triton"] if dispatch.missing("segment_attention", "triton") is None else [])]
EVERYWHERE = EVERYWHERE if not torch.cuda.is_available() else IMPLS
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# shape is (B, Hq, Hkv, Tq, Tk, D); rotary (rows, R); the rest as in the operator
CASES = {
    "one-key": {"shape": (1, 1, 1, 1, 1, 32)},
    "square": {"shape": (2, 3, 3, 63, 63, 64)},
    "grouped": {"shape": (2, 6, 2, 33, 33, 80)},
    "one-kv-head": {"shape": (1, 4, 1, 17, 17, 96)},
    "shorter-queries": {"shape": (2, 4, 2, 5, 63, 32)},
    "most-queries": {"shape": (2, 4, 2, 27, 33, 32), "rotary": (1, 16)},
    "decoding": {"shape": (3, 4, 2, 1, 65, 64)},
    "odd-dim": {"shape": (1, 2, 2, 9, 9, 7)},
    "widest": {"shape": (1, 2, 1, 31, 40, 256)},
    "scale": {"shape": (1, 2, 2, 9, 9, 32), "softmax_scale": 0.5},
    "scale-negative": {"shape": (1, 2, 2, 9, 9, 32), "softmax_scale": -0.5},
    "scale-zero": {"shape": (1, 2, 2, 9, 9, 32), "softmax_scale": 0.0},
    "scale-negative-shorter-queries": {"shape": (1, 2, 1, 5, 9, 32), "softmax_scale": -0.5, "pad_span": [(2, 4)]},
    "window-1": {"shape": (1, 2, 1, 33, 33, 32), "window_size": 1},
    "window": {"shape": (2, 2, 1, 33, 33, 32), "window_size": 7},
    "window-all": {"shape": (2, 2, 1, 33, 33, 32), "window_size": 33},
    "window-beyond": {"shape": (2, 2, 1, 33, 33, 32), "window_size": 1000},
    "window-shorter-queries": {"shape": (2, 2, 1, 5, 63, 32), "window_size": 11},
    "window-decoding": {"shape": (2, 4, 2, 1, 63, 32), "window_size": 8},
    "hole-start": {"shape": (2, 4, 2, 33, 33, 32), "pad_span": [(0, 5), (0, 1)]},
    "hole-middle": {"shape": (2, 4, 2, 33, 33, 32), "pad_span": [(7, 20), (1, 32)]},
    "hole-end": {"shape": (2, 4, 2, 33, 33, 32), "pad_span": [(30, 33), (5, 33)]},
    "hole-everything": {"shape": (2, 4, 2, 33, 33, 32), "pad_span": [(0, 33), (3, 9)]},
    "hole-empty": {"shape": (3, 4, 2, 9, 9, 32), "pad_span": [(0, 0), (5, 5), (7, 3)]},
    "hole-outside": {"shape": (2, 4, 2, 9, 9, 32), "pad_span": [(-5, 3), (6, 100)]},
    "hole-wider-than-window": {"shape": (2, 2, 1, 33, 33, 32), "pad_span": [(3, 20), (0, 0)], "window_size": 6},
    "hole-shorter-queries": {"shape": (2, 2, 1, 6, 40, 32), "pad_span": [(2, 37), (0, 40)]},
    "hole-decoding": {"shape": (3, 2, 1, 1, 40, 32), "pad_span": [(2, 9), (0, 40), (39, 40)]},
    "hole-window-decoding": {"shape": (3, 2, 1, 1, 40, 32), "pad_span": [(2, 9), (32, 40), (30, 35)], "window_size": 8},
    "hole-of-least-int32": {"shape": (1, 2, 1, 1, 40, 32), "pad_span": [(0, -(2**31))], "window_size": 8},
    "rotary": {"shape": (2, 4, 2, 33, 33, 32), "rotary": (1, 32)},
    "rotary-per-row": {"shape": (2, 4, 2, 33, 33, 32), "rotary": (2, 32)},
    "rotary-partial": {"shape": (2, 4, 2, 33, 33, 80), "rotary": (1, 20)},
    "rotary-shorter-queries": {"shape": (2, 4, 2, 5, 33, 64), "rotary": (2, 16)},
    "rotary-decoding": {"shape": (2, 4, 2, 1, 33, 64), "rotary": (2, 64)},
    "everything": {
        "shape": (2, 4, 2, 20, 33, 64), "rotary": (2, 16), "pad_span": [(4, 28), (9, 10)], "window_size": 13,
    },
    "everything-decoding": {
        "shape": (2, 4, 2, 1, 33, 64), "rotary": (2, 16), "pad_span": [(4, 28), (0, 33)], "window_size": 9,
    },
}  # fmt: skip


def make_case(shape, dtype, rotary=None, pad_span=None, **settings):
    """q, k, v and the keyword arguments, for the operator and for the oracle."""
    batch, q_heads, kv_heads, q_len, k_len, dim = shape
    sizes = ((q_heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    qkv = [torch.randn(batch, heads, length, dim, dtype=dtype, requires_grad=True) for heads, length in sizes]
    oracle_settings = settings | {"pad_span": pad_span}
    if pad_span is not None:
        settings["pad_span"] = torch.tensor(pad_span, dtype=torch.int32)
    if rotary is not None:
        angles = 6.0 * torch.rand(rotary[0], k_len, rotary[1] // 2, dtype=torch.float64)
        table = torch.cat((angles, angles), dim=-1)
        settings["cos"], settings["sin"] = table.cos().to(dtype), table.sin().to(dtype)
        oracle_settings["angles"] = angles
    return qkv, settings, oracle_settings


def oracle_with_gradients(qkv, do, dlse, dtype, **settings):
    qkv = [x.detach().to(dtype).requires_grad_() for x in qkv]
    o, lse = oracles.attention(*qkv, **settings)
    outputs, upstream = ((o,), (do,)) if dlse is None else ((o, lse), (do, dlse))
    return o, lse, *torch.autograd.grad(outputs, qkv, [x.to(dtype) for x in upstream])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_accurate(case, dtype, impl):
    qkv, settings, oracle_settings = make_case(dtype=dtype, **CASES[case])
    return_lse = impl != "sdpa"
    result = segment_attention(*qkv, **settings, return_lse=return_lse, impl=impl)
    o, lse = result if return_lse else (result, None)
    do, dlse = torch.randn_like(o), None if lse is None else torch.randn_like(lse)
    grads = torch.autograd.grad(*(((o,), qkv, (do,)) if lse is None else ((o, lse), qkv, (do, dlse))))
    exact = oracle_with_gradients(qkv, do, dlse, torch.float64, **oracle_settings)
    rounded = oracle_with_gradients(qkv, do, dlse, dtype, **oracle_settings)
    assert o.dtype == dtype
    assert_accurate(o, rounded[0], exact[0], "o")
    if lse is not None:
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_accurate(lse, rounded[1], exact[1], "softmax_lse")
    for name, grad, rounded_grad, exact_grad in zip("qkv", grads, rounded[2:], exact[2:], strict=True):
        assert_accurate(grad, rounded_grad, exact_grad, f"d{name}")


@pytest.mark.parametrize("impl", IMPLS)
def test_long_segment(impl):
    qkv, settings, oracle_settings = make_case((1, 2, 1, 1000, 1000, 32), torch.float32, pad_span=[(40, 300)])
    o = segment_attention(*qkv, **settings, impl=impl)
    do = torch.randn_like(o)
    exact = oracle_with_gradients(qkv, do, None, torch.float64, **oracle_settings)
    rounded = oracle_with_gradients(qkv, do, None, torch.float32, **oracle_settings)
    assert_accurate(o, rounded[0], exact[0], "o")
    for name, grad, r, e in zip("qkv", torch.autograd.grad(o, qkv, do), rounded[2:], exact[2:], strict=True):
        assert_accurate(grad, r, e, f"d{name}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 5, 9])
def test_rows_without_a_visible_key_are_exactly_zero(q_len, dtype, impl):
    qkv, settings, _ = make_case((2, 4, 2, q_len, 9, 32), dtype, rotary=(1, 32), pad_span=[(0, 9), (0, 0)])
    o = segment_attention(*qkv, **settings, impl=impl)
    assert torch.equal(o[0], torch.zeros_like(o[0]))
    assert o[1].all()
    for grad in torch.autograd.grad(o, qkv, torch.randn_like(o)):
        assert torch.equal(grad[0], torch.zeros_like(grad[0]))
        assert grad[1].isfinite().all()
        assert grad[1].any()


def test_infinite_lse_brings_no_nan_into_the_gradients():
    qkv, settings, _ = make_case((2, 2, 1, 9, 9, 32), torch.float32, pad_span=[(0, 9), (0, 4)])
    o, lse = segment_attention(*qkv, **settings, return_lse=True)
    assert torch.equal(lse[0], torch.full_like(lse[0], -torch.inf))
    grads = torch.autograd.grad(o.sum() + (lse * lse).sum(), qkv)  # the upstream gradient of lse is -inf there
    assert all(grad.isfinite().all() and not grad[0].any() for grad in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 5, 32), (2, 2, 1, 0, 5, 32), (2, 2, 1, 0, 0, 32)], ids=str)
def test_empty_batch_or_queries(shape, impl):
    qkv, _, _ = make_case(shape, torch.float32)
    o = segment_attention(*qkv, impl=impl)
    assert o.shape == qkv[0].shape
    for x, grad in zip(qkv, torch.autograd.grad(o.sum(), qkv), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_changed_key_changes_no_earlier_row_and_none_beyond_the_window(impl):
    (q, k, v), _, _ = make_case((1, 2, 1, 20, 20, 32), torch.float32)
    before = segment_attention(q, k, v, window_size=5, impl=impl)
    changed = [x.detach().clone() for x in (k, v)]
    for x in changed:
        x[:, :, 11] += 10
    moved = (segment_attention(q, *changed, window_size=5, impl=impl) - before).abs().amax((0, 1, 3))
    assert (moved > 1e-3).nonzero().flatten().tolist() == [11, 12, 13, 14, 15]
    assert (moved > 1e-5).sum() == 5


@pytest.mark.parametrize("impl", IMPLS)
def test_a_hole_equals_leaving_the_keys_out(impl):
    (q, k, v), _, _ = make_case((1, 2, 1, 6, 20, 32), torch.float32)
    span = torch.tensor([[3, 11]], dtype=torch.int32)
    kept = [i for i in range(20) if not 3 <= i < 11]
    hole = segment_attention(q, k, v, pad_span=span, impl=impl)
    torch.testing.assert_close(hole, segment_attention(q, k[:, :, kept], v[:, :, kept], impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_rotary_tables_of_another_dtype_and_without_gradient(impl):
    qkv, settings, _ = make_case((2, 4, 2, 9, 9, 32), torch.float16, rotary=(1, 32))
    tables = {name: settings[name].float().requires_grad_() for name in ("cos", "sin")}
    o = segment_attention(*qkv, **tables, impl=impl)
    torch.testing.assert_close(o, segment_attention(*qkv, **settings, impl=impl), atol=2e-3, rtol=2e-3)
    grads = torch.autograd.grad(o.sum(), (*qkv, *tables.values()), allow_unused=True)
    assert all(grad is not None for grad in grads[:3])
    assert grads[3:] == (None, None)


def layouts(x):
    """The same values under other strides: tokens before heads, as models hold them, and two odd ones."""
    yield "tokens-first", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "features-first", x.mT.contiguous().mT
    padded = torch.zeros(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)
    padded[..., ::2] = x
    yield "every-other-feature", padded[..., ::2]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e-46, -1e-46, 1e-39])
def test_a_scale_that_float32_rounds_away(scale, impl):
    """All visible keys weigh the same."""
    q, k, v = (torch.randn(1, 2, 6, 16) for _ in range(3))
    mean = v.cumsum(2) / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(segment_attention(q, k, v, softmax_scale=scale, impl=impl), mean)


@pytest.mark.parametrize("impl", EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_that_see_nothing_take_part_in_nothing(dtype, impl):
    """Whatever is in them, and whatever gradient comes to them: as where parts are put together by their lse."""
    q, k, v, do = (torch.randn(2, heads, 9, 64, dtype=dtype) for heads in (4, 2, 2, 4))
    span = torch.tensor([[0, 3], [0, 9]], dtype=torch.int32)
    blind = torch.zeros(2, 1, 9, 1, dtype=torch.bool)
    blind[0, :, :3] = blind[1] = True

    def results(q, do):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = segment_attention(*leaves, pad_span=span, impl=impl)
        return o, *torch.autograd.grad(o, leaves, do)

    expected = results(q.masked_fill(blind, 0.0), do.masked_fill(blind, 0.0))
    large = q.masked_fill(blind, torch.finfo(dtype).max)
    for value in (float("nan"), float("inf"), torch.finfo(dtype).max):
        for found, same in zip(results(large, do.masked_fill(blind, value)), expected, strict=True):
            torch.testing.assert_close(found, same)
            assert found.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    qkv, settings, _ = make_case((2, 4, 2, 9, 20, 32), torch.float32, rotary=(2, 16), pad_span=[(2, 5), (0, 20)])
    qkv = [x.detach() for x in qkv]
    do = torch.randn_like(qkv[0])

    def run(qkv, do):
        qkv = [x.requires_grad_() for x in qkv]
        o = segment_attention(*qkv, **settings, impl=impl)
        return o, *torch.autograd.grad(o, qkv, do)

    expected = run([x.clone() for x in qkv], do)
    for views in zip(*(layouts(x) for x in (*qkv, do)), strict=True):
        name, (*views, do_view) = views[0][0], [view for _, view in views]
        for actual, wanted in zip(run(views, do_view), expected, strict=True):
            torch.testing.assert_close(actual, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
def test_stride_zero_inputs_and_gradients(impl):
    (q, k, v), _, _ = make_case((1, 4, 2, 9, 9, 32), torch.float32)
    span = torch.tensor([[2, 4]], dtype=torch.int32).expand(3, 2)
    o = segment_attention(*(x.expand(3, -1, -1, -1) for x in (q, k, v)), pad_span=span, impl=impl)
    grads = torch.autograd.grad(o.sum(), (q, k, v))  # an upstream gradient of stride 0
    single = segment_attention(q, k, v, pad_span=span[:1], impl="reference")
    torch.testing.assert_close(o, single.expand_as(o))
    for actual, wanted in zip(grads, torch.autograd.grad(single.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(actual, 3 * wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("heads", [1, 2])
def test_rows_that_overlap(heads, which, dim, dtype, impl):
    """Neighbours begin one element apart in memory."""
    shape = (heads, heads, 6, 114)
    qkv = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    strides = list(qkv[0].stride())
    strides[dim] = 1
    qkv[which] = torch.randn(4000).to(dtype).as_strided(shape, strides)
    results = []
    for inputs in (qkv, [x.contiguous() for x in qkv]):
        inputs = [x.detach().requires_grad_() for x in inputs]
        o = segment_attention(*inputs, impl=impl)
        results.append((o, *torch.autograd.grad(o.sum(), inputs)))
    torch.testing.assert_close(*results)


def test_results_of_the_operator_are_laid_out_as_its_inputs():
    (q, k, v), _, _ = make_case((2, 4, 2, 9, 20, 32), torch.float32)
    q, k = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k))
    o = segment_attention(q, k, v, impl="reference")
    assert o.stride() == q.stride()  # so that o.transpose(1, 2).reshape(B, T, Hq * D) copies nothing
    for x, grad in zip((q, k, v), torch.autograd.grad(o.sum(), (q, k, v)), strict=True):
        assert grad.stride() == x.stride()


@pytest.mark.parametrize("window_size", [None, 3])
def test_no_implementation_reads_values_on_the_host(window_size):
    # A meta tensor has no values: reading one, as .item() does, would raise.
    qkv, settings, _ = make_case((2, 4, 2, 9, 20, 32), torch.float32, rotary=(2, 16), pad_span=[(2, 5), (0, 20)])
    q, k, v = (x.detach().to("meta") for x in qkv)
    tables = [settings[name].to("meta") for name in ("cos", "sin", "pad_span")]
    o, lse = reference.forward(q, k, v, *tables, window_size, 0.25)
    grads = reference.backward(o, lse, q, k, v, *tables, o, lse, window_size, 0.25)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    assert sdpa.attend(q, k, v, *tables, window_size, 0.25).shape == q.shape
