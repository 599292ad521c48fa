"""`python -m benchmarks.grid`: log p(x, z) of all data at the same points, against the bare matrix product, in one run.

    python -m benchmarks.grid [--data N ...] [--points P ...] [--repeats R] [--quick] [--print]

Ours decodes the points and adds prior, normalizer and product; the bare product gets decoded points. Outputs are thrown away.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.results import write
from elbowroom.inference.references.grid.landmarks import COARSE_BLOCK
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.binary import Bernoulli
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

PIXELS, HIDDEN = 784, 200
DATA, POINTS = (2_000, 10_000), (101, 201)  # points per axis
QUICK = ((500,), (41,))
CHUNK = 4096  # points multiplied out at once, ours and theirs
SAME = 5  # points at which plain evaluation is compared
REPEATS = 5
SAID = f"""float32; Bernoulli data of {PIXELS} pixels, 2 latents, a tanh decoder of width {HIDDEN}. Both sides in turn, after a
warm-up, with the same parts of the output, which is thrown away. `points`: `shared` of {CHUNK:,} points of the grid after
another, against `logits @ x.T`. `blocks of data`: `shared_over`, as the coarse grid of an audit takes it: all points, with
{COARSE_BLOCK / 1e6:.0f} million numbers of output at a time. The bare product is given the logits; ours decodes the points and
sums the normalizer. Processor time is what other work on the machine touches least. Memory: by how much a process of its own
grew at its peak, the output's part included. The last column: the largest difference from plain evaluation at {SAME} points."""


@dataclass(frozen=True)
class Problem:
    """Data x (N, pixels), the pair, the grid z (G, 2) and its decoded logits (G, pixels)."""

    x: Tensor
    log_joint: LogJoint
    z: Tensor
    logits: Tensor


def problem(n: int, points: int) -> Problem:
    """Return data and a grid of points^2."""
    torch.manual_seed(0)
    x = torch.bernoulli(torch.rand(n, PIXELS))
    family = DiagonalNormal(2)
    decoder = MLP((2,), PIXELS, hidden=(HIDDEN,), activation="tanh")
    encoder = MLP((PIXELS,), family.param_dim, hidden=(HIDDEN,), activation="tanh")
    vae = VAE(Normal(2), Bernoulli((PIXELS,)), decoder, AmortizedGuide(encoder, family))
    axis = torch.linspace(-4, 4, points)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        return Problem(x, LogJoint(vae.model, vae.guide, x, dtype=None), z, vae.decoder(z))


def by_points(p: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return ours and the bare product, chunk of points by chunk."""

    def ours() -> None:
        for part in p.z.split(CHUNK):
            p.log_joint.shared(part)

    def bare() -> None:
        for part in p.logits.split(CHUNK):
            part @ p.x.T

    return ours, bare


def by_data(p: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return ours and the bare product, block of data by block."""
    blocks = torch.arange(len(p.x)).split(max(1, COARSE_BLOCK // len(p.z)))

    def ours() -> None:
        for _ in p.log_joint.shared_over(p.z, blocks):
            pass

    def bare() -> None:
        for rows in blocks:
            p.logits @ p.x[rows].T

    return ours, bare


WAYS = {"points": by_points, "blocks of data": by_data}


def difference(p: Problem) -> float:
    """Return the largest difference from plain evaluation at some points, in nats."""
    some = p.z[torch.linspace(0, len(p.z) - 1, SAME).long()]
    return float((p.log_joint.shared(some) - p.log_joint(some[:, None].expand(-1, len(p.x), -1))).abs().max())


def memory(n: int, points: int, way: str) -> float:
    """Return by how much this process grows while ours runs once, in MiB."""
    p = problem(n, points)
    before = measure.peak()
    WAYS[way](p)[0]()
    return measure.peak() - before


def line(n: int, points: int, way: str, args: argparse.Namespace) -> list[str]:
    """Return the row of one size."""
    p = problem(n, points)
    ours, bare = WAYS[way](p)
    ours(), bare()
    a, b = measure.in_turn([lambda _: _times(ours), lambda _: _times(bare)], args.repeats)
    (wall, busy), (wall_bare, busy_bare) = zip(*a, strict=True), zip(*b, strict=True)
    grown = measure.fresh("grid", "--memory", way, "--data", n, "--points", points, "--threads", args.threads)["MiB"]
    ratios = [measure.ratio(wall, wall_bare), measure.ratio(busy, busy_bare)]
    same = f"{difference(p):.0e} nats"
    return [
        f"{n:,} x {PIXELS} on {points}^2",
        way,
        measure.span(wall),
        measure.span(wall_bare),
        *ratios,
        f"{grown:.0f} MiB",
        same,
    ]


def _times(function: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds and the processor's seconds of one call."""
    start = time.process_time()
    wall = measure.seconds(function)
    return wall, time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every size and write the section."""
    parser = measure.parser("grid", "the shared grid against its bare matrix product")
    parser.add_argument("--data", type=int, nargs="+", help=f"numbers of data; default {DATA}")
    parser.add_argument("--points", type=int, nargs="+", help=f"points per axis, as many numbers; default {POINTS}")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--memory", choices=list(WAYS), help="only this: how far the memory of this process grows")
    args = parser.parse_args(arguments)
    data, points = QUICK if args.quick else (DATA, POINTS)
    sizes = list(zip(args.data or data, args.points or points, strict=True))
    measure.use(args.threads)
    if args.memory:
        print(json.dumps({"MiB": memory(*sizes[0], args.memory)}))
        return
    rows = []
    for n, p in sizes:
        for way in WAYS:
            rows.append(line(n, p, way, args))
            print(*rows[-1], sep=" | ", flush=True)
    columns = ["what", "parts", "ours [s]", "bare product [s]", "ratio", "of processor time", "memory", "same work?"]
    head = measure.circumstances(args, ("torch", "pyro-ppl"), "python -m benchmarks.grid")
    said = [
        f"Medians (and ranges) of {args.repeats} repeats. No GPU was at hand: no GPU figure is claimed.",
        "",
        *SAID.splitlines(),
    ]
    section = ["## Shared grid", "", *head, *said, "", *measure.table(columns, rows)]
    if not args.print:
        write("\n".join(section))


if __name__ == "__main__":
    main()
