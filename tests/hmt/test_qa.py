"""Answers are scored as SQuAD and ROUGE score them, and are what the model generates after reading."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_model import byte_tokenizer

from hmt.data import encode
from hmt.loading import load
from hmt.qa import Answer, answer_questions, draw, f1, first_line, normalize, report, rouge_l
from hmt.reports import write_report

RECORD = {"context": "Anne walked to Lyme with the others.", "question": "Where?", "answer": ["Lyme", "to Lyme"]}


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Lyme", "lyme.", 1.0),
        ("The town of Lyme", "Lyme", 0.5),
        ("a cat sat", "the cat stood still", 2 / 5),
        ("the the", "the", 0.0),
        ("sea sea wall", "sea wall wall", 2 * 2 / 6),
        ("Bath", "Lyme", 0.0),
        ("", "Lyme", 0.0),
    ],
    ids=["case", "articles", "partial", "only-articles", "repeated", "wrong", "empty"],
)
def test_f1(prediction: str, reference: str, expected: float) -> None:
    assert f1(prediction, reference) == pytest.approx(expected)


def test_words_are_compared_without_case_punctuation_and_articles() -> None:
    assert normalize("The Cobb, at Lyme -- a  wall (An old one)!") == ["cobb", "at", "lyme", "wall", "old", "one"]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("sat the cat", "the cat sat", 2 / 3),
        ("dogs", "cat", 0.0),
        ("", "cat", 0.0),
    ],
    ids=["same", "order", "wrong", "empty"],
)
def test_rouge_l(prediction: str, reference: str, expected: float) -> None:
    pytest.importorskip("rouge_score")
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match="pip install rouge-score"):
        rouge_l("Lyme", "Lyme")


def test_an_answer_is_one_line() -> None:
    assert first_line("\n Lyme \nQuestion: Who?\nAnswer: Anne") == "Lyme"
    assert first_line(" \n ") == ""


@pytest.mark.parametrize("mode", ["hmt", "rmt", "baseline"])
def test_a_model_answers_what_it_has_learnt(mode: str, model_dir: Path) -> None:
    pytest.importorskip("rouge_score")
    model, tokenizer, _ = load(str(model_dir), device="cpu", segment_length=24, num_sensory=4, mode=mode)
    example = {name: value[None] for name, value in encode(RECORD, tokenizer).example().items()}
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        model(**example).loss.backward()
        optimizer.step()
    (answer,) = answer_questions(model, tokenizer, [RECORD], max_new_tokens=12)
    assert answer == Answer("Where?", "Lyme", ["Lyme", "to Lyme"], answer.context_tokens, 1.0, 1.0)
    assert answer.context_tokens == len("Anne walked to Lyme with the others.\n\nQuestion: Where?\nAnswer:")
    (other,) = answer_questions(model, tokenizer, [{**RECORD, "answer": "in Lyme"}], max_new_tokens=12)
    assert other.f1 == other.rouge_l == pytest.approx(2 / 3)


def test_texts_without_questions_are_refused(model_dir: Path) -> None:
    model, tokenizer, _ = load(str(model_dir), device="cpu")
    with pytest.raises(ValueError, match="data must hold questions"):
        next(answer_questions(model, tokenizer, [{"text": "No question."}]))


def test_a_report_compares_question_by_question(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scores = {"hmt": [0.5, 0.7, 1.0, 0.9], "rmt": [0.3, 0.5, 0.8, 0.7]}
    answers = {name: [Answer("?", "x", ["y"], 9, s, s / 2) for s in values] for name, values in scores.items()}
    found = report(answers)
    hmt, (pair,) = found["readings"]["hmt"], found["comparisons"]
    assert hmt["f1"]["mean"] == pytest.approx(0.775) and hmt["questions"] == 4
    assert hmt["f1"]["interval"][0] < 0.775 < hmt["f1"]["interval"][1]
    assert pair["f1"]["mean"] == pytest.approx(0.2) and pair["f1"]["interval"] == pytest.approx([0.2, 0.2])
    assert report({"hmt": answers["hmt"][:1]})["readings"]["hmt"]["f1"] == {"mean": 0.5, "interval": None}
    write_report(found, tmp_path / "qa.json", draw)
    assert (tmp_path / "qa.png").read_bytes()[1:4] == b"PNG"


def test_the_first_of_several_answers_is_learnt() -> None:
    tokenizer = byte_tokenizer()
    document = encode(RECORD, tokenizer)
    assert tokenizer.decode(document.ids[document.answer_start :]) == " Lyme</s>"
