"""The golden cases with the Triton kernels (of attention and of recall), on a GPU or in the interpreter."""

from __future__ import annotations

import interpreter_bf16
import pytest
import test_golden

from hmt_kernels import use_impl
from hmt_kernels.segment_attention import triton as implementation

if implementation.INTERPRETED:
    interpreter_bf16.install()


@pytest.fixture
def calls(monkeypatch):
    """How often attention ran, by direction."""
    counts = {"forward": 0, "backward": 0}

    def counted(name):
        function = getattr(implementation, name)

        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    for name in counts:
        monkeypatch.setattr(implementation, name, counted(name))
    return counts


@pytest.mark.parametrize("name", ["d1_rmt_sensory4", "e3_opt_proj_leftpad"])
def test_forward_and_gradients(name, calls):
    with use_impl("triton"):
        test_golden.test_forward(name)
    assert calls["forward"] > 0 and calls["backward"] > 0


@pytest.mark.parametrize("name", ["i2_generate_batch2"])
def test_generate(name, calls):
    with use_impl("triton"):
        test_golden.test_generate(name)
    assert calls["forward"] > 0
