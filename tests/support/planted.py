"""Models with one planted fault each, and without: what the audit's verdict must be.

    PYTHONPATH=tests python -m support.planted --n 100 --seed 1 [fault ...]    # counts the verdicts of each fault

The guide is the exact posterior, or the best member of its family, but for the fault.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from elbowroom.analysis.audit.auditor import audit_log_joint
from elbowroom.analysis.checks.criticism import criticise
from elbowroom.analysis.latents.information import information
from elbowroom.analysis.verdict.judgement import Judgement
from elbowroom.analysis.verdict.rules import judge
from elbowroom.inference.posterior import Reference
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.linear_gaussian import LinearGaussian
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.vae import VAE
from support.cases.vaes import linear_vae, set_guide

N = 60
F64 = torch.float64


@dataclass
class Planted:
    """A pair with a fault.

    Attributes:
        log_joint: of the data that are audited.
        reference: exact.
        train: of the data that the encoder was trained on, where that matters.
    """

    log_joint: LogJoint
    reference: Reference = field(default_factory=ClosedForm)
    train: LogJoint | None = None


def orthogonal(seed: int, *, turn: float = 0.0, dead: bool = False, width: int = 6) -> tuple[VAE, Tensor, LinearGaussian]:
    """A linear-Gaussian VAE whose latents are independent given x, turned by an angle; its second one may be dead."""
    generator = torch.Generator().manual_seed(seed)
    vae, _, _ = linear_vae(2, width, seed=seed)
    axes = torch.linalg.qr(torch.randn(width, 2, generator=generator, dtype=F64)).Q
    angle = torch.tensor(turn, dtype=F64)
    rotation = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    with torch.no_grad():
        vae.decoder.body.weight.copy_(axes * torch.tensor([2.0, 0.0 if dead else 0.5], dtype=F64) @ rotation)
    oracle = vae.linear_gaussian()
    assert oracle is not None
    set_guide(vae, oracle)
    return vae, oracle.sample(N, generator)[1], oracle


def _of(vae: VAE, x: Tensor) -> LogJoint:
    return LogJoint(vae.model, vae.guide, x)


def sound_linear(seed: int) -> Planted:
    """Nothing is wrong: independent latents, the exact posterior."""
    vae, x, _ = orthogonal(seed)
    return Planted(_of(vae, x))


def sound_counts(seed: int) -> Planted:
    """Nothing is wrong: a gamma rate of Poisson counts, and its conjugate posterior for a guide."""
    torch.manual_seed(seed)
    rate = dist.Gamma(2.0, 0.5).sample((N,))
    y = dist.Poisson(rate[:, None].expand(N, 3)).sample()

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("y", dist.Poisson(rate[..., None].expand(*rate.shape, 3)).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("rate", dist.Gamma(2.0 + y.sum(-1), torch.tensor(3.5, dtype=y.dtype)))

    return Planted(LogJoint(model, guide, y.double()), Grid())


def rotated(seed: int) -> Planted:
    """The posterior is correlated, and the guide is the best diagonal one."""
    vae, x, _ = orthogonal(seed, turn=0.785)
    return Planted(_of(vae, x))


def _bent(seed: int, bend: Callable[[Tensor, Tensor], None]) -> Planted:
    vae, x, _ = orthogonal(seed)
    body = vae.posterior.encoder.body
    with torch.no_grad():
        bend(body.weight, body.bias)
    return Planted(_of(vae, x))


def biased(seed: int) -> Planted:
    """The encoder's means are off by a posterior standard deviation or so."""

    def bend(weight: Tensor, bias: Tensor) -> None:
        bias[:2] += torch.tensor([0.25, 0.5], dtype=F64)

    return _bent(seed, bend)


def shrunken(seed: int) -> Planted:
    """The encoder's standard deviations are half of what they should be."""

    def bend(weight: Tensor, bias: Tensor) -> None:
        one = torch.tensor(1.0, dtype=F64).expm1().log()
        scale = torch.nn.functional.softplus(bias[2:] + one) / 2
        bias[2:] = scale.expm1().log() - one

    return _bent(seed, bend)


def ignored(seed: int) -> Planted:
    """q(z|x) = p(z), while the decoder uses z."""

    def bend(weight: Tensor, bias: Tensor) -> None:
        weight.zero_()
        bias.zero_()

    return _bent(seed, bend)


def dead(seed: int) -> Planted:
    """The decoder does not use the second latent, whose guide is the prior."""
    vae, x, _ = orthogonal(seed, dead=True)
    return Planted(_of(vae, x))


def upper(seed: int) -> Planted:
    """The upper of two levels reaches x through the lower one only, and the guide leaves it at its prior."""
    g = torch.Generator().manual_seed(seed)
    top = torch.randn(N, generator=g, dtype=F64)
    x = 2 * top + 0.5 * torch.randn(N, generator=g, dtype=F64) + 0.3 * torch.randn(N, generator=g, dtype=F64)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            top = pyro.sample("top", dist.Normal(torch.zeros_like(x), 1.0))
            z = pyro.sample("z", dist.Normal(2 * top, 0.5))
            pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("top", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("z", dist.Normal(0.98 * x, 0.29))

    return Planted(LogJoint(model, guide, x), Grid())


def one_mode(seed: int) -> Planted:
    """x = z^2 + noise, and a guide on the positive root."""
    torch.manual_seed(seed)
    z = torch.randn(N, dtype=F64)
    y = z.square() + 0.2 * torch.randn(N, dtype=F64)

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
            pyro.sample("y", dist.Normal(z.square(), 0.2), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            root = y.clamp_min(0.05).sqrt()
            pyro.sample("z", dist.Normal(root, 0.2 / (2 * root)))

    return Planted(LogJoint(model, guide, y), Grid())


def heavy(seed: int) -> Planted:
    """The noise of the data has the tails of Student's t with 2 degrees of freedom; the model says it is normal."""
    vae, _, oracle = orthogonal(seed)
    torch.manual_seed(seed)
    z = torch.randn(4 * N, 2, dtype=F64)
    noise = torch.distributions.StudentT(torch.tensor(2.0, dtype=F64)).sample((4 * N, len(oracle.mu)))
    return Planted(_of(vae, z @ oracle.W.T + oracle.mu + oracle.psi.sqrt() * noise))


def overfitted(seed: int) -> Planted:
    """A wide encoder trained for long on six data; the decoder is the true one."""
    vae, x, oracle = orthogonal(seed, width=12)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = MLP((12,), 4, hidden=(128, 128)).double()
        vae.posterior = AmortizedGuide(encoder, vae.posterior.family).double()
        generator = torch.Generator().manual_seed(seed + 1)
        train = oracle.sample(6, generator)[1]
        optimizer = torch.optim.Adam(vae.posterior.parameters(), lr=1e-2)
        precision = oracle.precision
        mean, _ = oracle.posterior(train)
        for _ in range(300):  # KL(q || p) of the normals in closed form: what the ELBO would train it to, without its noise
            q = vae.encode(train)
            shift = q.mean - mean
            variance = q.variance
            loss = 0.5 * (variance * precision.diagonal() + (shift @ precision * shift) - variance.log()).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Planted(_of(vae, x), train=_of(vae, train))


FAULTS: Mapping[str, tuple[Callable[[int], Planted], str]] = {
    "sound_linear": (sound_linear, "sound"),
    "sound_counts": (sound_counts, "sound"),
    "rotated": (rotated, "family too small"),
    "biased": (biased, "encoder falls short"),
    "shrunken": (shrunken, "encoder falls short"),
    "ignored": (ignored, "encoder falls short"),
    "upper": (upper, "encoder falls short"),
    "dead": (dead, "latents collapsed"),
    "one_mode": (one_mode, "mode missed"),
    "heavy": (heavy, "model misfit"),
    "overfitted": (overfitted, "encoder overfits"),
}


def verdicts(planted: Planted, seed: int) -> list[Judgement]:
    """Audit, and judge from all that the rules look at."""
    options = {"references": [planted.reference], "draws": 1000, "keep": 400, "seed": seed}
    table = audit_log_joint(planted.log_joint, **options).table
    reference = planted.reference(planted.log_joint, keep=400, seed=seed + 7)
    beside = {
        "information": information(planted.log_joint, reference=reference, seed=seed),
        "checks": criticise(planted.log_joint, reference, seed=seed)["statistics"].to_dataset(),
    }
    if planted.train is not None:
        beside["train"] = audit_log_joint(planted.train, **options).table
    return judge(table, beside)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count the verdicts of each fault over seeds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("faults", nargs="*", default=list(FAULTS))
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    for name in given.faults:
        plant, expected = FAULTS[name]
        start, counts = time.perf_counter(), Counter[str]()
        for seed in range(given.seed, given.seed + given.n):
            pyro.clear_param_store()
            counts[" + ".join(one.verdict for one in verdicts(plant(seed), seed))] += 1
        right = sum(count for words, count in counts.items() if words.split(" + ")[0] == expected)
        print(f"{name}: {right} of {given.n} {expected}; {dict(counts)}; {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
