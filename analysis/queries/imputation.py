"""Imputation of missing entries by the model: p(x_mis | x_obs) = int p(x_mis | z) p(z | x_obs) dz, from draws of a posterior.

With z_s ~ p(z | x_obs), s = 1..S, and m_s, v_s mean and variance of one entry given z_s (given z the entries are independent):

    E[x | x_obs]   = mean_s m_s                        Rao-Blackwell: x itself need not be drawn
    var[x | x_obs] = mean_s v_s + var_s m_s            the law of total variance
    p(x = k | ...) = mean_s p(x = k | z_s)             for codes
    MCSE of a mean = sqrt(sum_s c_s (m_s - mean)^2) / S   c_s: how many of the S draws repeat the s-th, itself included

Median and interval of numbers are quantiles of one x_s ~ p(x | z_s) for each z_s, at positions p (S + 1) of the ordered draws:
a further draw lies inside the interval with exactly the stated probability, for any S (Hyndman and Fan 1996, definition 6,
https://doi.org/10.2307/2684934). For integer x the ends are moved outwards to draws: the interval then holds at least its
level. The randomised rank of the truth, (below + U (equal + 1)) / (S + 1), is uniform in both cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.analysis.latents.entries import EntryKind, coded, pieces
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.randomness import seeded
from elbowroom.models.columns import Column
from elbowroom.models.likelihoods.categorical import Codes
from elbowroom.models.likelihoods.missing import entrywise
from elbowroom.system.memory import ARRAY, fitting, slices
from elbowroom.system.stages import stage


@dataclass(frozen=True)
class Levels:
    """Probabilities of the codes of those missing entries that have the same number K of codes.

    Attributes:
        cells: positions among the M missing entries, (m,).
        probability: (m, K).
        error: its Monte Carlo error.
    """

    cells: Tensor
    probability: Tensor
    error: Tensor


@dataclass(frozen=True)
class Predicted:
    """The predictive distribution of M missing entries, each (M,), in the units of the data.

    Attributes:
        mean: of numbers and ordered codes, NaN for categories.
        mean_error: its Monte Carlo error.
        sd: standard deviation.
        median: NaN for categories.
        low: lower end of the central interval, NaN for categories.
        high: upper end.
        likeliest: the most probable code of binary, ordinal and categorical entries; NaN for numbers.
        rank: randomised rank of the truth in (0, 1), NaN for categories and without a truth.
        log_density: log p(truth | x_obs) of the entry alone, nats; NaN without a truth.
        log_density_joint: (n,) that of all hidden entries of a row together.
        draws: rows with x drawn at every entry, (keep, n, D), from the first z.
        levels: probabilities of codes.
    """

    mean: Tensor
    mean_error: Tensor
    sd: Tensor
    median: Tensor
    low: Tensor
    high: Tensor
    likeliest: Tensor
    rank: Tensor
    log_density: Tensor
    log_density_joint: Tensor
    draws: Tensor
    levels: Sequence[Levels] = field(default=())


# -- the predictive distribution --------------------------------------------------------------------------------------------


def worth(posterior: Posterior, references: Sequence[Posterior], source: Sequence[str]) -> Tensor:
    """Return c (S, n): the number of draws that together have the weight of one independent draw, for each draw.

    For chains: draws / smallest bulk effective sample size. For draws resampled from weights: the multiplicity of the draw.
    Then sum_s c_s (m_s - mean)^2 / S^2 is the sum over distinct draws of w^2 (m - mean)^2, the variance of a weighted mean;
    with heavy weights in the tails it is larger than the effective number of draws suggests. 1 without repetitions.
    """
    flat = posterior.draws.flatten(0, 1)
    s, n = flat.shape[:2]
    found = torch.ones(s, n, dtype=torch.float64)
    chains = {p.method: p.stats["ess_bulk_min"].double().cpu() for p in references if "ess_bulk_min" in p.stats}
    key = flat.double().cpu()
    for i, name in enumerate(source):
        if name in chains:
            found[:, i] = (s / chains[name][i].clamp(1.0, float(s))).nan_to_num(nan=1.0)
        elif key.shape[-1]:
            _, which, counts = key[:, i, 0].nan_to_num().unique(return_inverse=True, return_counts=True)
            found[:, i] = counts[which].double()
    return found


@stage("cells")
def predict_cells(
    decode: Callable[[Tensor], TorchDistribution],
    z: Tensor,
    missing: Tensor,
    kinds: Sequence[EntryKind],
    *,
    level: float,
    seed: int,
    repeats: Tensor | None = None,
    truth: Tensor | None = None,
    keep: int = 0,
) -> Predicted:
    """Describe the predictive distribution of the missing entries of n rows.

    Args:
        decode: z (s, n, d) -> p(x|z) with batch shape (s, n).
        z: draws of p(z | x_obs), (S, n, d).
        missing: (n, D), True at the M entries of flattened x that are described.
        kinds: of the D entries.
        level: probability of the central interval.
        seed: random seed.
        repeats: c (S, n) of `worth`; 1 by default.
        truth: x (n, D) with the true values of the missing entries, to be scored; elsewhere any value of the support.
        keep: number of completed draws to return.

    Raises:
        ValueError: too few draws for the level.
    """
    s, (n, width), device = len(z), missing.shape, z.device
    if (1 - level) / 2 * (s + 1) < 1:
        raise ValueError(f"{s} draws are too few for an interval of {level:.3%}")
    rows, entries = missing.nonzero().T
    values = z.new_empty(s, len(rows))  # x drawn at the missing entries
    moments, codes = _Moments(len(rows), device), dict[int, _Codes]()
    score = None if truth is None else _Score(truth, missing)
    whole = z.new_empty(keep, n, width)
    place = torch.full((n, width), -1, dtype=torch.long, device=device)
    place[missing] = torch.arange(len(rows), device=device)
    with seeded(seed), torch.no_grad():
        order = torch.randperm(s)  # so that the first draws are a random sample of all
        z = z[order]
        count = (torch.ones(s, n, dtype=torch.float64) if repeats is None else repeats[order]).to(device)
        for some in slices(s, fitting(n * width, ARRAY)):
            p = decode(z[some])
            shape = (some.stop - some.start, n)
            of_cells = count[some][:, rows]
            drawn, mean, variance = (z.new_full((*shape, width), torch.nan) for _ in range(3))
            for number, (index, part) in enumerate(pieces(p)):
                for out, value in ((drawn, part.sample()), (mean, part.mean), (variance, part.variance)):
                    out[..., index] = value.reshape(*shape, len(index)).to(z.dtype)
                if isinstance(part, Codes) and bool((there := missing[:, index]).any()):
                    probability = part.probs.reshape(*shape, len(index), -1)[:, there]
                    if number not in codes:
                        codes[number] = _Codes(index, there, place[:, index][there], probability.shape[1:], device)
                    codes[number].add(probability, of_cells)
            values[some] = drawn[:, missing]
            moments.add(mean[:, missing], variance[:, missing], of_cells)
            if some.start < keep:
                whole[some] = drawn[: keep - some.start]
            if score is not None:
                score.add(p)
        of = lambda *names: torch.tensor([kind in names for kind in kinds], device=device)[entries]
        low, median, high = central_interval(values, ~of("number"), level)
        nothing = torch.full_like(low, torch.nan).double()
        rank = nothing if truth is None else _rank(values, truth[missing])
    mean, error, sd = moments.found(s)
    likeliest = torch.where(of("binary"), (mean > 0.5).double(), nothing)
    levels = [one.levels(s) for one in codes.values()]
    for one in levels:
        likeliest[one.cells] = one.probability.argmax(-1).double()
    blank = lambda value: torch.where(of("categorical"), torch.nan, value.double())
    return Predicted(
        mean=blank(mean),
        mean_error=blank(error),
        sd=blank(sd),
        median=blank(median),
        low=blank(low),
        high=blank(high),
        likeliest=likeliest,
        rank=blank(rank),
        log_density=nothing if score is None else score.cells - math.log(s),
        log_density_joint=nothing.new_full((n,), torch.nan) if score is None else score.rows - math.log(s),
        draws=whole,
        levels=levels,
    )


class _Score:
    """Log of the sum over draws of p(truth | z), for each entry and for all entries of a row together."""

    def __init__(self, truth: Tensor, missing: Tensor) -> None:
        self.truth, self.missing = truth, missing
        start = truth.new_full((1,), -torch.inf, dtype=torch.float64)
        self.cells, self.rows = start.expand(int(missing.sum())), start.expand(len(truth))

    def add(self, p: TorchDistribution) -> None:
        """Add the draws behind p(x|z)."""
        given = entrywise(p, self.truth.reshape(len(self.truth), *p.event_shape)).double()
        given = given.reshape(*given.shape[:2], -1)
        self.cells = torch.logaddexp(self.cells, given[:, self.missing].logsumexp(0))
        self.rows = torch.logaddexp(self.rows, torch.where(self.missing, given, 0.0).sum(-1).logsumexp(0))


class _Moments:
    """Sums over draws of the mean and variance of entries given z, centred at a first guess."""

    def __init__(self, total: int, device: torch.device) -> None:
        self.about: Tensor | None = None
        self.sums = _Sums(torch.Size((total,)), device)
        self.within = torch.zeros(total, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Add draws (s, M), each with its c."""
        mean = mean.double()
        self.about = mean.mean(0) if self.about is None else self.about
        self.sums.add(mean - self.about, count)
        self.within += variance.double().sum(0)

    def found(self, s: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, its Monte Carlo error, and standard deviation."""
        assert self.about is not None
        shift, between, error = self.sums.found(s)
        return self.about + shift, error, (self.within / s + between).sqrt()


class _Codes:
    """Sums over draws of the probabilities of codes."""

    def __init__(self, index: Tensor, there: Tensor, cells: Tensor, shape: torch.Size, device: torch.device) -> None:
        self.index, self.there, self.cells = index, there, cells
        self.sums = _Sums(shape, device)

    def add(self, probability: Tensor, count: Tensor) -> None:
        """Add draws (s, m, K), and the c of all entries (s, M)."""
        self.sums.add(probability.double(), count[:, self.cells, None])

    def levels(self, s: int) -> Levels:
        """Return the probabilities and their errors."""
        mean, _, error = self.sums.found(s)
        return Levels(self.cells, mean, error)


class _Sums:
    """Sums over draws of values and their squares, and the same weighted with the c of the draws."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        zeros = lambda: torch.zeros(shape, dtype=torch.float64, device=device)
        self.first, self.second, self.of_ones, self.of_first, self.of_second = (zeros() for _ in range(5))

    def add(self, value: Tensor, count: Tensor) -> None:
        """Add draws (s, ...) and their c, of the same or a broadcastable shape."""
        self.first += value.sum(0)
        self.second += value.square().sum(0)
        self.of_ones += count.sum(0)
        self.of_first += (count * value).sum(0)
        self.of_second += (count * value.square()).sum(0)

    def found(self, s: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean, the variance over draws, and the Monte Carlo error of the mean."""
        mean, free = self.first / s, max(1, s - 1)
        variance = ((self.second - s * mean.square()) / free).clamp_min(0.0)
        spread = (self.of_second - 2 * mean * self.of_first + mean.square() * self.of_ones).clamp_min(0.0)
        return mean, variance, (spread / (s * free)).sqrt()


def central_interval(values: Tensor, whole: Tensor, level: float) -> list[Tensor]:
    """Return low, median and high of draws (S, M): at p (S + 1), interpolated, or at a draw where values are `whole` (M,)."""
    s, found = len(values), [torch.empty_like(values[0]) for _ in range(3)]
    for columns in torch.arange(values.shape[1], device=values.device).split(fitting(s, ARRAY)):
        ordered = values[:, columns].sort(0).values
        for out, at in zip(found, ((1 - level) / 2, 0.5, (1 + level) / 2), strict=True):
            place = at * (s + 1) - 1
            below, above = (min(max(f(place), 0), s - 1) for f in (math.floor, math.ceil))
            between = torch.lerp(ordered[below], ordered[above], place - math.floor(place))
            out[columns] = torch.where(whole[columns], ordered[above if at > 0.5 else below], between)
    return found


def _rank(values: Tensor, truth: Tensor) -> Tensor:
    """Return the randomised rank of the truth (M,) among draws (S, M), uniform in (0, 1) if both have one distribution."""
    below, equal = (values < truth).sum(0), (values == truth).sum(0)
    return (below + torch.rand(len(truth), dtype=torch.float64, device=values.device) * (equal + 1)) / (len(values) + 1)


# -- errors, against entries that were hidden -------------------------------------------------------------------------------


def losses(truth: np.ndarray, guess: np.ndarray, columns: Sequence[Column], ranges: np.ndarray) -> np.ndarray:
    """Return the loss of each entry: squared, 0/1 or absolute; NaN where truth (N, D) is NaN.

    Errors are HI-VAE's (`error_computation` in read_functions.py of https://github.com/probabilistic-learning/HI-VAE): for
    real, positive and count columns the root mean squared error over the range of the column, for categorical ones the share of
    wrong codes, for ordinal ones mean |code - guessed code| / number of codes.
    """
    off = guess - truth
    out = np.empty_like(truth)
    for j, column in enumerate(columns):
        if column.kind == "ordinal":
            out[:, j] = np.abs(off[:, j]) / column.levels
        elif coded(column):
            out[:, j] = np.where(np.isnan(off[:, j]), np.nan, off[:, j] != 0)
        else:
            out[:, j] = (off[:, j] / ranges[j]) ** 2
    return out


def errors(loss: np.ndarray, columns: Sequence[Column], weights: np.ndarray | None = None) -> np.ndarray:
    """Return the error of each column, (D,); for row weights (B, N), (B, D)."""
    there = ~np.isnan(loss)
    w = np.ones(len(loss)) if weights is None else weights
    mean = (w @ np.where(there, loss, 0.0)) / (w @ there.astype(float))
    numbers = np.array([not coded(column) for column in columns])
    return np.where(numbers, np.sqrt(mean), mean)


def share(held: np.ndarray) -> tuple[float, float]:
    """Return the share of the cells (n, D; NaN where there is none) that hold, and its standard error, clustered by rows.

    Cells of a row are dependent, so that the binomial error would be too small: se^2 = sum_i (sum_j (h_ij - share))^2 / M^2
    over the n rows i. Where all cells hold or none, this would be 0: the error is then that of a share p = (n share + 1) / (n +
    2) of n + 2 rows.
    """
    there = ~np.isnan(held)
    m = int(there.sum())
    if not m:
        return math.nan, math.nan
    mean = float(np.nansum(held) / m)
    by_row = np.where(there, held - mean, 0.0).sum(1)
    rows = int(there.any(1).sum())
    if mean in (0.0, 1.0) and not by_row.any():
        p = (rows * mean + 1) / (rows + 2)
        return mean, math.sqrt(p * (1 - p) / (rows + 2))
    return mean, float(np.sqrt(np.square(by_row).sum()) / m) * math.sqrt(rows / max(1, rows - 1))
