"""`make bench`: ours and the others side by side in one run, quality beside time; writes its part of benchmarks/RESULTS.md."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import arviz_stats
import numpy as np
import pyro
import torch

from elbowroom.inference.importance import psis
from elbowroom.inference.svi import Step
from elbowroom.inference.target import LogJoint
from elbowroom.models.guides import AmortizedGuide, DiagonalNormal
from elbowroom.models.likelihoods import Bernoulli
from elbowroom.models.networks import MLP
from elbowroom.models.priors import Normal
from elbowroom.models.vae import VAE

REPEATS = 7


@dataclass(frozen=True)
class Result:
    """One comparison: median seconds of ours and of the other, their ratio's range, and what shows that both did the work."""

    what: str
    ours: float
    other: float
    low: float
    high: float
    quality: str


def alternate(what: str, ours: Callable[[], None], other: Callable[[], None], quality: str) -> Result:
    """Time the two in turn, so that a busy machine slows both."""
    ours()
    other()
    pairs = [(_seconds(ours), _seconds(other)) for _ in range(REPEATS)]
    ratios = [a / b for a, b in pairs]
    return Result(
        what, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), min(ratios), max(ratios), quality
    )


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _vae(pixels: int, hidden: int, latent_dim: int) -> VAE:
    torch.manual_seed(0)
    family = DiagonalNormal(latent_dim)
    options = {"hidden": (hidden,), "activation": "tanh"}
    return VAE(
        Normal(latent_dim),
        Bernoulli((pixels,)),
        MLP((latent_dim,), pixels, **options),
        AmortizedGuide(MLP((pixels,), family.param_dim, **options), family),
    )


def training_step(batch: int) -> Result:
    """Compare 20 training steps, 784-400-20, with pyro.infer.SVI on the same model and data."""
    x = torch.bernoulli(torch.rand(batch, 784))
    first, second = _vae(784, 400, 20), _vae(784, 400, 20)
    step = Step(first, size=batch, learning_rate=1e-3)
    svi = pyro.infer.SVI(second.model, second.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    losses: dict[str, float] = {}

    def ours() -> None:
        torch.manual_seed(1)
        for _ in range(20):
            losses["ours"] = float(step(x)[0])

    def other() -> None:
        torch.manual_seed(1)
        for _ in range(20):
            losses["other"] = svi.step(x) / batch

    result = alternate(f"20 training steps, 784-400-20, batch {batch}, against pyro.infer.SVI", ours, other, "")
    quality = f"loss after the same steps {losses['ours']:.4f} and {losses['other']:.4f} nats"
    return Result(result.what, result.ours, result.other, result.low, result.high, quality)


def shared_grid() -> Result:
    """Compare the shared coarse grid of 2,000 x 784 data on 101^2 points with its bare matrix product."""
    n, points = 2000, 101
    x = torch.bernoulli(torch.rand(n, 784))
    vae = _vae(784, 200, 2)
    log_joint = LogJoint(vae.model, vae.guide, x, dtype=None)
    axis = torch.linspace(-4, 4, points)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        logits = vae.decoder(z)
        values = log_joint.shared(z[:5])
        plain = log_joint(z[:5, None].expand(-1, n, -1))
    quality = f"largest difference from plain evaluation {(values - plain).abs().max():.1e} nats"

    def ours() -> None:
        with torch.no_grad():
            log_joint.shared(z)

    def other() -> None:
        for part in logits.split(1000):
            part @ x.T

    return alternate(f"shared grid, {n} x 784 on {points}^2, against its bare matrix product", ours, other, quality)


def pareto_k() -> Result:
    """Compare k-hat of 360 data x 10,000 draws with ArviZ's loop over data."""
    log_weights = torch.randn(10_000, 360, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = arviz_stats.base.array_stats
    array = -log_weights.numpy()

    def other() -> None:
        for column in range(array.shape[1]):
            theirs.psislw(array[:, column], r_eff=1.0)

    k = np.array([theirs.psislw(array[:, c], r_eff=1.0)[1] for c in range(array.shape[1])]).astype(float)
    error = abs(psis(log_weights).pareto_k.numpy() - k).max()
    quality = f"largest difference of k-hat {error:.1e}"
    return alternate(
        "k-hat of 360 data x 10,000 draws, against ArviZ's psislw", lambda: psis(log_weights) and None, other, quality
    )


def main() -> None:
    """Run everything and write the table."""
    results = [training_step(128), training_step(1024), shared_grid(), pareto_k()]
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    lines = [
        "# Measured ratios",
        "",
        f"{machine}, {datetime.now(UTC):%Y-%m-%d}. Both sides timed in turn in one run, {REPEATS} repeats after one warm-up;",
        "medians, and the range of the ratio. Below 1 is faster. No GPU was at hand: no GPU figure is claimed.",
        "",
        "| what | ours [s] | other [s] | ratio | range | same work? |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        ratio = f"{r.ours / r.other:.2f} | {r.low:.2f} .. {r.high:.2f}"
        lines.append(f"| {r.what} | {r.ours:.4f} | {r.other:.4f} | {ratio} | {r.quality} |")
    text = "\n".join(lines) + "\n"
    results.write(text)
    print(text)


if __name__ == "__main__":
    main()
