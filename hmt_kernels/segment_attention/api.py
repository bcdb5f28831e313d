"""The public face of segment_attention: contract, checks, dispatch, and the registration with PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from hmt_kernels.autocast import without_autocast
from hmt_kernels.checks import LARGEST, check_segment_attention
from hmt_kernels.dispatch import Decision, chosen, implementation, remember, remembered, selected
from hmt_kernels.dispatch import decide as decide_implementation
from hmt_kernels.eager import PLAIN, refuse_transforms
from hmt_kernels.finite import check_finite, is_checking
from hmt_kernels.segment_attention import sdpa

_NO_LSE = {"sdpa": "F.scaled_dot_product_attention does not return softmax_lse, and return_lse=True asks for it"}


def segment_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    pad_span: torch.Tensor | None = None,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o = softmax(softmax_scale * rot(q) rot(k)^T + mask) v, causal, over the augmented sequence of one segment.

    The attention of the backbone inside the Hierarchical Memory Transformer (arXiv 2405.06067): row i of q stands at
    key position p = Tk - Tq + i and sees the keys <= p, > p - window_size, and outside the hole of its batch row.

    Args:
        q: [B, Hq, Tq, D], float16, bfloat16, float32 or float64; Tq <= Tk, Tq = 1 is decoding.
        k, v: [B, Hkv, Tk, D], q's dtype; Hq a multiple of Hkv (grouped heads). "reference" and "sdpa" take any D,
            "triton" multiples of 8 up to 256, "cuda" 64, 80, 96 and 128.
        cos, sin: [1 or B, Tk, R], R even and at most D, any float dtype: rotary embedding of the first R features of q
            and k, by key position. Half-split convention: feature r turns with feature r + R/2, and the second half of
            the tables repeats the first. They get no gradient.
        pad_span: [B, 2] int32, a half-open range of keys hidden from every query of that batch row; start >= end hides
            none. Its values are not read on the host. Hidden keys and values must be finite, and so must be what they
            are rotated to and their scores.
        window_size: number of keys a row sees, its own included; None for all.
        softmax_scale: the factor of the scores, 1 / sqrt(D) by default.
        return_lse: also return softmax_lse, the log-sum-exp of each row's scaled scores; it is differentiable.
        impl: "reference", "sdpa", "triton" or "cuda"; None for the default (see `hmt_kernels.explain`).

    Returns:
        o [B, Hq, Tq, D] in q's dtype, or (o, softmax_lse [B, Hq, Tq] float32, float64 for float64). A row that sees no
        key gives o = 0, softmax_lse = -inf and zero gradients. Any strides are accepted; o is laid out in memory as q
        is (from "sdpa": as PyTorch chooses). o and softmax_lse are differentiable with respect to q, k, v, once, by
        backward and torch.autograd.grad (o from "sdpa": as often as PyTorch allows, and by torch.func).
        torch.autocast changes nothing.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, or an `impl` that cannot run here, with the reason.
        NotImplementedError: derivatives in forward mode or by torch.func, and second ones, but from "sdpa".

    Example:
        >>> q, k, v = torch.randn(2, 9, 64, 64), torch.randn(2, 3, 100, 64), torch.randn(2, 3, 100, 64)
        >>> segment_attention(q, k, v, window_size=32).shape
        torch.Size([2, 9, 64, 64])
    """
    if is_checking():
        check_segment_attention(q, k, v, cos, sin, pad_span, window_size, softmax_scale)
        for argument, tensor in (("q", q), ("k", k), ("v", v), ("cos", cos), ("sin", sin)):
            check_finite(argument, tensor)
    key = _key(q, k, v, cos, sin, pad_span, window_size, softmax_scale, return_lse, impl)
    name = None if key is None else remembered(key)
    if name is None:
        decision = decide(
            q, k, v, cos=cos, sin=sin, pad_span=pad_span, window_size=window_size, softmax_scale=softmax_scale,
            return_lse=return_lse, impl=impl,
        )  # fmt: skip
        name = chosen(decision)
        if key is not None:
            remember(key, name)
    if softmax_scale is None:
        softmax_scale = q.shape[3] ** -0.5
    if name == "sdpa":
        with without_autocast(q.device):
            return sdpa.attend(q, k, v, cos, sin, pad_span, window_size, softmax_scale)
    refuse_transforms(q, k, v, cos, sin, other='impl="sdpa" or ')
    o, softmax_lse = torch.ops.hmt_kernels.segment_attention_fwd(
        q, k, v, cos, sin, pad_span, window_size, softmax_scale, name
    )
    return (o, softmax_lse) if return_lse else o


def _key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pad_span: torch.Tensor | None,
    window_size: int | None,
    softmax_scale: float | None,
    return_lse: bool,
    impl: str | None,
) -> tuple[Any, ...] | None:
    """All that `decide` looks at, where every value is one that any call may have; None for the rest.

    The checks and the choice take longer than SDPA on a short segment, and a model repeats the same call in each layer.
    """
    if torch.compiler.is_compiling():
        return None
    if window_size is not None and (type(window_size) is not int or window_size < 1):
        return None
    if softmax_scale is not None and (type(softmax_scale) is not float or not abs(softmax_scale) <= LARGEST):
        return None
    kinds: list[Any] = ["segment_attention", window_size, return_lse, impl, selected()]
    for tensor in (q, k, v, cos, sin, pad_span):
        if tensor is None:
            kinds.append(None)
        elif type(tensor) in PLAIN:
            kinds += tensor.shape, tensor.dtype, tensor.device
        else:
            return None
    return tuple(kinds)


def decide(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    pad_span: torch.Tensor | None = None,
    window_size: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Decision:
    """Check the arguments of segment_attention and pick its implementation."""
    check_segment_attention(q, k, v, cos, sin, pad_span, window_size, softmax_scale)
    tensors = (q, k, v, cos, sin, pad_span, window_size)
    return decide_implementation("segment_attention", impl, tensors, _NO_LSE if return_lse else None)


torch.library.define(
    "hmt_kernels::segment_attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? pad_span, SymInt? window_size,"
    " float softmax_scale, str impl) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "hmt_kernels::segment_attention_bwd",
    "(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? pad_span, Tensor o,"
    " Tensor softmax_lse, SymInt? window_size, float softmax_scale, str impl) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# One kernel for all devices: the impl string, chosen before, decides what runs.
@torch.library.impl("hmt_kernels::segment_attention_fwd", "CompositeExplicitAutograd")
def _fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pad_span: torch.Tensor | None,
    window_size: int | None,
    softmax_scale: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    forward = implementation("segment_attention", impl).forward
    with without_autocast(q.device):
        return forward(q, k, v, cos, sin, pad_span, window_size, softmax_scale)


@torch.library.impl("hmt_kernels::segment_attention_bwd", "CompositeExplicitAutograd")
def _bwd(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pad_span: torch.Tensor | None,
    o: torch.Tensor,
    softmax_lse: torch.Tensor,
    window_size: int | None,
    softmax_scale: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backward = implementation("segment_attention", impl).backward
    with without_autocast(q.device):
        return backward(do, dlse, q, k, v, cos, sin, pad_span, o, softmax_lse, window_size, softmax_scale)


# Every implementation lays out its results as the fakes do: o, dq, dk, dv like q, q, k, v, softmax_lse contiguous.
@torch.library.register_fake("hmt_kernels::segment_attention_fwd")
def _fwd_fake(q: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.register_fake("hmt_kernels::segment_attention_bwd")
def _bwd_fake(
    do: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cos, sin, pad_span, ctx.window_size, ctx.softmax_scale, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, cos, sin, pad_span, *output)


def _autograd(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    q, k, v, cos, sin, pad_span, o, softmax_lse = ctx.saved_tensors
    no_gradient = (None,) * 6
    if do is None:
        if dlse is None:
            return None, None, None, *no_gradient
        do = torch.zeros_like(o)
    elif pad_span is not None:  # what comes to rows that see nothing may not be finite, and no gradient is theirs
        do = do.masked_fill((softmax_lse == -torch.inf).unsqueeze(-1), 0.0)
    dq, dk, dv = torch.ops.hmt_kernels.segment_attention_bwd(
        do, dlse, q, k, v, cos, sin, pad_span, o, softmax_lse, ctx.window_size, ctx.softmax_scale, ctx.impl
    )
    return dq, dk, dv, *no_gradient


torch.library.register_autograd("hmt_kernels::segment_attention_fwd", _autograd, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *grads: torch.Tensor | None) -> None:
    raise NotImplementedError("segment_attention can be differentiated once: its gradients have no gradient")


torch.library.register_autograd("hmt_kernels::segment_attention_bwd", _no_second_derivative)
