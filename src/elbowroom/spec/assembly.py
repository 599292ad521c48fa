"""Builds a VAE from a spec and the facts of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from elbowroom.components import compatibility, plugins, registry
from elbowroom.components.slots import build
from elbowroom.errors import SpecError
from elbowroom.models import spaces
from elbowroom.models.columns import Column
from elbowroom.models.guides.base import AmortizedGuide, Family, Onto
from elbowroom.models.networks.base import Network
from elbowroom.models.priors.markov import steps_of
from elbowroom.models.vae import VAE

if TYPE_CHECKING:
    from elbowroom.data.dataset import Dataset
    from elbowroom.spec.spec import Record, Spec


@dataclass(frozen=True)
class Facts:
    """Properties of the data that the VAE is built from; a run folder records them, so that it can be opened without the data.

    Attributes:
        event_shape: shape of one datum.
        levels: 1 + the largest value if all values are whole numbers from 0, else None.
        columns: one for each entry of x in a table; None for images and sequences.
        covariates: names of the covariates.
        exposure: whether counts have an exposure.
        missing: whether entries are missing.
    """

    event_shape: tuple[int, ...]
    levels: int | None = None
    columns: tuple[Column, ...] | None = None
    covariates: tuple[str, ...] = ()
    exposure: bool = False
    missing: bool = False

    @classmethod
    def of(cls, data: Dataset) -> Facts:
        """Derive the facts from data."""
        return cls(
            event_shape=data.event_shape,
            levels=data.levels,
            columns=data.described,
            covariates=data.covariate_names,
            exposure=data.exposure is not None,
            missing=data.missing,
        )

    @classmethod
    def recorded(cls, record: Record) -> Facts:
        """Read the facts from a run folder's record."""
        return cls(
            event_shape=tuple(record.event_shape),
            levels=record.levels,
            columns=None if record.columns is None else tuple(Column(*entry) for entry in record.columns),
            covariates=tuple(record.covariates),
            exposure=record.exposure,
            missing=record.missing,
        )

    def tree(self) -> dict[str, Any]:
        """Return the facts for a record, without those that have their usual value."""
        tree: dict[str, Any] = {"event_shape": list(self.event_shape)}
        if self.levels is not None:
            tree["levels"] = self.levels
        if self.columns is not None:
            tree["columns"] = [[column.name, column.kind, column.levels] for column in self.columns]
        for name in ("covariates", "exposure", "missing"):
            if value := getattr(self, name):
                tree[name] = list(value) if isinstance(value, tuple) else value
        return tree


def assemble(spec: Spec, facts: Facts) -> VAE:
    """Build the VAE of a spec with fresh weights; a SpecError if options do not fit each other or the data."""
    model, guide, d = spec.model, spec.guide, spec.model.latent_dim
    likelihood = build(
        "likelihood",
        model.likelihood,
        where="model.likelihood",
        event_shape=facts.event_shape,
        levels=facts.levels,
        columns=facts.columns,
    )
    family = _family(model.prior, guide.family, d, likelihood.feature_shape)
    whole, rest = divmod(likelihood.param_dim, likelihood.width)
    decoder = build(
        "network",
        model.decoder,
        where="model.decoder",
        in_shape=(d + len(facts.covariates),),
        out_dim=likelihood.param_dim,
        out_shape=(likelihood.param_dim,) if rest else (whole, *facts.event_shape),
        marks=False,
        latent_dim=d,
    )
    network = registry.component("network", guide.encoder.name).cls
    joined = getattr(network, "joined_shape", Network.joined_shape)
    beside = len(facts.covariates) + facts.exposure
    encoder = build(
        "network",
        guide.encoder,
        where="guide.encoder",
        in_shape=joined(likelihood.feature_shape, marks=facts.missing, covariates=beside),
        out_dim=family.param_dim,
        out_shape=getattr(family, "param_shape", (family.param_dim,)),
        marks=facts.missing,
        latent_dim=0,
    )
    posterior = AmortizedGuide(encoder, family, marks=facts.missing)
    prior = build(
        "prior",
        model.prior,
        where="model.prior",
        latent_dim=d,
        covariate_dim=len(facts.covariates),
        feature_shape=likelihood.feature_shape,
        guide=posterior,
    )
    return VAE(prior, likelihood, decoder, posterior, covariate_dim=len(facts.covariates))


def restore(vae: VAE, state: Mapping[str, Tensor]) -> None:
    """Load weights into a VAE; buffers take the shapes that they have in `state`.

    Raises:
        RuntimeError, TypeError, AttributeError: the weights belong to another model.
    """
    for name, _ in list(vae.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if name in state:
            setattr(vae.get_submodule(owner), leaf, state[name].clone())
    vae.load_state_dict(dict(state))


def _family(prior: Any, chosen: Any, latent_dim: int, feature_shape: tuple[int, ...]) -> Family:
    """Build the guide family, transformed from the real line to the prior's space if that is another one."""
    p, q = registry.component("prior", prior.name).cls, registry.component("guide", chosen.name).cls
    space, inserted = compatibility.space_of(p), compatibility.transform_inserted(p, q)
    if inserted and latent_dim < spaces.least(space):  # before a family without a single coordinate is built
        raise SpecError(
            f"model.latent_dim: prior {plugins.short(prior.name)} lives on {compatibility.WORDS[space]}, which has at least "
            f"{spaces.least(space)} coordinates, got {latent_dim}; use {spaces.least(space)} or more"
        )
    width = spaces.free_dim(space, latent_dim) if inserted else latent_dim
    family: Family = build(
        "guide",
        chosen,
        where="guide.family",
        latent_dim=width,
        top_dim=getattr(prior, "top_dim", 0),
        steps=steps_of(getattr(prior, "steps", None), feature_shape, width),
    )
    return Onto(family, space, latent_dim) if inserted else family
