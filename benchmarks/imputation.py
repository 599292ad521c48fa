"""`python -m benchmarks.imputation`: the 20 % of Adult's entries that are hidden, guessed by a VAE and by the mean or mode.

The spec is experiments/adult.yaml: HI-VAE's first list of hidden entries, and one likelihood per column. The VAE sees neither
the hidden entries nor, until it is judged, the test rows; nothing is chosen by what is measured here. Two averages over
z of the moments and probabilities of p(x_hidden | z):

    guide      z ~ q(z | x_seen), every draw alike
    weighted   the same draws with self-normalised weights p(x_seen, z) / q(z | x_seen), towards p(z | x_seen)

Errors are HI-VAE's, by column (`error_computation` in read_functions.py of https://github.com/probabilistic-learning/HI-VAE):

    real, positive, count   root mean squared error / (largest - smallest value of the column)
    categorical             share of wrong codes
    ordinal                 mean |code - guessed code| / number of codes
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import elbowroom as er
from benchmarks import results
from elbowroom.analysis.latents.entries import coded, pieces
from elbowroom.analysis.queries.imputation import errors, losses
from elbowroom.inference.references.importance.psis import psis
from elbowroom.models.columns import Column
from elbowroom.models.likelihoods.categorical import Codes

HEADING = "## Imputation"
SPEC = Path(__file__).parents[1] / "experiments" / "adult.yaml"
WAYS = ("guide", "weighted")
LEVEL = 0.9
BOOTSTRAPS, DRAWS = 107, 108  # seeds
ROWS = 2**16  # of the decoder at once


# -- guesses ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guess:
    """What is guessed for every entry of rows, (N, D) each.

    Attributes:
        point: the mean of numbers, the likeliest code.
        median: of numbers and of codes (of no meaning where these have no order).
        low: 5 % quantile of numbers and codes.
        high: 95 % quantile.
    """

    point: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Imputed:
    """Guesses by the guide and by its weighted draws, and what the weights are worth.

    Attributes:
        guess: name of the way -> guess.
        ess: effective number of draws per row, (N,).
        khat: tail index of the weights per row, (N,).
    """

    guess: dict[str, Guess]
    ess: np.ndarray
    khat: np.ndarray


def impute(vae: er.VAE, x: Tensor, draws: int, seed: int) -> Imputed:
    """Guess every entry of x (N, D) from those that are there; NaN is missing. In the precision of x and the VAE."""
    chunks = x.split(max(1, ROWS // draws))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [_impute(vae, rows, draws) for rows in chunks]
    guesses = {way: Guess(*(_joined(p[0][way][i] for p in parts) for i in range(4))) for way in WAYS}
    return Imputed(guesses, _joined(p[1] for p in parts), _joined(p[2] for p in parts))


def _joined(parts: Iterator[Tensor]) -> np.ndarray:
    return torch.cat(list(parts)).double().numpy()


def _impute(vae: er.VAE, x: Tensor, draws: int) -> tuple[dict[str, list[Tensor]], Tensor, Tensor]:
    """Return point, median, low and high by way, and ESS and k-hat."""
    q = vae.encode(x)
    z = q.sample(torch.Size([draws]))
    p = vae.decode(z)
    seen = vae.likelihood.incomplete(p, x.isnan()).log_prob(x)
    log_weights = vae.prior.distribution().log_prob(z) + seen - q.log_prob(z)
    judged = psis(log_weights.double())
    weights = {"guide": torch.full_like(log_weights, 1 / draws), "weighted": log_weights.softmax(0)}
    found = {way: [torch.full_like(x, torch.nan) for _ in range(4)] for way in WAYS}
    for index, part in pieces(p):
        drawn = part.sample()
        values = part.probs if isinstance(part, Codes) else part.mean
        for way, w in weights.items():
            average = torch.einsum("sn,sn...->n...", w, values)
            point = average.argmax(-1).to(x.dtype) if isinstance(part, Codes) else average
            ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
            if isinstance(part, Codes):
                below = average.cumsum(-1)[..., :-1]
                median, low, high = ((below < level).sum(-1).to(x.dtype) for level in [0.5, *ends])
            else:
                median, low, high = weighted_quantiles(drawn, w, [0.5, *ends])
            for column, value in zip(found[way], (point, median, low, high), strict=True):
                column[:, index] = value
    return found, judged.ess_fraction * draws, judged.pareto_k


def weighted_quantiles(values: Tensor, weights: Tensor, levels: Sequence[float]) -> list[Tensor]:
    """Return the smallest of the values (S, N, n) whose weights (S, N), summed up to it, reach each level: (N, n) each."""
    ordered, order = values.sort(0)
    reached = weights[..., None].expand_as(values).gather(0, order).cumsum(0)
    last = len(values) - 1
    return [ordered.gather(0, (reached < level).sum(0, keepdim=True).clamp_max(last))[0] for level in levels]


def marginal(x: np.ndarray, columns: Sequence[Column], n: int) -> Guess:
    """Return the baseline for n rows: mean or mode, and quantiles, of each column of x (N, D) as far as it is there."""
    point, median, low, high = (np.empty(len(columns)) for _ in range(4))
    for j, column in enumerate(columns):
        there = x[~np.isnan(x[:, j]), j]
        point[j] = np.bincount(there.astype(int)).argmax() if coded(column) else there.mean()
        median[j], low[j], high[j] = np.quantile(there, [0.5, (1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Guess(*(np.broadcast_to(v, (n, len(columns))) for v in (point, median, low, high)))


# -- errors -----------------------------------------------------------------------------------------------------------------


GROUPS = {
    "numbers": ("real", "positive", "proportion", "count"),
    "categories": ("categorical", "binary"),
    "ordered codes": ("ordinal",),
}


def by_group(error: np.ndarray, columns: Sequence[Column]) -> np.ndarray:
    """Return the error of every column (..., D), then the mean over the columns of each kind, and over all columns."""
    kinds = np.array([column.kind for column in columns])
    means = [error[..., np.isin(kinds, group)].mean(-1) for group in GROUPS.values() if np.isin(kinds, group).any()]
    return np.concatenate([error, np.stack([*means, error.mean(-1)], -1)], -1)


def resampled(n: int, times: int = 400) -> np.ndarray:
    """Return how often each of n rows is in each bootstrap sample, (times, n)."""
    rng = np.random.default_rng(BOOTSTRAPS)
    return rng.multinomial(n, np.full(n, 1 / n), size=times).astype(float)


# -- the run ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One fit: errors with bootstrap standard errors, by way (`marginal`, `guide`, `weighted`) and point or median.

    Attributes:
        error: (way, use) -> errors of columns and groups.
        se: the same, their standard errors.
        difference_se: (way, use) -> standard error of error - that of the marginal.
        coverage: way -> share of the hidden entries of each column that the 90 % interval holds.
        ess: median effective number of draws.
        khat: share of the rows whose k-hat is above 0.7.
        elbo: of the validation rows, nats.
        entries: number of hidden entries of the test rows.
        seconds: of the fit, and of imputing.
    """

    error: dict[tuple[str, str], np.ndarray]
    se: dict[tuple[str, str], np.ndarray]
    difference_se: dict[tuple[str, str], np.ndarray]
    coverage: dict[str, np.ndarray]
    ess: float
    khat: float
    elbo: float
    entries: int
    seconds: tuple[float, float]


def measure(run: er.Run, draws: int) -> Measured:
    """Impute the hidden entries of the test rows of a fitted run, and judge."""
    data, split, columns = run.experiment.data, run.experiment.split, run.experiment.facts.columns
    if data.hidden is None or columns is None:
        raise SystemExit("the data have no hidden entries; set data.missing")
    known = data.x.astype(float)
    known[data.hidden.rows, data.hidden.columns] = data.hidden.values
    truth = np.where(np.isnan(data.x), known, np.nan)[split.test]
    ranges = np.nanmax(known, 0) - np.nanmin(known, 0)
    start = time.perf_counter()
    imputed = impute(run.vae.eval(), run.experiment.rows(split.test), draws, DRAWS)
    seconds = time.perf_counter() - start
    guesses = {"marginal": marginal(data.x[split.train], columns, len(truth)), **imputed.guess}
    weights = resampled(len(truth))
    error, samples, coverage = {}, {}, {}
    for way, guess in guesses.items():
        for use, value in (("point", guess.point), ("median", guess.median)):
            loss = losses(truth, value, columns, ranges)
            error[way, use] = by_group(errors(loss, columns), columns)
            samples[way, use] = by_group(errors(loss, columns, weights), columns)
        held = np.where(np.isnan(truth), np.nan, (guess.low <= truth) & (truth <= guess.high))
        coverage[way] = np.nanmean(held, 0)
    history = np.genfromtxt(run.path / "history.csv", delimiter=",", names=True)
    return Measured(
        error,
        {key: sample.std(0, ddof=1) for key, sample in samples.items()},
        {key: (sample - samples["marginal", key[1]]).std(0, ddof=1) for key, sample in samples.items()},
        coverage,
        float(np.median(imputed.ess)),
        float((imputed.khat > 0.7).mean()),
        float(history["validation_elbo"].max()),
        int((~np.isnan(truth)).sum()),
        (float(np.atleast_1d(history["seconds"])[-1]), seconds),
    )


def fitted(latent_dim: int, seed: int, folder: Path, changes: Sequence[str]) -> er.Run:
    """Fit the spec, or load the run that is there."""
    path = folder / f"d{latent_dim}-seed{seed}"
    if (path / "weights.pt").is_file():
        return er.Run.load(path)
    experiment = er.Experiment.load(SPEC, set=[f"model.latent_dim={latent_dim}", f"seed={seed}", *changes])
    return er.fit(experiment, out=path, overwrite=True)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imputation", description=__doc__.splitlines()[0])
    parser.add_argument("--latent", nargs="*", type=int, default=[10, 2], help="numbers of latents; all of the first is shown")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of split, first weights and training")
    parser.add_argument("--draws", type=int, default=300, help="of the guide per row")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the spec, a.b=c")
    parser.add_argument("--runs", type=Path, help="folder of the fits; those that are there are not repeated")
    parser.add_argument("--print", action="store_true", help="leave RESULTS.md as it is")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the section."""
    from benchmarks.imputation_table import section

    args = parsed(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[int, list[Measured]] = {}
        columns: tuple[Column, ...] = ()
        for latent_dim in args.latent:
            for seed in args.seeds:
                run = fitted(latent_dim, seed, args.runs or Path(scratch), args.set)
                columns = run.experiment.facts.columns or ()
                found.setdefault(latent_dim, []).append(measure(run, args.draws))
                print(f"d = {latent_dim}, seed {seed}: {found[latent_dim][-1].error['weighted', 'point'][-1]:.4f}", flush=True)
    machine = f"{platform.machine()}, 2 cores (1 used), no GPU, torch {version('torch')}; {datetime.now(UTC):%Y-%m-%d}."
    changes = f" with {', '.join(args.set)}" if args.set else ""
    text = section(HEADING, machine, found, columns, args.draws, changes)
    print(text)
    if not args.print:
        results.write(text)


if __name__ == "__main__":
    main()
