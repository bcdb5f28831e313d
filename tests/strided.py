"""Tensors under any strides: permuted, stepped, padded, expanded, overlapping; all that they do not address is NaN."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st


class Layout(NamedTuple):
    """How a tensor lies in its storage."""

    strides: tuple[int, ...]
    offset: int


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], shares: bool = True) -> Layout:
    """Strides for a shape: dimensions nested in any order, each dense, stepped, padded or (if `shares`) overlapping."""
    strides, room = [0] * len(shape), 1
    kinds = ("dense", "dense", "dense", "step", "pad", *(("expand", "overlap") if shares else ()))
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else reversed(range(len(shape)))
    for dim in order:
        kind = draw(st.sampled_from(kinds))
        pad = draw(st.integers(1, 9)) if kind == "pad" else 0
        strides[dim] = {"dense": room, "step": 2 * room, "pad": room + pad, "expand": 0, "overlap": 1}[kind]
        room = max(room, strides[dim] * max(shape[dim], 1))
    return Layout(tuple(strides), draw(st.sampled_from((0, 1, 8))))


def empty(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this shape and layout in a storage of NaN."""
    last = sum((size - 1) * stride for size, stride in zip(shape, layout.strides, strict=True)) if 0 not in shape else 0
    storage = torch.full((layout.offset + last + 10,), float("nan"), dtype=dtype)
    return storage.as_strided(shape, layout.strides, layout.offset)


def fill(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Write values [n] (n at least the number of elements) in order; where elements share memory, any of them."""
    storage_of(tensor)[places(tensor).flatten()] = values.flatten()[: tensor.numel()].to(tensor.dtype)
    return tensor


def storage_of(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of a tensor's storage, addressed or not."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((size,), (1,), 0)


def places(tensor: torch.Tensor) -> torch.Tensor:
    """Where in its storage every element of a tensor lies."""
    return torch.arange(len(storage_of(tensor))).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN in the same places."""
    return torch.equal(a.nan_to_num(1e4), b.nan_to_num(1e4)) and torch.equal(a.isnan(), b.isnan())
