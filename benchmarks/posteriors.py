"""`python -m benchmarks.posteriors`: ESS per second on the same posteriors, ours and the peers in one run, quality beside time.

The posteriors: a 2-D VAE with a 64-pixel Bernoulli tanh decoder is fitted to the digits (scikit-learn's, binarized), and data
are drawn from it. `--dim 50 --block 3 --hidden 200 --data 20` makes them harder: fifty latents, digits of 24 x 24. Every
method gets the same decoder weights, the same data and starting points of the same kind (half of the chains from the guide,
half from the prior); jax's, Pyro's and our log p(x, z) are compared before anything is timed.

Quality is measured by the same functions for all: bulk ESS (ArviZ's), the least over coordinates, per posterior; errors of the
posterior mean against an exact grid, or a long run of blackjax's NUTS, in MCSE (of both) and in sd of that posterior.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import arviz_stats.base
import numpy as np
import torch

from benchmarks import measure, results
from benchmarks.problem import DIM, LIKELIHOODS, PIXELS, Method, Problem, Run, Settings, counted, fitted
from elbowroom.inference.compiled.policies import policy
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.references.hmc.hmc import HMC
from elbowroom.inference.references.hmc.warmup import WARMUP, warmed_up
from elbowroom.inference.search.best_normal import refit
from elbowroom.inference.search.scout import Scout, scout
from elbowroom.inference.search.single_precision import in_precision

HEADING = "## Posteriors"
LATTICE = 3  # latents up to which a grid is exact
POINTS, RUNS, TRUTH = 104, 105, 106  # seeds
LONG = 8  # chains of the long run
WARM = 20  # data that graphs are compiled on

OWN, PEERS, OTHER = ("hmc", "chains"), ("blackjax", "numpyro", "pyro"), ("mclmc",)
CHAINS_FLOAT = "float32, metric float64"
COLUMNS = (
    "method",
    "float",
    "data x chains",
    "compile [s]",
    "run [s]",
    "ESS min / median / mean",
    "of squares, mean",
    "ESS/s",
    "gradients per posterior",
    "worst error [MCSE]",
    "median error [sd]",
    "divergences",
    "",
)


# -- ours -------------------------------------------------------------------------------------------------------------------


def ours(problem: Problem, settings: Settings) -> Method:
    """The HMC reference as an audit runs it: refit, mode search, chains until certified, tempering of the rest."""

    def run(problem: Problem, seed: int) -> Run:
        log_joint = problem.fresh()
        start = time.perf_counter()
        reference = HMC(chains=settings.chains, draws=settings.draws)
        with counted() as gradients:
            posterior = reference(log_joint, keep=settings.chains * settings.draws, seed=seed)
        seconds = time.perf_counter() - start
        certified = sum(status == "certified" for status in posterior.status)
        divergences = int(posterior.sample_stats["diverging"].nan_to_num().sum())
        per_datum = gradients[0] / problem.n_obs
        return Run(posterior.draws.numpy(), seconds, divergences, f"{certified / problem.n_obs:.1%} certified", per_datum)

    return _compiled("elbowroom HMC, with mode search and certificate", problem, settings, run)


def chains_alone(problem: Problem, settings: Settings) -> Method:
    """What the peers do, and no more: refit (for the metric), warm-up and draws; the prior's starts come from elsewhere."""

    def run(problem: Problem, seed: int) -> Run:
        known = scout(problem.log_joint).modes  # once for all runs
        log_joint, generator = problem.fresh(), torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        with counted() as gradients:
            best = refit(log_joint, family="full", seed=seed)
            log_joint = in_precision(log_joint, best.q, "auto", generator)
            sampler = warmed_up(log_joint, Scout(best, known), settings.chains, generator)
            found = sampler.run(torch.arange(problem.n_obs), settings.draws)
        seconds = time.perf_counter() - start
        per_datum = gradients[0] / problem.n_obs
        return Run(found.draws.numpy(), seconds, int(found.divergent.sum()), gradients=per_datum)

    return _compiled("elbowroom HMC, chains alone", problem, settings, run)


def _compiled(name: str, problem: Problem, settings: Settings, run: Callable[[Problem, int], Run]) -> Method:
    """Compile all graphs on a few data first, as the peers compile before they are timed; seconds above a second such run."""
    few, seconds = Problem(problem.vae, WARM), []

    def always(problem: Problem, seed: int) -> Run:
        with policy("always"):
            return run(problem, seed)

    for seed in (WARM, WARM):
        start = time.perf_counter()
        always(few, seed)
        seconds.append(time.perf_counter() - start)
    compile_seconds = max(0.0, seconds[0] - seconds[1])
    return Method(name, CHAINS_FLOAT, problem.n_obs, settings.chains, partial(always, problem), compile_seconds)


# -- quality ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """ESS per posterior (the least over coordinates) and errors of the mean against the exact posterior.

    Attributes:
        ess: of z, (N,).
        squares: of (z - mean)^2, which chains that oppose their last state do not flatter, (N,).
        in_mcse: |mean - exact mean| / (exact sd / sqrt(ESS of that coordinate)), (N, d); NaN where no exact value is known.
        in_sd: |mean - exact mean| / exact sd, (N, d), likewise.
    """

    ess: np.ndarray
    squares: np.ndarray
    in_mcse: np.ndarray
    in_sd: np.ndarray


@dataclass(frozen=True)
class Truth:
    """Mean and sd of the posteriors, (N, d), NaN where they are not known, and how many draws they are worth."""

    mean: np.ndarray
    sd: np.ndarray
    ess: np.ndarray
    words: str


def quality(draws: np.ndarray, truth: Truth) -> Quality:
    """Judge draws (chain, draw, N, d)."""
    n = draws.shape[2]
    ess, squares = _ess(draws), _ess((draws - draws.mean((0, 1))) ** 2)
    error = np.abs(draws.mean((0, 1)) - truth.mean[:n]) / truth.sd[:n]
    return Quality(ess.min(-1), squares.min(-1), error / np.sqrt(1 / ess + 1 / truth.ess[:n]), error)


def exact(problem: Problem) -> Truth:
    """Return the moments by grids."""
    found = Grid()(problem.fresh(), keep=4, seed=TRUTH)
    mean, sd = (moment.numpy().copy() for moment in found.moments())
    known = np.array([status == "exact" for status in found.status])
    sd[~known] = np.nan
    words = f"the grid ({known.sum()} of {problem.n_obs} exact)"
    print(words, flush=True)
    return Truth(mean, sd, np.full_like(mean, np.inf), words)


def long_run(problem: Problem, draws: int) -> Truth:
    """Return the moments by long chains of a program that is not ours."""
    from benchmarks import peers

    found = peers.blackjax_nuts(problem, Settings(LONG, 1_000, draws, 0, 1, 0)).run(TRUTH)
    ess = _ess(found.draws)
    words = f"{LONG} chains of {draws:,} draws by blackjax's NUTS (bulk ESS {ess.min():,.0f} or more)"
    print(words, f"{found.seconds:.0f} s", flush=True)
    return Truth(found.draws.mean((0, 1)), found.draws.std((0, 1)), ess, words)


def _ess(draws: np.ndarray) -> np.ndarray:
    """Return ArviZ's bulk ESS of each coordinate, (N, d)."""
    compute = arviz_stats.base.array_stats.ess
    columns = draws.reshape(*draws.shape[:2], -1)
    ess = [float(compute(columns[..., i], chain_axis=0, draw_axis=1)) for i in range(columns.shape[-1])]
    return np.array(ess).reshape(draws.shape[2:])


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: Method
    seconds: list[float]
    quality: Quality
    divergences: int
    note: str
    gradients: float

    @property
    def rates(self) -> list[float]:
        """Effective draws per second of each run, all posteriors together: mean ESS x N / seconds."""
        return self._rates(self.quality.ess)

    @property
    def rates_of_squares(self) -> list[float]:
        """The same of squares."""
        return self._rates(self.quality.squares)

    @property
    def per_gradient(self) -> float:
        """Effective draws per gradient."""
        return float(np.mean(self.quality.ess)) / self.gradients

    def _rates(self, ess: np.ndarray) -> list[float]:
        return [float(np.mean(ess)) * self.method.n_obs / seconds for seconds in self.seconds]

    def cells(self) -> list[str]:
        """Return the line."""
        m, q = self.method, self.quality
        compiled = "" if math.isnan(m.compile_seconds) else f"{m.compile_seconds:.1f}"
        ess = f"{q.ess.min():.0f} / {np.median(q.ess):.0f} / {q.ess.mean():.0f}"
        left = [m.name, m.dtype, f"{m.n_obs} x {m.chains}", compiled, measure.span(self.seconds), ess]
        left.append(f"{q.squares.mean():.0f}")
        gradients = "" if math.isnan(self.gradients) else f"{self.gradients:,.0f}"
        errors = [f"{np.nanmax(q.in_mcse):.1f}", f"{np.nanmedian(q.in_sd):.3f}"]
        return [*left, f"{statistics.median(self.rates):,.0f}", gradients, *errors, str(self.divergences), self.note]


def measured(methods: list[Method], truth: Truth, repeats: int) -> list[Row]:
    """Run the methods in turn, `repeats` times each with new seeds, so that a busy machine slows all; judge the first runs."""

    def run(method: Method, repeat: int) -> Run:
        found = method.run(RUNS + 1000 * repeat)
        print(f"{method.name}: {found.seconds:.2f} s", flush=True)
        return found

    runs = measure.in_turn([functools.partial(run, method) for method in methods], repeats)
    return [
        Row(m, [r.seconds for r in done], quality(done[0].draws, truth), done[0].divergences, done[0].note, done[0].gradients)
        for m, done in zip(methods, runs, strict=True)
    ]


# -- the run ----------------------------------------------------------------------------------------------------------------


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; `--quick` changes what is left as it is by default."""
    parser = measure.parser("posteriors", __doc__.splitlines()[0])
    parser.add_argument("--data", type=int, default=1000, help="number of posteriors")
    parser.add_argument("--chains", type=int, default=8, help="as an audit takes them")
    parser.add_argument("--warmup", type=int, default=300, help="of the peers, per chain")
    parser.add_argument("--draws", type=int, default=250, help="per chain, as an audit takes them")
    parser.add_argument("--pyro", type=int, default=3, help="number of posteriors for Pyro's NUTS, one chain each")
    parser.add_argument("--hidden", type=int, default=64, help="width of the decoder's hidden layer")
    parser.add_argument("--dim", type=int, default=DIM, help="number of latents")
    parser.add_argument("--block", type=int, default=1, help="each pixel of the digits becomes so many squared")
    parser.add_argument("--likelihood", choices=list(LIKELIHOODS), default="bernoulli", help="of the pixels")
    parser.add_argument("--long", type=int, default=2_000, help="draws of the chains that stand for the truth beyond a grid")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats, in turn")
    parser.add_argument("--methods", nargs="*", choices=[*OWN, *PEERS, *OTHER], help="default: all, or with --ours our own")
    if "--quick" in (sys.argv[1:] if arguments is None else arguments):
        parser.set_defaults(data=20, warmup=100, draws=100, pyro=1, repeats=1)
    args = parser.parse_args(arguments)
    if args.methods is None:
        args.methods = [*OWN, *(() if args.ours else PEERS)]
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the section."""
    args = parsed(arguments)
    measure.use(args.threads)
    settings = Settings(args.chains, args.warmup, args.draws, args.pyro, args.repeats, args.threads)
    problem = Problem(fitted(args.hidden, dim=args.dim, block=(args.block, args.block), likelihood=args.likelihood), args.data)
    methods = competitors(problem, settings, args.methods, check=args.dim > LATTICE)
    truth = exact(problem) if args.dim <= LATTICE else long_run(problem, args.long)
    text = section(measured(methods, truth, settings.repeats), truth, args)
    print(text)
    if not args.print:
        results.write(text)


def competitors(problem: Problem, settings: Settings, names: list[str], *, check: bool = False) -> list[Method]:
    """Build the methods, after checking that everyone's log p(x, z) is the same function."""
    makers: dict[str, Callable[[Problem, Settings], Method]] = {"hmc": ours, "chains": chains_alone}
    if check or set(names) - set(makers):
        from benchmarks import peers

        makers |= {"blackjax": peers.blackjax_nuts, "numpyro": peers.numpyro_nuts, "pyro": peers.pyro_nuts}
        makers |= {"mclmc": peers.blackjax_mclmc}
        z = 2 * torch.randn(
            16, problem.n_obs, problem.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(POINTS)
        )
        value = problem.log_joint(z).numpy()
        loose = 100 if problem.likelihood == "poisson" else 1  # the logarithm of a factorial has 11 digits in jax
        for who, double, tolerance in (
            ("jax, float64", True, 1e-12 * loose),
            ("jax, float32", False, 1e-5 * max(1, loose // 10)),
        ):
            problem.same(who, peers.evaluate(problem, z.numpy(), double=double), value, tolerance)
    return [makers[name](problem, settings) for name in names]


def ratios(rows: list[Row]) -> list[str]:
    """Return one sentence for each of our lines: its ESS per second over every peer's, median and range over rounds."""
    mine, theirs = ([row for row in rows if row.method.name.startswith("elbowroom") is own] for own in (True, False))
    lines = []
    for row in mine if theirs else []:
        over = "; ".join(
            f"{measure.ratio(row.rates, peer.rates, ',.2f')} x {peer.method.name}"
            f" (of squares {measure.ratio(row.rates_of_squares, peer.rates_of_squares, ',.2f')})"
            for peer in theirs
        )
        lines += ["", *measure.paragraph(f"ESS/s of {row.method.name}: {over}.")]
        counted = [peer for peer in theirs if not math.isnan(peer.gradients)]
        over = "; ".join(f"{row.per_gradient / peer.per_gradient:.2f} x {peer.method.name}" for peer in counted)
        lines += ["", *measure.paragraph(f"ESS per gradient: {over}.")] if counted else []
    return lines


def heading(args: argparse.Namespace) -> str:
    """Return the heading of the section for these options."""
    kind = "" if args.likelihood == "bernoulli" else f" of {args.likelihood.capitalize()} pixels"
    return f"{HEADING}{kind}{'' if args.dim == DIM else f' with {args.dim} latents'}"


def section(rows: list[Row], truth: Truth, args: argparse.Namespace) -> str:
    """Return the markdown section."""
    packages = ["torch", "pyro-ppl", *(["jax", "blackjax", "numpyro"] if set(args.methods) - set(OWN) else [])]
    pixels = PIXELS * args.block**2
    lines = [
        heading(args),
        "",
        *measure.circumstances(args, packages, "python -m benchmarks.posteriors"),
        "",
        *measure.paragraph(
            f"{args.data:,} posteriors of {pixels} {args.likelihood.capitalize()} pixels with {args.dim} latents: a tanh "
            f"decoder of width {args.hidden} fitted to the digits, data drawn from it. The same weights, data and kind of "
            f"starting points for all; log p(x, z) compared before timing. Peers: {args.warmup} warm-up and {args.draws} "
            "draws per chain, diagonal metric, target 0.8, the decoder batched over chains and data (Pyro: a "
            "model per datum). Ours, `chains alone`: refit, "
            f"{sum(WARMUP)} warm-up and {args.draws} draws; `with mode search and certificate`: all that an audit runs. "
            f"Seconds: median (and range) of {args.repeats} runs in turn, without compilation, which stands beside them. ESS: "
            "bulk, the least over coordinates, per posterior, of the first run, and that of (z - mean)^2; ESS/s: of z, of all "
            "posteriors of the line together. Gradients: over all chains and stages, warm-up and tuning too. Errors: of the "
            f"posterior mean, against {truth.words}."
        ),
        "",
        *measure.table(COLUMNS, [row.cells() for row in rows]),
        *ratios(rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
