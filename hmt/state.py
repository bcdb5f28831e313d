"""The recurrent state: everything a model remembers of the text it has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hmt.tokens import Tokens, stack_rows


@dataclass(eq=False, repr=False)
class HMTState:
    """State after reading a text of any length, for B rows that share their segment borders.

    Attributes:
        queue: memory embeddings in a ring buffer [B, N, d]; segment n sits in slot n % N. None for the baseline.
        num_closed: segments read to their end.
        recent: last tokens of the latest closed segment, for sensory memory and the summary of the previous segment.
        open: tokens of the segment that is not full yet.
        cache: keys and values of the open segment while text is being generated; rebuilt when absent.
    """

    queue: Tensor | None
    num_closed: int
    recent: Tokens
    open: Tokens
    cache: Cache | None = None

    def __repr__(self) -> str:
        """Its size and position instead of pages of numbers."""
        memories = (
            "none" if self.queue is None else f"{list(self.queue.shape)} {self.queue.dtype} on {self.queue.device}"
        )
        return (
            f"HMTState(batch_size={self.batch_size}, num_closed={self.num_closed}, num_open={self.num_open}, "
            f"queue={memories}{', cached' if self.cache is not None else ''})"
        )

    @property
    def num_open(self) -> int:
        """Tokens in the open segment."""
        return self.open.length

    @property
    def num_valid(self) -> int:
        """Memories in the queue."""
        return 0 if self.queue is None else min(self.num_closed, self.queue.shape[1])

    @property
    def batch_size(self) -> int:
        return self.open.ids.shape[0]

    def valid(self) -> Tensor:
        """The written slots of the queue [B, num_valid, d], in ring order."""
        return self._queue()[:, : self.num_valid]

    def memories(self) -> Tensor:
        """The queue's memories [B, num_valid, d], oldest first."""
        queue = self._queue()
        if self.num_closed <= queue.shape[1]:
            return queue[:, : self.num_closed]
        return queue.roll(-(self.num_closed % queue.shape[1]), dims=1)

    def age_of(self, slot: Tensor) -> Tensor:
        """How many segments ago the memory in `slot` was written: 1 is the previous segment."""
        return (self.num_closed - 1 - slot) % self._queue().shape[1] + 1

    def _queue(self) -> Tensor:
        if self.queue is None:
            raise ValueError("this state has no memories: it comes from a model of mode 'baseline'")
        return self.queue

    def detach(self) -> HMTState:
        """The same state without its history of gradients, and with no cached keys and values."""
        return replace(self, queue=None if self.queue is None else self.queue.detach(), cache=None)

    def out_of_inference(self) -> HMTState:
        """The same state; outside of inference mode without tensors made in it, which no backward pass could keep."""
        if torch.compiler.is_compiling():  # which cannot ask
            return self
        tensors = (self.queue, self.recent.ids, self.open.ids)
        if torch.is_inference_mode_enabled() or not any(x is not None and x.is_inference() for x in tensors):
            return self
        queue = None if self.queue is None else self.queue.clone()
        return replace(self, queue=queue, recent=self.recent.clone(), open=self.open.clone())

    def without_cache(self) -> HMTState:
        """The same state with no cached keys and values."""
        return replace(self, cache=None)

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> HMTState:
        """The same state on another device, or with memories of another dtype; its cache is rebuilt on use."""
        if isinstance(device, torch.dtype):  # a dtype alone, as Tensor.to takes it
            if dtype is not None:
                raise TypeError(f"device must come before dtype, got {device} and {dtype}")
            device, dtype = None, device
        queue = None if self.queue is None else self.queue.to(device=device, dtype=dtype)
        return HMTState(queue, self.num_closed, self.recent.to(device), self.open.to(device))

    def save(self, path: str | Path) -> None:
        """Write the state to a file, to be continued later or elsewhere; see `hmt.state_file`."""
        from hmt.state_file import save_state

        save_state(self, path)

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> HMTState:
        """Read a state from a file.

        Raises:
            ValueError: a file that is damaged, of another kind or of a later version, with the reason.
        """
        from hmt.state_file import load_state

        return load_state(path, device)

    @staticmethod
    def stack(states: Sequence[HMTState]) -> HMTState:
        """The rows of several states as one batch; they must stand at the same position of their texts.

        Raises:
            ValueError: no state, or states that differ in position, queue or kind: pass those to a model as a list.
        """
        if not states:
            raise ValueError("states must hold at least one HMTState, got none")
        kinds = [s._kind() for s in states]
        if len(set(kinds)) > 1:
            other = next(kind for kind in kinds if kind != kinds[0])
            raise ValueError(
                f"states must agree in position and queue to share a batch, got {dict(kinds[0])} and {dict(other)}: "
                "states at different positions can be passed to a model as a list"
            )
        queue = None if states[0].queue is None else torch.cat([s._queue() for s in states])
        recent, opened = (stack_rows([getattr(s, name) for s in states]) for name in ("recent", "open"))
        return HMTState(queue, states[0].num_closed, recent, opened)

    def split(self) -> list[HMTState]:
        """Each row as a state of its own; caches are rebuilt on use."""
        return [self.select_rows(torch.tensor([row])) for row in range(self.batch_size)]

    def _kind(self) -> tuple[tuple[str, object], ...]:
        """What states must have in common to be rows of one batch."""
        queue = None if self.queue is None else (tuple(self.queue.shape[1:]), self.queue.dtype, self.queue.device)
        return (
            ("num_closed", self.num_closed),
            ("num_open", self.num_open),
            ("recent", self.recent.length),
            ("queue", queue),
        )

    def select_rows(self, rows: Tensor) -> HMTState:
        """A new state whose row i is row rows[i] of this one (repeats allowed); its cache is rebuilt on use.

        Raises:
            TypeError: `rows` is not a one-dimensional integer tensor.
        """
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise TypeError(f"rows must be a one-dimensional integer tensor, got {rows!r}")
        queue = None if self.queue is None else self.queue.index_select(0, rows.to(self.queue.device))
        return HMTState(queue, self.num_closed, _select(self.recent, rows), _select(self.open, rows))

    def reorder_cache(self, rows: Tensor) -> None:
        """Row selection in place, cache included, as beam search of transformers asks for it."""
        selected = self.select_rows(rows)
        self.queue, self.recent, self.open = selected.queue, selected.recent, selected.open
        if self.cache is not None:
            self.cache.reorder_cache(rows)


def _select(tokens: Tokens, rows: Tensor) -> Tokens:
    rows = rows.to(tokens.ids.device)
    return Tokens(tokens.ids[rows], None if tokens.mask is None else tokens.mask[rows])


def empty_state(batch_size: int, queue_size: int, width: int, *, dtype: torch.dtype, device: torch.device) -> HMTState:
    """The state before any text: a queue of `queue_size` zeros (0: no queue), nothing recent, nothing open."""
    nothing = Tokens(torch.zeros(batch_size, 0, dtype=torch.long, device=device))
    queue = torch.zeros(batch_size, queue_size, width, dtype=dtype, device=device) if queue_size else None
    return HMTState(queue, 0, nothing, nothing)


def push_memory(state: HMTState, memory: Tensor) -> Tensor:
    """The queue with memory [B, d] in its next ring slot; written in place unless gradients may be recorded."""
    queue = state._queue()
    slot = state.num_closed % queue.shape[1]
    if torch.is_grad_enabled():
        return queue.select_scatter(memory.to(queue.dtype), dim=1, index=slot)
    queue[:, slot] = memory
    return queue
