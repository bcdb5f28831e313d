"""Token documents of texts and questions, cut into examples of whole segments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hmt.encoding import encode_text
from hmt.loss import IGNORE_INDEX
from hmt.recipes import MIXED, RECIPE, check_options, parse_recipe, whole_number
from hmt.records import read_records


class Document(NamedTuple):
    """Token ids [T] of one text. Of a question about a text only the answer, ids[answer_start:], is to be predicted."""

    ids: Tensor
    answer_start: int | None = None

    def example(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Tokens start to stop as what a model's forward takes; its first token is never predicted."""
        ids = self.ids[start:stop]
        labels = ids.clone()
        labels[: max(1, (self.answer_start or 0) - start)] = IGNORE_INDEX
        return {"input_ids": ids, "labels": labels}


def encode(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Document:
    """A record of `read_records` as tokens; the answer to a question (the first, if several are right) ends with the
    tokenizer's end of text, if any."""
    if "text" in record:
        return Document(encode_text(record["text"], tokenizer))
    prompt = encode_question(record, tokenizer)
    first = record["answer"] if isinstance(record["answer"], str) else record["answer"][0]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answer = torch.cat(
        [encode_text(" " + first, tokenizer, add_special_tokens=False), torch.tensor(end, dtype=torch.long)]
    )
    return Document(torch.cat([prompt, answer]), len(prompt))


def encode_question(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Context and question of a record as token ids [T], up to where the answer begins."""
    prompt = f"{record['context']}\n\nQuestion: {record['question']}\nAnswer:"
    return encode_text(prompt, tokenizer)


def read_documents(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, *, split: str = "train", text_field: str = "text"
) -> Iterator[Document]:
    """The records of `read_records` as tokens, one after the other; or texts mixed as the paper does.

    "recipe:interleaved:SOURCE" weaves the texts of SOURCE (any source of `read_records`) two by two, see `interleave`;
    "recipe:dilated:SOURCE" puts filler into them, see `dilate`. Both take a length: "recipe:dilated,length=500:x".

    Raises:
        ValueError, ImportError, OSError: as `read_records`; an option that there is not; questions to be mixed.
    """
    name, options, inner = parse_recipe(str(source)) if str(source).startswith(RECIPE) else ("", {}, "")
    if name not in MIXED:
        for record in read_records(source, split=split, text_field=text_field):
            yield encode(record, tokenizer)
        return
    if not inner:
        raise ValueError(f"{source!r} must name what is mixed, as in {RECIPE}{name}:FILE or {RECIPE}{name}:recipe:pg19")
    check_options(str(source), options, ("length",))
    numbers = {key: whole_number(str(source), key, value) for key, value in options.items()}
    texts = read_documents(inner, tokenizer, split=split, text_field=text_field)
    if name == "interleaved":
        yield from interleave(texts, **numbers)
    else:
        yield from dilate(texts, int(encode_text("$", tokenizer, add_special_tokens=False)[-1]), **numbers)


def interleave(documents: Iterable[Document], length: int = 100) -> Iterator[Document]:
    """Every two texts as one that changes between them every `length` tokens until both have ended.

    The topic switches of arXiv 2405.06067, whose code takes 100 tokens. A last text without partner stays as it is.

    Raises:
        ValueError: questions, whose answers belong to their own context.
    """
    documents = iter(documents)
    while pair := list(islice(documents, 2)):
        _check_texts(pair)
        pieces = [document.ids.split(length) for document in pair]
        common = min(len(p) for p in pieces)
        woven = [piece for pieces_at in zip(*pieces, strict=False) for piece in pieces_at]
        yield Document(torch.cat([*woven, *(piece for p in pieces for piece in p[common:])]))


def dilate(documents: Iterable[Document], filler: int, length: int = 888) -> Iterator[Document]:
    """Each text with `length` times the token `filler` after every `length` tokens, so that it is twice as far apart.

    As arXiv 2405.06067 thins texts out, whose code takes 888 of "$". The filler is predicted as well, which is easy:
    a perplexity compares only with others of the same dilation.

    Raises:
        ValueError: questions, whose answers belong to their own context.
    """
    between = torch.full((length,), filler)
    for document in documents:
        _check_texts([document])
        yield Document(torch.cat([part for piece in document.ids.split(length) for part in (piece, between)]))


def _check_texts(documents: Iterable[Document]) -> None:
    if any(d.answer_start is not None for d in documents):
        raise ValueError("documents must be plain texts to be joined or mixed, got questions with answers")


def load_documents(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    text_field: str = "text",
    limit: int | None = None,
) -> list[Document]:
    """The first `limit` documents of `read_documents` (None: all); texts of fewer than two tokens are left out.

    Raises:
        ValueError, ImportError, OSError: as `read_documents`; no document that could be learnt from.
    """
    found = islice(read_documents(source, tokenizer, split=split, text_field=text_field), limit)
    documents = [d for d in found if len(d.ids) > 1]
    if not documents:
        raise ValueError(f"{str(source)!r} must hold a text of at least two tokens, got none")
    return documents


def join_documents(documents: Sequence[Document], separator: int | None = None) -> Document:
    """All texts as one, with the token `separator` between them: examples then reach across documents.

    Raises:
        ValueError: questions, whose answers belong to their own context.
    """
    _check_texts(documents)
    between = [] if separator is None else [torch.tensor([separator])]
    parts = [part for d in documents for part in (*between, d.ids)]
    return Document(torch.cat(parts[len(between) :]))


def split_documents(documents: Sequence[Document], eval_fraction: float) -> tuple[list[Document], list[Document]]:
    """Documents to train on and to evaluate on: the last ones, or the end of the only one.

    Raises:
        ValueError: a fraction outside (0, 1), or one that leaves either side without anything to predict.
    """
    if not 0.0 < eval_fraction < 1.0:
        raise ValueError(f"eval_fraction must lie in (0, 1), got {eval_fraction!r}")
    if len(documents) > 1:
        held_back = min(len(documents) - 1, max(1, round(eval_fraction * len(documents))))
        return list(documents[:-held_back]), list(documents[-held_back:])
    (only,) = documents
    cut = len(only.ids) - round(eval_fraction * len(only.ids))
    if only.answer_start is not None or not 1 < cut < len(only.ids) - 1:
        raise ValueError(f"documents must hold more than one text of {len(only.ids)} tokens to split off an evaluation")
    return [Document(only.ids[:cut])], [Document(only.ids[cut:])]


def windows(documents: Sequence[Document], length: int) -> list[tuple[int, int, int]]:
    """(document, start, stop) of examples of at most `length` tokens, none of which spans two documents.

    The end of a text may be short, but never a single token. A question is one window, however long.

    Raises:
        ValueError: an answer that does not fit into `length`.
    """
    found = []
    for number, document in enumerate(documents):
        total = len(document.ids)
        if document.answer_start is not None:
            if (answer := total - document.answer_start) >= length:
                raise ValueError(
                    f"the answer of document {number} must be shorter than an example of {length} tokens, got {answer} "
                    "tokens"
                )
            found.append((number, 0, total))
        else:
            found += [(number, start, min(start + length, total)) for start in range(0, total - 1, length)]
    return found


def window_example(documents: Sequence[Document], window: tuple[int, int, int], length: int) -> dict[str, Tensor]:
    """The example of one of `windows`; a question about too long a context loses the middle of that context."""
    number, start, stop = window
    document = documents[number]
    if stop - start <= length:
        return document.example(start, stop)
    answer = stop - (document.answer_start or 0)
    end = answer + (length - answer) // 2
    ids = torch.cat([document.ids[: length - end], document.ids[-end:]])
    return Document(ids, length - answer).example()


def pad_batch(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Examples of different lengths as one batch: padded on the right with token 0, mask 0 and label -100."""

    def padded(name: str, value: int) -> Tensor:
        rows = [torch.as_tensor(example[name]) for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORE_INDEX)}
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    if bool((lengths < lengths.max()).any()):
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch
