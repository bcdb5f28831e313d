"""segment_attention refuses bad arguments with an error that names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from hmt_kernels import explain, segment_attention

META = torch.device("meta")


def good_arguments():
    return {
        "q": torch.zeros(2, 4, 3, 32),
        "k": torch.zeros(2, 2, 5, 32),
        "v": torch.zeros(2, 2, 5, 32),
        "cos": torch.ones(1, 5, 16),
        "sin": torch.zeros(1, 5, 16),
        "pad_span": torch.zeros(2, 2, dtype=torch.int32),
        "window_size": 4,
        "softmax_scale": 0.25,
    }


def tables(*shape):
    return {"cos": torch.zeros(*shape), "sin": torch.zeros(*shape)}


# what is replaced, the error, a part of its message
BAD = {
    "q-none": ({"q": None}, TypeError, "q must be a tensor .*got NoneType"),
    "q-integer": ({"q": torch.zeros(2, 4, 3, 32, dtype=torch.int32)}, TypeError, "q must be float16.*got torch.int32"),
    "q-rank": ({"q": torch.zeros(4, 3, 32)}, ValueError, r"q must have shape \[B, Hq, Tq, D\], got \[4, 3, 32\]"),
    "k-list": ({"k": [1.0]}, TypeError, "k must be a tensor .*got list"),
    "k-rank": ({"k": torch.zeros(2, 5, 32)}, ValueError, r"k must have shape \[B, Hkv, Tk, D\], got \[2, 5, 32\]"),
    "k-dtype": ({"k": torch.zeros(2, 2, 5, 32).bfloat16()}, TypeError, "k must have q's dtype torch.float32, got"),
    "k-device": ({"k": torch.zeros(2, 2, 5, 32, device=META)}, ValueError, "k must be on q's device cpu, got meta"),
    "k-batch": ({"k": torch.zeros(3, 2, 5, 32)}, ValueError, "k must have q's batch size 2"),
    "k-dim": ({"k": torch.zeros(2, 2, 5, 64)}, ValueError, "k must have q's head dimension 32"),
    "v-dtype": ({"v": torch.zeros(2, 2, 5, 32).double()}, TypeError, "v must have q's dtype torch.float32, got"),
    "v-device": ({"v": torch.zeros(2, 2, 5, 32, device=META)}, ValueError, "v must be on q's device cpu, got meta"),
    "v-shape": ({"v": torch.zeros(2, 2, 6, 32)}, ValueError, r"v must have k's shape \[2, 2, 5, 32\], got"),
    "heads": ({"q": torch.zeros(2, 3, 3, 32)}, ValueError, "heads must be a multiple of k's, .*got 3 and 2"),
    "no-kv-heads": (
        {"k": torch.zeros(2, 0, 5, 32), "v": torch.zeros(2, 0, 5, 32)}, ValueError, "both at least 1, got 4 and 0",
    ),
    "no-q-heads": ({"q": torch.zeros(2, 0, 3, 32)}, ValueError, "both at least 1, got 0 and 2"),
    "too-many-queries": ({"q": torch.zeros(2, 4, 6, 32)}, ValueError, "q must not be longer than k, got Tq = 6"),
    "cos-alone": ({"sin": None}, ValueError, "cos and sin must be given together, got no sin"),
    "sin-alone": ({"cos": None}, ValueError, "cos and sin must be given together, got no cos"),
    "cos-integer": ({"cos": torch.zeros(1, 5, 16, dtype=torch.int64)}, TypeError, "cos must be float16"),
    "cos-rank": (tables(5, 16), ValueError, r"cos must have shape \[1 or B, Tk, R\], got \[5, 16\]"),
    "cos-batch": (tables(3, 5, 16), ValueError, r"cos must have shape \[1 or 2, 5, R\], got \[3, 5, 16\]"),
    "cos-length": (tables(1, 3, 16), ValueError, r"cos must have shape \[1 or 2, 5, R\], got \[1, 3, 16\]"),
    "cos-odd": (tables(1, 5, 15), ValueError, "cos's last dimension must be even .*got 15"),
    "cos-wide": (tables(1, 5, 64), ValueError, "cos's last dimension must be .*to D = 32, got 64"),
    "cos-empty": (tables(1, 5, 0), ValueError, "cos's last dimension must be .*got 0"),
    "cos-device": ({"cos": torch.ones(1, 5, 16, device=META)}, ValueError, "cos must be on q's device cpu, got meta"),
    "sin-shape": ({"sin": torch.zeros(1, 5, 8)}, ValueError, r"sin must have cos's shape \[1, 5, 16\], got"),
    "sin-dtype": ({"sin": torch.zeros(1, 5, 16).half()}, TypeError, "sin must have cos's dtype torch.float32, got"),
    "pad_span-tuple": ({"pad_span": (0, 1)}, TypeError, "pad_span must be an int32 tensor .*got tuple"),
    "pad_span-dtype": ({"pad_span": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "pad_span must be int32, got"),
    "pad_span-shape": ({"pad_span": torch.zeros(2, dtype=torch.int32)}, ValueError, r"pad_span .*\[2, 2\], got \[2\]"),
    "pad_span-device": (
        {"pad_span": torch.zeros(2, 2, dtype=torch.int32, device=META)}, ValueError, "pad_span must be .*got meta",
    ),
    "window-zero": ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
    "window-float": ({"window_size": 4.0}, TypeError, "window_size must be an int or None, got float"),
    "window-bool": ({"window_size": True}, TypeError, "window_size must be an int or None, got bool"),
    "scale-nan": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite in float32, got nan"),
    "scale-tensor": ({"softmax_scale": torch.tensor(0.1)}, TypeError, "softmax_scale must be a number, got Tensor"),
    "impl-unknown": ({"impl": "flash"}, ValueError, "impl must be one of reference, sdpa, .*got 'flash'"),
    "impl-other-operator": ({"impl": "cpu"}, ValueError, "impl must be one of reference, sdpa, .*got 'cpu'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_named(case):
    replaced, error, message = BAD[case]
    arguments = good_arguments() | replaced
    for window_size in (4, 1):  # calls that passed are remembered
        segment_attention(**good_arguments() | {"window_size": window_size})
    with pytest.raises(error, match=message):
        segment_attention(**arguments)
    with pytest.raises(error, match=message):
        explain("segment_attention", **arguments)


def test_sdpa_asked_for_with_lse_is_an_error():
    with pytest.raises(ValueError, match=r"'sdpa', chosen by impl=, cannot run: .*softmax_lse"):
        segment_attention(**good_arguments(), return_lse=True, impl="sdpa")


def test_good_arguments_pass():
    assert segment_attention(**good_arguments()).shape == (2, 4, 3, 32)
