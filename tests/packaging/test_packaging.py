"""The build's choices, what a wheel holds, and the package without its optional parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("csrc", "hmt", "hmt_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")


class Built(NamedTuple):
    wheel: Path
    isolated: bool


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HMT_", "CUDA_", "TORCH_CUDA"))}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**env, **environment}, capture_output=True, text=True, timeout=900
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
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A wheel for CPUs only, built from scratch; isolated, if pip can get what the build requires."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", target, "."]
    settings = {"HMT_KERNELS_SKIP_CUDA": "1", "DEBUG": "1"}  # the tree has the optimised module, which takes longer
    isolated = run(*command, "--retries=0", cwd=checkout, **settings)
    offline = isolated.returncode != 0 and "No matching distribution found for" in isolated.stdout + isolated.stderr
    result = run(*command, "--no-build-isolation", cwd=checkout, **settings) if offline else isolated
    assert result.returncode == 0, result.stdout + result.stderr
    assert "HMT_KERNELS_SKIP_CUDA is set: building the native module for CPUs only" in result.stdout + result.stderr
    return Built(next(target.glob("*.whl")), not offline)


@pytest.fixture(scope="module")
def wheel(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def fresh(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that holds the wheel, and sees what it depends on, but no editable install."""
    folder = tmp_path_factory.mktemp("fresh")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    packages = next((folder / "lib").glob("python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", packages, built.wheel]
    result = run(*install)
    assert result.returncode == 0, result.stdout + result.stderr
    # a path in a .pth file is searched, but the .pth files there, of an editable install, are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def test_wheel_is_built_in_isolation(built: Built) -> None:
    if not built.isolated:
        pytest.skip("pip could not get setuptools, pybind11 and ninja: built with those that are installed")
    assert built.wheel.name.startswith("hmt_kernels-")


TEST_OF_THE_PLACE = """
import hmt, hmt_kernels.info

def test_the_wheel_is_tested(capsys):
    assert all(module.__file__.startswith({folder!r}) for module in (hmt, hmt_kernels))
    hmt_kernels.info.main()
    assert "  cpu         usable" in capsys.readouterr().out
"""


def test_fresh_environment_passes_tests(fresh: Path, tmp_path: Path) -> None:
    """Tests of every layer, copied beside nothing of the tree, against the installed wheel."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npythonpath = tests tests/hmt\naddopts = --import-mode=importlib -p no:cacheprovider\n"
    )
    place = tmp_path / "tests" / "kernels" / "test_place.py"
    place.write_text(TEST_OF_THE_PLACE.format(folder=str(fresh.parents[1])))
    files = (
        "kernels/test_place.py", "kernels/test_memory_recall.py", "kernels/test_segment_attention_errors.py",
        "hmt/test_state.py",
    )  # fmt: skip
    result = run(fresh, "-m", "pytest", "-q", *(f"tests/{name}" for name in files), cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-5000:]


def test_wheel_holds_the_packages_and_the_native_module(wheel: Path) -> None:
    names = {path.relative_to(wheel).parts[0] for path in wheel.rglob("*") if path.is_file()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"hmt", "hmt_kernels"}
    assert len(list(wheel.glob("hmt_kernels/_C.*.so"))) == 1
    assert (wheel / "hmt" / "compat" / "wrapper.py").is_file()
    assert (wheel / "hmt_kernels" / "segment_attention" / "sdpa.py").is_file()
    assert all((wheel / package / "py.typed").is_file() for package in ("hmt", "hmt_kernels"))
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
        (["triton"], "memory_recall: cpu"),
        (["hmt_kernels._C"], "memory_recall: reference"),
        (["triton", "hmt_kernels._C"], "memory_recall: reference"),
    ],
    ids=["triton", "native-module", "both"],
)
def test_works_without(absent: list[str], expected: str) -> None:
    """Without triton or the native module all else works, a model too, and info says what is missing."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import torch, hmt, hmt_kernels.info; "
        "from transformers import LlamaConfig, LlamaForCausalLM; "
        "q, m = torch.randn(2, 1, 64), torch.randn(2, 9, 64); "
        "print(hmt_kernels.explain('memory_recall', q, m, softmax_scale=1.0)); hmt_kernels.info.main(); "
        "config = LlamaConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, "
        "intermediate_size=64); "
        "model = hmt.HMTForCausalLM.from_backbone(LlamaForCausalLM(config), segment_length=8, num_sensory=2); "
        "ids = torch.arange(40)[None]; model(ids, labels=ids).loss.backward(); "
        "print('memories', model.read(ids).num_valid, model.memory.grad.isfinite().all().item())"
    )
    result = run(sys.executable, "-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout and "not usable" in result.stdout
    assert "memories 5 True" in result.stdout


def test_info_command() -> None:
    result = run(sys.executable, "-m", "hmt_kernels.info", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    for word in ("torch", "transformers", "native module CPU kernels", "memory_recall", "segment_attention"):
        assert word in result.stdout
    assert "  cpu         usable" in result.stdout
    assert "  sdpa        usable" in result.stdout
