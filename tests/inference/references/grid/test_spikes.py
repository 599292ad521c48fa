"""Narrow peaks in broad posteriors, and teeth: the grid finds them by what else was seen, or it is not exact."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64


def contaminated(d: int, ratio: float, share: float, n: int, seed: int) -> tuple[LogJoint, Tensor]:
    """y ~ (1 - w) N(z, 1) + w N(z, ratio^2), z ~ N(0, 1), with w such that the narrow peak holds `share` of the mass."""
    y = math.sqrt(2) * torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))
    wide, narrow = (dist.Normal(torch.zeros(d, dtype=F64), (1 + s**2) ** 0.5).to_event(1).log_prob(y) for s in (1.0, ratio))
    weight = torch.sigmoid(math.log(share / (1 - share)) + wide - narrow)
    truth = torch.logaddexp(torch.log1p(-weight) + wide, weight.log() + narrow)

    def model(y: Tensor, weight: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(d, dtype=F64), 1.0).to_event(1))
            scale = torch.tensor([[1.0], [ratio]], dtype=F64)
            parts = dist.Normal(z.unsqueeze(-2), scale).to_event(1)
            which = dist.Categorical(torch.stack([1 - weight, weight], -1))
            pyro.sample("y", dist.MixtureSameFamily(which, parts), obs=y)

    def guide(y: Tensor, weight: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 0.5**0.5).to_event(1))

    return LogJoint(model, guide, y, weight), truth


def beside(d: int, ratio: float, share: float, n: int, seed: int) -> tuple[LogJoint, Tensor]:
    """A prior of two normals, the narrow one beside the middle, and a wide likelihood: a peak that the prior's draws know."""
    g = torch.Generator().manual_seed(seed)
    y, place = torch.randn(n, d, dtype=F64, generator=g), 0.8 * torch.randn(d, dtype=F64, generator=g)

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            loc, scale = torch.stack([torch.zeros(d, dtype=F64), place]), torch.tensor([[1.0], [ratio]], dtype=F64)
            which = dist.Categorical(torch.tensor([1 - share, share], dtype=F64))
            z = pyro.sample("z", dist.MixtureSameFamily(which, dist.Normal(loc, scale).to_event(1)))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 0.5**0.5).to_event(1))

    parts = [
        math.log(w) + dist.Normal(at, (1 + s**2) ** 0.5).to_event(1).log_prob(y)
        for w, at, s in ((1 - share, torch.zeros(d, dtype=F64), 1.0), (share, place, ratio))
    ]
    return LogJoint(model, guide, y), torch.logaddexp(*parts)


def comb(w: float, n: int, seed: int) -> tuple[LogJoint, Tensor]:
    """y ~ N(sin(w z), .1): teeth as far as the prior reaches; log p(x) by a dense sum."""
    g = torch.Generator().manual_seed(seed)
    y = torch.sin(w * torch.randn(n, dtype=F64, generator=g)) + 0.1 * torch.randn(n, dtype=F64, generator=g)

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(torch.sin(w * z[..., 0]), 0.1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y), 1, dtype=F64), 1.0).to_event(1))

    z = torch.linspace(-9, 9, 360_001, dtype=F64)[:, None]
    log_p = dist.Normal(torch.sin(w * z), 0.1).log_prob(y) + dist.Normal(0.0, 1.0).log_prob(z)
    return LogJoint(model, guide, y), torch.logsumexp(log_p, 0) + math.log(18 / 360_000)


def far(scale: float, n: int, seed: int) -> tuple[LogJoint, Tensor]:
    """y ~ N(z^2, .01), z ~ N(0, scale^2): two peaks far apart, as narrow as .01 / (2 z); log p(x) by a dense sum over z^2."""
    y = scale**2 * (0.3 + torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(seed)).square())

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), scale).to_event(1))
            pyro.sample("y", dist.Normal(z[..., 0].square(), 0.01), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y.sqrt()[:, None], 0.1 * scale).to_event(1))

    t = torch.linspace(-0.15, 0.15, 40_001, dtype=F64)[:, None]
    log_p = dist.Normal(0 * y, 0.01).log_prob(t) + dist.Gamma(0.5, (0 * y + 0.5) / scale**2).log_prob(y + t)
    return LogJoint(model, guide, y), torch.logsumexp(log_p, 0) + math.log(0.3 / 40_000)


def held(log_joint: LogJoint, truth: Tensor, seed: int) -> float:
    """Assert that nothing exact is beyond three times its stated error; return the share that is exact."""
    grid = Grid()(log_joint, keep=100, seed=seed)
    assert grid.evidence is not None
    exact = torch.tensor([status == "exact" for status in grid.status])
    error = (grid.evidence.value - truth).abs()
    assert (error <= 3 * grid.evidence.error + 1e-9)[exact].all(), (error[exact], grid.evidence.error[exact])
    return float(exact.double().mean())


@pytest.mark.parametrize(
    ("d", "ratio", "share"), [(1, 0.002, 0.3), (2, 0.01, 0.05), pytest.param(3, 0.05, 0.3, marks=pytest.mark.slow)]
)
def test_a_spike_of_contaminated_noise_is_a_part_of_the_exact_value(d: int, ratio: float, share: float) -> None:
    assert held(*contaminated(d, ratio, share, 1, 0), seed=0) == 1.0


def test_a_spike_that_the_prior_knows_is_found() -> None:
    assert held(*beside(2, 0.02, 0.2, 2, 1), seed=0) == 1.0


@pytest.mark.parametrize("w", [3.0, 200.0, *(pytest.param(w, marks=pytest.mark.slow) for w in (10.0, 20.0))])
def test_no_tooth_of_a_comb_is_cut_off(w: float) -> None:
    assert held(*comb(w, 12, 1), seed=1) >= 0.9


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
def test_both_of_two_far_peaks_are_seen_or_none_is_exact(scale: float) -> None:
    held(*far(scale, 6, 1), seed=1)


@pytest.mark.parametrize(
    ("w", "datum", "seed"),
    [(15.0, 15, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((30.0, 19, 1), (150.0, 3, 3)))],
)
def test_lattices_that_agree_by_luck_and_boxes_that_end_between_teeth(w: float, datum: int, seed: int) -> None:
    log_joint, truth = comb(w, 20, seed)
    grid = Grid()(log_joint, keep=100, seed=seed)
    assert grid.evidence is not None
    assert grid.status[datum] == "exact"
    assert abs(float(grid.evidence.value[datum] - truth[datum])) <= float(grid.evidence.error[datum])


@pytest.mark.slow
@pytest.mark.parametrize("make", [contaminated, beside])
@pytest.mark.parametrize(("d", "seed"), [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)])
def test_spikes_of_every_width_and_mass(make, d: int, seed: int) -> None:
    for ratio in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
        for share in (0.05, 0.5):
            held(*make(d, ratio, share, 3, seed), seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_combs_of_every_width(seed: int) -> None:
    for w in (2.0, 3.0, 5.0, 7.0, 15.0, 30.0, 70.0, 100.0):
        assert held(*comb(w, 20, seed), seed=seed) >= 0.9
