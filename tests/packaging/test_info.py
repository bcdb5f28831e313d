"""python -m hmt_kernels.info."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
import transformers

import hmt_kernels
from hmt_kernels import _C, dispatch, info


def test_command_prints_the_report():
    result = subprocess.run([sys.executable, "-m", "hmt_kernels.info"], capture_output=True, text=True, check=True)
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line and " " in line)
    assert rows["hmt-kernels"] == hmt_kernels.__version__
    assert rows["torch"] == torch.__version__
    assert rows["transformers"] == transformers.__version__
    assert rows["python"].startswith(platform.python_version())


def test_names_the_instruction_set_of_the_cpu_kernels(monkeypatch):
    assert f"CPU kernels ({_C.cpu_isa()})" in info.native_module()
    monkeypatch.setenv("HMT_KERNELS_CPU_ISA", "sse9")
    assert "CPU kernels not usable: HMT_KERNELS_CPU_ISA must be one of" in info.native_module()


@pytest.mark.parametrize("op_name", dispatch.KNOWN)
def test_lists_every_implementation_with_its_reason(op_name, monkeypatch):
    monkeypatch.setitem(dispatch._missing, (op_name, "cuda"), "it rains")
    lines = info.report().splitlines()
    table = lines[lines.index(op_name) + 1 :][: len(dispatch.KNOWN[op_name])]
    assert [line.split()[0] for line in table] == list(dispatch.KNOWN[op_name])
    assert table[0].split() == ["reference", "usable"]
    assert [line.split(maxsplit=1)[1] for line in table if line.split()[0] == "cuda"] == ["not usable: it rains"]


@pytest.mark.parametrize("name", ["tcmalloc", "jemalloc", "mimalloc"])
def test_names_an_allocator_that_is_loaded(name, tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(f"7f00-7f01 r-xp 00000000 08:01 42   /usr/lib/x86_64-linux-gnu/lib{name}_minimal.so.4.5.10\n")
    assert info.allocator(maps) == name


def test_names_the_c_library_where_no_allocator_is_loaded(tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    assert info.allocator(maps) == "unknown"
    maps.write_text("7f00-7f01 r-xp 00000000 08:01 42   /usr/lib/x86_64-linux-gnu/libc.so.6\n")
    monkeypatch.setattr(info.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert info.allocator(maps) == "glibc 2.36"
    assert f"allocator     {info.allocator()}" in info.report().splitlines()


def test_says_when_a_package_is_not_installed():
    assert info.version("no-such-package") == "not installed"
    assert info.version("torch") == torch.__version__


@pytest.mark.parametrize(("library", "expected"), [(None, "unknown"), (13000, "13.0"), (12080, "12.8")])
def test_says_what_the_driver_knows(library, expected, monkeypatch):
    class Driver:
        def __init__(self, name):
            if library is None:
                raise OSError(f"{name}: cannot open shared object file")

        def cuDriverGetVersion(self, pointer):
            pointer._obj.value = library

    monkeypatch.setattr(info.ctypes, "CDLL", Driver)
    assert info.driver() == expected
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert info.cuda() == f"runtime 13.0, driver {expected}"
