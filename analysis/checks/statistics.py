"""Statistics of data that are sensitive to a wrong likelihood, and their exact p-values against replicates.

Under the null the observed element and its R replicates are exchangeable. Any symmetric function of all R + 1 keeps p-values
exact. Each statistic is therefore put in units of its spread, separately above and below the median because most are skewed.
Over a family of statistics the largest such deviation is compared with the largest of each replicate (single-step maxT of
Westfall and Young 1993, "Resampling-based multiple testing"). It is exact for any dependence; Bonferroni or Holm corrections of
p-values that are multiples of 1/(R+1) could not reach a small level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["binary", "counts", "real"]
EffectKind = Literal["difference", "sd", "skewness", "kurtosis", "relative", "largest", "nats"]  # see `thresholds.EFFECTS`
LOGARITHMS = ("largest",)  # statistics that are logarithms: their effect is a relative difference

COLUMNS = 64  # largest number of columns used one by one and in pairs


@dataclass(frozen=True)
class Statistic:
    """A number T(x), or a vector; a vector is reduced to its distance from its mean over all replicates and the data.

    Attributes:
        name: the word in tables.
        words: a description.
        value: x (N, D), NaN where missing -> a number (), or a vector.
        kind: the unit of its effect; each unit has its own threshold.
    """

    name: str
    words: str
    value: Callable[[Tensor], Tensor]
    kind: EffectKind = "difference"


def kind_of(x: Tensor) -> Kind:
    """Infer the type of data (N, D) from their values."""
    seen = x[x.isfinite()]
    if bool(((seen == 0) | (seen == 1)).all()):
        return "binary"
    return "counts" if bool(((seen >= 0) & (seen == seen.round())).all()) else "real"


def some_columns(width: int, device: torch.device) -> Tensor:
    """Return the indices of at most 64 columns, evenly spaced: the choice does not depend on the data."""
    return torch.linspace(0, width - 1, min(width, COLUMNS), device=device).round().long()


def _moment(x: Tensor, power: int) -> Tensor:
    """Return the standardised moment of each column, averaged over columns that vary."""
    mean = x.nanmean(0)
    second = (x - mean).square().nanmean(0)
    each = (x - mean).pow(power).nanmean(0) / second.pow(power / 2)
    return _over_columns(each)


def _over_columns(each: Tensor) -> Tensor:
    fine = each[each.isfinite()]
    return fine.mean() if len(fine) else each.new_zeros(())


def _dispersion(x: Tensor) -> Tensor:
    mean = x.nanmean(0)
    return _over_columns((x - mean).square().nanmean(0) / mean)


def _mass(x: Tensor) -> Tensor:
    return x.nan_to_num().sum(1)


def _largest(x: Tensor) -> Tensor:
    centred = x - x.nanmean(0)
    spread = centred.square().nanmean(0).sqrt()
    return (centred.abs() / torch.where(spread > 0, spread, torch.inf)).nan_to_num().amax()


def correlations(x: Tensor) -> Tensor:
    """Return the correlation of each pair of columns over the data that have both, (D (D - 1) / 2,); 0 where undefined."""
    there = x.isfinite().to(x.dtype)
    centred = (x - x.nanmean(0)).nan_to_num()
    spread = (centred.square().sum(0) / there.sum(0)).sqrt()
    scaled = (centred / torch.where(spread > 0, spread, torch.inf)).nan_to_num()
    both = there.mT @ there
    matrix = (scaled.mT @ scaled) / both.clamp_min(1)
    j, k = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    return matrix[j, k]


def _centres(x: Tensor) -> Tensor:
    return x.nanmean(0).nan_to_num()


def _spreads(x: Tensor) -> Tensor:
    return (x - x.nanmean(0)).square().nanmean(0).sqrt().nan_to_num()


def suited(x: Tensor) -> list[Statistic]:
    """Return the statistics that suit the type of the data x (N, D)."""
    kind, columns = kind_of(x), some_columns(x.shape[1], x.device)
    found = {
        "binary": [Statistic("ones", "share of ones", lambda x: x.nanmean(), "relative")],
        "counts": [
            Statistic("zeros", "share of zeros", lambda x: (x == 0).double().sum() / x.isfinite().sum(), "relative"),
            Statistic("dispersion", "variance / mean of a column, averaged over columns", _dispersion, "relative"),
            Statistic("largest", "largest count + 1 (its logarithm)", lambda x: x.nan_to_num().amax().log1p(), "largest"),
        ],
        "real": [
            Statistic(
                "sd", "standard deviation of a column, averaged over columns", lambda x: _over_columns(_spreads(x)), "relative"
            ),
            Statistic("skewness", "skewness of a column, averaged over columns", lambda x: _moment(x, 3), "skewness"),
            Statistic("kurtosis", "kurtosis of a column, averaged over columns", lambda x: _moment(x, 4), "kurtosis"),
            Statistic(
                "largest",
                "farthest entry, in standard deviations of its column (its logarithm)",
                lambda x: _largest(x).log(),
                "largest",
            ),
        ],
    }[kind]
    spread = _spreads(x)  # a constant: p-values do not change, and the effect has no unit of measurement
    unit = torch.ones_like(spread) if kind == "binary" else torch.where(spread > 0, spread, 1.0)
    means = "means of columns: distance from the replicates'"
    found.append(Statistic("column_means", means, lambda x: _centres(x) / unit, "difference" if kind == "binary" else "sd"))
    if x.shape[1] > 1:
        pairs = lambda x: correlations(x[:, columns])
        found += [
            Statistic(
                "mass_sd",
                "standard deviation over data of the sum of a datum's entries",
                lambda x: _mass(x).std(),
                "relative",
            ),
            Statistic("correlation", "mean |correlation| of pairs of columns", lambda x: pairs(x).abs().mean()),
            Statistic("correlations", "correlations of pairs of columns: distance from the replicates'", pairs),
        ]
    return found


@dataclass(frozen=True)
class Judged:
    """One statistic of the data compared with those of R replicates.

    Attributes:
        value: of the data.
        null: of the replicates, (R,).
        p_value: (1 + number of replicates that deviate at least as much) / (1 + R), two-sided (of distances: one-sided).
        p_family: the same over all statistics of the family: the probability that any of them deviates as much.
        effect: difference from the mean of the replicates, in the unit of the statistic. For `relative` it is divided by that
            mean. Where the statistic is a logarithm it is the relative difference of the numbers from their geometric mean. For
            a vector it is the root-mean-square difference of its components, corrected for the replicates' own spread.
    """

    value: float
    null: Tensor
    p_value: float
    p_family: float
    effect: float


def judge(
    values: Mapping[str, Tensor], *, kinds: Mapping[str, EffectKind] | None = None, one_sided: frozenset[str] = frozenset()
) -> dict[str, Judged]:
    """Compare element 0, the data, with elements 1..R, its replicates.

    Args:
        values: name -> (R + 1,), or (R + 1, K) for a vector, which is reduced to the root-mean-square distance from the mean
            over all R + 1, in units of each component's spread.
        kinds: units of the effects, by name; `difference` by default.
        one_sided: names of statistics of which only large values contradict the model; vectors always are one-sided.

    Returns:
        The judgement by name; a statistic that is the same in all elements has p-values of 1.
    """
    scalar = {name: _distance(t.double()) if t.dim() == 2 else t.double() for name, t in values.items()}
    score = {name: _deviation(t, values[name].dim() == 2 or name in one_sided) for name, t in scalar.items()}
    if not score:
        return {}
    worst = torch.stack(list(score.values())).amax(0)
    rank = lambda others, mine: (1 + int((others[1:] >= mine).sum())) / len(others)
    found = {}
    for name, value in scalar.items():
        mine = score[name][0]
        effect = _effect(values[name].double(), (kinds or {}).get(name, "difference"))
        found[name] = Judged(value[0].item(), value[1:], rank(score[name], mine), rank(worst, mine), effect)
    return found


def _effect(value: Tensor, kind: EffectKind) -> float:
    off, null = value[0] - value[1:].mean(0), value[1:]
    if value.dim() == 2:
        return (off.square() - null.var(0)).mean().clamp_min(0).sqrt().item()
    if kind in LOGARITHMS:
        return off.expm1().item()
    return (off / null.mean().abs()).item() if kind == "relative" else off.item()


def _distance(vectors: Tensor) -> Tensor:
    centre, spread = vectors.mean(0), vectors.std(0)
    scaled = (vectors - centre) / torch.where(spread > 0, spread, torch.inf)
    return scaled.square().mean(1).sqrt()


def _deviation(value: Tensor, one_sided: bool) -> Tensor:
    """Return each element's deviation from the median, in units of that of the others on the same side of it."""
    middle = value.nanmedian().nan_to_num()
    off = torch.where(value.isnan(), 0.0, value - middle).clamp(-1e100, 1e100)
    off = torch.where(off.abs() <= 1e-12 * middle.abs(), 0.0, off)  # rounding
    scaled = torch.zeros_like(off)
    for side in (off > 0, off < 0):
        square = off[side].square()
        others = ((square.sum() - square).clamp_min(0) / max(1, len(square) - 1)).sqrt()
        scaled[side] = off[side] / others.clamp_min(1e-6 * off[side].abs())
    return scaled if one_sided else scaled.abs()
