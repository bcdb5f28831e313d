"""Token ids with an optional padding mask, cut and joined together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Token ids [B, T] and, when some of them are padding, a boolean mask [B, T] that is false there.

    span [B, 2] int32 is the same as the mask, where it is known that no row hides more than one run of tokens.
    """

    ids: Tensor
    mask: Tensor | None = None
    span: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, attention_mask: Tensor | None) -> Tokens:
        """Tokens with transformers' attention_mask (0: padding); one that hides nothing is dropped."""
        if attention_mask is None or bool(attention_mask.all()):
            return cls(ids)
        return cls(ids, attention_mask.bool())

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def slice(self, start: int, stop: int) -> Tokens:
        """Tokens start to stop, as a view."""
        return Tokens(self.ids[:, start:stop], None if self.mask is None else self.mask[:, start:stop])

    def to(self, device: torch.device | str | None) -> Tokens:
        """The same tokens on another device."""
        return Tokens(*(None if x is None else x.to(device) for x in self))  # type: ignore[arg-type]

    def clone(self) -> Tokens:
        """The same tokens in memory of their own."""
        return Tokens(*(None if x is None else x.clone() for x in self))  # type: ignore[arg-type]

    def last(self, count: int) -> Tokens:
        """The last `count` tokens, or all when there are fewer."""
        return self.slice(max(0, self.length - count), self.length)

    def visible(self) -> Tensor:
        """The mask, made up when nothing is padding."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask


def _concatenate(parts: Sequence[Tokens], dim: int) -> Tokens:
    ids = torch.cat([p.ids for p in parts], dim=dim)
    if all(p.mask is None for p in parts):
        return Tokens(ids)
    span = None
    if dim == 0 and all(p.mask is None or p.span is not None for p in parts):
        span = torch.cat([_no_span(p.ids) if p.span is None else p.span for p in parts])
    elif dim == 1 and all(p.mask is None for p in parts[1:]):
        span = parts[0].span
    return Tokens(ids, torch.cat([p.visible() for p in parts], dim=dim), span)


def _no_span(ids: Tensor) -> Tensor:
    return torch.zeros(len(ids), 2, dtype=torch.int32, device=ids.device)


def join(*parts: Tokens) -> Tokens:
    """Texts one after the other, row by row."""
    return _concatenate(parts, dim=1)


def stack_rows(parts: Sequence[Tokens]) -> Tokens:
    """Texts of equal length as more rows of one batch."""
    return _concatenate(parts, dim=0)


def split(text: Tokens, length: int) -> list[Tokens]:
    """Segments of `length` tokens, the last maybe shorter, as `find_spans` gives them."""
    return find_spans([text.slice(start, start + length) for start in range(0, text.length, length)])


def find_spans(texts: Sequence[Tokens]) -> list[Tokens]:
    """The same texts without masks that hide nothing, and with the span of masks that hide one run per row.

    The host looks once, whatever their number.
    """
    masks = [t.mask for t in texts if t.mask is not None]
    if not masks:
        return list(texts)
    runs = [hidden_run(mask) for mask in masks]
    seen = torch.stack([torch.stack([mask.all(), single]) for mask, (_, single) in zip(masks, runs, strict=True)])
    found = iter([(span, *flags) for (span, _), flags in zip(runs, seen.tolist(), strict=True)])
    return [t if t.mask is None else _with_span(t, *next(found)) for t in texts]


def _with_span(text: Tokens, span: Tensor, clean: bool, single: bool) -> Tokens:
    return Tokens(text.ids) if clean else Tokens(text.ids, text.mask, span if single else None)


def hidden_run(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Half-open range [B, 2] int32 from the first to the last hidden position of a boolean mask [B, T], and a flag.

    The flag, a boolean scalar tensor, says whether the range hides in every row just what the mask hides.
    """
    hidden = ~mask
    count = hidden.sum(dim=1)
    start = torch.where(count > 0, hidden.int().argmax(dim=1), 0)
    stop = torch.where(count > 0, mask.shape[1] - hidden.flip(1).int().argmax(dim=1), 0)
    return torch.stack([start, stop], dim=1).to(torch.int32), (stop - start == count).all()
