"""`make bench-posteriors`: ESS per second on the same posteriors, ours and the peers in one run, quality beside time.

The posteriors: a 2-D VAE with a 64-pixel Bernoulli tanh decoder is fitted to the digits (scikit-learn's, binarized), and data
are drawn from it. Every method gets the same decoder weights, the same data and starting points of the same kind (half of the
chains from the guide, half from the prior); jax's, Pyro's and our log p(x, z) are compared before anything is timed.

Quality is measured by the same functions for all: bulk ESS (ArviZ's), the least over coordinates, per posterior; errors of the
posterior mean against an exact grid, in MCSE = sd / sqrt(ESS) and in sd of the exact posterior.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import arviz_stats.base
import numpy as np
import torch

from benchmarks import results
from benchmarks.problem import DIM, PIXELS, Method, Problem, Run, Settings, fitted
from elbowroom.inference.grid import Grid
from elbowroom.inference.hmc import HMC
from elbowroom.inference.precision import in_precision
from elbowroom.inference.refit import refit
from elbowroom.inference.sampler import Sampler
from elbowroom.inference.scout import Scout, scout

HEADING = "## Posteriors"
POINTS, RUNS, TRUTH = 104, 105, 106  # seeds

CHAINS_FLOAT = "float32, metric float64"


# -- ours -------------------------------------------------------------------------------------------------------------------


def ours(problem: Problem, settings: Settings) -> Method:
    """The HMC reference as an audit runs it: refit, mode search, chains until certified, tempering of the rest."""

    def run(seed: int) -> Run:
        log_joint = problem.fresh()
        start = time.perf_counter()
        reference = HMC(chains=settings.chains, draws=settings.draws)
        posterior = reference(log_joint, keep=settings.chains * settings.draws, seed=seed)
        seconds = time.perf_counter() - start
        certified = sum(status == "certified" for status in posterior.status)
        divergences = int(posterior.sample_stats["diverging"].nan_to_num().sum())
        return Run(posterior.draws.numpy(), seconds, divergences, f"{certified / problem.n_obs:.1%} certified")

    return Method("elbowroom HMC, with mode search and certificate", CHAINS_FLOAT, problem.n_obs, settings.chains, run)


def chains_alone(problem: Problem, settings: Settings) -> Method:
    """What the peers do, and no more: refit (for the metric), warm-up and draws; the prior's starts come from elsewhere."""
    known = scout(problem.log_joint).modes

    def run(seed: int) -> Run:
        log_joint, generator = problem.fresh(), torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        best = refit(log_joint, family="full", seed=seed)
        log_joint = in_precision(log_joint, best.q, "auto", generator)
        sampler = Sampler.warmed_up(log_joint, Scout(best, known), settings.chains, generator)
        found = sampler.run(torch.arange(problem.n_obs), settings.draws)
        seconds = time.perf_counter() - start
        return Run(found.draws.numpy(), seconds, int(found.divergent.sum()))

    return Method("elbowroom HMC, chains alone", CHAINS_FLOAT, problem.n_obs, settings.chains, run)


# -- quality ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """ESS per posterior (the least over coordinates) and errors of the mean against the exact posterior.

    Attributes:
        ess: (N,).
        in_mcse: |mean - exact mean| / (exact sd / sqrt(ESS of that coordinate)), (N, d); NaN where no exact value is known.
        in_sd: |mean - exact mean| / exact sd, (N, d), likewise.
    """

    ess: np.ndarray
    in_mcse: np.ndarray
    in_sd: np.ndarray


def quality(draws: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> Quality:
    """Judge draws (chain, draw, N, d) by the exact mean and sd (N, d), NaN where they are not known."""
    compute = arviz_stats.base.array_stats.ess
    columns = draws.reshape(*draws.shape[:2], -1)
    ess = np.array([float(compute(columns[..., i], chain_axis=0, draw_axis=1)) for i in range(columns.shape[-1])])
    ess = ess.reshape(draws.shape[2:])
    error = np.abs(draws.mean((0, 1)) - mean) / sd
    return Quality(ess.min(-1), error * np.sqrt(ess), error)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: Method
    seconds: list[float]
    quality: Quality
    divergences: int
    note: str

    @property
    def rate(self) -> float:
        """Effective draws per second, all posteriors together: mean ESS x N / median seconds."""
        return float(np.mean(self.quality.ess)) * self.method.n_obs / statistics.median(self.seconds)

    def cells(self) -> str:
        """Return the line."""
        m, q = self.method, self.quality
        span = f"{statistics.median(self.seconds):.3g} ({min(self.seconds):.3g} .. {max(self.seconds):.3g})"
        compiled = "" if math.isnan(m.compile_seconds) else f"{m.compile_seconds:.1f}"
        ess = f"{q.ess.min():.0f} / {np.median(q.ess):.0f} / {q.ess.mean():.0f}"
        errors = f"{np.nanmax(q.in_mcse):.1f} | {np.nanmedian(q.in_sd):.3f}"
        left = f"| {m.name} | {m.dtype} | {m.n_obs} x {m.chains} | {compiled} | {span} | {ess} | {self.rate:,.0f}"
        return f"{left} | {errors} | {self.divergences} | {self.note} |"


def measured(problem: Problem, methods: list[Method], repeats: int) -> list[Row]:
    """Run the methods in turn, `repeats` times each with new seeds, so that a busy machine slows all; judge the first runs."""
    truth = Grid()(problem.fresh(), keep=4, seed=TRUTH)
    mean, sd = (moment.numpy().copy() for moment in truth.moments())
    sd[[status != "exact" for status in truth.status]] = np.nan
    print(f"grid: {sum(status == 'exact' for status in truth.status)} of {problem.n_obs} exact", flush=True)
    runs: list[list[Run]] = [[] for _ in methods]
    for repeat in range(repeats):
        for method, done in zip(methods, runs, strict=True):
            done.append(method.run(RUNS + 1000 * repeat))
            print(f"{method.name}: {done[-1].seconds:.2f} s", flush=True)
    return [
        Row(
            m,
            [r.seconds for r in done],
            quality(done[0].draws, mean[: m.n_obs], sd[: m.n_obs]),
            done[0].divergences,
            done[0].note,
        )
        for m, done in zip(methods, runs, strict=True)
    ]


# -- scaling ----------------------------------------------------------------------------------------------------------------


def peak() -> float:
    """Return the largest resident memory of this process so far, in MiB (Linux)."""
    # not getrusage's: a child inherits its parent's peak there
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def alone(n_obs: int, hidden: int, settings: Settings) -> dict[str, float]:
    """Measure ours on `n_obs` data in this process: seconds, MiB at the peak, above what it held before, and of kept draws."""
    problem = Problem(fitted(hidden), n_obs)
    before = peak()
    found = ours(problem, settings).run(RUNS)
    return {"n": n_obs, "seconds": found.seconds, "peak": peak(), "above": peak() - before, "kept": found.draws.nbytes / 2**20}


def scaling(sizes: list[int], arguments: list[str]) -> list[str]:
    """Measure ours on several numbers of data, each in a fresh process; return a markdown table."""
    lines = [
        "| data | seconds | seconds per 1,000 | peak memory [MiB] | above the start [MiB] | kept draws alone [MiB] |",
        "|---|---|---|---|---|---|",
    ]
    for size in sizes:
        command = [sys.executable, "-m", "benchmarks.posteriors", *arguments, "--alone", str(size)]
        out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        r = json.loads(out.stdout.splitlines()[-1])
        each = 1000 * r["seconds"] / size
        lines.append(f"| {size:,} | {r['seconds']:.1f} | {each:.1f} | {r['peak']:.0f} | {r['above']:.0f} | {r['kept']:.0f} |")
        print(lines[-1], flush=True)
    return lines


# -- the run ----------------------------------------------------------------------------------------------------------------


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.posteriors", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=int, default=1000, help="number of posteriors")
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=300, help="of the peers, per chain")
    parser.add_argument("--draws", type=int, default=300, help="per chain")
    parser.add_argument("--pyro", type=int, default=5, help="number of posteriors for Pyro's NUTS, one chain each")
    parser.add_argument("--hidden", type=int, default=64, help="width of the decoder's hidden layer")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats, in turn")
    parser.add_argument("--threads", type=int, default=2, help="cores that every method may use")
    parser.add_argument("--methods", nargs="*", default=["hmc", "chains", "blackjax", "numpyro", "pyro"])
    parser.add_argument("--scaling", nargs="*", type=int, default=[1000, 10_000], help="numbers of data for ours alone")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--print", action="store_true", help="leave RESULTS.md as it is")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the section."""
    args = parsed(arguments)
    # before jax starts its thread pool, which has one thread per core that it sees
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    settings = Settings(args.chains, args.warmup, args.draws, args.pyro, args.repeats, args.threads)
    if args.alone is not None:
        print(json.dumps(alone(args.alone, args.hidden, settings)))
        return
    problem = Problem(fitted(args.hidden), args.data)
    methods = competitors(problem, settings, args.methods)
    rows = measured(problem, methods, settings.repeats) if methods else []
    passed = ["--chains", args.chains, "--draws", args.draws, "--hidden", args.hidden, "--threads", args.threads]
    grown = scaling(args.scaling, [str(word) for word in passed])
    text = section(rows, grown, args)
    print(text)
    if not args.print:
        results.write(text)


def competitors(problem: Problem, settings: Settings, names: list[str]) -> list[Method]:
    """Build the methods, after checking that everyone's log p(x, z) is the same function."""
    makers: dict[str, Callable[[Problem, Settings], Method]] = {"hmc": ours, "chains": chains_alone}
    if set(names) - set(makers):
        from benchmarks import peers

        makers |= {"blackjax": peers.blackjax_nuts, "numpyro": peers.numpyro_nuts, "pyro": peers.pyro_nuts}
        z = 2 * torch.randn(16, problem.n_obs, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(POINTS))
        value = problem.log_joint(z).numpy()
        for who, double, tolerance in (("jax, float64", True, 1e-12), ("jax, float32", False, 1e-5)):
            problem.same(who, peers.evaluate(problem, z.numpy(), double=double), value, tolerance)
    return [makers[name](problem, settings) for name in names]


def ratios(rows: list[Row]) -> list[str]:
    """Return one sentence for each of our lines: its ESS per second over every peer's."""
    mine, theirs = ([row for row in rows if row.method.name.startswith("elbowroom") is own] for own in (True, False))
    lines = []
    for row in mine if theirs else []:
        over = ", ".join(f"{row.rate / peer.rate:,.1f} x {peer.method.name}" for peer in theirs)
        lines += ["", f"ESS/s of {row.method.name}: {over}."]
    return lines


def section(rows: list[Row], grown: list[str], args: argparse.Namespace) -> str:
    """Return the markdown section."""
    packages = ["torch", "pyro-ppl", "jax", "blackjax", "numpyro"]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    machine = (
        f"{platform.processor() or platform.machine()}, {args.threads} cores, Python {platform.python_version()}, {versions}"
    )
    lines = [
        HEADING,
        "",
        f"{machine}; {datetime.now(UTC):%Y-%m-%d}.",
        "`make bench-posteriors`, one run.",
        "",
        f"{args.data:,} posteriors of {PIXELS} Bernoulli pixels with {DIM} latents: a tanh decoder of width {args.hidden}",
        "fitted to the digits, data drawn from it. The same weights, data and kind of starting points for all; log p(x, z)",
        f"compared before timing. Peers: {args.warmup} warm-up and {args.draws} draws per chain, diagonal metric, target 0.8,",
        "the decoder batched over chains and data (Pyro: a model per datum). Ours: eager, nothing compiled; `chains alone`:",
        f"refit, 150 warm-up and {args.draws} draws; `with mode search and certificate`: all that an audit runs.",
        f"Seconds: median (and range) of {args.repeats} runs in turn, without compilation, which stands beside them.",
        "ESS: bulk, the least over coordinates, per posterior; ESS/s: of all posteriors of the line together.",
        "Errors: of the posterior mean, against the grid.",
        "",
        "| method | float | data x chains | compile [s] | run [s] | ESS min / median / mean | ESS/s "
        "| worst error [MCSE] | median error [sd] | divergences | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row.cells() for row in rows]
    lines += ratios(rows)
    if len(grown) > 2:
        lines += [
            "",
            f"Ours on more data, {args.chains} chains, each number in a fresh process (with mode search and certificate):",
        ]
        lines += ["", *grown]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
