"""The one registry of who is measured: `python -m benchmarks.providers` lists it, with who cannot run here and why.

A suite's file of providers registers functions of that suite's inputs; each returns what is timed, or raises NotHere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

SUITES = ("recall", "attention", "model", "long context")
OURS = {"recall": "hmt_kernels", "attention": "hmt_kernels", "model": "hmt", "long context": "hmt"}


class NotHere(Exception):
    """Why a provider cannot run, as its only argument."""


class Provider(NamedTuple):
    suite: str
    name: str
    make: Callable[..., Any]
    missing: Callable[[], str | None]  # why it cannot run on this machine, whatever the inputs


_REGISTERED: dict[tuple[str, str], Provider] = {}


def register(suite: str, name: str, make: Callable[..., Any], missing: Callable[[], str | None] = lambda: None) -> None:
    """Add a provider. Raises ValueError for an unknown suite or a name that is taken."""
    if suite not in SUITES or (suite, name) in _REGISTERED:
        raise ValueError(f"a provider needs a suite of {SUITES} and a name of its own in it, got {suite!r}, {name!r}")
    _REGISTERED[suite, name] = Provider(suite, name, make, missing)


def of(suite: str) -> list[Provider]:
    """All providers of a suite, ours first."""
    return sorted((p for p in _REGISTERED.values() if p.suite == suite), key=lambda p: p.name != OURS[suite])


def get(suite: str, name: str) -> Provider:
    return _REGISTERED[suite, name]


def make(suite: str, *inputs: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """By name what each provider returned for these inputs, ours first; and why the others cannot run."""
    found: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for provider in of(suite):
        reason = provider.missing()
        if reason is None:
            try:
                found[provider.name] = provider.make(*inputs)
            except NotHere as error:
                reason = str(error)
        if reason is not None:
            absent[provider.name] = reason
    return found, absent


def needs_module(*names: str) -> Callable[[], str | None]:
    """A `missing` for providers that live in packages of their own."""

    def missing() -> str | None:
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} is not installed" if absent else None

    return missing


def main() -> None:
    for suite in ("recall", "attention", "model"):
        importlib.import_module(f"benchmarks.{suite}_providers")
    importlib.import_module("benchmarks.long_context")
    for suite in SUITES:
        for provider in of(suite):
            print(f"{suite:<13} {provider.name:<34} {provider.missing() or 'runs'}")


if __name__ == "__main__":
    # the same module as the one that the suites register with, not its twin __main__
    importlib.import_module("benchmarks.providers").main()
