"""Single precision for chains and importance sampling, if it is sufficient: it halves the time of log p(x, z).

It is sufficient for a datum if the rounding error of log p(x, z) varies between draws by less than 1e-3 nats, too little to
affect accept/reject steps and weights, and shifts log p(x) by less than 5e-3 nats, a small part of the error of any estimate;
and if z is not so far from zero, in posterior standard deviations, that rounding changes it.
"""

from __future__ import annotations

from typing import Literal

import torch

from elbowroom.inference.mcmc.normals import Normals
from elbowroom.inference.target.log_joint import LogJoint

Precision = Literal["auto", "single", "double"]

DRAWS = 16
NOISE, SHIFT = 1e-3, 5e-3  # nats: standard deviation of the rounding errors, and their mean
GRAIN = 1e-3  # posterior sd, as a share of the mean


def in_precision(log_joint: LogJoint, q: Normals, wanted: Precision, generator: torch.Generator) -> LogJoint:
    """Return the densities in single precision if asked for, or if sufficient for every datum at draws of q.

    `auto` measures the rounding; `single` and `double` do not.
    """
    if wanted == "double" or log_joint.dtype != torch.float64:
        return log_joint
    try:
        single = log_joint.converted(torch.float32)
        z = q.sample(DRAWS, generator).to(log_joint.probe_points.dtype)
        value, gradient = single.grad(z.float())
        if value.dtype != torch.float32 or gradient.dtype != torch.float32:
            raise TypeError("the program itself holds double-precision numbers")
        noise = value.double() - log_joint(z.float().double())
    except (RuntimeError, TypeError, ValueError) as error:
        if wanted == "single":
            raise
        log_joint.note(f"all runs in double precision: {str(error).splitlines()[0][:120]}")
        return log_joint
    if wanted == "single":
        return single
    coarse = (q.root.square().sum(-1).sqrt() < GRAIN * q.loc.abs()).any()
    quiet = noise.std(0).nan_to_num(nan=torch.inf).le(NOISE) & noise.mean(0).abs().nan_to_num(nan=torch.inf).le(SHIFT)
    return single if bool(quiet.all() & ~coarse) and not bool(single.rounded(z)[0].any()) else log_joint
