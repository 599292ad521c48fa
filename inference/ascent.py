"""Climbing from many points at once: to the ridge or peak in whose basin each lies."""

from __future__ import annotations

import torch
from torch import Tensor

from elbowroom.inference.references.grid.lattice import floor_nan
from elbowroom.inference.target.log_joint import LogJoint

STEPS = 16


def climb(log_joint: LogJoint, z: Tensor, scale: Tensor, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Climb from every start by steps along the gradient, only ever upwards.

    Args:
        log_joint: the model and guide.
        z: starts, (S, N, d).
        scale: lengths that steps are measured in, (d,) or (N, d).
        steps: number of steps.

    Returns:
        Where the climbs end, (S, N, d), and log p(x, z) there, (S, N).
    """
    best, gradient = log_joint.grad(z)
    best = floor_nan(best)
    step = torch.full_like(best, 0.1)
    for _ in range(steps):
        direction = (gradient * scale).nan_to_num(0.0, 0.0, 0.0)
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        trial = z + scale * direction * step.unsqueeze(-1)
        value, new_gradient = log_joint.grad(trial)
        better = value > best
        z = torch.where(better.unsqueeze(-1), trial, z)
        gradient = torch.where(better.unsqueeze(-1), new_gradient, gradient)
        best = torch.where(better, value, best)
        step = torch.where(better, step * 1.5, step * 0.3)
    return z, best
