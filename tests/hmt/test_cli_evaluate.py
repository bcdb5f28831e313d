"""hmt evaluate: every task from files to a table, JSON and a picture, for several modes or models side by side."""

from __future__ import annotations

import json
import math
import re
import weakref
from pathlib import Path

import pytest
from backbones import hmt_model
from transformers import logging as transformers_logging

from hmt import cli_evaluate
from hmt.cli import main
from hmt.data import load_documents
from hmt.evaluation import read_curve
from hmt.loading import load

SENTENCE = "It is a truth universally acknowledged, that a single man in possession of a good fortune... "
SETTINGS = ["--segment-length", "64", "--num-sensory", "4"]
QUESTIONS = [
    {"context": SENTENCE, "question": "Who is in want of a wife?", "answer": ["a single man", "a man"]},
    {"context": SENTENCE[::-1], "question": "What is good?", "answer": "fortune"},
]


@pytest.fixture(autouse=True)
def quiet():
    level = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(level)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [{"text": SENTENCE * 6}, {"text": SENTENCE[5:] * 3}]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recalling(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved HMT whose recall depends much on what is asked, as that of a fresh one does not."""
    model, tokenizer, _ = load(str(model_dir), device="cpu", segment_length=64, num_sensory=4)
    for weight in (model.recall.wq.weight, model.recall.wk.weight):
        weight.data.mul_(20)
    folder = tmp_path_factory.mktemp("recalling")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(task: str, data: Path, model: Path, folder: Path, *options: str) -> dict:
    """The report of a task whose picture has been painted as well."""
    out = folder / f"{task}.json"
    command = ["evaluate", str(data), "--task", task, "--model", str(model), "--device", "cpu", "--output", str(out)]
    assert main([*command, *options]) == 0
    assert out.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    found = json.loads(out.read_text())
    assert found["task"] == task
    return found


def test_perplexity_in_every_mode(recalling: Path, texts: Path, tmp_path: Path, capsys) -> None:
    modes = {
        "hmt": (None, None),
        "rmt": ("rmt", None),
        "baseline": ("baseline", None),
        "hmt-causal": (None, "previous"),
    }
    options = [word for mode in modes for word in ("--mode", mode)]
    found = run("perplexity", texts, recalling, tmp_path, "--segments", "5", *options)
    model, tokenizer, _ = load(str(recalling), device="cpu")
    documents = load_documents(texts, tokenizer)
    for name, (mode, source) in modes.items():
        *_, curve = read_curve(model, documents, 5, mode=mode, summary_source=source)
        assert found["readings"][name]["perplexity"] == pytest.approx(curve.perplexity, rel=1e-6)
    assert len({reading["perplexity"] for reading in found["readings"].values()}) == 4
    assert len(found["comparisons"]) == 6
    table = capsys.readouterr().out
    assert re.search(r"^ +hmt +[\d.]+  [\d. ]+$", table, flags=re.MULTILINE)
    assert re.search(r"hmt - baseline: [+-][\d.]+ nats per token, 95 % in \[[+-][\d.]+, [+-][\d.]+\]", table)


def test_needles_by_distance(model_dir: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "book.txt").write_text(SENTENCE * 10, encoding="utf-8")
    options = ["--distances", "4,1,2", "--trials", "3", "--keys", "2", "--mode", "hmt", "--mode", "baseline"]
    found = run("needle", tmp_path / "book.txt", model_dir, tmp_path, *SETTINGS, *options)
    assert found["distances"] == [1, 2, 4] and found["keys"] == 2 and set(found["readings"]) == {"hmt", "baseline"}
    for reading in found["readings"].values():
        assert reading["trials"] == 3 and len(reading["nats"]) == 3 and all(map(math.isfinite, reading["nats"]))
    printed = capsys.readouterr()
    assert re.search(r"^ +hmt +\d+%( +\d+%){2}$", printed.out, flags=re.MULTILINE)
    assert "3/3" in printed.err


def test_questions(model_dir: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("rouge_score")
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    options = ["--mode", "hmt", "--mode", "rmt", "--max-new-tokens", "4"]
    found = run("qa", data, model_dir, tmp_path, *SETTINGS, *options)
    for reading in found["readings"].values():
        assert [a["references"] for a in reading["answers"]] == [["a single man", "a man"], ["fortune"]]
        assert 0 <= reading["f1"]["mean"] <= 1 and reading["questions"] == 2
    assert re.search(r"^ +rmt +2 +[\d.]+ +[\d.]+$", capsys.readouterr().out, flags=re.MULTILINE)


def test_a_map_of_what_is_recalled(recalling: Path, texts: Path, tmp_path: Path, capsys) -> None:
    found = run("recall-map", texts, recalling, tmp_path, "--mode", "hmt", "--mode", "hmt-causal")
    for reading in found["readings"].values():
        assert [len(ages) for ages in reading["ages"]] == [9, 5]
        assert sum(reading["histogram"].values()) == 8 + 4
    assert re.search(
        r"^hmt: 12 segments recalled, most often those \d+ \(\d+%\)", capsys.readouterr().out, re.MULTILINE
    )


def test_models_of_different_segments_are_not_compared(model_dir: Path, texts: Path, tmp_path: Path, capsys) -> None:
    model, tokenizer, _ = load(str(model_dir), segment_length=16, num_sensory=2)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    command = ["evaluate", str(texts), "--model", str(tmp_path / "saved"), "--model", str(model_dir), "--segments", "2"]
    assert main(command) == 2
    assert "--segment-length must be given" in capsys.readouterr().err
    assert main([*command, "--segment-length", "16", "--max-stretches", "3", "--num-sensory", "2"]) == 0
    perplexities = re.findall(r"\(hmt\) +([\d.]+)", capsys.readouterr().out)
    assert len(perplexities) == 2 and all(math.isfinite(float(p)) for p in perplexities)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nothing at 'nowhere'"),
        (["TEXTS", "--task", "qa"], "data must hold questions"),
        (["QUESTIONS", "--task", "needle"], "DATA must be plain texts to hide needles in"),
        (["TEXTS", "--task", "needle", "--distances", "1;2"], "--distances must be numbers with commas between"),
        (["TEXTS", "--task", "needle", "--distances", "99"], "the text must have"),
        (["TEXTS", "--task", "recall-map", "--mode", "rmt"], "--mode must be hmt or hmt-causal for a recall map"),
        (["TEXTS", "--output", "nowhere/curve.json"], "must be in a folder that is there"),
        (["TEXTS", "--output", "curve.png"], "must be a JSON file"),
        (["TEXTS", "--model", "EMPTY"], "hmt: error"),
        (["TEXTS", "--model", "RMT", "--mode", "hmt"], "must not need more memory than the model's own mode 'rmt'"),
        (["recipe:qasper", "--split", "train"], "the split of recipe:qasper must be one of test, got 'train'"),
    ],
    ids=[
        "no-data",
        "no-questions",
        "questions",
        "distances",
        "short",
        "no-recall",
        "no-folder",
        "picture",
        "no-model",
        "less-memory",
        "split",
    ],
)
def test_mistakes_are_explained(arguments, message, model_dir, texts, tmp_path, monkeypatch, capsys) -> None:
    """Whatever can be known before anything is read."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(QUESTIONS[0]), encoding="utf-8")
    hmt_model(mode="rmt").save_pretrained(tmp_path / "rmt")
    names = {"TEXTS": texts, "QUESTIONS": questions, "RMT": tmp_path / "rmt", "EMPTY": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()
    if "--output" in arguments or "--model" in arguments:
        monkeypatch.setattr(cli_evaluate, "load", None)
    assert main(["evaluate", *(str(names.get(a, a)) for a in arguments), "--model", str(model_dir), *SETTINGS]) == 2
    assert message in capsys.readouterr().err


def test_numbers_below_one_are_usage_errors(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "x", "--model", "y", "--segments", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_help(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    printed = capsys.readouterr().out
    assert "usage: hmt evaluate" in printed
    for task in ("perplexity", "needle", "qa", "recall-map", "pg19", "pubmedqa", "musique"):
        assert re.search(rf"^  {task} ", printed, flags=re.MULTILINE)


def test_a_text_of_one_segment_has_a_perplexity(model_dir: Path, tmp_path: Path, capsys) -> None:
    short = tmp_path / "short.txt"
    short.write_text(SENTENCE[:40], encoding="utf-8")
    found = run("perplexity", short, model_dir, tmp_path, "--mode", "hmt", "--mode", "baseline", *SETTINGS)
    assert found["comparisons"] == [] and len(found["readings"]) == 2
    assert (
        "hmt (a) and baseline (b) are not compared: a and b must hold at least two segments" in capsys.readouterr().out
    )


def test_a_model_is_let_go_before_the_next_is_loaded(model_dir: Path, texts: Path, tmp_path: Path, monkeypatch) -> None:
    """And its data are encoded once for all its modes."""
    alive: list[weakref.ref] = []
    encoded: list[str] = []

    def watched(name: str, **options: object) -> object:
        assert not any(model() for model in alive)
        loaded = load(name, **options)
        alive.append(weakref.ref(loaded.model))
        return loaded

    def documents(source: str, *args: object, **options: object) -> list:
        encoded.append(source)
        return load_documents(source, *args, **options)

    monkeypatch.setattr(cli_evaluate, "load", watched)
    monkeypatch.setattr(cli_evaluate, "load_documents", documents)
    options = ["--model", str(model_dir), "--mode", "hmt", "--mode", "hmt-causal", *SETTINGS]
    for task, more in (("perplexity", []), ("needle", ["--trials", "1", "--distances", "1"]), ("recall-map", [])):
        alive.clear()
        encoded.clear()
        data = texts if task != "needle" else texts.with_name("haystack.txt")
        data.write_text(data.read_text() if data.exists() else SENTENCE * 20, encoding="utf-8")
        assert run(task, data, model_dir, tmp_path, *options, *more)
        assert len(alive) == len(encoded) == 2
