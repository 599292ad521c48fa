"""`python -m benchmarks.smoothing`: k-hat (Pareto-smoothed importance sampling) of many data at once, against ArviZ's loop."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import arviz_stats.base
import numpy as np
import torch

from benchmarks import measure, results
from elbowroom.inference.references.importance.psis import psis

HEADING = "## Pareto k-hat"
REPEATS = 7


def loop(columns: np.ndarray) -> np.ndarray:
    """Return k-hat of each column of -log weights (S, N) by ArviZ's function of one column."""
    smooth = arviz_stats.base.array_stats.psislw
    return np.array([float(smooth(column, r_eff=1.0)[1]) for column in columns.T])


def measured(n_obs: int, draws: int, repeats: int) -> tuple[list[list[float]], float]:
    """Return seconds of ours and of ArviZ's, in turn, and the largest difference of k-hat."""
    log_weights = torch.randn(draws, n_obs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    columns = -log_weights.numpy()
    error = float(np.abs(psis(log_weights).pareto_k.numpy() - loop(columns)).max())  # and a warm-up of both

    contestants = [lambda _: measure.seconds(lambda: psis(log_weights)), lambda _: measure.seconds(lambda: loop(columns))]
    return measure.in_turn(contestants, repeats), error


def section(times: Sequence[Sequence[float]], error: float, what: str, args: argparse.Namespace) -> str:
    """Return the markdown section."""
    ours, theirs = times
    row = [what, measure.span(ours), measure.span(theirs), measure.ratio(ours, theirs), f"{error:.0e}"]
    columns = ["what", "ours [s]", "ArviZ's psislw [s]", "ratio", "largest difference of k-hat"]
    head = measure.circumstances(args, ("torch", "arviz-stats"), "python -m benchmarks.smoothing")
    said = f"Both in turn, {len(ours)} repeats after one warm-up; medians (and ranges). The log weights are normal."
    return "\n".join([HEADING, "", *head, *measure.paragraph(said), "", *measure.table(columns, [row])]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the section."""
    args = measure.parser("smoothing", "k-hat of many data at once, against ArviZ one by one").parse_args(arguments)
    measure.use(args.threads)
    n_obs, draws, repeats = (20, 1_000, 2) if args.quick else (360, 10_000, REPEATS)
    text = section(*measured(n_obs, draws, repeats), f"{n_obs} data x {draws:,} draws", args)
    print(text)
    if not args.print:
        results.write(text)


if __name__ == "__main__":
    main()
