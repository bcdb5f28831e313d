"""Compiles every shipped kernel configuration for sm_80, sm_90 and sm_100 without a GPU, and checks the machine code.

    python -m benchmarks.audit [--only TEXT] [--every-shape] [--table OUT.csv [--measure]]

For each: registers, spills, shared memory against the card's limit, 16-byte loads in the loops that stream the
inputs, and for attention the tensor-core instructions of the architecture. Prints a table and exits with 1 if a check
fails. --table writes what a kernel uses and the time to expect of it; --measure adds the time that a Triton kernel
takes on the GPU of this machine, and leaves CUDA C++ out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported: this needs the compiler

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import audit_table, cards, sass
from benchmarks.audit_attention import attention_cases
from benchmarks.audit_cases import Case, recall_cases, targets
from benchmarks.results import Row
from hmt_kernels.triton_launch import Launch, target_of
from hmt_kernels.triton_tiles import SHARED_MEMORY

# A new family of kernels adds its cases here.
FAMILIES = (recall_cases, attention_cases)

CUDA_SOURCES = Path(__file__).parent.parent / "csrc" / "cuda"
# as setup.py builds them; sm_100 runs the PTX of compute_90, which the driver compiles like this
CUDA_ARCHITECTURES = {
    "80": "arch=compute_80,code=sm_80",
    "90a": "arch=compute_90a,code=sm_90a",
    "100": "arch=compute_90,code=sm_100",
}
# the kernels that must use the tensor cores, by the start of their names
CUDA_ON_TENSOR_CORES = ("segment_attention_fwd_kernel", "segment_attention_bwd_")
# loads of one number that their loops may hold: lse and d_lse of a group of queries, the maxima and sums of splits
CUDA_SHORT_LOADS = {"memory_recall_bwd_": 2, "memory_recall_reduce_": 64}
TRITON_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


class Finding(NamedTuple):
    label: str
    arch: str
    warps: int | None  # None: chosen by the CUDA kernel's launcher
    code: sass.Code
    shared_memory: int
    problems: list[str]
    row: Row  # of the table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="check only what has this text in its line, such as 'D576' or 'sm_80'"
    )
    parser.add_argument("--every-shape", action="store_true", help="every tile shape there is; takes ten minutes")
    parser.add_argument("--table", type=Path, metavar="OUT.csv", help="write registers, occupancy, predicted times")
    parser.add_argument("--measure", action="store_true", help="and the times of this machine's GPU")
    options = parser.parse_args()
    if options.measure and not (options.table and torch.cuda.is_available()):
        parser.error("--measure needs --table and a CUDA device")
    if options.measure:
        cards.use(torch.cuda.get_device_name())
    if options.measure and not options.only:
        options.only = f"sm_{target_of(torch.device('cuda', 0)).arch}"

    # A worker is told a position in this list: compiled-function objects do not travel between processes.
    cases = [case for family in FAMILIES for target in targets() for case in family(target, options.every_shape)]
    jobs = [partial(check_launch, case) for case in cases]
    names = [f"{case.label} sm_{case.target.arch}" for case in cases]
    nvcc = shutil.which("nvcc")
    sources = sorted(CUDA_SOURCES.glob("*.cu")) if nvcc and not options.measure else []  # whose launches need a host
    jobs += [partial(check_source, nvcc, source, arch) for source in sources for arch in CUDA_ARCHITECTURES]
    names += [f"{source.name} sm_{arch}" for source in sources for arch in CUDA_ARCHITECTURES]
    _jobs.extend(job for job, name in zip(jobs, names, strict=True) if options.only in name)

    print(f"{'kernel':<58} {'arch':<7} warps registers spills shared KiB  16-byte  shorter loads  verdict")
    failures = 0
    rows: list[Row] = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as workers:
        for findings in workers.map(_run_job, range(len(_jobs))):
            for finding in findings:
                print(format_finding(finding), flush=True)
                failures += bool(finding.problems)
                rows.append(finding.row)
    if options.table:
        audit_table.write(options.table, rows)
        for seconds in measured(options) if options.measure else ():  # what is cut off has what it had
            audit_table.write(options.table, audit_table.with_measurements(rows, seconds))
    if not sources:
        print(f"CUDA C++: not checked{'' if nvcc else ', there is no nvcc'}")
    print(f"{failures} failed")
    return 1 if failures or not _jobs else 0


def measured(options: argparse.Namespace) -> Iterator[dict[tuple[str, str], float]]:
    """Seconds of this GPU's launches so far, by kernel and architecture."""
    target = target_of(torch.device("cuda", 0))
    seconds: dict[tuple[str, str], float] = {}
    for family in FAMILIES:
        for case in family(target, options.every_shape, "cuda"):
            key = (case.label, f"sm_{target.arch}")
            if options.only in " ".join(key):
                seconds[key] = audit_table.seconds_of(case)
                yield seconds


_jobs: list[Callable[[], list[Finding]]] = []


def _run_job(index: int) -> list[Finding]:
    return _jobs[index]()


def check_launch(case: Case) -> list[Finding]:
    """Compile one Triton launch for its target."""
    arch = case.target.arch
    options = {"num_warps": case.launch.num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(launch_source(case.launch), target=GPUTarget("cuda", arch, 32), options=options)
    (code,) = disassemble(compiled.asm["cubin"])
    shared_memory, warps = compiled.metadata.shared, case.launch.num_warps
    finding = judge(case.label, f"sm_{arch}", warps, code, shared_memory, arch, case.short_loads, case)
    if case.tensor_cores and TENSOR_CORES[arch] not in compiled.asm["ptx"]:
        finding.problems.append(f"no {TENSOR_CORES[arch]}")
    return [finding]


def launch_source(launch: Launch) -> ASTSource:
    """The kernel specialised as this launch would: types by argument, pointers aligned to 16 bytes.

    Triton's cache knows it again: what is measured afterwards is not compiled twice.
    """
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[position,] = value
            attributes[position,] = []
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned = not parameter.do_not_specialize_on_alignment
            attributes[position,] = [["tt.divisibility", 16]] if aligned else []
        else:
            signature[parameter.name] = parameter.annotation_type or "fp32"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def check_source(nvcc: str, source: Path, arch: str) -> list[Finding]:
    """Compile one CUDA C++ file for an architecture; every kernel in it is a finding."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        options = ["-cubin", "-O3", "-std=c++17", "-gencode", CUDA_ARCHITECTURES[arch], f"-I{source.parents[1]}"]
        command = [nvcc, *options, source, "-o", cubin]
        subprocess.run(command, check=True, capture_output=True)
        codes = disassemble(cubin.read_bytes())
    number = int(arch.rstrip("a"))
    findings = []
    for code in codes:
        name = readable_name(code.name)
        short = next((count for start, count in CUDA_SHORT_LOADS.items() if name.startswith(start)), 0)
        findings.append(judge(name, f"sm_{arch}", None, code, code.shared_memory, number, short))
    for finding in findings:
        if finding.label.startswith(CUDA_ON_TENSOR_CORES) and not finding.code.tensor_core:
            finding.problems.append("no tensor-core instructions")
    return findings


def readable_name(mangled: str) -> str:
    """memory_recall_fwd_kernel<bf16, 4> for _ZN...24memory_recall_fwd_kernelI13__nv_bfloat16Li4EEEv..."""
    found = re.search(r"\d([a-z][a-z_]*_kernel)(?:I(.*?)EEv)?", mangled)
    if found is None:
        return mangled
    types = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32"}
    arguments = re.findall(r"13__nv_bfloat16|6__half|f|(?<=L[ijbm])\d+", found[2] or "")
    return f"{found[1]}<{', '.join(types.get(argument, argument) for argument in arguments)}>"


def disassemble(cubin: bytes) -> list[sass.Code]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TRITON_TOOLS / "cuobjdump", "--dump-sass", "--dump-resource-usage", file.name]
        return sass.parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def judge(
    label: str,
    arch: str,
    warps: int | None,
    code: sass.Code,
    shared_memory: int,
    number: int,
    short_loads: int = 0,
    case: Case | None = None,
) -> Finding:
    """`number` is the compute capability, 90; `case` the launch of a Triton kernel."""
    problems = []
    if case is None and code.spills:
        problems.append(f"{code.spills} spill instructions")
    elif case is not None and code.hot_spills > case.hot_spills:
        problems.append(f"{code.hot_spills} spill instructions in its loops")
    if shared_memory > SHARED_MEMORY[number] * 1024:
        problems.append(f"shared memory above {SHARED_MEMORY[number]} KiB")
    if code.narrow_loads > short_loads:
        problems.append("streaming loads shorter than 16 bytes")
    elif not code.wide_loads:
        problems.append("no streaming loads")
    row = audit_table.table_row(audit_table.Compiled(label, arch, warps, code, shared_memory), case)
    return Finding(label, arch, warps, code, shared_memory, problems, row)


def format_finding(finding: Finding) -> str:
    code = finding.code
    warps = "" if finding.warps is None else finding.warps
    return (
        f"{finding.label:<58} {finding.arch:<7} {warps:>5} {code.registers:>9} {code.spills:>6}"
        f" {finding.shared_memory / 1024:>10.1f} {code.wide_loads:>8} {code.narrow_loads:>8}"
        f"        {'; '.join(finding.problems) or 'ok'}"
    )


if __name__ == "__main__":
    sys.exit(main())
