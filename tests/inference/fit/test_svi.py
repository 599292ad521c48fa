"""The fit: equal to pyro.infer.SVI, resumable bit for bit, loud where a loss is not finite, and tidy with globals."""

from __future__ import annotations

import copy
import csv
import io
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from rich.console import Console
from support.cases.fits import NOTHING, D, K, data, make, parameters, same
from torch import Tensor, nn

from elbowroom.cli.progress import progress_bar
from elbowroom.errors import DataError, SpecError
from elbowroom.inference.fit.loop import batches, evaluate_elbo, shuffler
from elbowroom.inference.fit.plan import Session, plan, resolve_device
from elbowroom.inference.fit.svi import Step, fit
from elbowroom.inference.objectives.elbo import ELBO, KLWeight
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import Linear
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

pytestmark = pytest.mark.usefixtures("tidy_store")


def svi_losses(vae: VAE, batches_of_x: list[Tensor], size: int, rate: float, seed: int) -> list[float]:
    """Take the steps of pyro.infer.SVI itself; return the losses in nats per datum."""
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(seed)
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": rate}), Trace_ELBO())
        return [svi.step(x, size=size) / size for x in batches_of_x]


# equal to Pyro's own SVI


@pytest.mark.parametrize("binary", [False, True])
def test_200_steps_are_200_steps_of_pyro_svi(binary):
    x, rate = data(binary=binary), 1e-2
    ours, theirs = make(binary=binary).double(), None
    ours.adapt(x)
    theirs, start = copy.deepcopy(ours), parameters(ours)
    shuffle = shuffler(3, x.device)
    parts = [x[index] for _ in range(40) for index in batches(len(x), 10, shuffle)]
    assert len(parts) == 200
    assert len(parts[4]) == 7  # the partial batch is among them
    expected = svi_losses(theirs, parts, len(x), rate, seed=3)
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(3)
        step = Step(ours, size=len(x), learning_rate=rate)
        results = [step(part) for part in parts]
    assert max(abs(loss - other) for (loss, _), other in zip(results, expected, strict=True)) < 1e-6
    assert all(elbo == -loss for loss, elbo in results)
    assert step.optimizer.defaults["fused"]
    assert same(parameters(ours), parameters(theirs), 1e-6)
    assert not same(parameters(ours), start, 0.05)  # the steps did something


def test_fit_is_pyro_svi_on_its_own_batches():
    x, seed, rate = data(), 11, 5e-3
    ours = make().double()
    ours.adapt(x)
    theirs = copy.deepcopy(ours)
    shuffle = shuffler(seed, x.device)
    epochs = [[x[index] for index in batches(len(x), 10, shuffle)] for _ in range(40)]
    expected = svi_losses(theirs, [part for parts in epochs for part in parts], len(x), rate, seed)
    history = fit(
        ours,
        x,
        NOTHING,
        Session(seed=seed),
        epochs=40,
        batch_size=10,
        learning_rate=rate,
        schedule="constant",
        dtype="float64",
    )
    assert history.rows[-1].step == 200
    assert same(parameters(ours), parameters(theirs), 1e-6)
    # an epoch's loss is the mean over its data, so a partial batch counts by its size
    last = sum(loss * len(part) for loss, part in zip(expected[-5:], epochs[-1], strict=True)) / len(x)
    assert history.rows[-1].train_loss == pytest.approx(last, abs=1e-6)
    assert history.rows[-1].train_elbo == -history.rows[-1].train_loss


@pytest.mark.slow
def test_mini_batches_estimate_the_whole_data_sets_elbo():
    x = data(200)
    vae = make().double()
    vae.adapt(x)
    with pyro.get_param_store().scope(), torch.no_grad():
        objective = partial(ELBO(), vae.model, vae.guide)
        whole = torch.tensor([objective(x).elbo for _ in range(200)])
        parts = torch.tensor([objective(x[torch.randperm(200)[:20]], size=200).elbo for _ in range(1000)])
    error = math.hypot(whole.std() / 200**0.5, parts.std() / 1000**0.5)
    assert abs(whole.mean() - parts.mean()) < 4.5 * error


# the objective


def test_kl_weight_scales_latent_sites_only():
    x = data(20)
    vae = make().double()
    vae.adapt(x)

    def estimate(weight: float):
        torch.manual_seed(5)
        return objective(x, size=60, kl_weight=weight)

    with pyro.get_param_store().scope(), torch.random.fork_rng():
        objective = partial(ELBO(), vae.model, vae.guide)
        torch.manual_seed(5)
        guide = pyro.poutine.trace(vae.guide).get_trace(x)
        model = pyro.poutine.trace(pyro.poutine.replay(vae.model, guide)).get_trace(x)
        guide.compute_log_prob()
        model.compute_log_prob()
        log_q, log_p = (trace.nodes["z"]["log_prob"].sum().item() for trace in (guide, model))
        log_lik = model.nodes["x"]["log_prob"].sum().item()
        for weight in (0.0, 0.3, 1.0):
            got = estimate(weight)
            assert got.objective == pytest.approx(-3 * (log_lik + weight * (log_p - log_q)), rel=1e-12)
            assert got.loss.item() == pytest.approx(float(got.objective), rel=1e-12)
            assert got.elbo == pytest.approx(3 * (log_lik + log_p - log_q), rel=1e-12)
        # the gradient is that of the weighted loss: (g(1) - g(0)) / 2 + g(0) = g(1/2)
        first = next(vae.posterior.parameters())
        g0, g_half, g1 = (torch.autograd.grad(estimate(weight).loss, first)[0] for weight in (0.0, 0.5, 1.0))
        assert torch.allclose(g_half, (g0 + g1) / 2)
        assert not torch.allclose(g0, g1)


def test_kl_weight_keeps_masks_and_foreign_scales():
    x, mask = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("rows", 3), pyro.poutine.scale(scale=2.0), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", 3), pyro.poutine.scale(scale=2.0), pyro.poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    got = ELBO()(model, guide, x, kl_weight=0.25)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x)  # the guide is the posterior: each draw gives log p(x)
    assert got.elbo == pytest.approx(2 * (evidence[0] + evidence[2]).item(), rel=1e-5)
    handler = KLWeight(0.5)
    trace = pyro.poutine.trace(handler(model)).get_trace(x)
    assert (trace.nodes["z"]["scale"], trace.nodes["x"]["scale"], handler.scales["z"]) == (1.0, 2.0, 2.0)


def test_with_the_posterior_as_guide_the_elbo_is_the_evidence():
    decoder = Linear((K,), D)
    likelihood, family = Gaussian((D,), scale=0.7), DiagonalNormal(K)
    encoder = Linear((D,), family.param_dim)
    vae = VAE(Normal(K), likelihood, decoder, AmortizedGuide(encoder, family)).double()
    with torch.no_grad():  # orthogonal loadings: the posterior is diagonal
        decoder.body.weight.copy_(torch.linalg.qr(torch.randn(D, K, dtype=torch.float64)).Q)
        exact = vae.linear_gaussian()
        mean_0, covariance = exact.posterior(torch.zeros(1, D, dtype=torch.float64))
        slope = exact.posterior(torch.eye(D, dtype=torch.float64))[0] - mean_0
        encoder.body.weight.zero_()
        encoder.body.weight[:K] = slope.T
        encoder.body.bias[:K] = mean_0[0]
        sd = covariance.diagonal().sqrt() - 1e-5
        encoder.body.bias[K:] = torch.log(torch.expm1(sd)) - math.log(math.expm1(1.0))
    x = data(30)
    assert evaluate_elbo(vae, x, draws=3) == pytest.approx(exact.log_evidence(x).mean().item(), abs=1e-10)


# the plan


def test_the_plan_speaks():
    assert str(plan(1152, kl_warmup=10, epochs=100, batch_size=128, device="auto")) == (
        "900 steps (100 epochs x 9 batches of 128); learning rate 0.001, cosine to 0; KL weight 0 -> 1 over 90 steps"
    )
    assert str(plan(130, epochs=1, schedule="constant", patience=3)) == (
        "2 steps (1 epoch x 2 batches of 128, the last of 2); learning rate 0.001, constant; KL weight 1; "
        "stops after 3 epochs without a better validation ELBO"
    )
    assert plan(5, batch_size=128).batch_size == 5


@pytest.mark.parametrize("epochs", [1, 2, 10])
def test_a_warmup_longer_than_the_run_is_clipped_and_says_so(epochs):
    p = plan(90, epochs=epochs, batch_size=10, kl_warmup=500)
    assert "the 4500 steps asked for are clipped" in str(p)
    assert p.kl_weight_at(0) == 0.0
    assert p.kl_weight_at(p.steps - 1) == 1.0
    assert p.counts(epochs)
    assert not p.counts(epochs - 1)
    assert p.learning_rate_at(0) == 1e-3
    assert 0 < p.learning_rate_at(p.steps - 1) < 1e-3 * (0.5 if p.steps < 20 else 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "fit.epochs: must be at least 1, got 0"),
        ({"batch_size": 0}, "fit.batch_size: must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "fit.learning_rate: must be greater than 0, got nan"),
        ({"patience": 0}, "fit.patience: must be at least 1 epoch, or null, got 0"),
        ({"schedule": "linear"}, "fit.schedule: must be constant or cosine, got 'linear'"),
        ({"device": "gpu"}, "fit.device: must be auto, cpu, cuda or cuda:NUMBER, got 'gpu'"),
        ({"device": "cuda:99"}, "fit.device: 'cuda:99' was asked for, but torch sees"),
        ({"patience": 5}, "fit.patience: needs validation data"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(SpecError) as caught:
        fit(make(), data(10), NOTHING, **options)
    assert str(caught.value).startswith(message)


def test_no_data_is_refused():
    with pytest.raises(DataError, match="the training split is empty"):
        fit(make(), NOTHING, NOTHING)


# what a fit leaves


def test_fit_learns_and_leaves_the_best_weights(tmp_path):
    x, v = data(200, dtype=torch.float32), data(60, seed=2, dtype=torch.float32)
    vae = make()
    before = evaluate_elbo(copy.deepcopy(vae), v)
    history = fit(vae, x, v, Session(folder=tmp_path, seed=4), epochs=30, batch_size=50, learning_rate=3e-2, kl_warmup=3)
    values = [row.validation_elbo for row in history.rows]
    assert max(values) > before + 1
    assert history.best_epoch == 4 + max(range(len(values) - 3), key=lambda i: values[3 + i])
    assert history.stopped_because == (
        f"all 30 epochs done; kept the weights of epoch {history.best_epoch}, "
        f"validation ELBO {max(values[3:]):.3f} nats per datum"
    )
    assert [row.kl_weight for row in history.rows[:5]] == [3 / 12, 7 / 12, 11 / 12, 1.0, 1.0]
    assert history.rows[0].train_elbo < -history.rows[0].train_loss  # the weighted objective flatters
    assert history.rows[-1].train_elbo == -history.rows[-1].train_loss
    assert history.rows[-1].step == 120
    # the weights kept give the validation ELBO that was recorded, here and from the file
    again = make(seed=9)
    again.adapt(x)
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for each in (vae, again):
        assert evaluate_elbo(each, v, seed=4 + 0x2545F491) == history.best.validation_elbo
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == ("epoch,step,learning_rate,kl_weight,train_loss,train_elbo,validation_elbo,seconds")
    assert [float(row["validation_elbo"]) for row in rows] == values
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "history.csv", "weights.pt"]


def test_patience_stops_early_and_keeps_the_best():
    x, v = data(40), data(40, seed=2)
    vae = make()
    history = fit(vae, x, v, epochs=500, batch_size=10, learning_rate=0.1, schedule="constant", patience=4)
    assert len(history.rows) == history.best_epoch + 4 < 500
    assert history.stopped_because.startswith(
        f"stopped after epoch {len(history.rows)}: no better validation ELBO in 4 epochs; kept the weights of epoch "
    )
    assert evaluate_elbo(vae, v.float(), seed=0x2545F491) == history.best.validation_elbo


def test_an_epoch_within_the_warmup_is_never_the_best(monkeypatch):
    elbos = iter([9.0, 8.0, 7.0, 1.0, 2.0, 0.0, 0.0, 3.0])  # the first three epochs have a KL weight below 1
    monkeypatch.setattr("elbowroom.inference.fit.loop.evaluate_elbo", lambda *_, **__: next(elbos))
    history = fit(make(), data(20), data(5), epochs=8, batch_size=10, kl_warmup=3, patience=2)
    assert [row.kl_weight for row in history.rows[2:4]] == [5 / 6, 1.0]
    assert history.best_epoch == 5
    assert history.stopped_because == (
        "stopped after epoch 7: no better validation ELBO in 2 epochs; kept the weights of epoch 5, "
        "validation ELBO 2.000 nats per datum"
    )


def test_without_validation_the_last_weights_are_kept():
    history = fit(make(), data(20), NOTHING, epochs=3, batch_size=8)
    assert history.best_epoch == 3
    assert all(math.isnan(row.validation_elbo) for row in history.rows)
    assert history.stopped_because == "all 3 epochs done; kept the last weights, for there are no validation data"


def test_same_seed_same_weights_whatever_the_callers_generators_did():
    x, results = data(30), []
    for seed, noise in ((1, 0), (1, 123), (2, 0)):
        vae = make()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        modes = [part.training for part in vae.eval().modules()]
        fit(vae, x, x[:5], Session(seed=seed), epochs=2, batch_size=8)
        assert torch.equal(torch.get_rng_state(), before)
        assert [part.training for part in vae.modules()] == modes
        results.append(parameters(vae))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_dtype_and_precision_of_the_vae():
    vae = make()
    fit(vae, data(20, dtype=torch.float32), NOTHING, epochs=1, dtype="float64", device="cpu")
    assert {value.dtype for value in vae.state_dict().values()} == {torch.float64}
    assert resolve_device("cpu") == torch.device("cpu")


def test_gradient_clip_bounds_the_gradient_per_datum():
    x = data(30)
    vae = make().double()
    vae.adapt(x)
    with pyro.get_param_store().scope():
        Step(vae, size=300, learning_rate=0.0, gradient_clip=0.01)(x)
    norm = torch.stack([value.grad.norm() for value in vae.parameters()]).norm().item()
    assert norm == pytest.approx(0.01 * 300, rel=1e-4)


def test_validation_uses_common_random_numbers_in_eval_mode():
    vae = make()
    vae.decoder = nn.Sequential(nn.Dropout(0.5), vae.decoder)
    v = data(20, dtype=torch.float32)
    vae.train()
    first, second, other = (evaluate_elbo(vae, v, seed=seed) for seed in (1, 1, 2))
    assert first == second != other
    assert vae.decoder[0].training
    assert evaluate_elbo(vae.eval(), v, seed=1) == first
    chunks = evaluate_elbo(vae, v, draws=4000, rows=8000)
    assert chunks == pytest.approx(evaluate_elbo(vae, v, draws=4000, seed=3), abs=0.1)


# the bar


def test_the_progress_bar_shows_both_elbos():
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with progress_bar(console) as report:
        history = fit(make(), data(20), data(10, seed=2), Session(report=report), epochs=2)
    text = console.file.getvalue()
    assert "2/2" in text
    assert f"ELBO {history.rows[-1].train_elbo:.2f}" in text
    assert f"validation {history.rows[-1].validation_elbo:.2f}" in text


def test_without_a_report_nothing_is_printed(capfd):
    fit(make(), data(20), data(10), epochs=1)
    assert capfd.readouterr() == ("", "")
