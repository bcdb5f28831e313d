"""Which implementation of an operator runs: a table, a context manager, an environment variable, and the reasons."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])

ENVIRONMENT_VARIABLE = "HMT_KERNELS_IMPL"

KNOWN: dict[str, tuple[str, ...]] = {
    "memory_recall": ("reference", "triton", "cuda", "cpu"),
    "segment_attention": ("reference", "sdpa", "triton", "cuda"),
}


def _any_shape(query: torch.Tensor) -> bool:
    return True


class Rule(NamedTuple):
    op_name: str
    device_type: str
    matches: Callable[[torch.Tensor], bool]
    order: tuple[str, ...]


# The first rule that matches wins; of its order, the first implementation that can run these tensors runs.
RULES = (
    Rule("memory_recall", "cpu", _any_shape, ("cpu", "reference")),
    # on an H100 Triton's recall of one query took 60 to 80 % of the CUDA C++ kernel's time, at D = 576
    Rule("memory_recall", "cuda", _any_shape, ("triton", "cuda", "reference")),
    Rule("memory_recall", "any", _any_shape, ("reference",)),
    # Triton's attention took 40 to 90 % of the CUDA C++ kernels' time on an H100, whose newer instructions it uses
    Rule("segment_attention", "cuda", _any_shape, ("triton", "cuda", "sdpa", "reference")),
    Rule("segment_attention", "any", _any_shape, ("sdpa", "reference")),
)


class Decision(NamedTuple):
    op_name: str
    name: str | None  # None: the implementation that was asked for cannot run
    why: str
    rejected: dict[str, str]


# A plain global, not a context variable: torch.compile guards on it, so a compiled function obeys use_impl too.
_selected: str | None = None
# A place for every module from the start: torch.compile, which may be what loads one, keeps to the keys it has seen.
_modules: dict[tuple[str, str], SimpleNamespace] = {
    (op_name, name): SimpleNamespace(loaded=None) for op_name, names in KNOWN.items() for name in names
}
_missing: dict[tuple[str, str], str | None] = {}
_remembered: dict[tuple[Any, ...], str] = {}
_MOST_REMEMBERED = 4096


def constant_when_compiled(function: _F) -> _F:
    """Let torch.compile call this function of constants instead of tracing it, and take its result as a constant."""
    # What torch.compiler.assume_constant_result does, less its import of the whole compiler, which takes seconds.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def compute_capability(device: torch.device) -> tuple[int, int]:
    """torch.cuda.get_device_capability for the `unavailable` of an implementation: torch.compile cannot trace that."""
    return torch.cuda.get_device_capability(device)


@contextlib.contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Inside this context every operator that knows the implementation `name` uses it; the others keep their default.

    The choice holds for the whole process (all threads) and is taken when an operator is called: its backward pass
    uses the implementation of its forward pass. Raises ValueError for a name that no operator knows.

        with hmt_kernels.use_impl("reference"):
            out = hmt_kernels.memory_recall(query, memory, softmax_scale=0.125)
    """
    global _selected
    _check_known(name, "use_impl")
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


def explain(op_name: str, *args: Any, **kwargs: Any) -> str:
    """Say which implementation the call `op_name(*args, **kwargs)` would run, and why not the ones before it.

    Runs nothing. Raises ValueError for an unknown operator, and what the call itself would raise for bad arguments.

        print(hmt_kernels.explain("memory_recall", query, memory, softmax_scale=0.125))
    """
    _check_op_name(op_name)
    decision = importlib.import_module(f"hmt_kernels.{op_name}.api").decide(*args, **kwargs)
    lines = [f"{op_name}: {decision.name or 'ValueError'}, {decision.why}"]
    lines += [f"  not {name}: {reason}" for name, reason in decision.rejected.items()]
    return "\n".join(lines)


def implementations(op_name: str) -> dict[str, str | None]:
    """Every implementation of an operator, with the reason why this machine cannot run it (None: it can)."""
    _check_op_name(op_name)
    return {name: missing(op_name, name) for name in KNOWN[op_name]}


def implementation(op_name: str, name: str) -> ModuleType:
    """The module `hmt_kernels.<op_name>.<name>`; raises ValueError if it is missing on this machine."""
    reason = missing(op_name, name)
    if reason is not None:
        raise ValueError(f"{op_name}: implementation {name!r} cannot run here: {reason}")
    return _modules[op_name, name].loaded


# torch.compile cannot trace an import by name; the answer depends on the machine only, never on the tensors.
@constant_when_compiled
def missing(op_name: str, name: str) -> str | None:
    """Why this machine cannot run an implementation, whatever the tensors (None: it can). Asked once per process."""
    key = (op_name, name)
    if key not in _missing:
        _missing[key] = _load(op_name, name)
    return _missing[key]


def decide(
    op_name: str, impl: str | None, args: tuple[Any, ...], excluded: Mapping[str, str] | None = None
) -> Decision:
    """Pick the implementation for `unavailable(*args)`, args[0] being the query; `excluded` holds known reasons."""
    name, source = _requested(op_name, impl)
    if name is not None:
        reason = _why_not(op_name, name, args, excluded)
        if reason is None:
            return Decision(op_name, name, f"chosen by {source}", {})
        return Decision(op_name, None, f"{name!r}, chosen by {source}, cannot run: {reason}", {name: reason})
    rejected: dict[str, str] = {}
    for candidate in _default_order(op_name, args[0]):
        reason = _why_not(op_name, candidate, args, excluded)
        if reason is None:
            return Decision(op_name, candidate, f"the default for these {args[0].device.type} tensors", rejected)
        rejected[candidate] = reason
    return Decision(op_name, None, "no implementation can run these tensors", rejected)


def chosen(decision: Decision) -> str:
    """The name that was decided on; raises ValueError with the reason if the implementation asked for cannot run."""
    if decision.name is None:
        raise ValueError(f"{decision.op_name}: {decision.why}")
    return decision.name


def selected() -> str | None:
    """What use_impl or the environment asks for, as a part of the key of `remember`."""
    return _selected or _environment()


def remembered(key: tuple[Any, ...]) -> str | None:
    """The implementation that was decided on for a call of this kind before."""
    try:
        return _remembered.get(key)
    except TypeError:  # not hashable: decide says what is wrong with it
        return None


def remember(key: tuple[Any, ...], name: str) -> None:
    """Let `remembered(key)` be `name`; the key holds all that decides, metadata of the tensors included."""
    if len(_remembered) >= _MOST_REMEMBERED:
        _remembered.clear()
    _remembered[key] = name


def _default_order(op_name: str, query: torch.Tensor) -> tuple[str, ...]:
    device_types = (query.device.type, "any")
    for rule in RULES:
        if rule.op_name == op_name and rule.device_type in device_types and rule.matches(query):
            return rule.order
    return ("reference",)


def _requested(op_name: str, impl: str | None) -> tuple[str | None, str]:
    if impl is not None:
        if impl not in KNOWN[op_name]:
            raise ValueError(f"{op_name}: impl must be one of {', '.join(KNOWN[op_name])}, got {impl!r}")
        return impl, "impl="
    if _selected is not None:
        return (_selected if _selected in KNOWN[op_name] else None), "use_impl"
    name = _environment()
    if name is not None:
        _check_known(name, ENVIRONMENT_VARIABLE)
    return (name if name in KNOWN[op_name] else None), ENVIRONMENT_VARIABLE


# torch.compile does not guard on the environment: a compiled function keeps what it found when it was traced.
@constant_when_compiled
def _environment() -> str | None:
    return os.environ.get(ENVIRONMENT_VARIABLE) or None


def _why_not(op_name: str, name: str, args: tuple[Any, ...], excluded: Mapping[str, str] | None) -> str | None:
    if excluded is not None and name in excluded:
        return excluded[name]
    reason = missing(op_name, name)
    if reason is not None:
        return reason
    return _modules[op_name, name].loaded.unavailable(*args)


def _load(op_name: str, name: str) -> str | None:
    path = f"hmt_kernels.{op_name}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        return "not built" if error.name == path else f"the Python module {error.name!r} is not installed"
    except (ImportError, OSError) as error:
        return f"its import failed: {error}"
    _modules[op_name, name].loaded = module
    return module.missing() if hasattr(module, "missing") else None


def _check_op_name(op_name: str) -> None:
    if op_name not in KNOWN:
        raise ValueError(f"op_name must be one of {', '.join(KNOWN)}, got {op_name!r}")


def _check_known(name: str, source: str) -> None:
    if not any(name in names for names in KNOWN.values()):
        every_name = sorted({name for names in KNOWN.values() for name in names})
        raise ValueError(f"{source}: the implementation must be one of {', '.join(every_name)}, got {name!r}")
