"""Texts and questions from files or a hub, as token documents, cut into examples of whole segments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hmt.loss import IGNORE_INDEX

HUB = "hub:"
TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".ndjson")
QA_FIELDS = ("context", "question", "answer")


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


def read_records(source: str | Path, *, split: str = "train", text_field: str = "text") -> Iterator[dict[str, str]]:
    """The records of a text file, a jsonl file, a folder of both, or a hub data set "hub:NAME" or "hub:NAME:CONFIG".

    A text file is one record. A line of jsonl or row of a data set holds `text_field`, or context, question, answer.

    Args:
        split: of a hub data set, which is streamed, never downloaded whole.

    Raises:
        ValueError: no such file, no text in it, or a record without these fields, naming file and line.
        ImportError: a hub data set without the package `datasets`.
    """
    if str(source).startswith(HUB):
        rows: Iterable[tuple[str, Mapping[str, Any]]] = _hub_rows(str(source).removeprefix(HUB), split)
    else:
        rows = _file_rows(Path(source), text_field)
    for place, row in rows:
        yield _record(row, text_field, place)


def _record(row: Mapping[str, Any], text_field: str, place: str) -> dict[str, str]:
    fields = QA_FIELDS if all(name in row for name in QA_FIELDS) else (text_field,)
    if not all(isinstance(row.get(name), str) for name in fields):
        raise ValueError(
            f"{place} must hold the string {text_field!r}, or the strings {', '.join(QA_FIELDS)}; "
            f"it has {', '.join(map(str, row)) or 'nothing'}"
        )
    return {"text" if name == text_field else name: row[name] for name in fields}


def _file_rows(path: Path, text_field: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES + RECORD_SUFFIXES and p.is_file())
        if not files:
            raise ValueError(f"{str(path)!r} must hold files *{', *'.join(TEXT_SUFFIXES + RECORD_SUFFIXES)}, got none")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"data must be a file, a folder or hub:NAME, but there is nothing at {str(path)!r}")
    for file in files:
        try:
            if file.suffix in RECORD_SUFFIXES:
                yield from _jsonl_rows(file)
            else:
                yield str(file), {text_field: file.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(file)!r} must be UTF-8 text: {error}") from error


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{str(file)!r}, line {number},"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place} must be a JSON object: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place} must be a JSON object, got {type(row).__name__}")
            yield place, row


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{HUB}{name} needs the package `datasets`: pip install datasets") from error
    name, _, config = name.partition(":")
    for number, row in enumerate(load_dataset(name, config or None, split=split, streaming=True)):
        yield f"{HUB}{name}, row {number},", row


def encode(record: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> Document:
    """A record of `read_records` as tokens; the answer to a question ends with the tokenizer's end of text, if any."""

    def ids(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    if "text" in record:
        return Document(torch.tensor(ids(record["text"], special=True), dtype=torch.long))
    prompt = ids(f"{record['context']}\n\nQuestion: {record['question']}\nAnswer:", special=True)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Document(torch.tensor(prompt + ids(" " + record["answer"]) + end, dtype=torch.long), len(prompt))


def load_documents(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    text_field: str = "text",
    limit: int | None = None,
) -> list[Document]:
    """The first `limit` records of `read_records` (None: all) as tokens; texts of fewer than two tokens are left out.

    Raises:
        ValueError, ImportError: as `read_records`; no document that could be learnt from.
    """
    records = islice(read_records(source, split=split, text_field=text_field), limit)
    documents = [d for d in (encode(record, tokenizer) for record in records) if len(d.ids) > 1]
    if not documents:
        raise ValueError(f"{str(source)!r} must hold a text of at least two tokens, got none")
    return documents


def join_documents(documents: Sequence[Document], separator: int | None = None) -> Document:
    """All texts as one, with the token `separator` between them: examples then reach across documents.

    Raises:
        ValueError: questions, whose answers belong to their own context.
    """
    if any(d.answer_start is not None for d in documents):
        raise ValueError("documents must be plain texts to be joined, got questions with answers")
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
    """
    found = []
    for number, document in enumerate(documents):
        total = len(document.ids)
        if document.answer_start is not None:
            found.append((number, 0, total))
        else:
            found += [(number, start, min(start + length, total)) for start in range(0, total - 1, length)]
    return found


def window_example(documents: Sequence[Document], window: tuple[int, int, int], length: int) -> dict[str, Tensor]:
    """The example of a window; a question about too long a context loses the middle of that context.

    Raises:
        ValueError: an answer that does not fit into `length`.
    """
    number, start, stop = window
    document = documents[number]
    if stop - start <= length:
        return document.example(start, stop)
    answer = stop - (document.answer_start or 0)
    if answer >= length:
        raise ValueError(
            f"the answer of document {number} must be shorter than an example of {length} tokens, got {answer} tokens"
        )
    end = answer + (length - answer) // 2
    ids = torch.cat([document.ids[: length - end], document.ids[-end:]])
    return Document(ids, length - answer).example()


def pad_batch(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Examples of different lengths as one batch: padded on the right with token 0, mask 0 and label -100."""

    def padded(name: str, value: int) -> Tensor:
        rows = [example[name] for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORE_INDEX)}
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    if bool((lengths < lengths.max()).any()):
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch
