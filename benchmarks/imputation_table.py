"""The markdown of benchmarks.imputation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from elbowroom.models.columns import Column

if TYPE_CHECKING:
    from benchmarks.imputation import Measured

Key = tuple[str, str]
HEAD = ["| column | kind | column's own | guide | weighted | weighted - own |", "|---|---|---|---|---|---|"]

NOTES = """\
Read off the run of 2026-11-21. No better than the column's own mean or mode: workclass and race, where one category has 74 %
and 85 % of the rows and is nearly always guessed; fnlwgt, a sampling weight that hardly depends on the other columns (its
90 % intervals are too narrow, and the weights mend a part of that); and, worse by 0.001 and 0.002, the two capital columns.
These hold `none` (1, a dollar is added) in 92 % and 95 % of the rows, and what separates the others is a latent. Where the
entry is hidden the guide all but rules a gain out (seed 0: about 15,000 draws for 1,500 rows, none above 10; the decoder under
the prior has 3.5 % of gains and 1.0 % of losses, the data 8.3 % and 4.8 %), and weighted draws of q cannot go where q does not.
So `none` is always guessed, which is the median: the best guess for absolute error, not for squared error. The intervals hold
just the share of `none`.

The weights' k-hat is above 0.7 in 10 to 17 % of the rows: there the weighted draws are not to be relied on.

Learning rate and warm-up were chosen by the validation ELBO of seed 0 alone: without a warm-up of the KL 9 of 10 latents
collapse and it ends at -27.3 nats (learning rate 1e-3, 60 epochs), with it at -23.3.

HI-VAE's published figures for Adult were not found in the text that was at hand (of the paper, https://arxiv.org/abs/1807.03653,
no more than its first pages), so none is quoted. The error measures and the list of hidden entries are those of its code.
"""
"""What the figures mean, in words; added where the spec is as it is."""


def section(
    heading: str, machine: str, found: Mapping[int, Sequence[Measured]], columns: Sequence[Column], draws: int, changes: str
) -> str:
    """Return the section: every column for the first number of latents, the kinds of columns for all, and notes."""
    runs, *others = found.values()
    lines = [
        heading,
        "",
        machine,
        f"`python -m benchmarks.imputation`, experiments/adult.yaml{changes}: HI-VAE's first list of 20 % hidden.",
        "",
        f"{runs[0].entries:,} hidden entries of the test rows, guessed from the entries that are there; the fit saw neither.",
        "Errors are HI-VAE's, by column: numbers: root mean squared error / (max - min); categories: share wrong; ordered",
        "codes: mean distance / number of codes. Guesses are the mean of numbers and the likeliest code. `column's own`: of",
        f"what the training rows show of the column; `guide`: over {draws:,} draws of q(z|x_seen); `weighted`: the same draws",
        "with self-normalised weights p(x_seen, z) / q(z|x_seen).",
        "",
        f"Means of {len(runs)} seeds (split, first weights, training) ± the standard error of one (bootstrap over rows); the",
        "difference is paired over rows, its range is over seeds. **Better**, or worse (!), by more than two standard errors.",
        "",
        f"d = {next(iter(found))}. {_worth(runs)}",
        "",
        *HEAD,
        *_rows(runs, columns, "point", range(len(columns))),
        *_rows(runs, columns, "point", range(len(columns), len(columns) + len(groups(columns)))),
        "",
        "The median as the guess, of numbers and of ordered codes, and the share of hidden values in 90 % intervals (of the",
        "column, of draws of x under the guide, of the weighted draws):",
        "",
        "| column | kind | column's own | guide | weighted | weighted - own | 90 %: own | guide | weighted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    numbers = [j for j, column in enumerate(columns) if column.kind not in ("categorical", "binary")]
    for j, line in zip(numbers, _rows(runs, columns, "median", numbers), strict=True):
        held = [f"{np.mean([run.coverage[way][j] for run in runs]):.1%}" for way in ("marginal", "guide", "weighted")]
        lines.append(f"{line} {' | '.join(held)} |")
    for latent_dim, more in list(zip(found, found.values(), strict=True))[1 : 1 + len(others)]:
        every = range(len(columns), len(columns) + len(groups(columns)))
        lines += ["", f"d = {latent_dim}. {_worth(more)}", "", *HEAD, *_rows(more, columns, "point", every)]
    return "\n".join(lines) + "\n" + ("" if changes else f"\n{NOTES}")


def groups(columns: Sequence[Column]) -> list[str]:
    """Return the names of the kinds of columns that are there, and of all of them."""
    from benchmarks.imputation import GROUPS

    return [name for name, kinds in GROUPS.items() if any(column.kind in kinds for column in columns)] + ["all columns"]


def _worth(runs: Sequence[Measured]) -> str:
    """Say what fits and weights are worth."""
    elbo = ", ".join(f"{run.elbo:.2f}" for run in runs)
    ess = ", ".join(f"{run.ess:.0f}" for run in runs)
    khat = ", ".join(f"{run.khat:.1%}" for run in runs)
    fit, guess = (np.mean([run.seconds[i] for run in runs]) for i in (0, 1))
    return (
        f"Validation ELBO {elbo} nats; effective draws per row (median) {ess}; k-hat above 0.7 in {khat} of the rows; "
        f"{fit:.0f} s to fit, {guess:.0f} s to guess, on a busy machine."
    )


def _rows(runs: Sequence[Measured], columns: Sequence[Column], use: str, which: Sequence[int]) -> list[str]:
    """Return a line per column or kind."""
    names = [f"{c.name} | {c.kind}" for c in columns] + [f"mean | {name}" for name in groups(columns)]
    lines = []
    for j in which:
        cells = [_cell(runs, (way, use), j) for way in ("marginal", "guide", "weighted")]
        lines.append(f"| {names[j]} | {' | '.join(cells)} | {_difference(runs, use, j)} |")
    return lines


def _cell(runs: Sequence[Measured], key: Key, j: int) -> str:
    return f"{np.mean([run.error[key][j] for run in runs]):.4f} ± {_typical([run.se[key][j] for run in runs]):.4f}"


def _difference(runs: Sequence[Measured], use: str, j: int) -> str:
    each = [float(run.error["weighted", use][j] - run.error["marginal", use][j]) for run in runs]
    mean, se = float(np.mean(each)), _typical([run.difference_se["weighted", use][j] for run in runs])
    text = f"{mean:+.4f} ± {se:.4f} ({min(each):+.4f} .. {max(each):+.4f})"
    return f"**{text}**" if mean < -2 * se else f"{text} !" if mean > 2 * se else text


def _typical(errors: Sequence[float]) -> float:
    """Return the root mean square."""
    return math.sqrt(float(np.mean(np.square(errors))))
