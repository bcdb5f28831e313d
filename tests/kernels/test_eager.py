"""Whatever must see the operator sees it; only a call that nothing watches goes straight to the implementation."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hmt_kernels import memory_recall, segment_attention
from hmt_kernels.eager import is_watched

OP = torch.ops.hmt_kernels.memory_recall_fwd.default


def recall(query, memory):
    return memory_recall(query, memory, softmax_scale=0.25).recalled


@pytest.fixture
def tensors():
    return torch.randn(2, 1, 16), torch.randn(2, 5, 16)


def test_a_plain_call_is_not_watched_and_gives_the_same(tensors):
    assert not is_watched(*tensors, None)
    name = "reference"
    out = memory_recall(*tensors, softmax_scale=0.25, impl=name)
    torch.testing.assert_close(tuple(out), OP(*tensors, None, 0.25, name), rtol=0, atol=0)


def test_gradients_watch_unless_they_are_off(tensors):
    tensors[1].requires_grad_()
    assert is_watched(*tensors)
    assert recall(*tensors).requires_grad
    with torch.no_grad():
        assert not is_watched(*tensors)
    with torch.inference_mode():
        assert not is_watched(*tensors)


def test_subclasses_and_modes_watch(tensors):
    with FlopCounterMode(display=False):
        assert is_watched(*tensors)
    with FakeTensorMode() as mode:
        assert is_watched(*map(mode.from_tensor, tensors))


def test_transforms_watch(tensors):
    seen = []

    def function(query):
        seen.append(is_watched(query))
        return query * 2

    torch.vmap(function)(tensors[0])
    torch.func.grad(lambda query: function(query).sum())(tensors[0])
    assert seen == [True, True]


def test_forward_mode_is_refused(tensors):
    query, memory = tensors
    with forward_ad.dual_level():
        assert torch.equal(recall(query, memory), recall(*tensors))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            recall(forward_ad.make_dual(query, torch.ones_like(query)), memory)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda query: recall(query, memory), (query,), (torch.ones_like(query),))
    q = query[None]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: segment_attention(q, q, q, impl="reference"), (q,), (torch.ones_like(q),))


def test_tracers_record_the_operator(tensors):
    graph = make_fx(recall)(*tensors).graph
    assert OP in [node.target for node in graph.nodes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the checks read shapes
        traced = torch.jit.trace(recall, tensors, check_trace=False)
    assert "memory_recall_fwd" in str(traced.graph)


def test_a_profiler_sees_the_operator(tensors):
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        recall(*tensors)
    assert "hmt_kernels::memory_recall_fwd" in {event.key for event in prof.key_averages()}
