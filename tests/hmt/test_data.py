"""Texts and questions from files to examples: nothing lost, nothing across documents, answers alone to be learnt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_model import byte_tokenizer

from hmt.data import (
    Document,
    join_documents,
    load_documents,
    pad_batch,
    split_documents,
    window_example,
    windows,
)
from hmt.records import read_records

QA = {"context": "Anne walked to Lyme.", "question": "Where?", "answer": "Lyme"}


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def numbered(*lengths: int) -> list[Document]:
    """Documents whose tokens tell document and position: 1000 d + t."""
    return [Document(1000 * d + torch.arange(length)) for d, length in enumerate(lengths)]


def test_a_folder_holds_texts_and_records_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("zweiter Satz: süß", encoding="utf-8")
    write_lines(tmp_path / "a.jsonl", {"text": "one", "id": 7}, "", QA)
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    assert list(read_records(tmp_path)) == [{"text": "one"}, QA, {"text": "zweiter Satz: süß"}]
    assert list(read_records(tmp_path / "deep" / "b.txt")) == [{"text": "zweiter Satz: süß"}]
    renamed = write_lines(tmp_path / "d.jsonl", {"body": "two"})
    assert list(read_records(renamed, text_field="body")) == [{"text": "two"}]


def test_documents_are_the_tokens_of_their_texts(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    file = write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "x"}, {"text": "three"}, {"text": "four"})
    found = load_documents(file, tokenizer, limit=3)
    assert [tokenizer.decode(d.ids) for d in found] == ["one", "three"]  # a single token predicts nothing


def test_only_the_answer_of_a_question_is_learnt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    (document,) = load_documents(write_lines(tmp_path / "qa.jsonl", QA), tokenizer)
    assert tokenizer.decode(document.ids) == "Anne walked to Lyme.\n\nQuestion: Where?\nAnswer: Lyme</s>"
    example = document.example()
    learnt = example["labels"] != -100
    assert tokenizer.decode(example["input_ids"][learnt]) == " Lyme</s>"
    assert torch.equal(example["labels"][learnt], example["input_ids"][learnt])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"text": "fine"}', '{"text": '], "line 2, must be a JSON object"),
        (["[1, 2]"], "line 1, must be a JSON object, got list"),
        ([{"body": "x"}], "must hold the string 'text', or the strings context, question, answer .*; it has body"),
        ([{"text": 3}], "must hold the string 'text'"),
        ([{"text": ""}], "must hold a text of at least two tokens"),
    ],
    ids=["cut", "list", "field", "type", "empty"],
)
def test_bad_records_are_named(rows: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_documents(write_lines(tmp_path / "a.jsonl", *rows), byte_tokenizer())


def test_bad_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nothing at 'nowhere'"):
        list(read_records("nowhere"))
    with pytest.raises(ValueError, match="must hold files"):
        list(read_records(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x9f")
    with pytest.raises(ValueError, match="must be UTF-8"):
        list(read_records(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        list(read_records("hub:someone/something"))


def test_hub_data_sets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> object:
        asked.append((args, kwargs))
        return iter([{"text": "one"}, QA, {"title": "no text"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    tokenizer = byte_tokenizer()
    found = load_documents("hub:someone/books:large", tokenizer, split="test", limit=2)
    assert tokenizer.decode(found[0].ids) == "one" and found[1].answer_start is not None
    assert asked == [(("someone/books", "large"), {"split": "test", "streaming": True})]
    with pytest.raises(ValueError, match="row 2, must hold"):
        list(read_records("hub:someone/books"))


def test_windows_cover_every_token_and_no_two_documents() -> None:
    documents = numbered(25, 2, 20, 11, 10)
    found = [window_example(documents, w, 10) for w in windows(documents, 10)]
    assert [len(x["input_ids"]) for x in found] == [10, 10, 5, 2, 10, 10, 10, 10]  # a last single token is left out
    for example in found:
        ids, labels = example["input_ids"], example["labels"]
        assert torch.equal(ids, torch.arange(int(ids[0]), int(ids[0]) + len(ids)))
        assert labels[0] == -100 and torch.equal(labels[1:], ids[1:])
    tokens = torch.cat([x["input_ids"] for x in found])
    assert torch.equal(tokens, torch.cat([d.ids for d in documents])[torch.arange(68) != 57])


def test_documents_are_joined_only_when_asked() -> None:
    joined = join_documents(numbered(3, 2), separator=9)
    assert joined.ids.tolist() == [0, 1, 2, 9, 1000, 1001]
    assert join_documents(numbered(3, 2)).ids.tolist() == [0, 1, 2, 1000, 1001]
    with pytest.raises(ValueError, match="plain texts"):
        join_documents([Document(torch.arange(9), 4)])


@pytest.mark.parametrize("length", [12, 13, 29])
def test_a_long_context_loses_its_middle(length: int) -> None:
    documents = [Document(torch.arange(30), 26)]
    (window,) = windows(documents, length)
    example = window_example(documents, window, length)
    ids, labels = example["input_ids"], example["labels"]
    assert len(ids) == length and ids[0] == 0
    assert int((ids.diff() != 1).sum()) == 1  # one gap
    assert ids[-8:].tolist() == list(range(22, 30)) and labels[labels != -100].tolist() == [26, 27, 28, 29]


def test_an_answer_that_does_not_fit_is_refused() -> None:
    documents = [Document(torch.arange(30), 20)]
    with pytest.raises(ValueError, match="answer of document 0 must be shorter than an example of 10 tokens"):
        window_example(documents, windows(documents, 10)[0], 10)


def test_split_holds_back_whole_documents_or_the_end_of_one() -> None:
    train, held_back = split_documents(numbered(5, 6, 7, 8, 9), 0.3)
    assert [len(d.ids) for d in train] == [5, 6, 7] and [len(d.ids) for d in held_back] == [8, 9]
    train, held_back = split_documents(numbered(50), 0.1)
    assert torch.equal(torch.cat([train[0].ids, held_back[0].ids]), torch.arange(50)) and len(held_back[0].ids) == 5
    for documents, fraction in ((numbered(50), 0.0), (numbered(50), 1.0), (numbered(4), 0.1)):
        with pytest.raises(ValueError, match=r"eval_fraction|more than one text"):
            split_documents(documents, fraction)


def test_batches_are_padded_on_the_right() -> None:
    documents = numbered(7, 3)
    batch = pad_batch([d.example() for d in documents])
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 3 + [0] * 4]
    assert batch["labels"][1].tolist() == [-100, 1001, 1002, *[-100] * 4]
    assert batch["input_ids"][1, 3:].tolist() == [0] * 4
    assert "attention_mask" not in pad_batch([documents[0].example()] * 2)


def test_json_files_hold_records(tmp_path: Path) -> None:
    """In an array or, as many are, in lines; the case of a suffix does not matter."""
    rows = [{"text": "Anne walked."}, {"text": "She ran."}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "c.JSONL").write_text(json.dumps(rows[0]), encoding="utf-8")
    (tmp_path / "d.TXT").write_text("It rained.", encoding="utf-8")
    assert list(read_records(tmp_path)) == [rows[0], {"text": "It rained."}]  # a folder's json may be anything
    assert list(read_records(tmp_path / "a.json")) == list(read_records(tmp_path / "b.json")) == rows
    (tmp_path / "a.json").write_text('[{"text": "x"},\n{"text" 3}]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"must hold an array of JSON objects: .* line 2"):
        list(read_records(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text("\n" + json.dumps(rows[0], indent=1), encoding="utf-8")
    assert list(read_records(tmp_path / "a.json")) == [rows[0]]
    (tmp_path / "a.json").write_text('[{"text": "x"}, 3]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json', object 1, must be a JSON object, got int"):
        list(read_records(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_mark_of_the_byte_order_is_no_text(name: str, tmp_path: Path) -> None:
    text = "Anne walked." if name == "a.txt" else json.dumps({"text": "Anne walked."})
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert list(read_records(tmp_path / name)) == [{"text": "Anne walked."}]


def test_the_context_of_a_question_may_be_the_text_field(tmp_path: Path) -> None:
    row = {"context": "Anne walked.", "question": "Who?", "answer": "Anne"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert list(read_records(tmp_path / "a.jsonl", text_field="context")) == [row]
    (tmp_path / "a.jsonl").write_text(json.dumps({"context": "Anne walked."}), encoding="utf-8")
    assert list(read_records(tmp_path / "a.jsonl", text_field="context")) == [{"text": "Anne walked."}]
