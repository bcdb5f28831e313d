"""Argument checks of the operators: metadata only (types, dtypes, shapes, devices), so that nothing waits for a GPU."""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_RECALL_DIM = 8192
MAX_RECALL_SLOTS = 65536

LARGEST = torch.finfo(torch.float32).max  # of a softmax_scale: kernels take it as a float32


def check_memory_recall(
    query: torch.Tensor, memory: torch.Tensor, num_valid: torch.Tensor | None, softmax_scale: float
) -> None:
    """Raise TypeError (types, dtypes) or ValueError (shapes, devices, values) unless the operator can take these."""
    check_float_tensor("query", query, 3, "[B, Q, D]")
    check_float_tensor("memory", memory, 3, "[B, N, D]")
    check_same("memory", memory, "query", query)
    batch, _, dim = query.shape
    slots = memory.shape[1]
    if memory.shape[0] != batch:
        raise ValueError(f"memory must have query's batch size {batch}, got shape {shape_of(memory)}")
    if memory.shape[2] != dim:
        raise ValueError(f"memory must have query's last dimension {dim}, got shape {shape_of(memory)}")
    if dim % 8 != 0 or not 8 <= dim <= MAX_RECALL_DIM:
        raise ValueError(f"query's last dimension must be a multiple of 8 from 8 to {MAX_RECALL_DIM}, got {dim}")
    if slots > MAX_RECALL_SLOTS:
        raise ValueError(f"memory must have at most {MAX_RECALL_SLOTS} slots, got {slots}")
    if num_valid is not None:
        check_int32_tensor("num_valid", num_valid, (batch,), "[B]", query.device)
    check_softmax_scale(softmax_scale)


def check_memory_recall_step(
    query: torch.Tensor,
    memory: torch.Tensor,
    new_memory: torch.Tensor,
    slot_index: torch.Tensor,
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    out: torch.Tensor,
) -> None:
    """Raise TypeError (types, dtypes) or ValueError (shapes, devices, values) unless the operator can take these."""
    check_memory_recall(query, memory, num_valid, softmax_scale)
    batch, num_queries, dim = query.shape
    if num_queries != 1:
        raise ValueError(f"query must have shape [B, 1, D], got {shape_of(query)}")
    check_float_tensor("new_memory", new_memory, 2, "[B, D]")
    check_same("new_memory", new_memory, "query", query)
    if new_memory.shape != (batch, dim):
        raise ValueError(f"new_memory must have shape [B, D] = [{batch}, {dim}], got {shape_of(new_memory)}")
    if slot_index is None:
        raise TypeError("slot_index must be an int32 tensor [B], got None")
    check_int32_tensor("slot_index", slot_index, (batch,), "[B]", query.device)
    check_float_tensor("out", out, 3, "[B, T, D]")
    check_same("out", out, "query", query)
    if out.shape[0] != batch or out.shape[1] == 0 or out.shape[2] != dim:
        raise ValueError(f"out must have shape [B, T, D] = [{batch}, at least 1, {dim}], got {shape_of(out)}")
    for name, tensor in (("memory", memory), ("out", out)):
        check_own_rows(name, tensor)
    inputs = {"query": query, "memory": memory, "new_memory": new_memory, "out": out}
    for name, tensor in inputs.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"memory_recall_step has no gradients, but {name} requires one: use memory_recall")


def check_own_rows(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the rows of a [B, rows, D] tensor are contiguous and share no element."""
    strides, extent = tensor.stride(), tensor.shape[2]
    own = strides[2] == 1
    for stride, size in sorted((strides[i], tensor.shape[i]) for i in (0, 1) if tensor.shape[i] > 1):
        own = own and stride >= extent
        extent += (size - 1) * stride
    if not own:
        raise ValueError(f"{name} must have contiguous rows of its own, got strides {list(strides)}")


def check_segment_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pad_span: torch.Tensor | None,
    window_size: int | None,
    softmax_scale: float | None,
) -> None:
    """Raise TypeError (types, dtypes) or ValueError (shapes, devices, values) unless the operator can take these."""
    check_float_tensor("q", q, 4, "[B, Hq, Tq, D]")
    check_float_tensor("k", k, 4, "[B, Hkv, Tk, D]")
    check_float_tensor("v", v, 4, "[B, Hkv, Tk, D]")
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    batch, q_heads, q_len, dim = q.shape
    _, kv_heads, k_len, _ = k.shape
    if k.shape[0] != batch:
        raise ValueError(f"k must have q's batch size {batch}, got shape {shape_of(k)}")
    if k.shape[3] != dim or dim == 0:
        raise ValueError(f"k must have q's head dimension {dim}, at least 1, got shape {shape_of(k)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {shape_of(k)}, got {shape_of(v)}")
    if q_heads == 0 or kv_heads == 0 or q_heads % kv_heads != 0:
        raise ValueError(
            f"q's number of heads must be a multiple of k's, both at least 1, got {q_heads} and {kv_heads}"
        )
    if q_len > k_len:
        raise ValueError(f"q must not be longer than k, got Tq = {q_len} and Tk = {k_len}")
    if cos is not None or sin is not None:
        check_rotary(cos, sin, q, k_len)
    if pad_span is not None:
        check_int32_tensor("pad_span", pad_span, (batch, 2), "[B, 2]", q.device)
    if window_size is not None:
        if isinstance(window_size, bool) or not isinstance(window_size, (int, torch.SymInt)):
            raise TypeError(f"window_size must be an int or None, got {type(window_size).__name__}")
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
    if softmax_scale is not None:
        check_softmax_scale(softmax_scale)


def check_rotary(cos: torch.Tensor | None, sin: torch.Tensor | None, q: torch.Tensor, k_len: int) -> None:
    """Raise unless cos and sin are two [1 or B, Tk, R] tables with R even and at most D."""
    if cos is None or sin is None:
        raise ValueError(f"cos and sin must be given together, got no {'cos' if cos is None else 'sin'}")
    check_float_tensor("cos", cos, 3, "[1 or B, Tk, R]")
    check_float_tensor("sin", sin, 3, "[1 or B, Tk, R]")
    if cos.dtype != sin.dtype:
        raise TypeError(f"sin must have cos's dtype {cos.dtype}, got {sin.dtype}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {table.device}")
    batch, _, _, dim = q.shape
    if cos.shape[0] not in (1, batch) or cos.shape[1] != k_len:
        raise ValueError(f"cos must have shape [1 or {batch}, {k_len}, R], got {shape_of(cos)}")
    if cos.shape[2] % 2 != 0 or not 2 <= cos.shape[2] <= dim:
        raise ValueError(f"cos's last dimension must be even and from 2 to D = {dim}, got {cos.shape[2]}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {shape_of(cos)}, got {shape_of(sin)}")


def check_float_tensor(name: str, tensor: torch.Tensor, rank: int, layout: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have shape {layout}, got {shape_of(tensor)}")


def check_same(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {tensor.device}")


def check_int32_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], layout: str, device: torch.device
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be an int32 tensor {layout} or None, got {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {layout} = {list(shape)}, got {shape_of(tensor)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on device {device}, got {tensor.device}")


def check_softmax_scale(softmax_scale: float) -> None:
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (float, int, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"softmax_scale must be a number, got {type(softmax_scale).__name__}")
    # A comparison, which is false for NaN too: math.isfinite does not take the symbolic floats of torch.compile.
    if not -LARGEST <= softmax_scale <= LARGEST:
        raise ValueError(f"softmax_scale must be finite in float32, got {softmax_scale}")


def shape_of(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
