"""The list of programs: what each is, how it is built, and what is known of it from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor

Function = Callable[..., Any]


@dataclass(frozen=True)
class Pair:
    """A model and a guide with their arguments.

    Attributes:
        model: p(x, z).
        guide: q(z|x).
        args: arguments of both.
        options: further arguments of `er.audit`, such as `plate` or `hold`.
        evidence: log p(x) of each datum, (N,), by a computation that shares nothing with Elbowroom; None if there is none.
        plain: the pair whose ELBO Pyro is asked for, where its own of this program is another quantity; None: the pair itself.
    """

    model: Function
    guide: Function
    args: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    evidence: Callable[[], Tensor] | None = None
    plain: tuple[Function, Function, tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class Entry:
    """A program of the page.

    Attributes:
        name: what it is.
        source: where the program is from; it is rewritten here in our own words.
        make: builds it.
        refused: part of the message with which it is refused; None where it is audited.
        cure: what the message advises, built; None where there is none.
        certified: whether log p(x) of every datum is exact or certified; otherwise the audit says that it is not.
    """

    name: str
    source: str
    make: Callable[[], Pair]
    refused: str | None = None
    cure: Callable[[], Pair] | None = None
    certified: bool = True


ENTRIES: list[Entry] = []


def program(
    name: str, source: str, refused: str | None = None, cure: Callable[[], Pair] | None = None, *, certified: bool = True
) -> Callable[[Callable[[], Pair]], Callable[[], Pair]]:
    """Put the function that builds a pair on the list."""

    def add(make: Callable[[], Pair]) -> Callable[[], Pair]:
        ENTRIES.append(Entry(name, source, make, refused, cure, certified))
        return make

    return add


def trained(model: Function, guide: Function, args: Sequence[Any], steps: int = 400, rate: float = 0.02) -> None:
    """Maximise the ELBO over the parameters of both."""
    svi = SVI(model, guide, ClippedAdam({"lr": rate}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)


def draws(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def over_line(log_p: Callable[[Tensor], Tensor], low: float = -8.0, high: float = 8.0, points: int = 4001) -> Tensor:
    """Return the log of the integral of exp log_p(z), (points,) -> (points, N), over a line, by the trapezoidal rule."""
    z = torch.linspace(low, high, points, dtype=torch.float64)
    ends = torch.zeros_like(z)
    ends[[0, -1]] = -math.log(2)
    return (log_p(z).double() + ends[:, None]).logsumexp(0) + (z[1] - z[0]).log()


def over_plane(log_p: Callable[[Tensor], Tensor], edge: float = 7.0, points: int = 401) -> Tensor:
    """Return the log of the integral over a square, (points^2, 2) -> (points^2, N)."""
    line = torch.linspace(-edge, edge, points, dtype=torch.float64)
    return log_p(torch.cartesian_prod(line, line)).double().logsumexp(0) + 2 * (line[1] - line[0]).log()


def fresh() -> None:
    """Begin with an empty parameter store and a fixed seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
