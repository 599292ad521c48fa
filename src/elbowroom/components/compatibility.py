"""Rules for which components can be combined, each with its reason and a remedy.

The rules read class attributes only (`space`, `sites`, `reparametrized`, what an objective needs). A spec is therefore refused
before anything is built, and the rules hold for a user's own components too.
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
    "sphere": "a sphere",
    "one_hot": "one of d categories",
    "binary": "zeros and ones",
}
NATURAL = {
    "real": "diagonal_normal",
    "positive": "log_normal",
    "simplex": "logistic_normal",
    "sphere": "power_spherical",
    "one_hot": "categorical",
    "binary": "bernoulli",
}
"""Space of a prior -> the family to suggest when another one does not fit."""


def transform_inserted(prior: type, family: type) -> bool:
    """Say whether a family on the real line is transformed to the prior's continuous space."""
    theirs = space_of(prior)
    return theirs != "real" and space_of(family) == "real" and theirs not in spaces.DISCRETE


def space_of(cls: type) -> Any:
    """Return the space that a prior or a family declares; by default the real line."""
    return getattr(cls, "space", "real")


def refines(family: type) -> bool:
    """Say whether a guide family refines the encoder's parameters with the model's density."""
    return getattr(family, "refined", None) not in (None, Family.refined)


def free_dim(prior: Any, latent_dim: int) -> int:
    """Return the number of unconstrained continuous dimensions of the prior, over all sites."""
    p = registry.component("prior", prior.name).cls
    return spaces.free_dim(space_of(p), latent_dim) + (getattr(prior, "top_dim", 0) or 0)


def clash(prior: Any, family: Any, objective: Any) -> str | None:
    """Say why the chosen prior, guide family and objective of a spec cannot be combined; None where they can."""
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
    """Return sentences about what this combination implies, such as an inserted transform."""
    p = registry.component("prior", prior.name).cls
    q = registry.component("guide", family.name).cls
    said = []
    if transform_inserted(p, q):
        how = {"positive": "exp", "simplex": "stick breaking", "sphere": "a radial map, which leaves out one point"}[
            space_of(p)
        ]
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
