"""Data of any scale: a fit and its audit give finite numbers, or stop with one line that names site and place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elbowroom.errors import NonFiniteLoss
from elbowroom.run import Run, fit
from elbowroom.spec.experiment import Experiment

_rng = np.random.default_rng(0)
BASE = _rng.normal(size=(60, 1)) @ np.array([[1.0, -1.0, 0.5, 0.2]]) + 0.3 * _rng.normal(size=(60, 4))
CASES = {
    "tiny": BASE * 1e-8,
    "huge": BASE * 1e8,
    "tiniest": BASE * 1e-30,
    "hugest": BASE * 1e30,
    "imbalanced": BASE * np.array([1e-6, 1e6, 1.0, 1.0]),
    "one constant": np.where(np.arange(4) == 1, 3.0, BASE),
    "all constant": np.full((60, 4), 2.5),
    "all zero": np.zeros((60, 4)),
}
HARD = ("tiniest", "hugest", "all zero")  # where float32 stops, or nothing varies
BERNOULLI = {"all 0": np.zeros((60, 6)), "all 1": np.ones((60, 6)), "half": np.tile([0.0, 1.0], (60, 3))}


def experiment(tmp_path, x: np.ndarray, dtype: str, likelihood: object, **fit_options: object) -> Experiment:
    np.save(tmp_path / "x.npy", x)
    mlp = {"name": "mlp", "hidden": [6]}
    tree = {
        "data": {"name": "file", "path": str(tmp_path / "x.npy")},
        "model": {"latent_dim": 1, "likelihood": likelihood, "decoder": mlp},
        "guide": {"encoder": mlp},
        "fit": {"epochs": 3, "batch_size": 16, "device": "cpu", "dtype": dtype, **fit_options},
        "audit": {"draws": 200, "keep": 100},
    }
    return Experiment.from_dict(tree)


def finite(run: Run) -> None:
    """Fit and audit are finite throughout; an uncertified reference says so and leaves the evidence open."""
    assert all(bool(value.isfinite().all()) for value in run.vae.state_dict().values())
    table = run.audit().table
    for name in ("elbo", "elbo_se", "pareto_k", "rate", "distortion", "log_evidence_lower"):
        assert np.isfinite(table[name]).all(), name
    exact = (table["status"] == "exact").any("reference").values
    for name in ("log_evidence", "gap_total"):
        assert np.isfinite(table[name].values[exact]).all(), name


@pytest.mark.parametrize(
    ("case", "dtype", "scale"),
    [
        *(
            pytest.param(case, *kind, marks=() if case in HARD else pytest.mark.slow)
            for case in CASES
            for kind in (("float32", "decoder"), ("float64", "shared"))
        ),
    ],
)
def test_every_scale_is_finite(case, dtype, scale, tmp_path):
    declared = experiment(tmp_path, CASES[case], dtype, {"name": "gaussian", "scale": scale})
    if dtype == "float32" and case in ("tiniest", "hugest"):  # a square beyond float32: the named stop, and its cure
        with pytest.raises(NonFiniteLoss, match=r"log_prob of site 'x' in the model is nan .* or use fit.dtype = float64"):
            fit(declared, tmp_path / "run")
        return
    run = fit(declared, tmp_path / "run")
    assert {value.dtype for value in run.vae.state_dict().values()} == {getattr(torch, dtype)}
    finite(run)


@pytest.mark.parametrize("case", BERNOULLI)
def test_saturated_decoders_are_finite(case, tmp_path):
    options = {"epochs": 40, "learning_rate": 0.3, "schedule": "constant"}
    run = fit(experiment(tmp_path, BERNOULLI[case], "float32", "bernoulli", **options), tmp_path / "run")
    logits = run.vae.decoder(torch.zeros(1, 1))
    assert float(logits.detach().abs().min()) > 5  # saturated indeed
    finite(run)


@pytest.mark.slow
def test_the_scale_of_the_data_does_not_change_the_fit(tmp_path):
    """In units of the data the ELBO differs by the Jacobian of the change of units alone."""
    elbos = []
    for factor in (1.0, 2.0**-26, 2.0**100):
        folder = tmp_path / str(factor)
        folder.mkdir()
        run = fit(experiment(folder, BASE * factor, "float64", "gaussian"), folder / "run")
        elbos.append(float(run.audit().table["elbo"].mean()) + 4 * np.log(factor))
    np.testing.assert_allclose(elbos, elbos[0], rtol=1e-6)
