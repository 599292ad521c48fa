"""A step as a graph: the eager step bit for bit where it is replayed, to rounding where compiled; and what stays eager."""

from __future__ import annotations

import copy
import math
import random
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn

from elbowroom.components import registry
from elbowroom.conformance import properties
from elbowroom.errors import NonFiniteLoss
from elbowroom.inference.fit import step as training_step
from elbowroom.inference.fit.plan import Session
from elbowroom.inference.fit.step import Step
from elbowroom.inference.fit.svi import fit
from elbowroom.inference.objectives.bounds import IWAE, Beta, DReG, Renyi, StickingTheLanding
from elbowroom.inference.objectives.elbo import ELBO, MeanFieldELBO, NonFiniteSite
from elbowroom.inference.objectives.enumerated import TraceEnum
from elbowroom.inference.objectives.wake_sleep import WakeSleep
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.binary import Bernoulli
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.likelihoods.counts import Poisson
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

D, K, B, N = 6, 2, 8, 20
OBJECTIVES = [MeanFieldELBO(), DReG(), Beta(free_bits=0.05), WakeSleep(particles=3)]
MORE = [pytest.param(objective, marks=pytest.mark.slow) for objective in (IWAE(), Renyi(), StickingTheLanding())]
PARTS = [(kind, name) for kind in ("likelihood", "guide", "prior") for name in registry.names(kind)]
QUICK = [("likelihood", "mixed"), ("guide", "low_rank_normal"), ("guide", "categorical"), ("prior", "vamp")]


@pytest.fixture(autouse=True)
def _scope():
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        yield


@pytest.fixture
def said(monkeypatch):
    """The lines that were logged, while they come."""
    lines: list[str] = []
    monkeypatch.setattr(training_step.log, "info", lines.append)
    return lines


@pytest.fixture
def replayed(monkeypatch):
    """Let `auto` replay whatever it is."""
    monkeypatch.setattr(training_step, "TRACE_AFTER", 0.0)
    monkeypatch.setattr(training_step, "COMPILE_AFTER", math.inf)


def make(likelihood: str = "gaussian", seed: int = 0, **network) -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        p = Bernoulli((D,)) if likelihood == "bernoulli" else Gaussian((D,))
        family = DiagonalNormal(K)
        network = {"hidden": (7,), **network}
        guide = AmortizedGuide(MLP((D,), family.param_dim, **network), family)
        return VAE(Normal(K), p, MLP((K,), p.param_dim, **network), guide)


def rows(n: int = B, *, binary: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return (x > 0).to(dtype) if binary else x


def new(vae: VAE, compile: str, **options) -> Step:
    return Step(copy.deepcopy(vae).train(), size=N, learning_rate=0.01, compile=compile, steps=1000, **options)


def walk(step: Step, batches: list[dict[str, Tensor]], weights: tuple[float, ...] = (0.3, 1.0, 1.0)) -> Tensor:
    """Take a step on each batch, at one KL weight after the other; return losses and ELBOs."""
    torch.manual_seed(4)
    return torch.tensor([step(**batch, kl_weight=w) for w in weights for batch in batches], dtype=torch.float64)


def weights(step: Step) -> list[Tensor]:
    return [value.detach().clone() for value in step.vae.state_dict().values()]


def equal(one: Step, other: Step) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


# equality


def replays(kind: str, name: str, objective=None, *, graph: bool = True) -> None:
    vae = properties.vae_with(kind, name, {}, latent_dim=3)
    batch = properties.simulated(vae)
    vae.adapt(**batch)
    eager, ours = new(vae, "never", objective=objective), new(vae, "auto", objective=copy.deepcopy(objective))
    assert torch.equal(walk(eager, [batch]), walk(ours, [batch]))
    assert equal(eager, ours)
    assert (ours.graph is not None) == graph
    assert eager.graph is None


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_a_replayed_step_is_the_eager_step_bit_for_bit(kind, name, replayed):
    replays(kind, name)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [part for part in PARTS if part not in QUICK])
def test_so_it_is_with_every_component(kind, name, replayed):
    replays(kind, name, graph=(kind, name) != ("guide", "flow"))  # 4,105 operations


@pytest.mark.parametrize("objective", [*OBJECTIVES, *MORE], ids=repr)
def test_so_it_is_with_every_objective(objective, replayed):
    replays("prior", "normal", objective)


def test_what_cannot_be_traced_stays_eager_with_one_reason(replayed, said):
    replays("prior", "categorical", TraceEnum(), graph=False)
    assert len(said) == 1
    assert said[0].startswith("fit: step eager: tracing failed (")


COMPILED = [
    ("likelihood", "bernoulli"),
    ("likelihood", "student_t"),
    ("guide", "full_rank_normal"),
    ("prior", "gaussian_mixture"),
]


@pytest.mark.parametrize(
    ("kind", "name"), [COMPILED[0], *(pytest.param(*part, marks=pytest.mark.slow) for part in (*COMPILED[1:], *QUICK))]
)
def test_a_compiled_step_has_the_same_draws_and_agrees_to_rounding(kind, name, said):
    vae = properties.vae_with(kind, name, {}, latent_dim=3)
    batch = properties.simulated(vae)
    vae.adapt(**batch)
    eager, ours = new(vae, "never", gradient_clip=0.5), new(vae, "always", gradient_clip=0.5)
    assert torch.allclose(walk(eager, [batch]), walk(ours, [batch]), rtol=1e-9)
    assert ours.graph.graph.compiled
    for a, b in zip(weights(eager), weights(ours), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-9)
    assert said[-1].startswith("fit: step compiled in ")
    # fresh noise at every call
    step = new(vae, "always")
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    assert len(set(walk(step, [batch] * 3, (1.0,))[:, 0].tolist())) == 3


# what changes from call to call


def test_the_kl_weight_the_rate_and_the_batch_are_not_baked_in(replayed):
    x = rows(60)
    batches = [{"x": part} for part in x.split(B)]  # 7 of 8, and one of 4, which is eager
    eager, ours = new(make(), "never"), new(make(), "auto")
    for rate in (0.01, 0.003):
        for step in (eager, ours):
            step.optimizer.param_groups[0]["lr"] = rate
        assert torch.equal(walk(eager, batches), walk(ours, batches))
    assert equal(eager, ours)
    assert ours.graph is not None


def test_holes_and_covariates_and_exposure(replayed):
    family = DiagonalNormal(K)
    guide = AmortizedGuide(MLP((D + 3,), family.param_dim, hidden=(7,)), family)  # x, two covariates, log exposure
    vae = VAE(Normal(K), Poisson((D,)), MLP((K + 2,), D, hidden=(7,)), guide, covariate_dim=2)
    batch = {"x": rows().exp().round(), "covariates": rows()[:, :2], "exposure": rows()[:, 2].exp()}
    holed = {**batch, "x": batch["x"].masked_fill(torch.eye(B, D, dtype=torch.bool), torch.nan)}
    vae.adapt(**holed)
    for first, second in ((batch, holed), (holed, batch)):  # the graph knows one outcome of the branch on holes
        eager, ours = new(vae, "never"), new(vae, "auto")
        assert torch.equal(walk(eager, [first, second]), walk(ours, [first, second]))
        assert equal(eager, ours)
        assert ours.graph(first, 1.0) is not None
        assert ours.graph(second, 1.0) is None


def test_parameters_that_are_replaced_are_followed(replayed):
    eager, ours = new(make(), "never"), new(make(), "auto")
    others = make(seed=1).state_dict()
    batch = {"x": rows()}
    for step in (eager, ours):
        walk(step, [batch])
        step.vae.load_state_dict({name: value.clone() for name, value in others.items()}, assign=True)
        before = weights(step)
        walk(step, [batch])
        assert not any(torch.equal(a, b) for a, b in zip(before, weights(step), strict=True) if a.dim() > 1)
    assert equal(eager, ours)


def test_dropout_draws_a_new_mask_at_every_call(replayed):
    vae = make(dropout=0.5, hidden=(400,))
    step = new(vae, "auto")
    step.optimizer.param_groups[0]["lr"] = 0.0
    x = {"x": rows()}
    gone = []
    for _ in range(30):
        step(**x)
        gone.append(step.vae.decoder.body[0].bias.grad == 0)  # a unit that is dropped for all of 8 data: 2^-8
    assert step.graph is not None
    share = torch.stack(gone).float()
    assert share.mean() == pytest.approx(2**-8, abs=4.5 * math.sqrt(2**-8 / share.numel()))
    assert share.sum(0).max() < 5


def test_another_mode_of_the_networks_is_another_function(replayed):
    eager, ours = new(make(dropout=0.3), "never"), new(make(dropout=0.3), "auto")
    for step in (eager, ours):
        walk(step, [{"x": rows()}])
        step.vae.eval()
    assert torch.equal(walk(eager, [{"x": rows()}]), walk(ours, [{"x": rows()}]))
    assert equal(eager, ours)


def test_frozen_parameters_stay_and_take_no_gradient(replayed):
    vae = make()
    vae.decoder.requires_grad_(False)
    eager, ours = new(vae, "never"), new(vae, "auto")
    for step in (eager, ours):
        step.vae.decoder.eval()
    assert torch.equal(walk(eager, [{"x": rows()}]), walk(ours, [{"x": rows()}]))
    assert ours.graph is not None
    assert equal(eager, ours)
    assert all(torch.equal(a, b) for a, b in zip(vae.decoder.parameters(), ours.vae.decoder.parameters(), strict=True))
    assert all(p.grad is None for p in ours.vae.decoder.parameters())


# what stays eager


class Floats(ELBO):
    """An objective of a user's, with numbers in place of tensors."""

    name = "floats"

    def __call__(self, *args, **kwargs):
        found = super().__call__(*args, **kwargs)
        return found._replace(objective=float(found.objective), elbo=float(found.elbo))


def test_an_objective_that_takes_numbers_out_stays_eager(replayed, said):
    eager, ours = new(make(), "never", objective=Floats()), new(make(), "auto", objective=Floats())
    assert torch.equal(walk(eager, [{"x": rows()}]), walk(ours, [{"x": rows()}]))
    assert len(said) == 1
    assert said[0].startswith("fit: step eager: ")


def test_batch_statistics_stay_eager_and_are_left_alone_by_the_attempt(replayed, said):
    eager, ours = new(make(norm="batch"), "never"), new(make(norm="batch"), "auto")
    assert torch.equal(walk(eager, [{"x": rows()}]), walk(ours, [{"x": rows()}]))
    assert equal(eager, ours)
    assert ours.graph is None
    assert len(said) == 1
    assert said[0].startswith("fit: step eager: it changes decoder.body.1.")


class Changing(nn.Module):
    """A decoder that changes something beside its parameters: what, is told by a word."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.body, self.what = MLP((K,), D, hidden=(4,)), what
        self.calls, self.seen, self.mean = 0, [], torch.zeros(())
        self.noise, self.own = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def forward(self, z: Tensor) -> Tensor:
        out = self.body(z)
        if self.what == "calls":
            self.calls += 1
            return out / (1 + 1e-5 * self.calls)
        if self.what == "seen":
            self.seen.append(z.detach())
        if self.what == "mean":
            self.mean = 0.9 * self.mean + 0.1 * z.detach().mean()
            return out + 1e-4 * self.mean
        if self.what == "own":
            return out * torch.rand(1, generator=self.own)
        drawn = {"python": random.random, "numpy": np.random.random_sample, "noise": self.noise.random}
        return -out if self.what in drawn and drawn[self.what]() < 0.3 else out


CHANGES = [
    ("calls", "decoder.calls"),
    ("seen", "decoder.seen"),
    ("mean", "decoder.mean"),
    ("own", "decoder.own"),
    ("noise", "decoder.noise.state"),
    ("python", "Python's random numbers"),
    ("numpy", "NumPy's random numbers"),
]


@pytest.mark.parametrize(("what", "named"), CHANGES)
def test_what_changes_beside_the_parameters_stays_eager_and_is_left_alone_by_the_attempt(what, named, replayed, said):
    """A graph would go on with the count, the layer that was skipped or the noise of the moment it was traced."""
    found = []
    for compile in ("never", "auto"):
        vae = make("bernoulli")
        with torch.random.fork_rng():
            torch.manual_seed(5)
            vae.decoder = Changing(what)
        vae.decoder.noise, vae.decoder.own = np.random.default_rng(0), torch.Generator().manual_seed(0)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002, what the programs draw from
        step = Step(vae.train(), size=N, learning_rate=0.01, compile=compile, steps=1000)
        found.append(walk(step, [{"x": rows(binary=True)}] * 4))
        assert type(vae.decoder.mean) is Tensor
        assert len(vae.decoder.seen) == (12 if what == "seen" else 0)
    assert torch.equal(*found)
    assert said == [f"fit: step eager: it changes {named} as it goes, which a graph would not"]


def test_what_is_set_to_the_same_value_at_each_call_is_left_alone_by_the_trace(replayed):
    """It changes nothing, so there is a graph; the tensor of the trace, which has no values, does not stay behind."""
    vae = make()
    vae.decoder.mask = torch.ones(D)

    def masked(module: nn.Module, given: tuple[Tensor], out: Tensor) -> Tensor:
        module.mask = torch.ones(D)
        return out * module.mask

    vae.decoder.register_forward_hook(masked)
    step = new(vae, "auto")
    step.prepare({"x": rows()})
    assert step.graph is not None
    assert type(step.vae.decoder.mask) is Tensor


def test_a_layer_without_inputs_has_an_empty_gradient(replayed):
    vae = make()
    vae.decoder.none = nn.Parameter(torch.zeros(0, 1))
    vae.decoder.register_forward_hook(lambda module, given, out: out + given[0][:, :0] @ module.none)
    eager, ours = new(vae, "never"), new(vae, "auto")
    assert torch.equal(walk(eager, [{"x": rows()}]), walk(ours, [{"x": rows()}]))
    assert ours.graph is not None


class Moody(nn.Module):
    """A decoder with a branch on z, which is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP((K,), D, hidden=(4,))

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z) if bool(z.sum() > 0) else -self.body(z)


def test_a_branch_on_what_is_drawn_stays_eager(replayed, said):
    vae = make("bernoulli")
    vae.decoder = Moody()
    batch = {"x": rows(binary=True)}
    eager, ours = new(vae, "never"), new(vae, "auto")
    assert torch.equal(walk(eager, [batch] * 5), walk(ours, [batch] * 5))
    assert said == ["fit: step eager: it branches on a value that is drawn or learned"]


def test_never_traces_nothing(monkeypatch, said):
    monkeypatch.setattr(training_step, "GradientGraph", None)
    step = new(make(), "never")
    walk(step, [{"x": rows()}])
    assert step.graph is None
    assert not said


def test_a_loss_that_is_not_finite_names_the_site_and_leaves_the_weights(replayed):
    step = new(make(), "auto")
    walk(step, [{"x": rows()}])
    before, x = weights(step), rows()
    x[2, 1] = math.inf
    state = torch.get_rng_state()
    with pytest.raises(NonFiniteSite) as caught:
        step(x)
    assert (caught.value.program, caught.value.rows, caught.value.count) == ("guide", [2], B)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(step), strict=True))
    torch.set_rng_state(state)
    again = new(make(), "never")
    with pytest.raises(NonFiniteSite):
        again(x)


# the plan decides


def test_auto_decides_by_the_plan(said, monkeypatch):
    monkeypatch.setattr(training_step.GradientGraph, "compile", lambda *_: 1.5)
    for steps, sentence in (
        (10, None),
        (100, None),
        (900, None),  # the demo
        (3000, "fit: step traced, not compiled: about 12 s of work planned, which would not repay it"),
        (90_000, "fit: step compiled in 1.5 s; 90,000 steps planned"),
    ):
        said.clear()
        step = Step(make().train(), size=N, learning_rate=0.01, steps=steps)
        step.prepare({"x": rows()})
        assert said == ([] if sentence is None else [sentence])
        assert (step.graph is None) == (sentence is None)


class Interrupted(Exception):
    pass


@pytest.mark.slow  # compiles twice or three times
def test_a_resumed_compiled_fit_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    x, v = rows(21), rows(5)
    x[4, 2] = math.nan
    options = {"epochs": 4, "batch_size": B, "kl_warmup": 2, "gradient_clip": 5.0, "learning_rate": 0.02, "compile": "always"}

    def interrupt(_, row):
        if row.epoch == 2:
            raise Interrupted

    whole, part, again = make(), make(), make(seed=1)
    expected = fit(whole, x, v, Session(seed=6), **options)
    session = partial(Session, folder=tmp_path, seed=6, checkpoint_seconds=0)
    with pytest.raises(Interrupted):
        fit(part, x, v, session(report=interrupt), **options)
    history = fit(again, x, v, session(resume=True), **options)
    assert [row.train_loss for row in history.rows] == [row.train_loss for row in expected.rows]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    eager = make()
    plain = fit(eager, x, v, Session(seed=6), **{**options, "compile": "never"})
    losses = [[row.train_loss for row in h.rows] for h in (expected, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_fit_names_row_and_site_from_a_graph_too(replayed):
    x = rows(21)
    x[13, 0] = 1e38  # its square is no float32
    vae, found = make(), r"epoch 1, batch \d of 3: log_prob of site .* \(training row 13, counted from 0\)"
    vae.adapt = lambda **_: None
    with pytest.raises(NonFiniteLoss, match=found):
        fit(vae, x, x[:0], epochs=50, batch_size=7)


@pytest.mark.gpu
def test_captured_steps_are_eager_steps_to_rounding():
    """By torch.compile's CUDA graphs: the same draws, the same losses, and weights that agree."""
    x, found = rows(64).cuda(), []
    for compile in ("never", "always"):
        vae = make().cuda()
        torch.manual_seed(3)
        with pyro.get_param_store().scope():
            step = Step(vae, size=640, learning_rate=1e-3, compile=compile, steps=1000)
            losses = [step(x)[0] for _ in range(30)]
        found.append((torch.tensor(losses), torch.cat([p.detach().flatten() for p in vae.parameters()])))
    assert step.graph is not None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
