"""hmt train from text to a trained memory that hmt evaluate finds better, and what users get wrong."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import logging as transformers_logging
from transformers import modeling_utils
from transformers.utils import CONFIG_NAME

from hmt import capture, cli_train, compiled_layers, training
from hmt.adapters import FILE
from hmt.cli import main
from hmt.cli_train import DATA_DIGEST, RECIPE
from hmt.layer_graphs import LayerGraph
from hmt.loading import load

SENTENCE = "It is a truth universally acknowledged, that a single man in possession of a good fortune... "
SMALL = ["--segment-length", "32", "--num-sensory", "4", "--queue-size", "5"]
STEPS = ["--stage", "2:2:rmt", "--stage", "4:3", "--log-every", "2", "--save-every", "3", "--learning-rate", "1e-2"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [{"text": SENTENCE * 4}, {"text": SENTENCE[5:] * 2}, {"text": SENTENCE[9:] * 2}]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def quiet():
    level = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(level)


@pytest.mark.parametrize(
    ("what", "option"),
    [(what, option) for what in ("memory", "lora", "full") for option in ("", "--cuda-graphs")]
    + [("full", "--compile-layers"), ("full", "--checkpoint-layers"), ("full", "--cuda-graphs --checkpoint-layers")],
)
def test_train_then_evaluate(
    what: str, option: str, model_dir: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    if what == "lora":
        pytest.importorskip("peft")
    passes, compiled, checkpointed = [], [], []
    run_back = LayerGraph.run_back

    def counted(*arguments, **options):
        checkpointed.append(1)
        return checkpoint(*arguments, **options)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    monkeypatch.setattr(
        capture, "_static_checkpoint", functools.partial(counted, **capture._static_checkpoint.keywords)
    )
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(1) or function)
    monkeypatch.setattr(compiled_layers, "_compiled", functools.cache(compiled_layers._compiled.__wrapped__))
    monkeypatch.setattr(LayerGraph, "run_back", lambda *arguments: passes.append(1) or run_back(*arguments))
    out = tmp_path / "out"
    command = ["train", str(texts), "--model", str(model_dir), "--output", str(out), "--what", what, *SMALL, *STEPS]
    command += option.split()
    assert main([*command, "--eval-fraction", "0.3", "--batch-size", "2"]) == 0
    assert bool(passes) == ("--cuda-graphs" in option and what != "lora")
    assert bool(compiled) == (option == "--compile-layers")
    assert bool(checkpointed) == ("--checkpoint-layers" in option)
    printed = capsys.readouterr()
    assert re.search(r"training [\d,]+ parameters on 2 documents of [\d,]+ tokens", printed.err)
    for name in ("'loss'", "'ppl'", "'tokens_per_second'", "'eval_ppl'"):
        assert name in printed.out, name
    assert (out / FILE).is_file() == (what != "full")

    model, _, untrained = load(str(out))
    assert not untrained and model.config.segment_length == 32
    assert model.config.cuda_graphs is None and not model.config.compile_layers
    trained, fresh = [], []
    for found, name in ((trained, out), (fresh, model_dir)):
        result = tmp_path / f"{name.name}.json"
        settings = ["--segment-length", "32", "--num-sensory", "4"]
        command = ["evaluate", str(texts), "--model", str(name), "--segments", "3", "--output", str(result), *settings]
        assert main([*command, "--mode", "hmt", "--mode", "baseline"]) == 0
        report = json.loads(result.read_text())
        found += [report["readings"][mode]["perplexity"] for mode in ("hmt", "baseline")]
    assert trained[0] < (0.97 if what == "memory" else 0.9) * fresh[0]
    if what == "memory":
        assert trained[1] == pytest.approx(fresh[1], rel=1e-4)  # the backbone has not changed


def test_resume_goes_on_with_the_same_recipe_only(model_dir: Path, texts: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    command = ["train", str(texts), "--model", str(model_dir), "--output", str(out), *SMALL, *STEPS]
    assert main(command) == 0
    finished = (out / FILE).read_bytes()
    (out / FILE).unlink()
    for path in (out / "checkpoint-6").iterdir():
        path.unlink()
    (out / "checkpoint-6").rmdir()
    assert main(command) == 2
    assert "--resume given" in capsys.readouterr().err
    assert main([*command, "--resume", "--warmup-steps", "1"]) == 2
    assert "these differ: warmup_steps (0, now 1)" in capsys.readouterr().err
    kept = texts.read_text(encoding="utf-8")
    texts.write_text(kept.replace("truth", "lie"), encoding="utf-8")
    assert main([*command, "--resume"]) == 2
    assert "its texts or their tokens have changed" in capsys.readouterr().err
    texts.write_text(kept, encoding="utf-8")
    recipe = json.loads((out / RECIPE).read_text())
    for name in ("checkpoint_layers", DATA_DIGEST):  # as a version wrote it that knew neither
        del recipe[name]
    (out / RECIPE).write_text(json.dumps(recipe))
    assert main([*command, "--resume"]) == 0
    assert (out / FILE).read_bytes() == finished


def test_hub_data_sets_are_asked_for_their_splits(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> object:
        asked.append((name, config, split))
        return iter([{"body": SENTENCE}, {"body": SENTENCE[3:]}, {"body": 0}])

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
    data = ["hub:some/books:large", "--model", str(model_dir), "--text-field", "body", "--max-documents", "2"]
    train = ["train", *data, "--output", str(tmp_path / "out"), "--eval", "hub:some/books", "--stage", "1:2", *SMALL]
    assert main(train) == 0
    assert main(["evaluate", *data, "--segments", "2", "--max-stretches", "2", "--segment-length", "32"]) == 0
    large, plain = ("some/books", "large"), ("some/books", None)
    assert asked == [(*large, "train"), (*plain, "validation"), (*large, "test")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere", "--model", "MODEL", "--output", "OUT"], "nothing at 'nowhere'"),
        (["train", "TEXTS", "--model", "MODEL", "--output", "OUT", "--stage", "5"], "STEPS:SEGMENTS"),
        (["train", "TEXTS", "--model", "MODEL", "--output", "OUT", "--mode", "baseline"], "no memory to train"),
        (["train", "TEXTS", "--model", "MODEL", "--output", "OUT", "--eval-fraction", "2"], "eval_fraction"),
        (["train", "TEXTS", "--model", "MODEL", "--output", "OUT", "--decay", "0"], "decay"),
    ],
    ids=["no-data", "stage", "baseline", "fraction", "decay"],
)
def test_mistakes_are_explained(arguments: list[str], message: str, model_dir, texts, tmp_path, capsys) -> None:
    names = {"MODEL": model_dir, "TEXTS": texts, "OUT": tmp_path / "out"}
    assert main([str(names.get(a, a)) for a in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "must be at least 1, got 0"),
        (["--learning-rate", "nan"], "must be a number of at least 0, got nan"),
        (["--max-grad-norm", "-1"], "must be a number of at least 0, got -1"),
        (["--eval", "x", "--eval-fraction", "0.1"], "not allowed with argument --eval"),
    ],
    ids=["zero", "nan", "negative", "two-evaluations"],
)
def test_usage_errors(options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "x", "--model", "y", "--output", "z", *options])
    assert message in capsys.readouterr().err


def test_help(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "usage: hmt train" in printed and "recipe:NAME with NAME one of wikitext-103, pg19, pubmedqa" in printed


@pytest.mark.parametrize(("allocator", "noted"), [("glibc 2.36", True), ("mimalloc", False)])
def test_says_which_allocator_takes_less_memory(allocator, noted, model_dir, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli_train, "allocator", lambda: allocator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["train", str(texts), "--model", str(model_dir), "--output", str(tmp_path / "out"), *SMALL]
    assert main([*command, "--stage", "1:2:rmt"]) == 0
    assert (cli_train.ALLOCATOR_NOTE in capsys.readouterr().err) == noted


def test_an_adapter_over_its_own_model_is_refused(model_dir: Path, texts: Path, capsys) -> None:
    arguments = ["train", str(texts), "--model", str(model_dir), "--output", str(model_dir), *SMALL, "--stage", "1:2"]
    assert main(arguments) == 2
    assert "must go to another folder than what it needs" in capsys.readouterr().err
    assert not (model_dir / FILE).exists()


@pytest.mark.parametrize(
    ("what", "other", "message"), [("full", FILE, "holds an adapter"), ("memory", CONFIG_NAME, "whole model")]
)
def test_a_result_beside_one_of_another_kind_is_refused(what, other, message, model_dir, texts, tmp_path, capsys):
    """Only one of them could be loaded again."""
    output = tmp_path / "out"
    output.mkdir()
    (output / other).write_text("{}")
    arguments = ["train", str(texts), "--model", str(model_dir), "--output", str(output), *SMALL, "--stage", "1:2"]
    assert main([*arguments, "--what", what]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == [other]


@pytest.mark.parametrize("what", ["memory", "lora", "full"])
def test_checkpoints_can_be_read_with(what: str, model_dir: Path, texts: Path, tmp_path: Path, capsys) -> None:
    if what == "lora":
        pytest.importorskip("peft")
    out = tmp_path / "out"
    arguments = ["train", str(texts), "--model", str(model_dir), "--output", str(out), *SMALL, "--stage", "2:2"]
    assert main([*arguments, "--save-every", "2", "--what", what]) == 0
    (tmp_path / "text.txt").write_text(SENTENCE, encoding="utf-8")
    status = main(["score", str(tmp_path / "text.txt"), "--model", str(out / "checkpoint-2"), "--device", "cpu"])
    printed = capsys.readouterr()
    assert status == (2 if what == "lora" else 0)
    assert ("is there to be resumed" if what == "lora" else "perplexity") in printed.err + printed.out
    if what != "lora":
        at_the_end, at_the_checkpoint = (load(str(x), device="cpu").model for x in (out, out / "checkpoint-2"))
        for name, value in at_the_end.named_parameters():
            assert torch.equal(at_the_checkpoint.get_parameter(name), value), name


def test_bfloat16_needs_no_gpu(model_dir: Path, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["train", str(texts), "--model", str(model_dir), "--output", str(output), *SMALL, "--stage", "1:2"]
    assert main([*arguments, "--bf16"]) == 0
    assert (output / FILE).exists()


def test_beside_quantised_weights_no_checkpoints_are_saved(
    model_dir: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_train, "is_quantised", lambda backbone: True)
    command = ["train", str(texts), "--model", str(model_dir), "--output", str(tmp_path / "out"), *SMALL, *STEPS]
    assert main([*command, "--what", "memory"]) == 0
    assert (tmp_path / "out" / FILE).is_file() and not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("what", ["memory", "lora"])
def test_a_seed_draws_what_is_trained(what: str, model_dir: Path, texts: Path, tmp_path: Path) -> None:
    if what == "lora":
        pytest.importorskip("peft")
    found = []
    for number, seed in enumerate(("1", "1", "2")):
        out = tmp_path / str(number)
        command = ["train", str(texts), "--model", str(model_dir), "--output", str(out), "--stage", "1:1", *SMALL]
        assert main([*command, "--what", what, "--seed", seed, "--learning-rate", "0"]) == 0
        found.append(load_file(out / FILE))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name])
        assert not torch.equal(tensor, found[2][name]) or not tensor.any(), name


def test_a_saved_baseline_is_trained_as_one(model_dir: Path, texts: Path, tmp_path: Path, monkeypatch) -> None:
    """The stages of the paper begin with those of an RMT, where there is a memory."""
    monkeypatch.setattr(training, "PAPER_STAGES", (training.Stage(1, (2,), "rmt"), training.Stage(1, (2,))))
    command = ["train", str(texts), "--what", "full", *SMALL]
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert main([*command, "--model", str(model_dir), "--mode", "baseline", "--output", first]) == 0
    assert main([*command, "--model", first, "--output", second]) == 0
    assert load(second, device="cpu").model.config.mode == "baseline"
