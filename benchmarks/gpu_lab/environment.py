"""Prints what the figures of a GPU lab belong to: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import subprocess

import torch

from benchmarks.results import commit, cpu_name


def main() -> None:
    versions = [f"{name} {installed(name)}" for name in ("torch", "triton", "transformers", "pybind11", "numpy")]
    print(f"- {datetime.date.today().isoformat()}, commit {commit()}")
    print(f"- GPU: {gpu()}")
    print(f"- CPU: {cpu_name()}, {torch.get_num_threads()} threads")
    print(f"- Python {platform.python_version()}, {', '.join(versions)}, nvcc {nvcc()}")


def installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    properties = torch.cuda.get_device_properties(0)
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors, {memory:.0f} GiB, driver {driver}"


def nvcc() -> str:
    return output_of("nvcc", "--version").rpartition("release ")[2].partition(",")[0]


def output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "absent"
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
