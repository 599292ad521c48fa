"""Kernels without a truth (STATISTICS 4.8): from an exact draw of the posterior they must lead to another one.

z0 ~ p(z), x ~ p(x|z0): z0 is a draw of p(z|x). A kernel that leaves p(z|x) invariant, started there, gives z_n that is
distributed as the prior over all data, and log p(x|z_n) - log p(x|z0) whose distribution over all data is symmetric where the
kernel is reversible, and of mean zero in any case. Prior-distributed z_n alone would let a kernel pass that ignores x; both
together one that never moves: acceptance and movement have floors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
from scipy import stats
from support.problems import catalogue, curved, multimodal
from support.problems.catalogue import PROBLEMS
from support.problems.truth import F64, closed_form
from torch import Tensor

from elbowroom.inference.mcmc import leapfrog
from elbowroom.inference.mcmc.leapfrog import State
from elbowroom.inference.mcmc.normals import Normals
from elbowroom.inference.references.hmc import tempering
from elbowroom.inference.search.modes import Modes
from elbowroom.inference.search.sampler import Sampler
from elbowroom.inference.search.tempered import TemperedChains
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import simulate

N = 1500
LIMIT = 4.5  # standard errors
ALPHA = 7e-6  # the same, two-sided
FLOOR_ACCEPT = 0.4
WIDE = 0.5, 0.1
NARROW = {"banana": (0.25, 0.05), "square": (0.125, 0.01)}
"""Scale of the metric, and floor of the movement in variances of the prior: a thin ridge, and modes that few chains leave."""

Kernel = Callable[[LogJoint, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""Data, z0 (N, d), metric roots (N, d, d), a source of randomness -> z_n (N, d) and acceptance probabilities (any shape)."""


@cache
def _simulated(name: str, seed: int) -> tuple[LogJoint, Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:  # the truth about posteriors that are thrown away costs more than all else
        for module in (catalogue, curved, multimodal):
            patch.setattr(module, "quadrature", lambda *_, **__: closed_form(*torch.zeros(3, N, 1, 1, dtype=F64)))
        log_joint, z = simulate(PROBLEMS[name](N, 5).log_joint, seed)
    return log_joint, z, log_joint.sample_prior(20, seed + 1).flatten(0, 1)


def check(name: str, kernel: Kernel, seed: int = 1) -> None:
    """Assert that a kernel leaves every posterior of a problem invariant, and moves.

    Raises:
        AssertionError: saying which of the criteria failed.
    """
    log_joint, start, prior = _simulated(name, seed)
    scale, floor = NARROW.get(name, WIDE)
    root = scale * torch.eye(log_joint.dim, dtype=F64).repeat(log_joint.n_obs, 1, 1)  # knows nothing of z0
    end, accept = kernel(log_joint, start, root, torch.Generator().manual_seed(seed + 100))
    assert end.isfinite().all(), "not finite"
    assert accept.mean() > FLOOR_ACCEPT, f"acceptance {accept.mean():.2f}"
    moved = (end - start).square().mean(0) / prior.var(0)
    assert (moved > floor).all(), f"movement {moved.tolist()}"
    assert ((end != start).any(-1)).double().mean() > 0.9, "data that never moved"
    for j in range(end.shape[1]):
        p = stats.ks_2samp(end[:, j].numpy(), prior[:, j].numpy()).pvalue
        assert p > ALPHA, f"prior: coordinate {j} has another distribution, p = {p:.1g}"
    for what, new, old in (
        ("mean", end, prior),
        ("spread", (end - prior.mean(0)).square(), (prior - prior.mean(0)).square()),
    ):
        error = (new.var(0) / len(new) + old.var(0) / len(old)).sqrt()
        z = ((new.mean(0) - old.mean(0)) / error).abs().amax()
        assert z < LIMIT, f"prior: {what} {z:.1f} standard errors off"
    before, after = (log_joint.terms(z[None])[1][0] for z in (start, end))
    for what, difference in (
        ("sign", (after - before).sign()),
        ("mean", after - before),
        ("shape", after.exp().log1p() - before.exp().log1p() if after.max() < 500 else (after - before).tanh()),
        ("spread", (after - before.mean()).square() - (before - before.mean()).square()),
    ):
        z = abs(float(difference.mean() / difference.std())) * math.sqrt(len(difference))
        assert z < LIMIT, f"log p(x|z): {what} {z:.1f} standard errors off"
    p = stats.wilcoxon((after - before).numpy()).pvalue
    assert p > ALPHA, f"log p(x|z): ranks before and after differ, p = {p:.1g}"


def hamiltonian(
    transition: Callable[..., leapfrog.Move] = leapfrog.transition,
    target: Callable[[LogJoint], leapfrog.Target] = lambda log_joint: log_joint.grad,
    *,
    step: float = 0.5,
    moves: int = 25,
) -> Kernel:
    """The kernel of `moves` trajectories of three leapfrogs."""

    def kernel(log_joint: LogJoint, start: Tensor, root: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        f, accept = target(log_joint), []
        with log_joint.frozen_weights():
            state = State.at(f, start[None])
            for _ in range(moves):
                move = transition(f, state, root, step, 3, generator)
                state = move.state
                accept.append(move.accept)
        return state.z[0], torch.stack(accept)

    return kernel


def trajectories(log_joint: LogJoint, start: Tensor, root: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The jittered trajectories of batched HMC, in buckets of step sizes that differ between data."""
    step = torch.linspace(0.25, 0.7, log_joint.n_obs, dtype=F64)
    state = State.at(log_joint.grad, start[None].clone())
    sampler = Sampler(log_joint, state, root, step, generator)
    rows = torch.arange(log_joint.n_obs)
    first = sampler.run(rows, 5)  # a second call goes on where the first one ended
    chains = first.then(sampler.run(rows.flip(0), 5).rows(rows.flip(0)))
    return chains.draws[0, -1], chains.accept


def bridge(log_joint: LogJoint, start: Tensor, root: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Chains between prior and posterior, at b = 1."""
    chains = TemperedChains(log_joint, start[None])
    one = torch.ones(log_joint.n_obs, dtype=F64)
    accept = []
    with log_joint.frozen_weights():
        for _ in range(20):
            accept.append(chains.move(one, root, 0.5 * one, 3, generator).accept)
    return chains.z[0], torch.stack(accept)


def replicas(module: ModuleType = tempering) -> Kernel:
    """Sweeps of parallel tempering over two temperatures, both at exact draws: prior at b = 0, z0 at b = 1."""

    def kernel(log_joint: LogJoint, start: Tensor, root: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        n, d = start.shape
        runs = log_joint.sample_prior(8, 31)
        ladder = torch.tensor([0.0, 1.0], dtype=F64)[:, None].repeat(1, n)
        modes = Modes(runs, torch.zeros(8, n, dtype=F64), ladder)
        q = Normals(torch.zeros(n, d, dtype=F64), root)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "WARMUP", 40)
            ensembles = module.Tempering(log_joint, modes, q, 2, generator, 33)
        ensembles.z[:, 0], ensembles.z[:, -1] = log_joint.sample_prior(2, 34), start
        chains = ensembles.run(torch.arange(n), 20)
        return chains.draws[0, -1], chains.accept

    return kernel


def mutated(module: ModuleType, old: str, new: str) -> ModuleType:
    """Return a module with a planted error."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    other = ModuleType(module.__name__)
    other.__dict__.update(vars(module))
    exec(compile(source.replace(old, new), f"<{module.__name__}, with {new!r}>", "exec"), vars(other))
    return other


KERNELS = {
    "transition": hamiltonian(),
    "trajectories": trajectories,
    "bridge": bridge,
    "replicas": replicas(),
}


@pytest.mark.parametrize("name", [pytest.param("mlp_gaussian", marks=pytest.mark.slow), "positive", "hierarchy"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_leave_the_posterior_invariant(kernel: str, name: str) -> None:
    check(name, KERNELS[kernel])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp_bernoulli", "mlp_poisson", "simplex_d2", "discrete", "banana", "square"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", [2, 3])
def test_kernels_on_further_problems(kernel: str, name: str, seed: int) -> None:
    check(name, KERNELS[kernel], seed)


def _stuck(log_joint: LogJoint, start: Tensor, root: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return start, torch.ones(1, dtype=F64)


def test_a_stuck_kernel_is_caught() -> None:
    with pytest.raises(AssertionError, match="movement"):
        check("mlp_gaussian", _stuck)


def test_a_kernel_that_rejects_everything_is_caught() -> None:
    with pytest.raises(AssertionError, match="acceptance"):
        check("mlp_gaussian", hamiltonian(step=60.0))


def _ignoring(log_joint: LogJoint) -> leapfrog.Target:
    def target(z: Tensor) -> tuple[Tensor, Tensor]:
        prior, _, of_prior, _ = log_joint.parts(z)
        return prior, of_prior

    return target


def test_a_kernel_that_ignores_x_is_caught_by_the_likelihood_alone() -> None:
    with pytest.raises(AssertionError, match=r"log p\(x\|z\)"):
        check("mlp_gaussian", hamiltonian(target=_ignoring))


def _without_jacobian(log_joint: LogJoint) -> leapfrog.Target:
    def target(z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = log_joint.grad(z)
        return value - z.sum(-1), gradient - 1  # z = log rate: the Jacobian is exp z

    return target


def test_a_kernel_without_the_jacobian_is_caught() -> None:
    with pytest.raises(AssertionError, match="prior: "):
        check("positive", hamiltonian(target=_without_jacobian))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("accept = (-change).exp().clamp_max(1.0)", "accept = change.exp().clamp_max(1.0)"),
        ("momentum = momentum + 0.5 * size * apply_t(root, gradient)", "momentum = momentum + size * apply_t(root, gradient)"),
        ("full if i + 1 < n_steps else half", "full"),
        ("generator=generator) < accept", "generator=generator) < 2.0"),
        ("change = 0.5 * momentum.square().sum(-1) - value - energy", "change = -value - energy"),
    ],
    ids=["sign", "first half step", "last half step", "no rejection", "kinetic energy"],
)
def test_an_error_in_the_leapfrog_is_caught(old: str, new: str) -> None:
    broken = mutated(leapfrog, old, new)
    with pytest.raises(AssertionError, match=r"prior|log p|acceptance|not finite"):
        check("mlp_gaussian", hamiltonian(broken.transition, step=0.9))


def test_swaps_with_the_wrong_sign_are_caught() -> None:
    with pytest.raises(AssertionError, match=r"prior|log p"):
        check("mlp_gaussian", replicas(mutated(tempering, "swap = log_u < gain", "swap = log_u < -gain")))
