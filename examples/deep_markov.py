"""A deep Markov model of J. S. Bach's chorales, and how good its guide's smoothing posterior is.

    z_t | z_(t-1) ~ N(m(z_(t-1)), s(z_(t-1))^2)      k = 4 latents at every step; a gated transition
    x_tj | z_t ~ Bernoulli(logit decoder(z_t)_j)     which of 88 keys sound in quarter note t
    q(z_t | z_(t-1), x_t, ..., x_T) = N              a GRU reads the chords backwards; a combiner joins it with z_(t-1)

It is a plain Pyro program: one site for each step, chorales of different lengths masked. The audit takes the whole chain as one
posterior of T k coordinates for each chorale, p(z_1, ..., z_T | x_1, ..., x_T).

    ELBOWROOM_DATA=/folder/with/data python examples/deep_markov.py       # writes runs/deep_markov; reads its weights again
    python examples/deep_markov.py FOLDER DATA [WHOLE]                    # DATA: the folder; WHOLE: so many whole chorales too

Training takes ten to twenty minutes of one core, the audit of 10 chorales of 16 steps some minutes more.

Krishnan, Shalit and Sontag (2017), https://arxiv.org/abs/1609.09869; https://pyro.ai/examples/dmm.html.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

FILE = "jsb-chorales-quarter.json"
SOURCE = "https://raw.githubusercontent.com/czhuang/JSB-Chorales-dataset/9a7f733ddb4ed91f48da64ac7f0f621c34aadd4d/" + FILE
LOWEST, KEYS = 21, 88
STEPS, CHORALES = 16, 10  # audited: the first steps of some test chorales


class Transition(nn.Module):
    """z_(t-1) -> mean and scale of z_t: a gate chooses between a linear and a non-linear map."""

    def __init__(self, k: int, hidden: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(k, hidden), nn.ReLU(), nn.Linear(hidden, k), nn.Sigmoid())
        self.proposed = nn.Sequential(nn.Linear(k, hidden), nn.ReLU(), nn.Linear(hidden, k))
        self.linear, self.scale = nn.Linear(k, k), nn.Linear(k, k)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z):
        """Return mean and scale, (..., k)."""
        gate, proposed = self.gate(z), self.proposed(z)
        return (1 - gate) * self.linear(z) + gate * proposed, F.softplus(self.scale(F.relu(proposed))) + 1e-3


class Combiner(nn.Module):
    """z_(t-1) and the backward GRU's state at t -> mean and scale of q(z_t | z_(t-1), x_t, ..., x_T)."""

    def __init__(self, k: int, states: int):
        super().__init__()
        self.join, self.loc, self.scale = nn.Linear(k, states), nn.Linear(states, k), nn.Linear(states, k)

    def forward(self, z, state):
        """Return mean and scale, (..., k)."""
        h = 0.5 * (torch.tanh(self.join(z)) + state)
        return self.loc(h), F.softplus(self.scale(h)) + 1e-3


class DeepMarkov(nn.Module):
    """Pyro's two programs. x is (N, T, 88), padded; mask (N, T) says which steps are there."""

    def __init__(self, keys: int = KEYS, k: int = 4, hidden: int = 32, states: int = 64):
        super().__init__()
        self.transition, self.combiner = Transition(k, hidden), Combiner(k, states)
        self.emitter = nn.Sequential(
            nn.Linear(k, hidden), nn.ReLU(), nn.Linear(hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, keys)
        )
        self.rnn = nn.GRU(keys, states, batch_first=True)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(k)), nn.Parameter(torch.zeros(k))

    def model(self, x, mask, kl_weight=1.0):
        """p(z_1) p(x_1 | z_1) p(z_2 | z_1) p(x_2 | z_2) ..."""
        pyro.module("deep_markov", self)
        with pyro.plate("chorales", len(x)):
            z = self.z_0.expand(len(x), -1)
            for t in pyro.markov(range(x.shape[1])):
                loc, scale = self.transition(z)
                with poutine.mask(mask=mask[:, t]):
                    with poutine.scale(scale=kl_weight):
                        z = pyro.sample(f"z_{t + 1}", dist.Normal(loc, scale).to_event(1))
                    pyro.sample(f"x_{t + 1}", dist.Bernoulli(logits=self.emitter(z)).to_event(1), obs=x[:, t])

    def guide(self, x, mask, kl_weight=1.0):
        """q(z_1 | x) q(z_2 | z_1, x) ..."""
        pyro.module("deep_markov", self)
        states = self.backwards(x, mask)
        with pyro.plate("chorales", len(x)):
            z = self.z_q_0.expand(len(x), -1)
            for t in pyro.markov(range(x.shape[1])):
                loc, scale = self.combiner(z, states[:, t])
                with poutine.mask(mask=mask[:, t]), poutine.scale(scale=kl_weight):
                    z = pyro.sample(f"z_{t + 1}", dist.Normal(loc, scale).to_event(1))

    def backwards(self, x, mask):
        """Return the GRU's state at every step after reading the chords from the last one back to it, (N, T, states)."""
        lengths = mask.sum(1)
        turned = (lengths[:, None] - 1 - torch.arange(x.shape[1])) % x.shape[1]  # the first `length` steps in reverse
        reverse = lambda t: t.gather(1, turned[..., None].expand(-1, -1, t.shape[-1]))
        packed = pack_padded_sequence(reverse(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return reverse(pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0])


def chorales(folder: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Read x (N, T, 88) and mask (N, T) of the published parts: train (229), valid (76), test (77)."""
    places = [Path(folder) / name for name in (FILE + ".gz", FILE)] if folder else []
    path = next((place for place in places if place.exists()), None)
    if path is None:
        where = f"{folder} holds no {FILE} or {FILE}.gz" if folder else "no folder of data is named"
        raise SystemExit(
            f"deep_markov: {where}; download {SOURCE} into a folder, and name it: "
            "ELBOWROOM_DATA=FOLDER python examples/deep_markov.py"
        )
    raw = path.read_bytes()
    found = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    parts = {}
    for name, sequences in found.items():
        x = torch.zeros(len(sequences), max(map(len, sequences)), KEYS)
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        for n, sequence in enumerate(sequences):
            mask[n, : len(sequence)] = True
            for t, chord in enumerate(sequence):
                x[n, t, [note - LOWEST for note in chord]] = 1
        parts[name] = x, mask
    return parts


def train(x: Tensor, mask: Tensor, epochs: int = 200, seed: int = 0, warm: float = 0.25, size: int = 24, **sizes) -> DeepMarkov:
    """Train by SVI, chorales of like lengths together; in the first epochs (a share `warm`) the KL counts less."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    dmm = DeepMarkov(x.shape[-1], **sizes)
    batches = mask.sum(1).argsort().split(size)
    steps = epochs * len(batches)
    svi = SVI(dmm.model, dmm.guide, ClippedAdam({"lr": 5e-3, "lrd": 0.1 ** (1 / steps), "clip_norm": 10.0}), Trace_ELBO())
    for epoch in range(epochs):
        kl_weight, loss = min(1.0, 0.2 + 0.8 * epoch / max(1.0, warm * epochs)), 0.0
        for b in torch.randperm(len(batches)).tolist():
            rows = batches[b]
            longest = int(mask[rows].sum(1).max())
            loss += svi.step(x[rows, :longest], mask[rows, :longest], kl_weight)
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}: -ELBO {loss / mask.sum():.3f} nats per step, KL counted {kl_weight:.2f}", flush=True)
    return dmm.eval()


@torch.no_grad()
def elbo_per_step(dmm: DeepMarkov, x: Tensor, mask: Tensor, draws: int = 20) -> tuple[float, float]:
    """ELBO of all sequences / all steps, as published, and its standard error over draws."""
    found = [-Trace_ELBO().loss(dmm.model, dmm.guide, x, mask) / int(mask.sum()) for _ in range(draws)]
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(draws))


# -- which steps carry the gap -----------------------------------------------------------------------------------------------


def each_other(loc: Tensor, scale: Tensor, z: Tensor) -> Tensor:
    """Return log N(z_s; loc_p, scale_p^2), summed over k, for all p and s, (P, S), by one matrix product."""
    centre, precision = z.mean(0), scale**-2  # centred, so that the squares do not cancel
    z, loc = z - centre, loc - centre
    square = torch.cat([precision, -2 * loc * precision], 1) @ torch.cat([z**2, z], 1).T
    whole = (loc**2 * precision).sum(1) + 2 * scale.log().sum(1) + z.shape[1] * math.log(2 * math.pi)
    return -0.5 * (square + whole[:, None])


@torch.no_grad()
def by_step(dmm, reference, log_evidence, error=0.0, *, draws=500, particles=2048, groups=8, seed=0):
    """Split the gap of one sequence by steps: the chain rule of KL(q(z|x) || p(z|x)), with standard errors.

        c_t = E_q KL(q(z_t | z_<t, x) || p(z_t | z_<t, x)) = E_q[log b_(t-1)(z_(t-1)) - log b_t(z_t) - e_t] >= 0
        e_t = log p(z_t | z_(t-1)) + log p(x_t | z_t) - log q(z_t | z_<t, x)
        b_t(z) = p(x_(t+1), ..., x_T | z_t = z) = p(x) E[p(z'_(t+1) | z) / a(z'_(t+1))],  z' ~ p(z | x)
        a(z') = p(z'_(t+1) = z', x_1, ..., x_t), by a particle filter;  b_0 = p(x),  b_T = 1

    The sum of c_t is log p(x) - ELBO, the audit's gap. b_t is the identity of the two-filter formula: the smoothing density
    of z_(t+1) is a(z') p(x_(t+1), ..., x_T | z') / p(x). Errors: over the draws of q, and by a jackknife that leaves out in
    turn one in `groups` of the reference draws together with one in `groups` independent filters.

    Args:
        dmm: model, guide and one sequence, as `Steps` has them.
        reference: (S, T, k) draws from p(z|x), in the order of their chains.
        log_evidence: log p(x).
        error: its standard error.
        draws: of q.
        particles: of each filter.
        groups: of reference draws, and filters.
        seed: random seed.

    Returns:
        c (T,) and its standard errors (T,), in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    x, steps, normal = dmm.x, len(dmm.x), lambda z, loc, scale: dist.Normal(loc, scale).log_prob(z).sum(-1)
    noise = lambda *shape: torch.randn(*shape, dtype=reference.dtype, generator=generator)
    k, number = reference.shape[-1], len(reference) // groups
    reference = reference[: number * groups]

    z, of_step, chain = dmm.start_of_guide(draws), [], []
    for t in range(steps):  # draws of q with e_t
        loc, scale = dmm.posterior_step(z, t)
        new = loc + scale * noise(draws, k)
        before = dmm.z_0.expand(draws, -1) if t == 0 else z
        of_step.append(normal(new, *dmm.transition(before)) + dmm.emission(new, x[t]) - normal(new, loc, scale))
        chain.append(z := new)

    ahead = torch.zeros(groups, steps - 1, len(reference), dtype=reference.dtype)  # log a(z'_(t+1)) by each filter
    for g in range(groups):
        at, log_x = dmm.z_0.expand(particles, -1), 0.0
        for t in range(steps - 1):
            loc, scale = dmm.transition(at)
            at = loc + scale * noise(particles, k)
            log_w = dmm.emission(at, x[t])
            log_x = log_x + log_w.logsumexp(0) - math.log(particles)
            loc, scale = dmm.transition(at)
            ahead[g, t] = log_x + (log_w.log_softmax(0)[:, None] + each_other(loc, scale, reference[:, t + 1])).logsumexp(0)
            at = at[torch.multinomial(log_w.softmax(0), particles, True, generator=generator)]

    def contributions(keep: list[int]) -> Tensor:
        """Return c_t for each draw of q, (T, draws), from some of the groups."""
        a = ahead[keep].logsumexp(0) - math.log(len(keep))
        rows = torch.cat([torch.arange(g * number, (g + 1) * number) for g in keep])
        rest = [torch.full((draws,), log_evidence, dtype=a.dtype)]  # log b_t at the draws
        for t in range(steps - 1):
            ratio = transitions[t][:, rows] - a[t, rows]
            rest.append(log_evidence + ratio.logsumexp(1) - math.log(len(rows)))
        rest.append(torch.zeros(draws, dtype=a.dtype))
        return torch.stack([rest[t] - rest[t + 1] - of_step[t] for t in range(steps)])

    transitions = [each_other(*dmm.transition(chain[t]), reference[:, t + 1]) for t in range(steps - 1)]
    every = list(range(groups))
    whole = contributions(every)
    without = torch.stack([contributions([h for h in every if h != g]).mean(1) for g in every])
    jackknife = (groups - 1) / groups * (without - without.mean(0)).square().sum(0)
    variance = whole.var(1) / draws + jackknife
    variance[-1] += error**2  # log p(x) cancels in all steps but the last
    return whole.mean(1), variance.sqrt()


class Steps:
    """One chorale (T, 88) for `by_step`, in double precision."""

    def __init__(self, dmm: DeepMarkov, x: Tensor):
        self.dmm, self.x = dmm, x
        self.transition, self.z_0 = dmm.transition, dmm.z_0.detach()
        self.states = dmm.backwards(x[None], torch.ones(1, len(x), dtype=torch.bool))[0].detach()

    def emission(self, z, x_t):
        """Return log p(x_t | z_t), (S,)."""
        return dist.Bernoulli(logits=self.dmm.emitter(z)).log_prob(x_t).sum(-1)

    def start_of_guide(self, draws):
        """Return what the guide's first step starts from, (S, k)."""
        return self.dmm.z_q_0.detach().expand(draws, -1)

    def posterior_step(self, z, t):
        """Return mean and scale of q(z_t | z_(t-1), x)."""
        return self.dmm.combiner(z, self.states[t])


# -- the audit -----------------------------------------------------------------------------------------------------------------


def median(values: np.ndarray) -> tuple[float, float, float]:
    """Return the median and its distribution-free 95 % interval, by order statistics."""
    ordered, n = np.sort(values), len(values)
    k = max(int(binom.ppf(0.025, n, 0.5)) - 1, 0)
    return float(np.median(values)), float(ordered[k]), float(ordered[n - 1 - k])


def audited(dmm: DeepMarkov, x: Tensor, mask: Tensor, what: str):
    """Audit the smoothing posteriors of some chorales, print what was found, and return the audit."""
    import elbowroom as er

    began, steps = time.monotonic(), int(mask.sum())
    audit = er.audit(dmm.model, dmm.guide, x, mask, budget=None, diagnose=False)
    table = audit.table
    sure = (table["status"] == "certified").any("reference").values
    gap = table["gap_total"].values[sure]
    print(f"{what}: {sure.sum()} of {len(x)} certified, in {time.monotonic() - began:.0f} s")
    print("  gap per chorale, nats: median {:.2f} [{:.2f}, {:.2f}]".format(*median(gap)), " each:", np.round(np.sort(gap), 2))
    if sure.all():
        log_p, elbo = table["log_evidence"].values.sum() / steps, table["elbo"].values.sum() / steps
        error = float(np.sqrt(np.square(table["log_evidence_se"].values).sum())) / steps
        print(f"  nats per step: log p(x) {log_p:.3f} (error {error:.3f}), ELBO {elbo:.3f}")
    return audit


def steps_of_the_gap(dmm: DeepMarkov, x: Tensor, audit) -> tuple[Tensor, Tensor]:
    """Split the gap of every certified chorale by steps: c and its errors, each (chorales, T)."""
    double, x = copy.deepcopy(dmm).double(), x.double()
    draws = audit.posteriors["hmc"].posterior
    table, found = audit.table, []
    for n in range(len(x)):
        if str(table["status"].sel(reference="hmc").values[n]) == "certified":
            sites = [torch.tensor(draws[f"z_{t + 1}"].values[:, :, n]).flatten(0, 1) for t in range(x.shape[1])]
            log_p, error = float(table["log_evidence"][n]), float(table["log_evidence_se"][n])
            found.append(by_step(Steps(double, x[n]), torch.stack(sites, 1).double(), log_p, error, seed=n))
    c, error = map(torch.stack, zip(*found, strict=True))
    return c, error


def draw_steps(c: Tensor, error: Tensor, path: Path) -> None:
    """Draw the mean contribution of each step with its 95 % interval, and that of every chorale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes, at = figure.subplots(), np.arange(1, c.shape[1] + 1)
    axes.bar(at, c.mean(0), color="#9db7d5", label=f"mean of {len(c)} chorales, with its error (95 %)")
    axes.errorbar(at, c.mean(0), 1.96 * error.square().sum(0).sqrt() / len(c), fmt="none", color="#23486f", capsize=2)
    spread = np.random.default_rng(0).uniform(-0.2, 0.2, c.shape)
    axes.scatter((at + spread).ravel(), c.numpy().ravel(), s=9, color="#b5562c", linewidths=0, label="one chorale")
    axes.set(xlabel="step t", ylabel="share of the gap (nats)", xticks=at)
    axes.set_title("Which steps carry the gap: E KL(q(z_t | z_<t, x) || p(z_t | z_<t, x))", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/deep_markov")
    parts = chorales(sys.argv[2] if len(sys.argv) > 2 else os.environ.get("ELBOWROOM_DATA"))
    whole = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "weights.pt"
    if weights.exists():
        dmm = DeepMarkov().eval()
        dmm.load_state_dict(torch.load(weights, weights_only=True))
        print(f"weights of {weights}")
    else:
        dmm = train(*parts["train"])
        torch.save(dmm.state_dict(), weights)
    x, mask = parts["test"]
    print("ELBO of {} test chorales: {:.3f} nats per step (error {:.3f})".format(len(x), *elbo_per_step(dmm, x, mask)))

    some = x[:CHORALES, :STEPS]
    audit = audited(dmm, some, mask[:CHORALES, :STEPS], f"the first {STEPS} steps of {CHORALES} test chorales")
    audit.save(folder / "audit")
    c, error = steps_of_the_gap(dmm, some, audit)
    for t, (mean, of_mean) in enumerate(zip(c.mean(0), error.square().sum(0).sqrt() / len(c), strict=True)):
        print(f"  step {t + 1:2}: {mean:6.3f} nats (error {of_mean:.3f})")
    print(f"  sum of steps: {c.sum() / len(c):.3f}; mean gap {float(audit.table['gap_total'].mean()):.3f}")
    draw_steps(c, error, folder / "by_step.png")
    if whole:
        rows = mask.sum(1).argsort()[:whole]
        longest = int(mask[rows].sum(1).max())
        audited(dmm, x[rows, :longest], mask[rows, :longest], f"the {whole} shortest test chorales, whole")
