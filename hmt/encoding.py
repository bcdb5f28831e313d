"""Tokens of a text, however long: it is encoded in pieces, and the tokens are those of the whole text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PIECE = 2**18  # characters; a tokenizer takes some hundred bytes for each token of a piece
CONTEXT = 2**11  # characters on either side of a cut that must leave the tokens beside it as they are


def encode_file(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_special_tokens: bool = True,
    max_tokens: int | None = None,
) -> Tensor:
    """The first `max_tokens` token ids [1, T] of a UTF-8 text file, of which no more is read than that takes.

    Special tokens (a text's beginning, say) are as the tokenizer would have them.

    Raises:
        ValueError: no such file, not UTF-8, or no token in it; `max_tokens` below 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be an integer >= 1 or None, got {max_tokens!r}")
    path = Path(path)
    if not path.exists() or path.is_dir():  # a pipe is fine
        raise ValueError(f"FILE must be a text file, but there is no file {str(path)!r}")
    try:
        with path.open(encoding="utf-8-sig") as file:
            ids = _joined(iter(partial(file.read, PIECE), ""), tokenizer, add_special_tokens, max_tokens)
    except UnicodeDecodeError as error:
        raise ValueError(f"FILE must be UTF-8 text, {str(path)!r} is not: {error.reason}") from error
    if len(ids) == 0:
        raise ValueError(f"FILE must hold text, {str(path)!r} has no token")
    return ids[None]


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True) -> Tensor:
    """Token ids [T] of a text."""
    if len(text) <= PIECE:
        ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.long)
    pieces = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
    return _joined(pieces, tokenizer, add_special_tokens)


def encode_turn(question: str, tokenizer: PreTrainedTokenizerBase, *, follows: bool = False) -> Tensor:
    """Token ids [1, T] of what a chat's user says, up to where the model's answer begins.

    Where it `follows` a text, it does not begin one.

    Raises:
        ValueError: a tokenizer without a chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer must have a chat template for a chat, got none: it is not a chat model's")
    turn = [{"role": "user", "content": question}]
    text = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    if follows:
        text = text.removeprefix(tokenizer.bos_token or "")
    return encode_text(text, tokenizer, add_special_tokens=False)[None]


def _joined(
    pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase, special: bool, max_tokens: int | None = None
) -> Tensor:
    """The first `max_tokens` token ids [T] of what `pieces` make up; no later pieces are asked for."""
    pieces = iter(pieces)
    beginning = next(pieces, "")
    first, last = _special_tokens(beginning[:1000], tokenizer) if special else ([], [])
    parts, total = [torch.tensor(first, dtype=torch.long)], len(first)
    for ids in encode_pieces(chain([beginning], pieces), tokenizer):
        parts.append(ids)
        total += len(ids)
        if max_tokens is not None and total >= max_tokens:
            break
    return torch.cat([*parts, torch.tensor(last, dtype=torch.long)])[:max_tokens]


def encode_pieces(
    pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase, context: int = CONTEXT
) -> Iterator[Tensor]:
    """Token ids [T] of the text that `pieces` make up, without special tokens, some at a time.

    The text is cut where white space begins or ends, before a token that stays as it is, with all that follow, when
    only `context` characters before it are known. Where there is no such token, or the tokenizer does not say where
    its tokens stand, pieces are joined.
    """
    text, done = "", 0  # the tokens from text[done] on are yet to be given
    enough = 4 * context
    for piece in pieces:
        text += piece
        if not tokenizer.is_fast or len(text) < enough:
            continue
        ids, starts = _encode(text, tokenizer)
        late, too_late = (bisect_left(starts, len(text) - n * context) for n in (2, 1))
        cut = next((i for i in range(late, too_late) if _ends_a_word(text, starts[i])), None)
        if cut is None or _tokens_from(context, text[starts[cut] - context :], tokenizer) != ids[cut:]:
            enough = 2 * len(text)
            continue
        yield torch.tensor(ids[bisect_left(starts, done) : cut])
        text, done, enough = text[starts[cut] - context :], context, 4 * context
    ids = _tokens_from(done, text, tokenizer) if done else _ids(text, tokenizer)
    yield torch.tensor(ids, dtype=torch.long)


def _ends_a_word(text: str, position: int) -> bool:
    """Whether what a tokenizer joins, words and runs of white space, ends before a character."""
    return text[position - 1].isspace() != text[position].isspace()


def _tokens_from(start: int, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of the tokens of a text, those that begin at a character or after it."""
    ids, starts = _encode(text, tokenizer)
    return ids[bisect_left(starts, start) :]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and the characters that they begin at, in order."""
    # a book is longer than any tokenizer's model_max_length, and need not be shorter here
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return found.input_ids, [start for start, _ in found.offset_mapping]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text and behind it."""
    bare = _ids(text, tokenizer)
    ids = tokenizer(text, verbose=False).input_ids
    start = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
    if ids[start : start + len(bare)] != bare or (text and not bare and ids):
        raise ValueError(f"the tokenizer must put its special tokens around a text, got {ids} for a text of {bare}")
    return ids[:start], ids[start + len(bare) :]
