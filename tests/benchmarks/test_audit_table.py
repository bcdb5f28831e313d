"""The table of the audit: occupancy, predictions, and measurements in the same rows."""

from __future__ import annotations

import pytest
import torch

from benchmarks import audit_table, cards, results
from benchmarks.audit_attention import attention_case, visible_pairs
from benchmarks.audit_cases import recall_case
from benchmarks.audit_table import Compiled
from benchmarks.cards import CARDS, blocks_per_multiprocessor, predicted
from benchmarks.costs import Cost
from benchmarks.sass import Code
from hmt_kernels.triton_launch import Target

H100 = CARDS[90]
CODE = Code("kernel", 64, 0, spills=0, hot_spills=0, wide_loads=1, narrow_loads=0, tensor_core=0, loop_length=90)


@pytest.mark.parametrize(
    ("warps", "registers", "shared_memory", "expected"),
    [
        pytest.param(4, 32, 0, 16, id="64 warps at most"),
        pytest.param(4, 128, 0, 4, id="registers"),
        pytest.param(4, 129, 0, 3, id="registers come in eights"),
        pytest.param(4, 32, 100 * 1024, 2, id="shared memory"),
        pytest.param(1, 32, 0, 32, id="32 blocks at most"),
        pytest.param(8, 255, 0, 1, id="one block"),
    ],
)
def test_blocks_that_fit(warps, registers, shared_memory, expected):
    assert blocks_per_multiprocessor(H100, warps, registers, shared_memory) == expected


@pytest.mark.parametrize(
    ("cost", "instructions", "seconds", "bound"),
    [
        (Cost(3.35e12, 1), 1, 1.0, "memory"),
        (Cost(1, 989e12), 1, 1.0, "arithmetic"),
        (Cost(1, 1), 132 * 128 * 1.83e9, 1.0, "issue"),
    ],
)
def test_the_highest_floor_is_the_prediction(cost, instructions, seconds, bound):
    assert predicted(H100, cost, 2, instructions) == (pytest.approx(seconds), bound)


def test_a_row_counts_instructions_per_element_of_memory():
    case = recall_case("forward", 64, 1, 576, torch.bfloat16, Target(90, 132))
    row = audit_table.table_row(Compiled(case.label, "sm_90", case.launch.num_warps, CODE, 20 * 1024), case)
    threads, rows = 32 * case.launch.num_warps, case.elements_per_turn // 576
    assert float(row["instructions_per_element"]) == pytest.approx(90 * threads / (rows * 576), rel=1e-2)
    assert row["bytes"] == f"{64 * 576 * (8192 + 2) * 2:.4g}" and row["card"] == "H100 SXM"
    floor = 1e6 * 64 * 576 * 8194 * 2 / 3.35e12
    assert float(row["predicted_us"]) >= floor * 0.999


def test_a_cuda_kernel_has_the_columns_that_its_code_tells():
    row = audit_table.table_row(Compiled("memory_recall_fwd_kernel<bf16, 4>", "sm_90a", None, CODE, 0), None)
    assert row["registers"] == "64" and "predicted_us" not in row


@pytest.mark.parametrize(("window_size", "expected"), [(None, 4 + 5 + 6), (5, 4 + 5 + 5)])
def test_scores_that_a_window_leaves(window_size, expected):
    assert visible_pairs(3, 6, window_size) == expected


@pytest.mark.parametrize("name", ["recall", "attention"])
def test_a_launch_on_a_device_is_timed_and_stands_beside_its_prediction(name, tmp_path):
    """Here in Triton's interpreter."""
    target = Target(90, 8)
    if name == "recall":
        case = recall_case("forward", 1, 1, 64, torch.float32, target, slots=20, device="cpu")
    else:
        case = attention_case("forward", 1, 64, torch.float32, target, length=20, device="cpu")
    seconds = audit_table.seconds_of(case, rounds=1)
    row = {"kernel": case.label, "arch": "sm_90", "predicted_us": "2.0"}
    other = {"kernel": "another", "arch": "sm_90", "predicted_us": "2.0"}
    filled, untouched = audit_table.with_measurements([row, other], {(case.label, "sm_90"): seconds})
    assert float(filled["measured_over_predicted"]) == pytest.approx(1e6 * seconds / 2, rel=1e-2)
    assert untouched == other
    audit_table.write(tmp_path / "audit.csv", [filled, untouched])
    assert results.read_rows(tmp_path / "audit.csv")[1]["measured_us"] == ""


def test_a_known_card_has_its_own_ceilings(monkeypatch):
    monkeypatch.setattr(cards, "CARDS", dict(cards.CARDS))
    cards.use("NVIDIA H100 80GB HBM3")
    assert cards.CARDS[90].bandwidth == 3.35e12
    cards.use("NVIDIA H200")
    assert (cards.CARDS[90].name, cards.CARDS[90].bandwidth, cards.CARDS[80].name[:4]) == ("H200 SXM", 4.8e12, "A100")
