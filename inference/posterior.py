"""`Posterior`, the type that every method returns, and `Reference`, the base of the reference methods."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from elbowroom.inference.program.replay import Which
from elbowroom.inference.target.discrete import discrete_draws
from elbowroom.inference.target.log_joint import LogJoint

ROUNDED = 1e-4  # largest share of the mass whose density may depend on rounding (`LogJoint.rounded`) in a trusted posterior
CHAINS = 4  # independent draws are arranged as this many chains, as ArviZ's summaries expect

Status = Literal["exact", "certified", "uncertified", "amortized", "not needed"]
Combine = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Evidence:
    """log p(x_n) per datum, in nats.

    Attributes:
        kind: `exact` (value up to the numerical `error`), `estimate` (value with standard error `error`), or `bound`
            (a probabilistic lower bound: it exceeds log p(x) + b with probability at most exp(-b); `error` is the standard
            error of the bound itself). The kind alone says what the value is, whatever the method is called.
        method: how it was computed, in words.
        value: (N,).
        error: (N,).
        upper: an upper bound that holds with a probability of at least 97.5 %, (N,), conditional on the draws of the posterior
            that it starts from being good ones; NaN where there is none.
    """

    kind: Literal["exact", "estimate", "bound"]
    method: str
    value: Tensor
    error: Tensor
    upper: Tensor | None = None


@dataclass(frozen=True)
class Posterior:
    """A posterior of every datum, from any method.

    Attributes:
        method: the method's name, e.g. `guide`, `closed_form`, `grid`.
        draws: (chain, draw, N, d), in unconstrained coordinates.
        sites: draws of the program's own sites, name -> (chain, draw, N, *shape), NaN where masked out.
        mean: posterior mean (N, d) in unconstrained coordinates, if the method knows it better than the draws do.
        covariance: covariance (N, d, d), likewise.
        sample_stats: numbers per draw, name -> (chain, draw, N); `lp` is log p(x, z) in unconstrained coordinates, nats.
        evidence: log p(x_n), if the method gives it.
        stats: further per-datum numbers, name -> (N,).
        status: per datum: `exact`, `certified`, `uncertified`, `not needed` (another reference is exact), or `amortized` for
            the guide itself.
        reason: per datum, one sentence for the status.
    """

    method: str
    draws: Tensor
    sites: dict[str, Tensor]
    status: Sequence[Status]
    reason: Sequence[str]
    mean: Tensor | None = None
    covariance: Tensor | None = None
    evidence: Evidence | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)
    sample_stats: dict[str, Tensor] = field(default_factory=dict)

    @property
    def trusted(self) -> Tensor:
        """(N,) True where the status is `exact` or `certified`."""
        return torch.tensor([s in ("exact", "certified") for s in self.status])

    @property
    def settled(self) -> Tensor:
        """(N,) True where the posterior is trusted and, if the method gives log p(x), its value is known."""
        known = self.trusted if self.evidence is None else self.evidence.value.isfinite().cpu()
        return self.trusted & known

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, (N, d) each: from `mean` and `covariance` if given, else from the draws."""
        if self.mean is not None and self.covariance is not None:
            return self.mean, self.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        flat = self.draws.flatten(0, 1)
        return flat.mean(0), flat.std(0)


def in_chains(draws: Tensor) -> Tensor:
    """Arrange S independent draws (S, ...) as (chain, draw, ...), dropping the remainder of S by 4."""
    length = len(draws) // CHAINS
    return draws[: CHAINS * length].reshape(CHAINS, length, *draws.shape[1:])


def combined(parts: Sequence[Posterior], of_draws: Combine, of_data: Combine) -> Posterior:
    """Return a posterior by the same method, with each tensor combined from those of the parts; None if a part has none.

    `of_draws` combines values per draw, (chain, draw, N, ...); `of_data` values per datum, (N, ...). Status and reason are from
    the first part.
    """
    first = parts[0]

    def made(combine: Combine, get: Callable[[Any], Tensor | None], of: Sequence[Any]) -> Any:
        tensors = [t for t in map(get, of) if t is not None]
        return combine(tensors) if len(tensors) == len(of) else None

    known = [p.evidence for p in parts if p.evidence is not None]
    columns = {name: made(of_data, attrgetter(name), known) for name in ("value", "error", "upper") if known}
    return dataclasses.replace(
        first,
        draws=of_draws([p.draws for p in parts]),
        sites={name: of_draws([p.sites[name] for p in parts]) for name in first.sites},
        mean=made(of_data, attrgetter("mean"), parts),
        covariance=made(of_data, attrgetter("covariance"), parts),
        evidence=dataclasses.replace(known[0], **columns) if len(known) == len(parts) else None,
        stats={name: of_data([p.stats[name] for p in parts]) for name in first.stats},
        sample_stats={name: of_draws([p.sample_stats[name] for p in parts]) for name in first.sample_stats},
    )


def concatenate(parts: Sequence[Posterior]) -> Posterior:
    """Join posteriors of different data by the same method along the data dimension."""
    if len(parts) == 1:
        return parts[0]
    whole = combined(parts, lambda tensors: torch.cat(tensors, 2), torch.cat)
    return dataclasses.replace(whole, status=[s for p in parts for s in p.status], reason=[r for p in parts for r in p.reason])


def rows_of(posterior: Posterior, rows: Tensor) -> Posterior:
    """Return the posterior of some of the data, in the order of `rows`."""
    part = combined([posterior], lambda t: t[0][:, :, rows.to(t[0].device)], lambda t: t[0][rows.to(t[0].device)])
    status, reason = ([words[i] for i in rows.tolist()] for words in (posterior.status, posterior.reason))
    return dataclasses.replace(part, status=status, reason=reason)


def spread(posterior: Posterior, rows: Tensor, n: int, why: str) -> Posterior:
    """Spread a posterior of the data `rows` over all n data: NaN and `not needed` elsewhere, for the reason `why`."""

    def over(values: list[Tensor], place: int) -> Tensor:
        value = values[0].cpu()
        dtype = value.dtype if value.dtype.is_floating_point else torch.get_default_dtype()
        out = torch.full((*value.shape[:place], n, *value.shape[place + 1 :]), torch.nan, dtype=dtype)
        out.movedim(place, 0)[rows.cpu()] = value.movedim(place, 0).to(dtype)
        return out

    whole = combined([posterior], partial(over, place=2), partial(over, place=0))
    status: list[Status] = ["not needed"] * n
    reason = [f"{posterior.method}: {why}"] * n
    for row, s, r in zip(rows.tolist(), posterior.status, posterior.reason, strict=True):
        status[row], reason[row] = s, r
    return dataclasses.replace(whole, status=status, reason=reason)


class Reference(ABC):
    """A method that gives the posterior of a `LogJoint` without the amortized guide's approximation.

    Constructor options are keyword-only: they are what a spec's `audit.references` may set.

    Attributes:
        name: its name in specs and files.
    """

    name: ClassVar[str]

    @abstractmethod
    def refusal(self, log_joint: LogJoint) -> str | None:
        """Say in one clause why the method cannot be used on this model; None when it can."""

    @abstractmethod
    def __call__(self, log_joint: LogJoint, *, keep: int, seed: int, until: float = math.inf) -> Posterior:
        """Compute the posterior of every datum, keeping `keep` draws each.

        Args:
            log_joint: the model and guide.
            keep: draws kept per datum.
            seed: random seed.
            until: value of `time.monotonic()` after which an iterative method stops; data without a certificate then say so.
        """


RISK, GROUPS = 0.025, 16  # probability that the bound of `sure_bound` fails, and its largest number of groups


def sure_bound(log_weights: Tensor) -> Tensor:
    """Return a lower bound on log E[w] that holds with a probability of at least 97.5 %, per datum.

    The draws are dealt into K <= 16 groups; L = min_k log mean_{group k} w - b with b = log(40) / K. By Markov's inequality the
    mean of a group exceeds E[w] exp(b) with probability at most exp(-b); all K independent means do so with probability at most
    exp(-K b) = 1 / 40. The only assumption is that weights are not negative.

    Args:
        log_weights: of independent draws or chains, (S, N), -inf for weight 0.

    Returns:
        (N,), nats; for reverse chains, where the mean weight is 1 / p(x), minus an upper bound on log p(x).
    """
    groups = min(GROUPS, len(log_weights))
    size = len(log_weights) // groups
    dealt = log_weights[: groups * size].unflatten(0, (size, groups))
    return (torch.logsumexp(dealt, 0) - math.log(size)).amin(0) - math.log(1 / RISK) / groups


def completed(log_joint: LogJoint, posterior: Posterior, seed: int, *, which: Which = "model") -> Posterior:
    """Add draws of the discrete sites, given the continuous ones, to a posterior that lacks them; return others unchanged.

    The seed must differ from that of the draws; `which` is as in `discrete_draws`.
    """
    missing = [site.name for site in log_joint.program.discrete if site.name not in posterior.sites]
    if not missing or log_joint.dim == 0:
        return posterior
    chains = posterior.draws.shape[:2]
    drawn = discrete_draws(log_joint, posterior.draws.flatten(0, 1), seed, which=which)
    sites = {name: value.unflatten(0, chains) for name, value in drawn.items()}
    return dataclasses.replace(posterior, sites={**posterior.sites, **sites})


def resample(z: Tensor, weights: Tensor, n_draws: int, generator: torch.Generator) -> Tensor:
    """Draw K = `n_draws` from particles z (S, N, d) with normalised weights (S, N), by systematic resampling: (K, N, d).

    A particle of weight W is drawn floor(K W) or ceil(K W) times. The draws are in random order.
    """
    n = z.shape[1]
    offset = torch.rand(n, 1, dtype=z.dtype, device=z.device, generator=generator)
    place = (torch.arange(n_draws, dtype=z.dtype, device=z.device) + offset) / n_draws
    cumulative = weights.T.cumsum(1).contiguous()
    index = torch.searchsorted(cumulative / cumulative[:, -1:], place).clamp_max(len(z) - 1)
    order = torch.rand(n, n_draws, dtype=z.dtype, device=z.device, generator=generator).argsort(1)
    index = index.gather(1, order).T
    return z.gather(0, index[..., None].expand(-1, -1, z.shape[-1]))
