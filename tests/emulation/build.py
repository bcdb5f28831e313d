"""Compiles the CUDA sources for the CPU: as a Python module, and as a program under each sanitizer."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
RECALL_KERNELS = ("recall_fwd.cu", "recall_bwd.cu")
KERNELS = (*RECALL_KERNELS, "attention_rotate.cu", "attention_fwd.cu", "attention_bwd.cu")
COMPILER = os.environ.get("CXX") or shutil.which("g++") or "c++"

# products and sums are not fused where only some of the builds below would
COMMON = [
    "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DHMT_CUDA_EMULATION",
    f"-I{HERE}",
]  # fmt: skip
FLAGS = {
    "plain": ["-O1"],
    # every report ends the program
    "address-undefined": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}


def build_module(folder: Path) -> ModuleType:
    """The bindings over the emulated kernels, imported; processes that share the folder build them once."""
    flags = ["-O1", "-fPIC", "-fvisibility=hidden"]
    # pybind11 is slow to compile, and what it compiles to here need not be fast
    binding_flags = ["-O0", *flags[1:], f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sources = {CUDA / name: flags for name in KERNELS}
    sources = {HERE / "module.cpp": binding_flags} | sources  # what takes longest comes first
    library = folder / "hmt_cuda_emulated.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(folder, library.name, sources, ["-shared"], CUDA)
    spec = importlib.util.spec_from_file_location("hmt_cuda_emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_driver(folder: Path, kind: str, sources: Path = CUDA, forward_only: bool = False) -> Path:
    """tests/emulation/driver.cpp with the recall kernels of a folder, a program; `kind` is one of FLAGS."""
    kernels = RECALL_KERNELS[:1] if forward_only else RECALL_KERNELS
    return _build_program(folder, kind, "driver.cpp", sources, kernels, forward_only)


def build_attention_driver(folder: Path, kind: str, sources: Path = CUDA, forward_only: bool = False) -> Path:
    """The same for tests/emulation/driver_attention.cpp, which includes its kernels."""
    return _build_program(folder, kind, "driver_attention.cpp", sources, (), forward_only)


def _build_program(
    folder: Path, kind: str, driver: str, sources: Path, kernels: tuple[str, ...], forward_only: bool
) -> Path:
    flags = FLAGS[kind] + (["-DFORWARD_ONLY"] if forward_only else [])
    files = {HERE / driver: flags} | {sources / name: flags for name in kernels}
    return _build(folder, f"driver-{kind}", files, flags, sources)


def run_driver(driver: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [str(driver), *arguments], capture_output=True, text=True, timeout=timeout, env=os.environ | options
    )


def bits_of(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """By case, a digest of the results that all orders of a driver agreed on."""
    return dict(re.findall(r"case (\S+): \d+ orders agree on (\w+)", result.stdout))


def _build(folder: Path, name: str, sources: dict[Path, list[str]], link_flags: list[str], headers: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    objects = {source: folder / f"{name}-{source.stem}.o" for source in sources}

    def compile_one(source: Path) -> None:
        command = [COMPILER, "-x", "c++", *COMMON, f"-I{headers}", *sources[source], "-c", str(source)]
        _run([*command, "-o", str(objects[source])])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources))
    _run([COMPILER, *map(str, objects.values()), *link_flags, "-o", str(folder / name)])
    return folder / name


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
