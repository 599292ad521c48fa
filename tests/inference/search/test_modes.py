"""Annealed runs: every datum's runs are its own, however many other data still move when they have settled."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from elbowroom.inference.search import modes, unseen
from elbowroom.inference.search.best_normal import refit
from elbowroom.inference.target.log_joint import LogJoint

RUNS, N, D = 1_000, 24, 2
NOISE = torch.logspace(1.0, -1.6, N, dtype=torch.float64)[:, None]  # from hardly any to a very long way to the posterior


def model(x: Tensor, noise: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)


def guide(x: Tensor, noise: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / (1 + noise**2), noise / (1 + noise**2).sqrt()).to_event(1))


@pytest.mark.parametrize("fewer", [modes.FEWER, 0.0])
def test_weights_give_log_p_and_ends_the_posterior_of_their_own_datum(fewer: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean annealing weight is an unbiased estimate of p(x) at each datum (Neal 2001)."""
    monkeypatch.setattr(modes, "FEWER", fewer)
    x = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_joint = LogJoint(model, guide, x, NOISE)
    found = modes.search(log_joint, refit(log_joint, seed=1).q, runs=RUNS, seed=2)
    length = (found.ladder < 1).sum(0)
    assert length.max() > length.min() + modes.SETTLE  # some have settled while others are still annealed
    assert (found.ladder[-1] == 1).all()
    assert (found.ladder.diff(dim=0) >= 0).all()

    weight = found.log_weight.double()
    share = torch.softmax(weight, 0)
    error = (share.square().sum(0) - 1 / RUNS).sqrt()  # of the logarithm, by the delta method
    log_p = weight.logsumexp(0) - torch.tensor(float(RUNS)).log()
    truth = dist.Normal(0.0, (1 + NOISE**2).sqrt()).to_event(1).log_prob(x)
    known = error < 0.3  # else the delta method says little
    assert known.double().mean() > 0.8
    assert ((log_p - truth).abs() < 4.5 * error + 0.01)[known].all()

    mean, sd = x / (1 + NOISE**2), NOISE / (1 + NOISE**2).sqrt()
    off = ((found.end.double().mean(0) - mean) / sd).abs()
    assert (off < 0.5).all()  # runs are nearly, not exactly, draws


def test_the_high_quantile_is_that_of_all_distances() -> None:
    distance = torch.rand(8, 250, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for few in (distance, distance[:, :3], distance[:1, :1]):
        expected = few.flatten(0, 1).quantile(unseen.OFTEN, 0)
        torch.testing.assert_close(unseen._rarely_beyond(few), expected, rtol=1e-12, atol=0)
