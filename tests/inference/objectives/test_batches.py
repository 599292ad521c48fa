"""Objectives on part of the data: masks, scales and mini-batches, checkpoints, and the spec."""

from __future__ import annotations

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.objectives import ALL, DOUBLE, Line, X
from support.cases.vaes import linear_vae
from torch import Tensor

from elbowroom.components import registry
from elbowroom.components.slots import build
from elbowroom.errors import RunFolderError, SpecError
from elbowroom.inference.fit.plan import Session
from elbowroom.inference.fit.svi import Step, fit
from elbowroom.inference.objectives.bounds import IWAE, Renyi
from elbowroom.inference.objectives.elbo import ELBO, NonFiniteSite
from elbowroom.inference.objectives.enumerated import TraceEnum
from elbowroom.inference.objectives.wake_sleep import WakeSleep
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.discrete import CategoricalFamily
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import Linear
from elbowroom.models.priors.discrete import Categorical
from elbowroom.models.vae import VAE
from elbowroom.spec import spec

# batches


@pytest.mark.parametrize("size", [None, 4, 7, 40, 20])  # 20: as long as the batch repeated five times
@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_a_batch_stands_for_all_data(objective, size):
    line = Line()

    def estimate(**options):
        torch.manual_seed(11)
        return objective(line.model, line.guide, X, **options)

    one, whole = estimate(), estimate(size=size)
    ratio = 1 if size is None else size / len(X)
    assert whole.objective == pytest.approx(ratio * float(one.objective), rel=1e-10)
    assert whole.elbo == pytest.approx(ratio * float(one.elbo), rel=1e-10)
    assert torch.allclose(line.gradient(whole.loss), ratio * line.gradient(one.loss), rtol=1e-8)


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_a_vae_trains_on_mini_batches(objective):
    vae, x, oracle = linear_vae(2, 4, n=60)
    vae.adapt(x)
    with pyro.get_param_store().scope():
        step = Step(vae, size=len(x), learning_rate=0.02, objective=objective)
        start = [step(x)[1] for _ in range(3)]
        for _ in range(150):
            step(x[torch.randperm(60)[:20]])
        end = [step(x)[1] for _ in range(3)]
    assert min(end) > max(start)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in vae.parameters())
    assert oracle.W.shape == (4, 2)


def test_masks_and_foreign_scales_stay_inside_the_log_weights():
    mask = torch.tensor([True, False, True, True])

    def model(x: Tensor) -> None:
        with pyro.plate("data", 12, subsample=torch.arange(4)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            with pyro.poutine.mask(mask=mask), pyro.poutine.scale(scale=2.0):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 12, subsample=torch.arange(4)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    torch.manual_seed(2)
    noise = torch.randn(1, 4, **DOUBLE)
    z = X / 2 + 0.7 * noise
    terms = 2 * mask * dist.Normal(z, 1.0).log_prob(X) + dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(X / 2, 0.7).log_prob(z)
    torch.manual_seed(2)
    found = IWAE(particles=1)(model, guide, X)
    assert found.elbo == pytest.approx(3 * terms.sum().item(), rel=1e-6)


def test_a_program_that_draws_its_own_mini_batch_has_no_particles():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2, **DOUBLE), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Normal(torch.zeros(2, **DOUBLE), 0.7))

    assert math.isfinite(IWAE(particles=1)(model, guide, X).elbo)
    with pytest.raises(ValueError, match=r"^iwae: needs one plate .* \(4 data x 3 draws\), found 'data' of 2; use elbo"):
        IWAE(particles=3)(model, guide, X)


def test_latents_outside_the_plate_are_refused():
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("m", dist.Normal(0.0, 1.0))

    assert math.isfinite(ELBO()(model, guide, X).elbo)
    with pytest.raises(ValueError, match=r"^iwae: site 'm' is not in the plate of the data; use elbo"):
        IWAE()(model, guide, X)


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_a_site_that_is_not_finite_is_named_with_its_row(objective):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            scale = torch.where(x > 2, math.nan, torch.ones_like(x))
            pyro.sample("x", dist.Normal(z, scale, validate_args=False), obs=x)

    with pyro.validation_enabled(False), pytest.raises(NonFiniteSite) as caught:
        objective(model, Line().guide, X)
    error = caught.value
    assert (error.site, error.program, error.rows, error.count) == ("x", "model", [3], 4)


def test_the_scale_of_a_batch_stays_outside_the_log_sum_exp():
    """Pyro's RenyiELBO has it inside: far below -log p(x) for a batch that stands for more data."""
    line = Line(b=0.0, c=0.0, r=0.0)
    truth = -line.log_evidence(X).sum().item() * 10
    with torch.no_grad(), pyro.validation_enabled(False):
        ours = [Renyi(alpha=0.0, particles=30)(line.model, line.guide, X, size=40).objective for _ in range(200)]
        pyros = pyro.infer.RenyiELBO(alpha=0, num_particles=30, vectorize_particles=False)
        theirs = [pyros.loss(line.model, line.guide, X, size=40) for _ in range(20)]
    assert min(theirs) < truth - 5 or sum(theirs) / 20 < truth - 2
    assert truth - 1 < sum(ours) / 200 < truth + 5


# the fit


def test_the_objective_is_part_of_a_checkpoints_identity(tmp_path):
    vae, x, _ = linear_vae(2, 4, n=30)
    session = partial(Session, folder=tmp_path, seed=1)
    history = fit(vae, x, x[:9], session(), objective=IWAE(particles=3), epochs=2, dtype="float64")
    assert all(row.train_elbo < -row.train_loss for row in history.rows)
    with pytest.raises(RunFolderError) as caught:
        fit(vae, x, x[:9], session(resume=True), epochs=2, dtype="float64")
    assert "fit.objective was iwae(particles=3), now elbo" in str(caught.value)


def mixture_vae() -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        likelihood, family = Gaussian((4,), scale=0.5), CategoricalFamily(3)
        guide = AmortizedGuide(Linear((4,), family.param_dim), family)
        return VAE(Categorical(3), likelihood, Linear((3,), 4), guide)


@pytest.mark.parametrize("objective", [IWAE(particles=3), TraceEnum(), WakeSleep()], ids=repr)
def test_a_resumed_fit_is_the_same_bit_for_bit(tmp_path, objective):
    vae, x, _ = linear_vae(2, 4, n=30)
    start = mixture_vae() if isinstance(objective, TraceEnum) else vae
    whole, part, again = (copy.deepcopy(start) for _ in range(3))
    options = {"epochs": 4, "batch_size": 8}
    history = fit(whole, x, x[:0], Session(seed=1), objective=objective, **options)
    assert history.rows[-1].train_elbo > history.rows[0].train_elbo

    def stop(_, row):
        if row.epoch == 2:
            raise KeyboardInterrupt

    session = partial(Session, folder=tmp_path, seed=1, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        fit(part, x, x[:0], session(report=stop), objective=copy.deepcopy(objective), **options)
    fresh = type(objective)(**vars(objective)) if not isinstance(objective, TraceEnum) else TraceEnum()
    fit(again, x, x[:0], session(resume=True), objective=fresh, **options)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


BASE = {"data": "digits", "model": {"latent_dim": 2, "likelihood": "bernoulli"}}


def test_the_spec_names_an_objective():
    for given, text in (("elbo", "elbo"), ("iwae", "iwae(particles=10)"), ({"name": "renyi", "alpha": 0}, None)):
        loaded = spec.validate({**BASE, "fit": {"objective": given}}).spec
        built = build("objective", loaded.fit.objective, where="fit.objective")
        assert repr(built) == (text or "renyi(alpha=0.0, particles=10)")
    assert spec.validate(BASE).spec.tree()["fit"]["objective"] == {"name": "elbo"}
    assert set(registry.names("objective")) >= {type(o).name for o in [*ALL, TraceEnum()]}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("trace_enum", "fit.objective: trace_enum needs discrete latents that the guide draws; use elbo"),
        ({"name": "iwae", "particle": 3}, "fit.objective.particle: unknown option of iwae; did you mean 'particles'?"),
        ({"name": "iwae", "particles": 0}, "fit.objective.particles: must be at least 1, got 0"),
        ("iwaee", "fit.objective: unknown objective 'iwaee'; did you mean 'iwae'?"),
    ],
)
def test_the_spec_refuses(objective, message):
    with pytest.raises(SpecError) as caught:
        spec.validate({**BASE, "fit": {"objective": objective}})
    assert str(caught.value) == f"spec: {message}"
