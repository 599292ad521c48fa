"""Which components go together: one table of rules, each with the reason and the remedy.

The rules read class attributes alone (`space`, `sites`, `reparametrized`, what an objective needs), so that a spec is refused
before anything is built, and a user's own component obeys them like ours.
"""

from __future__ import annotations

from typing import Any

from elbowroom.components import plugins, registry
from elbowroom.models import spaces
from elbowroom.models.guides.base import Family

WORDS = {
    "real": "the real line",
    "positive": "positive numbers",
    "simplex": "a simplex",
    "one_hot": "one of d categories",
    "binary": "zeros and ones",
}
NATURAL = {
    "real": "diagonal_normal",
    "positive": "log_normal",
    "simplex": "logistic_normal",
    "one_hot": "categorical",
    "binary": "bernoulli",
}
"""The family to name where another does not fit a prior's space."""


def transform_inserted(prior: type, family: type) -> bool:
    """Say whether the family, on the real line, is carried onto the prior's continuous space."""
    theirs = space_of(prior)
    return theirs != "real" and space_of(family) == "real" and theirs not in spaces.DISCRETE


def space_of(cls: type) -> Any:
    """Return the space that a prior or a family states; the real line where it says nothing."""
    return getattr(cls, "space", "real")


def refines(family: type) -> bool:
    """Say whether a guide family improves the encoder's parameters by the model's own density."""
    return getattr(family, "refined", None) not in (None, Family.refined)


def free_dim(prior: Any, latent_dim: int) -> int:
    """Return the number of unconstrained continuous coordinates of all sites of a chosen prior."""
    p = registry.component("prior", prior.name).cls
    return spaces.free_dim(space_of(p), latent_dim) + (getattr(prior, "top_dim", 0) or 0)


def clash(prior: Any, family: Any, objective: Any) -> str | None:
    """Say why a prior, a guide family and an objective of a spec do not go together; None where they do.

    Args:
        prior: the chosen block of the spec.
        family: likewise.
        objective: likewise.
    """
    p = registry.component("prior", prior.name).cls
    q = registry.component("guide", family.name).cls
    mine, theirs = getattr(p, "sites", ("z",)), getattr(q, "sites", ("z",))
    p_name, q_name = plugins.short(prior.name), plugins.short(family.name)
    if mine != theirs:
        if len(theirs) > 1:
            return (
                f"guide.family: {q_name} draws {_listed(theirs)}, prior {p_name} has {_listed(mine)}; use "
                f"{NATURAL[space_of(p)]}, or model.prior = hierarchical"
            )
        return f"guide.family: prior {p_name} has {_listed(mine)}, {q_name} draws {_listed(theirs)}; use hierarchical"
    if space_of(p) != space_of(q) and not transform_inserted(p, q):
        return (
            f"guide.family: {q_name} lives on {WORDS[space_of(q)]}, prior {p_name} on {WORDS[space_of(p)]}; "
            f"use {NATURAL[space_of(p)]}"
        )
    if objective.name == "wake_sleep":
        tied = "guide" in registry.component("prior", prior.name).facts or refines(q)
        if tied:
            which = f"prior {prior.name} is made of the guide" if not refines(q) else f"guide {family.name} reads the model"
            return f"fit.objective: wake_sleep trains model and guide apart, and {which}; use elbo"
    chosen: Any = registry.component("objective", objective.name).cls
    why = chosen.refuses(space_of(p) in spaces.DISCRETE, getattr(q, "reparametrized", True))
    return f"fit.objective: {plugins.short(objective.name)} {why}" if why else None


def notes(prior: Any, family: Any, objective: Any) -> list[str]:
    """Return sentences about what was done for a combination that the user did not ask for word by word."""
    p = registry.component("prior", prior.name).cls
    q = registry.component("guide", family.name).cls
    said = []
    if transform_inserted(p, q):
        how = {"positive": "exp", "simplex": "stick breaking"}[space_of(p)]
        p_name, q_name = plugins.short(prior.name), plugins.short(family.name)
        said.append(f"guide: {q_name} is carried onto {WORDS[space_of(p)]}, where prior {p_name} lives, by {how}")
    if space_of(p) in spaces.DISCRETE and objective.name == "elbo":
        said.append(
            "fit: elbo differentiates through discrete latents by the score function, which is noisy; fit.objective = "
            "trace_enum sums over them"
        )
    return said


def _listed(sites: tuple[str, ...]) -> str:
    return " and ".join(sites)
