"""The best posterior of every datum: what it says it is, where a reference found what the guide misses."""

from __future__ import annotations

import math
import time

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from elbowroom.analysis.queries.best_posterior import LATE, methods_for, read
from elbowroom.inference.posterior import Posterior, Reference
from elbowroom.inference.references.importance.importance import ImportanceSampling
from elbowroom.inference.target.log_joint import LogJoint

NOISE = 0.3


def _model(x: Tensor) -> None:
    """z1, ..., z4 ~ N(0, 1); x1 ~ N(z1^2, NOISE^2), of which two z1 are the cause, the others N(zj, NOISE^2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
        mean = torch.cat([z[..., :1].square(), z[..., 1:]], -1)
        pyro.sample("x", dist.Normal(mean, NOISE).to_event(1), obs=x)


def _guide(x: Tensor) -> None:
    """Know of the positive z1 alone."""
    root = x[:, :1].clamp_min(0.05).sqrt()
    scale = torch.cat([(0.5 * NOISE / root).clamp(0.05, 0.6), torch.full_like(x[:, 1:], 0.287)], -1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.cat([root, x[:, 1:] / 1.09], -1), scale).to_event(1))


def test_a_row_says_that_a_reference_found_a_mode_that_its_draws_lack() -> None:
    x = torch.tensor([[0.0, 0.3, 0.3, 0.3], [2.0, 0.3, 0.3, 0.3], [4.0, 0.3, 0.3, 0.3]], dtype=torch.float64)
    log_joint = LogJoint(_model, _guide, x)
    found = read(log_joint, methods_for(log_joint), seed=1)
    assert found.posterior.status[0] == "certified"
    assert "mode" not in found.posterior.reason[0].split("found no mode")[0]
    for i in (1, 2):  # k-hat of the guide's weights is small at both, and half of the posterior is missing
        assert found.posterior.status[i] in ("uncertified", "amortized")
        assert "k-hat" in found.posterior.reason[i]
        assert "found a mode" in found.posterior.reason[i]


def test_draws_of_the_guide_as_they_are_say_why() -> None:
    x = torch.tensor([[0.2, 0.3, 0.3, 0.3]], dtype=torch.float64)
    log_joint = LogJoint(_model, _guide, x)
    found = read(log_joint, [], seed=1)
    assert (found.source, found.posterior.status) == (["guide"], ["amortized"])
    assert "draws of the guide as they are: k-hat" in found.posterior.reason[0]


class Some(Reference):
    """Importance sampling that owns up to every second datum only, and counts the data that it is given."""

    name = "some"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def refusal(self, log_joint: LogJoint) -> str | None:
        return None

    def __call__(self, log_joint: LogJoint, *, keep: int, seed: int, until: float = math.inf) -> Posterior:
        self.asked.append(log_joint.n_obs)
        found = ImportanceSampling()(log_joint, keep=keep, seed=seed, until=until)
        status = ["uncertified" if i % 2 else s for i, s in enumerate(found.status)]
        return Posterior(**{**vars(found), "method": self.name, "status": status})


def _easy(n: int) -> LogJoint:
    return LogJoint(
        _model,
        _guide,
        torch.tensor([[0.0, 0.3, -0.3, 0.1]], dtype=torch.float64).expand(n, -1) + 0.01 * torch.arange(n)[:, None],
    )


def test_a_further_reference_runs_on_what_is_left_and_changes_nothing_else() -> None:
    log_joint, first, second = _easy(6), Some(), Some()
    found = read(log_joint, [first, second, ImportanceSampling()], seed=1)
    assert (first.asked, second.asked) == ([6], [3])
    assert found.source == ["some", "some", "some", "importance", "some", "some"]
    alone = read(log_joint, [Some()], seed=1)
    assert torch.equal(found.posterior.mean[::2], alone.posterior.mean[::2])
    assert found.references[1].status == ["not needed", "certified", "not needed", "uncertified", "not needed", "certified"]
    assert found.evidence.value.shape == (6,)
    assert all(abs(a - b) < 0.2 for a, b in zip(found.evidence.value[::2], alone.evidence.value[::2], strict=True))


def test_what_the_budget_does_not_reach_says_so() -> None:
    log_joint = _easy(4)
    found = read(log_joint, methods_for(log_joint), seed=1, until=time.monotonic() - 1)
    assert found.references == []
    assert all(reason.endswith(LATE) for reason in found.posterior.reason)
    assert set(found.posterior.status) <= {"uncertified", "amortized"}
    assert found.posterior.mean.isfinite().all()


def test_more_than_three_latents_are_read_by_two_importance_samplings() -> None:
    methods = methods_for(_easy(2))
    assert [(m.name, m.start) for m in methods] == [("importance", "laplace"), ("importance", "refit")]
