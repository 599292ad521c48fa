"""The gap taken apart: digits and binarized MNIST, from two to fifty latents, each part with its interval.

    ELBOWROOM_DATA=... python -m benchmarks.decomposition [--only digits_d2 ...] [--out FOLDER] [--print]

Writes its section of benchmarks/RESULTS.md. A run that is in the folder is not fitted or audited again.
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
import xarray as xr

import elbowroom as er
from benchmarks.results import write
from elbowroom.analysis.measures.evidence_kinds import has_value
from elbowroom.analysis.measures.table import column
from elbowroom.analysis.verdict.thresholds import known, median

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NO_OTHERS = "audit.diagnose=false"
CASES: dict[str, tuple[str, list[str]]] = {
    "digits_d2": ("digits.yaml", [NO_OTHERS]),
    "digits_d2_seed1": ("digits.yaml", ["seed=1", NO_OTHERS]),
    "digits_d2_seed2": ("digits.yaml", ["seed=2", NO_OTHERS]),
    "digits_d5": ("digits.yaml", ["model.latent_dim=5", "audit.observations=60", NO_OTHERS]),
    "digits_d10": ("digits.yaml", ["model.latent_dim=10", "audit.observations=60", NO_OTHERS]),
    "mnist_d2": ("binarized_mnist.yaml", ["audit.observations=100", NO_OTHERS]),
    "mnist_d50": ("binarized_mnist_d50.yaml", ["audit.observations=50", "audit.budget=10m", NO_OTHERS]),
}
PARTS = ("gap_total", "gap_amortization", "gap_covariance", "gap_shape")
HEAD = """## The gap taken apart

{machine}; {date}. `python -m benchmarks.decomposition`: the specs of experiments/ as they stand but for what is named.

Medians over the data whose posterior is certified and whose log p(x) is a value, in nats, with their distribution-free 95 %
intervals; all parts from the same data, by common random numbers. `bounds` are data of which only bounds are known: they enter
no median; beside it the median of their total gap's lower end, which is a bound. q*: best normal of the guide's family.

| run | data | certified with a value | bounds | total | amortization | covariance | shape | verdict | seconds |
|---|---|---|---|---|---|---|---|---|---|"""


def line(name: str, table: xr.Dataset, verdicts: Sequence[str], seconds: float) -> str:
    """Return the row of a run."""
    good = known(table)
    cells = []
    for part in PARTS:
        middle, low, high = median(column(table, part)[good])
        cells.append("" if np.isnan(middle) else f"{middle:.3f} [{low:.3f}, {high:.3f}]")
    bounds = column(table, "gap_total_lower")[~has_value(table)]
    bounded = f"{bounds.size}, above {np.median(bounds):.2f}" if bounds.size else "0"
    n = table.sizes["obs_id"]
    return f"| {name} | {n} | {good.sum()} | {bounded} | {' | '.join(cells)} | {', '.join(verdicts)} | {seconds:.0f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit and audit what is not there yet, and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--print", action="store_true")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder, lines = given.out or Path(temporary), []
        for name in given.only:
            spec, changes = CASES[name]
            start = time.perf_counter()
            experiment = er.Experiment.load(EXPERIMENTS / spec, set=changes)
            run = er.fit(experiment, out=folder / name, resume=True)
            audit = run.audit(resume=True)
            lines.append(line(name, audit.table, [one.verdict for one in audit.verdicts], time.perf_counter() - start))
            print(lines[-1], flush=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), no GPU, torch {torch.__version__}"
    head = HEAD.format(machine=machine, date=datetime.now(UTC).date().isoformat())
    if not given.print:
        write("\n".join([head, *lines]))


if __name__ == "__main__":
    main()
