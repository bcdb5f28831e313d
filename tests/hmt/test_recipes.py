"""Recipes read rows of the schemas that their data sets have on the hub, from miniature copies of them."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import byte_tokenizer

from hmt.data import Document, dilate, interleave, load_documents
from hmt.recipes import RECIPES, parse_recipe
from hmt.records import read_records

datasets = pytest.importorskip("datasets")

STRING, INTEGER = datasets.Value("string"), datasets.Value("int32")
STRINGS = datasets.List(STRING)
# the features that the data sets' cards on the hub name
WIKITEXT = datasets.Features({"text": STRING})
PG19 = datasets.Features({"short_book_title": STRING, "publication_date": INTEGER, "url": STRING, "text": STRING})
PUBMEDQA = datasets.Features(
    {
        "pubid": INTEGER,
        "question": STRING,
        "context": {"contexts": STRINGS, "labels": STRINGS, "meshes": STRINGS},
        "long_answer": STRING,
        "final_decision": STRING,
    }
)
LINES = [
    "",
    " = Anne Elliot = \n",
    "",
    " Anne is patient . \n",
    " = = Family = = \n",
    " a = b = c \n",
    " = Lyme = \n",
    " A town . \n",
]
BOOKS = [
    {"short_book_title": f"Book {i}", "publication_date": 1818, "url": "x", "text": f"Chapter {i}. It began."}
    for i in "AB"
]
PAPERS = [
    {
        "pubid": i,
        "question": f"Does drug {i} help?",
        "context": {
            "contexts": [f"We gave {i}.", f"We saw {i}."],
            "labels": ["METHODS", "RESULTS"],
            "meshes": ["Drugs"],
        },
        "long_answer": f"Drug {i} helps.",
        "final_decision": "yes",
    }
    for i in range(5)
]
TASK = {"length": 4, "dataset": "qasper", "language": "en", "all_classes": None, "_id": "7f"}
QUESTIONS = [{"input": "Where?", "context": "Anne walked to Lyme.", "answers": ["Lyme", "to Lyme"], **TASK}]


def parquet(path: Path, rows: list[dict], features: Any) -> Path:
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))
    return path


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the hub's data sets, with a few rows in each."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        parquet(folder / "wikitext.parquet", [{"text": line} for line in LINES], WIKITEXT)
        parquet(folder / "pg19.parquet", BOOKS, PG19)
        parquet(folder / "pubmedqa.parquet", PAPERS, PUBMEDQA)
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for name in ("narrativeqa", "qasper", "qmsum", "musique"):
            archive.writestr(f"data/{name}.jsonl", "\n".join(map(json.dumps, QUESTIONS)))
    (folder / "qasper.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    return folder


@pytest.fixture
def hub(copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of load_dataset, which finds the copies where it would look on the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    asked: list[dict[str, Any]] = []
    load = datasets.load_dataset
    files = {"Salesforce/wikitext": "wikitext", "emozilla/pg19": "pg19", "qiaojin/PubMedQA": "pubmedqa"}

    def load_dataset(path: str, name: str | None = None, data_files: Any = None, **options: Any) -> Any:
        asked.append({"path": path, "name": name, **options})
        if path in files:
            path, data_files = "parquet", str(copies / f"{files[path]}.parquet")
        elif isinstance(data_files, str):
            data_files = data_files.replace("hf://datasets/THUDM/LongBench", str(copies))
        return load(path, data_files=data_files, **{**options, "split": "train"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_wikitext_is_read_by_article(hub: list) -> None:
    found = list(read_records("recipe:wikitext-103", split="validation"))
    assert [record["text"] for record in found] == ["".join(LINES[1:6]), "".join(LINES[6:])]
    name = "wikitext-103-raw-v1"
    assert hub == [{"path": "Salesforce/wikitext", "name": name, "split": "validation", "streaming": True}]


def test_pg19_is_read_by_book(hub: list) -> None:
    assert list(read_records("recipe:pg19", split="test")) == [{"text": row["text"]} for row in BOOKS]
    assert hub == [{"path": "emozilla/pg19", "name": None, "split": "test", "streaming": True}]


@pytest.mark.parametrize(("options", "fuse"), [("", 2), (",fuse=3", 3), (",fuse=1", 1)])
def test_pubmedqa_fuses_the_contexts_of_several_questions(options: str, fuse: int, hub: list) -> None:
    found = list(read_records(f"recipe:pubmedqa{options}"))
    for i, record in enumerate(found):
        group = range(i // fuse * fuse, min(5, i // fuse * fuse + fuse))
        context = " ".join(f"We gave {j}. We saw {j}." for j in group)
        assert record == {"context": context, "question": f"Does drug {i} help?", "answer": f"Drug {i} helps."}
    assert len(found) == 5
    assert hub == [{"path": "qiaojin/PubMedQA", "name": "pqa_artificial", "split": "train", "streaming": True}]


def test_pubmedqa_has_three_splits_of_one(hub: list, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = list(RECIPES["pubmedqa"].splits.values())
    assert [start for _, start, _ in ranges] == [0, *(stop for _, _, stop in ranges[:2])]
    splits = {"train": ("train", 0, 2), "validation": ("train", 2, 3), "test": ("train", 3, None)}
    monkeypatch.setitem(RECIPES, "pubmedqa", replace(RECIPES["pubmedqa"], splits=splits))
    found = [[r["question"] for r in read_records("recipe:pubmedqa", split=split)] for split in splits]
    assert found == [[f"Does drug {i} help?" for i in part] for part in ([0, 1], [2], [3, 4])]


@pytest.mark.parametrize("name", ["narrativeqa", "qasper", "qmsum", "musique"])
def test_longbench_has_every_right_answer(name: str, hub: list) -> None:
    (record,) = read_records(f"recipe:{name}", split="test")
    assert record == {"context": "Anne walked to Lyme.", "question": "Where?", "answer": ["Lyme", "to Lyme"]}
    tokenizer = byte_tokenizer()
    (document,) = load_documents(f"recipe:{name}", tokenizer, split="test")
    assert tokenizer.decode(document.ids[document.answer_start :]) == " Lyme</s>"
    with pytest.raises(ValueError, match=r"split of recipe:.* must be one of test, got 'train'"):
        list(read_records(f"recipe:{name}"))


def test_local_copies_are_read_whole(copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.warns(UserWarning, match="split 'validation' is not told from the others in a copy"):
        found = list(read_records(f"recipe:pubmedqa,fuse=5:{copies / 'pubmedqa.parquet'}", split="validation"))
    assert len(found) == 5 and len({r["context"] for r in found}) == 1
    (tmp_path / "books").mkdir()
    for i, row in enumerate(BOOKS):
        (tmp_path / "books" / f"{i}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert [r["text"] for r in read_records(f"recipe:pg19:{tmp_path / 'books'}")] == [row["text"] for row in BOOKS]
    (record,) = read_records(f"recipe:qasper:{copies / 'qasper.jsonl'}")
    assert record["question"] == "Where?"


@pytest.mark.parametrize(
    ("name", "row", "missing"),
    [
        ("wikitext-103", {"line": "x"}, "str 'text'; it has line"),
        ("pg19", {"book": "x"}, "str 'text'; it has book"),
        ("pubmedqa", {"question": "x", "context": "y", "long_answer": "z"}, "dict 'context'"),
        ("pubmedqa", {**PAPERS[0], "long_answer": 3}, "str 'long_answer'"),
        (
            "qasper",
            {"question": "x", "context": "y", "answers": ["z"]},
            "str 'input'; it has question, context, answers",
        ),
        ("qasper", {**QUESTIONS[0], "answers": []}, "at least one answer"),
    ],
    ids=["wikitext", "pg19", "pubmedqa", "pubmedqa-answer", "longbench", "longbench-answers"],
)
def test_other_schemas_are_refused(name: str, row: dict, missing: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"recipe:{name}:.*, row 0, must hold .*{missing}"):
        list(read_records(f"recipe:{name}:{tmp_path / 'rows.jsonl'}"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("recipe:nothing", "must be one of wikitext-103, pg19, .*got 'nothing'"),
        ("recipe:pg19,fuse=2", r"no options but \(none\), got fuse"),
        ("recipe:pubmedqa,fuse=0", "must be an integer >= 1, got '0'"),
        ("recipe:pubmedqa,fuse", "must be NAME=VALUE, got 'fuse'"),
        ("recipe:pg19:nowhere.parquet", "must be a file or folder of one of .parquet"),
        ("recipe:dilated", "must name what is mixed"),
        ("recipe:interleaved,period=3:x.txt", "no options but length, got period"),
    ],
    ids=["name", "option", "number", "setting", "file", "inner", "mixing-option"],
)
def test_mistakes_are_explained(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_documents(source, byte_tokenizer())


def test_a_hub_out_of_reach_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("no hub"))
    )
    with pytest.raises(ConnectionError, match=r"no hub\. A local copy can be read as recipe:pg19:FILE"):
        list(read_records("recipe:pg19"))


def test_interleaved_texts_change_every_few_tokens() -> None:
    texts = [Document(start + torch.arange(n)) for start, n in ((0, 5), (100, 8), (200, 2))]
    woven, alone = interleave(texts, 2)
    assert woven.ids.tolist() == [0, 1, 100, 101, 2, 3, 102, 103, 4, 104, 105, 106, 107]
    assert alone.ids.tolist() == [200, 201]


def test_dilated_texts_are_twice_as_far_apart() -> None:
    (dilated,) = dilate([Document(torch.arange(5))], 9, 2)
    assert dilated.ids.tolist() == [0, 1, 9, 9, 2, 3, 9, 9, 4, 9, 9]


def test_mixtures_are_named_like_other_sources(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abcdef", encoding="utf-8")
    (tmp_path / "y.txt").write_text("uvwxyz", encoding="utf-8")
    tokenizer = byte_tokenizer()
    (woven,) = load_documents(f"recipe:interleaved,length=4:{tmp_path}", tokenizer)
    assert tokenizer.decode(woven.ids) == "abcduvwxefyz"
    found = load_documents(f"recipe:dilated,length=3:recipe:interleaved,length=4:{tmp_path}", tokenizer)
    assert tokenizer.decode(found[0].ids) == "abc$$$duv$$$wxe$$$fyz$$$"
    (tmp_path / "q.jsonl").write_text(json.dumps({"context": "a", "question": "b", "answer": "c"}), encoding="utf-8")
    with pytest.raises(ValueError, match="plain texts"):
        load_documents(f"recipe:dilated:{tmp_path / 'q.jsonl'}", tokenizer)
    assert parse_recipe("recipe:dilated,length=3:recipe:pg19") == ("dilated", {"length": "3"}, "recipe:pg19")


def test_mixed_texts_are_no_questions() -> None:
    with pytest.raises(ValueError, match=r"'recipe:interleaved:x\.txt' mixes texts, but questions are wanted"):
        next(read_records("recipe:interleaved:x.txt"))
