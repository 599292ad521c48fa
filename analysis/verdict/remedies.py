"""Remedies that the advice of a verdict names: settings and commands of a run, or Pyro's equivalents."""

from __future__ import annotations

from dataclasses import dataclass

import xarray as xr

FITTED = "spec_sha256"  # attribute of the audits of runs


@dataclass(frozen=True)
class Remedies:
    """Remedies in the user's terms; each is a part of a sentence.

    Attributes:
        references: how to give references more time, or use others.
        modes: families with several modes.
        covariance: the family with a full covariance.
        shape: non-normal families.
        richer: richer families than a non-normal one.
        try_family: how to try such a family, after a semicolon.
        try_encoder: how to try a larger encoder.
        simulated: how to obtain unlimited simulated data.
        regularise: further ways to keep an encoder from overfitting.
        alive: how to keep latents active in training.
        held_out: the quantity that shows which model is better.
        likelihoods: where to find other likelihoods.
        draws: where to find the draws of a reference; a format of `reference`.
    """

    references: str
    modes: str
    covariance: str
    shape: str
    richer: str
    try_family: str
    try_encoder: str
    simulated: str
    regularise: str
    alive: str
    held_out: str
    likelihoods: str
    draws: str

    @classmethod
    def of(cls, table: xr.Dataset) -> Remedies:
        """Return the remedies for an audit: of a run, whose spec can be changed, or of a Pyro program."""
        return RUN if FITTED in table.attrs else PROGRAM


RUN = Remedies(
    references="more time (--budget), another reference (audit.references), or fewer latents",
    modes="guide.family=mixture, or flow",
    covariance="guide.family=full_rank_normal",
    shape="guide.family=flow or mixture",
    richer="a flow with more transforms, a mixture with more components, or another family (guide.family)",
    try_family="elbowroom improve RUN tries it",
    try_encoder="elbowroom improve RUN does that",
    simulated="elbowroom improve RUN",
    regularise="fit.patience or dropout in guide.encoder",
    alive="fit.kl_warmup, or fit.objective: {name: beta, free_bits: ...}",
    held_out="elbowroom compare says by held-out log p(x) which is better",
    likelihoods="elbowroom components likelihood",
    draws="posteriors/{reference}.nc",
)
PROGRAM = Remedies(
    references="more time (budget=), another one (references=), or fewer latents",
    modes="a mixture of normals, or a flow",
    covariance="a guide with a full covariance (MultivariateNormal, its scale_tril from the encoder)",
    shape="a guide with a flow (TransformedDistribution) or a mixture",
    richer="a flow with more layers, a mixture with more components, or another family of guides",
    try_family="train that guide with the model's parameters fixed, and audit again",
    try_encoder="train the guide alone, with the model's parameters fixed, and audit again",
    simulated="pyro.infer.Predictive(model, num_samples=...)",
    regularise="stopping early or dropout in the encoder",
    alive="poutine.scale on their sites in model and guide, rising to 1, or a floor for their KL",
    held_out="the mean of log_evidence over the same held-out data says which is better, where it is known",
    likelihoods="one with the support of the data: pyro.distributions",
    draws="audit.posteriors[{reference!r}]",
)
