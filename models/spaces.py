"""The sets that a latent z can live in, by name; a prior and a guide family must agree on one.

Name, set, and number of unconstrained coordinates with their map:

real       R^d                     d, unchanged
positive   (0, inf)^d              d, by exp
simplex    sum z_j = 1, z_j > 0    d - 1, by stick breaking
sphere     |z| = 1                 d - 1, by a radial map that leaves out one point (`sphere`)
one_hot    one of d categories     0: summed over
binary     {0, 1}^d                0: summed over
"""

from __future__ import annotations

from typing import Any, Literal

from pyro.distributions import constraints
from torch.distributions import ExpTransform, IndependentTransform, Transform, biject_to

from elbowroom.models.sphere import OntoSphere

Space = Literal["real", "positive", "simplex", "sphere", "one_hot", "binary"]

DISCRETE: frozenset[str] = frozenset({"one_hot", "binary"})

_CONSTRAINTS: dict[str, Any] = {
    "real": constraints.independent(constraints.real, 1),
    "positive": constraints.independent(constraints.positive, 1),
    "simplex": constraints.simplex,
    "sphere": constraints.sphere,
    "one_hot": constraints.one_hot,
    "binary": constraints.independent(constraints.boolean, 1),
}


def constraint(space: Space) -> Any:
    """Return the space as a torch constraint with one event dimension."""
    return _CONSTRAINTS[space]


def least(space: Space) -> int:
    """Return the smallest number of coordinates d with which the space has more than one or two points."""
    return 2 if space in ("simplex", "sphere") else 1


def free_dim(space: Space, latent_dim: int) -> int:
    """Return the number of unconstrained continuous coordinates of z (d,) in this space."""
    return 0 if space in DISCRETE else latent_dim - (space in ("simplex", "sphere"))


def onto(space: Space) -> Transform:
    """Return the map from unconstrained coordinates to a continuous space.

    Raises:
        ValueError: the space is discrete.
    """
    if space in DISCRETE:
        raise ValueError(f"there is no smooth map onto a discrete space ({space})")
    if space == "positive":  # torch's own map ends with an affine identity map, so its codomain is declared as the real line
        return IndependentTransform(ExpTransform(), 1)
    if space == "sphere":  # torch knows no map onto it
        return OntoSphere()
    return biject_to(constraint(space))
