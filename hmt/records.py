"""Texts and questions from files, from a hub or by a recipe, one record after the other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hmt.recipes import RECIPE, recipe_records

HUB = "hub:"
TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".ndjson")  # of a folder; a file *.json is data only where it is named itself
QA_FIELDS = ("context", "question", "answer")


def read_records(source: str | Path, *, split: str = "train", text_field: str = "text") -> Iterator[dict[str, Any]]:
    """The records of a file, a folder, a hub data set "hub:NAME" or "hub:NAME:CONFIG", or a recipe "recipe:NAME".

    A text file is one record. A line of jsonl, an object of a json file's array or a row of a data set holds
    `text_field`, or context, question, answer; an answer may be a list of all that are right. Recipes are those of
    `hmt.recipes`.

    Args:
        split: of a hub data set, which is streamed, never downloaded whole.

    Raises:
        ValueError: no such file, no text in it, or a record without these fields, naming file and line.
        ImportError: a hub data set or recipe without the package `datasets`.
    """
    if str(source).startswith(RECIPE):
        for _, record in recipe_records(str(source), split):
            yield record
        return
    if str(source).startswith(HUB):
        rows: Iterable[tuple[str, Mapping[str, Any]]] = _hub_rows(str(source).removeprefix(HUB), split)
    else:
        rows = _file_rows(Path(source), text_field)
    for place, row in rows:
        yield _record(row, text_field, place)


def _record(row: Mapping[str, Any], text_field: str, place: str) -> dict[str, Any]:
    fields = QA_FIELDS if all(name in row for name in QA_FIELDS) else (text_field,)
    strings = [name for name in fields if isinstance(row.get(name), str)]
    answers = row.get("answer")
    if isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers):
        strings.append("answer")
    if not all(name in strings for name in fields):
        raise ValueError(
            f"{place} must hold the string {text_field!r}, or the strings {', '.join(QA_FIELDS)} (the last may be "
            f"a list of some); it has {', '.join(map(str, row)) or 'nothing'}"
        )
    return {"text": row[text_field]} if fields == (text_field,) else {name: row[name] for name in fields}


def _file_rows(path: Path, text_field: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.is_dir():
        files = sorted(
            p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES + RECORD_SUFFIXES and p.is_file()
        )
        if not files:
            raise ValueError(f"{str(path)!r} must hold files *{', *'.join(TEXT_SUFFIXES + RECORD_SUFFIXES)}, got none")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(
            f"data must be a file, a folder, hub:NAME or recipe:NAME, but there is nothing at {str(path)!r}"
        )
    for file in files:
        try:
            if file.suffix.lower() in (*RECORD_SUFFIXES, ".json"):
                yield from _json_rows(file)
            else:
                yield str(file), {text_field: file.read_text(encoding="utf-8-sig")}
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(file)!r} must be UTF-8 text: {error}") from error


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """A JSON object in each line; or all in one array, or a single one, as a file *.json may hold them."""
    with file.open(encoding="utf-8-sig") as lines:
        if file.suffix.lower() == ".json":
            try:
                whole = json.load(lines)
            except json.JSONDecodeError as error:
                lines.seek(0)
                if lines.readline().startswith("["):
                    raise ValueError(f"{str(file)!r} must hold an array of JSON objects: {error}") from error
                lines.seek(0)  # one in each line, then
            else:
                rows = whole if isinstance(whole, list) else [whole]
                places = (f"{str(file)!r}, object {number}," for number in range(len(rows)))
                yield from ((place, _object(place, row)) for place, row in zip(places, rows, strict=True))
                return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{str(file)!r}, line {number},"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place} must be a JSON object: {error}") from error
            yield place, _object(place, row)


def _object(place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(row).__name__}")
    return row


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{HUB}{name} needs the package `datasets`: pip install datasets") from error
    name, _, config = name.partition(":")
    for number, row in enumerate(load_dataset(name, config or None, split=split, streaming=True)):
        yield f"{HUB}{name}, row {number},", row
