"""Pictures of points on a sphere: the circle (d = 2), a map of equal areas (d = 3), two of more coordinates (d > 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle

from elbowroom.analysis.plots.style import MUTED


def places(z: np.ndarray, shown: Sequence[int]) -> np.ndarray:
    """Return where points z (N, d) stand in the picture, (N, 2).

    d = 3: the angle of longitude in degrees and the height, of the direction of z. Equal areas of this map are equal areas of
    the sphere (Lambert's cylindrical projection). Else the two coordinates that are shown.
    """
    if z.shape[1] != 3:
        return z[:, list(shown)]
    direction = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    return np.stack([np.degrees(np.arctan2(direction[:, 1], direction[:, 0])), direction[:, 2]], 1)


def frame(axes: Axes, d: int, shown: Sequence[int]) -> None:
    """Set limits and names of the axes, and draw the circle where there is one."""
    if d == 3:
        axes.set(xlim=(-180, 180), ylim=(-1, 1), xlabel=f"{angle(0, 1)} (degrees)", ylabel="latent 2")
        axes.set_xticks(range(-180, 181, 90))
        return
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor=MUTED, lw=0.8))
    axes.set(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), xlabel=f"latent {shown[0]}", ylabel=f"latent {shown[1]}")
    axes.set_aspect("equal")


def angle(i: int, j: int) -> str:
    """Return the name of the angle in the plane of two latents."""
    return f"angle from latent {i} to latent {j}"


def said(loc: np.ndarray, shown: Sequence[int]) -> str:
    """Say what the picture of the guide's means, (N, d), shows."""
    d = loc.shape[1]
    length = f"their mean length is {np.linalg.norm(loc, axis=1).mean():.2f}"
    if d == 3:
        what = (
            "Each dot is the direction of the mean of q(z|x) of one datum, on a map of the sphere of equal areas: a uniform "
            "prior fills it evenly; grey, draws from the prior. The longer a mean, the narrower q (1 is a point, 0 all of the "
            f"sphere): {length}."
        )
    else:
        where = "" if d == 2 else f" (here latents {shown[0]} and {shown[1]} of {d}, those with the highest rate)"
        what = (
            f"Each dot is the mean of q(z|x) of one datum{where}, which lies inside the sphere: the further out, the narrower "
            f"q; {length}. Grey, draws from the prior."
        )
    return f"{what} Where there are grey dots alone, the model's own samples look like none of these data."
