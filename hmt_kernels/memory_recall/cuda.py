"""memory_recall in CUDA C++ (csrc/cuda): forward, backward and the recurrent step; two launches if rows are split."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from hmt_kernels.cuda_launch import has_aligned_rows, pointer, stream, with_aligned_rows
from hmt_kernels.dispatch import compute_capability

try:
    from hmt_kernels import _C
except ImportError:
    _C = None  # type: ignore[assignment]

MAX_QUERIES = 16
MAX_DIM = 8192

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NO_ROWS = (0, 0, 0)


def missing() -> str | None:
    """Why this machine cannot run the CUDA kernels at all (None: it can)."""
    if _C is None:
        return "the native module hmt_kernels._C is not built"
    if not hasattr(_C, "memory_recall_cuda_fwd"):
        return "the native module was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None


def unavailable(query: torch.Tensor, memory: torch.Tensor) -> str | None:
    """Why the CUDA kernels cannot run these tensors (None: they can); looks at metadata only."""
    if query.device.type != "cuda":
        return f"it needs CUDA tensors, got {query.device.type}"
    if compute_capability(query.device) < (8, 0):
        return "it needs compute capability 8.0 or higher"
    if query.dtype not in _DTYPES:
        return f"it takes float32, float16 and bfloat16, got {query.dtype}"
    if query.shape[1] > MAX_QUERIES:
        return f"it takes at most {MAX_QUERIES} queries, got {query.shape[1]}"
    if query.shape[2] % 8 or query.shape[2] > MAX_DIM:
        return f"it takes a last dimension that is a multiple of 8 up to {MAX_DIM}, got {query.shape[2]}"
    return None


def forward(
    query: torch.Tensor, memory: torch.Tensor, num_valid: torch.Tensor | None, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """recalled [B, Q, D], lse [B, Q], slot [B, Q]; memory is read once for every four queries."""
    recalled = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse, slot = _forward(with_aligned_rows(query), with_aligned_rows(memory), num_valid, softmax_scale, _rows(recalled))
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
    """d_query, d_memory; memory is read once for every two queries."""
    d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    d_memory = torch.empty(memory.shape, dtype=memory.dtype, device=memory.device)
    if query.numel() == 0:
        return d_query, d_memory.zero_()
    query, memory = with_aligned_rows(query), with_aligned_rows(memory)
    recalled, d_recalled = with_aligned_rows(recalled), with_aligned_rows(d_recalled)
    counts = None if num_valid is None else num_valid.contiguous()
    d_lse = None if d_lse is None else d_lse.to(torch.float32).contiguous()
    lse = lse.contiguous()
    launch = _prepare(query, memory, softmax_scale, backward=True)
    d_memory_sum = d_memory
    if launch.groups > 1 and memory.dtype != torch.float32:
        d_memory_sum = torch.empty(memory.shape, dtype=torch.float32, device=memory.device)
    with torch.cuda.device_of(query):
        _C.memory_recall_cuda_bwd(
            **launch.arguments, query=_rows(query), memory=_rows(memory), num_valid=pointer(counts),
            recalled=_rows(recalled), d_recalled=_rows(d_recalled), lse=pointer(lse), d_lse=pointer(d_lse),
            d_query=_rows(d_query), d_memory=_rows(d_memory), d_memory_sum=pointer(d_memory_sum),
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
    """memory[b, slot_index[b]] = new_memory[b], then recall into out[:, 0] and out[:, -1].

    query [B, 1, D], memory [B, N, D] (changed in place), new_memory [B, D], slot_index [B] int32 on the device (outside
    [0, N) nothing is written), out [B, T, D], the next augmented segment; num_valid counts the new memory too. Returns
    recalled [B, 1, D] (a view of out), lse and slot [B, 1]. Raises ValueError if rows of memory or out do not start at
    multiples of 16 bytes.
    """
    for name, tensor in (("memory", memory), ("out", out)):
        if not has_aligned_rows(tensor):
            raise ValueError(
                f"{name} must have contiguous rows at multiples of 16 bytes, got strides {tensor.stride()}"
            )
    new_memory = with_aligned_rows(new_memory.unsqueeze(1))
    slot_index = slot_index.contiguous()
    recalled = out[:, :1]
    lse, slot = _forward(
        with_aligned_rows(query), memory, num_valid, softmax_scale, _rows(recalled),
        recalled_copy=_rows(out[:, -1:]), new_memory=_rows(new_memory), slot_index=pointer(slot_index),
    )  # fmt: skip
    return recalled, lse, slot


def _forward(
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    recalled: tuple[int, int, int],
    recalled_copy: tuple[int, int, int] = _NO_ROWS,
    new_memory: tuple[int, int, int] = _NO_ROWS,
    slot_index: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    slot = torch.empty(query.shape[:2], dtype=torch.int32, device=query.device)
    if query.numel() == 0:
        return lse, slot
    counts = None if num_valid is None else num_valid.contiguous()
    launch = _prepare(query, memory, softmax_scale, backward=False)
    with torch.cuda.device_of(query):
        _C.memory_recall_cuda_fwd(
            **launch.arguments, query=_rows(query), memory=_rows(memory), num_valid=pointer(counts),
            recalled=recalled, recalled_copy=recalled_copy, lse=pointer(lse), slot=pointer(slot),
            new_memory=new_memory, slot_index=slot_index,
        )  # fmt: skip
    return lse, slot


class _Launch(NamedTuple):
    arguments: dict[str, Any]  # of either kernel
    workspace: torch.Tensor  # to be kept until the kernels are on their stream
    groups: int  # of queries


def _prepare(query: torch.Tensor, memory: torch.Tensor, softmax_scale: float, backward: bool) -> _Launch:
    shape = (query.shape[0], query.shape[1], memory.shape[1], query.shape[2])
    dtype, sm_count = _DTYPES[query.dtype], _sm_count(query.device)
    num_floats, groups = _C.memory_recall_cuda_plan(shape, dtype, sm_count, backward)
    workspace = torch.empty(num_floats, dtype=torch.float32, device=query.device)
    arguments = {
        "shape": shape, "dtype": dtype, "sm_count": sm_count, "workspace": workspace.data_ptr(),
        "softmax_scale": softmax_scale, "stream": stream(query.device),
    }  # fmt: skip
    return _Launch(arguments, workspace, groups)


@functools.cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)
