"""The imputation benchmark's own arithmetic: errors by hand, and a model whose conditional means are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks.imputation import (
    Guess,
    Measured,
    by_group,
    impute,
    marginal,
    resampled,
    weighted_quantiles,
)
from benchmarks.imputation_table import section
from torch import Tensor, nn

from elbowroom.analysis.queries.imputation import errors, losses
from elbowroom.models.columns import Column
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.likelihoods.mixed import Mixed
from elbowroom.models.networks.mlp import MLP, Linear
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

COLUMNS = (
    Column("height", "real"),
    Column("grade", "ordinal", 5),
    Column("colour", "categorical", 3),
    Column("visits", "count"),
)


def test_errors_are_those_of_hi_vae_by_hand():
    nan = np.nan
    truth = np.array([[1.0, 4, 2, nan], [3.0, nan, 0, 7], [nan, 1, 1, 3], [nan, 0, 1, nan]])
    guess = np.array([[2.0, 2, 2, 0.0], [1.0, 0, 1, 6], [0.0, 1, 1, 6], [0.0, 3, 0, 0]])
    ranges = np.array([4.0, 1, 1, 10])
    loss = losses(truth, guess, COLUMNS, ranges)
    assert np.array_equal(np.isnan(loss), np.isnan(truth))
    expected = [np.sqrt((1 + 4) / 2) / 4, (2 + 0 + 3) / 3 / 5, 2 / 4, np.sqrt((1 + 9) / 2) / 10]
    error = errors(loss, COLUMNS)
    assert error == pytest.approx(expected)
    kinds = [(expected[0] + expected[3]) / 2, expected[2], expected[1], np.mean(expected)]
    assert by_group(error, COLUMNS) == pytest.approx([*expected, *kinds])
    twice = np.array([[2.0, 1, 0, 1], [1, 1, 1, 1]])
    again = errors(loss, COLUMNS, twice)
    assert again[1] == pytest.approx(expected)
    assert again[0] == pytest.approx([np.sqrt((2 + 4) / 3) / 4, (4 + 3) / 3 / 5, 2 / 4, 1 / 10])


def test_bootstrap_weights_are_samples_of_the_rows():
    weights = resampled(50, 300)
    assert (weights.sum(1) == 50).all()
    x = np.random.default_rng(1).normal(size=50)
    assert (weights @ x / 50).std() == pytest.approx(x.std() / np.sqrt(50), rel=0.15)


def test_the_baseline_is_mean_mode_and_quantiles_of_what_is_there():
    x = np.array([[1.0, 0, 2, 5], [2.0, 1, 0, np.nan], [np.nan, 1, 2, 7], [6.0, 3, 2, 9]])
    own = marginal(x, COLUMNS, 3)
    assert own.point.tolist() == [[3.0, 1, 2, 7]] * 3
    assert own.median[0].tolist() == [2.0, 1, 2, 7]
    assert own.low[0].tolist() == [1.0, 0, 0, 5]
    assert own.high[0].tolist() == [6.0, 3, 2, 9]


def test_weighted_quantiles_of_three_draws():
    values = torch.tensor([3.0, 1.0, 2.0])[:, None, None]
    weights = torch.tensor([0.5, 0.2, 0.3])[:, None]
    found = weighted_quantiles(values, weights, [0.1, 0.2, 0.45, 0.5, 0.51, 0.95])
    assert [float(q) for q in found] == [1, 1, 2, 2, 3, 3]


def _linear(loadings: Tensor, noise: float) -> VAE:
    """A linear-Gaussian VAE whose guide is near the prior: it knows nothing of x."""
    n, d = loadings.shape
    family = DiagonalNormal(d)
    decoder = Linear((d,), n)
    guide = AmortizedGuide(MLP((2 * n,), family.param_dim, hidden=(4,)), family, marks=True)
    with torch.no_grad():
        decoder.body.weight.copy_(loadings)  # type: ignore[union-attr]
        decoder.body.bias.zero_()  # type: ignore[union-attr]
        for parameter in guide.parameters():
            nn.init.zeros_(parameter)
    return VAE(Normal(d), Gaussian((n,), scale=noise), decoder, guide).double().eval()


def test_weighted_guesses_are_the_closed_form_conditional_mean():
    torch.manual_seed(3)
    loadings, noise = torch.randn(5, 2, dtype=torch.float64), 0.7
    vae = _linear(loadings, noise)
    x = torch.randn(40, 2, dtype=torch.float64) @ loadings.T + noise * torch.randn(40, 5, dtype=torch.float64)
    x[:, 0] = torch.nan
    x[::3, 3] = torch.nan
    found = impute(vae, x, 4000, 1)
    covariance = loadings @ loadings.T + noise**2 * torch.eye(5, dtype=torch.float64)
    inside = 0
    for row, point, median, low, high in zip(
        x, *(torch.from_numpy(v) for v in vars(found.guess["weighted"]).values()), strict=True
    ):
        seen = ~row.isnan()
        gain = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, ~seen]).T
        mean = gain @ row[seen]
        sd = (covariance[~seen][:, ~seen] - gain @ covariance[seen][:, ~seen]).diag().sqrt()
        assert torch.allclose(point[~seen], mean, atol=0.25)
        assert torch.allclose(median[~seen], mean, atol=0.35)
        assert torch.allclose((high - low)[~seen], 2 * 1.6449 * sd, rtol=0.25)
        inside += int((point[~seen] - mean).abs().max() < 0.08)
    assert inside > 30
    assert found.ess.shape == (40,)
    assert 20 < np.median(found.ess) < 3000
    plain = found.guess["guide"].point  # the prior's mean, whatever was seen
    assert np.abs(plain).max() < 0.2


def test_codes_are_guessed_by_their_averaged_probabilities():
    family, likelihood = DiagonalNormal(1), Mixed((4,), COLUMNS)
    guide = AmortizedGuide(MLP((2 * likelihood.feature_shape[0],), family.param_dim, hidden=(4,)), family, marks=True)
    vae = VAE(Normal(1), likelihood, Linear((1,), likelihood.param_dim), guide)
    x = torch.tensor([[1.0, 0, 2, 3], [2.0, 1, 0, 0], [1.5, 1, 2, 4], [0.5, 4, 2, 2]] * 5)
    vae.adapt(x)
    with torch.no_grad():
        vae.decoder.body.weight.zero_()
        vae.decoder.body.bias.zero_()
    x[0, 1:] = torch.nan
    for guess in impute(vae.double().eval(), x.double(), 50, 1).guess.values():
        assert isinstance(guess, Guess)
        assert guess.point[0, 1:3].tolist() == [1, 2]
        assert guess.point[0, 0] == pytest.approx(1.25, abs=1e-6)
        assert guess.point[0, 3] == pytest.approx(2.25, rel=1e-5)
        assert (guess.low <= guess.median).all()
        assert (guess.median <= guess.high).all()


def test_the_table_says_better_and_worse():
    error = {
        (way, use): by_group(np.array(values), COLUMNS)
        for use in ("point", "median")
        for way, values in {"marginal": [0.3, 0.2, 0.5, 0.1], "guide": [0.3] * 4, "weighted": [0.2, 0.3, 0.5, 0.1]}.items()
    }
    se = {key: np.full(8, 0.01) for key in error}
    held = {way: np.full(4, 0.9) for way in ("marginal", "guide", "weighted")}
    measured = Measured(error, se, se, held, 100.0, 0.01, -3.0, 7, (1.0, 2.0))
    text = section("## Imputation", "here.", {3: [measured], 2: [measured]}, COLUMNS, 10, "")
    assert "| height | real | 0.3000 ± 0.0100 | 0.3000 ± 0.0100 | 0.2000 ± 0.0100 | **-0.1000 ± 0.0100" in text
    assert "| grade | ordinal | 0.2000" in text
    assert "+0.1000 ± 0.0100 (+0.1000 .. +0.1000) ! |" in text
    assert "d = 2. Validation ELBO -3.00 nats" in text
    assert all(line.count("|") in (0, 7, 10) for line in text.splitlines() if "p(" not in line and "q(" not in line)
