"""Builds the native module hmt_kernels._C from csrc/ with pybind11 and ninja; it links neither torch nor libcudart.so.

Environment:
  HMT_KERNELS_SKIP_CUDA=1   leave the CUDA kernels out even if nvcc is found
  HMT_KERNELS_FORCE_CUDA=1  fail if nvcc is not found
  TORCH_CUDA_ARCH_LIST      compute capabilities as PyTorch writes them, for example "8.0;9.0a+PTX"
  MAX_JOBS                  compile so many files at a time
  DEBUG=1                   debug symbols, no optimisation
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

CSRC = (Path(__file__).parent / "csrc").resolve()
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# Machine code for the A100 and the H100, and PTX that later cards compile when the module is loaded.
DEFAULT_TARGETS = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]


def flag(name):
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def say(text):
    print(f"hmt-kernels: {text}", file=sys.stderr, flush=True)


def find_compiler():
    """The C++ compiler, or None when there is none."""
    if chosen := os.environ.get("CXX"):
        return shutil.which(chosen) or sys.exit(f"hmt-kernels: CXX is set to {chosen!r}, which is not a program")
    return shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def find_nvcc():
    """The CUDA compiler, or None when there is none or it is not wanted."""
    skip, force = flag("HMT_KERNELS_SKIP_CUDA"), flag("HMT_KERNELS_FORCE_CUDA")
    if skip and force:
        sys.exit("hmt-kernels: HMT_KERNELS_SKIP_CUDA and HMT_KERNELS_FORCE_CUDA are both set: unset one of them")
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    folders += [*os.get_exec_path(), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))
    if force and nvcc is None:
        sys.exit("hmt-kernels: HMT_KERNELS_FORCE_CUDA is set, but nvcc was not found: set CUDA_HOME or extend PATH")
    return None if skip else nvcc


def cuda_targets():
    """nvcc's -gencode arguments; as in PyTorch, "9.0+PTX" asks for machine code and PTX."""
    targets = []
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split():
        number = entry.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            sys.exit(f'hmt-kernels: TORCH_CUDA_ARCH_LIST must look like "8.0;9.0a+PTX", got {entry!r}')
        targets.append(f"arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            targets.append(f"arch=compute_{number},code=compute_{number}")
    return [f"-gencode={target}" for target in targets or DEFAULT_TARGETS]


def ninja_file(target, compiler, nvcc):
    """The text of build.ninja: every file of csrc/ to an object, all objects to the module."""
    import pybind11

    optimise = ["-O0", "-g"] if flag("DEBUG") else ["-O3"]
    includes = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"), f"-I{CSRC}"]
    common = ["-std=c++17", *optimise, *includes, *(["-DHMT_WITH_CUDA"] if nvcc else [])]
    host = [*WARNINGS, "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    commands = {
        "cpp": [compiler, *common, *host],
        "link": [compiler, "-shared", "-pthread", *undefined],
    }
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
    if nvcc:
        # nvcc links its static libcudart by itself, so that the module loads on machines without CUDA.
        from_nvcc = [nvcc, "-ccbin", compiler]
        commands["cu"] = [*from_nvcc, *common, *cuda_targets(), "-Xcompiler", ",".join(host)]
        commands["link"] = [*from_nvcc, "-shared", "-cudart=static", "-Xcompiler", "-pthread"]
        sources += CSRC.glob("cuda/*.cu")

    lines = []
    for rule, command in commands.items():
        lines += [f"rule {rule}", "  description = $out"]
        if rule == "link":
            lines += [f"  command = {shell(command)} $in -o $out"]
        else:
            lines += [
                f"  command = {shell(command)} -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
    objects = []
    for source in sorted(sources):
        objects.append(f"{source.name}.o")
        lines.append(f"build {objects[-1]}: {source.suffix[1:]} {escape(source)}")
    lines.append(f"build {escape(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def shell(command):
    return shlex.join(map(str, command)).replace("$", "$$")


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Compiles the module with ninja: files in parallel, and only those that changed."""

    def build_extension(self, ext):
        import ninja

        nvcc = find_nvcc()
        if nvcc:
            say(f"building the native module for CPUs and, with {nvcc}, for CUDA")
        else:
            reason = "HMT_KERNELS_SKIP_CUDA is set" if flag("HMT_KERNELS_SKIP_CUDA") else "nvcc was not found"
            say(f"{reason}: building the native module for CPUs only (on CUDA devices Triton does the work)")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(target, find_compiler(), nvcc))
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", folder]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.run(command).returncode != 0:
            raise CompileError("hmt-kernels: the native module did not compile, see the compiler's message above")


class PureBuild(build_py):
    """The build without a C++ compiler."""

    def run(self):
        say("no C++ compiler found: a pure Python wheel, with the PyTorch and Triton implementations only")
        super().run()


if find_compiler():
    setup(ext_modules=[Extension("hmt_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
elif flag("HMT_KERNELS_FORCE_CUDA"):
    sys.exit("hmt-kernels: HMT_KERNELS_FORCE_CUDA is set, but there is no C++ compiler: install g++ or set CXX")
else:
    setup(cmdclass={"build_py": PureBuild})
