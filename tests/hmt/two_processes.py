"""Run a script as two processes at once: python SCRIPT FOLDER RANK SIZE."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import hmt

HERE = Path(__file__).parent
SIZE = 2


def run(script: str, folder: Path) -> None:
    """Both processes to their end; fails with what they printed."""
    # the same hmt as here, installed or not
    paths = [str(HERE), str(HERE.parent), str(Path(hmt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / script), str(folder)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(rank), str(SIZE)], env=environment, **output) for rank in range(SIZE)]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


def join_group(folder: str, rank: int, size: int) -> None:
    """What torchrun would set; accelerate asks for an address, but finds this group, which needs none."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = dist.FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
