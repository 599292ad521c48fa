"""Whether log p(x) of a model is that of a mass or of a density, and of how many entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from elbowroom.models.vae import VAE

MASS = "mass"


def kind(vae: VAE) -> str:
    """Say whether p(x|z) is a mass or a density; of a table with both, for which columns."""
    with torch.no_grad():
        parameter = next(iter(vae.decoder.parameters()), torch.zeros(()))
        p = vae.likelihood(torch.zeros(1, vae.likelihood.param_dim, dtype=parameter.dtype, device=parameter.device))
    parts = getattr(p, "parts", None)
    if not isinstance(parts, list):
        return MASS if _discrete(p) else "density"
    masses = sorted(str(int(i)) for index, part in parts if _discrete(part) for i in index)
    return f"masses of columns {', '.join(masses)}, densities of the others" if masses else "density"


def entries(vae: VAE, x: Tensor) -> int | None:
    """Return the entries of one datum, where log p(x) is the length of a code for all of them: bits are for these.

    Args:
        vae: the model.
        x: the data, (N, *event).

    Returns:
        None where p(x|z) has a density, or entries are missing, so that data have different numbers of them.
    """
    whole = not x.is_floating_point() or not bool(x.isnan().any())
    return x[0].numel() if kind(vae) == MASS and whole else None


def _discrete(p: Any) -> bool:
    return bool(getattr(p.support, "is_discrete", False))
