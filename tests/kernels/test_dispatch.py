"""Which implementation runs, who decides, and what is said about those that do not run."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch

import hmt_kernels
from hmt_kernels import dispatch, explain, memory_recall, segment_attention, use_impl
from hmt_kernels.memory_recall import reference
from hmt_kernels.segment_attention import sdpa

QUERY, MEMORY = torch.ones(1, 1, 16), torch.ones(1, 5, 16)
Q = K = V = torch.ones(1, 2, 3, 32)


@pytest.fixture
def doubling(monkeypatch):
    """A usable implementation that returns twice the reference, under the name "cuda": it shows who ran."""
    module = ModuleType("doubling")
    module.unavailable = lambda query, memory: None

    def forward(*args):
        recalled, lse, slot = reference.forward(*args)
        return 2 * recalled, lse, slot

    def backward(*args):
        return tuple(2 * grad for grad in reference.backward(*args))

    module.forward, module.backward = forward, backward
    monkeypatch.setattr(dispatch._modules["memory_recall", "cuda"], "loaded", module)
    monkeypatch.setitem(dispatch._missing, ("memory_recall", "cuda"), None)
    return "cuda"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(dispatch, "_remembered", {})


@pytest.fixture
def choosy(monkeypatch):
    """An implementation under the name "cpu" that has a reason not to run."""
    module = ModuleType("choosy")
    module.unavailable = lambda query, memory: "it takes no queries of ones"
    monkeypatch.setattr(dispatch._modules["memory_recall", "cpu"], "loaded", module)
    monkeypatch.setitem(dispatch._missing, ("memory_recall", "cpu"), None)
    return "cpu"


def recalled(impl=None):
    return memory_recall(QUERY, MEMORY, softmax_scale=0.5, impl=impl).recalled.unique().item()


def test_argument_context_and_environment_choose(doubling, monkeypatch):
    assert recalled() == 1
    assert recalled(doubling) == 2
    with use_impl(doubling):
        assert recalled() == 2
        assert recalled("reference") == 1  # the argument wins over the context
        with use_impl("reference"):
            assert recalled() == 1
        assert recalled() == 2
    assert recalled() == 1
    monkeypatch.setenv("HMT_KERNELS_IMPL", doubling)
    assert recalled() == 2
    with use_impl("reference"):  # the context wins over the environment
        assert recalled() == 1
    monkeypatch.setenv("HMT_KERNELS_IMPL", "")
    assert recalled() == 1


def test_context_ends_with_an_exception(doubling):
    with pytest.raises(KeyError), use_impl(doubling):
        raise KeyError
    assert recalled() == 1


def test_backward_uses_the_implementation_of_the_forward_pass(doubling):
    memory = MEMORY.clone().requires_grad_()
    with use_impl(doubling):
        out = memory_recall(QUERY, memory, softmax_scale=0.5)
    (grad,) = torch.autograd.grad(out.recalled.sum(), memory)  # outside the context
    torch.testing.assert_close(grad, torch.full_like(memory, 0.4))


@pytest.mark.parametrize("source", ["use_impl", "HMT_KERNELS_IMPL"])
def test_names_of_other_operators_leave_the_default(source, monkeypatch):
    # "sdpa" is known to the attention only, "cpu" to the recall only.
    if source == "HMT_KERNELS_IMPL":
        monkeypatch.setenv(source, "sdpa")
        assert recalled() == 1
        monkeypatch.setenv(source, "cpu")
        assert "sdpa, the default" in explain("segment_attention", Q, K, V)
    else:
        with use_impl("sdpa"):
            assert recalled() == 1
        with use_impl("cpu"):
            assert "sdpa, the default" in explain("segment_attention", Q, K, V)


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"use_impl: the implementation must be one of .*, got 'fastest'"):
        use_impl("fastest").__enter__()
    monkeypatch.setenv("HMT_KERNELS_IMPL", "fastest")
    with pytest.raises(ValueError, match=r"HMT_KERNELS_IMPL: the implementation must be one of .*, got 'fastest'"):
        recalled()


def test_an_implementation_asked_for_that_cannot_run_is_an_error(choosy, monkeypatch):
    message = "memory_recall: 'cpu', chosen by {}, cannot run: it takes no queries of ones"
    with pytest.raises(ValueError, match=message.format("impl=")):
        recalled(choosy)
    with use_impl(choosy), pytest.raises(ValueError, match=message.format("use_impl")):
        recalled()
    monkeypatch.setenv("HMT_KERNELS_IMPL", choosy)
    with pytest.raises(ValueError, match=message.format("HMT_KERNELS_IMPL")):
        recalled()
    assert message.format("HMT_KERNELS_IMPL") in explain("memory_recall", QUERY, MEMORY, softmax_scale=0.5).replace(
        "ValueError, ", ""
    )


def test_default_passes_over_what_cannot_run_and_says_why(choosy):
    assert recalled() == 1
    assert explain("memory_recall", QUERY, MEMORY, softmax_scale=0.5).splitlines() == [
        "memory_recall: reference, the default for these cpu tensors",
        "  not cpu: it takes no queries of ones",
    ]


def test_default_of_attention():
    assert explain("segment_attention", Q, K, V).splitlines() == [
        "segment_attention: sdpa, the default for these cpu tensors"
    ]
    lines = explain("segment_attention", Q, K, V, return_lse=True).splitlines()
    assert lines[0] == "segment_attention: reference, the default for these cpu tensors"
    assert lines[1].startswith("  not sdpa: ")
    assert "softmax_lse" in lines[1]


def test_a_repeated_call_of_attention_obeys_a_later_choice(monkeypatch):
    """Calls that took SDPA are remembered, but not beyond what they depend on."""
    attend, taken = sdpa.attend, []
    monkeypatch.setattr(sdpa, "attend", lambda *args: taken.append(args) or attend(*args))

    def took_sdpa(**arguments):
        taken.clear()
        segment_attention(Q, K, V, **arguments)
        return len(taken) == 1

    assert took_sdpa() and took_sdpa()
    with use_impl("reference"):
        assert not took_sdpa()
    assert not took_sdpa(impl="reference") and not took_sdpa(return_lse=True)
    monkeypatch.setenv("HMT_KERNELS_IMPL", "reference")
    assert not took_sdpa()
    assert took_sdpa(impl="sdpa")
    monkeypatch.setenv("HMT_KERNELS_IMPL", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        took_sdpa()


@pytest.mark.parametrize("op_name", dispatch.KNOWN)
def test_triton_is_never_the_default_on_the_cpu(op_name):
    for rule in dispatch.RULES:
        if rule.op_name == op_name and rule.device_type != "cuda":
            assert "triton" not in rule.order
            assert "cuda" not in rule.order


@pytest.mark.parametrize("op_name", dispatch.KNOWN)
def test_every_rule_names_known_implementations_and_ends_with_one_that_always_runs(op_name):
    rules = [rule for rule in dispatch.RULES if rule.op_name == op_name]
    assert rules[-1].device_type == "any"
    for rule in rules:
        assert set(rule.order) <= set(dispatch.KNOWN[op_name])
        assert rule.order[-1] == "reference"


@pytest.mark.parametrize("op_name", dispatch.KNOWN)
def test_implementations_lists_each_with_a_reason_or_none(op_name):
    found = dispatch.implementations(op_name)
    assert tuple(found) == dispatch.KNOWN[op_name]
    assert found["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in found.values())


@pytest.mark.parametrize("function", [dispatch.implementations, explain], ids=["implementations", "explain"])
def test_unknown_operator(function):
    with pytest.raises(ValueError, match="op_name must be one of memory_recall, segment_attention, got 'recall'"):
        function("recall")


def load_with(monkeypatch, error):
    def failing_import(path):
        raise error

    monkeypatch.setattr(dispatch.importlib, "import_module", failing_import)
    return dispatch._load("memory_recall", "triton")


def test_reasons_of_failed_imports(monkeypatch):
    path = "hmt_kernels.memory_recall.triton"
    assert load_with(monkeypatch, ModuleNotFoundError(name=path)) == "not built"
    missing_library = ModuleNotFoundError(name="triton")
    assert load_with(monkeypatch, missing_library) == "the Python module 'triton' is not installed"
    broken_library = ImportError("libcudart.so.13: cannot open shared object file")
    assert load_with(monkeypatch, broken_library).startswith("its import failed: libcudart.so.13")


def test_missing_of_a_module_is_its_reason(monkeypatch):
    module = ModuleType("needy")
    module.missing = lambda: "no CUDA device"
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda path: module)
    monkeypatch.setattr(dispatch._modules["memory_recall", "cuda"], "loaded", None)
    assert dispatch._load("memory_recall", "cuda") == "no CUDA device"


def test_import_without_triton_and_without_the_native_module():
    script = """
import sys
sys.modules["triton"] = None            # import raises ModuleNotFoundError
sys.modules["hmt_kernels._C"] = None
import torch, hmt_kernels
out = hmt_kernels.memory_recall(torch.ones(1, 1, 16), torch.ones(1, 5, 16), softmax_scale=0.5)
assert out.recalled.eq(1).all()
assert hmt_kernels.dispatch.missing("memory_recall", "triton") is not None
assert hmt_kernels.dispatch.missing("segment_attention", "cuda") is not None
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_import_loads_no_triton():
    script = "import sys, hmt_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names():
    for name in hmt_kernels.__all__:
        assert getattr(hmt_kernels, name) is not None


def implementations_in_graph(function, *inputs):
    """A compiled function, and the growing list of implementations in the graphs that torch.compile made of it."""
    found = []

    def backend(graph_module, example_inputs):
        for node in graph_module.graph.nodes:
            if "hmt_kernels" in str(node.target):
                found.append(node.args[-1])
            elif "scaled_dot_product_attention" in str(node.target):
                found.append("sdpa")
        return graph_module.forward

    return torch.compile(function, fullgraph=True, backend=backend), found


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_obeys_use_impl_around_it(doubling):
    def function(query, memory, q):
        return memory_recall(query, memory, softmax_scale=0.5).recalled, segment_attention(q, q, q)

    compiled, found = implementations_in_graph(function)
    default = explain("memory_recall", QUERY, MEMORY, softmax_scale=0.5).split()[1].rstrip(",")
    assert compiled(QUERY, MEMORY, Q)[0].unique().item() == 1
    with use_impl(doubling):
        pass  # entering and leaving changes nothing
    with use_impl("reference"):
        compiled(QUERY, MEMORY, Q)
    with use_impl("sdpa"):
        compiled(QUERY, MEMORY, Q)
    assert compiled(QUERY, MEMORY, Q)[0].unique().item() == 1
    assert found == [default, "sdpa", "reference", "reference", default, "sdpa"]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_obeys_use_impl_within_it(doubling):
    def function(query, memory):
        before = memory_recall(query, memory, softmax_scale=0.5).recalled
        with use_impl(doubling):
            within = memory_recall(query, memory, softmax_scale=0.5).recalled
            argument = memory_recall(query, memory, softmax_scale=0.5, impl="reference").recalled
        return torch.stack([before, within, argument, memory_recall(query, memory, softmax_scale=0.5).recalled])

    compiled, found = implementations_in_graph(function)
    assert compiled(QUERY, MEMORY)[:, 0, 0, 0].tolist() == [1, 2, 1, 1]
    assert found[1:3] == [doubling, "reference"]
    assert function(QUERY, MEMORY)[:, 0, 0, 0].tolist() == [1, 2, 1, 1]  # and the compiled call has left no trace


@pytest.mark.usefixtures("fresh_compiler")
def test_an_implementation_may_ask_for_the_compute_capability_when_compiled(doubling, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))

    def unavailable(query, memory):
        return None if dispatch.compute_capability(query.device) >= (9, 0) else "it needs compute capability 9.0"

    monkeypatch.setattr(dispatch._modules["memory_recall", doubling].loaded, "unavailable", unavailable)

    def function(query, memory):
        return memory_recall(query, memory, softmax_scale=0.5).recalled

    rule = dispatch.Rule("memory_recall", "cpu", dispatch._any_shape, (doubling, "reference"))
    monkeypatch.setattr(dispatch, "RULES", (rule, *dispatch.RULES))
    compiled, found = implementations_in_graph(function)
    assert compiled(QUERY, MEMORY).unique().item() == 1
    assert found == ["reference"]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"softmax_scale": float("inf")}, "softmax_scale must be finite"),
        ({"softmax_scale": True}, "softmax_scale must be a number"),
        ({"memory": MEMORY.double()}, "memory must have query's dtype"),
        ({"memory": MEMORY[:, :, :8]}, "memory must have query's last dimension"),
        ({"memory": None}, "memory must be a tensor"),
        ({"num_valid": torch.ones(1)}, "num_valid must be int32"),
        ({"impl": "nonsense"}, "impl must be one of"),
        ({"impl": ["cpu"]}, "impl must be one of"),
    ],
    ids=["infinite", "boolean", "dtype", "width", "none", "num_valid", "unknown", "unhashable"],
)
def test_a_remembered_call_lets_no_other_pass(changed, error):
    arguments = {"query": QUERY, "memory": MEMORY, "num_valid": None, "softmax_scale": 0.5, "impl": None}
    for _ in range(2):
        memory_recall(**arguments)
        with pytest.raises((TypeError, ValueError), match=error):
            memory_recall(**(arguments | changed))


def test_as_many_kinds_of_calls_are_remembered_as_a_program_makes(monkeypatch):
    monkeypatch.setattr(dispatch, "_MOST_REMEMBERED", 2)
    for slots in (1, 2, 3):
        memory_recall(QUERY, MEMORY[:, :slots], softmax_scale=0.5)
        assert len(dispatch._remembered) <= 2


def test_the_first_call_of_all_may_be_compiled():
    script = """
import torch, hmt_kernels
def function(query, memory, q):
    return hmt_kernels.memory_recall(query, memory, softmax_scale=0.5), hmt_kernels.segment_attention(q, q, q)
compiled = torch.compile(function, fullgraph=True, backend="eager")
(recalled, _, _), o = compiled(torch.ones(1, 1, 16), torch.ones(1, 5, 16), torch.ones(1, 1, 4, 8))
assert recalled.eq(1).all() and o.eq(1).all()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
