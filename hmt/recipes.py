"""Data sets of the HMT paper (arXiv 2405.06067), each as a small recipe: where it lies, and what its rows mean."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

RECIPE = "recipe:"
MIXED = ("interleaved", "dilated")  # made of other texts by `hmt.data.read_documents`
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}

Row = Mapping[str, Any]
Placed = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """How to read one data set.

    Args:
        hub: what `datasets.load_dataset` takes.
        splits: the hub's own split and the range of its rows (None: to the end) that each split stands for.
        records: the rows, each with its place, as records of `hmt.records.read_records`.
        options: names and defaults of what a user may set.
        notes: about the data, for users.
    """

    hub: Mapping[str, str]
    splits: Mapping[str, tuple[str, int, int | None]]
    records: Callable[..., Iterator[Placed]]
    options: Mapping[str, int] = field(default_factory=dict)
    notes: str = ""


def _value(row: Row, place: str, name: str, kind: type) -> Any:
    """A field of a row, or an error that says what the row has instead."""
    value = row.get(name)
    if not isinstance(value, kind):
        raise ValueError(
            f"{place} must hold the {kind.__name__} {name!r}; it has {', '.join(map(str, row)) or 'nothing'}"
        )
    return value


def _texts(rows: Iterable[tuple[str, Row]]) -> Iterator[Placed]:
    """A text per row: PG-19 has a book in each."""
    for place, row in rows:
        yield place, {"text": _value(row, place, "text", str)}


def _articles(rows: Iterable[tuple[str, Row]]) -> Iterator[Placed]:
    """A text per article: Wikitext has a line in each row, and a line " = Title = " before each article."""
    begun = ""
    lines: list[str] = []
    for place, row in rows:
        line = _value(row, place, "text", str)
        if lines and re.fullmatch(r" = [^=].* = \n?", line):
            yield begun, {"text": "".join(lines)}
            lines = []
        if not lines:
            begun = place
        if lines or line.strip():  # a blank line stands before the first article
            lines.append(line)
    if lines:
        yield begun, {"text": "".join(lines)}


def _fused(rows: Iterable[tuple[str, Row]], fuse: int) -> Iterator[Placed]:
    """A question per row, asked about the abstracts of `fuse` rows in one; the answer is PubMedQA's long one."""
    rows = iter(rows)
    while group := list(islice(rows, fuse)):
        abstracts = [_value(_value(row, place, "context", dict), place, "contexts", list) for place, row in group]
        context = " ".join(chain.from_iterable(abstracts))
        for place, row in group:
            question, answer = (_value(row, place, name, str) for name in ("question", "long_answer"))
            yield place, {"context": context, "question": question, "answer": answer}


def _longbench(rows: Iterable[tuple[str, Row]]) -> Iterator[Placed]:
    """A question per row with every answer that counts as right."""
    for place, row in rows:
        context, question = (_value(row, place, name, str) for name in ("context", "input"))
        answers = _value(row, place, "answers", list)
        if not answers:
            raise ValueError(f"{place} must hold at least one answer in 'answers', got none")
        yield place, {"context": context, "question": question, "answer": answers}


def _longbench_task(name: str) -> Recipe:
    hub = {"path": "json", "data_files": f"zip://data/{name}.jsonl::hf://datasets/THUDM/LongBench/data.zip"}
    return Recipe(
        hub, {"test": ("train", 0, None)}, _longbench, notes="200 questions to evaluate on (arXiv 2308.14508)"
    )


def _own_splits(**names: str) -> dict[str, tuple[str, int, int | None]]:
    return {split: (name, 0, None) for split, name in names.items()}


THREE = _own_splits(train="train", validation="validation", test="test")
RECIPES = {
    "wikitext-103": Recipe(
        {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1"},
        THREE,
        _articles,
        notes="one text per article, raw (arXiv 1609.07843)",
    ),
    "pg19": Recipe(
        {"path": "emozilla/pg19"},  # deepmind/pg19 needs a loading script, which datasets no longer runs
        THREE,
        _texts,
        notes="one text per book (arXiv 1911.05507)",
    ),
    "pubmedqa": Recipe(
        {"path": "qiaojin/PubMedQA", "name": "pqa_artificial"},
        # the hub has one split of 211,269 rows: 75, 15 and 10 % of it, in order
        {"train": ("train", 0, 158_452), "validation": ("train", 158_452, 190_142), "test": ("train", 190_142, None)},
        _fused,
        {"fuse": 2},
        "long answers about the abstracts of 2 papers in one context, or of recipe:pubmedqa,fuse=N (arXiv 1909.06146)",
    ),
    **{name: _longbench_task(name) for name in ("narrativeqa", "qasper", "qmsum", "musique")},
}


def parse_recipe(source: str) -> tuple[str, dict[str, str], str]:
    """Name, options and what follows of "recipe:NAME,OPTION=VALUE:SOURCE"; options and SOURCE may be absent.

    Example:
        >>> parse_recipe("recipe:pubmedqa,fuse=4:pqa.parquet")
        ('pubmedqa', {'fuse': '4'}, 'pqa.parquet')
    """
    head, _, rest = source.removeprefix(RECIPE).partition(":")
    name, *settings = head.split(",")
    options = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"an option of {RECIPE}{name} must be NAME=VALUE, got {setting!r}")
        options[key] = value
    return name, options, rest


def whole_number(source: str, name: str, value: str) -> int:
    """The value of an option that must be an integer of at least 1."""
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name} of {source!r} must be an integer >= 1, got {value!r}")
    return int(value)


def check_options(source: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError that names an option which there is not."""
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{source!r} must have no options but {', '.join(known) or '(none)'}, got {', '.join(unknown)}"
        )


def recipe_records(source: str, split: str) -> Iterator[Placed]:
    """The records of "recipe:NAME", each with its place; "recipe:NAME:FILE" reads a local copy of the same rows.

    A data set on the hub is streamed, never downloaded whole. A local FILE (parquet or jsonl) or a folder of such files
    is read from start to end, whatever the split.

    Raises:
        ValueError: no such recipe, option, split or file; a row without the fields of the data set.
        ImportError: without the package `datasets`.
        OSError: a hub that cannot be reached.
    """
    name, given, file = parse_recipe(source)
    recipe = RECIPES.get(name)
    if name in MIXED:
        raise ValueError(f"{source!r} mixes texts, but questions are wanted here")
    if recipe is None:
        raise ValueError(f"a recipe must be one of {', '.join([*RECIPES, *MIXED])}, got {name!r}")
    check_options(source, given, recipe.options)
    options = {**recipe.options, **{key: whole_number(source, key, value) for key, value in given.items()}}
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{source} needs the package `datasets`: pip install datasets") from error
    start, stop = 0, None
    if file:
        hub, own_split = _local(file), "train"
        if any((begin, end) != (0, None) for _, begin, end in recipe.splits.values()):
            warnings.warn(
                f"{source} is read from start to end: its splits are rows of the hub's one file, and split {split!r} "
                "is not told from the others in a copy",
                stacklevel=2,
            )
    elif split not in recipe.splits:
        raise ValueError(f"the split of {source} must be one of {', '.join(recipe.splits)}, got {split!r}")
    else:
        hub, (own_split, start, stop) = dict(recipe.hub), recipe.splits[split]
    try:
        rows = load_dataset(**hub, split=own_split, streaming=True)
    except ConnectionError as error:
        raise ConnectionError(f"{error}. A local copy can be read as {RECIPE}{name}:FILE") from error
    rows = rows.skip(start) if start else rows
    rows = rows if stop is None else rows.take(stop - start)
    placed = ((f"{source}, row {number},", row) for number, row in enumerate(rows, start=start))
    yield from recipe.records(placed, **options)


def _local(file: str) -> dict[str, Any]:
    """What `load_dataset` takes for a local file or folder."""
    path = Path(file)
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in LOADERS)
    kinds = {LOADERS.get(p.suffix) for p in files}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise ValueError(f"a local copy must be a file or folder of one of {', '.join(LOADERS)}, got {file!r}")
    return {"path": kind, "data_files": [str(p) for p in files]}
