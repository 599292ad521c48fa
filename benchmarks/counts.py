"""`python -m benchmarks.counts`: which likelihood of counts explains the digits, by exact held-out log p(x).

Pixels of scikit-learn's digits are whole numbers from 0 to 16. The same networks with the same 2-D latent are fitted under
each likelihood, as experiments/digits_counts.yaml says, and log p(x) of the same held-out images is summed over a lattice, so
that likelihoods are compared by what they are judged by, not by bounds with unknown gaps:

    log p(x) = log sum_g h^2 N(z_g; 0, I) prod_i p(x_i | z_g)

All images share the lattice, and with it a table of log p(k | z_g) of each pixel and k = 0, ..., 16. (The audit's `grid` lays
a lattice of its own around each posterior, for any model; some images are audited by it too, and must agree.) A second lattice,
shifted and finer, says how far the first is from converged.

A gaussian gives a density, whose value at whole numbers is no probability: it has a unit, and where a pixel never changes it
grows without limit as its scale shrinks. What compares with a mass is P(x|z) = Phi((x + 1/2 - m) / s) - Phi((x - 1/2 - m) / s),
integrated over z anew. By Jensen's inequality log P(x) is at least the expected log density of x + u, u uniform on
[-1/2, 1/2] (dequantisation; Theis et al. 2016, https://arxiv.org/abs/1511.01844).
"""

from __future__ import annotations

import argparse
import math
import platform
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.special import log_ndtr

import elbowroom as er
from benchmarks import results

HEADING = "## Likelihoods of counts"
SPEC = Path(__file__).parents[1] / "experiments" / "digits_counts.yaml"
LEVELS = 17
HALF = 9.0  # the lattices span [-HALF, HALF] in both directions
COARSE, FINE = (0.15, 0.5), (0.1, 0.23)  # spacing, and shift in cells
DRAWS = 64  # of the guide, per image
BLOCK = 4096  # points decoded at once
COUNTS = ("discretized_logistic", "negative_binomial", "binomial", "poisson")
SCALES = {"shared": "one scale", "per_dimension": "a scale per pixel"}

LogProb = Callable[[Tensor, Tensor], Tensor]
"""From decoder outputs (..., param_dim) and values that broadcast to (..., *event_shape), log p of each entry."""


@dataclass
class Values:
    """What one fit says of its held-out images, in nats.

    Attributes:
        log_p: log p(x), (n,).
        gap: mean of log p(x) - ELBO; NaN where the guide was fitted to another p(x|z).
        error: largest change of a log p(x) between the two lattices.
        border: largest share of a posterior in the lattice's outermost layer.
    """

    log_p: np.ndarray
    gap: float
    error: float
    border: float


def bin_mass(m: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """Return log(Phi(b) - Phi(a)), a and b the ends of the bin of width 1 around x, on the side where neither rounds to 1.

    What lies below all bins counts with 0, what lies above them with 16.

    Args:
        m: mean of the normal distribution.
        s: its standard deviation.
        x: whole numbers from 0 to 16.
    """
    a, b = (x - 0.5 - m) / s, (x + 0.5 - m) / s
    right = a + b > 0
    near, far = log_ndtr(torch.where(right, -a, b)), log_ndtr(torch.where(right, -b, a))
    inner = near + torch.log1p(-(far - near).exp())
    return torch.where(x <= 0, log_ndtr(b), torch.where(x >= LEVELS - 1, log_ndtr(-a), inner))


def own(vae: Any) -> LogProb:
    """Return log p of each entry under the VAE's likelihood."""
    return lambda params, x: vae.likelihood(params).base_dist.log_prob(x)


def in_bins(vae: Any) -> LogProb:
    """Return log P of each entry's bin under the VAE's gaussian likelihood."""

    def log_mass(params: Tensor, x: Tensor) -> Tensor:
        normal = vae.likelihood(params).base_dist
        return bin_mass(normal.loc, normal.scale, x)

    return log_mass


def log_normal(z: Tensor) -> Tensor:
    """Return log N(z; 0, I), (...)."""
    return -0.5 * z.square().sum(-1) - z.shape[-1] / 2 * math.log(2 * math.pi)


def lattice_sum(vae: Any, log_prob: LogProb, x: Tensor, h: float, shift: float) -> tuple[Tensor, Tensor]:
    """Return log p(x), (n,), and the share of each posterior in the outermost layer, on a lattice of spacing h."""
    axis = (torch.arange(round(2 * HALF / h), dtype=x.dtype) + shift) * h - HALF
    z = torch.cartesian_prod(axis, axis)
    one_hot = [(x == k).to(x.dtype).flatten(1).T for k in range(LEVELS)]
    parts = []
    for part in z.split(BLOCK):
        params = vae.decoder(part)
        terms = [log_prob(params, x.new_tensor(float(k))).flatten(1) @ one_hot[k] for k in range(LEVELS)]
        parts.append(torch.stack(terms).sum(0))
    log_p = torch.cat(parts) + log_normal(z)[:, None] + 2 * math.log(h)
    total = log_p.logsumexp(0)
    outer = ((z == axis[0]) | (z == axis[-1])).any(-1)
    return total, (log_p[outer].logsumexp(0) - total).exp()


def elbo(vae: Any, x: Tensor) -> Tensor:
    """Return the ELBO of each image, (n,), from DRAWS draws."""
    torch.manual_seed(0)
    q = vae.encode(x)
    z = q.sample((DRAWS,))
    return (own(vae)(vae.decoder(z), x).flatten(2).sum(-1) + log_normal(z) - q.log_prob(z)).mean(0)


def measured(run: er.Run, what: str, log_prob: Callable[[Any], LogProb], *, guide: bool = True) -> Values:
    """Compute log p(x) of all held-out images in float64, and the gap of the guide to it; what is there is read."""
    kept = run.path / f"{what}.npz"
    if kept.exists():
        with np.load(kept) as file:
            return Values(file["log_p"], *(float(file[name]) for name in ("gap", "error", "border")))
    vae = run.vae.double()
    x = run.experiment.rows(run.experiment.split.test).double()
    with torch.no_grad():
        rough, _ = lattice_sum(vae, log_prob(vae), x, *COARSE)
        fine, border = lattice_sum(vae, log_prob(vae), x, *FINE)
        gap = float((fine - elbo(vae, x)).mean()) if guide else math.nan
    values = Values(fine.numpy(), gap, float((fine - rough).abs().max()), float(border.max()))
    np.savez(kept, **asdict(values))
    return values


def fitted(likelihood: str, scale: str | None, seed: int, out: Path, changes: list[str]) -> er.Run:
    """Fit; what is in the folder already is not fitted again."""
    options = [f"model.likelihood={likelihood}", f"seed={seed}", *([f"model.likelihood.scale={scale}"] if scale else [])]
    experiment = er.Experiment.load(SPEC, set=[*options, *changes])
    return er.fit(experiment, out=out / f"{likelihood}{f'_{scale}' if scale else ''}_{seed}", resume=True)


def audited(run: er.Run, log_p: np.ndarray, n: int, out: Path) -> float:
    """Audit the first n held-out images by `grid`; return how far it is at most from the lattice, in nats."""
    some = er.Run.load(run.path, set=[f"audit.observations={n}", "audit.draws=400"])
    table = some.audit(out=out, resume=True).table
    exact = (table["status"].values == "exact").all(-1)
    place = {int(row): i for i, row in enumerate(run.experiment.split.test)}
    ours = log_p[[place[int(row)] for row in table["obs_id"].values]]
    return float(np.abs(table["log_evidence"].values - ours)[exact].max()) if exact.any() else math.nan


def mean_and_error(values: list[np.ndarray]) -> tuple[float, float, list[float]]:
    """Return the mean over seeds of the means over images, its standard error, and each seed's mean.

    The error is that of one seed's images (root mean square over seeds): test splits overlap, and averages over three
    trainings say little of how trainings vary, so nothing is divided by the number of seeds.
    """
    means = [float(v.mean()) for v in values]
    errors = [float(v.std(ddof=1)) / math.sqrt(len(v)) for v in values]
    return float(np.mean(means)), float(np.sqrt(np.mean(np.square(errors)))), means


def table(found: dict[str, list[Values]]) -> list[str]:
    """Return one line per likelihood, the best first."""
    order = sorted(found, key=lambda name: -mean_and_error([v.log_p for v in found[name]])[0])
    lines = [
        "| likelihood | held-out log p(x) | of the seeds | minus that of the first | of the seeds | gap to the ELBO |",
        "|---|---|---|---|---|---|",
    ]
    for name in order:
        value, error, seeds = mean_and_error([v.log_p for v in found[name]])
        paired = [v.log_p - first.log_p for v, first in zip(found[name], found[order[0]], strict=True)]
        d, d_error, d_seeds = mean_and_error(paired)
        difference = f"{d:.2f} ± {d_error:.2f} | {_list(d_seeds)}" if name != order[0] else "|"
        gap = float(np.mean([v.gap for v in found[name]]))
        shown = "" if np.isnan(gap) else f"{gap:.2f}"
        lines.append(f"| {name} | {value:.2f} ± {error:.2f} | {_list(seeds)} | {difference} | {shown} |")
    return lines


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def main() -> None:
    """Fit, measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--audit", type=int, default=5, help="how many images the audit's own grid checks, per likelihood")
    parser.add_argument("--out", type=Path, help="keep the runs here; those that are there are not fitted again")
    parser.add_argument("--set", action="append", default=[], help="a change to the spec, for a quick look; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    masses: dict[str, list[Values]] = {}
    raw: dict[str, list[Values]] = {}
    checks: list[float] = []

    def take(found: dict[str, list[Values]], name: str, values: Values) -> None:
        found.setdefault(name, []).append(values)
        print(f"{name}: {values.log_p.mean():.2f}, gap {values.gap:.2f}, error {values.error:.0e}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        for seed in options.seeds:
            for name in COUNTS:
                run = fitted(name, None, seed, out, options.set)
                take(masses, name, measured(run, "own", own))
                if seed == 0 and options.audit:
                    checks.append(audited(run, masses[name][0].log_p, options.audit, out / f"grid_{name}"))
            for scale, words in SCALES.items():
                run = fitted("gaussian", scale, seed, out, options.set)
                name = f"gaussian, {words}"
                take(raw, name, measured(run, "own", own))
                take(masses, f"{name}, in bins", measured(run, "bins", in_bins, guide=False))
        n = len(run.experiment.split.test)
    text = "\n".join([*head(options, n, masses | raw, checks), *table(masses), "", DENSITY, "", *table(raw)])
    if not options.set:
        results.write(text)
    print(text)


DENSITY = "The same two gaussians as densities at the whole numbers, which are no probabilities and compare with nothing above:"


def head(options: argparse.Namespace, n: int, found: dict[str, list[Values]], checks: list[float]) -> list[str]:
    """Return what stands above the tables."""
    spec = er.Experiment.load(SPEC).spec
    error, border = (max(getattr(v, name) for some in found.values() for v in some) for name in ("error", "border"))
    check = (
        f" `grid` of the audit, on {options.audit} images per likelihood: at most {max(checks):.0e} nats away."
        if checks
        else ""
    )
    machine = f"{platform.machine()}, 2 cores, no GPU, torch {torch.__version__}; {datetime.now(UTC):%Y-%m-%d}."
    text = (
        f"Digits of 64 pixels from 0 to 16; experiments/digits_counts.yaml: 2 latents, networks 128-128, {spec.fit.epochs} "
        f"epochs, the best by validation ELBO. Nats per image, means of {len(options.seeds)} seeds (split and initial "
        f"weights), {n} held-out images each, the same for all likelihoods; ± is the standard error over one seed's images, "
        "paired for differences. In bins: of width 1, the tails outside counted with 0 and 16; the guide is not that of this "
        f"p(x|z), so no gap is given. log p(x) on shared lattices of spacing {COARSE[0]} and {FINE[0]}: they differ by at most "
        f"{error:.0e} nats; at most {border:.0e} of a posterior lies at the border.{check}"
    )
    return [HEADING, "", f"{machine} `python -m benchmarks.counts`.", "", textwrap.fill(text, 124), ""]


if __name__ == "__main__":
    main()
