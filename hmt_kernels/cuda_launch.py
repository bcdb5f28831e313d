"""What CUDA C++ kernels are handed: addresses, the current stream, and rows that 16-byte loads can read."""

from __future__ import annotations

import torch


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def has_aligned_rows(tensor: torch.Tensor) -> bool:
    """Whether rows, along the last dimension, are contiguous and start at multiples of 16 bytes."""
    vector = 16 // tensor.element_size()
    steps = (stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1)
    return tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and all(step % vector == 0 for step in steps)


def with_aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it `has_aligned_rows`, else a copy that has."""
    return tensor if has_aligned_rows(tensor) else tensor.clone(memory_format=torch.contiguous_format)
