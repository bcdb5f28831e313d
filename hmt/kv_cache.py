"""Keys and values of the open segment: buffers for one augmented segment, written in place, at any context length."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from hmt.backbone import is_recurrent, takes_cache, unwrap


class SegmentLayer(DynamicLayer):
    """One layer's keys and values [B, heads, capacity, D], of which the first `length` positions are filled."""

    keys: Any  # None before the first update
    values: Any

    def __init__(self, capacity: int, keys: Tensor | None = None, values: Tensor | None = None, length: int = 0):
        super().__init__()
        self.capacity, self.length = capacity, length
        if keys is not None:
            self.keys, self.values, self.is_initialized = keys, values, True
            self.dtype, self.device = keys.dtype, keys.device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (*key_states.shape[:2], self.capacity)
        # zeros, because a hidden position of a shorter row is still multiplied by its weight of zero
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.filled(self.length, key_states, value_states)

    def filled(self, length: int, *like: Tensor) -> tuple[Tensor, Tensor]:
        """The first keys and values in the dtypes of new ones, which the buffers lack where autocast came or went."""
        keys, values = (x[:, :, :length].to(y.dtype) for x, y in zip((self.keys, self.values), like, strict=True))
        return keys, values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.length + int(query_length), 0

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class RowsLayer(SegmentLayer):
    """The same for rows that are filled to different lengths: one more position of each is written per update."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, width: int):
        super().__init__(keys.shape[2], keys, values, width - 1)
        self.positions = positions.to(keys.device)  # layers may be spread over several devices
        self.rows = torch.arange(len(positions), device=keys.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[self.rows, :, self.positions] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[self.rows, :, self.positions] = value_states[:, :, 0].to(self.values.dtype)
        return self.filled(self.length + 1, key_states, value_states)


class SegmentCache(Cache):
    """A cache of `SegmentLayer`s; as one row of a batch, `batch` holds the buffers of all rows and `row` its place."""

    def __init__(self, layers: list[Any], batch: list[SegmentLayer] | None = None, row: int = 0):
        super().__init__(layers=layers)
        self.batch, self.row = batch, row


class RecurrentCache(Cache):
    """States of a backbone with recurrent layers, which do not tell themselves how many positions they have seen."""

    length = 0
    whole = True  # False while a pass is under way: one that breaks off leaves some layers ahead of others

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.length


def new_cache(model: PreTrainedModel, capacity: int, padded: bool = False) -> Cache | None:
    """An empty cache for one segment of at most `capacity` positions, `padded` if it hides some of them.

    Layers that keep something else than the keys of all positions, and passes whose gradients are recorded, get the
    cache that transformers would choose. None where a backbone can have none.
    """
    if not takes_cache(model) or (padded and is_recurrent(model)):
        return None
    layers = DynamicCache(config=unwrap(model).config).layers
    if is_recurrent(model):
        return RecurrentCache(layers=layers)
    if torch.is_grad_enabled():
        return Cache(layers=layers)
    return SegmentCache([SegmentLayer(capacity) if _keeps_all(layer, capacity) else layer for layer in layers])


def _keeps_all(layer: Any, capacity: int) -> bool:
    window = getattr(layer, "sliding_window", None)
    windowed = type(layer) is DynamicSlidingWindowLayer and isinstance(window, int) and window >= capacity
    return type(layer) is DynamicLayer or windowed


def batches(cache: Any) -> bool:
    """Whether rows of this cache can be decoded together with rows of other lengths."""
    return isinstance(cache, SegmentCache) and all(isinstance(layer, SegmentLayer) for layer in cache.layers)


def can_go_on(cache: Cache) -> bool:
    """Whether another token can be written: there is room, no pass has broken off, and buffers may change in place.

    They may not where a backward pass needs them, nor outside of inference mode where they were made in it.
    """
    if isinstance(cache, SegmentCache):
        full = any(isinstance(layer, SegmentLayer) and layer.length >= layer.capacity for layer in cache.layers)
        if torch.is_grad_enabled() or full:
            return False
    elif isinstance(cache, RecurrentCache) and not cache.whole:
        return False
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return True
    return not any(map(_is_inference, vars(cache.layers[0]).values()))


_claimed: set[int] = set()  # not an attribute, which copies and pickles would take along
_claiming = threading.Lock()


@contextlib.contextmanager
def claimed(cache: Any) -> Iterator[bool]:
    """Whether inside this context a cache is this call's alone: no other thread may read what it writes meanwhile."""
    if torch.compiler.is_compiling():
        yield True
        return
    with _claiming:
        mine = id(cache) not in _claimed
        _claimed.add(id(cache))
    try:
        yield mine
    finally:
        if mine:
            with _claiming:
                _claimed.discard(id(cache))


def _is_inference(value: Any) -> bool:
    if isinstance(value, dict):  # of the states of a layer
        return any(map(_is_inference, value.values()))
    return isinstance(value, Tensor) and value.is_inference()


def copy_of(cache: Any) -> Any:
    """The same keys and values in buffers of their own."""
    if not batches(cache):
        return copy.deepcopy(cache)
    return SegmentCache([SegmentLayer(x.capacity, x.keys.clone(), x.values.clone(), x.length) for x in cache.layers])


def rows_of(cache: Cache, lengths: Sequence[int]) -> list[SegmentCache]:
    """Each row of a batch's cache as a cache of its own, filled to its own length; they share the batch's buffers."""
    layers: list[Any] = cache.layers
    return [
        SegmentCache(
            [SegmentLayer(x.capacity, x.keys[i : i + 1], x.values[i : i + 1], length) for x in layers], layers, i
        )
        for i, length in enumerate(lengths)
    ]


def together(caches: Sequence[SegmentCache]) -> tuple[Cache, list[SegmentCache]]:
    """One cache that decodes a token of every row, and the rows' own caches, which it writes to.

    Rows that lie one after the other in the buffers of one batch stay there; others are copied into new buffers.
    """
    first = caches[0]
    neighbours = all(c.batch is first.batch and c.row == first.row + i for i, c in enumerate(caches))
    if first.batch is None or not neighbours:
        joined: list[Any] = []
        for i, layer in enumerate(first.layers):
            keys, values = (torch.cat([getattr(c.layers[i], name) for c in caches]) for name in ("keys", "values"))
            joined.append(SegmentLayer(layer.capacity, keys, values))
        caches = rows_of(SegmentCache(joined), [c.get_seq_length() for c in caches])
        first = caches[0]
    lengths = [c.get_seq_length() for c in caches]
    rows = slice(first.row, first.row + len(caches))
    base = first.batch or []
    positions = torch.tensor(lengths, device=base[0].keys.device)
    layers = [RowsLayer(x.keys[rows], x.values[rows], positions, max(lengths) + 1) for x in base]
    return SegmentCache(layers), list(caches)


def grow(caches: Sequence[SegmentCache]) -> None:
    """Count the token that a cache of `together` has written into each of these rows."""
    for cache in caches:
        for layer in cache.layers:
            layer.length += 1
