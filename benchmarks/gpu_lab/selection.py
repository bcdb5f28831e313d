"""A short selection of launches for compute-sanitizer: every kernel family once or twice, small, on the device.

Compiling takes most of its time: float32 has one case of each operator.
"""

from __future__ import annotations

from typing import Any

import torch

from hmt_kernels import dispatch, memory_recall, memory_recall_step, segment_attention
from hmt_kernels.segment_attention.api import decide

# B, Q, N, D, num_valid: a split queue, two levels of the tree, several groups of queries
CASES = [(2, 1, 100, 576, [100, 7]), (1, 1, 420, 72, None), (1, 5, 50, 64, [49])]
# (B, Hq, Hkv, Tq, Tk, D), rotary features, hole, window: several blocks of rows and keys, ragged; decoding
ATTENTION_CASES = [
    ((2, 4, 2, 200, 200, 64), 64, (30, 131), None),
    ((1, 3, 1, 150, 200, 128), 32, None, 70),
    ((2, 8, 2, 1, 333, 64), 0, (0, 17), None),
]


def main() -> None:
    for impl in ("cuda", "triton"):
        reason = dispatch.missing("memory_recall", impl)
        print(f"memory_recall, {impl}: {reason or 'runs'}")
        for dtype in (torch.bfloat16, torch.float32):
            for case in cases_of(CASES, dtype, reason):
                recall_and_gradients(impl, dtype, *case)
        if reason is None:
            step(impl, torch.bfloat16)
        reason = dispatch.missing("segment_attention", impl)
        print(f"segment_attention, {impl}: {reason or 'runs'}")
        for dtype in (torch.bfloat16, torch.float32):
            for shape, *settings in cases_of(ATTENTION_CASES, dtype, reason):
                attention_and_gradients(impl, dtype, shape, *settings)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print("all launches are done")


def cases_of(cases: list[Any], dtype: torch.dtype, reason: str | None) -> list[Any]:
    if reason is not None:
        return []
    return cases if dtype == torch.bfloat16 else cases[:1]


def recall_and_gradients(
    impl: str, dtype: torch.dtype, batch: int, queries: int, slots: int, dim: int, num_valid: list[int] | None
) -> None:
    query = torch.randn(batch, queries, dim, device="cuda").to(dtype).requires_grad_()
    memory = torch.randn(batch, slots, dim, device="cuda").to(dtype).requires_grad_()
    counts = None if num_valid is None else torch.tensor(num_valid, dtype=torch.int32, device="cuda")
    out = memory_recall(query, memory, counts, softmax_scale=dim**-0.5, impl=impl)
    grads = torch.autograd.grad((out.recalled, out.lse), (query, memory), (out.recalled, out.lse))
    for result in (*out, *grads):
        if not result.isfinite().all():
            raise RuntimeError(f"{impl} gives a result that is not finite for {[batch, queries, slots, dim]}, {dtype}")


def attention_and_gradients(
    impl: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int, int],
    rotary_dim: int,
    hole: tuple[int, int] | None,
    window_size: int | None,
) -> None:
    batch, q_heads, kv_heads, q_len, k_len, dim = shape
    sizes = ((q_heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    q, k, v = (torch.randn(batch, *size, dim, device="cuda").to(dtype).requires_grad_() for size in sizes)
    angles = torch.rand(1, k_len, rotary_dim // 2, device="cuda").repeat(1, 1, 2)
    cos, sin = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotary_dim else (None, None)
    pad_span = None if hole is None else torch.tensor([hole] * batch, dtype=torch.int32, device="cuda")
    settings = {"cos": cos, "sin": sin, "pad_span": pad_span, "window_size": window_size, "impl": impl}
    decision = decide(q, k, v, **settings)
    if decision.name is None:
        print(f"  not for {list(shape)}, {dtype}: {decision.why}")
        return
    o, lse = segment_attention(q, k, v, **settings, return_lse=True)
    grads = torch.autograd.grad(o, (q, k, v), o)
    for result in (o, *grads):
        if not result.isfinite().all():
            raise RuntimeError(f"{impl} gives a result that is not finite for {list(shape)}, {dtype}")
    if lse.isnan().any():
        raise RuntimeError(f"{impl} gives an lse that is NaN for {list(shape)}, {dtype}")


def step(impl: str, dtype: torch.dtype) -> None:
    query, memory = (torch.randn(2, rows, 576, device="cuda").to(dtype) for rows in (1, 100))
    out = torch.zeros(2, 9, 576, dtype=dtype, device="cuda")
    slot_index = torch.tensor([5, 99], dtype=torch.int32, device="cuda")
    memory_recall_step(query, memory, query[:, 0], slot_index, softmax_scale=576**-0.5, out=out, impl=impl)


if __name__ == "__main__":
    main()
