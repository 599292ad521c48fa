"""`er.adapt.pyroved`: iVAE of pyroVED, with or without its coordinates.

    (phi, t, s, z) ~ N(0, I): an angle, a shift, a scale, those that `invariances` names, and the code z
    x_j ~ sampler(decoder(u_j, z)),  u_j = (1 + s s0) R(phi) v_j + t t0        at the pixel's coordinates v_j
    q = N(mu(x), sigma(x)^2), a diagonal normal over all of them

pyroVED's own `iVAE.model` and `guide` are Pyro programs; this one draws the same latents from the same networks and computes
the same density, without the branch on the angle and the writes in place that keep many draws from being evaluated together.

An angle has period 2 pi under a normal prior, and a turned or shifted image often looks like another: the posterior then has
many modes, which a normal guide and chains between them do not cover. Expect bounds of log p(x), and data that no reference
certifies.

Ziatdinov, Kalinin (2021), https://arxiv.org/abs/2104.10180; Bepler, Zhong, Kelley, Brignole, Berger (2019),
https://arxiv.org/abs/1909.11663; read at pyroVED 0.3.0 (2026-12).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from elbowroom.adapt.pair import Pair, Programs, at_many, rows_of
from elbowroom.adapt.peers.kinds import of_library
from elbowroom.errors import UserError

WHERE = "adapt.pyroved"
MODES = "angles, shifts and scales give many modes: expect bounds of log p(x), and data that no reference certifies"


def pyroved(model: Any) -> Pair:
    """Make a Pyro pair of an iVAE.

    Sites: `z` (angle, shift, scale and code, in this order, as in pyroVED's `encode`) and `x` (pixels, flat). -ELBO is the
    model's own loss per datum at scale_factor 1.

    Args:
        model: a `pyroved.models.iVAE`.

    Returns:
        The pair: `er.audit(*pair, x)`, for x (N, *data_dim); `er.audit(*pair, x, y)` where `c_dim` is set.

    Raises:
        UserError: another class of pyroVED.
    """
    if not of_library(model, "pyroved", ("iVAE",)):
        raise UserError(f"{WHERE}: {type(model).__name__} is not supported; supported is pyroved.models.iVAE")
    parts = _Parts(model)
    programs = Programs(parts.p_z, parts.q_z, parts.p_x, rows_of)
    return Pair(programs.model, programs.guide, [MODES] if model.coord > 0 else [])


class _Parts:
    """Prior, guide and likelihood by the model's networks."""

    def __init__(self, model: Any) -> None:
        self.vae = model

    def q_z(self, x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        """q(z|x), or q(z|x, y)."""
        self._check(y)
        loc, scale = self.vae.encoder_z(x if y is None else [x.reshape(len(x), -1), y])  # pyroVED takes flat rows beside y
        return {"z": dist.Normal(loc, scale).to_event(1)}

    def p_z(self, x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        """p(z) = N(0, I)."""
        zero = x.new_zeros(self.vae.z_dim)
        return {"z": dist.Normal(zero, torch.ones_like(zero)).to_event(1)}

    def p_x(self, z: Mapping[str, Tensor], x: Tensor, y: Tensor | None = None) -> tuple[Any, Tensor]:
        """p(x|z), and the pixels in a row."""
        pixels = x.reshape(len(x), -1)
        if y is None:
            return self.vae.sampler_d(at_many(self._decoded, z["z"])), pixels
        return self.vae.sampler_d(self._decoded(z["z"], y)), pixels

    def _decoded(self, z: Tensor, *y: Tensor) -> Tensor:
        """Decode latents (M, d) to pixels in a row, (M, pixels)."""
        grid: list[Tensor] = []
        if self.vae.coord > 0:
            moved, z = self._moved(z)
            grid = [moved]
        return self.vae.decoder(*grid, torch.cat([z, *y], -1)).reshape(len(z), -1)

    def _moved(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels' coordinates, moved by the first latents, (N, pixels, 1 or 2), and the other latents."""
        grid = self.vae.grid.expand(len(z), *self.vae.grid.shape)
        if self.vae.ndim == 1:
            return grid + (z[:, :1] * self.vae.t_prior)[:, None], z[:, 1:]
        if "r" in self.vae.invariances:
            cos, sin = z[:, 0].cos(), z[:, 0].sin()
            turn = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
            grid, z = grid @ turn, z[:, 1:]
        shift = None
        if "t" in self.vae.invariances:
            shift, z = (z[:, :2] * self.vae.t_prior)[:, None], z[:, 2:]
        if "s" in self.vae.invariances:
            grid, z = grid * (1 + self.vae.sc_prior * z[:, 0])[:, None, None], z[:, 1:]
        return (grid if shift is None else grid + shift), z

    def _check(self, y: Tensor | None) -> None:
        if (y is None) != (self.vae.c_dim == 0):
            need = f"y (N, {self.vae.c_dim}) as a second argument" if y is None else "x alone"
            raise UserError(f"{WHERE}: this iVAE has c_dim={self.vae.c_dim}; it takes {need}")
