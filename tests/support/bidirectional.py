"""Bidirectional Monte Carlo: evidence between two bounds, for data simulated from the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from elbowroom.inference.mcmc.normals import Normals
from elbowroom.inference.references.ais.annealing import AnnealedBound, lower, tune, upper
from elbowroom.inference.references.ais.paths import Path, PriorPath, RefitPath
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import simulate


@dataclass(frozen=True)
class Sandwich:
    """Lower and upper bounds for data simulated from the model, whose posterior is known by one exact draw each.

    Attributes:
        log_joint: of the simulated data.
        lower: by name of the path.
        upper: likewise; all chains of a datum begin at its one exact draw, so no standard error can be given per datum.
    """

    log_joint: LogJoint
    lower: dict[str, AnnealedBound]
    upper: dict[str, AnnealedBound]

    @property
    def width(self) -> dict[str, Tensor]:
        """Upper minus lower bound by name of the path, (N,), in nats; its mean over data is at least 0 in expectation."""
        return {name: self.upper[name].value - self.lower[name].value for name in self.lower}


def bdmc(
    log_joint: LogJoint,
    q_star: Callable[[LogJoint], Normals] | None,
    *,
    seed: int,
    temperatures: int = 100,
    chains: int = 16,
    leapfrogs: int = 8,
    inflation: float = 1.3,
) -> Sandwich:
    """Sandwich log p(x) of data simulated from the model between forward and reverse chains.

    What it says is about simulated data: for real ones it is a forecast of what these settings achieve, not a bound.
    Grosse, Ancha and Roy 2016, https://arxiv.org/abs/1606.02275.

    Args:
        log_joint: the model; its data give only their number and the covariates.
        q_star: gives a normal near each posterior of the simulated data; None anneals from the prior alone.
        seed: random seed.
        temperatures: T.
        chains: S, in each direction.
        leapfrogs: per trajectory.
        inflation: of q*'s standard deviations.

    Raises:
        UnsupportedProgram: when the model's data cannot be simulated.
    """
    other, z = simulate(log_joint, seed)
    q = None if q_star is None else q_star(other)
    paths: list[Path] = [PriorPath(other, q, seed=seed + 1)]
    if q is not None:
        paths.append(RefitPath(other, q, inflation=inflation))
    low, high = {}, {}
    draws = z.expand(chains, *z.shape)
    for i, path in enumerate(paths):
        plan = tune(path, temperatures=temperatures, leapfrogs=leapfrogs, seed=seed + 10 * i + 2)
        low[path.name] = lower(path, plan, chains=chains, seed=seed + 10 * i + 3)
        high[path.name] = upper(path, plan, draws, seed=seed + 10 * i + 4)
    return Sandwich(other, low, high)
