"""The CUDA kernels under the sanitizers and in random orders, through the emulation; planted faults must show."""

from __future__ import annotations

import shutil

import pytest
from emulation import build

# fault: file, what is taken out, what comes in its place, how the program is built, the case that is run, what is said
FAULTS = {
    "no-barrier": ("block.cuh", "    __syncthreads();\n", "", "thread", "two-warps", "data race"),
    "no-barrier-in-fibers": ("block.cuh", "    __syncthreads();\n", "", "plain", "two-warps", "recalled holds NaN"),
    "barrier-of-some": (
        "block.cuh", "    __syncthreads();\n", "    if (warp == 0) __syncthreads();\n", "plain", "two-warps",
        "was not reached by every thread",
    ),
    "no-barrier-in-reduction": ("recall_reduce.cuh", "  __syncthreads();\n", "", "thread", "many-splits", "data race"),
    "no-wait": ("recall.cuh", "    cp_async_wait<kStages - 1>();\n", "", "plain", "short", "recalled holds NaN"),
    "short-wait": (
        "recall.cuh", "cp_async_wait<kStages - 1>", "cp_async_wait<kStages>", "plain", "split", "recalled holds NaN",
    ),
    "out-of-bounds": (
        "recall.cuh", "if (column<T>(v) < dim)", "if (column<T>(v) <= dim)", "address-undefined", "short",
        "heap-buffer-overflow",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drivers")


@pytest.fixture(scope="module")
def bits(folder):
    """Of the plain build in its first order."""
    return build.bits_of(build.run_driver(build.build_driver(folder, "plain"), "1"))


# ThreadSanitizer knows no order but that of barriers, so that one run shows what all of them would
@pytest.mark.parametrize("kind, seeds", [("plain", 30), ("address-undefined", 2), ("thread", 1)])
def test_no_report_and_one_result_in_every_order(kind, seeds, folder, bits):
    result = build.run_driver(build.build_driver(folder, kind), str(seeds))
    assert result.returncode == 0, result.stdout + result.stderr[:5000]
    assert result.stdout.count(f"{seeds} orders agree") == 5
    assert len(bits) == 5 and build.bits_of(result) == bits
    assert "ERROR" not in result.stderr and "runtime error" not in result.stderr and "data race" not in result.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, tmp_path):
    file, taken_out, replacement, kind, case, message = FAULTS[fault]
    sources = shutil.copytree(build.CUDA, tmp_path / "sources")
    text = (sources / file).read_text()
    assert text.count(taken_out) == 1
    (sources / file).write_text(text.replace(taken_out, replacement))
    driver = build.build_driver(tmp_path, kind, sources, forward_only=True)
    result = build.run_driver(driver, "20", case)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
