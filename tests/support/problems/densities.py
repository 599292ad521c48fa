"""Densities by hand, draws, and an encoder: what the problems are written with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elbowroom.inference.target.log_joint import LogJoint
from support.problems.truth import F64, Density, Problem, Truth

LOG_2PI = math.log(2 * math.pi)


def by_sign(points: Tensor) -> Tensor:
    """Mode 0 where the first coordinate is positive, 1 where it is negative."""
    return (points[..., 0] < 0).long().where(points.isfinite().all(-1), -1)


def as_problem(name: str, pair: LogJoint, log_density: Density, truth: Truth) -> Problem:
    kind = name.rsplit("_d", 1)[0] if name[-1].isdigit() else name
    return Problem(**vars(truth), name=name, kind=kind, log_joint=pair, log_density=log_density)


def box(n: int, *sides: tuple[float, float]) -> tuple[Tensor, Tensor]:
    low, high = torch.tensor(sides, dtype=F64).T
    return low.expand(n, -1), high.expand(n, -1)


def normal(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    scale = torch.as_tensor(scale, dtype=F64)
    return -0.5 * ((x - loc) / scale).square() - scale.log() - 0.5 * LOG_2PI


def student(x: Tensor, df: float) -> Tensor:
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    return constant - (df + 1) / 2 * torch.log1p(x.square() / df)


def source(seed: int, salt: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + salt)


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=F64)


def draw_student(g: torch.Generator, df: int, *shape: int) -> Tensor:
    return randn(g, *shape) / (randn(g, df, *shape).square().sum(0) / df).sqrt()


Simulate = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # n -> z (n, d), x (n, D)


def amortized(simulate: Simulate, seed: int, features: Density = lambda x: x, width: float = 1.0) -> Callable[..., Any]:
    """Fit x -> (loc, scale) of a diagonal normal by regression on 4,000 simulated pairs: amortized, decent, not exact.

    The scales are those of the marginals times `width`.
    """
    g = source(seed, 77)
    z, x = simulate(4000, g)
    z = z.clamp(-6, 6)
    f = features(x)
    centre, unit = f.mean(0), f.std(0) + 1e-3
    project, shift = randn(g, f.shape[1], 40) / f.shape[1] ** 0.5, randn(g, 40)

    def design(x: Tensor) -> Tensor:
        u = (features(x) - centre) / unit
        return torch.cat([torch.ones_like(u[..., :1]), u, torch.tanh(u @ project + shift)], -1)

    A = design(x)
    solve = torch.linalg.solve(A.T @ A + torch.eye(A.shape[1], dtype=F64), A.T)
    to_loc = solve @ z
    residual = z - A @ to_loc
    to_log = solve @ (residual.square() + 1e-6).log()
    spread = residual.std(0)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        D = design(x)
        scale = width * (0.5 * (D @ to_log) + 0.635).exp()  # E log chi^2_1 = -1.27
        return D @ to_loc, torch.minimum(torch.maximum(scale, 0.1 * spread), 1.5 * spread)

    return encode
