"""The Laplace approximation of every posterior: the normal at the mode nearest to the guide, with the curvature there.

Newton's method with a Hessian from differences of gradients: 2 d gradients per step, all data at once, where a refit by the
ELBO takes thousands. As a proposal of importance sampling it is judged by its weights, and a datum that it does not suit is
refitted. Differences are wide, `WIDTH` of the guide's own standard deviations, so that kinks of a decoder average out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elbowroom.inference.mcmc.normals import Normals, safe_cholesky
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import LARGE_ARRAY, fitting
from elbowroom.system.stages import stage

STEPS = 6  # at most
WIDTH = 0.3
SHARES = (1.0, 0.5, 0.2, 0.05)  # of a Newton step, of which the best is taken
LEAST, MOST = 0.02, 1e6  # curvature in the guide's standard deviations: the approximation is at most 7 times as wide
FAR = 10.0  # length of a step, in sqrt(d) standard deviations
CLOSE = 0.1  # nats that a step promises, below which all is done
GUIDE_DRAWS = 100


@stage("laplace")
def laplace(log_joint: LogJoint, seed: int) -> Normals:
    """Return the normals at the modes that Newton's method reaches from the guide's means.

    Args:
        log_joint: the data.
        seed: of the guide's draws, which give the starts and the scales.
    """
    size = fitting(2 * log_joint.dim * log_joint.dim, LARGE_ARRAY)
    found = [
        _climbed(log_joint.subset(rows) if len(rows) < log_joint.n_obs else log_joint, seed) for rows in log_joint.blocks(size)
    ]
    return Normals(torch.cat([q.loc for q in found]), torch.cat([q.root for q in found]))


def _climbed(log_joint: LogJoint, seed: int) -> Normals:
    with torch.no_grad():
        z = log_joint.draw("guide", GUIDE_DRAWS, seed)
    scale = z.std(0).double().nan_to_num(1.0).clamp(1e-6, 1e6)
    at = z.double().mean(0)
    with log_joint.frozen_weights():
        for _ in range(STEPS):
            values, vectors, gradient = _curvature(log_joint, at, scale)
            step = _apply(vectors, _apply(vectors.mT, gradient) / values)
            gain = 0.5 * (step * gradient).sum(-1)
            length = step.norm(dim=-1, keepdim=True)
            step = scale * step * (FAR * at.shape[-1] ** 0.5 / length.clamp_min(1e-300)).clamp_max(1.0)
            at = _best(log_joint, at, step)
            if not bool((gain > CLOSE).any()):
                break
        values, vectors, _ = _curvature(log_joint, at, scale)
    whole = torch.einsum("nij,nj,nkj->nik", vectors, 1 / values, vectors)
    return Normals(at, safe_cholesky(scale[:, :, None] * whole * scale[:, None, :]))


def _curvature(log_joint: LogJoint, at: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues and vectors of minus the Hessian, and the gradient, in units of `scale`: (N, d), (N, d, d), (N, d)."""
    d = at.shape[-1]
    off = WIDTH * scale * torch.eye(d, dtype=at.dtype, device=at.device)[:, None]  # (d, N, d)
    points = torch.cat([at[None], at + off, at - off])
    _, gradient = log_joint.grad(points.to(log_joint.probe_points.dtype))
    gradient = gradient.double().nan_to_num(0.0, 0.0, 0.0) * scale
    hessian = ((gradient[1 : d + 1] - gradient[d + 1 :]) / (2 * WIDTH)).movedim(0, 1)
    values, vectors = torch.linalg.eigh(-(hessian + hessian.mT) / 2)
    return values.clamp(LEAST, MOST), vectors, gradient[0]


def _best(log_joint: LogJoint, at: Tensor, step: Tensor) -> Tensor:
    """Return the highest of the points along a step, and where it starts."""
    shares = torch.tensor((0.0, *SHARES), dtype=at.dtype, device=at.device)
    points = at + shares[:, None, None] * step
    with torch.no_grad():
        height = log_joint(points.to(log_joint.probe_points.dtype)).double()
    best = height.nan_to_num(-torch.inf, -torch.inf, -torch.inf).argmax(0)
    return points.gather(0, best[None, :, None].expand(1, *at.shape))[0]


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
