"""Whether log p(x) of a model is that of a mass or of a density, and its number of entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from elbowroom.models.vae import VAE

MASS = "mass"


def kind(vae: VAE) -> str:
    """Say whether p(x|z) is a mass or a density; for a table with both, of which columns."""
    with torch.no_grad():
        parameter = next(iter(vae.decoder.parameters()), torch.zeros(()))
        p = vae.likelihood(torch.zeros(1, vae.likelihood.param_dim, dtype=parameter.dtype, device=parameter.device))
    parts = getattr(p, "parts", None)
    if not isinstance(parts, list):
        return MASS if _discrete(p) else "density"
    masses = sorted(str(int(i)) for index, part in parts if _discrete(part) for i in index)
    return f"masses of columns {', '.join(masses)}, densities of the others" if masses else "density"


def entries(vae: VAE, x: Tensor) -> int | None:
    """Return the number of entries of one datum of x (N, *event), for bits per entry, if p(x|z) is a mass of complete data.

    None if p(x|z) has a density, or if entries are missing, so that data have different numbers of them.
    """
    whole = not x.is_floating_point() or not bool(x.isnan().any())
    return x[0].numel() if kind(vae) == MASS and whole else None


def _discrete(p: Any) -> bool:
    return bool(getattr(p.support, "is_discrete", False))
