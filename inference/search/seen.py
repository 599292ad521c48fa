"""Points at which an audit has evaluated log p(x, z): what one method has seen, another must not deny.

The guide's own pass draws thousands of points per datum. They stay here while the `LogJoint` lives, so that a grid can compare
itself with them: a point far above all that its lattice saw is a peak that it missed.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from elbowroom.inference.target.log_joint import LogJoint


@dataclass(frozen=True)
class Seen:
    """Points z (S, N, d), unconstrained, and log p(x, z) there, (S, N)."""

    z: Tensor
    log_p: Tensor


_known: weakref.WeakKeyDictionary[LogJoint, Seen] = weakref.WeakKeyDictionary()


def remember(log_joint: LogJoint, z: Tensor, log_p: Tensor) -> None:
    """Keep the points of the guide's pass; those of an earlier pass are replaced."""
    _known[log_joint] = Seen(z, log_p)


def seen(log_joint: LogJoint) -> Seen | None:
    """Return the points of the guide's pass over this `LogJoint`, or None."""
    return _known.get(log_joint)
