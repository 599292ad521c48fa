"""Lower precision in training steps: it learns, its effect is stated, distributions get float32, and nothing stays changed."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, replace

import pyro
import pytest
import torch
from torch import Tensor

from elbowroom.errors import RunFolderError, SpecError
from elbowroom.inference.fit import mixed_precision as rounding
from elbowroom.inference.fit import step as training_step
from elbowroom.inference.fit.loop import evaluate_elbo
from elbowroom.inference.fit.mixed_precision import effect, lowered
from elbowroom.inference.fit.plan import Session
from elbowroom.inference.fit.record import Effect
from elbowroom.inference.fit.rows import Rows
from elbowroom.inference.fit.step import Step
from elbowroom.inference.fit.svi import fit
from elbowroom.inference.objectives.elbo import ELBO
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

D, K = 6, 2


@pytest.fixture(autouse=True)
def _same_globals():
    """Fail a test that leaves torch's precision changed."""

    def state() -> tuple:
        return torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()

    before = state()
    yield
    assert state() == before


def data(n: int = 200, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, K, generator=generator) @ torch.randn(K, D, generator=torch.Generator().manual_seed(7))
    return x + 0.3 * torch.randn(n, D, generator=generator)


def make(decoder=None) -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family, likelihood = DiagonalNormal(K), Gaussian((D,))
        decoder = decoder or MLP((K,), likelihood.param_dim, hidden=(8,))
        return VAE(Normal(K), likelihood, decoder, AmortizedGuide(MLP((D,), family.param_dim, hidden=(8,)), family))


def untouched(vae: VAE) -> bool:
    return not any("forward" in vars(part) for part in vae.modules())


def test_bf16_learns_and_states_its_effect(tmp_path, caplog):
    x, v = data(600), data(200, seed=2)
    options = {"epochs": 15, "batch_size": 50, "learning_rate": 1e-2}
    before = evaluate_elbo(make(), v)
    full = fit(make(), x, v, Session(seed=1), **options)
    vae = make()
    with caplog.at_level(logging.INFO, logger="elbowroom"):
        found = fit(vae, x, v, Session(folder=tmp_path, seed=1), precision="bf16", **options)
    assert full.best.validation_elbo > before + 1
    assert 0 < abs(found.best.validation_elbo - full.best.validation_elbo) < 0.05  # another fit, as good
    assert evaluate_elbo(vae, v, seed=1 + 0x2545F491) == found.best.validation_elbo  # validated in full precision
    assert untouched(vae)
    assert {value.dtype for value in vae.parameters()} == {torch.float32}
    said = found.effect
    assert full.effect is None
    assert (said.precision, said.rows) == ("bf16", 512)
    assert said.full == pytest.approx(evaluate_elbo(vae, x, draws=20, seed=5), abs=0.3)
    assert 0 < abs(said.difference) < 0.02
    assert 0 < said.standard_error < 0.005
    (line,) = [record.getMessage() for record in caplog.records if "bf16" in record.getMessage()]
    assert line == f"fit: {said}"
    assert f"{said.full:.4f} nats per datum in full precision, {said.rounded:.4f} with bf16, difference" in line
    assert json.loads((tmp_path / "precision.json").read_text()) == {**asdict(said), "difference": said.difference}


def test_the_effect_is_paired_over_rows(monkeypatch):
    values = {"highest": [1.0, 2.0, 3.0], "bf16": [1.1, 2.0, 3.2]}
    monkeypatch.setattr(rounding, "_elbos", lambda *given: torch.tensor(values[given[3]], dtype=torch.float64))
    found = effect(make(), Rows.of(data(3)), "bf16", 0)
    assert (found.full, found.rounded, found.rows) == (2.0, pytest.approx(2.1), 3)
    assert found.difference == pytest.approx(0.1)
    assert found.standard_error == pytest.approx(0.1 / math.sqrt(3))


@pytest.mark.parametrize(
    ("error", "said"), [(3e-4, "+0.1000 +- 0.0003"), (2e-6, "+0.100000 +- 0.000002"), (math.nan, "+0.1000 +- nan")]
)
def test_the_effect_shows_a_digit_of_its_error(error, said):
    assert str(Effect("bf16", 2, -8.0, -7.9, error)).endswith(f"difference {said}")


def test_distributions_get_float32_that_was_rounded():
    vae, x = make(), data(50)
    with torch.no_grad():
        q, p = vae.encode(x), vae.decode(torch.ones(5, K))
        with lowered(vae, "bf16"):
            low_q, low_p = vae.encode(x), vae.decode(torch.ones(5, K))
            assert low_q.log_prob(torch.zeros(K)).dtype == torch.float32
            assert low_p.log_prob(x[:5]).dtype == torch.float32
    for full, low in ((q.mean, low_q.mean), (p.mean, low_p.mean)):
        assert low.dtype == torch.float32
        assert 0 < (full - low).abs().max() < 0.02 * full.abs().max()
    assert torch.equal(vae.encode(x).mean, q.mean)


def test_bf16_is_for_steps_and_gradients_are_float32():
    steps = [Step(make(), size=50, learning_rate=0.01, precision=each) for each in ("highest", "bf16")]
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        losses = []
        for step in steps:
            torch.manual_seed(3)
            losses.append(step(data(50))[0])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert {value.grad.dtype for value in steps[1].parameters} == {torch.float32}


@pytest.mark.parametrize("way", ["bf16", "tf32"])
def test_everything_is_restored_when_the_fit_raises(way):
    class Breaks(ELBO):
        calls = 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            if self.calls > 5:
                raise KeyError("an objective's own error")
            return super().__call__(*args, **kwargs)

    vae = make()
    with pytest.raises(KeyError, match="own error"):
        fit(vae, data(), data(20), epochs=3, batch_size=20, precision=way, objective=Breaks())
    assert untouched(vae)


def test_tf32_is_set_inside_alone():
    vae = make().to("meta")  # where torch's setting is looked at: any device but a CPU
    before = torch.get_float32_matmul_precision()
    with lowered(vae, "tf32"):
        assert torch.get_float32_matmul_precision() == "high" != before
    assert torch.get_float32_matmul_precision() == before


def test_tf32_changes_nothing_on_a_cpu_and_says_so(caplog):
    x, found = data(60), []
    for way in ("highest", "tf32"):
        history = fit(make(), x, x[:10], epochs=2, batch_size=20, device="cpu", precision=way)
        found.append([row.validation_elbo for row in history.rows])
        assert history.effect is None
    assert found[0] == found[1]
    assert [record.getMessage() for record in caplog.records] == [
        "fit: precision tf32 changes nothing on a CPU, which multiplies in float32"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "fit.precision: must be highest, tf32 or bf16, got 'fp8'"),
        (
            {"precision": "bf16", "dtype": "float64"},
            "fit.precision: bf16 rounds float32, but fit.dtype is float64; use highest",
        ),
        (
            {"precision": "tf32", "dtype": "float64"},
            "fit.precision: tf32 rounds float32, but fit.dtype is float64; use highest",
        ),
    ],
)
def test_a_precision_that_cannot_be_is_refused(options, message):
    with pytest.raises(SpecError) as caught:
        fit(make(), data(), data(20), **options)
    assert str(caught.value) == message


class Mixing(MLP):
    """A network that multiplies what is rounded with what is not, by a function that does not promote."""

    def __init__(self) -> None:
        super().__init__((K,), D, hidden=(4,))

    def forward(self, z: Tensor) -> Tensor:
        out = super().forward(z)
        return torch.lerp(out, torch.zeros(D), 0.5)


def test_a_network_that_does_not_run_in_bf16_is_refused_in_one_line():
    vae = make(Mixing())
    with pytest.raises(SpecError, match="fit.precision: a network does not run with bf16 .*; use highest") as caught:
        fit(vae, data(), data(20), epochs=1, precision="bf16")
    assert "\n" not in str(caught.value)
    assert untouched(vae)


def test_resume_is_bitwise_and_the_precision_is_the_fits(tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(_, row):
        if row.epoch == 2:
            raise Interrupted

    x, v = data(50), data(20, seed=2)
    options = {"epochs": 4, "batch_size": 16, "precision": "bf16"}
    whole, resumed = make(), make()
    expected = fit(whole, x, v, Session(seed=6), **options)
    session = Session(folder=tmp_path, seed=6, checkpoint_seconds=0, report=interrupt)
    with pytest.raises(Interrupted):
        fit(make(), x, v, session, **options)
    session = replace(session, report=None, resume=True)
    with pytest.raises(RunFolderError, match="with other options .fit.precision was bf16, now highest."):
        fit(make(), x, v, session, **{**options, "precision": "highest"})
    history = fit(resumed, x, v, session, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert history.effect == expected.effect is not None
    assert fit(make(), x, v, session, **options).effect == expected.effect  # a finished one says it again


def test_the_replayed_step_is_the_eager_step_bit_for_bit(monkeypatch):
    monkeypatch.setattr(training_step, "TRACE_AFTER", 0.0)
    monkeypatch.setattr(training_step, "COMPILE_AFTER", math.inf)
    x, found = data(24), []
    for compile in ("never", "auto"):
        step = Step(make(), size=50, learning_rate=0.01, compile=compile, steps=1000, precision="bf16")
        with pyro.get_param_store().scope(), pyro.validation_enabled(False), torch.random.fork_rng():
            torch.manual_seed(3)
            found.append([step(part, kl_weight=0.5) for part in x.split(8)])
        assert (step.graph is None) == (compile == "never")
        if step.graph is not None:
            casts = [node for node in step.graph.graph.module.graph.nodes if torch.bfloat16 in node.kwargs.values()]
            assert casts  # autocast is in it
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["never", "always"])
@pytest.mark.parametrize("way", ["tf32", "bf16"])
def test_on_a_gpu(way, compile):
    x, v = data(600), data(200, seed=2)
    options = {"epochs": 15, "batch_size": 50, "learning_rate": 1e-2, "compile": compile, "device": "cuda"}
    full, low = (fit(make(), x, v, Session(seed=1), precision=each, **options) for each in ("highest", way))
    assert low.best.validation_elbo == pytest.approx(full.best.validation_elbo, abs=0.05)
    assert low.effect.precision == way
    assert abs(low.effect.difference) < 0.02
