"""memory_recall in C++ (csrc/cpu): one pass over the memory, in AVX-512, AVX2 or portable code chosen at run time."""

from __future__ import annotations

import torch

try:
    from hmt_kernels import _C
except ImportError:
    _C = None  # type: ignore[assignment]

MAX_QUERIES = 64  # kMaxQueries in csrc/cpu/recall.h

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def missing() -> str | None:
    """Why this machine cannot run the C++ kernels at all (None: it can)."""
    if _C is None:
        return "the native module hmt_kernels._C is not built"
    if not hasattr(_C, "cpu_isa"):
        return "the native module hmt_kernels._C is of another version"
    try:
        _C.cpu_isa()
    except ValueError as error:  # from HMT_KERNELS_CPU_ISA
        return str(error)
    return None


def unavailable(query: torch.Tensor, memory: torch.Tensor) -> str | None:
    """Why the C++ kernels cannot run these tensors (None: they can); looks at metadata only."""
    if query.device.type != "cpu":
        return f"it needs CPU tensors, got {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"it takes float32, float16 and bfloat16, got {query.dtype}"
    if query.shape[1] > MAX_QUERIES:
        return f"it takes at most {MAX_QUERIES} queries, got {query.shape[1]}"
    return None


def forward(
    query: torch.Tensor, memory: torch.Tensor, num_valid: torch.Tensor | None, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """recalled [B, Q, D], lse [B, Q], slot [B, Q]."""
    batch, queries, dim = query.shape
    query, query_rows = _rows(query)
    memory, memory_rows = _rows(memory)
    counts = _contiguous(num_valid)
    # sizes one by one: PyTorch takes half a microsecond longer to read a tuple
    recalled = query.new_empty(batch, queries, dim)
    lse = query.new_empty(batch, queries, dtype=torch.float32)
    slot = query.new_empty(batch, queries, dtype=torch.int32)
    _C.memory_recall_cpu_fwd(
        (batch, queries, memory.shape[1], dim), _DTYPES[query.dtype], softmax_scale, query_rows, memory_rows,
        _pointer(counts), recalled.data_ptr(), lse.data_ptr(), slot.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return recalled, lse, slot


def backward(
    d_recalled: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None,
    recalled: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d_query [B, Q, D] and d_memory [B, N, D], in one pass over the memory."""
    batch, queries, dim = query.shape
    d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    d_memory = torch.empty_like(memory, memory_format=torch.contiguous_format)
    (query, query_rows), (memory, memory_rows), (d_recalled, d_rows) = map(_rows, (query, memory, d_recalled))
    recalled, lse = recalled.contiguous(), lse.contiguous()
    counts, d_lse = _contiguous(num_valid), _contiguous(d_lse)
    _C.memory_recall_cpu_bwd(
        (batch, queries, memory.shape[1], dim), _DTYPES[query.dtype], softmax_scale, query_rows, memory_rows,
        _pointer(counts), recalled.data_ptr(), lse.data_ptr(), d_rows, _pointer(d_lse), d_query.data_ptr(),
        d_memory.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return d_query, d_memory


def step(
    query: torch.Tensor,
    memory: torch.Tensor,
    new_memory: torch.Tensor,
    slot_index: torch.Tensor,
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """memory[b, slot_index[b]] = new_memory[b], then recall into out[:, 0] and out[:, -1]."""
    for queue, new, slot in zip(memory, new_memory, slot_index.tolist(), strict=True):
        if 0 <= slot < memory.shape[1]:
            queue[slot] = new
    recalled, lse, slot = forward(query, memory, num_valid, softmax_scale)
    out[:, :1] = recalled
    out[:, -1:] = recalled
    return out[:, :1], lse, slot


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _rows(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """A [B, rows, D] tensor with contiguous rows, to be kept, and for the native module its address and strides."""
    batch_stride, row_stride, step = tensor.stride()
    if step != 1:
        tensor = tensor.contiguous()
        batch_stride, row_stride, _ = tensor.stride()
    return tensor, (tensor.data_ptr(), batch_stride, row_stride)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
