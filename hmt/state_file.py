"""States on disk: safetensors with a SHA-256 per tensor and one over all metadata, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hmt.state import HMTState
from hmt.tokens import Tokens

FORMAT = "hmt-state"
VERSION = "1"
DIGEST = "sha256"  # of all other metadata
MADE_WITH = "made_with"
OPTIONAL = ("queue", "recent.mask", "open.mask")


def save_state(state: HMTState, path: str | Path, made_with: Mapping[str, Any] | None = None) -> None:
    """Write a state; an older file of that name stays as it is until the new one is complete.

    Cached keys and values are left out, they are made again on use. `made_with`, what JSON can hold, is kept with it:
    what read the text, and how.
    """
    named = {
        "queue": state.queue,
        "recent.ids": state.recent.ids,
        "recent.mask": state.recent.mask,
        "open.ids": state.open.ids,
        "open.mask": state.open.mask,
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in named.items() if t is not None}
    metadata = {"format": FORMAT, "version": VERSION, "num_closed": str(state.num_closed)}
    if made_with is not None:
        metadata[MADE_WITH] = json.dumps(made_with)
    metadata |= {f"{DIGEST}.{name}": digest_of(name, tensor) for name, tensor in tensors.items()}
    metadata[DIGEST] = _digest_of_metadata(metadata)
    write_whole(Path(path), save(tensors, metadata))


def load_state(path: str | Path, device: torch.device | str = "cpu") -> HMTState:
    """Read a state that `save_state` has written; nothing in the file is ever executed.

    Raises:
        ValueError: a file that is damaged, of another kind or of a later version, with the reason.
        OSError: no such file.
    """
    path = Path(path)
    with _opened(path) as (file, metadata):
        # copies, which nothing that happens to the file later can change
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    expected = {key.removeprefix(f"{DIGEST}.") for key in metadata if key.startswith(f"{DIGEST}.")}
    if expected != set(tensors):
        raise ValueError(f"{str(path)!r} is damaged: it should hold {sorted(expected)}, but holds {sorted(tensors)}")
    for name, tensor in tensors.items():
        if digest_of(name, tensor) != metadata[f"{DIGEST}.{name}"]:
            raise ValueError(f"{str(path)!r} is damaged: tensor {name!r} does not match its SHA-256")
    return _state(path, tensors, int(metadata["num_closed"])).to(device)


def made_with(path: str | Path) -> dict[str, Any]:
    """What `save_state` was told of how a state came about, {} where that was nothing; raises as `load_state` does."""
    with _opened(Path(path)) as (_, metadata):
        found = json.loads(metadata.get(MADE_WITH, "{}"))
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds no HMT state: {MADE_WITH} is {found!r:.80}")
    return found


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A file that holds a state, and its metadata, which are what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            _check_metadata(path, metadata)
            yield file, metadata
    except (SafetensorError, RuntimeError, TypeError, OverflowError, UnicodeError) as error:
        raise ValueError(f"{str(path)!r} is damaged or no safetensors file: {error}") from error


def _check_metadata(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is a safetensors file, but holds no HMT state (format {FORMAT!r})")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} is an HMT state of format version {metadata.get('version')!r}, this hmt reads {VERSION!r}"
        )
    if _digest_of_metadata(metadata) != metadata.get(DIGEST):
        raise ValueError(f"{str(path)!r} is damaged: its metadata does not match its SHA-256")


def _state(path: Path, tensors: dict[str, Tensor], num_closed: int) -> HMTState:
    """The state of tensors that are what was written; they still might have been written by something else."""
    missing = {"recent.ids", "open.ids"} - set(tensors)
    unknown = set(tensors) - {"recent.ids", "open.ids", *OPTIONAL}
    if missing or unknown:
        raise ValueError(f"{str(path)!r} holds no HMT state: missing {sorted(missing)}, unknown {sorted(unknown)}")
    rows = tensors["open.ids"].shape[:1]
    for name, tensor in tensors.items():
        kind = {"queue": (3, None), "ids": (2, torch.int64), "mask": (2, torch.bool)}[name.rpartition(".")[2]]
        if tensor.dim() != kind[0] or (kind[1] or tensor.dtype) != tensor.dtype or tensor.shape[:1] != rows:
            raise ValueError(f"{str(path)!r} holds no HMT state: {name} is {tensor.dtype} {list(tensor.shape)}")
    queue = tensors.get("queue")
    recent, opened = (Tokens(tensors[f"{x}.ids"], tensors.get(f"{x}.mask")) for x in ("recent", "open"))
    return HMTState(queue, num_closed, recent, opened)


def digest_of_fields(fields: Mapping[str, Any]) -> str:
    """SHA-256 of what JSON can hold, whatever its layout in a file."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def digest_of(name: str, tensor: Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor: its name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest_of_metadata(metadata: dict[str, str]) -> str:
    text = "\n".join(f"{key} {value}" for key, value in sorted(metadata.items()) if key != DIGEST)
    return hashlib.sha256(text.encode()).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Put data into a file that is complete at any moment."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def check_folder(path: str | Path) -> None:
    """Raises ValueError where the file `path` could not be written because there is no folder for it."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"the file to write must be in a folder that is there and be none itself, got {str(path)!r}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is there in the end takes the place of `path`, on disk and all at once."""
    target = Path(os.path.realpath(path))  # of a link, where it leads
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)  # what the user knows it by
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
