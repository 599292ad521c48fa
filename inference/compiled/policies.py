"""When functions are compiled: always, never, or when the planned work repays it."""

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
    """Set the compile policy inside a `with` block."""
    if compile not in get_args(Compile):
        raise ValueError(f"compile must be one of {', '.join(get_args(Compile))}, got {compile!r}")
    return _inside(_policy, compile)


def current_policy() -> Compile:
    """Return the compile policy in force."""
    return _policy.get()


def expecting(data: int) -> AbstractContextManager[None]:
    """Announce that there are at least `data` data in all, so that a graph compiled for some of them serves the others too."""
    return _inside(_ahead, data_ahead(data))


def data_ahead(here: int) -> int:
    """Return the number of data that a graph would serve: those at hand, or the announced number if it is larger."""
    return max(here, _ahead.get())


def at_most(evaluations: int) -> AbstractContextManager[None]:
    """Announce that each datum is evaluated at no more than `evaluations` points."""
    return _inside(_most, evaluations_ahead(evaluations))


def evaluations_ahead(usual: float) -> float:
    """Return how often each datum is evaluated: `usual`, as in an audit, or the announced limit if it is smaller."""
    return min(usual, _most.get())
