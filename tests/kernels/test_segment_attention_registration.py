"""segment_attention as a PyTorch operator: opcheck, gradcheck, torch.compile, fake tensors."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from hmt_kernels import checking, segment_attention

OPS = torch.ops.hmt_kernels
SETTINGS = ["plain", "window", "hole", "rotary", "everything"]


def make_inputs(q_len=5, k_len=7, dtype=torch.float64, dim=8):
    sizes = ((4, q_len), (2, k_len), (2, k_len))
    return [torch.randn(2, heads, length, dim, dtype=dtype, requires_grad=True) for heads, length in sizes]


def make_settings(kind, k_len=7, dtype=torch.float64):
    angles = torch.arange(k_len, dtype=torch.float64)[:, None] * torch.tensor([0.7, 0.1, 0.7, 0.1])
    settings = {
        "cos": angles.cos().to(dtype)[None],
        "sin": angles.sin().to(dtype)[None],
        "pad_span": torch.tensor([[1, 4], [0, 3]], dtype=torch.int32),
        "window_size": 3,
    }
    wanted = {"plain": (), "window": ("window_size",), "hole": ("pad_span",), "rotary": ("cos", "sin")}
    return {name: value if name in wanted.get(kind, settings) else None for name, value in settings.items()}


def tokens_first(tensor):
    return tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SETTINGS)
def test_opcheck_of_the_forward_operator(kind, dtype):
    q, k, v = make_inputs(dtype=dtype)
    args = (tokens_first(q), k, tokens_first(v), *make_settings(kind, dtype=dtype).values(), 0.25, "reference")
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    assert set(opcheck(OPS.segment_attention_fwd, args, **tolerances).values()) == {"SUCCESS"}


@pytest.mark.parametrize("with_dlse", [True, False], ids=["dlse", "no-dlse"])
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_opcheck_of_the_backward_operator(kind, with_dlse):
    q, k, v = (x.detach() for x in make_inputs())
    settings = make_settings(kind)
    window_size = settings.pop("window_size")
    tables = settings.values()
    o, lse = OPS.segment_attention_fwd(q, k, v, *tables, window_size, 0.25, "reference")
    do = torch.randn(2, 4, 5, 1, dtype=torch.float64).expand_as(o)
    dlse = torch.randn_like(lse).mT.contiguous().mT if with_dlse else None
    args = (do, dlse, q, k, v, *tables, o, lse, window_size, 0.25, "reference")
    assert set(opcheck(OPS.segment_attention_bwd, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_gradcheck(kind, impl):
    settings = make_settings(kind)

    def call(q, k, v):
        return segment_attention(q, k, v, **settings, softmax_scale=0.5, impl=impl)

    assert torch.autograd.gradcheck(call, make_inputs(q_len=4, dim=5))


@pytest.mark.parametrize("kind", SETTINGS)
def test_gradcheck_of_softmax_lse(kind):
    settings = make_settings(kind)

    def call(q, k, v):
        o, lse = segment_attention(q, k, v, **settings, return_lse=True)
        return o, lse.masked_fill(lse.isinf(), 0.0)  # no difference quotient where a row sees no key

    assert torch.autograd.gradcheck(call, make_inputs(q_len=4, dim=5))


def attention_loss(q, k, v, settings, return_lse):
    result = segment_attention(q, k, v, **settings, return_lse=return_lse)
    o, lse = result if return_lse else (result, torch.zeros(()))
    return (o.float() ** 2).sum() + lse.masked_fill(lse.isinf(), 0.0).sum(), o


def run_with_gradients(function, qkv, settings, return_lse):
    loss, o = function(*qkv, settings, return_lse)
    return loss, o, *torch.autograd.grad(loss, qkv)


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("return_lse", [True, False], ids=["reference", "sdpa"])
def test_compiled_equals_eager(return_lse):
    qkv = make_inputs(dtype=torch.float32)
    settings = make_settings("everything", dtype=torch.float32)
    compiled = torch.compile(attention_loss, fullgraph=True)
    expected = run_with_gradients(attention_loss, qkv, settings, return_lse)
    assert_same(run_with_gradients(compiled, qkv, settings, return_lse), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("return_lse", [True, False], ids=["reference", "sdpa"])
@pytest.mark.parametrize("kind", ["plain", "window", "hole", "everything"])
def test_compiled_once_for_all_lengths(kind, return_lse):
    compiled = torch.compile(attention_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for stance, lengths in (("default", (5, 9)), ("fail_on_recompile", (12, 17))):
        qkv, settings = make_inputs(*lengths), make_settings(kind, k_len=lengths[1])
        with torch.compiler.set_stance(stance):
            actual = run_with_gradients(compiled, qkv, settings, return_lse)
        assert_same(actual, run_with_gradients(attention_loss, qkv, settings, return_lse))


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_fake_tensors_pass_through(impl):
    with FakeTensorMode():
        q, k = (torch.empty(2, 4, 5, 32, dtype=torch.half), torch.empty(2, 2, 7, 32, dtype=torch.half))
        span = torch.empty(2, 2, dtype=torch.int32)
        o = segment_attention(q, k, k, pad_span=span, window_size=3, impl=impl)
    assert o.shape == (2, 4, 5, 32)
    assert o.dtype == torch.half


def test_no_graph_without_gradients():
    q, k, v = make_inputs()
    with torch.no_grad():
        assert not any(x.requires_grad for x in segment_attention(q, k, v, return_lse=True))


def test_gradient_of_one_input_only():
    qkv = make_inputs()
    all_grads = torch.autograd.grad(attention_loss(*qkv, {}, True)[0], qkv)
    for wanted in range(3):
        inputs = [x.detach() for x in qkv]
        inputs[wanted].requires_grad_()
        (grad,) = torch.autograd.grad(attention_loss(*inputs, {}, True)[0], inputs[wanted])
        torch.testing.assert_close(grad, all_grads[wanted])


@pytest.mark.parametrize("return_lse", [True, False], ids=["reference", "sdpa"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.usefixtures("fresh_compiler")
def test_autocast_changes_nothing(compiled, return_lse):
    qkv, settings = make_inputs(dtype=torch.float32), make_settings("everything", dtype=torch.float32)
    expected = run_with_gradients(attention_loss, qkv, settings, return_lse)
    function = torch.compile(attention_loss, fullgraph=True, backend="aot_eager") if compiled else attention_loss
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_with_gradients(function, qkv, settings, return_lse)
    assert_same(actual, expected)


def test_second_derivatives_of_the_operator_are_refused():
    q, k, v = make_inputs()
    loss = attention_loss(q, k, v, {}, True)[0]
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(NotImplementedError, match="segment_attention can be differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap-of-grad", "grad-of-vmap"])
def test_derivatives_by_torch_func_are_refused_but_for_sdpa(transform):
    q, k, v = (torch.randn(3, 1, 2, 5, 32) for _ in range(3))

    def total(q, k, v, impl):
        return segment_attention(q, k, v, impl=impl).sum()

    def run(impl):
        one = functools.partial(total, impl=impl)
        if transform == "grad":
            return torch.func.grad(one)(q[0], k[0], v[0])
        if transform == "vmap-of-grad":
            return torch.vmap(torch.func.grad(one))(q, k, v)
        return torch.func.grad(lambda *args: torch.vmap(one)(*args).sum())(q, k, v)

    with pytest.raises(NotImplementedError, match=r'torch\.func: use impl="sdpa" or backward'):
        run("reference")
    found = run("sdpa")
    q.requires_grad_()
    of_all = segment_attention(*(x.flatten(0, 1) for x in (q, k, v)), impl="reference").sum()
    (expected,) = torch.autograd.grad(of_all, q)
    torch.testing.assert_close(found, expected[0] if transform == "grad" else expected)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_torch_func_may_differentiate_what_is_around(impl):
    x, w = torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32)
    expected = segment_attention(x, x, x, impl=impl)

    def product(w, x):
        return (w * segment_attention(x, x, x, impl=impl)).sum()

    torch.testing.assert_close(torch.func.grad(product)(w, x), expected)
    stacked = torch.vmap(torch.func.grad(product), in_dims=(0, None))(torch.stack([w, w]), x)
    torch.testing.assert_close(stacked, torch.stack([expected, expected]))


def test_what_has_no_values_is_not_checked():
    q = torch.randn(1, 2, 5, 32, device="meta")
    with checking():
        assert segment_attention(q, q, q).is_meta
        with FakeTensorMode():
            assert segment_attention(*(torch.randn(1, 2, 5, 32) for _ in range(3)), impl="reference").shape == q.shape
