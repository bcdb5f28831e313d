"""hmt read keeps what is remembered of a text; hmt read, score and generate go on from there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny_model

from hmt import HMTState
from hmt.cli import main
from hmt.loading import load
from hmt.state_file import made_with, save_state

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune... " * 12
SMALL = ["--segment-length", "32", "--num-sensory", "4", "--queue-size", "5"]


@pytest.fixture
def files(tmp_path: Path, model_dir: Path) -> dict[str, str]:
    """A text, its two parts, and where states go."""
    for name, part in {"whole": TEXT, "first": TEXT[:500], "second": TEXT[500:]}.items():
        (tmp_path / name).write_text(part, encoding="utf-8")
    names = ("whole", "first", "second", "state", "later")
    return {name: str(tmp_path / name) for name in names} | {"model": str(model_dir)}


@pytest.fixture
def state_file(files: dict[str, str], capsys) -> str:
    """The state after the first part."""
    assert main(["read", files["first"], "--model", files["model"], "--output", files["state"], *SMALL]) == 0
    assert f"{files['state']} remembers 500 tokens, 15 segments closed, in 0.0 MiB" in capsys.readouterr().out
    return files["state"]


def test_a_state_holds_what_reading_leaves_and_how_it_was_read(files: dict[str, str], state_file: str) -> None:
    model, tokenizer, _ = load(files["model"], segment_length=32, num_sensory=4, queue_size=5)
    expected = model.read(tokenizer(TEXT[:500], return_tensors="pt").input_ids)
    found = HMTState.load(state_file)
    assert (found.num_closed, found.num_open) == (15, 500 % 32)
    torch.testing.assert_close(found.queue, expected.queue)
    assert torch.equal(found.open.ids, expected.open.ids)
    about = made_with(state_file)
    assert about["model"] == files["model"]
    assert (about["segment_length"], about["queue_size"], about["summary_source"]) == (32, 5, "current")


@pytest.mark.parametrize("what", [["--prompt", "Q: why?"], ["second"], ["second", "--prompt", "Q: why?"]], ids=str)
def test_generation_goes_on_from_a_state(what: list[str], files: dict[str, str], state_file: str, capsys) -> None:
    options = ["--model", files["model"], "--max-new-tokens", "40"]
    text, prompt = ("whole", what[1:]) if what[0] == "second" else ("first", what)
    assert main(["generate", files[text], *prompt, *options, *SMALL]) == 0
    expected = capsys.readouterr().out
    assert main(["generate", *[files.get(x, x) for x in what], *options, "--state", state_file]) == 0
    assert capsys.readouterr().out == expected != "\n"


def test_reading_goes_on_from_a_state(files: dict[str, str], state_file: str) -> None:
    options = ["--model", files["model"], "--output", files["later"]]
    assert main(["read", files["second"], *options, "--state", state_file]) == 0
    in_parts = HMTState.load(files["later"])
    assert main(["read", files["whole"], *options, *SMALL]) == 0
    at_once = HMTState.load(files["later"])
    assert in_parts.num_closed == at_once.num_closed == len(TEXT) // 32
    torch.testing.assert_close(in_parts.queue, at_once.queue, atol=1e-5, rtol=1e-5)
    assert torch.equal(in_parts.open.ids, at_once.open.ids)


def test_a_score_goes_on_from_a_state(files: dict[str, str], state_file: str, capsys) -> None:
    assert main(["score", files["second"], "--model", files["model"], "--state", state_file]) == 0
    printed = capsys.readouterr().out
    model, tokenizer, _ = load(files["model"], segment_length=32, num_sensory=4, queue_size=5)
    ids = tokenizer(TEXT[500:], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids, labels=ids, state=HMTState.load(state_file)).loss.exp()
    assert f"read {len(TEXT) - 500} tokens" in printed and f"perplexity {expected:.2f}" in printed


def test_a_state_without_a_history_is_read_with_the_settings_given(files: dict[str, str], capsys) -> None:
    model, tokenizer, _ = load(files["model"], segment_length=32, num_sensory=4, queue_size=5)
    save_state(model.read(tokenizer(TEXT[:500], return_tensors="pt").input_ids), files["state"])
    assert made_with(files["state"]) == {}
    options = ["--prompt", "Q: why?", "--model", files["model"], "--max-new-tokens", "9", *SMALL]
    assert main(["generate", *options, "--state", files["state"]]) == 0
    continued = capsys.readouterr().out
    assert main(["generate", files["first"], *options]) == 0
    assert capsys.readouterr().out == continued


@pytest.mark.parametrize(
    "made_of", [["a", "list"], {"segment_length": "long"}, {"legs": 4}], ids=["list", "text", "legs"]
)
def test_a_history_that_makes_no_sense_is_refused(made_of: object, files: dict[str, str], capsys) -> None:
    model, _, _ = load(files["model"], segment_length=32, num_sensory=4, queue_size=5)
    save_state(model.new_state(), files["state"], made_of)
    assert main(["generate", "--prompt", "Q", "--model", files["model"], "--state", files["state"]]) == 2
    assert re.search("made_with is|segment_length must be|settings must be", capsys.readouterr().err)


def test_another_model_is_told_of(files: dict[str, str], state_file: str, tmp_path: Path, capsys) -> None:
    save_tiny_model(tmp_path / "other")
    options = ["--model", str(tmp_path / "other"), "--state", state_file]
    assert main(["generate", "--prompt", "Q", "--max-new-tokens", "2", *options]) == 0
    assert f"was read with the model {files['model']}, not with {tmp_path / 'other'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--state", "STATE"], "must be a FILE or a --prompt to continue"),
        (["generate"], "must be a FILE or a --prompt to continue"),
        (["generate", "--state", "STATE", "--prompt", "Q", "--segment-length", "16"], "segment_length must be 32"),
        (["generate", "--state", "STATE", "--prompt", "Q", "--causal"], "summary_source must be 'current'"),
        (["generate", "--state", "FIRST", "--prompt", "Q"], "is damaged or no safetensors file"),
        (["score", "FIRST", "--state", "nowhere"], "nowhere"),
        (["read", "FIRST", "--output", "nowhere/state"], "must be in a folder that is there"),
    ],
    ids=["nothing", "nothing-at-all", "length", "source", "no-state", "no-file", "no-folder"],
)
def test_mistakes_are_explained(arguments: list[str], message: str, files, state_file, capsys) -> None:
    names = {"STATE": state_file, "FIRST": files["first"]}
    assert main([*(names.get(a, a) for a in arguments), "--model", files["model"]]) == 2
    assert message in capsys.readouterr().err
