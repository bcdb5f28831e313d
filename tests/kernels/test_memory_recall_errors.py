"""memory_recall refuses bad arguments with an error that names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from hmt_kernels import explain, memory_recall


def good_arguments():
    return {
        "query": torch.zeros(2, 1, 16),
        "memory": torch.zeros(2, 5, 16),
        "num_valid": torch.zeros(2, dtype=torch.int32),
        "softmax_scale": 0.25,
    }


META = torch.device("meta")
# what is replaced, the error, a part of its message
BAD = {
    "query-list": ({"query": [[0.0]]}, TypeError, "query must be a tensor .*got list"),
    "query-integer": ({"query": torch.zeros(2, 1, 16, dtype=torch.int64)}, TypeError, "query must be float16.*int64"),
    "query-rank": ({"query": torch.zeros(2, 16)}, ValueError, r"query must have shape \[B, Q, D\], got \[2, 16\]"),
    "memory-none": ({"memory": None}, TypeError, "memory must be a tensor .*got NoneType"),
    "memory-rank": ({"memory": torch.zeros(5, 16)}, ValueError, r"memory must have shape \[B, N, D\]"),
    "memory-dtype": ({"memory": torch.zeros(2, 5, 16).half()}, TypeError, "memory must have query's dtype .*float16"),
    "memory-device": ({"memory": torch.zeros(2, 5, 16, device=META)}, ValueError, "memory must be on .*cpu, got meta"),
    "memory-batch": ({"memory": torch.zeros(3, 5, 16)}, ValueError, "memory must have query's batch size 2"),
    "memory-dim": ({"memory": torch.zeros(2, 5, 24)}, ValueError, "memory must have query's last dimension 16"),
    "memory-slots": ({"memory": torch.zeros(2, 1, 16).expand(2, 65537, 16)}, ValueError, "at most 65536 slots"),
    "dim-odd": ({"query": torch.zeros(2, 1, 12), "memory": torch.zeros(2, 5, 12)}, ValueError, "multiple of 8 .*12"),
    "dim-zero": ({"query": torch.zeros(2, 1, 0), "memory": torch.zeros(2, 5, 0)}, ValueError, "from 8 to 8192, got 0"),
    "dim-large": ({"query": torch.zeros(2, 1, 8200), "memory": torch.zeros(2, 5, 8200)}, ValueError, "8192, got 8200"),
    "num_valid-int": ({"num_valid": 3}, TypeError, "num_valid must be an int32 tensor .*got int"),
    "num_valid-dtype": ({"num_valid": torch.zeros(2, dtype=torch.int64)}, TypeError, "num_valid must be int32, got"),
    "num_valid-shape": ({"num_valid": torch.zeros(3, dtype=torch.int32)}, ValueError, r"num_valid .*\[2\], got \[3\]"),
    "num_valid-rank": ({"num_valid": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, r"num_valid .*got \[2, 1\]"),
    "num_valid-device": (
        {"num_valid": torch.zeros(2, dtype=torch.int32, device=META)}, ValueError, "num_valid must be .*cpu, got meta",
    ),
    "scale-string": ({"softmax_scale": "0.1"}, TypeError, "softmax_scale must be a number, got str"),
    "scale-tensor": ({"softmax_scale": torch.tensor(0.1)}, TypeError, "softmax_scale must be a number, got Tensor"),
    "scale-bool": ({"softmax_scale": True}, TypeError, "softmax_scale must be a number, got bool"),
    "scale-nan": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite in float32, got nan"),
    "scale-large": ({"softmax_scale": 1e39}, ValueError, "softmax_scale must be finite in float32, got 1e"),
    "scale-infinite": ({"softmax_scale": -float("inf")}, ValueError, "softmax_scale must be finite .*got -inf"),
    "impl-unknown": ({"impl": "fastest"}, ValueError, "impl must be one of reference, .*got 'fastest'"),
    "impl-other-operator": ({"impl": "sdpa"}, ValueError, "impl must be one of reference, .*got 'sdpa'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_named(case):
    replaced, error, message = BAD[case]
    arguments = good_arguments() | replaced
    with pytest.raises(error, match=message):
        memory_recall(**arguments)
    with pytest.raises(error, match=message):
        explain("memory_recall", **arguments)


def test_good_arguments_pass():
    assert memory_recall(**good_arguments()).recalled.shape == (2, 1, 16)


def test_softmax_scale_has_no_default():
    with pytest.raises(TypeError, match="softmax_scale"):
        memory_recall(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
