"""The published comparison: the ELBO of an encoder against the ELBO refitted per datum, 200-200 tanh, fifty latents, MNIST.

    ELBOWROOM_DATA=... python -m benchmarks.refitted [--data 200] [--out FOLDER] [--print]

Published (ATML-2022, a replication of Cremer, Li and Duvenaud 2018): training ELBO -92.87, locally refitted -90.28 nats, the
means of different images. Here both are of the same images, datum by datum, on training and on test images, with the error of
the paired difference. Writes its section of benchmarks/RESULTS.md. A run that is in the folder is not fitted again.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import elbowroom as er
from benchmarks.decomposition import CASES, EXPERIMENTS
from benchmarks.results import write
from elbowroom.inference.references.importance.guide import amortized
from elbowroom.inference.search.best_normal import refit
from elbowroom.inference.target.of_vae import log_joint_of
from elbowroom.runs.rows import own_rows

NAME = "mnist_d50"  # the same fit as the decomposition's
DRAWS = 2_000
HEAD = """## The ELBO refitted

{machine}; {date}. `python -m benchmarks.refitted`: experiments/binarized_mnist_d50.yaml (784-200-200-50, tanh, static
binarization, 250 epochs of Adam at 1e-3, no warm-up), and the best diagonal normal refitted to each image.

Published: training ELBO -92.87, refitted -90.28 (a gain of 2.59), of different images and after another fit (KL warm-up; which
binarization is not said). Only the gains compare, and that of the same images has an error that can be stated. The refitted
ELBO is a lower bound on log p(x) too, and short of the best by the shortfall at most, as far as the search can tell.

| images | encoder's ELBO | refitted ELBO | gain, paired | gain, median | shortfall, median | not converged | seconds |
|---|---|---|---|---|---|---|---|"""


def line(run: er.Run, part: str, count: int) -> str:
    """Return the row of the first images of a part of the data."""
    start = time.perf_counter()
    index = np.sort(own_rows(run, part).index)[:count]
    log_joint = log_joint_of(run.vae, run.experiment.batch(index))
    with torch.no_grad():
        before = amortized(log_joint, draws=DRAWS, keep=100, seed=1).stats["elbo"].double()
    found = refit(log_joint, family="diagonal", starts=1, score_draws=DRAWS, seed=2)
    gain = found.elbo.double() - before
    mean = lambda t: f"{float(t.mean()):.2f} +- {float(t.std() / len(t) ** 0.5):.2f}"
    left = int((~found.converged).sum())
    seconds = time.perf_counter() - start
    cells = [f"{len(index)} {part}", mean(before), mean(found.elbo), mean(gain), f"{float(gain.median()):.2f}"]
    return f"| {' | '.join(cells)} | {float(found.shortfall.median()):.3f} | {left} | {seconds:.0f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit what is not there yet, refit, and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=int, default=200)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--print", action="store_true")
    given = parser.parse_args(arguments)
    spec, changes = CASES[NAME]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        run = er.fit(er.Experiment.load(EXPERIMENTS / spec, set=changes), out=folder / NAME, resume=True)
        lines = []
        for part in ("train", "test"):
            lines.append(line(run, part, given.data))
            print(lines[-1], flush=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), no GPU, torch {torch.__version__}"
    if not given.print:
        write("\n".join([HEAD.format(machine=machine, date=datetime.now(UTC).date().isoformat()), *lines]))


if __name__ == "__main__":
    main()
