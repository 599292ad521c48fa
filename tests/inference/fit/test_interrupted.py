"""A fit that ends early: resumed bit for bit, and loud where a loss is not finite."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.fits import NOTHING, D, K, data, make, parameters, same
from torch import Tensor, nn

from elbowroom.errors import NonFiniteLoss, RunFolderError
from elbowroom.inference.fit.loop import batches, shuffler
from elbowroom.inference.fit.plan import Session
from elbowroom.inference.fit.svi import fit
from elbowroom.inference.objectives.elbo import ELBO, NonFiniteSite
from elbowroom.models.networks.mlp import MLP

pytestmark = pytest.mark.usefixtures("tidy_store")


# checkpoints


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [2, 5])
def test_resume_is_bitwise(tmp_path, stop):
    x, v = data(50), data(20, seed=2)
    options = {"epochs": 8, "batch_size": 16, "kl_warmup": 3, "gradient_clip": 5.0, "learning_rate": 2e-2}

    def interrupt(_, row):
        if row.epoch == stop:
            raise Interrupted

    whole = make()
    expected = fit(whole, x, v, Session(seed=6), **options)
    session = Session(folder=tmp_path, seed=6, fingerprint="f", checkpoint_seconds=0, report=interrupt)
    with pytest.raises(Interrupted):
        fit(make(), x, v, session, **options)
    assert not (tmp_path / "weights.pt").exists()
    torch.rand(17)  # the world moves on
    resumed = make(seed=99)  # every weight must come from the checkpoint
    seen = []
    session = replace(session, resume=True, report=lambda _, row: seen.append(row.epoch))
    history = fit(resumed, x, v, session, **options)
    assert seen == list(range(stop + 1, 9))
    assert same(parameters(resumed), parameters(whole))
    assert [{**asdict(row), "seconds": 0} for row in history.rows] == [{**asdict(row), "seconds": 0} for row in expected.rows]
    seconds = [row.seconds for row in history.rows]
    assert seconds == sorted(seconds)
    assert (history.best_epoch, history.stopped_because) == (expected.best_epoch, expected.stopped_because)
    # a finished fit resumes to itself without a step
    seen.clear()
    finished = make(seed=98)
    assert fit(finished, x, v, session, **options).rows == history.rows
    assert not seen
    assert same(parameters(finished), parameters(whole))


def test_a_foreign_checkpoint_is_refused(tmp_path):
    x, v = data(30), data(10, seed=2)
    session = Session(folder=tmp_path, seed=6, fingerprint="f")
    fit(make(), x, v, session, epochs=1)
    resume = replace(session, resume=True)
    cases = [
        (
            {"epochs": 3, "patience": 2},
            x,
            resume,
            "with other options (fit.epochs was 1, now 3, fit.patience was None, now 2)",
        ),
        ({"epochs": 1}, x + 1e-3, resume, "with another data"),
        ({"epochs": 1}, x, replace(resume, seed=7), "with another seed"),
        ({"epochs": 1}, x, replace(resume, fingerprint="g"), "with another spec"),
    ]
    for options, xs, other, message in cases:
        with pytest.raises(RunFolderError) as caught:
            fit(make(), xs, v, other, **options)
        assert str(caught.value).startswith(f"{tmp_path / 'checkpoint.pt'}: belongs to a fit {message}")
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(RunFolderError, match="is not a readable checkpoint"):
        fit(make(), x, v, resume, epochs=1)


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path):
    history = fit(make(), data(20), NOTHING, Session(folder=tmp_path / "new", resume=True), epochs=2)
    assert [row.epoch for row in history.rows] == [1, 2]


# a loss that is not finite


def test_nan_weights_in_the_encoder_name_the_guides_site():
    vae = make()
    with torch.no_grad():
        vae.posterior.encoder.body[0].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteLoss) as caught:
        fit(vae, data(20), NOTHING, epochs=2, batch_size=8)
    assert str(caught.value).startswith(
        "fit: the loss is not finite in epoch 1, batch 1 of 3: "
        "log_prob of site 'z' in the guide is nan for 8 of 8 data (training row "
    )
    assert "not finite: parameter posterior.encoder.body.0.weight; no checkpoint was written yet" in str(caught.value)


class Cliff(nn.Module):
    """A decoder that breaks for one datum only after a while, without harming the weights."""

    def __init__(self, healthy_calls: int) -> None:
        super().__init__()
        self.body, self.left = MLP((K,), D, hidden=(4,)), healthy_calls

    def forward(self, z: Tensor) -> Tensor:
        out = self.body(z)
        if torch.is_grad_enabled():
            self.left -= 1
            if self.left < 0:
                out = torch.cat([out[:2], out[2:3] * math.inf, out[3:]])
        return out


def test_an_infinite_likelihood_names_site_batch_row_and_checkpoint(tmp_path):
    x, seed = data(20), 5
    vae = make(decoder=Cliff(healthy_calls=3 + 1))
    with pytest.raises(NonFiniteLoss) as caught:
        fit(vae, x, NOTHING, Session(folder=tmp_path, seed=seed, checkpoint_seconds=0), epochs=5, batch_size=8)
    shuffle = shuffler(seed, x.device)
    row = [index for _ in range(2) for index in batches(20, 8, shuffle)][4][2]
    assert str(caught.value) == (
        "fit: the loss is not finite in epoch 2, batch 2 of 3: "
        "log_prob of site 'x' in the model is -inf for 1 of 8 data "
        f"(training row {row}, counted from 0); last good checkpoint: {tmp_path / 'checkpoint.pt'} (epoch 1); "
        "lower fit.learning_rate, set fit.gradient_clip, or use fit.dtype = float64"
    )
    # what is on disk is whole, and from epoch 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "history.csv"]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(state["rows"]) == 1
    assert all(value.isfinite().all() for value in state["model"].values())
    assert all(value.isfinite().all() for value in vae.parameters())  # the step was not taken


def test_a_runaway_learning_rate_is_caught_before_it_is_kept():
    vae = make()
    with pytest.raises(NonFiniteLoss, match="not finite"):
        fit(vae, data(64), data(16, seed=2), epochs=50, batch_size=16, learning_rate=1e30, schedule="constant")


def test_a_gradient_that_breaks_the_weights_in_the_last_step_is_caught():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.extra = MLP((K,), D, hidden=(4,)), nn.Parameter(torch.zeros(()))

        def forward(self, z: Tensor) -> Tensor:
            return self.body(z) + self.extra.square().sqrt()  # value 0, gradient NaN

    with pytest.raises(NonFiniteLoss) as caught:
        fit(make(decoder=Root()), data(8), NOTHING, epochs=1, batch_size=8)
    assert str(caught.value).startswith("fit: the weights are not finite after epoch 1, batch 1 of 1; ")
    assert "not finite: parameter decoder.extra" in str(caught.value)


def test_objective_locates_the_first_bad_site():
    def model(x):
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, torch.tensor([1.0, math.nan, 1.0]), validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    with pyro.validation_enabled(False), pytest.raises(NonFiniteSite) as caught:
        ELBO()(model, guide, torch.zeros(3))
    error = caught.value
    assert (error.site, error.program, error.rows, error.count) == ("x", "model", [1], 3)


def test_a_decoder_of_the_wrong_shape_is_found_before_the_first_step():
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = MLP((K,), D, hidden=(4,))

        def forward(self, z: Tensor) -> Tensor:
            return self.body(z)[..., None, :].expand(*z.shape[:-1], z.shape[-2], D)  # a batch dimension too many

    with pytest.raises(ValueError, match='at site "x"'):
        fit(make(decoder=Wide()), data(20), NOTHING, epochs=1)
