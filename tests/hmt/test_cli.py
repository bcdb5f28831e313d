"""The command line on a tiny model with a tokenizer of its own: score, generate, info, and what users get wrong."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import hmt_model, token_ids
from safetensors.torch import load_file, save_file
from tiny_model import byte_tokenizer

from hmt import HMTForCausalLM
from hmt.cli import main
from hmt.encoding import encode_file
from hmt.loading import load
from hmt.scoring import score

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune... " * 12


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


SMALL = ["--segment-length", "32", "--num-sensory", "4", "--queue-size", "5"]


def test_score_prints_the_perplexity_of_the_text(model_dir: Path, text_file: Path, capsys) -> None:
    status = main(["score", str(text_file), "--model", str(model_dir), "--every", "300", *SMALL])
    printed = capsys.readouterr()
    assert status == 0
    assert "memory of this model is untrained" in printed.err
    model, tokenizer, untrained = load(str(model_dir), segment_length=32, num_sensory=4, queue_size=5)
    assert untrained
    ids = encode_file(text_file, tokenizer)
    with torch.no_grad():
        expected = math.exp(model(ids, labels=ids).loss)
    total = re.search(r"read ([\d,]+) tokens in .* perplexity ([\d.]+), peak memory [\d,]+ MiB, (\d+) seg", printed.out)
    assert int(total[1].replace(",", "")) == ids.shape[1] == len(TEXT.encode())
    assert float(total[2]) == pytest.approx(expected, abs=0.006)
    assert int(total[3]) == ids.shape[1] // 32
    assert len(re.findall(r"^ +[\d,]+ +[\d.]+ +\d+$", printed.out, flags=re.MULTILINE)) == 3


@pytest.mark.parametrize("steps", [1, 3, 100])
def test_score_in_steps_is_the_loss_of_the_whole(steps: int, model_dir: Path, text_file: Path) -> None:
    model, tokenizer, _ = load(str(model_dir), segment_length=32, num_sensory=4, queue_size=5)
    ids = encode_file(text_file, tokenizer)
    parts = list(score(model, ids, segments_per_step=steps))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    with torch.no_grad():
        out = model(ids, labels=ids)
    assert total.num_tokens == ids.shape[1]
    assert total.num_scored == ids.shape[1] - 1
    assert total.nll / total.num_scored == pytest.approx(float(out.loss), rel=1e-5)
    torch.testing.assert_close(total.state.queue, out.state.queue, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_score_after_a_state_is_that_of_one_pass(steps: int) -> None:
    """A step ends where a segment does; otherwise the rest of one would be recalled for by less than its first half."""
    model, ids = hmt_model().double(), token_ids(1, 100)
    state = model.read(ids[:, :20])
    parts = score(model, ids[:, 20:], state, segments_per_step=steps)
    with torch.no_grad():
        loss = model(ids[:, 20:], labels=ids[:, 20:], state=state, num_items_in_batch=1).loss
    assert sum(part.nll for part in parts) == pytest.approx(float(loss), rel=1e-7)
    assert not list(score(model, ids[:, :0], state))


def test_limits_stop_reading(model_dir: Path, text_file: Path, capsys) -> None:
    assert main(["score", str(text_file), "--model", str(model_dir), "--max-tokens", "100", *SMALL]) == 0
    assert "read 100 tokens" in capsys.readouterr().out
    assert main(["score", str(text_file), "--model", str(model_dir), "--max-seconds", "0", *SMALL]) == 0
    assert "read 128 tokens" in capsys.readouterr().out  # one step of four segments is never cut


def test_a_text_out_of_a_pipe(model_dir: Path, capsys) -> None:
    reader, writer = os.pipe()
    with open(writer, "wb") as pipe:
        pipe.write(TEXT.encode())
    assert main(["score", f"/dev/fd/{reader}", "--model", str(model_dir), *SMALL]) == 0
    os.close(reader)
    assert f"read {len(TEXT):,} tokens" in capsys.readouterr().out


def test_nobody_reads_what_is_printed(model_dir: Path) -> None:
    call = "import sys; from hmt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", call, "score", "/dev/stdin", "--model", str(model_dir), "--every", "64", *SMALL]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        done = subprocess.run(command, input=TEXT.encode(), stdout=closed, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"reading" in done.stderr and b"Error" not in done.stderr and b"Broken" not in done.stderr


def test_generate_continues_the_text(model_dir: Path, text_file: Path, capsys) -> None:
    command = ["generate", str(text_file), "--model", str(model_dir), "--max-new-tokens", "40", *SMALL]
    assert main(command) == 0
    greedy = capsys.readouterr().out
    model, tokenizer, _ = load(str(model_dir), segment_length=32, num_sensory=4, queue_size=5)
    ids = encode_file(text_file, tokenizer)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert greedy == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    sampled = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--temperature", "1.5", "--seed", seed, "--prompt", "Q: why?"]) == 0
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_prompt_that_begins_a_text_begins_as_texts_do(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    """With the tokenizer's first token; after a file it has been read already."""
    folder = shutil.copytree(model_dir, tmp_path / "begins")
    tokenizer = byte_tokenizer(begins=True)
    tokenizer.save_pretrained(folder)
    model, _, _ = load(str(folder), segment_length=32, num_sensory=4, queue_size=5)
    for file, text in (([], "who?"), ([str(text_file)], text_file.read_text() + "who?")):
        command = ["generate", *file, "--model", str(folder), "--max-new-tokens", "20", "--prompt", "who?", *SMALL]
        assert main(command) == 0
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids[0, 0] == 0 and ids[0, 1:].all()
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        printed = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
        assert capsys.readouterr().out == printed


def test_new_memory_is_of_a_seed_and_leaves_the_callers_random_numbers(model_dir: Path) -> None:
    memories = []
    for seed in (0, 0, 1):
        torch.manual_seed(42)
        memories.append(load(str(model_dir), seed=seed).model.memory)
        drawn = torch.rand(())
        torch.manual_seed(42)
        assert torch.equal(drawn, torch.rand(()))
    assert torch.equal(memories[0], memories[1]) and not torch.equal(memories[0], memories[2])


def test_a_question_as_a_turn_of_a_chat(model_dir: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "chat")
    command = ["generate", str(text_file), "--max-new-tokens", "20", "--chat", *SMALL]
    assert main([*command, "--model", str(folder), "--prompt", "who?"]) == 2
    assert "must have a chat template" in capsys.readouterr().err
    model, tokenizer, _ = load(str(model_dir), segment_length=32, num_sensory=4, queue_size=5)
    tokenizer.bos_token = "</s>"
    tokenizer.chat_template = (  # a text that was read before has begun already
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    assert main([*command, "--model", str(folder), "--prompt", "who?"]) == 0
    answer = capsys.readouterr().out
    ids = torch.cat(
        [encode_file(text_file, tokenizer), tokenizer("[user] who?\n[assistant]", return_tensors="pt").input_ids], 1
    )
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert answer == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    assert main([*command, "--model", str(folder)]) == 2
    assert "--prompt must hold what --chat asks" in capsys.readouterr().err


def test_profile_shows_where_the_time_goes(model_dir: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    trace = tmp_path / "trace.json"
    arguments = ["profile", str(text_file), "--model", str(model_dir), "--segments", "5", "--trace", str(trace), *SMALL]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    rows = {m[1]: (float(m[2]), float(m[3])) for m in re.finditer(r"^(\w+) +([\d.]+) +([\d.]+)%$", out, re.MULTILINE)}
    assert list(rows) == ["summary", "recall", "main", "head", "loss", "other", "total"]
    total, share = rows.pop("total")
    assert share == 100.0
    assert sum(ms for ms, _ in rows.values()) == pytest.approx(total, abs=0.05)
    assert all(rows[part][0] > 0 for part in ("summary", "main", "head", "loss"))
    assert rows["main"][1] > rows["recall"][1]
    assert re.search(r"160 tokens in 5 segments: .* peak memory [\d,]+ MiB", out)
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("hmt.main") >= 5 and names.count("hmt.summary") == 1 and names.count("hmt.recall") >= 4


def test_info_names_versions_operators_and_the_model(model_dir: Path, capsys) -> None:
    assert main(["info", "--model", str(model_dir)]) == 0
    out = capsys.readouterr().out
    for line in ("torch ", "memory_recall", "segment_attention", "reference   usable", "LlamaForCausalLM"):
        assert line in out


def test_a_saved_hmt_keeps_its_settings(model_dir: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    model, tokenizer, _ = load(str(model_dir), segment_length=16, num_sensory=2, mode="rmt")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert isinstance(loaded.model, HMTForCausalLM)
    assert (loaded.model.config.mode, loaded.model.config.segment_length, loaded.untrained) == ("rmt", 16, False)
    assert main(["score", str(text_file), "--model", str(tmp_path), "--mode", "hmt"]) == 2
    assert "mode of the saved model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "nowhere.txt", "--model", "MODEL"], "no file 'nowhere.txt'"),
        (["score", "BINARY", "--model", "MODEL"], "must be UTF-8"),
        (["score", "EMPTY", "--model", "MODEL"], "no token"),
        (["score", "TEXT", "--model", "MODEL", "--segment-length", "4", "--num-sensory", "5"], "num_sensory"),
        (["score", "TEXT", "--model", "MODEL", "--num-sensory", "-1"], "num_sensory"),
        (["generate", "TEXT", "--model", "EMPTY"], "hmt: error"),
        (["score", "TEXT", "--model", "MODEL", "--max-tokens", "1"], "at least two tokens"),
        (["score", "TEXT", "--model", "MODEL", "--device", "gpu"], "device must be one of this machine"),
        (["score", "TEXT", "--model", "MODEL", "--device", "cuda:99"], "device must be one of this machine"),
        (["score", "TEXT", "--model", "DAMAGED"], "hmt: error"),
        (["score", "TEXT", "--model", "INCOMPLETE"], "must hold all weights of LlamaForCausalLM, but lacks 1"),
        (["profile", "TEXT", "--model", "MODEL", "--trace", "nowhere/trace.json"], "must be in a folder that is there"),
    ],
    ids=[
        "no-file",
        "binary",
        "empty",
        "sensory",
        "negative",
        "no-model",
        "one-token",
        "device",
        "no-gpu",
        "damaged",
        "incomplete",
        "no-folder",
    ],
)
def test_mistakes_are_explained(arguments: list[str], message: str, model_dir, text_file, tmp_path, capsys) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x9f")
    (tmp_path / "empty").write_text("")
    names = {"MODEL": model_dir, "TEXT": text_file, "BINARY": tmp_path / "binary", "EMPTY": tmp_path / "empty"}
    for name in ("DAMAGED", "INCOMPLETE"):
        names[name] = shutil.copytree(model_dir, tmp_path / name)
    weights = tmp_path / "DAMAGED" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    weights = tmp_path / "INCOMPLETE" / "model.safetensors"
    save_file(dict(list(load_file(weights).items())[:-1]), weights, {"format": "pt"})
    assert main([str(names.get(a, a)) for a in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["forget"],
        ["score"],
        ["score", "x"],
        ["score", "x", "--model", "y", "--every", "0"],
        ["score", "x", "--model", "y", "--max-seconds", "nan"],
        ["generate", "x", "--model", "y", "--temperature", "-1"],
    ],
)
def test_usage_errors_exit_with_two(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: hmt" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["score"], ["read"], ["generate"], ["profile"], ["info"]])
def test_help(command: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert "usage: hmt" in capsys.readouterr().out
