"""Which references were asked for: what `references=` in Python and `--references` on the command line mean."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

from elbowroom.errors import UserError, nearest
from elbowroom.inference.posterior import Reference
from elbowroom.inference.references.ais.ais import Annealed
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.enumeration import Enumeration
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.references.hmc.hmc import HMC
from elbowroom.inference.references.importance.importance import ImportanceSampling
from elbowroom.inference.target.log_joint import LogJoint

Methods = str | Reference | Sequence[str | Reference]
"""`auto`, `none`, names with commas between them, a reference, or a list of names and references."""
KNOWN: dict[str, type[Reference]] = {
    cls.name: cls for cls in (ClosedForm, Enumeration, Grid, HMC, ImportanceSampling, Annealed)
}
ALONE = ("auto", "none")
UNTIL = (
    "the value of time.monotonic() at which it must stop, as in `def __call__(self, log_joint, *, keep, seed, until=math.inf)`"
)


def requested(references: Methods) -> Literal["auto"] | list[str | Reference]:
    """Read `references`: return `auto`, or known names and references; an empty list for `none`.

    Raises:
        UserError: for an unknown name, one that is given twice, or what is neither a name nor a reference.
    """
    if isinstance(references, str):
        given: list[Any] = [name.strip() for name in references.split(",")]
    else:
        given = list(references) if isinstance(references, Sequence) else [references]
    for one in given:
        if isinstance(one, str) and one not in (*KNOWN, *ALONE):
            raise UserError(f"references: unknown reference {one!r}{nearest(one, (*KNOWN, *ALONE))}")
        if isinstance(one, type) or not isinstance(one, str | Reference):
            what = f"the class {one.__name__}; write {one.__name__}()" if isinstance(one, type) else repr(one)
            raise UserError(f"references: auto, none, names or Reference objects are allowed, got {what}")
    names = [one if isinstance(one, str) else one.name for one in given]
    for name in names:
        if name in ALONE and len(names) > 1:
            raise UserError(f"references: {name} stands alone, got {', '.join(names)}")
        if names.count(name) > 1:
            raise UserError(f"references: {name} is given twice")
    if names == ["auto"]:
        return "auto"
    return [] if names == ["none"] else given


def usable(item: str | Reference, log_joint: LogJoint) -> Reference:
    """Return the reference of that name, or the given one; a UserError if it cannot be used on this log joint."""
    method = KNOWN[item]() if isinstance(item, str) else item
    if not heeds_the_clock(method):
        raise UserError(f"audit.references: {type(method).__name__}.__call__ needs a keyword `until`: {UNTIL}")
    refusal = method.refusal(log_joint)
    if refusal is not None:
        raise UserError(f"audit.references: {refusal}; use auto")
    return method


def heeds_the_clock(method: Reference) -> bool:
    """Return whether a reference can be called with `until`."""
    parameters = inspect.signature(type(method).__call__).parameters.values()
    return any(p.name == "until" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
