"""Who computes the attention of one segment in the benchmarks, registered in one place.

Tensors are laid out as a model's projections leave them, [B, T, H, D] in memory. In the workload "rotary" the others
rotate queries and keys before, with transformers' own function; with a hole they get a boolean mask.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks import providers
from benchmarks.providers import NotHere, needs_module, register
from benchmarks.sizes import DEVICE
from hmt_kernels import dispatch, segment_attention
from hmt_kernels.segment_attention.api import decide

OURS = providers.OURS["attention"]
DIRECT = "SDPA"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# compiling takes longer than all else together: FlexAttention for one shape, with a mask, the rotation for two, on CUDA
COMPILED_LENGTH, FLEX_DIM = 1058, 128
# beyond it those that hold all scores are too large, or too slow to wait for
MATH_LENGTH = {"cpu": 546, "cuda": 1058}


class Inputs(NamedTuple):
    q: Tensor  # [B, Hq, T, D], a leaf that requires gradients
    k: Tensor  # [B, Hkv, T, D]
    v: Tensor
    do: Tensor  # [B, Hq, T, D]
    cos: Tensor | None  # [1, T, D]
    sin: Tensor | None
    pad_span: Tensor | None  # [B, 2]
    mask: Tensor | None  # [B, 1, T, T], what pad_span says; every row sees itself


Attention = Callable[[Inputs], Tensor]


def make_inputs(
    kind: str, batch: int, heads: tuple[int, int], length: int, dim: int, dtype: torch.dtype, device: str
) -> Inputs:
    """Standard normal tensors for the workload "causal", "rotary" or "hole" (a quarter of the keys, near the front)."""
    generator = torch.Generator().manual_seed(0)

    def normal(num_heads: int) -> Tensor:
        x = torch.randn(batch, length, num_heads, dim, generator=generator).to(device=device, dtype=dtype)
        return x.transpose(1, 2)

    q, k, v, do = (normal(heads[i]) for i in (0, 1, 1, 0))
    cos = sin = pad_span = mask = None
    if kind == "rotary":
        turns = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        table = torch.cat((turns, turns), dim=-1)[None].to(device)
        cos, sin = table.cos().to(dtype), table.sin().to(dtype)
    if kind == "hole":
        start, stop = length // 8, length // 8 + length // 4
        pad_span = torch.tensor([[start, stop]] * batch, dtype=torch.int32, device=device)
        positions = torch.arange(length, device=device)
        hidden = (positions >= start) & (positions < stop)
        seen = (positions <= positions[:, None]) & (~hidden | (positions == positions[:, None]))
        mask = seen.expand(batch, 1, length, length)
    return Inputs(*(x.requires_grad_() for x in (q, k, v)), do, cos, sin, pad_span, mask)


def rows_to_compare(x: Inputs) -> Tensor:
    """[T] true where all agree on what a row sees: outside the hole. In a mask a hidden row sees itself too."""
    rows = torch.ones(x.q.shape[2], dtype=torch.bool, device=x.q.device)
    if x.pad_span is not None:
        start, stop = x.pad_span[0].tolist()
        rows[start:stop] = False
    return rows


def expected(x: Inputs, row: int, kv_head: int) -> tuple[Tensor, ...]:
    """o, dq [G, T, D] and dk, dv [1, T, D] in float64, of one batch row and the query heads of one key head.

    Rows inside a hole get no gradient from above: `rows_to_compare`.
    """
    groups = x.q.shape[1] // x.k.shape[1]
    of_q, of_k = slice(kv_head * groups, (kv_head + 1) * groups), slice(kv_head, kv_head + 1)
    q, k, v = (t[row, s].detach().double().requires_grad_() for t, s in ((x.q, of_q), (x.k, of_k), (x.v, of_k)))
    rotated = (q, k)
    if x.cos is not None and x.sin is not None:
        rotated = tuple(t[0] for t in apply_rotary_pos_emb(q[None], k[None], x.cos.double(), x.sin.double()))
    scores = rotated[0] @ rotated[1].mT * q.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril() if x.mask is None else x.mask[row, 0]
    o = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ v
    do = x.do[row, of_q].double() * rows_to_compare(x)[:, None]
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


def _ours(impl: str | None, x: Inputs) -> Attention:
    if impl == "reference":
        _holds_scores(x)
    if impl is not None:
        decision = decide(x.q, x.k, x.v, cos=x.cos, sin=x.sin, pad_span=x.pad_span)
        if decision.name == impl:
            raise NotHere("it is the default for these inputs")

    def run(x: Inputs) -> Tensor:
        return segment_attention(x.q, x.k, x.v, cos=x.cos, sin=x.sin, pad_span=x.pad_span, impl=impl)

    return run


def _holds_scores(x: Inputs) -> None:
    if x.q.shape[2] > MATH_LENGTH[DEVICE]:
        raise NotHere(f"it holds all scores: up to T = {MATH_LENGTH[DEVICE]}")


def _rotated(x: Inputs) -> tuple[Tensor, Tensor]:
    return (x.q, x.k) if x.cos is None else apply_rotary_pos_emb(x.q, x.k, x.cos, x.sin)


def _sdpa(x: Inputs) -> Tensor:
    q, k = _rotated(x)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, x.v, x.mask, is_causal=x.mask is None, enable_gqa=gqa)


def _sdpa_repeated(x: Inputs) -> Tensor:
    """For backends that do not share key heads."""
    q, k = _rotated(x)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, x.v))
    return F.scaled_dot_product_attention(q, k, v, x.mask, is_causal=x.mask is None)


def _liger(x: Inputs) -> Attention:
    """It rotates in place, here a copy: two more passes over q and k than in a model."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    if x.cos is None:
        raise NotHere("in the workload rotary only")

    def run(x: Inputs) -> Tensor:
        q, k = liger_rotary_pos_emb(x.q.clone(), x.k.clone(), x.cos, x.sin)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, x.v, is_causal=True, enable_gqa=gqa)

    return run


def _compiled_rotary(x: Inputs) -> Attention:
    """What torch.compile makes of transformers' rotation, in few kernels."""
    if x.cos is None or (len(x.q), x.q.shape[2]) != (1, COMPILED_LENGTH):
        raise NotHere(f"compiled for the workload rotary, B = 1, T = {COMPILED_LENGTH} only")
    rotate = torch.compile(apply_rotary_pos_emb, dynamic=False)

    def run(x: Inputs) -> Tensor:
        q, k = rotate(x.q, x.k, x.cos, x.sin)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, x.v, is_causal=True, enable_gqa=gqa)

    return run


def _backend(name: str, x: Inputs) -> Attention:
    if name == "math":
        _holds_scores(x)
    attend = _sdpa_repeated if name == "efficient" else _sdpa

    def run(x: Inputs) -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return attend(x)

    return run


def _flex(x: Inputs) -> Attention:
    batch, _, *size = x.q.shape
    if x.pad_span is None or (batch, *size) != (1, COMPILED_LENGTH, FLEX_DIM):
        raise NotHere(f"compiled for the workload hole, B = 1, T = {COMPILED_LENGTH}, D = {FLEX_DIM} only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    start, stop = x.pad_span[0].tolist()

    def visible(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        hidden = (k_index >= start) & (k_index < stop) & (k_index != q_index)
        return (k_index <= q_index) & ~hidden

    length = x.q.shape[2]
    blocks = create_block_mask(visible, None, None, length, length, device=x.q.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(x: Inputs) -> Tensor:
        return compiled(x.q, x.k, x.v, block_mask=blocks, enable_gqa=x.q.shape[1] != x.k.shape[1])

    return run


def _flash_attn(module: str, x: Inputs) -> Attention:
    if x.mask is not None:
        raise NotHere("it takes no mask")
    function = importlib.import_module(module).flash_attn_func

    def run(x: Inputs) -> Tensor:
        q, k = _rotated(x)
        out = function(*(t.transpose(1, 2) for t in (q, k, x.v)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def _missing_impl(impl: str) -> str | None:
    if impl == "triton" and DEVICE == "cpu":
        return "it would be interpreted on the CPU"
    return dispatch.missing("segment_attention", impl)


def _needs_cuda(*modules: str) -> Callable[[], str | None]:
    absent = needs_module(*modules)
    return lambda: absent() or (None if DEVICE == "cuda" else "it needs a GPU")


register("attention", OURS, partial(_ours, None))
for impl in dispatch.KNOWN["segment_attention"]:
    register("attention", f"{OURS}, {impl}", partial(_ours, impl), partial(_missing_impl, impl))
register("attention", DIRECT, lambda x: _sdpa)
for backend in BACKENDS:
    missing = _needs_cuda() if backend in ("efficient", "cuDNN") else lambda: None
    register("attention", f"{DIRECT}, {backend}", partial(_backend, backend), missing)
register("attention", f"{DIRECT}, Liger's rotary", _liger, _needs_cuda("liger_kernel"))
register("attention", f"{DIRECT}, compiled rotary", _compiled_rotary, _needs_cuda())
register(
    "attention",
    "FlexAttention",
    _flex,
    lambda: "compiling it for a CPU takes longer than this whole suite" if DEVICE == "cpu" else None,
)
for name, module in (("FlashAttention-2", "flash_attn"), ("FlashAttention-3", "flash_attn_interface")):
    register("attention", name, partial(_flash_attn, module), _needs_cuda(module))


def try_out(attend: Attention, x: Inputs) -> tuple[Tensor, ...]:
    """o, dq, dk, dv of one call with gradients. Raises NotHere with the reason where the provider refuses."""
    try:
        o = attend(x)
        return o.detach(), *torch.autograd.grad(o, (x.q, x.k, x.v), x.do * rows_to_compare(x)[:, None])
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise NotHere(str(error).strip().splitlines()[0][:160]) from error


class Corner(NamedTuple):
    """The exact results of one batch row and the query heads of one key head."""

    row: int
    of_q: slice
    of_k: slice
    exact: tuple[Tensor, ...]


def corners(x: Inputs) -> list[Corner]:
    """The first and last batch row with the first and last key head: all at once would take too much memory."""
    groups = x.q.shape[1] // x.k.shape[1]
    places = [(row, head) for row in {0, x.q.shape[0] - 1} for head in {0, x.k.shape[1] - 1}]
    return [
        Corner(row, slice(head * groups, (head + 1) * groups), slice(head, head + 1), expected(x, row, head))
        for row, head in places
    ]


def largest_error(results: tuple[Tensor, ...], x: Inputs, exact: list[Corner]) -> float:
    """Of o, dq, dk, dv in the corners, as a share of each one's largest element."""
    rows = rows_to_compare(x)
    errors = []
    for corner in exact:
        slices = (corner.of_q, corner.of_q, corner.of_k, corner.of_k)
        for i, (result, value, heads) in enumerate(zip(results, corner.exact, slices, strict=True)):
            difference = (result[corner.row, heads].double() - value).abs()
            if i < 2:  # o and dq
                difference, value = difference[:, rows], value[:, rows]
            errors.append((difference.max() / value.abs().max()).item())
    return max(errors)
