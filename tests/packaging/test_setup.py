"""The functions of setup.py: which compilers they take, what they tell them, what they refuse."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
FLAGS = ("HMT_KERNELS_SKIP_CUDA", "HMT_KERNELS_FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "DEBUG", "CXX")


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    for name in (*FLAGS, "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def programs(monkeypatch):
    """The programs that setup.py finds, as name -> path: whatever a test puts in."""
    found = {"g++": "/bin/g++"}
    monkeypatch.setattr(shutil, "which", lambda name, path=None: found.get(name))
    return found


@pytest.fixture
def given(monkeypatch):
    """What setup.py hands to setuptools, which then does nothing."""
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: arguments.update(kwargs))
    return arguments


@pytest.fixture
def load(given):
    """Executes setup.py and returns it as a module."""

    def execute():
        spec = importlib.util.spec_from_file_location("hmt_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return execute


def test_takes_nvcc_where_there_is_one(load, programs, monkeypatch):
    assert load().find_nvcc() is None
    programs["nvcc"] = "/cuda/bin/nvcc"
    assert load().find_nvcc() == "/cuda/bin/nvcc"
    monkeypatch.setenv("HMT_KERNELS_SKIP_CUDA", "1")
    assert load().find_nvcc() is None
    monkeypatch.setenv("HMT_KERNELS_SKIP_CUDA", "0")
    assert load().find_nvcc() == "/cuda/bin/nvcc"


def test_prefers_cuda_home_to_the_path(load, monkeypatch, tmp_path):
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").touch(mode=0o755)
    module = load()
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert module.find_nvcc() == str(tmp_path / "path" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert module.find_nvcc() == str(tmp_path / "home" / "bin" / "nvcc")


def test_force_cuda_fails_where_it_cannot_be(load, programs, monkeypatch):
    module = load()
    monkeypatch.setenv("HMT_KERNELS_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="HMT_KERNELS_FORCE_CUDA is set, but nvcc was not found"):
        module.find_nvcc()
    monkeypatch.setenv("HMT_KERNELS_SKIP_CUDA", "1")
    with pytest.raises(SystemExit, match="are both set"):
        module.find_nvcc()
    programs.clear()
    with pytest.raises(SystemExit, match=r"there is no C\+\+ compiler"):
        load()


def test_without_a_compiler_there_is_no_extension(load, programs, given):
    programs.clear()
    load()
    assert "ext_modules" not in given
    programs["clang++"] = "/bin/clang++"
    load()
    assert [extension.name for extension in given["ext_modules"]] == ["hmt_kernels._C"]


def test_wrong_cxx_is_refused(load, programs, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="CXX is set to 'no-such-compiler'"):
        load()


@pytest.mark.parametrize(
    ("architectures", "targets"),
    [
        ("", ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90,code=compute_90"]),
        ("8.6", ["compute_86,code=sm_86"]),
        ("8.0 9.0a+PTX", ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90a,code=compute_90a"]),
        ("8.0;12.0f", ["compute_80,code=sm_80", "compute_120f,code=sm_120f"]),
    ],
    ids=["default", "one", "ptx", "family"],
)
def test_cuda_architectures(architectures, targets, load, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    assert load().cuda_targets() == [f"-gencode=arch={target}" for target in targets]


def test_unknown_cuda_architecture_is_refused(load, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(SystemExit, match="got 'Hopper'"):
        load().cuda_targets()


def test_ninja_file(load, monkeypatch):
    module = load()
    text = module.ninja_file(Path("/a b/_C.so"), "g++", None)
    assert "-O3" in text
    assert "-Wall -Wextra -Werror" in text
    assert "-march" not in text
    assert "cuda" not in text
    assert "build /a$ b/_C.so: link" in text
    for source in (*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")):
        assert f"{source.name}.o: cpp {source}" in text
    monkeypatch.setenv("DEBUG", "1")
    text = module.ninja_file(Path("_C.so"), "g++", "/cuda/bin/nvcc")
    assert "-O0 -g" in text
    assert "-cudart=static" in text
    assert "-DHMT_WITH_CUDA" in text
    for source in ROOT.glob("csrc/cuda/*.cu"):
        assert f"{source.name}.o: cu {source}" in text
