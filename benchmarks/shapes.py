"""`python -m benchmarks.shapes [--seeds 3] [--only NAME]`: shapes of posteriors with known log p(x), under `references="auto"`.

Every shape is a normalised density of z, times a known factor per datum, written as a Pyro program: a wide normal prior with
the quotient of the two as `pyro.factor`, or a conjugate pair. The guide is a normal, the same for all data, near the bulk. A
table in markdown: what is exact or certified, errors over what is stated, and how many data have a value or two bounds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from elbowroom.analysis.audit.auditor import audit_log_joint
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64
DATA = 3
LOG_2PI = math.log(2 * math.pi)
Density = Callable[[Tensor], Tensor]


@dataclass
class Case:
    """A pair with its data and what is known of it: log p(x) (N,), and mean and sd of z (d,), or None."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    data: tuple[Tensor, ...]
    log_evidence: Tensor
    mean: Tensor | None = None
    sd: Tensor | None = None


def normal(z: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    """Log density of independent normals, the last dimension summed."""
    scale = torch.as_tensor(scale, dtype=F64)
    return (-0.5 * ((z - loc) / scale).square() - scale.log() - LOG_2PI / 2).sum(-1)


def free(
    d: int, log_density: Density, loc: float, scale: float, wide: float, mean: Any = None, sd: Any = None
) -> Callable[[int], Case]:
    """A density over R^d as prior N(0, wide), factor and guide N(loc, scale)."""

    def build(seed: int) -> Case:
        constant = torch.randn(DATA, dtype=F64, generator=torch.Generator().manual_seed(seed))
        zero = torch.zeros(d, dtype=F64)

        def model(c: Tensor) -> None:
            with pyro.plate("rows", len(c)):
                z = pyro.sample("z", dist.Normal(zero, wide).to_event(1))
                pyro.factor("shape", log_density(z) - normal(z, 0.0, wide * torch.ones(d, dtype=F64)) + c)

        def guide(c: Tensor) -> None:
            with pyro.plate("rows", len(c)):
                pyro.sample("z", dist.Normal(zero + loc, scale).to_event(1).expand([len(c)]))

        of = [None if value is None else torch.as_tensor(value, dtype=F64).expand(d) for value in (mean, sd)]
        return Case(model, guide, (constant,), constant, *of)

    return build


def mixture(weights: Any, places: Any, scales: Any, **rest: Any) -> Callable[[int], Case]:
    """A mixture of normals: weights (K,), places (K, d), scales (K,) or (K, d)."""
    w, at = (torch.as_tensor(value, dtype=F64) for value in (weights, places))
    s = torch.as_tensor(scales, dtype=F64)
    s, w = (s if s.dim() == 2 else s[:, None]).expand_as(at), w / w.sum()
    mean = w @ at
    sd = (w @ (s.square() + at.square()) - mean.square()).sqrt()

    def log_density(z: Tensor) -> Tensor:
        return torch.logsumexp(normal(z.unsqueeze(-2), at, s) + w.log(), -1)

    given = {"loc": 0.0, "scale": float(sd.max()), "wide": 3 * float((sd + mean.abs()).max())} | rest
    return free(at.shape[1], log_density, mean=mean, sd=sd, **given)


def spike(d: int, ratio: float, share: float) -> Callable[[int], Case]:
    """A narrow normal in a broad one."""
    return mixture([1 - share, share], [[0.0] * d, [0.5] * d], [1.0, ratio], wide=2.0)


def comb(teeth: int, width: float) -> Callable[[int], Case]:
    """Teeth one apart, under a bell."""
    at = torch.arange(-teeth, teeth + 1, dtype=F64)
    return mixture((-0.5 * (3 * at / teeth).square()).exp(), at[:, None], torch.full((len(at),), width))


def correlated(d: int, rho: float) -> Callable[[int], Case]:
    """Normal with all correlations rho."""
    covariance = (1 - rho) * torch.eye(d, dtype=F64) + rho
    law = torch.distributions.MultivariateNormal(torch.zeros(d, dtype=F64), covariance)
    return free(d, law.log_prob, 0.0, 0.8, 3.0, 0.0, 1.0)


def summed(log_f: Density, *edges: tuple[float, float], points: int) -> float:
    """Log of the integral of exp(log_f) over a box, by a dense midpoint sum."""
    axes = [low + (torch.arange(points, dtype=F64) + 0.5) * (high - low) / points for low, high in edges]
    cell = sum(math.log((high - low) / points) for low, high in edges)
    z = torch.cartesian_prod(*axes).reshape(-1, len(edges))
    return float(torch.logsumexp(torch.cat([log_f(part) for part in z.split(2**20)]), 0)) + cell


def by_sum(log_f: Density, *edges: tuple[float, float], points: int, **rest: Any) -> Callable[[int], Case]:
    """A density in the plane or on the line, normalised by a dense sum."""

    def build(seed: int) -> Case:
        total = summed(log_f, *edges, points=points)
        return free(len(edges), lambda z: log_f(z) - total, **rest)(seed)

    return build


def shell(d: int, radius: float, width: float) -> Callable[[int], Case]:
    """A normal of the radius: a donut in the plane, a shell in space."""
    r = torch.linspace(max(0.0, radius - 12 * width), radius + 12 * width, 400_001, dtype=F64)
    inner = torch.trapezoid(r ** (d - 1) * (-0.5 * ((r - radius) / width).square()).exp(), r)
    total = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2) + float(inner.log())
    return free(d, lambda z: -0.5 * ((z.norm(dim=-1) - radius) / width).square() - total, 0.0, radius, 2 * radius, 0.0)


def rosenbrock(d: int, width: float) -> Callable[[int], Case]:
    """z_1 normal, z_(j+1) normal around z_j^2 - 1."""

    def log_density(z: Tensor) -> Tensor:
        return normal(z[..., :1], 0.0, 1.0) + normal(z[..., 1:], z[..., :-1].square() - 1, width)

    return free(d, log_density, 0.0, 1.5, 4.0)


def funnel(d: int, spread: float) -> Callable[[int], Case]:
    """Neal's funnel."""

    def log_density(z: Tensor) -> Tensor:
        v = z[..., :1]
        return normal(v, 0.0, spread) + normal(z[..., 1:], 0.0, (v / 2).exp() * torch.ones(d - 1, dtype=F64))

    sd = [spread] + [math.exp(spread**2 / 4)] * (d - 1)
    return free(d, log_density, 0.0, 1.0, 3.0 * spread, 0.0, sd)


def ridge(noise: float) -> Callable[[int], Case]:
    """Y = z1 z2 + noise, by a one-dimensional sum over z1."""

    def build(seed: int) -> Case:
        y = torch.randn(DATA, 2, dtype=F64, generator=torch.Generator().manual_seed(seed)).prod(-1)

        def model(y: Tensor) -> None:
            with pyro.plate("rows", len(y)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
                pyro.sample("y", dist.Normal(z.prod(-1), noise), obs=y)

        def guide(y: Tensor) -> None:
            with pyro.plate("rows", len(y)):
                pyro.sample("z", dist.Normal(torch.zeros(len(y), 2, dtype=F64), 1.0).to_event(1))

        z = torch.linspace(-10, 10, 2_000_001, dtype=F64)[:, None]
        value = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(0.0, (z.square() + noise**2).sqrt()).log_prob(y)
        return Case(model, guide, (y,), torch.logsumexp(value, 0) + math.log(1e-5), torch.zeros(2, dtype=F64))

    return build


def student(d: int, df: float) -> Callable[[int], Case]:
    """Independent heavy tails. Without a fourth moment the sd of draws has no standard error, so it is not judged."""
    law = torch.distributions.StudentT(torch.tensor(df, dtype=F64))
    sd = math.sqrt(df / (df - 2)) if df > 4 else None
    return free(d, lambda z: law.log_prob(z).sum(-1), 0.0, 1.5, 5.0, 0.0 if df > 1 else None, sd)


def counts(a: float, b: float) -> Callable[[int], Case]:
    """A rate on the half-line with Poisson counts; z is log rate, a log-gamma law."""

    def build(seed: int) -> Case:
        y = torch.tensor([0.0, 1.0, 7.0], dtype=F64) + seed
        prior = dist.Gamma(torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64))

        def model(y: Tensor) -> None:
            with pyro.plate("rows", len(y)):
                rate = pyro.sample("rate", prior.expand([len(y)]))
                pyro.sample("y", dist.Poisson(rate), obs=y)

        def guide(y: Tensor) -> None:
            with pyro.plate("rows", len(y)):
                pyro.sample("rate", dist.LogNormal(((y + a) / (b + 1)).log(), (y + a).rsqrt()))

        lg = torch.lgamma
        one = torch.tensor(a, dtype=F64)
        value = lg(y + a) - lg(one) - lg(y + 1) + a * math.log(b / (b + 1)) - y * math.log(b + 1)
        return Case(model, guide, (y,), value)

    return build


def simplex(k: int, alpha: float, total: int) -> Callable[[int], Case]:
    """A sparse Dirichlet with multinomial counts."""

    def build(seed: int) -> Case:
        g = torch.Generator().manual_seed(seed)
        y = torch.nn.functional.one_hot(torch.randint(k, (DATA, total), generator=g), k).sum(1).to(F64)
        law = torch.full((k,), alpha, dtype=F64)

        def model(y: Tensor) -> None:
            with pyro.plate("rows", len(y)):
                p = pyro.sample("p", dist.Dirichlet(law).expand([len(y)]))
                pyro.sample("y", dist.Multinomial(total, probs=p, validate_args=False), obs=y)

        def guide(y: Tensor) -> None:
            with pyro.plate("rows", len(y)):
                pyro.sample("p", dist.Dirichlet(law + y))

        return Case(model, guide, (y,), dist.DirichletMultinomial(law, torch.tensor(float(total), dtype=F64)).log_prob(y))

    return build


def moons(z: Tensor) -> Tensor:
    """Two arcs that face each other."""
    arcs = torch.logaddexp(-0.5 * ((z[..., 0] - 2) / 0.4).square(), -0.5 * ((z[..., 0] + 2) / 0.4).square())
    return -0.5 * ((z.norm(dim=-1) - 2) / 0.2).square() + arcs


def spiral(z: Tensor) -> Tensor:
    """An arm that winds outwards."""
    r, angle = z.norm(dim=-1), torch.atan2(z[..., 1], z[..., 0])
    return 4 * (torch.cos(angle - 4 * r) - 1) / 0.3 - 0.5 * (r / 1.5).square()


SQUARE = ((-9.0, 9.0), (-9.0, 9.0))
SHAPES: dict[str, Callable[[int], Case]] = {
    **{f"spike d={d} ratio={r} mass={m}": spike(d, r, m) for d, r, m in (
        (1, 0.001, 0.05), (1, 0.01, 0.5), (1, 0.1, 0.2), (2, 0.01, 0.3), (2, 0.05, 0.05), (2, 0.3, 0.5),
        (3, 0.03, 0.3), (3, 0.1, 0.05), (5, 0.3, 0.3), (8, 0.3, 0.5),
    )},
    **{f"comb of {t} teeth, width {w}": comb(t, w) for t, w in ((5, 0.1), (30, 0.05), (100, 0.02))},
    **{f"correlation {rho} d={d}": correlated(d, rho) for d, rho in ((2, 0.999), (3, 0.9999), (6, 0.99))},
    **{f"ridge z1 z2, noise {s}": ridge(s) for s in (0.3, 0.05, 0.01)},
    "donut 0.2": shell(2, 2.0, 0.2), "thin donut 0.02": shell(2, 2.0, 0.02), "shell d=3": shell(3, 2.0, 0.1),
    "two moons": by_sum(moons, *SQUARE, points=2000, loc=0.0, scale=1.8, wide=4.0, mean=0.0),
    "spiral": by_sum(spiral, *SQUARE, points=4000, loc=0.0, scale=1.5, wide=3.0),
    **{f"rosenbrock {s} d={d}": rosenbrock(d, s) for d, s in ((2, 0.3), (2, 0.03), (3, 0.3), (5, 0.3))},
    **{f"funnel d={d}": funnel(d, s) for d, s in ((2, 1.5), (3, 1.0), (6, 1.0))},
    "cauchy d=1": student(1, 1.0), "cauchy d=2": student(2, 1.0), "student 3 d=2": student(2, 3.0),
    "student 5 d=5": student(5, 5.0),
    "three modes d=2": mixture([0.5, 0.3, 0.2], [[0.0, 0], [4, 1], [-3, 3]], [1.0, 0.5, 0.7]),
    "far modes d=1": mixture([0.7, 0.3], [[0.0], [50.0]], [1.0, 0.5]),
    "two modes d=4": mixture([0.6, 0.4], [[0.0] * 4, [2.0] * 4], [1.0, 0.5]),
    "two modes d=8": mixture([0.5, 0.5], [[-1.0] * 8, [1.0] * 8], [0.7, 0.7]),
    "labels d=2": mixture([1.0] * 2, list(permutations((-1.5, 2.0))), [0.4] * 2),
    "labels d=3": mixture([1.0] * 6, list(permutations((-2.0, 0.0, 2.5))), [0.4] * 6),
    **{f"scale {s:g}": mixture([1.0], [[0.0, 0.0]], [[s, s]], wide=5 * s) for s in (1e-6, 1e6)},
    "scales 1e-3 and 1e3": mixture([1.0], [[0.0, 0.0]], [[1e-3, 1e3]], scale=1e-3, wide=5e3),
    **{f"half-line, gamma {a}": counts(a, 1.0) for a in (0.3, 2.0)},
    **{f"simplex K={k} alpha={a}": simplex(k, a, n) for k, a, n in ((3, 0.1, 5), (4, 0.3, 10), (5, 1.0, 20))},
    "laplace": free(1, lambda z: -z.abs().sum(-1) - math.log(2), 0.0, 1.2, 4.0, 0.0, math.sqrt(2)),
    "quartic": by_sum(lambda z: -z[..., 0] ** 4, (-5.0, 5.0), points=100_000, loc=0.0, scale=0.6, wide=2.0, mean=0.0),
    "plateau": by_sum(
        lambda z: torch.nn.functional.logsigmoid(20 * (1 - z[..., 0].abs())), (-4.0, 4.0), points=200_000,
        loc=0.0, scale=0.6, wide=2.0, mean=0.0,
    ),
}  # fmt: skip


@dataclass
class Score:
    """What an audit said of the data of one shape, over all seeds."""

    n: int = 0
    exact: int = 0
    certified: int = 0
    known: int = 0
    worst: float = 0.0
    moments: float = 0.0
    estimates: int = 0
    covered: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def judged(build: Callable[[int], Case], seeds: int, **options: Any) -> Score:
    """Audit a shape and compare all that it says with what is known."""
    score = Score()
    for seed in range(seeds):
        case, began = build(seed), time.perf_counter()
        log_joint = LogJoint(case.model, case.guide, *case.data)
        found = audit_log_joint(log_joint, seed=seed, **options)
        score.seconds += time.perf_counter() - began
        table, truth = found.table, case.log_evidence.numpy()
        value, error = table["log_evidence"].values, table["log_evidence_se"].values
        low, high = table["log_evidence_lower"].values, table["log_evidence_upper"].values
        status = table["status"].values.astype(str)
        exact = table["evidence_reason"].values.astype(str) == "exact up to its numerical error"
        score.n += len(truth)
        score.exact += int(exact.sum())
        score.certified += int((np.isin(status, ("exact", "certified")).any(1) & ~exact).sum())
        score.known += int((np.isfinite(value) | (np.isfinite(low) & np.isfinite(high))).sum())
        ratio = np.abs(value - truth) / np.maximum(error, 1e-12)
        score.worst = max([score.worst, *ratio[exact]])
        wrong = exact & (ratio > 3) & (np.abs(value - truth) > 1e-8)
        for i in np.flatnonzero(wrong):
            score.wrong.append(f"seed {seed} datum {i}: off by {value[i] - truth[i]:.2g}, said {error[i]:.2g}")
        inside = (low <= truth) & (truth <= high)
        score.estimates += int((~exact & np.isfinite(low) & np.isfinite(high)).sum())
        score.covered += int((inside & ~exact & np.isfinite(low) & np.isfinite(high)).sum())
        score.moments = max(score.moments, _moments(found, case))
    return score


def _moments(found: Any, case: Case) -> float:
    """Return the worst error of a certified mean or sd, in Monte Carlo standard errors of 1,000 draws at least."""
    worst = 0.0
    for k, name in enumerate(found.table["reference"].values.astype(str)):
        good = np.isin(found.table["status"].values[:, k].astype(str), ("exact", "certified"))
        if case.mean is None or not good.any():
            continue
        draws = found.posteriors[name]["unconstrained"]["z"].values if "unconstrained" in found.posteriors[name] else None
        draws = found.posteriors[name]["posterior"]["z"].values if draws is None else draws
        flat = draws.reshape(-1, *draws.shape[2:])[:, good]
        ess = np.nan_to_num(found.table["ess_bulk_min"].values[good, k], nan=len(flat)).clip(1, len(flat))
        size, sd = np.sqrt(ess)[:, None], flat.std(0)
        off = np.abs(flat.mean(0) - case.mean.numpy()) / sd * size
        if case.sd is not None:  # the error of a sd by the fourth moment
            tails = np.sqrt(np.maximum(((flat - flat.mean(0)) ** 4).mean(0) / sd**4 - 1, 0.1)) / 2
            off = np.maximum(off, np.abs(sd - case.sd.numpy()) / sd * size / tails)
        worst = max(worst, float(off.max()))
    return worst


def table(names: list[str], seeds: int, report: Callable[[str], None] = print, **options: Any) -> dict[str, Score]:
    """Print one row per shape and return all scores."""
    head = (
        "shape",
        "exact",
        "certified",
        "worst error / stated",
        "worst mean or sd [MCSE]",
        "intervals hold",
        "value or two bounds",
        "s",
    )
    report("| " + " | ".join(head) + " |")
    report("|" + "---|" * len(head))
    out = {}
    for name in names:
        s = out[name] = judged(SHAPES[name], seeds, **options)
        holds = f"{s.covered} of {s.estimates}" if s.estimates else ""
        cells = (f"{s.exact}/{s.n}", f"{s.certified}/{s.n}", f"{s.worst:.2g}", f"{s.moments:.1f}", holds, f"{s.known}/{s.n}")
        report(f"| {name} | " + " | ".join(cells) + f" | {s.seconds:.0f} |")
        for sentence in s.wrong:
            report(f"WRONG {name}: {sentence}")
    return out


def main() -> None:
    """Run the shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="shapes whose names hold one of these words")
    options = parser.parse_args()
    names = [name for name in SHAPES if not options.only or any(word in name for word in options.only)]
    found = table(names, options.seeds, partial(print, flush=True))
    sys.exit(any(score.wrong for score in found.values()))


if __name__ == "__main__":
    main()
