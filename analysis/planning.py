"""Which references an audit uses: those that were named, or the first that applies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from elbowroom.errors import UserError
from elbowroom.inference.enumeration import Enumeration
from elbowroom.inference.exact import ClosedForm
from elbowroom.inference.grid import Grid
from elbowroom.inference.posterior import Reference
from elbowroom.inference.target import LogJoint

AUTO: tuple[type[Reference], ...] = (ClosedForm, Enumeration, Grid)


def choose(references: Literal["auto"] | Sequence[str | Reference], log_joint: LogJoint) -> list[Reference]:
    """Turn names into methods; `auto` takes the first of closed form, enumeration and grid that applies.

    Raises:
        UserError: for an unknown name, or a method that cannot be used on this model.
    """
    if references == "auto":
        return [method for method in (cls() for cls in AUTO) if method.refusal(log_joint) is None][:1]
    known = {cls.name: cls for cls in AUTO}
    methods: list[Reference] = []
    for item in references:
        if isinstance(item, str):
            if item not in known:
                raise UserError(f"audit.references: unknown reference {item!r}; allowed: auto, {', '.join(known)}")
            item = known[item]()
        refusal = item.refusal(log_joint)
        if refusal is not None:
            raise UserError(f"audit.references: {refusal}; use auto")
        methods.append(item)
    return methods
