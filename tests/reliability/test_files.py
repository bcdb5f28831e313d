"""Saved states, adapters and configs: damage is noticed or harmless, nothing is executed, nothing is half written."""

from __future__ import annotations

import ast
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from backbones import backbone, hmt_model, token_ids

from hmt import HMTConfig, HMTState, adapters
from hmt.adapters import load_adapter, save_adapter, select

ROOT = Path(__file__).parents[2]
RUNS_CODE = ("exec", "compile", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")


class Kind(NamedTuple):
    """One kind of file: its name in a folder, how to write number n of it, and what reading gives, to be compared."""

    name: str
    write: Callable[[Path, int], None]
    read: Callable[[Path], Any]


def plain(value: Any) -> Any:
    """Tensors as lists, so that == compares all."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    return {key: plain(x) for key, x in value.items()} if isinstance(value, dict) else value


def write_state(folder: Path, number: int) -> None:
    ids = token_ids(2, 16 * 4 + 5, seed=number)
    mask = torch.ones_like(ids)
    mask[1, 60:66] = 0
    hmt_model().read(ids, attention_mask=mask).save(folder / "state")


def read_state(folder: Path) -> Any:
    state = HMTState.load(folder / "state")
    parts = {"queue": state.queue, "recent": state.recent.ids, "open": state.open.ids, "closed": state.num_closed}
    return plain(parts | {"seen": state.open.visible(), "recent_seen": state.recent.visible()})


def write_adapter(folder: Path, number: int) -> None:
    model = hmt_model()
    select(model, "lora", rank=1)
    with torch.no_grad():
        model.memory.fill_(number)
    save_adapter(model, folder, f"base-{number}")


def write_config(folder: Path, number: int) -> None:
    HMTConfig(text_config=backbone().config, segment_length=100 + number).save_pretrained(folder)


def read_adapter(folder: Path) -> Any:
    tensors, metadata = adapters._read(folder / adapters.FILE)
    return plain(tensors), {key: metadata[key] for key in ("backbone", "settings", "lora")}


def read_config(folder: Path) -> Any:
    fields = HMTConfig.from_pretrained(folder).to_dict()
    return {key: fields[key] for key in HMTConfig().to_dict()}


KINDS = {
    "state": Kind("state", write_state, read_state),
    "adapter": Kind(adapters.FILE, write_adapter, read_adapter),
    "config": Kind("config.json", write_config, read_config),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

_executed: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if _executed is not None and event in RUNS_CODE:
        _executed.append(f"{event} {arguments!r:.200}")


@pytest.fixture(scope="module")
def audited() -> list[str]:
    """What Python reports of code that runs, from the moment a test begins to watch."""
    sys.addaudithook(_watch)
    return []


def damaged(good: bytes, number: int, draw: random.Random) -> bytes:
    """A copy with one bit flipped (first half of the calls: near the start, where headers are), or cut off."""
    data = bytearray(good)
    if number % 5 == 4:
        del data[draw.randrange(len(data)) :]
    else:
        data[draw.randrange(len(data) if number % 2 else min(len(data), 4096))] ^= 1 << draw.randrange(8)
    return bytes(data)


@every_kind
def test_every_flip_and_truncation_is_noticed_or_harmless(kind: Kind, audited: list[str], tmp_path: Path) -> None:
    global _executed
    kind.write(tmp_path, 1)
    path = tmp_path / kind.name
    good, expected, draw = path.read_bytes(), kind.read(tmp_path), random.Random(0)
    noticed = 0
    for number in range(500):
        path.write_bytes(damaged(good, number, draw))
        _executed = audited
        try:
            read = kind.read(tmp_path)
        except (ValueError, OSError):
            noticed += 1
        else:
            assert read == expected, f"damage {number} changes what is read"
        finally:
            _executed = None
    assert not audited
    assert noticed >= 450  # what is left is white space


@pytest.mark.parametrize("key", ["segment_length", "summary_source", "backbone", "lora"])
def test_changed_metadata_of_an_adapter_is_refused(key: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, 1)
    path = tmp_path / adapters.FILE
    data = path.read_bytes()
    old, new = {
        "segment_length": (b": 16,", b": 17,"),
        "summary_source": (b"current", b"durrent"),
        "backbone": (b"base-1", b"base-2"),
        "lora": (b": 32.0", b": 31.0"),
    }[key]
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(ValueError, match="metadata does not match its SHA-256"):
        load_adapter(tmp_path, backbone())


def test_an_edited_config_is_refused_until_its_digest_is_removed(tmp_path: Path) -> None:
    write_config(tmp_path, 0)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["segment_length"] = 64
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="remove the line 'sha256'"):
        HMTConfig.from_pretrained(tmp_path)
    del fields["sha256"]
    path.write_text(json.dumps(fields))
    config = HMTConfig.from_pretrained(tmp_path)
    assert config.segment_length == 64
    config.save_pretrained(tmp_path)
    assert HMTConfig.from_pretrained(tmp_path, queue_size=7).queue_size == 7
    assert not hasattr(HMTConfig.from_json_file(path), "sha256")


def test_what_older_transformers_add_to_a_config_is_no_damage(tmp_path: Path) -> None:
    write_config(tmp_path, 0)
    fields = json.loads((tmp_path / "config.json").read_text())
    config = HMTConfig.from_dict({**fields, "_commit_hash": None})
    assert config.segment_length == fields["segment_length"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def assert_old_file_stays(kind: Kind, folder: Path, others: set[str]) -> None:
    expected = kind.read(folder)
    with pytest.raises(OSError, match=r"No space left|File too large"):
        kind.write(folder, 2)
    assert set(os.listdir(folder)) == {kind.name} | others
    assert kind.read(folder) == expected


@every_kind
def test_a_full_disk_leaves_the_old_file(kind: Kind, small_disk: Path) -> None:
    kind.write(small_disk, 1)
    with (small_disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        for _ in itertools.count():
            file.write(bytes(1024))
    assert_old_file_stays(kind, small_disk, {"filler"})


@every_kind
def test_a_file_size_limit_leaves_the_old_file(kind: Kind, tmp_path: Path) -> None:
    kind.write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert_old_file_stays(kind, tmp_path, set())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@every_kind
@pytest.mark.parametrize("moment", ["before-sync", "before-rename", "any", "any", "any"])
def test_a_killed_writer_leaves_a_whole_file(
    kind: Kind, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = []
    for number in (2, 1):
        kind.write(tmp_path, number)
        contents.append(kind.read(tmp_path))
    child = os.fork()
    if child == 0:
        if moment != "any":
            setattr(*((os, "fsync", die) if moment == "before-sync" else (Path, "replace", die)))
        for number in itertools.cycle((2, 1)):
            kind.write(tmp_path, number)
    if moment == "any":
        time.sleep(random.uniform(0.05, 0.3))
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert kind.read(tmp_path) == contents[1] if moment != "any" else kind.read(tmp_path) in contents


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))


SHIPPED = [p for top in ("hmt", "hmt_kernels", "examples", "benchmarks") for p in sorted((ROOT / top).rglob("*.py"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_trusted_to_hold_code(path: Path) -> None:
    """torch.load only with weights_only=True; no pickle, eval, exec or remote code."""
    for call in calls(path):
        name, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name == "torch.load":
            assert given.get("weights_only") == "True", ast.unparse(call)
        assert name not in ("eval", "exec", "compile") and name.split(".")[0] not in ("pickle", "marshal", "dill")
        assert given.get("trust_remote_code", "False") == "False" and given.get("allow_pickle", "False") == "False"


def test_there_are_files_to_look_at() -> None:
    assert len(SHIPPED) > 60 and any("torch.load" in path.read_text(encoding="utf-8") for path in SHIPPED)
