"""Convergence diagnostics: against ArviZ on slices, against closed forms, and one column's troubles kept to itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats

from elbowroom.inference.mcmc import diagnostics
from elbowroom.inference.mcmc.diagnostics import ebfmi, ess_bulk, ess_mean, ess_sd, ess_tail, mcse_mean, mcse_sd, rhat, split

F64 = torch.float64
N_COLUMNS = 5


def autoregressive(noise: torch.Tensor, phi: float) -> torch.Tensor:
    """Stationary AR(1) of unit variance along dim 1."""
    draws = noise.clone()
    for t in range(1, draws.shape[1]):
        draws[:, t] = phi * draws[:, t - 1] + math.sqrt(1 - phi**2) * noise[:, t]
    return draws


def shifted(noise: torch.Tensor) -> torch.Tensor:
    return noise + (torch.arange(noise.shape[0], dtype=F64) == 0)[:, None, None]


def wider(noise: torch.Tensor) -> torch.Tensor:
    return noise * (1 + (torch.arange(noise.shape[0], dtype=F64) == 0))[:, None, None]


def sticky(noise: torch.Tensor) -> torch.Tensor:
    """Half of the draws are repeated, as after a rejection."""
    draws = noise.clone()
    for t in range(1, draws.shape[1]):
        draws[:, t] = torch.where(noise[:, t] > 0, draws[:, t - 1], noise[:, t])
    return draws


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "iid": lambda noise: noise,
    "ar": lambda noise: autoregressive(noise, 0.9),
    "antithetic": lambda noise: autoregressive(noise, -0.5),
    "cauchy": lambda noise: torch.tan(math.pi * (torch.special.ndtr(noise) - 0.5)),
    "shifted": shifted,
    "wider": wider,
    "sticky": sticky,
    "integers": lambda noise: (2 * noise).round(),
    "two values": lambda noise: (noise > 0.3).to(F64),
    "random walk": lambda noise: noise.cumsum(1),
    "far from zero": lambda noise: 1e3 + noise,
}


def normal(n_chains: int, n_draws: int, *batch: int, seed: int) -> torch.Tensor:
    return torch.randn(n_chains, n_draws, *batch, dtype=F64, generator=torch.Generator().manual_seed(seed))


def arviz(draws: torch.Tensor) -> dict[str, np.ndarray]:
    """ArviZ's answers, one column after the other."""
    x = np.moveaxis(draws.numpy(), (0, 1), (-2, -1))
    with np.errstate(all="ignore"):
        ess = {m: array_stats.ess(x, method=m) for m in ("bulk", "mean", "sd")}
        tail = array_stats.ess(x, method="tail", prob=(0.05, 0.95))
        centred = x - x.mean((-2, -1), keepdims=True)
        m2, m4 = (centred**2).mean((-2, -1)), (centred**4).mean((-2, -1))
        return {
            "rhat": array_stats.rhat(x),
            "ess_bulk": ess["bulk"],
            "ess_tail": tail,
            "ess_mean": ess["mean"],
            "ess_sd": ess["sd"],
            "mcse_mean": array_stats.mcse(x, method="mean"),
            # posterior's definition; array_stats.mcse(method="sd") of 0.8.0 divides by ess_mean (arviz-stats issue 428)
            "mcse_sd": np.sqrt((m4 - m2**2) / (4 * m2 * ess["sd"])),
        }


def ours(draws: torch.Tensor) -> dict[str, torch.Tensor]:
    functions = (rhat, ess_bulk, ess_tail, ess_mean, ess_sd, mcse_mean, mcse_sd)
    found = {f.__name__: f(draws) for f in functions}
    for name, value in zip(("rhat", "ess_bulk", "ess_tail"), diagnostics.by_ranks(draws), strict=True):
        torch.testing.assert_close(value, found[name], rtol=0, atol=0, equal_nan=True, msg=f"by_ranks: {name}")
    return found


def assert_equal_to_arviz(draws: torch.Tensor, rtol: float = 1e-9) -> None:
    expected = arviz(draws)
    for name, value in ours(draws).items():
        assert value.shape == draws.shape[2:]
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=rtol, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_chains", "n_draws"), [(2, 100), (4, 101), (8, 64), (16, 37)])
def test_equals_arviz_on_slices(kind: str, n_chains: int, n_draws: int) -> None:
    assert_equal_to_arviz(KINDS[kind](normal(n_chains, n_draws, N_COLUMNS, seed=10 * n_chains + n_draws)))


@pytest.mark.parametrize("n_draws", [4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
def test_equals_arviz_with_few_draws(n_draws: int) -> None:
    """The sums over pairs of lags end differently for each remainder."""
    for kind in ("iid", "ar", "antithetic"):
        assert_equal_to_arviz(KINDS[kind](normal(3, n_draws, 40, seed=n_draws)))


def test_equals_arviz_in_other_tails() -> None:
    draws = KINDS["integers"](normal(4, 101, N_COLUMNS, seed=1))
    for prob in ((0.1, 0.9), (0.025, 0.5), (0.0, 0.99)):
        expected = array_stats.ess(draws.permute(2, 0, 1).numpy(), method="tail", prob=prob)
        np.testing.assert_allclose(ess_tail(draws, prob).numpy(), expected, rtol=1e-9)


def test_quantiles_are_numpy_s_to_the_last_bit() -> None:
    """Draws are compared with them."""
    ascending = normal(1, 171, 400, seed=14)[0].T.sort(1).values
    for prob in (0.05, 0.7, 0.95, 1.0):
        assert (diagnostics._quantile(ascending, prob).numpy() == np.quantile(ascending.numpy(), prob, axis=1)).all()


def test_one_chain_has_ess_and_no_rhat() -> None:
    draws = autoregressive(normal(1, 200, N_COLUMNS, seed=2), 0.5)
    assert rhat(draws).isnan().all()
    assert ess_bulk(draws).isfinite().all()
    np.testing.assert_allclose(
        ess_mean(draws).numpy(), array_stats.ess(draws.permute(2, 0, 1).numpy(), method="mean"), rtol=1e-9
    )


def test_batch_shapes_precision_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = autoregressive(normal(4, 50, 3, 2, 2, seed=3), 0.3)
    whole = ours(draws)
    assert rhat(draws[..., 0, 0, 0]).shape == ()
    assert ess_bulk(draws[..., :0]).shape == (3, 2, 0)
    monkeypatch.setattr(diagnostics, "CHUNK", 5 * 4 * 50)
    seen, function = [], diagnostics._rhat
    monkeypatch.setattr(diagnostics, "_rhat", lambda x: (seen.append(len(x)), function(x))[1])
    rhat(draws)
    assert seen == [5, 5, 2]
    for name, value in ours(draws).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=0, msg=name)
        torch.testing.assert_close(ours(draws[:, :, 1, 1, 0])[name], value[1, 1, 0], rtol=1e-12, atol=0, msg=name)
    single = rhat(draws.float().requires_grad_())
    assert single.dtype == F64
    assert not single.requires_grad
    torch.testing.assert_close(single, rhat(draws.float().double()), rtol=0, atol=0)


def test_split_is_of_halves() -> None:
    draws = torch.arange(10, dtype=F64).view(2, 5, 1)
    assert split(draws)[..., 0].tolist() == [[0, 1], [5, 6], [3, 4], [8, 9]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_draw_stays_in_its_column(bad: float) -> None:
    draws = normal(4, 101, N_COLUMNS, seed=4)
    before = ours(draws)
    draws[2, 50, 1] = bad  # the middle draw, which the halves leave out
    draws[1, 7, 3] = bad
    after = ours(draws)
    kept = [0, 2, 4]
    for name, expected in arviz(draws).items():
        torch.testing.assert_close(after[name][kept], before[name][kept], rtol=0, atol=0, msg=name)
        if math.isnan(bad):
            assert after[name][[1, 3]].isnan().all(), name
        np.testing.assert_allclose(after[name].numpy(), expected, rtol=1e-9, err_msg=name)


def test_infinities_of_both_signs_have_ranks() -> None:
    draws = normal(4, 60, N_COLUMNS, seed=5)
    draws[0, :20, 0] = math.inf
    draws[1, :20, 0] = -math.inf
    draws[:, :45, 1] = math.inf  # the median is infinite, and distances from it are not defined
    assert_equal_to_arviz(draws)
    assert rhat(draws)[:2].isfinite().all()


def test_constant_columns() -> None:
    draws = normal(4, 101, N_COLUMNS, seed=6)
    draws[..., 0] = 0.1
    draws[..., 1] = 1e-20 * draws[..., 1]  # a range that ArviZ calls constant
    assert_equal_to_arviz(draws)
    value = ours(draws)
    assert value["rhat"][0].isnan()
    for name in ("ess_bulk", "ess_tail", "ess_mean", "ess_sd"):
        assert value[name][0] == 400  # of the halves: the middle draws do not count
    assert value["mcse_mean"][0] < 1e-15


def test_chains_that_each_stand_still_do_not_agree() -> None:
    draws = torch.arange(4, dtype=F64)[:, None, None].expand(4, 100, 2)
    assert (rhat(draws) > 1e6).all()
    assert (ess_mean(draws) < 5).all()


@pytest.mark.parametrize("shape", [(4, 3, 2), (2, 0, 2)])
def test_too_few_draws(shape: tuple[int, ...]) -> None:
    for value in ours(torch.ones(shape, dtype=F64)).values():
        assert value.shape == (2,)
        assert value.isnan().all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="chain, draw"):
        ess_bulk(torch.zeros(10))
    with pytest.raises(ValueError, match="chain, draw"):
        ebfmi(torch.zeros(10))
    with pytest.raises(ValueError, match="prob"):
        ess_tail(torch.zeros(4, 10), (0.05, 1.95))


def test_ebfmi_equals_arviz() -> None:
    energy = autoregressive(normal(4, 101, N_COLUMNS, 2, seed=7), 0.8)
    energy[1, 3, 2, 0] = math.nan
    energy[:, :, 4, 1] = 2.5
    value = ebfmi(energy)
    with np.errstate(all="ignore"):
        expected = array_stats.bfmi(np.moveaxis(energy.numpy(), (0, 1), (-2, -1)))
    np.testing.assert_allclose(value.numpy(), np.moveaxis(expected, -1, 0), rtol=1e-9)
    assert value.isnan().sum() == 1 + 4
    assert ebfmi(energy[:, :1]).isnan().all()


def test_ebfmi_of_a_stationary_chain() -> None:
    """For AR(1) energies its expectation is 2 (1 - phi) to order 1 / n."""
    for phi in (0.0, 0.9):
        value = ebfmi(autoregressive(normal(200, 4000, 1, seed=8), phi))
        error = value.std().item() / math.sqrt(200)
        assert abs(value.mean().item() - 2 * (1 - phi)) < 4.5 * error + 0.004
        assert error < 0.01


@pytest.mark.parametrize(("phi", "bias"), [(0.0, 0.03), (0.5, 0.03), (0.9, 0.06), (-0.5, 0.03)])
def test_ess_against_the_closed_form(phi: float, bias: float) -> None:
    """ESS / S of an AR(1) chain is (1 - phi) / (1 + phi); a squared one's is (1 - phi^2) / (1 + phi^2)."""
    draws = autoregressive(normal(4, 4000, 40, seed=9), phi)
    efficiency = (1 - phi) / (1 + phi)
    for value in (ess_mean(draws) / 16_000, ess_bulk(draws) / 16_000):
        assert abs(value.mean().item() / efficiency - 1) < bias
        assert value.std() / efficiency < 0.15
    squared = (1 - phi**2) / (1 + phi**2)
    assert abs(ess_sd(draws).mean().item() / 16_000 / squared - 1) < bias


def test_ess_of_an_indicator() -> None:
    """It is that of a probability: the two-state chain that flips with probability a has autocorrelation (1 - 2 a)^t."""
    flips = normal(4, 4000, 40, seed=11) > -0.6744897501960817  # with probability 3/4
    state = (flips.cumsum(1) % 2).bool()
    ess = ess_mean(state) / 16_000
    assert abs(ess.mean().item() / (0.75 / 0.25) - 1) < 0.05


@pytest.mark.parametrize("phi", [0.0, 0.8, -0.5])
def test_errors_of_moments_cover(phi: float) -> None:
    """The means and standard deviations of 1,000 replicates spread as their MCSEs say: within 4.5 SE of a ratio of 1."""
    draws = autoregressive(normal(4, 1000, 1000, seed=12), phi)
    flat = draws.flatten(0, 1)
    for spread, error in ((flat.mean(0).std(), mcse_mean(draws)), (flat.std(0).std(), mcse_sd(draws))):
        ratio = (spread / error.square().mean().sqrt()).item()
        assert abs(ratio - 1) < 4.5 / math.sqrt(2 * 1000) + 0.02  # the standard error of a standard deviation, and ESS's bias


def test_rhat_sees_location_and_scale_and_no_more_than_chance_elsewhere() -> None:
    noise = normal(4, 500, 200, seed=13)
    assert (rhat(noise) < 1.02).all()
    assert (rhat(shifted(noise)) > 1.03).all()
    assert (rhat(wider(noise)) > 1.03).all()  # only the folded draws show it
