"""segment_attention's CUDA kernels under the sanitizers and in random orders; planted faults must show."""

from __future__ import annotations

import shutil

import pytest
from emulation import build

LANDED = "    __syncthreads();  // the tile is there, and nobody reads the one before any more\n"
# fault: file, what is taken out at its first place, what comes in its place, how the program is built, the case that is
# run, what is said
FAULTS = {
    "no-barrier": ("attention_fwd.cu", LANDED, "", "thread", "decoding", "data race"),
    "no-barrier-in-fibers": ("attention_fwd.cu", LANDED, "", "plain", "square", "o holds NaN"),
    "no-wait": (
        "attention_fwd.cu", "    cp_async_wait<0>();\n" + LANDED, LANDED, "plain", "decoding", "o holds NaN",
    ),
    "results-over-a-tile": (
        "attention_fwd.cu", "  __syncthreads();\n  stage_product", "  stage_product", "thread", "square", "data race",
    ),
    "barrier-of-some": (
        "attention_fwd.cu", LANDED, "    if (threadIdx.x < 64) __syncthreads();\n", "plain", "decoding",
        "was not reached by every thread",
    ),
    "out-of-bounds": (
        "attention_tile.cuh", "if (i + thread_row < count)", "if (i + thread_row <= count)", "address-undefined",
        "square", "heap-buffer-overflow",
    ),
    "no-barrier-between-keys": ("attention_bwd.cu", LANDED, "", "thread", "decoding", "data race"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """csrc/cuda with one head dimension and dtype: fast to compile."""
    folder = shutil.copytree(build.CUDA, tmp_path_factory.mktemp("sources") / "cuda")
    for taken_out in ("64", "96", "128"):
        replace(
            folder / "attention_host.h", f"      case {taken_out}:\n        return f(Instance<T, {taken_out}>());\n"
        )
    replace(
        folder / "attention_host.h", "      return with_dim(Instance<__nv_bfloat16, 0>());\n", "      return nullptr;\n"
    )
    return folder


def replace(file, taken_out, replacement=""):
    text = file.read_text()
    assert taken_out in text
    file.write_text(text.replace(taken_out, replacement, 1))


@pytest.fixture(scope="module")
def bits(sources, tmp_path_factory):
    """Of the plain build in its first order."""
    driver = build.build_attention_driver(tmp_path_factory.mktemp("plain"), "plain", sources)
    return build.bits_of(build.run_driver(driver, "1"))


@pytest.mark.parametrize("kind, seeds", [("plain", 10), ("address-undefined", 2), ("thread", 1)])
def test_no_report_and_one_result_in_every_order(kind, seeds, sources, bits, tmp_path):
    result = build.run_driver(build.build_attention_driver(tmp_path, kind, sources), str(seeds))
    assert result.returncode == 0, result.stdout + result.stderr[:5000]
    assert result.stdout.count(f"{seeds} orders agree") == 4
    assert len(bits) == 4 and build.bits_of(result) == bits
    assert "ERROR" not in result.stderr and "runtime error" not in result.stderr and "data race" not in result.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault, sources, tmp_path):
    file, taken_out, replacement, kind, case, message = FAULTS[fault]
    faulty = shutil.copytree(sources, tmp_path / "sources")
    replace(faulty / file, taken_out, replacement)
    driver = build.build_attention_driver(tmp_path, kind, faulty, forward_only="bwd" not in file)
    result = build.run_driver(driver, "10", case)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
