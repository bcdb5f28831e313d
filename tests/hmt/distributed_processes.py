"""python distributed_processes.py FOLDER RANK SIZE: one of the processes that test_distributed.py compares with one."""

from __future__ import annotations

import sys
from pathlib import Path

import distributed_step
import distributed_training
import torch.distributed as dist
from two_processes import join_group


def main(folder: str, rank: int, size: int) -> None:
    join_group(folder, rank, size)
    distributed_step.run(Path(folder), rank, size)
    distributed_training.run(Path(folder), rank, size)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
