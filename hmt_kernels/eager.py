"""What PyTorch must see of a call: its dispatcher takes longer than a short kernel, so other calls go around it."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

PLAIN = (torch.Tensor, torch.nn.Parameter)


def refuse_transforms(*tensors: torch.Tensor | None, other: str = "") -> None:
    """Raise NotImplementedError for derivatives that a custom operator has no rule for.

    A forward-mode tangent it would drop silently, and torch.func.grad it would call a fault of its own; `other` is what
    one could use besides torch.autograd.
    """
    if torch.compiler.is_compiling():
        return
    transformed = torch._C._functorch.peek_interpreter_stack() is not None and torch.is_grad_enabled()
    if transformed and any(tensor is not None and _is_differentiated(tensor) for tensor in tensors):
        raise NotImplementedError(
            f"hmt_kernels has no derivatives by torch.func: use {other}backward or torch.autograd.grad"
        )
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "hmt_kernels has no forward-mode derivatives: use reverse mode (backward, torch.autograd.grad)"
        )


def _is_differentiated(tensor: torch.Tensor) -> bool:
    """Whether torch.func.grad wants the derivative with respect to a tensor, also one that vmap has wrapped."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad:
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def is_watched(*tensors: torch.Tensor | None) -> bool:
    """Whether derivatives, a tracer, a transform, a mode, autocast or a profiler must see the operator itself.

    Also true for anything that is not a plain tensor: the operator's checks then say what is wrong with it.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._is_any_autocast_enabled()
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return True
    gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        # the dispatcher resolves a negative bit, which a kernel would not see
        if type(tensor) not in PLAIN or (gradients and tensor.requires_grad) or tensor.is_neg():
            return True
    return False
