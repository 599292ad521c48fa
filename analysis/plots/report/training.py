"""The figure of the training, from `history.csv`."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from elbowroom.analysis.plots import style
from elbowroom.analysis.plots.style import Absent, Plot, styled


@styled
def training(history: pd.DataFrame | None) -> Plot | Absent:
    """Draw training and validation ELBO, learning rate and KL weight over epochs."""
    if history is None or not len(history):
        return Absent("training", "The run folder has no history.csv: the model was not fitted by Elbowroom.")
    epoch = history["epoch"].to_numpy()
    train, validation = history["train_elbo"].to_numpy(float), history["validation_elbo"].to_numpy(float)
    figure = style.canvas(style.WIDE, 3.7, "ELBO, learning rate and KL weight by epoch")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    axes.plot(epoch, train, color=style.MUTED, label="training ELBO (mean over the epoch's steps)")
    judged = bool(np.isfinite(validation).any())
    full = history["kl_weight"].to_numpy(float) >= 1
    best = int(np.nanargmax(np.where(full, validation, -np.inf))) if judged and full.any() else len(history) - 1
    if judged:
        axes.plot(epoch, validation, color=style.EXACT, label="validation ELBO (end of epoch)")
        axes.plot(epoch[best], validation[best], "o", color=style.GUIDE, markersize=7, markeredgecolor=style.PAPER, zorder=5)
        axes.annotate(
            f"weights kept: epoch {epoch[best]}, {style.say(validation[best], 4)} nats",
            (epoch[best], validation[best]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="right" if best > len(epoch) / 2 else "left",
            va="top",
            color=style.GUIDE,
            fontsize=8,
        )
    axes.set_ylabel("ELBO (nats per datum)")
    hidden = _clip_start(axes, np.concatenate([train, validation]), train)
    axes.legend(loc="lower right", ncols=2, bbox_to_anchor=(1, 1.0), borderaxespad=0.2)
    rate, weight = history["learning_rate"].to_numpy(float), history["kl_weight"].to_numpy(float)
    below.plot(epoch, rate / rate.max(), color=style.INK, label=f"learning rate / {rate.max():.2g}")
    below.plot(epoch, weight, color=style.ALARM, linestyle="--", label="KL weight")
    below.set(xlabel="epoch", ylabel="relative", ylim=(-0.08, 1.15), yticks=[0, 1])
    below.set_xlim(epoch[0] - 0.01 * len(epoch), epoch[-1] + 0.01 * len(epoch))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.legend(loc="lower right", ncols=2, bbox_to_anchor=(1, 1.0), borderaxespad=0.2)
    return Plot("training", figure, _training_alt(judged), _training_caption(history, best, judged, hidden), wide=True)


def _training_alt(judged: bool) -> str:
    curves = "training and validation ELBO" if judged else "training ELBO"
    return f"Line chart of {curves} by epoch, above a line chart of learning rate and KL weight."


def _clip_start(axes: Axes, values: np.ndarray, train: np.ndarray) -> int:
    """Hide the first tenth of the training where it would flatten the rest; return the number of hidden epochs."""
    settled = train[len(train) // 10 :]
    finite = values[np.isfinite(values)]
    low, high = settled[np.isfinite(settled)].min(), finite.max()
    low -= 0.08 * (high - low)
    if low <= finite.min() or high <= low:
        return 0
    axes.set_ylim(low, high + 0.06 * (high - low))
    return int((train < low).sum())


def _training_caption(history: pd.DataFrame, best: int, judged: bool, hidden: int) -> str:
    train, validation = history["train_elbo"].to_numpy(float), history["validation_elbo"].to_numpy(float)
    epochs, seconds = len(history), float(history["seconds"].iloc[-1])
    start = f" The first {style.count(hidden, 'epoch', 'epochs')} lie below the axis." if hidden else ""
    if not judged:
        return (
            f"{epochs} epochs in {style.say(seconds)} s. There were no validation data, so the last weights were kept and "
            f"over-fitting could not be seen.{start}"
        )
    tail = max(1, epochs // 10)
    gain = float(np.nanmean(validation[-tail:]) - np.nanmean(validation[-2 * tail : -tail])) if epochs >= 4 else math.nan
    over = float(train[best] - validation[best])
    if not math.isfinite(gain):
        trend = ""
    elif gain > 0.1:
        trend = (
            f" Validation ELBO still rose by {style.say(gain)} nats between the last two tenths of the training: more epochs "
            "would probably help."
        )
    elif gain < -0.1:
        trend = f" It then fell by {style.say(-gain)} nats between the last two tenths of the training: the model over-fits."
    else:
        trend = f" It had levelled off: the last tenth of the training changed it by {style.say(gain)} nats."
    side = f"{style.say(abs(over))} nats {'below' if over >= 0 else 'above'} training ELBO"
    return (
        f"Validation ELBO is highest at epoch {history['epoch'].iloc[best]} of {epochs} ({style.say(validation[best], 4)} nats "
        f"per datum, {side}); those weights were kept.{trend}{start}"
    )
