r"""What the fit maximises, as a differentiable loss, beside the ELBO that is reported.

For N data, of which a mini-batch b of B is seen, with z_n ~ q(z|x_n) and a KL weight w in [0, 1],

    ELBO   = (N / B) sum_{n in b}  log p(x_n|z_n) +   [ log p(z_n) - log q(z_n|x_n) ]       <=  sum_n log p(x_n)
    loss_w = (N / B) sum_{n in b} -log p(x_n|z_n) - w [ log p(z_n) - log q(z_n|x_n) ]

The factor N / B comes from the program's own data plate; the factor w from a handler, `KLWeight`, that multiplies the
scale of every LATENT site of model and guide. At w = 1 the loss is -ELBO, exactly Pyro's Trace_ELBO. For w < 1 it is
the objective of an easier problem and no bound on the evidence of this model, so the unweighted ELBO (a double,
in nats, of the very same draws) is always computed beside it. An `elbo` is higher-better; a `loss` is lower-better.

Bowman et al. 2016 (KL warm-up), https://arxiv.org/abs/1511.06349.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor


class Estimate(NamedTuple):
    """One Monte Carlo estimate of the objective, for the whole data set that the plate stands for, in nats.

    Attributes:
        loss: differentiable scalar, loss_w; its gradient is the gradient estimate.
        objective: its value, as a double.
        elbo: the unweighted ELBO of the same draws, as a double; -objective where w = 1.
    """

    loss: Tensor
    objective: float
    elbo: float


class NonFiniteSite(ArithmeticError):
    """A log probability is NaN or infinite.

    Attributes:
        site: name of the first such site in program order, guide before model; "" when only the sum overflowed.
        program: "guide" or "model".
        value: the first value that is not finite.
        rows: positions in the batch, along the rightmost plate, where it is not finite.
        count: size of the batch along that plate.
    """

    def __init__(self, site: str, program: str, value: float, rows: list[int], count: int) -> None:
        self.site, self.program, self.value, self.rows, self.count = site, program, value, rows, count
        super().__init__(self.sentence())

    def sentence(self) -> str:
        """Say where: `log_prob of site 'z' in the guide is nan for 3 of 128 data`."""
        if not self.site:
            return "every site's log_prob is finite, but their sum is not"
        data = f" for {len(self.rows)} of {self.count} data" if self.count else ""
        return f"log_prob of site {self.site!r} in the {self.program} is {self.value:g}{data}"


class KLWeight(Messenger):
    """A Pyro handler that multiplies the scale of every latent sample site by `weight`; observed sites keep theirs.

    `KLWeight(w)(model)` and `KLWeight(w)(guide)` weigh log p(z) and log q(z|x) by w, each with its own instance.
    Unlike `pyro.poutine.scale` it allows w = 0.

    Args:
        weight: w, a number >= 0; may be changed between runs.

    Attributes:
        scales: the scale of each latent site in the latest run, without the weight.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.scales: dict[str, Any] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        self.scales[msg["name"]] = msg["scale"]
        if self.weight != 1.0:
            msg["scale"] = msg["scale"] * self.weight


class Objective:
    """loss_w of a (model, guide) pair by Pyro's Trace_ELBO, called through Pyro's ELBO module.

    Args:
        model: Pyro program p(x, z).
        guide: Pyro program q(z|x); it takes the same arguments.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior: every draw gives log p(x)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = torch.tensor([0.0, 1.0])
        >>> bool(abs(Objective(model, guide)(x).elbo - dist.Normal(0.0, 2**0.5).log_prob(x).sum()) < 1e-5)
        True
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
        self._weights = {"guide": KLWeight(), "model": KLWeight()}
        self._recorder = _RecordingELBO(self._weights)
        self._elbo = self._recorder(self._weights["model"](model), self._weights["guide"](guide))

    def __call__(self, *args: Any, kl_weight: float = 1.0, **kwargs: Any) -> Estimate:
        """Estimate loss_w and the unweighted ELBO with one draw of z per datum.

        Args:
            *args: passed to model and guide.
            kl_weight: w.
            **kwargs: passed to model and guide.

        Raises:
            NonFiniteSite: a log probability, hence the loss, is NaN or infinite.
        """
        for handler in self._weights.values():
            handler.weight = kl_weight
        loss = self._elbo(*args, **kwargs)
        return Estimate(loss, self._recorder.objective, self._recorder.elbo)


class _RecordingELBO(Trace_ELBO):
    """Trace_ELBO that keeps, of its latest run, the loss and the ELBO without the KL weights."""

    def __init__(self, weights: dict[str, KLWeight]) -> None:
        super().__init__()
        self.weights = weights
        self.objective = math.nan
        self.elbo = math.nan

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[float, Tensor]:
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        traces = {"guide": guide_trace, "model": model_trace}
        if not math.isfinite(loss):
            raise _locate(traces)
        self.objective = float(loss)
        if all(handler.weight == 1.0 for handler in self.weights.values()):
            self.elbo = -self.objective
        else:
            self.elbo = self._unweighted(traces["model"], "model") - self._unweighted(traces["guide"], "guide")
        return loss, surrogate

    @torch.no_grad()
    def _unweighted(self, trace: Trace, program: str) -> float:
        """Sum the log probabilities with the plates' scales and masks, but without the KL weight."""
        total = 0.0
        for name, site in _samples(trace):
            log_prob = site["unscaled_log_prob"]
            scale = self.weights[program].scales.get(name, site["scale"])
            total += scale_and_mask(log_prob, scale, site["mask"]).sum().item()
        return total


def _samples(trace: Trace) -> list[tuple[str, Any]]:
    return [(name, site) for name, site in trace.nodes.items() if site["type"] == "sample"]


def _locate(traces: dict[str, Trace]) -> NonFiniteSite:
    """Find the first site, guide before model, whose log probability is not finite."""
    for program, trace in traces.items():
        for name, site in _samples(trace):
            log_prob, total = site["log_prob"].detach(), site["log_prob_sum"].detach()
            if bool(total.isfinite()):
                continue
            # the sum may overflow although every entry is finite: then the rows are empty
            bad = ~log_prob.isfinite()
            value = log_prob[bad][0] if bool(bad.any()) else total
            rows = bad.reshape(-1, bad.shape[-1]).any(0).nonzero().flatten().tolist() if bad.ndim else []
            return NonFiniteSite(name, program, float(value), rows, bad.shape[-1] if bad.ndim else 0)
    return NonFiniteSite("", "model", math.nan, [], 0)
