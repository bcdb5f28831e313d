"""python -m hmt_kernels.info: versions, devices, and which implementation of each operator is usable here."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
from pathlib import Path

import torch

import hmt_kernels
from hmt_kernels.dispatch import KNOWN, implementations

WIDTH = 14


def version(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cuda() -> str:
    """The versions of CUDA that PyTorch was built for and that the driver offers."""
    if torch.version.cuda is None:
        return "none: this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return f"runtime {torch.version.cuda}, no usable driver or device"
    return f"runtime {torch.version.cuda}, driver {driver()}"


def driver() -> str:
    """The newest version of CUDA that the driver knows."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return "unknown"
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def devices() -> list[str]:
    """The CPU with its threads, then every CUDA device with its compute capability and memory."""
    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        found.append(f"cuda:{index}: {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB")
    return found


def allocator(maps: Path = Path("/proc/self/maps")) -> str:
    """What allocates memory on the CPU: tcmalloc, jemalloc or mimalloc where it is loaded, else the C library."""
    try:
        mapped = maps.read_text()
    except OSError:  # not Linux
        return "unknown"
    loaded = [name for name in ("tcmalloc", "jemalloc", "mimalloc") if f"/lib{name}" in mapped]
    return loaded[0] if loaded else " ".join(platform.libc_ver()).strip() or "unknown"


def native_module() -> str:
    """What the native module holds, or why it is not there."""
    try:
        from hmt_kernels import _C
    except ImportError as error:
        return f"not there: {error} (pip install builds it where it finds a C++ compiler)"
    try:
        cpu = f"CPU kernels ({_C.cpu_isa()})"
    except ValueError as error:  # from HMT_KERNELS_CPU_ISA
        cpu = f"CPU kernels not usable: {error}"
    return f"{cpu}, {'CUDA kernels' if hasattr(_C, 'memory_recall_cuda_fwd') else 'built without CUDA kernels'}"


def report() -> str:
    """The whole report as text."""
    rows = [
        ("hmt-kernels", hmt_kernels.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, version(name)) for name in ("torch", "triton", "transformers")),
        ("CUDA", cuda()),
        *(("device", device) for device in devices()),
        ("allocator", allocator()),
        ("native module", native_module()),
    ]
    lines = [f"{name:{WIDTH}}{value}" for name, value in rows]
    for op_name in KNOWN:
        lines += ["", op_name]
        for name, reason in implementations(op_name).items():
            lines.append(f"  {name:{WIDTH - 2}}{'usable' if reason is None else f'not usable: {reason}'}")
    return "\n".join(lines)


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
