"""The public face of memory_recall: contract, checks, dispatch, and the registration with PyTorch."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch

from hmt_kernels.autocast import without_autocast
from hmt_kernels.checks import LARGEST, check_memory_recall, check_memory_recall_step
from hmt_kernels.dispatch import Decision, chosen, implementation, remember, remembered, selected
from hmt_kernels.dispatch import decide as decide_implementation
from hmt_kernels.eager import is_watched, refuse_transforms
from hmt_kernels.finite import check_finite, is_checking

OPS = torch.ops.hmt_kernels


class RecallOutput(NamedTuple):
    recalled: torch.Tensor  # [B, Q, D], query's dtype
    lse: torch.Tensor  # [B, Q], float32 (float64 for float64)
    slot: torch.Tensor  # [B, Q], int32


def memory_recall(
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None = None,
    *,
    softmax_scale: float,
    impl: str | None = None,
) -> RecallOutput:
    """recalled = softmax(softmax_scale * query memory^T) memory, over the first num_valid[b] slots of each queue.

    The memory recall of the Hierarchical Memory Transformer (arXiv 2405.06067, section 3) after absorption: with
    query = Wk^T Wq s the raw memories serve as keys and as values, and are read once. Slots may stand in any order.

    Args:
        query: [B, Q, D], float16, bfloat16, float32 or float64; D a multiple of 8, at most 8192.
        memory: [B, N, D], query's dtype; N at most 65536. Slots >= num_valid[b] are never read into a result
            (they may hold NaN) and get zero gradient.
        num_valid: [B] int32, or None for all N. Its values are not read on the host: below 0 counts as 0, above N as N.
        softmax_scale: the factor of the scores, a number within float32.
        impl: "reference", "triton", "cuda" or "cpu"; None for the default (see `hmt_kernels.explain`).

    Returns:
        RecallOutput: recalled [B, Q, D] in query's dtype; lse [B, Q], the log-sum-exp of the scaled scores, float32
        (float64 for float64); slot [B, Q] int32, the slot with the largest score, the lowest index on ties. Without
        a live slot: zeros, -inf, -1. Sums are accumulated in float32. recalled and lse are differentiable (once,
        by backward and torch.autograd.grad, not by torch.func) with respect to query and memory. Any strides are
        accepted; the results are contiguous. torch.autocast changes nothing.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value, or an `impl` that cannot run here, with the reason.
        NotImplementedError: forward-mode derivatives.

    Example:
        >>> query, memory = torch.randn(2, 1, 64), torch.randn(2, 300, 64)
        >>> recalled, lse, slot = memory_recall(query, memory, softmax_scale=0.125)
        >>> recalled.shape, lse.shape, slot.shape
        (torch.Size([2, 1, 64]), torch.Size([2, 1]), torch.Size([2, 1]))
    """
    if is_checking():
        check_memory_recall(query, memory, num_valid, softmax_scale)
        _check_values(query, memory, num_valid)
    if query is not None and memory is not None and not is_watched(query, memory, num_valid):
        module = _implementation_of(query, memory, num_valid, softmax_scale, impl)
        return RecallOutput(*module.forward(query, memory, num_valid, softmax_scale))
    name = chosen(decide(query, memory, num_valid, softmax_scale=softmax_scale, impl=impl))
    refuse_transforms(query, memory)
    return RecallOutput(*OPS.memory_recall_fwd.default(query, memory, num_valid, softmax_scale, name))


def memory_recall_step(
    query: torch.Tensor,
    memory: torch.Tensor,
    new_memory: torch.Tensor,
    slot_index: torch.Tensor,
    num_valid: torch.Tensor | None = None,
    *,
    softmax_scale: float,
    out: torch.Tensor,
    impl: str | None = None,
) -> RecallOutput:
    """memory[b, slot_index[b]] = new_memory[b], then out[:, 0] = out[:, -1] = memory_recall(query, memory).recalled.

    What one segment of the Hierarchical Memory Transformer (arXiv 2405.06067, section 3) needs between two passes, in
    one call: the queue takes the last segment's memory, and the next augmented segment gets its two prompt slots.

    Args:
        query: [B, 1, D], as in `memory_recall`.
        memory: [B, N, D], query's dtype; written in place.
        new_memory: [B, D], query's dtype.
        slot_index: [B] int32 on query's device; its values are not read on the host. Outside 0 .. N - 1 nothing is
            written.
        num_valid: [B] int32, or None for all N; counted after the write.
        softmax_scale: the factor of the scores, a number within float32.
        out: [B, T, D], query's dtype, T >= 1; only its first and last position are written.
        impl: as in `memory_recall`.

    Returns:
        RecallOutput: recalled is the view out[:, :1]; lse and slot as in `memory_recall`. There are no gradients.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value; rows of memory or out that overlap or are not contiguous (or, on
            CUDA, do not start at multiples of 16 bytes); a tensor that requires gradients while they are recorded.

    Example:
        >>> query, memory, out = torch.randn(2, 1, 64), torch.randn(2, 300, 64), torch.empty(2, 546, 64)
        >>> slot_index = torch.full((2,), 7, dtype=torch.int32)
        >>> recalled, lse, slot = memory_recall_step(
        ...     query, memory, torch.randn(2, 64), slot_index, softmax_scale=0.125, out=out
        ... )
    """
    check_memory_recall_step(query, memory, new_memory, slot_index, num_valid, softmax_scale, out)
    if is_checking():
        _check_values(query, memory, num_valid, slot_index)
        check_finite("new_memory", new_memory)
    name = chosen(decide_implementation("memory_recall", impl, (query, memory)))
    refuse_transforms(query, memory, new_memory)
    arguments = (query, memory, new_memory, slot_index, num_valid, softmax_scale, out, name)
    step = OPS.memory_recall_step.default if is_watched(*arguments[:5], out) else _step
    lse, slot = step(*arguments)
    return RecallOutput(out[:, :1], lse, slot)


def decide(
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None = None,
    *,
    softmax_scale: float,
    impl: str | None = None,
) -> Decision:
    """Check the arguments of memory_recall and pick its implementation."""
    check_memory_recall(query, memory, num_valid, softmax_scale)
    return decide_implementation("memory_recall", impl, (query, memory))


def _check_values(
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None,
    replaced: torch.Tensor | None = None,
) -> None:
    """Raise a ValueError for NaN or infinity in query or in a live slot of memory other than `replaced` [B]."""
    check_finite("query", query)
    slots = torch.arange(memory.shape[1], device=memory.device)
    live = torch.ones_like(slots, dtype=torch.bool)[None] if num_valid is None else slots < num_valid[:, None]
    if replaced is not None:
        live = live & (slots != replaced[:, None])
    check_finite("memory", memory, live[:, :, None])


def _implementation_of(
    query: torch.Tensor, memory: torch.Tensor, num_valid: torch.Tensor | None, softmax_scale: float, impl: str | None
) -> ModuleType:
    """The module that `decide` picks, remembered by all that decide looks at: it takes as long as a short kernel."""
    counts = None if num_valid is None else (num_valid.shape, num_valid.dtype, num_valid.device)
    key = (
        "memory_recall", query.shape, query.dtype, query.device, memory.shape, memory.dtype, memory.device, counts,
        impl, selected(),
    )  # fmt: skip
    name = remembered(key) if type(softmax_scale) is float and abs(softmax_scale) <= LARGEST else None
    if name is None:
        name = chosen(decide(query, memory, num_valid, softmax_scale=softmax_scale, impl=impl))
        remember(key, name)
    return implementation("memory_recall", name)


torch.library.define(
    "hmt_kernels::memory_recall_fwd",
    "(Tensor query, Tensor memory, Tensor? num_valid, float softmax_scale, str impl) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "hmt_kernels::memory_recall_bwd",
    "(Tensor d_recalled, Tensor? d_lse, Tensor query, Tensor memory, Tensor? num_valid, Tensor recalled, Tensor lse,"
    " float softmax_scale, str impl) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "hmt_kernels::memory_recall_step",
    "(Tensor query, Tensor(a!) memory, Tensor new_memory, Tensor slot_index, Tensor? num_valid, float softmax_scale,"
    " Tensor(b!) out, str impl) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# One kernel for all devices: the impl string, chosen before, decides what runs.
def _fwd(
    query: torch.Tensor, memory: torch.Tensor, num_valid: torch.Tensor | None, softmax_scale: float, impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    forward = implementation("memory_recall", impl).forward
    with without_autocast(query.device):
        return forward(query, memory, num_valid, softmax_scale)


def _bwd(
    d_recalled: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None,
    recalled: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    backward = implementation("memory_recall", impl).backward
    with without_autocast(query.device):
        return backward(d_recalled, d_lse, query, memory, num_valid, recalled, lse, softmax_scale)


def _step(
    query: torch.Tensor,
    memory: torch.Tensor,
    new_memory: torch.Tensor,
    slot_index: torch.Tensor,
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    out: torch.Tensor,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    step = implementation("memory_recall", impl).step
    with without_autocast(query.device):
        _, lse, slot = step(query, memory, new_memory, slot_index, num_valid, softmax_scale, out)
    # a kernel writes past PyTorch: whoever has saved one of these for a backward pass must hear of it
    torch.autograd.graph.increment_version([x for x in (memory, out) if not x.is_inference()])
    return lse, slot


for _name, _function in (("fwd", _fwd), ("bwd", _bwd), ("step", _step)):
    torch.library.impl(f"hmt_kernels::memory_recall_{_name}", "CompositeExplicitAutograd", _function)


# Every implementation returns what the fakes do: contiguous tensors of these shapes and dtypes.
@torch.library.register_fake("hmt_kernels::memory_recall_fwd")
def _fwd_fake(
    query: torch.Tensor, memory: torch.Tensor, num_valid: torch.Tensor | None, softmax_scale: float, impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    rows = query.shape[:2]
    return (
        query.new_empty(query.shape),
        query.new_empty(rows, dtype=lse_dtype),
        query.new_empty(rows, dtype=torch.int32),
    )


@torch.library.register_fake("hmt_kernels::memory_recall_bwd")
def _bwd_fake(
    d_recalled: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None,
    recalled: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), memory.new_empty(memory.shape)


@torch.library.register_fake("hmt_kernels::memory_recall_step")
def _step_fake(
    query: torch.Tensor,
    memory: torch.Tensor,
    new_memory: torch.Tensor,
    slot_index: torch.Tensor,
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    out: torch.Tensor,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fwd_fake(query, memory, num_valid, softmax_scale, impl)[1:]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, memory, num_valid, ctx.softmax_scale, ctx.impl = inputs
    recalled, lse, slot = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(slot)
    ctx.save_for_backward(query, memory, num_valid, recalled, lse)


def _autograd(
    ctx: Any, d_recalled: torch.Tensor | None, d_lse: torch.Tensor | None, d_slot: None
) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
    query, memory, num_valid, recalled, lse = ctx.saved_tensors
    if d_recalled is None:
        if d_lse is None:
            return None, None, None, None, None
        d_recalled = torch.zeros_like(recalled)
    d_query, d_memory = OPS.memory_recall_bwd.default(
        d_recalled, d_lse, query, memory, num_valid, recalled, lse, ctx.softmax_scale, ctx.impl
    )
    return d_query, d_memory, None, None, None


torch.library.register_autograd("hmt_kernels::memory_recall_fwd", _autograd, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *grads: torch.Tensor | None) -> None:
    raise NotImplementedError("memory_recall can be differentiated once: its gradients have no gradient")


torch.library.register_autograd("hmt_kernels::memory_recall_bwd", _no_second_derivative)
