"""The build's choices, what a wheel holds, and the package without its optional parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("csrc", "hmt", "hmt_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HMT_", "CUDA_", "TORCH_CUDA"))}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**env, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a build reads, and nothing that an earlier build left."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel for CPUs only, built from scratch and unpacked."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v", "-w", target, "."]
    result = run(*command, cwd=checkout, HMT_KERNELS_SKIP_CUDA="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "HMT_KERNELS_SKIP_CUDA is set: building the native module for CPUs only" in result.stdout + result.stderr
    with zipfile.ZipFile(next(target.glob("*.whl"))) as archive:
        archive.extractall(target / "unpacked")
    return target / "unpacked"


def test_wheel_holds_the_packages_and_the_native_module(wheel: Path) -> None:
    names = {path.relative_to(wheel).parts[0] for path in wheel.rglob("*") if path.is_file()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"hmt", "hmt_kernels"}
    assert len(list(wheel.glob("hmt_kernels/_C.*.so"))) == 1
    assert (wheel / "hmt" / "compat" / "wrapper.py").is_file()
    assert (wheel / "hmt_kernels" / "segment_attention" / "sdpa.py").is_file()
    metadata = next(wheel.glob("*.dist-info/METADATA")).read_text()
    assert "Requires-Dist: torch>=2.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "hmt = hmt.cli:main" in next(wheel.glob("*.dist-info/entry_points.txt")).read_text()


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf, which comes with the compiler on Linux")
@pytest.mark.parametrize("which", ["wheel", "tree"])
def test_native_module_links_neither_torch_nor_cuda(which: str, wheel: Path) -> None:
    folder = wheel if which == "wheel" else ROOT
    module = next((folder / "hmt_kernels").glob("_C.*.so"))
    needed = [line for line in run("readelf", "-d", module).stdout.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if any(name in line for name in ("torch", "c10", "cudart", "libcuda"))]


def test_wheel_runs_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import torch, hmt_kernels; q, m = torch.randn(2, 1, 64), torch.randn(2, 9, 64); "
        "print(hmt_kernels.__file__); print(hmt_kernels.explain('memory_recall', q, m, softmax_scale=1.0)); "
        "print(hmt_kernels.memory_recall(q, m, softmax_scale=1.0).recalled.shape)"
    )
    result = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(wheel))
    assert result.returncode == 0, result.stderr
    assert str(wheel) in result.stdout
    assert "memory_recall: cpu" in result.stdout
    assert "torch.Size([2, 1, 64])" in result.stdout


def tools_only(folder: Path, *names: str) -> str:
    """A PATH with just the named programs, so that no compiler is found by chance."""
    for name in names:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return str(folder)


@pytest.mark.parametrize(
    ("environment", "tools", "status", "message"),
    [
        ({}, [], 0, "no C++ compiler found: a pure Python wheel"),
        ({"HMT_KERNELS_FORCE_CUDA": "1"}, [], 1, "there is no C++ compiler"),
        ({"HMT_KERNELS_FORCE_CUDA": "1", "HMT_KERNELS_SKIP_CUDA": "1"}, ["g++"], 1, "both set"),
        ({"CXX": "no-such-compiler"}, [], 1, "CXX is set to 'no-such-compiler'"),
    ],
    ids=["no-compiler", "force-without-compiler", "skip-and-force", "wrong-compiler"],
)
def test_choices_of_the_build(environment, tools, status, message, checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    environment = {"PATH": tools_only(tmp_path / "bin", *tools), **environment}
    result = run(sys.executable, "setup.py", "build", "--build-base", tmp_path / "out", cwd=checkout, **environment)
    assert message in result.stderr
    assert (result.returncode != 0) == (status != 0), result.stderr
    if status == 0:
        assert not list((tmp_path / "out").rglob("*.so"))
        assert list((tmp_path / "out").rglob("hmt_kernels/__init__.py"))


def test_forced_cuda_without_nvcc_fails(checkout: Path, tmp_path: Path) -> None:
    setup = (checkout / "setup.py").read_text()
    assert "/usr/local/cuda/bin" in setup
    # the folder where a build always looks must not hold the nvcc of the machine that runs this test
    (checkout / "without_cuda.py").write_text(setup.replace("/usr/local/cuda/bin", "/no/cuda/bin"))
    path = tools_only(tmp_path, "g++")
    result = run(sys.executable, "without_cuda.py", "build", cwd=checkout, PATH=path, HMT_KERNELS_FORCE_CUDA="1")
    assert result.returncode != 0
    assert "nvcc was not found: set CUDA_HOME or extend PATH" in result.stderr


def test_a_compile_error_fails_the_build(checkout: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkout, broken, ignore=shutil.ignore_patterns("cpu", "cuda"))
    (broken / "csrc" / "bindings.cpp").write_text("int f() { return undeclared; }\n")
    command = [sys.executable, "setup.py", "build", "--build-base", tmp_path / "out"]
    result = run(*command, cwd=broken, HMT_KERNELS_SKIP_CUDA="1")
    assert result.returncode != 0
    assert "undeclared" in result.stdout + result.stderr
    assert "did not compile" in result.stderr


@pytest.mark.parametrize(
    ("absent", "expected"),
    [
        ("triton", "memory_recall: cpu"),
        ("hmt_kernels._C", "memory_recall: reference"),
    ],
)
def test_works_without(absent: str, expected: str, tmp_path: Path) -> None:
    """Without triton or the native module everything else still works, and info says what is missing."""
    code = (
        f"import sys; sys.modules[{absent!r}] = None; import torch, hmt, hmt_kernels, hmt_kernels.info; "
        "q, m = torch.randn(2, 1, 64), torch.randn(2, 9, 64); "
        "hmt_kernels.memory_recall(q, m, softmax_scale=1.0); "
        "hmt_kernels.segment_attention(q[:, None], m[:, None], m[:, None]); "
        "print(hmt_kernels.explain('memory_recall', q, m, softmax_scale=1.0)); hmt_kernels.info.main()"
    )
    result = run(sys.executable, "-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
    assert "not usable" in result.stdout


def test_info_command() -> None:
    result = run(sys.executable, "-m", "hmt_kernels.info", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    for word in ("torch", "transformers", "native module CPU kernels", "memory_recall", "segment_attention"):
        assert word in result.stdout
    assert "  cpu         usable" in result.stdout
    assert "  sdpa        usable" in result.stdout
