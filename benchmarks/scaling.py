"""`python -m benchmarks.scaling`: how time and memory of ours grow with the data, the latents, the pixels and the chains.

Every line is measured in a process of its own, whose peak memory is its own too. Nothing is compared with peers here.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

import elbowroom as er
from benchmarks import measure, results
from benchmarks.posteriors import RUNS, WARM, chains_alone
from benchmarks.problem import Problem, Settings, fitted
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.references.hmc.hmc import HMC
from elbowroom.inference.references.hmc.warmup import WARMUP

DATA, HEADING = "## Growth with the data", "## Growth"
BLOCKS = {64: (1, 1), 256: (2, 2), 768: (4, 3), 3072: (8, 6)}  # pixels -> rows and columns that each of the 64 becomes
HIDDEN, CHAINS, DRAWS, KEEP, FIRST, GRADIENTS = 64, 4, 100, 1_000, 5, 30
SOME, FEWER, QUICK = 200, 50, 20  # data of all tables but the first; of grids, whose cost is steep in d; with --quick
MEMORY = ["peak memory [MiB]", "above the start [MiB]"]


@dataclass(frozen=True)
class Work:
    """What a measured piece of work says of itself.

    Attributes:
        seconds: what it took.
        certain: of how many data its result is certain.
        gradient: ms per gradient.
        processor: seconds of all its threads.
        compile: seconds of compilation before it.
    """

    seconds: float
    certain: str = ""
    gradient: float | None = None
    processor: float | None = None
    compile: float | None = None


@dataclass(frozen=True)
class Found:
    """One line: what grew and to what, the data, the work, MiB at the process's peak and above what it held before."""

    value: int
    n_obs: int
    seconds: float
    certain: str
    gradient: float | None
    processor: float | None
    compile: float | None
    peak: float
    above: float


# -- one line, in a process of its own --------------------------------------------------------------------------------------

Job = Callable[[], Work]


def audited(value: int, n_obs: int) -> Job:
    """Audit `value` data by the grid, as `er.audit` does, without what its verdicts rest on beside the gaps."""
    vae = fitted(HIDDEN)
    few, problem = Problem(vae, WARM), Problem(vae, value)

    def once(problem: Problem) -> Work:
        clocks = time.perf_counter(), time.process_time()
        audit = er.audit(vae.model, vae.guide, problem.x, references=["grid"], diagnose=False, compile="always")
        seconds, processor = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
        certain = next(text for name, text in audit.lines() if name.endswith("exact or certified"))
        return Work(seconds, certain, processor=processor)

    compiling = once(few).seconds - once(few).seconds  # what is compiled serves all data
    return lambda: replace(once(problem), compile=max(0.0, compiling))


def latents(value: int, n_obs: int, *, name: str) -> Job:
    """Run a reference alone, on data of a pair with `value` latents."""
    problem, reference = Problem(fitted(HIDDEN, dim=value), n_obs), {"grid": Grid, "hmc": HMC}[name]()

    def run() -> Work:
        log_joint = problem.fresh()
        start = time.perf_counter()
        posterior = reference(log_joint, keep=KEEP, seed=RUNS)
        return Work(time.perf_counter() - start, f"{int(posterior.trusted.sum())} of {n_obs}")

    return run


def pixels(value: int, n_obs: int) -> Job:
    """Take gradients of log p(x, z) on images of `value` pixels; their cost does not hang on how well the pair is fitted."""
    problem = Problem(fitted(HIDDEN, epochs=2, block=BLOCKS[value]), n_obs)
    gradients = _gradients(problem, CHAINS)

    def run() -> Work:
        each = gradients()
        return Work(sum(each), "", 1e3 * statistics.median(each))

    return run


def chains(value: int, n_obs: int) -> Job:
    """Run `value` chains per datum: refit, warm-up and draws; and gradients at as many places."""
    problem = Problem(fitted(HIDDEN), n_obs)
    method = chains_alone(problem, Settings(value, 0, DRAWS, 0, 1, torch.get_num_threads()))
    gradients = _gradients(problem, value)

    def run() -> Work:
        each = gradients()
        return Work(method.run(RUNS).seconds, "", 1e3 * statistics.median(each))

    return run


def _gradients(problem: Problem, count: int) -> Callable[[], list[float]]:
    """Return what times values and gradients of log p(x, z) of so many chains per datum, in single precision."""
    single, z = problem.fresh().converted(torch.float32), problem.starts(count, RUNS).float()

    def run() -> list[float]:
        for _ in range(FIRST):
            single.grad(z)
        return [measure.seconds(lambda: single.grad(z)) for _ in range(GRADIENTS)]

    return run


JOBS: dict[str, Callable[[int, int], Job]] = {
    "data": audited,
    "grid": functools.partial(latents, name="grid"),
    "hmc": functools.partial(latents, name="hmc"),
    "pixels": pixels,
    "chains": chains,
}


def alone(kind: str, value: int, n_obs: int) -> Found:
    """Measure one line in this process."""
    run = JOBS[kind](value, n_obs)
    measure.forget_peak()
    before = measure.peak()
    work = run()
    after = measure.peak()
    return Found(value, value if kind == "data" else n_obs, **asdict(work), peak=after, above=after - before)


# -- tables -----------------------------------------------------------------------------------------------------------------


def data_table(found: Sequence[Found]) -> list[str]:
    """Return seconds and memory by number of data; cost per datum over that of the first line: 1 is linear."""
    first = found[0].seconds / found[0].n_obs
    rows = []
    for f in found:
        assert f.processor is not None
        assert f.compile is not None
        each = f.seconds / f.n_obs
        times = [f"{f.compile:.1f}", f"{f.seconds:.1f}", f"{f.processor:.1f}", f"{1000 * each:.1f}", f"{each / first:.2f}"]
        rows.append([f"{f.n_obs:,}", *times, f"{f.peak:.0f}", f"{f.above:.0f}", f.certain])
    relative = f"per datum, over that of {found[0].n_obs:,}"
    columns = ["data", "compile [s]", "run [s]", "processor [s]", "run per 1,000 [s]", relative, *MEMORY, "exact or certified"]
    return measure.table(columns, rows)


def latent_table(found: dict[str, Sequence[Found]]) -> list[str]:
    """Return seconds and memory by number of latents, one reference after the other."""
    rows = [
        [
            name,
            f.value,
            f.n_obs,
            f"{f.seconds:.1f}",
            f"{1000 * f.seconds / f.n_obs:.1f}",
            f"{f.peak:.0f}",
            f"{f.above:.0f}",
            f.certain,
        ]
        for name, lines in found.items()
        for f in lines
    ]
    return measure.table(["reference", "latents", "data", "seconds", "ms per datum", *MEMORY, "exact or certified"], rows)


def gradient_table(found: Sequence[Found], what: str, terms: Callable[[Found], int], *, runs: bool) -> list[str]:
    """Return the gradient by what grew, per term (`terms(f)`: chains x data x pixels), and the seconds of `runs`."""
    rows = []
    for f in found:
        assert f.gradient is not None
        each = [f"{f.gradient:.2f}", f"{1e6 * f.gradient / terms(f):.2f}"]
        rows.append([f"{f.value:,}", *each, *([f"{f.seconds:.1f}"] if runs else []), f"{f.peak:.0f}"])
    columns = [what, "gradient [ms]", "per chain, datum and pixel [ns]", *(["chains [s]"] if runs else []), MEMORY[0]]
    return measure.table(columns, rows)


# -- the run ----------------------------------------------------------------------------------------------------------------


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = measure.parser("scaling", __doc__.splitlines()[0])
    parser.add_argument("--only", choices=["data", "rest"], help="one of the two sections")
    parser.add_argument("--data", type=int, nargs="*", help="numbers of data; default 1000 3000 (100000 takes an hour or two)")
    parser.add_argument("--alone", nargs=3, metavar=("KIND", "VALUE", "DATA"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the section."""
    args = parsed(arguments)
    measure.use(args.threads)
    if args.alone:
        kind, value, n_obs = args.alone
        print(json.dumps(asdict(alone(kind, int(value), int(n_obs)))))
        return
    sizes = dict.fromkeys(JOBS, QUICK if args.quick else SOME) | {"grid": QUICK if args.quick else FEWER}
    grown: dict[str, Sequence[int]] = {"data": [20, 40], "grid": [1, 2], "hmc": [2], "pixels": [64], "chains": [2]}
    if not args.quick:
        grown = {"data": [1000, 3000], "grid": [1, 2, 3], "hmc": [2, 5, 10], "pixels": [*BLOCKS], "chains": [2, 4, 8, 16, 32]}
    grown["data"] = args.data or grown["data"]
    for wanted, write in (("data", data_section), ("rest", section)):
        if args.only not in (None, wanted):
            continue
        found: dict[str, list[Found]] = {kind: [] for kind in grown if (kind == "data") == (wanted == "data")}
        for kind in found:
            for value in grown[kind]:
                words = ("--threads", args.threads, "--alone", kind, value, sizes[kind])
                line = Found(**measure.fresh("scaling", *words))
                found[kind].append(line)
                print(f"{kind} {value:,}: {line.seconds:.1f} s, {line.peak:.0f} MiB", flush=True)
        text = write(found, args)
        print(text)
        if not args.print:
            results.write(text)


def data_section(found: dict[str, list[Found]], args: argparse.Namespace) -> str:
    """Return the markdown section on audits of more and more data."""
    lines = [
        DATA,
        "",
        *measure.circumstances(args, ("torch", "pyro-ppl"), "python -m benchmarks.scaling --only data"),
        "",
        *measure.paragraph(
            "`er.audit` with the grid: 2 latents, 64 pixels, 10,000 draws of the guide per datum, without diagnosis. The pair "
            f"is that of the posteriors above, data drawn from it. Compiled on {WARM} data first, which stands beside; every "
            "line in a process of its own, once. Processor: of all threads together. Peak memory is the whole process's at "
            "work, torch "
            "and all; above the start: what the work added."
        ),
        "",
        *data_table(found["data"]),
    ]
    return "\n".join(lines) + "\n"


def section(found: dict[str, list[Found]], args: argparse.Namespace) -> str:
    """Return the markdown section."""
    n_obs = found["pixels"][0].n_obs
    lines = [
        HEADING,
        "",
        *measure.circumstances(args, ("torch", "pyro-ppl"), "python -m benchmarks.scaling --only rest"),
        "",
        *measure.paragraph(
            "Ours alone, every line in a process of its own, once. Pairs fitted to the digits with tanh networks of width "
            f"{HIDDEN}, data drawn from them. Peak memory is the whole process's at work, torch and all; above the start: what "
            "the work added."
        ),
        "",
        f"Latents: a reference alone, {KEEP:,} draws kept, 64 pixels.",
        "",
        *latent_table({name: found[name] for name in ("grid", "hmc")}),
        "",
        *measure.paragraph(
            f"Pixels: value and gradient of log p(x, z) of {CHAINS} chains x {n_obs} data, float32, the median of {GRADIENTS}; "
            "2 latents, the digits magnified."
        ),
        "",
        *gradient_table(found["pixels"], "pixels", lambda f: CHAINS * f.n_obs * f.value, runs=False),
        "",
        *measure.paragraph(
            f"Chains per datum: the same with 64 pixels and {n_obs} data; `chains`: refit, {sum(WARMUP)} warm-up and "
            f"{DRAWS} draws of all."
        ),
        "",
        *gradient_table(found["chains"], "chains", lambda f: f.value * f.n_obs * 64, runs=True),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
