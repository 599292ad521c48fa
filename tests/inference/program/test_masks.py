"""Entries that a mask takes out of the likelihood are no data: for the checks of the model, and in simulated data.

x = z w + e with z ~ N(0, 1), e ~ N(0, 1); each test's holes are the same in several spellings, of which one gives them as NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from elbowroom.analysis.checks.criticism import criticise
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.program.masks import kept
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import in_likelihood, predict, simulate

F64 = torch.float64
WIDE = torch.tensor([1.0, -0.5, 0.8, 0.3], dtype=F64)
JUNK = 1e3  # stands where nothing was seen


class Seen(dist.Normal):
    """A normal whose density of a NaN is one: holes without a mask."""

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(value.isnan(), 0.0, super().log_prob(value.nan_to_num()))


def posterior(x: Tensor, seen: Tensor, seed: int) -> Posterior:
    """Return exact draws: p(z|x) is normal with precision 1 + sum over the entries that were seen of w^2."""
    weight = WIDE * seen
    precision = 1 + weight.square().sum(-1)
    mean = (weight * x.nan_to_num()).sum(-1) / precision
    noise = torch.randn(4, len(x), dtype=F64, generator=torch.Generator().manual_seed(seed))
    z = (mean + noise / precision.sqrt())[None, :, :, None]
    return Posterior("exact", z, {"z": z[..., 0]}, ["exact"] * len(x), [""] * len(x))


def joint(observe: Callable[[Tensor, Any, Tensor], Any], *args: Tensor) -> LogJoint:
    """Build the log joint from how x is observed: observe(mean, x, seen)."""

    def model(x: Tensor, seen: Tensor | None = None) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            observe(z[..., None] * WIDE, x, seen)

    def guide(x: Tensor, seen: Tensor | None = None) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 0.8))

    return LogJoint(model, guide, *args)


def elementwise(mean: Tensor, x: Tensor, seen: Tensor) -> None:
    pyro.sample("x", dist.Normal(mean, 1.0).mask(seen).to_event(1), obs=x)


def by_nan(mean: Tensor, x: Tensor, seen: Tensor | None) -> None:
    pyro.sample("x", Seen(mean, 1.0).to_event(1), obs=x)


def by_isfinite(mean: Tensor, x: Tensor, seen: Tensor | None) -> None:
    pyro.sample("x", dist.Normal(mean, 1.0).mask(x.isfinite()).to_event(1), obs=x.nan_to_num())


def whole_rows(mean: Tensor, x: Tensor, seen: Tensor) -> None:
    with poutine.mask(mask=seen):
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def made(n: int, seed: int, share: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, noise = (torch.randn(n, k, dtype=F64, generator=generator) for k in (1, 4))
    return z * WIDE + noise, torch.rand(n, 4, generator=generator) >= share


def hidden(x: Tensor, seen: Tensor, value: float = JUNK) -> Tensor:
    return torch.where(seen, x, value)


def numbers(log_joint: LogJoint, reference: Posterior, **options: int) -> Any:
    tree = criticise(log_joint, reference, **{"replicates": 39, "draws": 39, **options})
    assert [tree.attrs[name] for name in ("joint", "residual", "predictive")] == ["", "", ""]
    return tree


@pytest.mark.parametrize("other", ["isfinite", "nan"])
def test_a_mask_gives_the_checks_of_the_same_model_with_holes(other: str) -> None:
    x, seen = made(60, 0)
    reference = posterior(x, seen, 1)
    mine = numbers(joint(elementwise, hidden(x, seen), seen), reference)
    observe = by_isfinite if other == "isfinite" else by_nan
    right = numbers(joint(observe, hidden(x, seen, torch.nan)), reference)
    for name in ("value", "null", "p_adjusted", "effect"):
        np.testing.assert_allclose(mine["statistics"][name], right["statistics"][name], rtol=1e-9, atol=1e-12)
    holes = ~seen[torch.tensor(mine["observed_data"]["obs_id"].values.copy())].numpy()
    assert (np.isnan(mine["observed_data"]["x"].values) == holes).all()
    assert (np.isnan(mine["posterior_predictive"]["x"].values) == holes).all()
    assert (np.isnan(mine["prior_predictive"]["x"].values) == holes).all()


def level(seeds: int, replicates: int) -> None:
    """A sound model under a mask: no statistic, and not the family, passes a level more often than it may."""
    p_values, family = [], []
    for seed in range(seeds):
        x, seen = made(40, seed)
        log_joint = joint(elementwise, hidden(x, seen), seen)
        options = {"replicates": replicates, "draws": replicates, "seed": 1000 * seed}
        found = numbers(log_joint, posterior(x, seen, seed), **options)["statistics"]
        p_values.append(found["p_value"].values)
        family.append(found["p_adjusted"].values.min())
    for alpha in (0.1, 0.25, 0.5):
        slack = 4.5 * (alpha * (1 - alpha) / seeds) ** 0.5
        assert (np.stack(p_values) <= alpha + 1e-9).mean(0).max() < alpha + slack
        assert (np.array(family) <= alpha + 1e-9).mean() < alpha + slack
    assert 0.3 < np.stack(p_values).mean() < 0.7


@pytest.mark.slow
def test_checks_hold_their_level_under_a_mask() -> None:
    level(24, 9)


@pytest.mark.slow
def test_checks_hold_their_level_under_a_mask_over_many_seeds() -> None:
    level(200, 39)


def test_a_misfit_in_what_was_seen_is_found() -> None:
    x, seen = made(200, 3)
    wide = x + torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(5))
    found = numbers(joint(elementwise, hidden(wide, seen), seen), posterior(wide, seen, 1), replicates=99, draws=99)[
        "statistics"
    ]
    assert float(found["p_adjusted"].sel(statistic="residual_sd")) <= 0.02
    assert float(found["effect"].sel(statistic="residual_sd")) > 0.2


def test_masks_of_whole_data_and_of_nothing() -> None:
    x, _ = made(60, 0)
    rows = torch.arange(60) % 3 > 0
    seen = rows[:, None].expand(60, 4)
    reference = posterior(x, seen, 1)
    right = numbers(joint(elementwise, x, seen), reference)["statistics"]
    mine = numbers(joint(whole_rows, x, rows), reference)["statistics"]
    np.testing.assert_allclose(mine["p_value"], right["p_value"])
    column = joint(elementwise, x, rows[:, None])
    assert torch.equal(in_likelihood(column)["x"].isnan(), ~seen)
    everything = lambda mean, x, seen: pyro.sample("x", dist.Normal(mean, 1.0).to_event(1).mask(True), obs=x)
    assert torch.equal(in_likelihood(joint(everything, x))["x"], x)
    nothing = lambda mean, x, seen: pyro.sample("x", dist.Normal(mean, 1.0).to_event(1).mask(False), obs=x)
    found = criticise(joint(nothing, x), reference, replicates=9, draws=9)
    assert found.attrs["sentence"] == "not available: a mask takes all entries out of the likelihood"


def test_counts_are_whole_numbers_and_their_holes_are_nan() -> None:
    def observe(mean: Tensor, x: Tensor, seen: Tensor) -> None:
        pyro.sample("x", dist.Poisson(mean.exp()).mask(seen).to_event(1), obs=x)

    x, seen = made(30, 0)
    counts = torch.where(seen, torch.poisson(x.exp()), 0).long()
    log_joint = LogJoint(*_counts_pair(observe), counts, seen)
    other, z = simulate(log_joint, seed=1)
    assert other.args[0].dtype == torch.int64
    assert bool((other.args[0][~seen] == 0).all())  # a mark stays where it was
    assert torch.equal(other.program.observed["x"].isnan(), ~seen)
    assert torch.equal(in_likelihood(log_joint)["x"].isnan(), ~seen)


def _counts_pair(observe: Callable[..., Any]) -> tuple:
    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            observe(z[..., None] * WIDE, x, seen)

    def guide(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    return model, guide


def test_holes_stay_holes_in_simulated_data() -> None:
    x, seen = made(40, 0)
    with_nan = joint(by_isfinite, hidden(x, seen, torch.nan))
    other, z = simulate(with_nan, seed=2)
    assert torch.equal(other.data().isnan(), ~seen)
    expected = dist.Normal(z * WIDE, 1.0).log_prob(other.data().nan_to_num())
    torch.testing.assert_close(other.terms(z[None])[1][0], torch.where(seen, expected, 0).sum(-1))
    drawn = predict(with_nan, {"z": z[None, :, 0]}, seed=0)["x"][0]
    assert torch.equal(drawn.isnan(), ~seen)
    marked = simulate(joint(elementwise, hidden(x, seen), seen), seed=2)[0].data()
    assert bool((marked[~seen] == JUNK).all())
    held_out = simulate(joint(elementwise, x, seen), seed=2)[0].data()  # real values, kept from the likelihood
    assert not bool((held_out == x).any())

    def half(mean: Tensor, x: Tensor, seen: Tensor) -> None:
        pyro.sample("x", dist.Normal(mean[..., 0], 1.0), obs=x[..., 0], obs_mask=seen[..., 0])

    first, there = x[:, :1], seen[:, :1]
    split = joint(half, first, there)
    assert torch.equal(in_likelihood(split)["x_observed"].isnan(), ~there[:, 0])


def test_a_mask_that_moves_is_refused_with_its_reason() -> None:
    x, seen = made(30, 0)
    reference = posterior(x, seen, 1)
    of_z = lambda mean, x, seen: pyro.sample("x", dist.Normal(mean, 1.0).mask(mean > -9 + 9.5 * seen).to_event(1), obs=x)
    found = criticise(joint(of_z, x, seen.double()), reference, replicates=9, draws=9)
    why = "which entries of 'x' a mask takes out of the likelihood depends on the"
    assert found.attrs["joint"] == f"not available: {why} latents"
    of_x = lambda mean, x, seen: pyro.sample("x", dist.Normal(mean, 1.0).mask(x > 0).to_event(1), obs=x)
    with pytest.raises(UnsupportedProgram, match=f"{why} values of the data"):
        simulate(joint(of_x, x), seed=0)
    found = criticise(joint(of_x, x), reference, replicates=9, draws=9)
    assert found.attrs["joint"] == f"not available: {why} values of the data"
    inside = dist.ZeroInflatedDistribution(dist.Poisson(torch.ones(3)).mask(seen[0, :3]), gate=torch.tensor(0.1))
    with pytest.raises(UnsupportedProgram, match="takes part of the density of site 'x', not entries of it"):
        kept({"fn": inside, "value": torch.zeros(3), "mask": None, "name": "x"})


def test_a_mask_is_laid_over_the_values_whatever_their_shape() -> None:
    fn = dist.Normal(0.0, 1.0).expand([2, 3])
    node = {"fn": fn, "value": torch.zeros(3), "mask": torch.tensor([True, False, True]), "name": "x"}
    found = kept(node)
    assert found is not None
    assert found.tolist() == [True, False, True]
    assert kept({**node, "mask": torch.tensor(True)}) is None
    uneven = torch.tensor([[True, False, True], [True, True, True]])
    with pytest.raises(UnsupportedProgram, match="some copies of an entry of site 'x'"):
        kept({**node, "mask": uneven})
