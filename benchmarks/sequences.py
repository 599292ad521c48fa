"""`python -m benchmarks.sequences`: a recurrent VAE of the JSB Chorales, judged by exact log p(x) of all test chorales.

experiments/jsb_chorales.yaml is fitted from three seeds. Each test chorale's log p(x) is a sum over a lattice of z:

    log p(x) = log sum_g h^2 N(z_g; 0, I) prod_t prod_k p(x_tk | z_g),      t up to the end of x, k over the keys

All chorales share the lattice, so that the decoder runs once per point, and the rest is a matrix product. (The audit's `grid`
lays a lattice of its own around each posterior, for any model; some chorales are audited by it too, and must agree.) A second
lattice, shifted and finer, says how far the first is from converged.
"""

from __future__ import annotations

import argparse
import math
import platform
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

import elbowroom as er
from benchmarks import results
from elbowroom.models.vae import VAE

HEADING = "## Sequences"
SPEC = Path(__file__).parents[1] / "experiments" / "jsb_chorales.yaml"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "chorales.png"
HALF = 4.6  # the lattices span [-HALF, HALF] in both directions
COARSE, FINE = (0.1, 0.5), (0.07, 0.23)  # spacing, and shift in cells
DRAWS = 128  # of the guide, per chorale
BLOCK = 256  # points decoded at once


@dataclass
class Values:
    """What one fit says of the test chorales, in nats per chorale.

    Attributes:
        log_p: log p(x), (n,).
        elbo: its ELBO, (n,).
        elbo_error: standard error of the mean ELBO, from the guide's draws.
        error: largest change between the two lattices.
        border: largest share of a posterior in the lattice's outermost layer.
    """

    log_p: np.ndarray
    elbo: np.ndarray
    elbo_error: float
    error: float
    border: float


def lengths(x: np.ndarray) -> np.ndarray:
    """Return the number of steps of sequences (n, T, F) that are NaN after their end, (n,)."""
    return (~np.isnan(x).all(-1)).sum(-1)


def log_likelihood(vae: VAE, x: Tensor, z: Tensor) -> Tensor:
    """Return log p(x|z) of chorales x (n, T, 88) at points z (G, 2) that all share, (G, n); NaN steps are left out."""
    seen = (~x[..., 0].isnan()).to(x.dtype)
    ones = x.nan_to_num(0.0).flatten(1)
    parts = []
    with torch.no_grad():
        for part in z.split(BLOCK):
            logits = vae.decoder(part)
            parts.append(logits @ ones.T - softplus(logits).unflatten(-1, x.shape[1:]).sum(-1) @ seen.T)
    return torch.cat(parts)


def lattice_sum(vae: VAE, x: Tensor, h: float, shift: float) -> tuple[Tensor, Tensor]:
    """Return log p(x), (n,), and the share of each posterior in the outermost layer, on a lattice of spacing h."""
    axis = (torch.arange(round(2 * HALF / h), dtype=x.dtype) + shift) * h - HALF
    z = torch.cartesian_prod(axis, axis)
    log_p = log_likelihood(vae, x, z) + log_normal(z)[:, None] + 2 * math.log(h)
    total = log_p.logsumexp(0)
    outer = ((z == axis[0]) | (z == axis[-1])).any(-1)
    return total, (log_p[outer].logsumexp(0) - total).exp()


def log_normal(z: Tensor) -> Tensor:
    """Return log N(z; 0, I), (...)."""
    return -0.5 * z.square().sum(-1) - z.shape[-1] / 2 * math.log(2 * math.pi)


def guide_elbo(vae: VAE, x: Tensor) -> tuple[Tensor, float]:
    """Return the ELBO of each chorale, (n,), from DRAWS draws, and the standard error of their mean."""
    torch.manual_seed(0)
    with torch.no_grad():
        q = vae.encode(x)
        z = q.sample((DRAWS,))
        own = torch.stack([log_likelihood(vae, x[i : i + 1], z[:, i])[:, 0] for i in range(len(x))], 1)
        log_w = own + log_normal(z) - q.log_prob(z)
    return log_w.mean(0), float((log_w.var(0) / DRAWS).mean().div(len(x)).sqrt())


def measured(run: er.Run) -> Values:
    """Compute log p(x) and ELBO of all test chorales, in float64; what the folder has already is read."""
    kept = run.path / "lattice.npz"
    if kept.exists():
        with np.load(kept) as file:
            return Values(file["log_p"], file["elbo"], *(float(file[name]) for name in ("elbo_error", "error", "border")))
    vae = run.vae.double()
    x = run.experiment.rows(run.experiment.split.test).double()
    rough, _ = lattice_sum(vae, x, *COARSE)
    fine, border = lattice_sum(vae, x, *FINE)
    elbo, elbo_error = guide_elbo(vae, x)
    values = Values(fine.numpy(), elbo.numpy(), elbo_error, float((fine - rough).abs().max()), float(border.max()))
    np.savez(kept, **asdict(values))
    return values


def marginals(train: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return log p(x) of chorales under independent keys, each on as often as in training (half a count added), (n,)."""
    n = lengths(train).sum()
    p = (np.nansum(train, (0, 1), dtype=float) + 0.5) / (n + 1)
    return np.where(np.isnan(x), 0.0, x * np.log(p) + (1 - x) * np.log1p(-p)).sum((1, 2))


def per_step(log_p: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """Return nats per step, -sum log p(x) / sum of steps, and its standard error over chorales (of a ratio, linearised)."""
    ratio = float(-log_p.sum() / steps.sum())
    residual = -log_p - ratio * steps
    return ratio, float(residual.std(ddof=1) / math.sqrt(len(steps)) / steps.mean())


def row(name: str, values: list[np.ndarray], steps: np.ndarray) -> str:
    """Return one line: means over seeds; standard errors are those of one seed's chorales, which are the same for all."""
    mean = np.mean(values, 0)
    seeds = ", ".join(f"{v.mean():.1f}" for v in values) if len(values) > 1 else ""
    ratio, ratio_error = per_step(mean, steps)
    each = -mean / steps
    cells = [
        f"{mean.mean():.2f} ± {_se(mean):.2f}",
        seeds,
        f"{ratio:.3f} ± {ratio_error:.3f}",
        f"{each.mean():.3f} ± {_se(each):.3f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _se(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def audited(run: er.Run, log_p: np.ndarray, n: int, out: Path) -> str:
    """Audit the first n test chorales by `grid`, and say how far from the lattice it is."""
    some = er.Run.load(run.path, set=[f"audit.observations={n}", "audit.draws=400"])
    table = some.audit(out=out, resume=True).table
    exact = (table["status"].values == "exact").all(-1)
    place = {int(row): i for i, row in enumerate(run.experiment.split.test)}
    ours = log_p[[place[int(row)] for row in table["obs_id"].values]]
    far = float(np.abs(table["log_evidence"].values - ours)[exact].max())
    return f"`grid` of the audit on {n} of them (seed 0): {int(exact.sum())} exact, at most {far:.0e} nats from the lattice."


def picture(run: er.Run, values: Values, path: Path = PICTURE) -> None:
    """Draw the exact posterior of four chorales (filled) and what the encoder says of them (lines)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    vae = run.vae.double()
    test = run.experiment.split.test
    gap = values.log_p - values.elbo
    order = np.argsort(gap)
    chosen = [
        ("smallest gap", order[0]),
        ("median", order[len(order) // 2]),
        ("9 of 10 have less", order[int(0.9 * len(order))]),
    ]
    chosen.append(("largest gap", order[-1]))
    x = run.experiment.rows(test).double()
    n_points = 41
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.1), layout="constrained")
    for axis, (label, i) in zip(axes, chosen, strict=True):
        one = x[i : i + 1]
        with torch.no_grad():
            q = vae.encode(one)
        centre, half = _extent(vae, one, q.mean[0], 3.2 * q.variance[0].sqrt())
        unit = torch.linspace(-1, 1, n_points, dtype=x.dtype)
        z = centre + half * torch.cartesian_prod(unit, unit)
        exact = log_likelihood(vae, one, z)[:, 0] + log_normal(z)
        with torch.no_grad():
            guide = q.log_prob(z[:, None])[:, 0]
        a, b = (centre[j] + half * unit for j in range(2))
        for log_p, filled in ((exact, True), (guide, False)):
            p = (log_p - log_p.max()).exp().reshape(n_points, n_points).T.numpy()
            levels = [_level(p, mass) for mass in (0.99, 0.9, 0.5)]
            if filled:
                axis.contourf(a, b, p, [*levels, 1.0001], cmap="Blues")
            else:
                axis.contour(a, b, p, levels, colors="#c44e52", linewidths=1.2)
        steps = int(lengths(one.numpy())[0])
        axis.set_title(f"{label}: {max(gap[i], 0.0):.2f} nats\nchorale {test[i]}, {steps} steps", fontsize=9)
        axis.set_aspect("equal")
        axis.set_xlabel("z1")
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("z2")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _extent(vae: VAE, x: Tensor, guide: Tensor, reach: Tensor) -> tuple[Tensor, float]:
    """Return centre and half-width of a square that holds one chorale's posterior and its guide, a mean and a reach."""
    centre, half = guide, 1.5
    for _ in range(3):
        unit = torch.linspace(-1, 1, 17, dtype=x.dtype)
        z = centre + half * torch.cartesian_prod(unit, unit)
        log_p = log_likelihood(vae, x, z)[:, 0] + log_normal(z)
        near = z[log_p > log_p.max() - 6.5]
        low, high = near.amin(0), near.amax(0)
        centre, half = (low + high) / 2, float((high - low).max()) * 0.6 + 1e-3
    low, high = torch.minimum(low, guide - reach), torch.maximum(high, guide + reach)
    return (low + high) / 2, float((high - low).max()) * 0.52


def _level(p: np.ndarray, mass: float) -> float:
    """Return the density above which `mass` of p lies."""
    ordered = np.sort(p.ravel())[::-1]
    share = ordered.cumsum() / ordered.sum()
    return float(ordered[min(int(np.searchsorted(share, mass)), len(ordered) - 1)])


def main() -> None:
    """Fit, measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--audit", type=int, default=6, help="how many chorales the audit's own grid checks")
    parser.add_argument("--out", type=Path, help="keep the runs here; those that are there are not fitted again")
    parser.add_argument("--set", action="append", default=[], help="a change to the spec, for a quick look; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        found: list[Values] = []
        for seed in range(options.seeds):
            experiment = er.Experiment.load(SPEC, set=[f"seed={seed}", *options.set])
            run = er.fit(experiment, out=out / f"seed_{seed}", resume=True)
            values = measured(run)
            found.append(values)
            gap = values.log_p.mean() - values.elbo.mean()
            print(
                f"seed {seed}: log p(x) {values.log_p.mean():.2f}, gap {gap:.2f}; {run.summary}; {values.error:.1e}", flush=True
            )
            if seed == 0:
                first = run
                if not options.set:
                    picture(run, values)
        check = audited(first, found[0].log_p, options.audit, out / "grid") if options.audit else ""
        text = section(first, found, check)
    if not options.set:
        results.write(text)
    print(text)


def section(run: er.Run, found: list[Values], check: str) -> str:
    """Return the section of RESULTS.md."""
    experiment = run.experiment
    x, train = (experiment.data.x[rows] for rows in (experiment.split.test, experiment.split.train))
    steps, base = lengths(x), marginals(train, x)
    log_p, elbo = [v.log_p for v in found], [v.elbo for v in found]
    gaps = ", ".join(f"{(v.log_p - v.elbo).mean():.2f} (largest {(v.log_p - v.elbo).max():.1f})" for v in found)
    gain = np.mean(log_p, 0) - base
    fit, (error, border) = experiment.spec.fit, (max(getattr(v, name) for v in found) for name in ("error", "border"))
    machine = f"{platform.machine()}, 2 cores, no GPU, torch {torch.__version__}; {datetime.now(UTC):%Y-%m-%d}."
    seeds = "seed 0" if len(found) == 1 else f"{len(found)} seeds (initial weights and order of batches)"
    what = (
        f"JSB Chorales, published split: {len(x)} test chorales of {steps.min()} to {steps.max()} quarter notes, "
        f"{steps.sum():,} in all, 88 keys. experiments/jsb_chorales.yaml: 2 latents for a whole chorale, gru networks, "
        f"{fit.epochs} epochs, the best by validation ELBO; {seeds}. Nats; ± is the standard error over chorales. Per step: "
        "-sum log p(x) / sum of steps, as papers report it; beside it the mean over chorales of each one's own average."
    )
    lines = [
        "| | log p(x) per chorale | of the seeds | nats per step | mean of the chorales' own |",
        "|---|---|---|---|---|",
        row("exact log p(x)", log_p, steps),
        row("ELBO", elbo, steps),
        row("independent keys, frequencies of the training data", [base], steps),
    ]
    below = (
        f"Gap log p(x) - ELBO per chorale, of the seeds: {gaps} nats; standard error from {DRAWS} draws of the guide: "
        f"{max(v.elbo_error for v in found):.2f}. Above independent keys: {gain.mean():.1f} ± {_se(gain):.1f} nats per chorale "
        f"(paired). log p(x) on shared lattices of spacing {COARSE[0]} and {FINE[0]}: they differ by at most {error:.0e} nats; "
        f"at most {border:.0e} of a posterior lies at the border. {check}"
    )
    limits = (
        "Given z the steps are independent: this model sums up a chorale in two numbers and sees no earlier step. "
        "Autoregressive models predict each step from all before it, deep Markov models spend a latent vector on each: their "
        "figures are of another kind and no rivals of these. For scale, a deep Markov model reaches 6.93 nats per step by "
        "Krishnan, Shalit and Sontag, as Pyro's tutorial quotes them, and 6.80 to 6.87 by that tutorial "
        "(https://pyro.ai/examples/dmm.html; from the ELBO, hence bounds)."
    )
    texts = [textwrap.fill(text, 124) for text in (what, below, limits)]
    head = [HEADING, "", f"{machine} `python -m benchmarks.sequences`.", ""]
    return "\n".join([*head, texts[0], "", *lines, "", texts[1], "", texts[2]])


if __name__ == "__main__":
    main()
