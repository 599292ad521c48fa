"""When functions are compiled: always, never, or where the work ahead pays for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Literal, TypeVar, get_args

Compile = Literal["auto", "always", "never"]
"""Whether programs are compiled: where it pays, wherever it can be done, or not at all."""
T = TypeVar("T")
_policy: ContextVar[Compile] = ContextVar("elbowroom_compile", default="auto")
_ahead: ContextVar[int] = ContextVar("elbowroom_data_ahead", default=0)
_most: ContextVar[float] = ContextVar("elbowroom_evaluations_ahead", default=float("inf"))


@contextlib.contextmanager
def _inside(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def policy(compile: Compile) -> AbstractContextManager[None]:
    """Set what is compiled inside."""
    if compile not in get_args(Compile):
        raise ValueError(f"compile must be one of {', '.join(get_args(Compile))}, got {compile!r}")
    return _inside(_policy, compile)


def current_policy() -> Compile:
    """Return what is compiled here."""
    return _policy.get()


def expecting(data: int) -> AbstractContextManager[None]:
    """Say how many data there are in all, at least: what is compiled for some of them serves the others."""
    return _inside(_ahead, data_ahead(data))


def data_ahead(here: int) -> int:
    """Return for how many data a graph would serve, of which some are here."""
    return max(here, _ahead.get())


def at_most(evaluations: int) -> AbstractContextManager[None]:
    """Say that each datum is evaluated at so many points at most, where that may be few."""
    return _inside(_most, evaluations_ahead(evaluations))


def evaluations_ahead(usual: float) -> float:
    """Return at how many points each datum is evaluated, of what an audit would."""
    return min(usual, _most.get())
