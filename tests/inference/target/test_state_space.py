"""Sequences of latents, one site for each step, against the Kalman filter: log p(x), smoothing posterior, gap, its steps."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.problems.state_space import StateSpace
from torch import Tensor

from elbowroom.analysis.audit.auditor import Audit, audit
from elbowroom.inference.compiled.policies import policy
from elbowroom.inference.target import graphs
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "lengths", [[1], [2, 1], [3, 1, 2, 3], [4, 4], [20, 3]]
)  # the last has more sites than vmap is used for
def test_densities_are_those_of_the_steps_that_are_there(lengths: list[int], inside: bool) -> None:
    """log p(x, z) - log p(z | x) is log p(x), at any z; masked steps count nowhere."""
    problem = StateSpace(inside=inside)
    x, mask = problem.data(lengths)
    joint = LogJoint(problem.model, problem.guide, x, mask)
    z, steps = joint.probe_points, x.shape[1]
    assert joint.dim == 2 * steps
    assert joint.mode == ("vmap" if steps <= 16 else "repeat")
    active = torch.ones(len(x), joint.dim, dtype=torch.bool) if joint.program.active is None else joint.program.active
    assert torch.equal(active, mask.repeat_interleave(2, 1))
    log_p, log_q, (again, gradient) = joint(z), joint.log_guide(z), joint.grad(z)
    torch.testing.assert_close(again, log_p)
    for n, length in enumerate(lengths):
        there, gone = z[:, n, : 2 * length], z[:, n, 2 * length :]
        padding = torch.distributions.Normal(0.0, 1.0).log_prob(gone).sum(-1)
        posterior, guide = (
            torch.distributions.MultivariateNormal(*moments)
            for moments in (problem.posterior(x[n, :length]), problem.of_guide(x[n, :length]))
        )
        want = problem.log_evidence(x[n, :length]) + posterior.log_prob(there) + padding
        torch.testing.assert_close(log_p[:, n], want)
        torch.testing.assert_close(log_q[:, n], guide.log_prob(there) + padding)
        u = there.clone().requires_grad_()
        (slope,) = torch.autograd.grad(posterior.log_prob(u).sum(), u)
        torch.testing.assert_close(gradient[:, n], torch.cat([slope, -gone], -1))
    assert joint.separable()


def test_a_long_program_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are counted before a trace, which would take long; what has few of them is traced, and agrees."""
    problem = StateSpace()
    joint = LogJoint(problem.model, problem.guide, *problem.data([2, 1]))
    z = joint.probe_points
    plain = joint(z)
    with monkeypatch.context() as patched, policy("always"):
        patched.setattr(graphs, "MAX_NODES", 30)
        patched.setattr(graphs.Graphs, "_agreeing", lambda *given: pytest.fail("traced"))
        assert joint.graphs.ready(joint, "joint") is None
        assert "operations, and a graph more than 30" in joint.graphs.reasons["joint"]
        torch.testing.assert_close(joint(z), plain)
    monkeypatch.setattr(graphs, "TRACE", -1.0)
    monkeypatch.setattr(graphs, "COMPILE", math.inf)
    again = LogJoint(problem.model, problem.guide, *problem.data([2, 1]))  # methods of an object that has no hash
    assert again.graphs.ready(again, "joint") is not None
    torch.testing.assert_close(again(z), plain)


def judged(problem: StateSpace, x: Tensor, mask: Tensor) -> Audit:
    """Audit and compare every sequence with the exact answer."""
    found = audit(problem.model, problem.guide, x, mask, budget=None, diagnose=False)
    table, draws = found.table, found.posteriors["hmc"].posterior
    assert set(table["status"].sel(reference="hmc").values) == {"certified"}, table["reason"].values
    for n, length in enumerate(mask.sum(1).tolist()):
        exact = problem.log_evidence(x[n, :length])
        error = float(np.hypot(table["log_evidence_se"][n], table["elbo_se"][n]))
        assert abs(float(table["log_evidence"][n]) - float(exact)) < 5 * float(table["log_evidence_se"][n])
        assert float(table["log_evidence_se"][n]) < 0.1
        assert abs(float(table["gap_total"][n]) - float(problem.gap(x[n, :length]))) < 5 * error
        mean, cov = problem.posterior(x[n, :length])
        z = np.concatenate([draws[f"z_{t}"].values[:, :, n] for t in range(length)], -1)
        z = torch.tensor(z).flatten(0, 1)
        standard = (z.mean(0) - mean) / cov.diagonal().sqrt()
        assert standard.abs().max() < 0.25  # 1,000 draws, of an effective number of some hundreds
        ratio = z.var(0) / cov.diagonal()
        assert 0.7 < ratio.min() <= ratio.max() < 1.4
        for t in range(length, x.shape[1]):
            assert np.isnan(draws[f"z_{t}"].values[:, :, n]).all()
    return found


def test_audit_of_short_sequences() -> None:
    problem = StateSpace(inside=True)
    judged(problem, *problem.data([3, 2]))


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("steps", [25, 50])
def test_audit_of_long_sequences(steps: int, inside: bool) -> None:
    """T k = 50 and 100."""
    problem = StateSpace(inside=inside)
    judged(problem, *problem.data([steps, steps - 7, steps]))


# -- which steps carry the gap -----------------------------------------------------------------------------------------------


class ByHand:
    """The state-space model as the example's `by_step` takes it."""

    def __init__(self, problem: StateSpace, x: Tensor) -> None:
        self.problem, self.x, self.z_0 = problem, x, torch.zeros(problem.k, dtype=F64)

    def transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z @ self.problem.a.T, self.problem.q.expand_as(z)

    def emission(self, z: Tensor, x_t: Tensor) -> Tensor:
        return torch.distributions.Normal(z @ self.problem.c.T, self.problem.r).log_prob(x_t).sum(-1)

    def start_of_guide(self, draws: int) -> Tensor:
        return self.z_0.expand(draws, -1)

    def posterior_step(self, z: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return z @ self.problem.f.T + self.x[t] @ self.problem.g.T, self.problem.s.expand_as(z)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_steps_of_the_gap_are_those_of_the_chain_rule(steps: int) -> None:
    path = Path(__file__).parents[3] / "examples" / "deep_markov.py"
    spec = importlib.util.spec_from_file_location("examples_deep_markov", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    problem = StateSpace()
    x = problem.data([steps])[0][0]
    exact = problem.gap_by_step(x)
    torch.testing.assert_close(exact.sum(), problem.gap(x))
    posterior = torch.distributions.MultivariateNormal(*problem.posterior(x))
    off = []
    for seed in range(4):
        torch.manual_seed(seed)
        draws = posterior.sample((600,)).unflatten(1, (steps, problem.k))
        log_p = float(problem.log_evidence(x))
        c, error = example.by_step(ByHand(problem, x), draws, log_p, draws=300, particles=512, seed=seed)
        assert (error < 0.5).all()
        off.append((c - exact) / error)
    off = torch.stack(off)
    assert off.abs().max() < 4.5, off
    assert off.mean(0).abs().max() < 2.5, off
    assert off.square().mean() < 2.5, off
