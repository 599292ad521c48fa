"""`python -m benchmarks.training`: seconds per training step and per epoch, ours and the peers', quality beside time."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import pyro
import torch
from torch import Tensor

from benchmarks import measure, results, trainers
from benchmarks.images import images
from benchmarks.trainers import COMPILED, EAGER, PRODUCTS, PYTHAE, SVI, Fit, Steps
from elbowroom.inference.fit.loop import evaluate_elbo
from elbowroom.models.vae import VAE

STEP, EPOCH = "## Training step", "## Training epoch"
PACKAGES = ("torch", "pyro-ppl")
NO_GPU = "No GPU was at hand: no GPU figure is claimed."
HIDDEN, LATENT, GPU_LATENT = 400, 20, 50
WARM = 10  # steps before any is timed, beside the first

# -- steps ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """What one contestant's steps took: seconds per step in each round, compilation, and the loss after all of them.

    Attributes:
        seconds: per step, one number per round.
        compile: seconds of the first step above those of the others; NaN where nothing was compiled.
        loss: before the last step, in nats per datum.
    """

    name: str
    batch: int
    seconds: list[float]
    compile: float
    loss: float


def contestants(vae: VAE, batch: int) -> dict[str, Steps]:
    """Return who takes steps, all from the weights of `vae`."""
    ours = {trainers.our_name(c): trainers.ours(_copy(vae), batch, c) for c in trainers.compilations()}
    hand = {EAGER: trainers.by_hand(vae), COMPILED: trainers.by_hand(vae, compiled=True)}
    return ours | hand | {SVI: trainers.by_svi(vae), PRODUCTS: trainers.products(vae)}


def steps(x: Tensor, latent_dim: int, *, rounds: int, count: int) -> list[Pace]:
    """Time everyone's steps on one batch x (B, pixels), in turn; the noise of a round has the same seed for all."""
    torch.compiler.reset()
    vae = trainers.vae_of(x, HIDDEN, latent_dim)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        who = contestants(vae, len(x))
        first = {name: _timed(x, take, 1, 0)[0] for name, take in who.items()}
        for take in who.values():
            _timed(x, take, WARM, 1)
        calls = [functools.partial(_round, x, take, count) for take in who.values()]
        found = measure.in_turn(calls, rounds)
    paces = []
    for name, of_one in zip(who, found, strict=True):
        each = [seconds / count for seconds, _ in of_one]
        compiled = first[name] - statistics.median(each) if "compile" in name else math.nan
        paces.append(Pace(name, len(x), each, compiled, of_one[-1][1]))
        print(f"batch {len(x)}, {name}: {1e3 * statistics.median(each):.2f} ms", flush=True)
    return paces


def _round(x: Tensor, take: Steps, count: int, number: int) -> tuple[float, float]:
    return _timed(x, take, count, 2 + number)


def _timed(x: Tensor, take: Steps, count: int, seed: int) -> tuple[float, float]:
    """Return seconds of so many steps, and the last one's loss."""
    torch.manual_seed(seed)
    found: list[float] = []
    seconds = measure.seconds(_waiting(x, lambda: found.append(take(x, count))))
    return seconds, found[0]


def _waiting(x: Tensor, function: Callable[[], None]) -> Callable[[], None]:
    """Let a function begin and end with an idle device."""
    if x.device.type == "cpu":
        return function
    torch.cuda.synchronize(x.device)

    def run() -> None:
        function()
        torch.cuda.synchronize(x.device)

    return run


def _copy(vae: VAE) -> VAE:
    return trainers.Plain(vae).into(vae)


def step_table(paces: Sequence[Pace]) -> list[str]:
    """Return the table: milliseconds per step, and ratios to the step written by hand, eager, of the same batch."""
    rows = []
    for pace in paces:
        base = next(other for other in paces if other.batch == pace.batch and other.name == EAGER)
        compiled = "" if math.isnan(pace.compile) else f"{pace.compile:.1f}"
        over = "1" if pace is base else measure.ratio(pace.seconds, base.seconds)
        mine = measure.span([1e3 * s for s in pace.seconds])
        rows.append([f"{pace.batch:,}", pace.name, compiled, mine, over, "" if math.isnan(pace.loss) else f"{pace.loss:.4f}"])
    return measure.table(
        ["batch", "who", "compile [s]", "step [ms]", "over PyTorch by hand", "loss after the same steps"], rows
    )


# -- epochs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epochs:
    """What one contestant's fits took.

    Attributes:
        seconds: of each epoch but the first of each fit.
        first: seconds of the first epoch of each fit, with whatever was compiled in it.
        elbo: of held-out data after the last epoch, of each fit, nats per datum.
    """

    name: str
    batch: int
    seconds: list[float]
    first: list[float]
    elbo: list[float]


def fitters(*, peers: bool) -> dict[str, Fit]:
    """Return who fits."""
    ours: dict[str, Fit] = {
        trainers.our_name(c): functools.partial(trainers.our_fit, compile=c) for c in trainers.compilations()
    }
    hand: dict[str, Fit] = {EAGER: trainers.fit_by_hand, COMPILED: functools.partial(trainers.fit_by_hand, compiled=True)}
    return ours | hand | {SVI: trainers.fit_by_svi} | ({PYTHAE: trainers.fit_by_pythae} if peers else {})


def epochs(device: torch.device, batch: int, args: argparse.Namespace) -> list[Epochs]:
    """Time everyone's fits, each in a process of its own, one epoch of everyone after the other."""
    size = size_of(args)
    found = [Epochs(name, batch, [], [], []) for name in fitters(peers=not args.ours)]
    options = ["--threads", args.threads, *(["--quick"] if args.quick else [])]
    for number in range(size.fits):
        with contextlib.ExitStack() as stack:
            workers = [
                stack.enter_context(measure.Worker("training", *options, "--alone", one.name, device, batch, number))
                for one in found
            ]
            for epoch in range(size.epochs):
                for one, worker in zip(found, workers, strict=True):
                    (one.seconds if epoch else one.first).append(float(worker.turn()))
            for one, worker in zip(found, workers, strict=True):
                one.elbo.append(float(worker.turn()))
                mine = statistics.median(one.seconds)
                print(f"{one.name}: {mine:.3f} s an epoch, held-out ELBO {one.elbo[-1]:.2f}", flush=True)
    return found


def alone(name: str, device: torch.device, batch: int, seed: int, size: Size) -> None:
    """Fit in this process, an epoch whenever the parent says so; judge the weights by one function, with the same noise."""
    torch.compiler.config.force_disable_caches = True
    x, held_out, _ = images(size.rows, size.held_out)
    x, held_out = x.to(device), held_out.to(device)
    vae = trainers.vae_of(x, HIDDEN, LATENT if device.type == "cpu" else GPU_LATENT)
    measure.await_turn()
    with pyro.validation_enabled(False):
        fitted = fitters(peers=name == PYTHAE)[name](vae, x, batch, size.epochs, seed, measure.end_turn)
    measure.end_turn(evaluate_elbo(fitted, held_out))


def epoch_table(found: Sequence[Epochs]) -> list[str]:
    """Return the table: seconds per epoch, and their ratio to the best of ours at the same batch."""
    rows = []
    for one in found:
        mine = [other for other in found if other.batch == one.batch and other.name.startswith(trainers.OURS)]
        best = min(mine, key=lambda other: statistics.median(other.seconds))
        over = "1" if one is best else measure.ratio(one.seconds, best.seconds)
        elbo = measure.span(one.elbo, ".2f")
        rows.append([f"{one.batch:,}", one.name, f"{max(one.first):.2f}", measure.span(one.seconds), over, elbo])
    head = ["batch", "who", "first epoch, slowest [s]", "epoch [s]", "over the faster of ours", "held-out ELBO [nats]"]
    return measure.table(head, rows)


# -- the run ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How much is measured: rounds and steps per round, fits and epochs per fit, training and held-out images."""

    rounds: int
    steps: int
    fits: int
    epochs: int
    rows: int
    held_out: int


FULL, QUICK = Size(7, 30, 6, 8, 12_800, 2_000), Size(2, 3, 1, 2, 1_280, 200)


def size_of(args: argparse.Namespace) -> Size:
    """Return how much is measured."""
    return QUICK if args.quick else FULL


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = measure.parser("training", __doc__.splitlines()[0])
    parser.add_argument("--only", choices=["steps", "epochs"], help="one of the two sections")
    parser.add_argument("--alone", nargs=4, metavar=("NAME", "DEVICE", "BATCH", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write both sections."""
    args = parsed(arguments)
    measure.use(args.threads)
    size = size_of(args)
    if args.alone:
        name, device, batch, seed = args.alone
        alone(name, torch.device(device), int(batch), int(seed), size)
        return
    torch.compiler.config.force_disable_caches = True  # or what was compiled yesterday would count as free
    x, held_out, what = images(size.rows, size.held_out)
    places = [(torch.device("cpu"), LATENT, (128,) if args.quick else (128, 1024), (128,))]
    if torch.cuda.is_available():
        places.append((torch.device("cuda"), GPU_LATENT, (128, 256), (128, 256)))
    if args.only != "epochs":
        tables = []
        for device, latent_dim, batches, _ in places:
            paces = [
                pace
                for batch in batches
                for pace in steps(x[:batch].to(device), latent_dim, rounds=size.rounds, count=size.steps)
            ]
            tables.append((device, latent_dim, step_table(paces)))
        _write(step_section(tables, what, size, args), args)
    if args.only != "steps":
        peers = not args.ours
        if peers and find_spec("pythae") is None:
            raise SystemExit("pythae is not installed here: use .venv-bench (`make bench`), or --ours to leave the peers out")
        tables = []
        for device, latent_dim, _, batches in places:
            found = [one for batch in batches for one in epochs(device, batch, args)]
            tables.append((device, latent_dim, epoch_table(found)))
        _write(epoch_section(tables, what, size, args), args)


def _write(section: str, args: argparse.Namespace) -> None:
    print(section)
    if not args.print:
        results.write(section)


Tables = Sequence[tuple[torch.device, int, list[str]]]
"""Device, number of latents and lines of each table."""


def _bodies(tables: Tables, pixels: int) -> list[str]:
    """Return the tables, each with the line that says on which device and at which widths."""
    lines = []
    for device, latent_dim, rows in tables:
        name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        lines += ["", f"{name}, {pixels}-{HIDDEN}-{latent_dim}:", "", *rows]
    return lines + ([] if any(device.type == "cuda" for device, *_ in tables) else ["", NO_GPU])


def step_section(tables: Tables, what: str, size: Size, args: argparse.Namespace) -> str:
    """Return the section of steps."""
    lines = [
        STEP,
        "",
        *measure.circumstances(args, PACKAGES, "python -m benchmarks.training"),
        "",
        *measure.paragraph(
            "One step: loss, gradient, Adam; float32, tanh, Bernoulli pixels, q(z|x) diagonal normal. All start from the same "
            f"weights, see the same batch ({what}) and noise from the same seed, and maximise the same estimate of the ELBO, "
            "from one draw of z: log p(x|z) + log p(z) - log q(z|x). By hand: a fused Adam; compiled: loss and gradient by "
            "torch.compile (what that took, nothing cached, stands beside). pyro.infer.SVI: the programs of Pyro's VAE "
            f"example, checks off. {size.rounds} rounds of {size.steps} steps, everyone in turn; median (and range) over "
            "rounds, of times and of ratios: below 1 is faster than by hand. Losses that agree show that the work was the "
            f"same. {PRODUCTS.capitalize()}: what no step can do without."
        ),
        *_bodies(tables, 784),
    ]
    return "\n".join(lines) + "\n"


def epoch_section(tables: Tables, what: str, size: Size, args: argparse.Namespace) -> str:
    """Return the section of epochs."""
    packages = (*PACKAGES, *(() if args.ours else ("pythae",)))
    lines = [
        EPOCH,
        "",
        *measure.circumstances(args, packages, "python -m benchmarks.training"),
        "",
        *measure.paragraph(
            f"One epoch of {size.rows:,} images ({what}), loading and shuffling included; the model, start and Adam of the "
            "steps above, no validation data, no files. Ours: `inference.fit.svi.fit`. By hand: a loop over a tensor in "
            "memory. pyro.infer.SVI: with a DataLoader, as in Pyro's VAE example. pythae: its VAE and BaseTrainer as they "
            "come (its loader, no worker, closed-form KL, best training loss kept), the same layers. Everyone in a process "
            f"of its own, one epoch of everyone after the other, the others waiting; {size.fits} fits of {size.epochs} "
            "epochs: median (and range) over all epochs but the first of a fit, of times and of ratios. Held-out ELBO: of "
            f"{size.held_out:,} other images, by one function for all, after the last epoch (higher is better)."
        ),
        *_bodies(tables, 784),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
