"""The common style of the figures, and drawing helpers.

Figures are `matplotlib.figure.Figure` objects, made under a temporary style: no global state changes, no window system is
needed, and the user's matplotlibrc has no effect. Matplotlib is imported when something is drawn: a report without figures can
do without. Colours are those of Okabe and Ito, which are distinguishable with the common
kinds of colour blindness; no information is in colour alone.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK, MUTED, FAINT, PAPER = "#17212b", "#5d6b78", "#dfe4e9", "#ffffff"
EXACT, GUIDE, ALARM = "#0072B2", "#D55E00", "#A3195B"
DPI = 200  # figures are laid out for 100 pixels per inch and shown at half their pixels
WIDE, HALF = 10.4, 5.1  # inches

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "figure.dpi": 100,
    "figure.facecolor": PAPER,
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
    "savefig.dpi": DPI,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.facecolor": PAPER,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "image.interpolation": "nearest",
}

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Plot:
    """A figure with its texts.

    Attributes:
        name: stem of its file in `figures/`.
        figure: the drawing, with its title.
        alt: a description of the figure for screen readers.
        caption: the conclusion from its numbers.
        wide: whether it needs the full width of a page.
    """

    name: str
    figure: Figure
    alt: str
    caption: str
    wide: bool = False

    def write(self, path: Path) -> None:
        """Write the figure as PNG. It is laid out twice: with the room that the first time leaves, ticks may become wider."""
        self.figure.draw_without_rendering()
        self.figure.savefig(path, dpi=DPI)


@dataclass(frozen=True)
class Absent:
    """A figure that could not be made, with the reason in one sentence."""

    name: str
    reason: str


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function under the project's style, and restore the user's style."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import style

        with style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return inner


def canvas(width: float, height: float, title: str) -> Figure:
    """Return an empty figure of `width` by `height` inches with a title at its upper left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.06, hspace=0.06)  # type: ignore[union-attr,call-arg]
    heading(figure, title, width)
    return figure


def heading(figure: Figure, title: str, width: float) -> None:
    """Put a bold title at the figure's upper left."""
    figure.suptitle(title, x=0.06 / width, ha="left")


@functools.cache
def tiles() -> Colormap:
    """Return the colours of images, from white to black."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("elbowroom_tiles", [PAPER, "#9fb0bf", INK])


def bare(axes: Axes) -> None:
    """Remove the frame, grid and ticks of axes that hold tiles."""
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def say(value: float, digits: int = 3) -> str:
    """Format a number with `digits` significant digits and a real minus sign."""
    if not math.isfinite(value):
        return "not known" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 1e6:
        text = f"{value:.1e}"
    else:
        digits = digits if size >= 0.01 else min(digits, 2)
        decimals = max(0, digits - 1 - math.floor(math.log10(size)))
        text = f"{value:.{min(decimals, 3) if size >= 0.01 else decimals}f}"
    return text.replace("-", "−")


def percent(part: float, whole: float = 1.0) -> str:
    """Format a share; 100 % and 0 % are used only for all and for none."""
    if not whole or not math.isfinite(part):
        return "not known"
    share = part / whole
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(100 * share, 0.1), 99.9):.{1 if min(share, 1 - share) < 0.0995 else 0}f}%"


def count(n: int, noun: str = "datum", plural: str = "data") -> str:
    """Format a number with its noun."""
    return f"{n:,} {noun if n == 1 else plural}"


def tone(x: np.ndarray) -> tuple[float, float]:
    """Return the values of white and black: 0 and 1 where they contain the data, else the 1st to 99th percentile."""
    x = x[np.isfinite(x)]
    if not x.size or (x.min() >= 0 and x.max() <= 1):
        return 0.0, 1.0
    low, high = np.percentile(x, [1, 99])
    return float(low), float(high if high > low else low + 1)


def mosaic(images: np.ndarray, gap: int = 1) -> np.ma.MaskedArray:
    """Arrange images (rows, columns, height, width) in one array, `gap` masked pixels apart."""
    rows, columns, height, width = images.shape
    sheet = np.full((rows, height + gap, columns, width + gap), np.nan)
    sheet[:, :height, :, :width] = images.transpose(0, 2, 1, 3)
    flat = sheet.reshape(rows * (height + gap), columns * (width + gap))
    return np.ma.masked_invalid(flat[: flat.shape[0] - gap, : flat.shape[1] - gap])


def show_tiles(axes: Axes, images: np.ndarray, limits: tuple[float, float]) -> None:
    """Draw images (rows, columns, height, width) as unit squares, the first row at the top.

    Tile (i, j) has its centre at x = j, y = i, for any resolution of the images.
    """
    zoom = math.ceil(32 / max(images.shape[-2:]))
    images = images.repeat(zoom, -1).repeat(zoom, -2)
    rows, columns, height, width = images.shape
    gap = max(1, round(0.06 * max(height, width)))
    sheet = mosaic(images, gap)
    right, bottom = columns - 0.5 - gap / (width + gap), rows - 0.5 - gap / (height + gap)
    shift_x, shift_y = 0.5 * gap / (width + gap), 0.5 * gap / (height + gap)
    extent = (-0.5 + shift_x, right + shift_x, bottom + shift_y, -0.5 + shift_y)
    bare(axes)
    axes.set_facecolor("#eef1f4")
    axes.imshow(sheet, cmap=tiles(), vmin=limits[0], vmax=limits[1], extent=extent, aspect=height / width)


def thumbnail(image: np.ndarray, limits: tuple[float, float]) -> bytes:
    """Return one image (height, width) as a small PNG at its own resolution."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, image, vmin=limits[0], vmax=limits[1], cmap=tiles(), format="png")
    return buffer.getvalue()


def region_levels(log_density: np.ndarray, masses: Sequence[float] = (0.5, 0.9)) -> list[float]:
    """Return the log densities that bound the highest-density regions of the given masses, on an evenly spaced grid."""
    flat = np.sort(log_density, axis=None)[::-1]
    mass = np.cumsum(np.exp(flat - flat[0]))
    return [float(flat[min(int(np.searchsorted(mass, m * mass[-1])), flat.size - 1)]) for m in masses]


def mass_inside(log_density: np.ndarray, inside: np.ndarray) -> float:
    """Return the share of a gridded density that lies where `inside` is True."""
    weight = np.exp(log_density - log_density.max())
    return float(weight[inside].sum() / weight.sum())
