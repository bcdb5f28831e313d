"""segment_attention with impl="triton" as a PyTorch operator: opcheck, torch.compile, explain, meta tensors."""

from __future__ import annotations

import interpreter_bf16
import pytest
import torch
from torch.library import opcheck

import hmt_kernels
from hmt_kernels import segment_attention
from hmt_kernels.segment_attention import triton as implementation

if implementation.INTERPRETED:
    interpreter_bf16.install()

OPS = torch.ops.hmt_kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(q_len, dtype=torch.float32, dim=16):
    sizes = ((2, q_len), (1, 7), (1, 7))
    q, k, v = (torch.randn(1, heads, length, dim, dtype=dtype, device=DEVICE) for heads, length in sizes)
    angles = torch.rand(1, 7, 4, device=DEVICE).repeat(1, 1, 2)
    span = torch.tensor([[1, 4]], dtype=torch.int32, device=DEVICE)
    return (q, k, v), (angles.cos(), angles.sin(), span)


@pytest.mark.parametrize("q_len", [1, 5])
def test_opcheck(q_len):
    (q, k, v), tables = make_inputs(q_len)
    arguments = (
        q.mT.contiguous().mT.requires_grad_(),
        k.requires_grad_(),
        v.requires_grad_(),
        *tables,
        3,
        0.25,
        "triton",
    )
    assert set(opcheck(OPS.segment_attention_fwd, arguments).values()) == {"SUCCESS"}
    q, k, v = (x.detach() for x in arguments[:3])
    o, lse = OPS.segment_attention_fwd(q, k, v, *tables, 3, 0.25, "triton")
    arguments = (torch.ones_like(o), torch.ones_like(lse), q, k, v, *tables, o, lse, 3, 0.25, "triton")
    assert set(opcheck(OPS.segment_attention_bwd, arguments).values()) == {"SUCCESS"}


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_gradients_equals_eager():
    def loss(q, k, v, cos, sin, pad_span):
        o, lse = segment_attention(q, k, v, cos=cos, sin=sin, pad_span=pad_span, return_lse=True, impl="triton")
        return o.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()

    qkv, tables = make_inputs(5)
    qkv = [x.requires_grad_() for x in qkv]
    eager = torch.autograd.grad(loss(*qkv, *tables), qkv)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*qkv, *tables), qkv)
    assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("which", [0, 1], ids=["q", "k"])
@pytest.mark.parametrize("q_len", [1, 7])
def test_nan_is_seen_where_it_belongs(q_len, which):
    qkv, _ = make_inputs(q_len)
    qkv[which][0, 0, -1 if which == 0 else 3, 5] = torch.nan
    found, expected = ([], [])
    for impl, results in (("triton", found), ("reference", expected)):
        inputs = [x.clone().requires_grad_() for x in qkv]
        o, lse = segment_attention(*inputs, return_lse=True, impl=impl)
        grads = torch.autograd.grad(o.sum(), inputs)
        results += [o.isnan(), lse.isnan(), *(grad.isnan().any() for grad in grads)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert expected[1].any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "it has no float64"),
        ({"dim": 20}, "it takes head dimensions that are multiples of 8 up to 256, q's is 20"),
        ({"dim": 264}, "it takes head dimensions that are multiples of 8 up to 256, q's is 264"),
    ],
    ids=["float64", "odd", "wide"],
)
def test_explain_says_what_is_missing(changes, reason):
    (q, k, v), _ = make_inputs(3, **changes)
    text = hmt_kernels.explain("segment_attention", q, k, v, impl="triton")
    assert text.startswith("segment_attention: ValueError") and reason in text
    with pytest.raises(ValueError, match=reason):
        segment_attention(q, k, v, impl="triton")
