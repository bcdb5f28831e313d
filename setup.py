"""Builds the native module hmt_kernels._C from csrc/ with pybind11 and ninja; it links neither torch nor libcudart.so.

Environment:
  HMT_KERNELS_SKIP_CUDA=1   leave the CUDA kernels out even if nvcc is found
  HMT_KERNELS_FORCE_CUDA=1  fail if nvcc is not found
  TORCH_CUDA_ARCH_LIST      for example "8.0;9.0a;9.0+PTX" (the default)
  MAX_JOBS                  compile so many files at a time
  DEBUG=1                   debug symbols, no optimisation
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
DEFAULT_ARCHITECTURES = "8.0;9.0a;9.0+PTX"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def flag(name):
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off")


def find_nvcc():
    """The CUDA compiler, or None when there is none or it is not wanted."""
    if flag("HMT_KERNELS_SKIP_CUDA"):
        if flag("HMT_KERNELS_FORCE_CUDA"):
            sys.exit("hmt-kernels: HMT_KERNELS_SKIP_CUDA and HMT_KERNELS_FORCE_CUDA are both set: unset one of them")
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes]
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    nvcc = next((c.resolve() for c in candidates if c.is_file()), None)
    if nvcc is None and flag("HMT_KERNELS_FORCE_CUDA"):
        sys.exit("hmt-kernels: HMT_KERNELS_FORCE_CUDA is set, but nvcc was not found: set CUDA_HOME or extend PATH")
    return nvcc


def find_compiler():
    """The C++ compiler, or None."""
    return (
        shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    )


def architecture_flags():
    """nvcc's -gencode for TORCH_CUDA_ARCH_LIST: "9.0a" makes machine code, "9.0+PTX" makes PTX for later cards."""
    flags = []
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES).replace(" ", ";").split(";"):
        if not entry:
            continue
        version, ptx = entry.removesuffix("+PTX"), entry.endswith("+PTX")
        number = version.replace(".", "")
        if not number.rstrip("abcdef").isdigit():
            sys.exit(f"hmt-kernels: TORCH_CUDA_ARCH_LIST must look like {DEFAULT_ARCHITECTURES!r}, got {entry!r}")
        kind = "compute" if ptx else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


def say(text):
    print(f"hmt-kernels: {text}", file=sys.stderr, flush=True)


class NinjaBuild(build_ext):
    """Compiles and links one extension with ninja, so that files build in parallel and only when they changed."""

    def build_extension(self, ext):
        import ninja
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"], str(ROOT / "csrc")]
        (folder / "build.ninja").write_text(self.rules(includes, target))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        subprocess.run(command, check=True)

    def rules(self, includes, target):
        nvcc, compiler = find_nvcc(), find_compiler()
        optimise = ["-O0", "-g"] if flag("DEBUG") else ["-O3"]
        common = [*optimise, "-std=c++17", *(f"-I{path}" for path in includes)]
        cxx = [*common, *WARNINGS, "-fPIC", "-fvisibility=hidden", "-pthread"]
        libraries = ["-pthread"]
        sources = [*sorted((ROOT / "csrc").glob("*.cpp")), *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
        if nvcc:
            home = nvcc.parent.parent
            sources += [path for path in sorted((ROOT / "csrc" / "cuda").iterdir()) if path.suffix in (".cu", ".cpp")]
            cxx += ["-DHMT_WITH_CUDA", f"-I{home / 'include'}"]
            library = next(
                (p for p in (home / "lib64", home / "lib") if (p / "libcudart_static.a").exists()), home / "lib64"
            )
            libraries += [f"-L{library}", "-lcudart_static", "-ldl", "-lrt"]
        host = ",".join([*WARNINGS, "-fPIC", "-fvisibility=hidden"])
        cuda = [*common, *architecture_flags(), "-Xcompiler", host, "-ccbin", compiler]
        if flag("DEBUG"):
            cuda.append("-lineinfo")
        lines = [
            "rule cxx",
            f"  command = {compiler} -MMD -MF $out.d {' '.join(cxx)} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule cuda",
            f"  command = {nvcc} -MMD -MF $out.d {' '.join(cuda)} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} -shared $in -o $out {' '.join(libraries)}",
        ]
        objects = []
        for source in sources:
            objects.append(f"{source.parent.name}_{source.stem}.o")
            lines.append(f"build {objects[-1]}: {'cuda' if source.suffix == '.cu' else 'cxx'} {source.resolve()}")
        lines.append(f"build {target}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def extensions():
    """The native module, or nothing where it cannot be compiled; says in one line which it is."""
    nvcc, compiler = find_nvcc(), find_compiler()
    if compiler is None:
        if flag("HMT_KERNELS_FORCE_CUDA"):
            sys.exit("hmt-kernels: HMT_KERNELS_FORCE_CUDA is set, but there is no C++ compiler: install g++ or set CXX")
        say("no C++ compiler found: building a pure Python wheel, with the PyTorch and Triton implementations only")
        return []
    if nvcc is None:
        reason = "HMT_KERNELS_SKIP_CUDA is set" if flag("HMT_KERNELS_SKIP_CUDA") else "nvcc was not found"
        say(f"{reason}: building the native module for CPUs only (CUDA devices use Triton)")
    else:
        say(f"building the native module for CPUs and CUDA with {nvcc}")
    return [Extension("hmt_kernels._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
