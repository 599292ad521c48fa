"""Single precision is taken where it changes no number that matters, and only there."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.problems.catalogue import PROBLEMS
from torch import Tensor

from elbowroom.inference.references.importance import importance
from elbowroom.inference.references.importance.importance import ImportanceSampling
from elbowroom.inference.search.scout import scout
from elbowroom.inference.search.single_precision import NOISE, SHIFT, in_precision
from elbowroom.inference.target.log_joint import LogJoint


def _shifted(far: float) -> LogJoint:
    """A conjugate pair whose log p(x, z) is lower by `far` nats, the same everywhere."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
            pyro.factor("far", -far * torch.ones_like(y[:, 0]))
            pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(0.8 * y, 0.45).to_event(1))

    return LogJoint(model, guide, torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@pytest.mark.parametrize(("far", "single"), [(0.0, True), (100.0, True), (1e6 / 3, False)])
def test_a_shift_of_log_p_that_an_estimate_would_show_is_not_taken(far: float, single: bool) -> None:
    joint = _shifted(far)
    found = in_precision(joint, scout(joint).refit.q, "auto", torch.Generator().manual_seed(2))
    assert (found.dtype == torch.float32) == single
    if single:
        z = joint.sample_prior(50, 3)
        difference = found(z).double() - joint(z)
        assert difference.mean().abs() < SHIFT
        assert difference.std() < NOISE


@pytest.mark.parametrize("name", ["linear_gaussian_d2", "linear_gaussian_d20"])
def test_importance_sampling_gives_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joint = PROBLEMS[name](6, 4).log_joint
    taken = []

    def noted(log_joint: LogJoint, *rest: object) -> LogJoint:
        taken.append(in_precision(log_joint, *rest))  # type: ignore[arg-type]
        return taken[-1]

    monkeypatch.setattr(importance, "in_precision", noted)
    fast = ImportanceSampling(draws=2_000)(joint, keep=100, seed=5)
    assert taken[0].dtype == torch.float32
    monkeypatch.setattr(importance, "in_precision", lambda log_joint, *rest: log_joint)
    slow = ImportanceSampling(draws=2_000)(joint, keep=100, seed=5)
    assert fast.evidence is not None
    assert slow.evidence is not None
    assert (fast.evidence.value - slow.evidence.value).abs().max() < SHIFT
    (mean, sd), (others, _) = fast.moments(), slow.moments()
    assert ((mean - others) / sd).abs().max() < 0.01
    assert fast.draws.dtype == slow.draws.dtype == torch.float64


def test_values_next_to_an_edge_stay_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []

    def noted(log_joint: LogJoint, q: object, precision: str, generator: object) -> LogJoint:
        wanted.append(precision)
        return log_joint

    monkeypatch.setattr(importance, "in_precision", noted)
    ImportanceSampling(draws=2_000)(PROBLEMS["positive"](3, 4).log_joint, keep=100, seed=5)
    assert wanted == ["double"]
