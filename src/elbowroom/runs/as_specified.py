"""How a fitted model computes what it is asked: as its spec says. Imports no torch, since the command line reads signatures."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

from elbowroom.inference.compiled.policies import policy

if TYPE_CHECKING:
    from elbowroom.runs.fitted import FittedModel

P = ParamSpec("P")
R = TypeVar("R")


def as_specified(method: Callable[P, R]) -> Callable[P, R]:
    """Compile programs inside a method of a fitted model where its spec's `audit.compile` says so."""

    @wraps(method)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        model = cast("FittedModel", args[0])
        with policy(model.experiment.spec.audit.compile):
            return method(*args, **kwargs)

    return inside
