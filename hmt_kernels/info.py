"""python -m hmt_kernels.info: versions, devices, and which implementation of each operator is usable here."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from hmt_kernels.dispatch import KNOWN, implementations

PACKAGES = ("hmt-kernels", "torch", "triton", "transformers")


def version(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def native_module() -> str:
    """What the native module holds, or why it is not there."""
    try:
        from hmt_kernels import _C
    except ImportError as error:
        return f"not available: {error} (pip install builds it where a C++ compiler is found)"
    parts = [f"CPU kernels ({_C.cpu_isa()})" if hasattr(_C, "cpu_isa") else "no CPU kernels"]
    parts.append("CUDA kernels" if hasattr(_C, "memory_recall_cuda_fwd") else "no CUDA kernels (built without nvcc)")
    return ", ".join(parts)


def devices() -> list[str]:
    """The CPU with its threads, then every CUDA device with its compute capability and memory."""
    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        found.append(f"cuda:{index}: {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB")
    return found


def report() -> str:
    """The whole report as text."""
    lines = [f"{name:14}{version(name)}" for name in PACKAGES]
    lines += [f"{'python':14}{platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{'CUDA runtime':14}{torch.version.cuda or 'none: torch is a CPU build'}"]
    lines += [f"{'device':14}{device}" for device in devices()]
    lines += [f"{'native module':14}{native_module()}"]
    for op_name in KNOWN:
        lines += ["", op_name]
        for name, reason in implementations(op_name).items():
            lines.append(f"  {name:12}{'usable' if reason is None else f'not usable: {reason}'}")
    return "\n".join(lines)


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
