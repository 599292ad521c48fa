"""The benchmark's own arithmetic: what it reports must be right before any ratio is believed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks.posteriors import Truth, quality
from benchmarks.problem import Problem, counted, fitted
from benchmarks.results import replaced


def test_a_section_of_the_results_is_replaced_and_the_others_stay():
    document = "# Measured\n\nold\n\n## Posteriors\n\nkept\n"
    assert replaced(document, "# Measured\n\nnew\n") == "# Measured\n\nnew\n\n## Posteriors\n\nkept\n"
    assert replaced(document, "## Posteriors\n\nnew") == "# Measured\n\nold\n\n## Posteriors\n\nnew\n"
    assert replaced(document, "## More\n\nnew") == document + "\n## More\n\nnew\n"
    assert replaced("", "## More\n\nnew") == "## More\n\nnew\n"


def test_quality_of_independent_and_of_shifted_draws():
    rng = np.random.default_rng(7)
    mean, sd = rng.normal(size=(30, 2)), np.exp(rng.normal(size=(30, 2)))
    draws = mean + sd * rng.normal(size=(4, 300, 30, 2))
    exact = np.full_like(mean, np.inf)
    fair = quality(draws, Truth(mean, sd, exact, ""))
    assert fair.ess.shape == (30,)
    assert 900 < np.median(fair.ess) < 1400  # 1,200 independent draws, the lesser of two
    assert fair.in_mcse.max() < 4.5
    sd[3] = np.nan  # not known exactly
    shifted = quality(draws + 0.3 * sd, Truth(mean, sd, exact, ""))
    assert np.nanmin(shifted.in_sd) > 0.15
    assert np.nanmin(shifted.in_mcse) > 4.5
    assert np.isnan(shifted.in_sd).sum() == 2


def test_a_truth_by_draws_has_an_error_of_its_own():
    rng = np.random.default_rng(8)
    draws = rng.normal(size=(4, 300, 200, 1))
    off = rng.normal(size=(200, 1)) / 20  # as a mean of 400 draws is off
    true = Truth(off, np.ones((200, 1)), np.full((200, 1), 400.0), "")
    assert np.abs(np.sqrt(np.mean(quality(draws, true).in_mcse ** 2)) - 1) < 0.25
    certain = Truth(off, np.ones((200, 1)), np.full((200, 1), np.inf), "")
    assert np.sqrt(np.mean(quality(draws, certain).in_mcse ** 2)) > 1.5


def test_gradients_are_counted_once_per_point_and_datum():
    problem = Problem(fitted(8, epochs=2), 6)
    with counted() as found:
        problem.log_joint.grad(problem.starts(4, 1))
    assert found[0] == 4 * 6
    problem.log_joint.grad(problem.starts(4, 1))
    assert found[0] == 4 * 6  # no more outside


def test_the_exported_weights_are_the_model_and_a_difference_is_refused():
    problem = Problem(fitted(8, epochs=2), 12)
    z = problem.starts(4, 1)
    assert z.shape == (4, 12, 2)
    assert sorted(problem.x.unique().tolist()) == [0.0, 1.0]
    ours = problem.log_joint(z).numpy()
    h = z.numpy()
    for w, b in problem.weights[:-1]:
        h = np.tanh(h @ w.astype(float).T + b)
    logits = h @ problem.weights[-1][0].astype(float).T + problem.weights[-1][1]
    theirs = (problem.x.double().numpy() * logits - np.logaddexp(0, logits)).sum(-1)
    theirs = theirs - 0.5 * (z.numpy() ** 2).sum(-1) - np.log(2 * np.pi)
    problem.same("numpy", theirs, ours, 1e-12)
    with pytest.raises(RuntimeError, match=r"numpy: log p\(x, z\) differs from ours"):
        problem.same("numpy", theirs + 0.5, ours, 1e-5)
    assert not torch.equal(z, problem.starts(4, 2))
