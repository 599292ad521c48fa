r"""Encode: the encoder's mu and sigma for each row, and the corrected posterior.

mu and sigma are parameters of an approximation, q(z|x), which can be wrong for some rows. The corrected posterior is the best
one available (see `analysis.queries.best_posterior`), with its source, its status and the k-hat of the encoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elbowroom.analysis.audit.requested import Methods
from elbowroom.analysis.idata import site_dims
from elbowroom.analysis.measures.table import GOOD_K, TRUSTED
from elbowroom.analysis.queries.best_posterior import Reading, read
from elbowroom.analysis.queries.imputation import central_interval
from elbowroom.inference.program.sites import Site, is_real
from elbowroom.inference.target import discrete
from elbowroom.queries.answer import Answer, Form
from elbowroom.queries.stream import described, ending, foreseen, place_of, references_for, stream
from elbowroom.runs.rows import query_rows

if TYPE_CHECKING:
    from elbowroom.analysis.plots.style import Absent, Plot
    from elbowroom.inference.posterior import Reference
    from elbowroom.inference.target.discrete import Table
    from elbowroom.models.vae import VAE
    from elbowroom.queries.stream import Chunk, Report
    from elbowroom.runs.fitted import FittedModel

QUANTILES = (0.05, 0.5, 0.95)
WORDS: dict[str, tuple[str, str]] = {
    "mu": ("latent units", "mean of q(z|x), what the encoder says"),
    "sigma": ("latent units", "standard deviation of q(z|x)"),
    "mean": ("latent units", "mean of the corrected posterior"),
    "sd": ("latent units", "standard deviation of the corrected posterior"),
    "quantile": ("latent units", "quantiles of the corrected posterior"),
    "covariance": ("latent units^2", "covariance of the corrected posterior"),
    "guide_probability": ("1", "q(z = k|x), what the encoder says"),
    "probability": ("1", "p(z = k|x); by draws of the corrected posterior where there are continuous latents, too"),
    "draws": ("latent units", "draws of the corrected posterior"),
    "pareto_k": ("1", f"k-hat of the guide's importance weights; above {GOOD_K} they cannot correct it"),
    "elbo": ("nats", "ELBO of the encoder"),
    "log_evidence": ("nats", "log p(x), NaN where only a bound is known"),
    "log_evidence_se": ("nats", "numerical or standard error of log_evidence"),
    "evidence_method": ("", "which kind of number log_evidence is"),
    "source": ("", "where the corrected posterior comes from"),
    "status": ("", "exact, certified, uncertified, or amortized: the guide as it is"),
    "reason": ("", "why"),
}


def ask(
    run: FittedModel,
    data: Any,
    *,
    references: Methods,
    samples: int,
    draws: int,
    keep: int,
    seed: int | None,
    device: str | None,
    report: Report | None,
    out: Path | None,
    resume: bool,
    budget: float | str | None,
    dry_run: bool,
) -> Answer:
    """Encode rows; arguments and errors as `Run.encode`."""
    (given, form), until = Form.of(data), ending(budget)
    rows, place = query_rows(run, given), place_of(run, device)
    methods = references_for(run, rows, references, place)
    if dry_run:
        return Answer(*foreseen(run, rows, methods, draws=draws, counts={"to encode": len(rows)}, device=place), form)
    options = {"references": described(methods), "samples": samples, "draws": draws, "keep": keep}
    found = stream(
        run, rows, encoder(run.vae, methods, draws=max(draws, samples), keep=max(keep, samples), samples=samples),
        question="encode", options=options, seed=run.experiment.spec.seed if seed is None else seed, device=place,
        out=out, resume=resume, report=report, until=until,
    )  # fmt: skip
    found = found.assign_attrs(answers="encode", **({"space": "sphere"} if run.vae.prior.space == "sphere" else {}))
    return Answer(found, conclude(found), form, (partial(draw, found),))


def encoder(
    vae: VAE, methods: Sequence[Reference], *, draws: int, keep: int, samples: int = 0
) -> Callable[[Chunk], xr.Dataset]:
    """Return a function that encodes one chunk of rows.

    Args:
        vae: the VAE, on the device.
        methods: references, best first.
        draws: draws per row for the guide's estimates and importance weights.
        keep: draws per row of the corrected posterior, for its quantiles.
        samples: number of these draws that the answer contains.
    """

    def answer(chunk: Chunk) -> xr.Dataset:
        found = read(chunk.log_joint, methods, draws=draws, keep=keep, seed=chunk.seed, until=chunk.until)
        columns: dict[str, Any] = {}
        sums = (discrete.table(chunk.log_joint), discrete.values(chunk.log_joint)) if chunk.log_joint.dim == 0 else None
        for site in (*chunk.log_joint.sites, *chunk.log_joint.program.discrete):
            end = "" if site.name == "z" else f"_{site.name}"
            parts = _discrete(site, found, sums) if site.values is not None else _continuous(site, found, vae, chunk)
            if samples:
                drawn = _flat(found.posterior.sites[site.name])[:samples]
                parts["draws"] = (("draw", *site_dims(site.name, site.shape)), drawn)
            for name, (dims, value) in parts.items():
                lead = dims[:1] if dims[:1] == ("draw",) else ()
                columns[name + end] = ((*lead, "obs_id", *dims[len(lead) :]), value.cpu().numpy(), _about(name))
        columns |= {
            "pareto_k": found.guide.stats["pareto_k"].cpu().numpy(),
            "elbo": found.guide.stats["elbo"].cpu().numpy(),
            "log_evidence": found.evidence.value,
            "log_evidence_se": found.evidence.error,
            "evidence_method": found.evidence.method,
            "source": np.array(found.source),
            "status": np.array(found.posterior.status),
            "reason": np.array(found.posterior.reason),
        }
        data = {name: value if isinstance(value, tuple) else ("obs_id", value, _about(name)) for name, value in columns.items()}
        return xr.Dataset(data, coords={"quantile_at": list(QUANTILES)} if any("quantile" in name for name in data) else None)

    return answer


def _about(name: str) -> dict[str, str]:
    units, words = WORDS[name]
    return {"units": units, "long_name": words}


def _flat(draws: Tensor) -> Tensor:
    return draws.flatten(0, 1)


def _continuous(site: Site, found: Reading, vae: VAE, chunk: Chunk) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Return moments of guide and posterior of a site, and quantiles: name -> dims without obs_id, values."""
    dims = tuple(site_dims(site.name, site.shape))
    q, p = (_flat(of.sites[site.name]).double() for of in (found.guide, found.posterior))
    mu, sigma, mean, sd = q.mean(0), q.std(0), p.mean(0), p.std(0)
    out: dict[str, tuple[tuple[str, ...], Tensor]] = {}
    if is_real(site.support):  # the moments of unconstrained coordinates, which are more precise, are then those of the site
        best = found.posterior
        assert best.mean is not None
        assert best.covariance is not None
        of_site = best.covariance[:, site.columns, site.columns]
        mean = best.mean[:, site.columns].reshape(mean.shape)
        sd = of_site.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().reshape(sd.shape)
        if len(dims) == 1:
            out["covariance"] = ((dims[0], f"{dims[0]}_"), of_site)
        exact = _said(vae, chunk) if site.name == "z" else None
        mu, sigma = exact if exact is not None and exact[0].shape == mu.shape else (mu, sigma)
    flat = p.flatten(1)
    ends = central_interval(flat, torch.zeros_like(flat[0], dtype=torch.bool), QUANTILES[2] - QUANTILES[0])
    quantiles = torch.stack([end.reshape(mean.shape) for end in ends], -1)
    return {
        **{name: (dims, value) for name, value in zip(("mu", "sigma", "mean", "sd"), (mu, sigma, mean, sd), strict=True)},
        "quantile": ((*dims, "quantile_at"), quantiles),
        **out,
    }


def _said(vae: VAE, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
    """Return the analytic mean and standard deviation of q(z|x); None where its distribution has none."""
    with torch.no_grad():
        try:
            q = vae.encode(**chunk.batch)
            return q.mean.double(), q.stddev.double()
        except NotImplementedError:
            return None


def _discrete(
    site: Site, found: Reading, sums: tuple[Table, Mapping[str, Tensor]] | None
) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Return the probabilities of a site's values under guide and posterior.

    They are exact if all latents are discrete: `sums` are then all joint values with their probabilities. Else they are
    frequencies of draws.
    """
    dims = (*site_dims(site.name, site.shape), f"{site.name}_state")
    assert site.values is not None
    states = [int(v) for v in site.values.flatten().unique().tolist()]
    if sums is not None:  # exact: all joint values are enumerated
        table, values = sums
        of_state = torch.stack([values[site.name] == state for state in states], -1).double()  # (A, *site, K)
        logs = (table.log_guide, table.log_posterior)
        shares = [torch.einsum("an,a...->n...", log.double().exp(), of_state.to(log.device)) for log in logs]
    else:
        draws = [_flat(of.sites[site.name]) for of in (found.guide, found.posterior)]
        shares = [torch.stack([(of == state).double().mean(0) for state in states], -1) for of in draws]
    return {"guide_probability": (dims, shares[0]), "probability": (dims, shares[1])}


def conclude(dataset: xr.Dataset) -> list[str]:
    """Say how reliable the answer is, and how far the encoder's numbers are from it."""
    n, status = dataset.sizes["obs_id"], dataset["status"].values.astype(str)
    sources = Counter(dataset["source"].values.astype(str).tolist())
    said = [f"{n:,} rows; corrected posterior: " + ", ".join(f"{name} at {count:,}" for name, count in sources.most_common())]
    good = np.isin(status, TRUSTED)
    if (loose := int((status == "uncertified").sum())) or not good.all():
        left = int((status == "amortized").sum())
        said.append(
            f"{int(good.sum()):,} are exact or certified; {loose:,} are the encoder's draws reweighted, right only where it "
            f"puts mass; {left:,} are the encoder's own, uncorrected (k-hat above {GOOD_K})."
        )
    if str(dataset.attrs.get("space")) == "sphere":
        said.append(
            "z lies on a sphere, its means within: the direction is mean / |mean|, and the shorter a mean, the wider q or p."
        )
    if "mu" in dataset and good.any():
        mu, sigma, mean, sd = (dataset[name].values[good] for name in ("mu", "sigma", "mean", "sd"))
        with np.errstate(divide="ignore", invalid="ignore"):
            off, ratio = np.abs(mu - mean) / sd, sigma / sd
        off, ratio = (v.reshape(len(v), -1) for v in (off, ratio))
        middle, low, high = (float(np.nanquantile(ratio, q)) for q in (0.5, 0.05, 0.95))
        said.append(
            f"Are mu and sigma right? Over the exact or certified rows, mu is off by {np.nanmedian(off):.2f} posterior sd in "
            f"the median, and by {np.nanquantile(off.max(1), 0.95):.2f} or more in some latent at 5 % of them; sigma / sd is "
            f"{middle:.2f} in the median, {low:.2f} to {high:.2f} at nine tenths."
        )
    return said


def draw(dataset: xr.Dataset) -> Plot | Absent:
    """Draw the encoder's mu and sigma against the corrected posterior."""
    from elbowroom.analysis.plots.queries.encoding import encoding

    return encoding(dataset)
