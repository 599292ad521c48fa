"""Every reference on every problem with a known answer: what it certifies, and how far from the truth that is.

    PYTHONPATH=tests python -m support.problems.oracle --n 100 --seed 1 [problem ...]

It prints the table and writes it into docs/references.md.

Errors are judged in Monte Carlo standard errors (MCSE) of all draws that a certificate rests on, not of those that are kept;
the truth's own numerical error is taken off first.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy import integrate, stats
from torch import Tensor

from elbowroom.analysis.measures.evidence import sandwich
from elbowroom.inference.mcmc import diagnostics
from elbowroom.inference.posterior import Posterior, Reference
from elbowroom.inference.references.ais.ais import Annealed
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.references.hmc import hmc
from elbowroom.inference.references.hmc.hmc import HMC
from elbowroom.inference.references.importance.importance import ImportanceSampling
from support.problems.catalogue import KNOWN, NO_SD_ERROR, UNIMODAL
from support.problems.truth import MAJOR, Problem

F64 = torch.float64
METHODS: dict[str, type[Reference]] = {
    "closed_form": ClosedForm,
    "grid": Grid,
    "importance": ImportanceSampling,
    "hmc": HMC,
    "ais": Annealed,
}
KEEP = 2000
LIMIT = 4.5  # MCSE
MANY, WIDER = 50, 1.25  # data from which errors are judged together; how much wider than stated they may be
FRACTION = 0.25  # of a mode's mass, below which the draws have missed it
MARKOV = math.log(40)  # nats that a probabilistic bound is beyond the truth by with a probability below 2.5 %
Z95 = 1.959963984540054
PAGE = Path(__file__).parents[3] / "docs" / "references.md"


@dataclass
class Estimates:
    """Moments, their standard errors and the modes' shares, of all the draws that there were, per datum."""

    mean: Tensor
    mean_error: Tensor
    sd: Tensor
    sd_error: Tensor
    shares: Tensor

    @classmethod
    def empty(cls, problem: Problem) -> Estimates:
        n, d, k = len(problem.mean), problem.mean.shape[1], problem.masses.shape[1]
        return cls(*(torch.full((n, size), torch.nan, dtype=F64) for size in (d, d, d, d, k)))

    def put(self, rows: Tensor, *values: Tensor) -> None:
        for mine, value in zip(vars(self).values(), values, strict=True):
            mine[rows] = value


@contextmanager
def watched(problem: Problem) -> Iterator[Estimates]:
    """Read estimates off all draws while HMC or importance sampling runs: a `Posterior` keeps some of them only.

    Blocks of data are told apart by their order.
    """
    seen = Estimates.empty(problem)
    first = {"rows": 0}
    begun, take, words = hmc.Found.__init__, hmc.Found.take, ImportanceSampling._words

    def begin(self: Any, log_joint: Any, *args: Any) -> None:
        begun(self, log_joint, *args)
        self.offset = first["rows"]
        first["rows"] += log_joint.n_obs

    def chains(self: Any, rows: Tensor, chains: Any, certificate: Any, *args: Any) -> None:
        before = [(self.status[i], self.reason[i]) for i in range(len(self.status))]
        take(self, rows, chains, certificate, *args)
        new = torch.tensor([before[i] != (self.status[i], self.reason[i]) for i in rows.tolist()], dtype=torch.bool)
        index = new.nonzero()[:, 0]  # what tempering could not certify is left as it was
        if not len(index):
            return
        draws, mine = chains.draws[:, :, index].double(), rows[index] + self.offset
        flat = draws.flatten(0, 1)
        seen.put(
            mine,
            flat.mean(0),
            diagnostics.mcse_mean(draws),
            flat.std(0),
            diagnostics.mcse_sd(draws),
            _shares(problem, flat, torch.ones(flat.shape[:2], dtype=F64) / len(flat), mine),
        )

    def weighted(self: Any, draws: Any, *args: Any) -> Any:
        n = draws.z.shape[1]
        mine = torch.arange(n) + first["rows"]
        first["rows"] += n
        w = draws.weights[..., None]
        mean = (w * draws.z).sum(0)
        square = (draws.z - mean).square()
        sd = (w * square).sum(0).sqrt()
        sd_error = (w * (square - sd.square())).square().sum(0).sqrt() / (2 * sd)
        shares = _shares(problem, draws.z, draws.weights, mine)
        seen.put(mine, mean, (w.square() * square).sum(0).sqrt(), sd, sd_error, shares)
        return words(self, draws, *args)

    hmc.Found.__init__, hmc.Found.take, ImportanceSampling._words = begin, chains, weighted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        hmc.Found.__init__, hmc.Found.take = begun, take  # type: ignore[method-assign]
        ImportanceSampling._words = words  # type: ignore[method-assign]


def _shares(problem: Problem, z: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Weigh the modes of some of the data: z (S, M, d), weights (S, M), rows (M,) -> (M, K)."""
    padded = problem.mean.expand(len(z), -1, -1).clone()
    padded[:, rows] = z
    label = problem.mode_of(padded)[:, rows]
    return torch.stack([(weights * (label == k)).sum(0) for k in range(problem.masses.shape[1])], -1)


@dataclass
class Judged:
    """One method on one problem, judged datum by datum.

    Attributes:
        name: of the problem.
        method: of the reference.
        unimodal: (N,).
        trusted: certified or exact, (N,).
        z_mean: |error of the mean| / MCSE, the worst coordinate, (N,); NaN where there is no MCSE.
        z_sd: likewise of the standard deviation.
        relative: |error of the mean| / posterior sd, (N, d).
        missed: modes of more than 5 % of the mass of which the draws hold less than a quarter of that, (N,) bool.
        kind: of the evidence, `` without any.
        evidence: value - truth, (N,), nats.
        evidence_error: as stated, (N,).
        truth_error: of the truth's evidence, (N,).
        upper: upper bound - truth, (N,), NaN without any.
        seconds: that it took.
        reasons: why data are not trusted.
    """

    name: str
    method: str
    unimodal: Tensor
    trusted: Tensor
    z_mean: Tensor
    z_sd: Tensor
    relative: Tensor
    missed: Tensor
    kind: str
    evidence: Tensor
    evidence_error: Tensor
    truth_error: Tensor
    upper: Tensor
    seconds: float = 0.0
    reasons: list[str] = field(default_factory=list)

    @property
    def violations(self) -> dict[str, float]:
        """Shares of the data whose evidence lies outside what was stated: see `Row`."""
        beyond, error = self.evidence, self.evidence_error
        some = self.trusted if self.kind in ("estimate", "exact") else beyond.isfinite()
        if not some.any():
            return {}
        out = {}
        if self.kind == "estimate":
            out["covered"] = _share((beyond.abs() <= Z95 * error + self.truth_error)[some])
        elif self.kind == "exact":
            out["covered"] = _share((beyond.abs() <= error + self.truth_error)[some])
        elif self.kind == "bound":
            out["above"] = _share((beyond > MARKOV)[some])
            out["above_se"] = _share((beyond > Z95 * error + self.truth_error)[some])
            known = self.upper.isfinite()
            if known.any():
                out["below"] = _share((self.upper < -MARKOV)[known])
        return out

    @property
    def width(self) -> float:
        """Median width of what is stated: the 95 % interval, or upper less lower bound, or truth less lower bound."""
        if self.kind == "bound":
            known = self.upper.isfinite()
            return _median((self.upper - self.evidence)[known] if known.any() else -self.evidence)
        factor = 2 * Z95 if self.kind == "estimate" else 2.0
        return _median(factor * self.evidence_error[self.trusted])


def _share(where: Tensor) -> float:
    return float(where.double().mean()) if len(where) else math.nan


def _median(values: Tensor) -> float:
    values = values[values.isfinite()]
    return float(values.median()) if len(values) else math.nan


def judge(problem: Problem, posterior: Posterior, seen: Estimates | None = None) -> Judged:
    """Hold a posterior against the truth.

    Args:
        problem: with the truth.
        posterior: of its data.
        seen: estimates of all draws, see `watched`; without any where the method's moments are exact.
    """
    spread = problem.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    slack = problem.error[:, None] * spread
    n = len(problem.mean)
    none = torch.full((n,), torch.nan, dtype=F64)
    mean, sd = posterior.moments()
    if seen is not None and bool(seen.mean.isfinite().any()):
        mean, sd = seen.mean, seen.sd
        z_mean = (((mean - problem.mean).abs() - slack).clamp_min(0) / seen.mean_error).amax(-1)
        z_sd = (((sd - spread).abs() - slack / 2).clamp_min(0) / seen.sd_error).amax(-1)
        shares = seen.shares
        if problem.name in NO_SD_ERROR:
            z_sd = none
    else:
        z_mean = z_sd = none
        flat = posterior.draws.flatten(0, 1)
        shares = _shares(problem, flat, torch.ones(flat.shape[:2], dtype=F64) / len(flat), torch.arange(n))
    evidence = posterior.evidence
    return Judged(
        name=problem.name,
        method=posterior.method,
        unimodal=problem.unimodal,
        trusted=posterior.trusted,
        z_mean=z_mean,
        z_sd=z_sd,
        relative=(mean - problem.mean).abs() / spread,
        missed=((problem.masses > MAJOR) & ~(shares >= FRACTION * problem.masses)).any(-1),
        kind="" if evidence is None else evidence.kind,
        evidence=none if evidence is None else evidence.value - problem.evidence,
        evidence_error=none if evidence is None else evidence.error,
        truth_error=problem.error,
        upper=none if evidence is None or evidence.upper is None else evidence.upper - problem.evidence,
        reasons=[r for s, r in zip(posterior.status, posterior.reason, strict=True) if s == "uncertified"],
    )


def examine(name: str, n: int, seed: int, methods: Sequence[str] = tuple(METHODS), run: int = 0) -> list[Judged]:
    """Run the methods that apply to a problem over n of its data, and judge each; another run has other random numbers.

    Where annealing runs beside HMC, its upper bounds start from HMC's certified draws.
    """
    problem = KNOWN[name](n, seed)
    rows: list[Judged] = []
    certified: Posterior | None = None
    for k, method in enumerate(methods):
        reference = METHODS[method]()
        if reference.refusal(problem.log_joint):
            continue
        start = time.perf_counter()
        with watched(problem) as seen:
            posterior = reference(problem.log_joint, keep=KEEP, seed=7919 * seed + 101 * k + 1 + run)
        if method == "hmc":
            certified = posterior
        if method == "ais" and certified is not None:
            both = [HMC(), reference]
            posterior = sandwich(problem.log_joint, both, [certified, posterior], seed=7919 * seed + 99_001)[1]
        rows.append(judge(problem, posterior, seen))
        rows[-1].seconds = time.perf_counter() - start
    return rows


# -- the table -----------------------------------------------------------------------------------------------------------------

HEAD = (
    "| problem | method | data | trusted | of unimodal | worst mean, MCSE | worst sd, MCSE | median error / sd | modes missed "
    "| evidence | width, nats | s |\n|---|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|"
)


def row(judged: Judged) -> str:
    """Return one line of the table."""
    t = judged.trusted
    cell = lambda values: f"{float(values.amax()):.1f}" if len(values := values[values.isfinite()]) else ""
    of_unimodal = f"{_share(t[judged.unimodal]):.0%}" if judged.unimodal.any() else ""
    bounds = judged.violations
    words = {
        "covered": "{:.1%} " + ("within the error" if judged.kind == "exact" else "in the 95 % interval"),
        "above": "{:.1%} above by log 40",
        "above_se": "{:.1%} by 1.96 se",
        "below": "upper {:.1%} below by log 40",
    }
    evidence = ", ".join(words[key].format(value) for key, value in bounds.items())
    judgeable = judged.kind != "bound"
    median = _median(judged.relative[t] if judgeable else judged.relative)
    width = judged.width
    cells = [
        judged.name,
        judged.method,
        str(len(t)),
        f"{_share(t):.0%}" if judgeable else "",
        of_unimodal if judgeable else "",
        cell(judged.z_mean[t]),
        cell(judged.z_sd[t]),
        "" if math.isnan(median) else f"{median:.2g}",
        f"{int((judged.missed & t).sum())}" if judgeable else "",
        evidence,
        "" if math.isnan(width) else f"{width:.2g}",
        f"{judged.seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def shortcomings(judged: Judged) -> list[str]:
    """Return in words what of STATISTICS 6 a method falls short of on one problem."""
    t, bad = judged.trusted, []
    at = f"{judged.name}, {judged.method}"
    for what, z in (("mean", judged.z_mean), ("sd", judged.z_sd)):
        far = int((z[t] > LIMIT).sum())
        if far:
            worst = float(z[t].nan_to_num().amax())
            bad.append(f"{at}: {what} of {far} of {int(t.sum())} certified data beyond {LIMIT} MCSE, worst {worst:.1f}")
        # no one datum far off, but all a little: the worst of d coordinates, against that of d standard normals
        of = z[t & z.isfinite()]
        right = math.sqrt(integrate.quad(lambda u: 1 - stats.chi2(1).cdf(u) ** judged.relative.shape[1], 0, 60)[0])
        if len(of) >= MANY and (rms := float(of.square().mean().sqrt())) > WIDER * right:
            bad.append(f"{at}: the error of the {what} is {rms:.2f} MCSE in the root mean square, {right:.2f} is right")
    missing = int((judged.missed & t).sum())
    if missing:
        bad.append(f"{at}: {missing} certified data miss a mode of more than {MAJOR:.0%}")
    if judged.method == "hmc":
        share = _share(t[judged.unimodal])
        least = 0.99 if judged.name.startswith("mlp_") else 0.95
        if judged.name in UNIMODAL and share < least:
            bad.append(f"{at}: {share:.1%} of the unimodal certified, {least:.0%} asked for")
        if t.any() and _median(judged.relative[t]) > 0.03:
            bad.append(f"{at}: median |error| / sd {_median(judged.relative[t]):.3f}")
    return bad


def save(rows: Sequence[Judged], path: Path) -> None:
    """Append judged rows to a file, one JSON object a line."""
    with path.open("a") as file:
        for judged in rows:
            parts = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(judged).items()}
            file.write(json.dumps(parts) + "\n")


def load(path: Path) -> list[Judged]:
    """Read what `save` wrote, joining runs of a method on a problem with different seeds."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        parts = {k: torch.tensor(v) if isinstance(v, list) and k != "reasons" else v for k, v in json.loads(line).items()}
        key = parts["name"], parts["method"]
        if key not in found:
            found[key] = parts
            continue
        for k, v in parts.items():
            if isinstance(v, Tensor):
                found[key][k] = torch.cat([found[key][k], v])
            elif k in ("reasons", "seconds"):
                found[key][k] = found[key][k] + v
    order = {name: k for k, name in enumerate(KNOWN)}
    ranked = sorted(found, key=lambda key: (list(METHODS).index(key[1]), order[key[0]]))
    return [Judged(**found[key]) for key in ranked]


def table(rows: Sequence[Judged]) -> str:
    """Return the markdown table."""
    return "\n".join([HEAD, *map(row, rows)])


def write(rows: Sequence[Judged], page: Path = PAGE) -> None:
    """Put the table between the page's markers."""
    text = page.read_text()
    new = f"<!-- table -->\n{table(rows)}\n<!-- /table -->"
    page.write_text(re.sub(r"<!-- table -->.*<!-- /table -->", lambda _: new, text, flags=re.DOTALL))


def main() -> None:
    """Run the methods over the problems, printing what falls short as it appears."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(KNOWN))
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--file", type=Path, help="JSON lines to add results to; the table is that of the whole file")
    parser.add_argument("--rows", nargs="*", default=list(METHODS), help="methods whose results are shown; others only run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Judged] = []
    for name in options.names:
        new = [j for j in examine(name, options.n, options.seed, options.methods) if j.method in options.rows]
        for judged in new:
            print(row(judged), *(f"  !! {s}" for s in shortcomings(judged)), *_counted(judged.reasons), sep="\n", flush=True)
        rows += new
        if options.file:
            save(new, options.file)
    rows = load(options.file) if options.file else rows
    print(table(rows))
    write(rows)


def _counted(reasons: Sequence[str]) -> list[str]:
    kinds: dict[str, int] = {}
    for reason in reasons:
        kind = re.sub(r"\d[\d.,e-]*", "#", reason)
        kinds[kind] = kinds.get(kind, 0) + 1
    return [f"     {count} x {kind}" for kind, count in sorted(kinds.items(), key=lambda kv: -kv[1])[:4]]


if __name__ == "__main__":
    main()
