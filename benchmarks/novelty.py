"""Which score tells a kind of row that the model has never seen? Digits, each class in turn held out of the fit.

    python -m benchmarks.novelty [--only 1 8 ...] [--latents 2] [--mnist RUN] [--out FOLDER] [--print]

Writes its section of benchmarks/RESULTS.md. A fit or an answer that is in the folder is not made again. With a fitted run of
experiments/binarized_mnist.yaml, images that are no digits are scored by that, too.
"""

from __future__ import annotations

import argparse
import math
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from scipy import stats
from sklearn.datasets import load_digits

import elbowroom as er
from benchmarks.results import write
from elbowroom.analysis import idata
from elbowroom.analysis.queries.novelty import SCORES, adjusted, both_tails, high, low, two_sided

SPEC = Path(__file__).parents[1] / "experiments" / "digits.yaml"
LEVEL, FDR, RESAMPLES = 0.05, 0.1, 100
CALIBRATION, ROWS = 500, 100  # of a resample
NOISE = 20  # images
MNIST_ROWS, MNIST_CALIBRATION, MNIST_NOISE = 60, 300, 8  # pictures take long there
HIGHER_IS_STRANGER = ("typicality", "distortion", "rate", "gap_total", "pareto_k")
HEAD = """## Novelty: a class held out{of}

{machine}; {date}. `python -m benchmarks.novelty{options}`: experiments/digits.yaml (8 x 8 binarized pixels), {latents}
latents, fitted to nine classes of ten; log p(x) by {methods}.

AUROC of each score: test rows of the nine classes against all rows of the class that was held out, 0.5 is a coin. ± is the
standard error over rows (DeLong), of the mean that over classes. The two-sided p-value of log p(x) and typicality ask whether a
row is too likely as well.

| held out | rows | {scores} |
|---|---|{dashes}|"""


def auroc(regular: np.ndarray, novel: np.ndarray) -> tuple[float, float]:
    """Return P(novel > regular) + P(equal) / 2 and its standard error, by the score being higher for what is strange.

    The error is that of DeLong, DeLong and Clarke-Pearson 1988 (https://doi.org/10.2307/2531595), over rows of both kinds.

    Args:
        regular: scores, (n,).
        novel: scores, (m,).
    """
    both = stats.rankdata(np.concatenate([novel, regular]))
    m, n = len(novel), len(regular)
    of_novel = (both[:m] - stats.rankdata(novel)) / n
    of_regular = 1 - (both[m:] - stats.rankdata(regular)) / m
    error = math.sqrt(of_novel.var(ddof=1) / m + of_regular.var(ddof=1) / n)
    return float(of_novel.mean()), error


@dataclass(frozen=True)
class Found:
    """What one fit, without one class, makes of rows.

    Attributes:
        held_out: the class; -1 for none.
        answer: the scores of all rows that were asked about, and of the calibration rows.
        kind: of each row: `valid`, `novel`, `blank`, `full`, `noise`, `sparse`, `likeliest`.
    """

    held_out: int
    answer: xr.Dataset
    kind: np.ndarray

    def values(self, kind: str, name: str = "log_evidence") -> np.ndarray:
        """Return a variable of the rows of a kind."""
        values: np.ndarray = self.answer[name].values[self.kind == kind]
        return values


def likeliest(run: er.Run) -> np.ndarray:
    """Return the image with the largest log p(x) among those that round E[x|z] on a grid of two latents."""
    axis = torch.linspace(-4, 4, 81)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        p = run.vae.centre(z).flatten(1).double().clamp(1e-12, 1 - 1e-12)
        images = p.round().unique(dim=0)
        given = images @ p.log().T + (1 - images) @ (-p).log1p().T
        best = (given - 0.5 * z.square().sum(-1)).logsumexp(1).argmax()
    found: np.ndarray = images[best].reshape(1, 8, 8).numpy()
    return found


def one(held_out: int, latents: int, folder: Path) -> Found:
    """Fit without a class, and score test rows, the class, and images that are no digits."""
    digits = load_digits()
    x, labels = (digits.images >= 8).astype(np.float32), digits.target
    inside = x[labels != held_out]
    path, answered = folder / f"without_{held_out}_d{latents}", folder / f"without_{held_out}_d{latents}.nc"
    if (path / "weights.pt").is_file():
        run = er.Run.load(path, data=inside)
    else:
        run = er.fit(er.Experiment.load(SPEC, set=[f"model.latent_dim={latents}"], data=inside), out=path, resume=True)
    noise = np.random.default_rng(held_out).random((NOISE, 8, 8)) < 0.5
    groups = {
        "valid": inside[run.experiment.split.test],
        "novel": x[labels == held_out],
        "blank": np.zeros((1, 8, 8)),
        "full": np.ones((1, 8, 8)),
        "noise": noise,
        **({"likeliest": likeliest(run)} if latents == 2 else {}),
    }
    kind = np.repeat(list(groups), [len(rows) for rows in groups.values()])
    if answered.is_file():
        return Found(held_out, idata.read_table(answered), kind)
    answer = run.score(np.concatenate(list(groups.values())).astype(np.float32), simulated=0)
    answer.save(answered)
    return Found(held_out, answer.dataset, kind)


def mnist(path: Path, folder: Path) -> Found:
    """Score images that are no digits, and some test rows, by a run fitted to binarized MNIST."""
    run, answered, rng = er.Run.load(path), folder / "mnist.nc", np.random.default_rng(0)
    groups = {
        "blank": np.zeros((1, 784)),
        "full": np.ones((1, 784)),
        "noise": rng.random((MNIST_NOISE, 784)) < 0.5,
        "sparse": rng.random((MNIST_NOISE, 784)) < 0.13,
        "valid": run.data.x[np.sort(run.experiment.split.test[:MNIST_ROWS])].reshape(MNIST_ROWS, 784),
    }
    kind = np.repeat(list(groups), [len(rows) for rows in groups.values()])
    if answered.is_file():
        return Found(-1, idata.read_table(answered), kind)
    rows = np.concatenate(list(groups.values())).astype(np.float32).reshape(-1, *run.vae.likelihood.event_shape)
    answer = run.score(rows, simulated=0, most=MNIST_CALIBRATION)
    answer.save(answered)
    return Found(-1, answer.dataset, kind)


def areas(found: Found) -> list[tuple[float, float]]:
    """Return the AUROC of each score with its standard error."""
    out = []
    for name, (variable, conformal) in SCORES.items():
        if name == "typicality":
            variable = name
        sign = 1 if variable in HIGHER_IS_STRANGER else -1
        regular, novel = found.values("valid", variable), found.values("novel", variable)
        if name == "log p(x), two-sided":
            v = found.answer["calibration_log_evidence"].values
            regular, novel = conformal(v, regular), conformal(v, novel)
        # what has no value is the strangest, in both
        out.append(auroc(*(np.nan_to_num(sign * values, nan=np.inf, posinf=np.inf) for values in (regular, novel))))
    return out


def resampled(found: Found) -> np.ndarray:
    """Return, for the lower tail and both tails: P(any flagged) of valid rows alone; false share and power in a mixture.

    Validation and test rows, none of which the fit has learnt from, are dealt anew into calibration rows and rows to be judged.
    """
    rng = np.random.default_rng(found.held_out)
    pool = np.concatenate([found.answer["calibration_log_evidence"].values, found.values("valid")])
    novel, out = found.values("novel"), np.zeros((RESAMPLES, 2, 3))
    for resample in out:
        some = rng.permutation(pool)
        v, valid = some[:CALIBRATION], some[CALIBRATION : CALIBRATION + ROWS]
        mixture = np.concatenate([valid[: ROWS // 2], rng.permutation(novel)[: ROWS // 2]])
        for x, columns in ((valid, [0]), (mixture, [1, 2])):
            ends = low(v, x), high(v, x)
            for tails, q in enumerate((adjusted(ends[0]), both_tails(*ends))):
                flags = q <= FDR
                false, right = flags[: ROWS // 2].sum(), flags[ROWS // 2 :].mean()
                resample[tails, columns] = [flags.any()] if columns == [0] else [false / max(1, flags.sum()), right]
    means: np.ndarray = out.mean(0)
    return means


def with_error(values: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    """Return mean and standard error over fits."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def picture_line(every: Sequence[Found], kind: str, words: str) -> str:
    """Return the row of a kind of image: log p(x), and the shares that p-values flag."""
    p, values = [], []
    for found in every:
        v, x = found.answer["calibration_log_evidence"].values, found.values(kind)
        p.append(np.stack([low(v, x), two_sided(low(v, x), high(v, x)), (x[:, None] >= v).mean(1)]))
        values.append(x)
    left, both, above = np.concatenate(p, 1)
    x = np.concatenate(values)
    return (
        f"| {words} | {np.median(x):.1f} ({x.min():.1f} .. {x.max():.1f}) | {np.median(above):.1%} "
        f"| {int((left <= LEVEL).sum())} of {x.size} | {int((both <= LEVEL).sum())} of {x.size} |"
    )


def section(every: Sequence[Found], on_mnist: Found | None, latents: int, options: str) -> str:
    """Return the markdown."""
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}"
    methods = sorted({str(m) for found in every for m in found.answer["evidence_method"].values})
    lines = [
        HEAD.format(
            machine=machine, date=f"{datetime.now(UTC):%Y-%m-%d}", options=options, latents=latents,
            of="" if latents == 2 else f", {latents} latents", methods=", ".join(methods),
            scores=" | ".join(SCORES), dashes="|".join(["---"] * len(SCORES)),
        )
    ]  # fmt: skip
    table = [areas(found) for found in every]
    for found, row in zip(every, table, strict=True):
        cells = " | ".join(f"{area:.3f} ± {error:.3f}" for area, error in row)
        lines.append(f"| {found.held_out} | {int((found.kind == 'novel').sum())} | {cells} |")
    means = [with_error([row[column][0] for row in table]) for column in range(len(SCORES))]
    lines.append(f"| mean | | {' | '.join(means)} |")
    lines += [
        "",
        f"Images that are no digits, by the {len(every)} fits: median and range of log p(x) in nats, the share of calibration",
        f"rows that are not likelier, and how many have a conformal p-value of {LEVEL:g} or less. `likeliest` has the largest",
        "log p(x) of all images that round E[x|z] on a grid.",
        "",
        "| image | log p(x) | likelier than | low tail | two-sided |",
        "|---|---|---|---|---|",
    ]
    words = {
        "blank": "blank (all 0)",
        "full": "full (all 1)",
        "noise": "noise (each pixel 0 or 1)",
        "sparse": "noise (13 % of the pixels are 1)",
        "likeliest": "likeliest",
    }
    lines += [picture_line(every, kind, f"digits: {name}") for kind, name in words.items() if (every[0].kind == kind).any()]
    if on_mnist is not None:
        lines += [
            picture_line([on_mnist], kind, f"binarized MNIST, one fit: {name}")
            for kind, name in words.items()
            if (on_mnist.kind == kind).any()
        ]
    shares = np.stack([resampled(found) for found in every])
    ends = [(low(v, x) <= LEVEL, two_sided(low(v, x), high(v, x)) <= LEVEL) for v, x in (
        (found.answer["calibration_log_evidence"].values, found.values("valid")) for found in every
    )]  # fmt: skip
    lines += [
        "",
        f"The false-discovery rate, {RESAMPLES} resamples of each fit: validation and test rows dealt anew into {CALIBRATION}",
        f"calibration rows and {ROWS} rows to be judged at {FDR:.0%}; in the mixture {ROWS // 2} are of the held-out class. ±",
        "over fits. The last column needs no resample: the share of test rows with p of 0.05 or less against the validation",
        "rows, which have chosen the epoch of the weights. p comes in steps of 1 / 501: of the 10 % less is used.",
        "",
        "| rule | valid alone: any flagged | mixture: false share of flagged | mixture: novel flagged | test rows, p ≤ 0.05 |",
        "|---|---|---|---|---|",
    ]
    for tails, name in enumerate(("low tail", "two-sided")):
        cells = [with_error(shares[:, tails, column]) for column in range(3)]
        cells.append(with_error([float(pair[tails].mean()) for pair in ends]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, score, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", type=int, choices=range(10), default=range(10))
    parser.add_argument("--latents", type=int, default=2)
    parser.add_argument("--mnist", type=Path, metavar="RUN", help="a fitted run of experiments/binarized_mnist.yaml")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--print", action="store_true", help="print the section, and leave RESULTS.md as it is")
    chosen = parser.parse_args(arguments)
    given = [*map(str, sorted(chosen.only))] if len(chosen.only) < 10 else []
    options = f" --only {' '.join(given)}" if given else ""
    options += (f" --latents {chosen.latents}" if chosen.latents != 2 else "") + (" --mnist RUN" if chosen.mnist else "")
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.out or Path(temporary)
        every = [one(held_out, chosen.latents, folder) for held_out in sorted(chosen.only)]
        on_mnist = None if chosen.mnist is None else mnist(chosen.mnist, folder)
        text = section(every, on_mnist, chosen.latents, options)
    if chosen.print:
        print(text)
    else:
        write(text)


if __name__ == "__main__":
    main()
