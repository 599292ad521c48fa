"""Integration of p(x): the same integral by several methods, compared by cost.

    p(x) = integral p(x|z) p(z) dz = E_r[w(z)],    w(z) = p(x, z) / r(z),    z ~ r

| method  | r                                                             | one sample costs              |
|---------|---------------------------------------------------------------|-------------------------------|
| prior   | p(z): naive Monte Carlo, w = p(x given z)                     | one evaluation of p(x, z)     |
| encoder | q(z given x)                                                  | one                           |
| refit   | half the best normal q*, half a wider Student t               | one, and the refit before it  |
| ais     | a chain from the prior through T temperatures, w by annealing | T (L + 1), with L gradients   |

For all methods, log mean_k w_k of K samples lies below log p(x) in the mean, by about Var(w) / (2 K p(x)^2): a lower bound in
expectation that converges to log p(x). The methods differ in how fast; the bands over repetitions show it. Burda, Grosse and
Salakhutdinov 2016, https://arxiv.org/abs/1509.00519; Neal 2001, https://doi.org/10.1023/A:1008923215028.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elbowroom.analysis.audit.requested import Methods
from elbowroom.analysis.queries.best_posterior import methods_for, read
from elbowroom.errors import UserError
from elbowroom.inference.references.ais.annealing import lower, tune
from elbowroom.inference.references.ais.paths import PriorPath
from elbowroom.inference.references.importance.importance import Proposal
from elbowroom.inference.references.importance.psis import psis
from elbowroom.inference.search.best_normal import refit
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import sizes
from elbowroom.system.stages import stage

METHODS = ("prior", "encoder", "refit", "ais")
WORDS = {
    "prior": "naive Monte Carlo: samples of the prior p(z)",
    "encoder": "importance sampling from the encoder q(z|x)",
    "refit": "importance sampling from the refitted normal q*",
    "ais": "annealed importance sampling from the prior",
}
BAND = (0.05, 0.95)
CLOSE = 0.1  # nats
SHARE = 0.9  # of the repetitions that must be this close
LEAPFROGS = 4
MOST = 400  # largest number of repetitions used
BLOCK = 2**15  # samples at once


def integrate(
    log_joint: LogJoint,
    *,
    samples: int = 10_000,
    repeats: int = 20,
    temperatures: int = 30,
    methods: Sequence[str] = METHODS,
    references: Methods = "auto",
    seed: int = 0,
) -> xr.Dataset:
    """Integrate p(x) of one datum by several methods, each with increasing numbers of samples.

    Args:
        log_joint: the model, the guide and one datum.
        samples: the largest number K of samples.
        repeats: number of estimates with K samples, for the band; smaller sample sizes have more repetitions.
        temperatures: T of annealed chains; K / (T (L + 1)) chains are run, so that all methods cost the same.
        methods: some of prior, encoder, refit, ais.
        references: for log p(x), with which the estimates are compared; as in `best_posterior.methods_for`.
        seed: random seed.

    Returns:
        Over (estimator, size): `samples` K, `evaluations` of p(x, z) and its gradient, the median `estimate` of log p(x) over
            repetitions, their `mean`, the band `low`, `high` (the middle 90 %), `off`, the 90 % quantile of the distance from
            log p(x), and `repetitions`. Over estimator: `needed`, the evaluations from which on `off` is at most 0.1 nats (NaN:
            more than were made), and `pareto_k` of all samples. Scalars: `log_evidence` with `log_evidence_se`, `_lower`,
            `_upper`; `evidence_method` among the attributes. Nats.

    Raises:
        UserError: there is more than one datum, no continuous latent, or a method is unknown.
    """
    if log_joint.n_obs != 1:
        raise UserError(f"integrate: one datum is needed, got {log_joint.n_obs}")
    if log_joint.dim == 0:
        raise UserError("integrate: every latent is discrete: p(x) is a finite sum, which `audit` computes exactly")
    if not methods:
        raise UserError(f"integrate: name at least one method of {', '.join(METHODS)}")
    if unknown := [name for name in methods if name not in METHODS]:
        raise UserError(f"integrate: unknown method {unknown[0]!r}; allowed: {', '.join(METHODS)}")
    seeds = torch.randint(2**31, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    evidence = read(log_joint, methods_for(log_joint, references), keep=100, seed=seeds[0]).evidence
    truth = float(evidence.value[0])
    sizes = _sizes(samples)
    draw = {"prior": _prior, "encoder": _encoder, "refit": _refitted}
    found: dict[str, tuple[int, np.ndarray]] = {}
    with torch.no_grad():
        for name in methods:
            if name == "ais":
                cost = temperatures * (LEAPFROGS + 1)
                found[name] = cost, _annealed(log_joint, repeats * max(1, samples // cost), temperatures, seeds[4])
            else:
                found[name] = 1, draw[name](log_joint, repeats * samples, seeds[1 + METHODS.index(name)])
    rows = [_curve(log_w, cost, sizes, truth) for cost, log_w in found.values()]
    columns = {key: (("estimator", "size"), np.stack([row[key] for row in rows])) for key in rows[0]}
    needed = [_needed(row) for row in rows]
    tails = [_tail(log_w) for _, log_w in found.values()]
    dataset = xr.Dataset(
        {
            **columns,
            "needed": ("estimator", needed),
            "pareto_k": ("estimator", tails),
            "log_evidence": truth,
            "log_evidence_se": float(evidence.error[0]),
            "log_evidence_lower": float(evidence.lower[0]),
            "log_evidence_upper": float(evidence.upper[0]),
        },
        coords={"estimator": list(found)},
        attrs={
            "evidence_method": str(evidence.method[0]),
            "evidence_reason": str(evidence.reason[0]),
            "exact": int(evidence.is_exact[0]),
            "temperatures": temperatures,
            "leapfrogs": LEAPFROGS,
            "dimensions": log_joint.dim,
        },
    )
    for name, (units, words) in ABOUT.items():
        dataset[name].attrs = {"units": units, "long_name": words}
    return dataset


ABOUT = {
    "samples": ("1", "samples K behind one estimate"),
    "evaluations": ("1", "evaluations of p(x, z) and of its gradient behind one estimate"),
    "estimate": ("nats", "log mean w of K samples, median over repetitions; below log p(x) in the mean"),
    "mean": ("nats", "its mean over repetitions"),
    "low": ("nats", "5 % quantile over repetitions"),
    "high": ("nats", "95 % quantile over repetitions"),
    "off": ("nats", f"distance from log p(x) that {SHARE:.0%} of repetitions stay below; NaN where only bounds are known"),
    "repetitions": ("1", "number of repetitions"),
    "needed": ("1", f"evaluations from which on {SHARE:.0%} of repetitions are within {CLOSE} nats; NaN: more than were made"),
    "pareto_k": ("1", "k-hat of all samples' weights"),
    "log_evidence": ("nats", "log p(x) by the method that evidence_method names; NaN where only bounds are known"),
    "log_evidence_se": ("nats", "its numerical or standard error"),
    "log_evidence_lower": ("nats", "lower end"),
    "log_evidence_upper": ("nats", "upper end"),
}


def _sizes(samples: int) -> list[int]:
    """Return 1, 2, 5, 10, ... up to and including the number of samples."""
    ladder = [m * 10**k for k in range(12) for m in (1, 2, 5)]
    return [size for size in ladder if size < samples] + [samples]


def _curve(log_w: np.ndarray, cost: int, sizes: Sequence[int], truth: float) -> dict[str, np.ndarray]:
    """Return the distribution of the estimates within each cost in `sizes`."""
    names = ("samples", "evaluations", "estimate", "mean", "low", "high", "off", "repetitions")
    out = {name: np.full(len(sizes), np.nan) for name in names}
    for i, size in enumerate(sizes):
        k = size // cost
        if k < 1:
            continue
        times = min(MOST, len(log_w) // k)
        values = _log_mean(log_w[: times * k].reshape(times, k))
        out["samples"][i], out["evaluations"][i], out["repetitions"][i] = k, k * cost, times
        out["estimate"][i], out["mean"][i] = np.median(values), values.mean()
        out["low"][i], out["high"][i] = np.quantile(values, BAND)
        out["off"][i] = np.quantile(np.abs(values - truth), SHARE) if math.isfinite(truth) else np.nan
    return out


def _needed(row: dict[str, np.ndarray]) -> float:
    """Return the evaluations from which on the estimate stays close."""
    close = row["off"] <= CLOSE
    stays = np.flip(np.logical_and.accumulate(np.flip(close | np.isnan(row["evaluations"])))) & close
    return float(row["evaluations"][np.argmax(stays)]) if stays.any() else math.nan


def _tail(log_w: np.ndarray) -> float:
    """Return k-hat of weights; NaN for fewer than 100."""
    return float(psis(torch.as_tensor(log_w)[:, None]).pareto_k[0]) if len(log_w) >= 100 else math.nan


def _log_mean(log_w: np.ndarray) -> np.ndarray:
    top = log_w.max(1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        value: np.ndarray = np.log(np.exp(log_w - top).mean(1)) + top[:, 0]
    return value


def _in_blocks(number: int, seed: int, weigh: Callable[[int, int], Tensor]) -> np.ndarray:
    """Return log weights of `number` samples, (S,), computed in blocks."""
    parts = [weigh(size, seed + i) for i, size in enumerate(sizes(number, BLOCK))]
    found: np.ndarray = torch.cat(parts).double().cpu().numpy()
    return np.where(np.isnan(found), -np.inf, found)


@stage("prior")
def _prior(log_joint: LogJoint, number: int, seed: int) -> np.ndarray:
    return _in_blocks(number, seed, lambda k, s: log_joint.terms(log_joint.sample_prior(k, s))[1][:, 0])


@stage("encoder")
def _encoder(log_joint: LogJoint, number: int, seed: int) -> np.ndarray:
    def weigh(k: int, s: int) -> Tensor:
        z, log_q = log_joint.sample_guide(k, s)
        return (log_joint(z) - log_q)[:, 0]

    return _in_blocks(number, seed, weigh)


@stage("refit")
def _refitted(log_joint: LogJoint, number: int, seed: int) -> np.ndarray:
    proposal = Proposal.around(refit(log_joint, family="full", seed=seed).q)

    def weigh(k: int, s: int) -> Tensor:
        z, log_r = proposal.sample(k, torch.Generator(device=log_joint.device).manual_seed(s))
        return (log_joint(z).double() - log_r.double())[:, 0]

    return _in_blocks(number, seed + 1, weigh)


@stage("ais")
def _annealed(log_joint: LogJoint, chains: int, temperatures: int, seed: int) -> np.ndarray:
    path = PriorPath(log_joint, None, seed=seed)
    plan = tune(path, temperatures=temperatures, leapfrogs=LEAPFROGS, seed=seed + 1)
    found: np.ndarray = lower(path, plan, chains=chains, seed=seed + 2).log_weights[:, 0].double().cpu().numpy()
    return found
