"""What the Triton kernels of all operators need: widths of tiles, strides, shared memory, the last block to finish."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}  # KiB per block, by arch


@functools.cache
def column_tiles(width: int, smallest: int) -> tuple[int, int]:
    """Two powers of two (or one, and 0) that hold `width` columns; at most a quarter of them stays empty."""
    first = max(smallest, 1 << (width.bit_length() - 1))
    if width <= first:
        return first, 0
    # The second is not below a quarter of the first, so that every thread gets 16 bytes of it.
    for second in (max(smallest, first // 4), max(smallest, first // 2)):
        if width <= first + second:
            return first, second
    return 2 * first, 0


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Those of all dimensions, 0 for one of size one: it may have any stride, which must not spoil the alignment."""
    return _used_strides(tensor.shape, tensor.stride())


# A model calls with the same few shapes again and again, and Python takes longer than a small launch.
@functools.lru_cache(4096)
def _used_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(step if size > 1 else 0 for size, step in zip(shape, strides, strict=True))


def stride(tensor: torch.Tensor, dim: int) -> int:
    return strides(tensor)[dim]


def has_aligned_rows(tensor: torch.Tensor) -> bool:
    """Whether the elements of a row are adjacent, and rows lie multiples of 8 elements apart."""
    return tensor.stride(-1) == 1 and all(step % 8 == 0 for step in strides(tensor)[:-1])


@triton.jit
def is_last(counter_ptr, total):
    """Whether this block is the last of `total` to arrive; it then sees what the others stored before they came."""
    # The atomic is issued by one thread: the barrier puts the stores of all threads before it.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter_ptr, 0)  # zero again for the next launch
    return last
