"""A recurrent VAE of music, as experiments/jsb_chorales.yaml declares it, made small: its exact posterior by other means."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import elbowroom as er
from elbowroom.analysis.audit.auditor import Audit
from elbowroom.data import published
from elbowroom.models.vae import VAE

SPEC = Path(__file__).parents[2] / "experiments" / "jsb_chorales.yaml"
SMALL = ("model.decoder.hidden=8", "guide.encoder.hidden=8", "fit.epochs=12", "fit.batch_size=8", "audit.draws=1000")


def chorales(n: int, seed: int) -> list[list[list[int]]]:
    """Make chorales of 2 to 7 chords, in one of two keys, in which the voices move a little; a voice rests now and then."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        chord = np.array([48, 55, 64, 72]) + 5 * rng.integers(2)
        steps = []
        for _ in range(rng.integers(2, 8)):
            chord = chord + rng.integers(-1, 2, 4)
            steps.append([int(note) for note in chord[rng.random(4) < 0.9]])
        made.append(steps)
    return made


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[er.Run, Audit]:
    folder = tmp_path_factory.mktemp("music")
    raw = json.dumps({"train": chorales(24, 0), "valid": chorales(6, 1), "test": chorales(5, 2)}).encode()
    file = published.FILES["jsb.quarter"]
    known = replace(file, md5=hashlib.md5(raw).hexdigest(), sha256=hashlib.sha256(raw).hexdigest())
    (folder / file.name).write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(published.VARIABLE, str(folder))
        patch.setitem(published.FILES, "jsb.quarter", known)
        run = er.fit(er.Experiment.load(SPEC, set=list(SMALL)), out=folder / "run")
        return run, run.audit()


def log_likelihood(vae: VAE, x: Tensor, z: Tensor) -> Tensor:
    """Return log p(x|z) of one chorale x (T, 88) at z (G, 2): over the steps that it has, the sum over the keys."""
    logits = vae.decoder(z).unflatten(-1, x.shape)
    steps = [torch.where(x[t] == 1, logsigmoid(logits[:, t]), logsigmoid(-logits[:, t])).sum(-1) for t in range(length(x))]
    return torch.stack(steps).sum(0)


def length(x: Tensor) -> int:
    """Return how many steps there are; after the end all is NaN, and nothing is before it."""
    there = ~x.isnan().any(-1)
    steps = int(there.sum())
    assert bool(there[:steps].all())
    assert bool(x[steps:].isnan().all())
    return steps


def data(audit: Audit) -> Tensor:
    return torch.tensor(audit.posteriors["grid"].observed_data["x"].values, dtype=torch.float64)


def test_every_chorale_is_exact_whatever_its_length(small: tuple[er.Run, Audit]) -> None:
    _, audit = small
    table, lengths = audit.table, {length(x) for x in data(audit)}
    assert table.sizes["obs_id"] == 5
    assert len(lengths) > 2
    assert set(table["status"].values.flatten()) == {"exact"}
    assert set(table["evidence_method"].values) == {"grid"}
    assert table["refinement_error"].max() < 1e-4
    assert (table["gap_total"] > -3 * table["elbo_se"]).all()


def test_log_p_x_is_a_sum_over_a_fine_fixed_lattice(small: tuple[er.Run, Audit]) -> None:
    """A plain lattice over [-7, 7]^2: it knows nothing of the audit's boxes, nor of padding: steps after the end are cut."""
    run, audit = small
    vae, h = run.vae.double(), 0.1
    axis = (torch.arange(round(14 / h), dtype=torch.float64) + 0.29) * h - 7
    with torch.no_grad():
        z = torch.cartesian_prod(axis, axis)
        log_prior = -0.5 * z.square().sum(-1) - math.log(2 * math.pi)
        sums = []
        for x in data(audit):
            log_p = torch.cat([log_likelihood(vae, x, part) for part in z.split(8192)]) + log_prior
            sums.append(float(torch.logsumexp(log_p, 0) + 2 * math.log(h)))
    np.testing.assert_allclose(audit.table["log_evidence"], sums, atol=1e-4)


def test_log_p_x_agrees_with_importance_sampling_from_a_wide_normal(small: tuple[er.Run, Audit]) -> None:
    """The proposal is the exact posterior's mean and twice its covariance, so that the weights have a variance."""
    run, audit = small
    vae, n = run.vae.double(), 20_000
    posterior = audit.posteriors["grid"].posterior["z"].stack(draw_=("chain", "draw")).transpose("obs_id", "draw_", ...)
    with torch.no_grad():
        for i, x in enumerate(data(audit)):
            draws = torch.tensor(posterior.values[i], dtype=torch.float64)
            q = torch.distributions.MultivariateNormal(draws.mean(0), 2 * draws.T.cov())
            z = q.sample((n,))
            log_w = log_likelihood(vae, x, z) - 0.5 * z.square().sum(-1) - math.log(2 * math.pi) - q.log_prob(z)
            weight = (log_w - log_w.max()).exp()
            ess = float(weight.sum() ** 2 / weight.square().sum())
            assert ess > 2000, "the proposal does not fit: this test would show nothing"
            error = float(weight.std() / weight.mean()) / math.sqrt(n)
            estimate = float(log_w.logsumexp(0)) - math.log(n)
            assert abs(estimate - float(audit.table["log_evidence"][i])) < 4.5 * error, f"ESS {ess:.0f}, SE {error:.2g}"
