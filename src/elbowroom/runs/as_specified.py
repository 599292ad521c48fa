"""How a fitted model computes what it is asked: as its spec says, and by the references that were named.

Imports no torch, since the command line reads signatures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from elbowroom.inference.compiled.policies import policy
from elbowroom.runs import costs

if TYPE_CHECKING:
    from elbowroom.runs.fitted import FittedModel

P = ParamSpec("P")
R = TypeVar("R")


def as_specified(method: Callable[P, R]) -> Callable[P, R]:
    """Compile programs inside a method of a fitted model where its spec's `audit.compile` says so.

    Its `references` are read, so that a wrong name is an error also where none are needed, and what its numbers cost is
    compared with the memory of this machine.
    """
    signature = inspect.signature(method)

    @wraps(method)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        model = cast("FittedModel", args[0])
        if "references" in kwargs:
            from elbowroom.analysis.audit.requested import requested

            kwargs["references"] = requested(cast(Any, kwargs["references"]))
        costs.check(model, signature.bind(*args, **kwargs).arguments, signature.parameters)
        with policy(model.experiment.spec.audit.compile):
            return method(*args, **kwargs)

    return inside
