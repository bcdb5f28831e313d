"""The Triton kernels of segment_attention, on a GPU or in the interpreter: results, gradients, strides, block order."""

from __future__ import annotations

import interpreter_bf16
import oracles
import pytest
import torch
from kernel_runs import poison_new_memory, shuffle_blocks
from tolerance import assert_accurate

from hmt_kernels import segment_attention
from hmt_kernels.segment_attention import triton as implementation
from hmt_kernels.segment_attention import triton_configs, triton_plans
from hmt_kernels.triton_launch import Target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if implementation.INTERPRETED:
    interpreter_bf16.install()
REPEATS = 5 if implementation.INTERPRETED else 20

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# shape is (B, Hq, Hkv, Tq, Tk, D); rotary (rows, R, dtype of the tables); layout that of q, k, v; the rest as in the
# operator. Every value that the contract names, with every other kind of value.
CASES = {
    "one-key": {"shape": (2, 3, 1, 1, 1, 32), "dtype": BF16, "rotary": (1, 32, FP32)},
    "decoding": {"shape": (2, 3, 1, 1, 200, 64), "dtype": FP16, "pad_span": [(60, 130), (0, 9)]},
    "decoding-rotary": {
        "shape": (2, 8, 1, 1, 63, 80), "dtype": FP32, "rotary": (2, 80, FP32), "layout": "tokens-first",
    },
    "decoding-partial-rotary": {
        "shape": (3, 3, 3, 1, 128, 96), "dtype": BF16, "rotary": (1, 24, BF16), "window_size": 40,
        "pad_span": [(90, 100), (100, 128), (0, 200)],
    },
    "decoding-wide": {"shape": (1, 3, 1, 1, 546, 256), "dtype": FP32, "rotary": (1, 64, FP32), "layout": "odd"},
    "square-32": {"shape": (1, 3, 3, 63, 63, 32), "dtype": FP32, "rotary": (1, 32, FP32), "layout": "features-first"},
    "hole-start": {"shape": (2, 3, 1, 17, 17, 64), "dtype": BF16, "pad_span": [(0, 9), (-3, 1)], "layout": "odd"},
    "hole-middle": {
        "shape": (2, 3, 1, 128, 128, 64), "dtype": BF16, "rotary": (2, 64, FP32), "pad_span": [(40, 120), (7, 8)],
        "layout": "tokens-first",
    },
    "hole-end": {
        "shape": (2, 3, 3, 63, 63, 80), "dtype": FP32, "rotary": (1, 80, FP32), "pad_span": [(33, 63), (5, 99)],
    },
    "hole-empty": {
        "shape": (3, 1, 1, 17, 70, 32), "dtype": FP16, "pad_span": [(0, 0), (55, 55), (70, 30)], "window_size": 20,
    },
    "hole-everything": {"shape": (2, 1, 1, 128, 128, 96), "dtype": FP16, "pad_span": [(0, 128), (64, 128)]},
    "hole-of-most-tiles": {"shape": (1, 1, 1, 546, 546, 32), "dtype": FP16, "pad_span": [(17, 500)]},
    "window": {"shape": (1, 3, 1, 200, 200, 64), "dtype": FP16, "window_size": 50, "rotary": (1, 16, FP16)},
    "window-1": {"shape": (1, 8, 1, 17, 17, 32), "dtype": FP32, "window_size": 1, "layout": "expanded"},
    "window-and-hole": {
        "shape": (2, 1, 1, 128, 128, 128), "dtype": BF16, "window_size": 70, "pad_span": [(10, 100), (0, 40)],
        "rotary": (1, 128, FP32),
    },
    "shorter-queries": {
        "shape": (2, 8, 1, 17, 128, 64), "dtype": FP16, "rotary": (2, 20, FP32), "pad_span": [(3, 120), (0, 0)],
    },
    "shorter-queries-hidden": {
        "shape": (2, 3, 1, 63, 128, 80), "dtype": BF16, "window_size": 33, "pad_span": [(20, 90), (0, 128)],
    },
    "long": {"shape": (1, 1, 1, 546, 546, 64), "dtype": BF16, "rotary": (1, 64, FP32), "pad_span": [(33, 300)]},
    "widest": {"shape": (1, 3, 1, 63, 63, 256), "dtype": BF16, "rotary": (1, 256, FP32)},
    "widest-fp32": {"shape": (1, 1, 1, 63, 63, 256), "dtype": FP32, "rotary": (1, 64, torch.float64)},
    "phi-3": {"shape": (1, 3, 3, 63, 63, 96), "dtype": BF16, "rotary": (1, 96, BF16), "layout": "tokens-first"},
    "peaked": {"shape": (1, 3, 1, 63, 63, 64), "dtype": FP32, "softmax_scale": 4.0},
    "peaked-bf16": {"shape": (1, 3, 1, 63, 63, 64), "dtype": BF16, "softmax_scale": 2.0},
    "negative-scale": {"shape": (1, 3, 1, 63, 63, 32), "dtype": FP32, "softmax_scale": -0.3, "window_size": 9},
    "negative-scale-decoding": {"shape": (1, 3, 1, 1, 63, 32), "dtype": FP32, "softmax_scale": -0.3, "window_size": 9},
    "zero-scale": {"shape": (1, 3, 1, 17, 63, 32), "dtype": FP32, "softmax_scale": 0.0, "pad_span": [(3, 60)]},
    "other-widths": {"shape": (1, 2, 1, 33, 33, 24), "dtype": FP32, "rotary": (1, 8, FP32)},
    "narrowest": {"shape": (1, 2, 1, 33, 33, 8), "dtype": FP32, "rotary": (1, 8, FP32)},
    "many-heads-decoding": {"shape": (1, 65, 1, 1, 17, 32), "dtype": FP32},
}  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_new_memory(monkeypatch)


def lay_out(x, layout):
    """The values of x [B, H, T, D] (for "expanded", of its first batch row) under other strides, as a leaf."""
    if layout == "tokens-first":  # as models hold them
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "features-first":
        x = x.mT.contiguous().mT
    elif layout == "expanded":
        x = x[:, :1].expand_as(x)
    elif layout == "odd":  # rows start anywhere, between other values
        room = x.new_full((*x.shape[:2], x.shape[2] + 2, x.shape[3] + 3), float("nan"))
        room[:, :, 1:-1, 1:-2] = x
        x = room[:, :, 1:-1, 1:-2]
    return x.detach().requires_grad_()


def make_case(shape, dtype, rotary=None, pad_span=None, layout="contiguous", **settings):
    """q, k, v and the keyword arguments, for the operator and for the oracle."""
    batch, q_heads, kv_heads, q_len, k_len, dim = shape
    sizes = ((q_heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    qkv = [torch.randn(batch, heads, length, dim, dtype=dtype, device=DEVICE) for heads, length in sizes]
    oracle_settings = settings | {"pad_span": pad_span}
    if pad_span is not None:
        settings["pad_span"] = torch.tensor(pad_span, dtype=torch.int32, device=DEVICE)
    if rotary is not None:
        rows, width, table_dtype = rotary
        angles = 6.0 * torch.rand(rows, k_len, width // 2, dtype=torch.float64, device=DEVICE)
        table = torch.cat((angles, angles), dim=-1)
        settings["cos"], settings["sin"] = table.cos().to(table_dtype), table.sin().to(table_dtype)
        oracle_settings["angles"] = angles
    return [lay_out(x, layout) for x in qkv], settings, oracle_settings


def oracle_with_gradients(qkv, do, dlse, dtype, **settings):
    qkv = [x.detach().to(dtype).requires_grad_() for x in qkv]
    o, lse = oracles.attention(*qkv, **settings)
    outputs, upstream = ((o,), (do,)) if dlse is None else ((o, lse), (do, dlse))
    return o, lse, *torch.autograd.grad(outputs, qkv, [x.to(dtype) for x in upstream])


def check(results, qkv, do, dlse, oracle_settings):
    dtype = qkv[0].dtype
    exact, rounded = (oracle_with_gradients(qkv, do, dlse, kind, **oracle_settings) for kind in (torch.float64, dtype))
    for name, actual, r, e in zip(("o", "softmax_lse", "dq", "dk", "dv"), results, rounded, exact, strict=True):
        if actual is not None:
            assert_accurate(actual, r, e, name)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_are_accurate(case):
    qkv, settings, oracle_settings = make_case(**CASES[case])
    o, lse = segment_attention(*qkv, **settings, return_lse=True, impl="triton")
    assert o.dtype == qkv[0].dtype and lse.dtype == torch.float32
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    grads = torch.autograd.grad((o, lse), qkv, (do, dlse))
    assert all(
        x.stride() == torch.empty_like(like).stride() for x, like in zip((o, *grads), (qkv[0], *qkv), strict=True)
    )
    check((o, lse, *grads), qkv, do, dlse, oracle_settings)


@pytest.mark.parametrize("case", ["decoding", "window-and-hole"])
def test_lse_is_as_exact_as_float32(case):
    # Without a rotary embedding, which rounds q and k, products of 16-bit numbers are exact.
    qkv, settings, oracle_settings = make_case(**(CASES[case] | {"rotary": None}))
    _, lse = segment_attention(*qkv, **settings, return_lse=True, impl="triton")
    exact, rounded = (
        oracles.attention(*(x.detach().to(kind) for x in qkv), **oracle_settings)[1] for kind in (torch.float64, FP32)
    )
    assert_accurate(lse, rounded, exact, "softmax_lse")


@pytest.mark.parametrize("q_len", [1, 40])
def test_gradient_of_a_sum_alone(q_len):
    # Its gradient is expanded from one number, and softmax_lse gets none.
    qkv, settings, oracle_settings = make_case((2, 4, 2, q_len, 40, 64), BF16, (1, 64, FP32), [(3, 30), (0, 40)])
    o = segment_attention(*qkv, **settings, impl="triton")
    grads = torch.autograd.grad(o.sum(), qkv)
    check((o, None, *grads), qkv, torch.ones_like(o), None, oracle_settings)


@pytest.mark.parametrize("q_len", [1, 17])
def test_rows_without_a_visible_key_are_exactly_zero(q_len):
    # Even where the gradient of an lse of -inf is not finite.
    qkv, settings, _ = make_case((2, 4, 2, q_len, 40, 32), BF16, (1, 32, FP32), [(0, 40), (0, 0)])
    o, lse = segment_attention(*qkv, **settings, return_lse=True, impl="triton")
    assert torch.equal(o[0], torch.zeros_like(o[0])) and torch.equal(lse[0], torch.full_like(lse[0], -torch.inf))
    assert o[1].all()
    for grad in torch.autograd.grad(o.float().sum() + (lse * lse).sum(), qkv):
        assert torch.equal(grad[0], torch.zeros_like(grad[0]))
        assert grad[1].isfinite().all() and grad[1].any()


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 5, 32), (2, 2, 1, 0, 5, 32), (2, 2, 1, 0, 0, 32)], ids=str)
def test_empty_batch_or_queries(shape):
    qkv, _, _ = make_case(shape, FP32)
    o = segment_attention(*qkv, impl="triton")
    assert o.shape == qkv[0].shape
    for x, grad in zip(qkv, torch.autograd.grad(o.sum(), qkv), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("q_len", [1, 65])
def test_keys_that_no_row_sees_are_not_read(q_len):
    (q, k, v), settings, _ = make_case((1, 2, 1, q_len, 200, 32), FP32, (1, 32, FP32), window_size=20)
    unseen = 200 - q_len - 20  # whole tiles before them only
    before = segment_attention(q, k, v, **settings, impl="triton")
    for x in (k, v):
        x.data[:, :, : unseen - 64] = float("nan")
    settings["cos"][:, : unseen - 64] = float("nan")
    assert torch.equal(segment_attention(q, k, v, **settings, impl="triton"), before)


def test_repeats_of_a_segment_give_the_same_bits(monkeypatch):
    qkv, settings, oracle_settings = make_case((1, 2, 1, 65, 70, 32), FP16, (1, 32, FP32), [(20, 55)])
    arguments = (*(x.detach() for x in qkv), settings["cos"], settings["sin"], settings["pad_span"], None, 32**-0.5)
    results = []
    for _ in range(REPEATS):
        shuffle_blocks(monkeypatch)
        o, lse = implementation.forward(*arguments)
        results.append((o, lse, *implementation.backward(o, lse, *arguments[:6], o, lse, *arguments[6:])))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    check(results[0], qkv, *results[0][:2], oracle_settings)


def test_repeats_of_split_decoding_in_random_block_order_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(implementation, "target_of", lambda device: Target(90, 132))
    splits = []
    decode_splits = triton_configs.decode_splits
    monkeypatch.setattr(triton_plans, "decode_splits", lambda *args: splits.append(decode_splits(*args)) or splits[-1])
    counters = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(triton_plans, "zeroed_counters", lambda count, device: counters)
    qkv, settings, oracle_settings = make_case((1, 4, 2, 1, 400, 32), BF16, (1, 32, FP32), [(20, 150)])
    arguments = (*(x.detach() for x in qkv), settings["cos"], settings["sin"], settings["pad_span"], None, 32**-0.5)
    results = []
    for _ in range(REPEATS):
        shuffle_blocks(monkeypatch)
        results.append(implementation.forward(*arguments))
        assert (counters == 0).all()  # ready for the next launch
    assert set(splits) == {7}
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    exact, rounded = (
        oracles.attention(*(x.detach().to(kind) for x in qkv), **oracle_settings) for kind in (torch.float64, BF16)
    )
    for position, name in enumerate(("o", "softmax_lse")):
        assert_accurate(results[0][position], rounded[position], exact[position], name)
