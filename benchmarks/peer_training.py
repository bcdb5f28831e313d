"""HMT-pytorch's own training script on a CPU, with its own classes or, one import changed, with those of hmt.compat.

    python -m benchmarks.peer_training FOLDER CLASSES

runs hmt_src/main.py of the checkout that HMT_PYTORCH names, on the tiny model and the texts in FOLDER (`run` is what
starts it). Nothing that a loss depends on is replaced. What is: .cuda() does nothing, metrics and the reader of
DeepSpeed checkpoints are stand-ins, and accelerate's log and prepare are watched, to note each step's loss and to start
both kinds of classes from the same weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate.utils
import torch
from accelerate import Accelerator

from benchmarks import peer

THEIRS, OURS = "HMT-pytorch", "hmt.compat"
IMPORT = "from modeling_rmt.language_modeling import MemoryCell, RecurrentWrapper"
STEPS = 20
ARGUMENTS = {
    "batch_size": 2, "segment_length": 32, "num_sensory": 4, "bptt_depth": 4, "mem_recall_hidden_dim": 64,
    "num_seg_save": 8, "test_length": 80, "training_step": STEPS, "eval_step": 2, "test_step": 2,
}  # fmt: skip


def run(folder: Path, classes: str, **arguments: object) -> dict[str, list[float]]:
    """Losses of every training step, of the evaluation and of the tests, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peer_training", str(folder), classes]
    command += [f"--{name}={value}" for name, value in {**ARGUMENTS, **arguments}.items()]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "ACCELERATE_USE_CPU": "1",
        "MPLBACKEND": "agg",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"the script failed with the classes of {classes}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return json.loads((folder / f"{classes}.json").read_text())


def script_with(classes: str, folder: Path) -> Path:
    """A copy of the script that imports MemoryCell and RecurrentWrapper as `classes` has them.

    Raises:
        ValueError: the script does not import them as it did when this was written.
    """
    source = (Path(os.environ["HMT_PYTORCH"]) / "hmt_src" / "main.py").read_text()
    if source.count(IMPORT) != 1:
        raise ValueError(f"hmt_src/main.py must hold the line {IMPORT!r} once, got it {source.count(IMPORT)} times")
    if classes == OURS:
        source = source.replace(IMPORT, "from hmt.compat import MemoryCell, RecurrentWrapper")
    path = folder / classes / "script" / "main.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


@contextlib.contextmanager
def watched(folder: Path, classes: str) -> Iterator[dict[str, list[float]]]:
    """Notes what the script logs; the weights that it starts from are HMT-pytorch's, for both kinds of classes."""
    seen: dict[str, list[float]] = {}
    prepare, start = Accelerator.prepare, folder / "start.pt"

    def log(self: Accelerator, values: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            seen.setdefault(name, []).append(float(value))

    def prepare_same(self: Accelerator, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(model).__module__.startswith("hmt.compat") != (classes == OURS):
            raise RuntimeError(f"the script trains a {type(model).__module__}.{type(model).__name__}")
        if classes == THEIRS:
            torch.save(model.state_dict(), start)
        model.load_state_dict(torch.load(start, weights_only=True))
        return prepare(self, model, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Accelerator, "log", log))
        stack.enter_context(mock.patch.object(Accelerator, "prepare", prepare_same))
        for name in ("DummyOptim", "DummyScheduler"):  # there with DeepSpeed only, and used with it only
            stack.enter_context(mock.patch.object(accelerate.utils, name, None, create=True))
        yield seen


def main(folder: Path, classes: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    script = script_with(classes, folder)
    sys.path.insert(0, str(Path(os.environ["HMT_PYTORCH"]).resolve()))
    os.chdir(script.parent)  # it writes a log where it runs
    sys.argv = [str(script), f"--task_name={folder / 'texts'}", f"--model_name={folder / 'model'}", *arguments]
    with peer.stand_ins(), peer.cuda_calls_allowed(), watched(folder, classes) as seen:
        runpy.run_path(str(script), run_name="__main__")
    (folder / f"{classes}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3:])
