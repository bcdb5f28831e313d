"""The offline audit: it passes what is shipped, notices planted faults, and reads machine code correctly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sass
from benchmarks.sass import Code

ROOT = Path(__file__).parents[2]


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    """A Python of its own: in this one, triton may be the interpreter, and the audit needs the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_shipped_configurations_pass():
    result = run_python("-m", "benchmarks.audit", "--only", "B64 D576 bfloat16 tile 8x4 sm_90")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and lines[1].startswith("recall forward B64 D576") and lines[1].endswith("ok")
    assert lines[2] == "0 failed"


def test_shipped_attention_configurations_pass():
    result = run_python("-m", "benchmarks.audit", "--only", "attention forward D64 bfloat16 tile 64x64x3 sm_90")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and lines[1].startswith("attention forward D64") and lines[1].endswith("ok")


def test_a_selection_without_any_kernel_fails():
    assert run_python("-m", "benchmarks.audit", "--only", "no such kernel").returncode == 1


PLANTED = """
import json
from benchmarks import audit, audit_cases
from hmt_kernels.triton_launch import Target

def audited(direction, dim, **changes):
    case = audit_cases.recall_case(direction, 64, 1, dim, audit_cases.torch.bfloat16, Target(90, 132))
    num_warps = changes.pop("num_warps", case.launch.num_warps)
    launch = case.launch._replace(arguments={**case.launch.arguments, **changes}, num_warps=num_warps)
    (finding,) = audit.check_launch(case._replace(launch=launch))
    return finding.problems

print(json.dumps({
    "nothing": audited("forward", 64),
    "misaligned rows": audited("forward", 64, ALIGN=1),
    "large tiles": audited("backward", 576, BLOCK_N=32),
    "many stages": audited("forward", 64, BLOCK_N=512, STAGES=5, num_warps=16),
}))
"""


def test_planted_faults_are_noticed():
    result = run_python("-c", PLANTED)
    assert result.returncode == 0, result.stderr
    problems = json.loads(result.stdout)
    assert problems["nothing"] == []
    assert problems["misaligned rows"] == ["streaming loads shorter than 16 bytes"]
    assert any("spill" in problem for problem in problems["large tiles"])
    assert "shared memory above 227 KiB" in problems["many stages"]


CUDA_FAULTS = r"""
import json, re, shutil, sys
from pathlib import Path
from benchmarks import audit

folder = Path(sys.argv[1], "csrc", "cuda")
shutil.copytree(audit.CUDA_SOURCES, folder)

def change(file, pattern, replacement):
    text, count = re.subn(pattern, replacement, (folder / file).read_text())
    assert count, pattern
    (folder / file).write_text(text)

def audited():
    findings = audit.check_source(shutil.which("nvcc"), folder / "attention_fwd.cu", "80")
    return {finding.label: finding.problems for finding in findings}

# one kernel, to compile fast
change("attention_host.h", r"case (80|96|128):\n.*\n", "")
change("attention_host.h", r"return with_dim\(Instance<__nv_bfloat16, 0>\(\)\)", "return nullptr")
problems = {"nothing": audited()}
change("attention_fwd.cu", r"__launch_bounds__\(kAttentionThreads, 2\)", "__launch_bounds__(kAttentionThreads, 8)")
problems["few registers"] = audited()
change("attention_fwd.cu", r"__launch_bounds__\(kAttentionThreads, 8\)", "")
change("attention_tile.cuh", r"mma<T>\((c\[.*?\]), (\w+\[m\]), (\w+\[\d\]), (\w+\[\d\])\)", r"\1[0] += \2[0] + \3 + \4")
problems["no products"] = audited()
print(json.dumps(problems))
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_planted_faults_in_cuda_are_noticed(tmp_path):
    result = run_python("-c", CUDA_FAULTS, str(tmp_path))
    assert result.returncode == 0, result.stderr
    kernel = "segment_attention_fwd_kernel<fp16, 64>"
    problems = json.loads(result.stdout)
    assert problems["nothing"] == {kernel: []}
    assert len(problems["few registers"][kernel]) == 1 and "spill" in problems["few registers"][kernel][0]
    assert problems["no products"] == {kernel: ["no tensor-core instructions"]}


PLANTED_IN_ATTENTION = """
import json
import torch
from benchmarks import audit, audit_attention
from hmt_kernels.triton_launch import Target

def audited(direction, **changes):
    case = audit_attention.attention_case(direction, 8, 64, torch.bfloat16, Target(90, 132))
    num_warps = changes.pop("num_warps", case.launch.num_warps)
    launch = case.launch._replace(arguments={**case.launch.arguments, **changes}, num_warps=num_warps)
    (finding,) = audit.check_launch(case._replace(launch=launch))
    return finding.problems

print(json.dumps({
    "nothing": audited("dq"),
    "short rows": audited("forward", D=60, BLOCK_M=64, BLOCK_N=64, num_warps=4),
    "small tiles": audited("forward", BLOCK_M=16, BLOCK_N=64, num_warps=4),
    "large tiles": audited("dkdv", BLOCK_M=128),
}))
"""


def test_faults_planted_in_attention_are_noticed():
    result = run_python("-c", PLANTED_IN_ATTENTION)
    assert result.returncode == 0, result.stderr
    problems = json.loads(result.stdout)
    assert problems["nothing"] == []
    assert problems["short rows"] == ["streaming loads shorter than 16 bytes"]
    assert problems["small tiles"] == ["no wgmma.mma_async"]
    assert any("spill" in problem for problem in problems["large tiles"])


COMPILE_KEYS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from benchmarks import audit_cases
from hmt_kernels.triton_launch import Target

backend = make_backend(GPUTarget("cuda", 90, 32))
for queries in (1, 16):
    for direction in ("forward", "backward"):
        for dim in (8, 576, 4096):
            keys = set()
            for slots in (1, 15, 16, 17, 300, 1024, 8192):
                for batch in (1, 2, 7, 64):
                    case = audit_cases.recall_case(
                        direction, batch, queries, dim, torch.bfloat16, Target(90, 132), slots=slots
                    )
                    kernel = case.launch.kernel
                    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
                    _, specialization, _ = bind(**case.launch.arguments)
                    keys.add((str(specialization), case.launch.num_warps))
            print(len(keys))
"""


def test_no_kernel_is_compiled_for_a_number_of_slots_or_a_batch():
    result = run_python("-c", COMPILE_KEYS)
    assert result.returncode == 0, result.stderr
    # One kernel that splits and one that does not, each perhaps with the tiles for few blocks.
    assert all(1 <= int(count) <= 4 for count in result.stdout.split()) and len(result.stdout.split()) == 12


ATTENTION_COMPILE_KEYS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from benchmarks import audit_attention
from hmt_kernels.triton_launch import Target

backend = make_backend(GPUTarget("cuda", 90, 32))
for direction in ("prepare", *audit_attention.DIRECTIONS):
    keys = set()
    for length in (1, 15, 16, 17, 300, 546, 1024, 1058, 4096):
        for batch in (1, 2, 7, 64):
            case = audit_attention.attention_case(
                direction, batch, 64, torch.bfloat16, Target(90, 132), length=length, window_size=None
            )
            bind = create_function_from_signature(case.launch.kernel.signature, case.launch.kernel.params, backend)
            _, specialization, _ = bind(**case.launch.arguments)
            keys.add((str(specialization), case.launch.num_warps))
    print(direction, len(keys))
"""


def test_no_attention_kernel_is_compiled_for_a_length_or_a_batch():
    result = run_python("-c", ATTENTION_COMPILE_KEYS)
    assert result.returncode == 0, result.stderr
    # Large and small tiles in the forward pass; decoding, and dk and dv, with a split and without.
    assert result.stdout.split() == ["prepare", "1", "forward", "2", "dkdv", "2", "dq", "1", "decode", "2"]


DUMP = """
 Function first_kernel:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:584 TEXTURE:0
 Function second_kernel:
  REG:255 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0
 Function third_kernel:
  REG:16 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0
\t\tFunction : first_kernel
        /*0000*/                   LDG.E R2, desc[UR26][R2.64] ;          /* 0x1 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R46], desc[UR26][R10.64], P0 ;
        /*0020*/                   LDG.E.128 R4, desc[UR26][R4.64] ;
        /*0028*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*002c*/                   HGMMA.64x64x16.F32 R4, gdesc[UR4], RZ, !UPT ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/               @P0 ATOMG.E.ADD.STRONG.GPU PT, R7, desc[UR26][R4.64+0x4], R7 ;
        /*0050*/              @!P1 LDGSTS.E [R19+0x1200], desc[UR26][R6.64], !P0 ;
        /*0060*/               @P0 BRA 0x50 ;
        /*0070*/                   BRA 0x70;
\t\tFunction : second_kernel
        /*0000*/                   STL.64 [R1], R2 ;
        /*0010*/                   LDG.E.64 R2, desc[UR26][R2.64] ;
        /*0020*/                   LDG.E.U16 R2, desc[UR26][R2.64] ;
        /*0030*/                   LDL R2, [R1] ;
        /*0040*/              @!P0 BRA 0x10 ;
\t\tFunction : third_kernel
        /*0000*/                   LDG.E.128 R4, desc[UR26][R4.64] ;
        /*0010*/                   LDG.E R2, desc[UR26][R2.64] ;
        /*0020*/                   EXIT ;
        /*0030*/                   BRA 0x30;
"""


def test_machine_code_is_read():
    # Neither the load before the loop counts nor those of the loop behind the atomic, nor the spill before the loop.
    # All loads count where there is no loop.
    assert sass.parse(DUMP) == [
        Code("first_kernel", 40, 1024, 0, hot_spills=0, wide_loads=2, narrow_loads=0, tensor_core=2, loop_length=5),
        Code("second_kernel", 255, 0, 2, hot_spills=1, wide_loads=0, narrow_loads=2, tensor_core=0, loop_length=4),
        Code("third_kernel", 16, 0, 0, hot_spills=0, wide_loads=1, narrow_loads=1, tensor_core=0, loop_length=4),
    ]


@pytest.mark.parametrize(
    ("opcode", "width"),
    [("LDG.E.128.CONSTANT", 16), ("LDGSTS.E.64", 8), ("LDG.E.U8", 1), ("LDG.E", 4), ("UBLKCP.S.G", 16), ("LDS.128", 0)],
)
def test_load_width(opcode, width):
    assert sass.load_width(opcode) == width


def test_a_reduction_of_a_warp_is_no_atomic_and_a_wait_behind_the_last_exit_no_loop():
    lines = ["REDUX", "LDG.E.128", "BRA 0x10", "EXIT", "LDG.E", "BRA 0x10", "BRA 0x60"]
    code = [sass.Instruction(16 * i, *line.partition(" ")[::2]) for i, line in enumerate(lines)]
    assert sass.loops(code) == [(16, 32)]
    assert sass.streaming_loads(code) == (1, 0)
