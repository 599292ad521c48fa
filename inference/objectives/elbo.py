"""The objective of a fit as a differentiable loss, with the ELBO that is reported.

An objective is a component: a small class with keyword-only options that the user sets, called with a model and a guide. For
N data, of which a mini-batch b of B is seen, with z_n ~ q(z|x_n) and a KL weight w in [0, 1], the plain one (`elbo`) is

    ELBO   = (N / B) sum_{n in b}  log p(x_n|z_n) +   [ log p(z_n) - log q(z_n|x_n) ]       <=  sum_n log p(x_n)
    loss_w = (N / B) sum_{n in b} -log p(x_n|z_n) - w [ log p(z_n) - log q(z_n|x_n) ]

The factor N / B comes from the program's own data plate; the factor w from a handler, `KLWeight`, that multiplies the
scale of every LATENT site of model and guide. At w = 1 the loss is -ELBO, exactly Pyro's Trace_ELBO. For w < 1 it is
no bound on the evidence of this model, so every objective also computes the unweighted ELBO (a double, in nats) of the same
draws. An `elbo` is higher-better; a `loss` is lower-better.

Estimates are tensors that stay on their device, so that an objective can be traced. Only the check for values that are not
finite reads them; inside `unchecked` the caller has to do this check.

Bowman et al. 2016 (KL warm-up), https://arxiv.org/abs/1511.06349.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

Program = Callable[..., Any]
Weight = float | Tensor
"""w, a number or a scalar in double precision."""

_checked: ContextVar[bool] = ContextVar("elbowroom_checked", default=True)


class Estimate(NamedTuple):
    """One Monte Carlo estimate of the objective, for the whole data set that the plate stands for, in nats.

    Attributes:
        loss: differentiable scalar; its gradient is the gradient estimate.
        objective: its value, a double without a gradient.
        elbo: the unweighted ELBO of the same draws, a double without a gradient; -objective for `elbo` at w = 1.
    """

    loss: Tensor
    objective: Tensor
    elbo: Tensor


@contextmanager
def unchecked() -> Iterator[None]:
    """Switch off the check for values that are not finite: no value is read, and NonFiniteSite is not raised."""
    token = _checked.set(False)
    try:
        yield
    finally:
        _checked.reset(token)


def checked(estimate: Estimate, model_trace: Trace, guide_trace: Trace, particles: int = 1) -> Estimate:
    """Return the estimate if it is finite, or inside `unchecked`; for the arguments see `locate`.

    Raises:
        NonFiniteSite: it is not finite.
    """
    if _checked.get() and not all(math.isfinite(value) for value in (estimate.objective, estimate.elbo)):
        raise locate(model_trace, guide_trace, particles)
    return estimate


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
        """Return the message, such as `log_prob of site 'z' in the guide is nan for 3 of 128 data`."""
        if not self.site:
            return "every site's log_prob is finite, but their sum is not"
        data = f" for {len(self.rows)} of {self.count} data" if self.count else ""
        return f"log_prob of site {self.site!r} in the {self.program} is {self.value:g}{data}"


class KLWeight(Messenger):
    """A Pyro handler that multiplies the scale of every latent sample site by `weight`; observed sites keep theirs.

    `KLWeight(w)(model)` and `KLWeight(w)(guide)`, two instances, weight log p(z) and log q(z|x) by w. Unlike
    `pyro.poutine.scale`, it allows w = 0.

    Args:
        weight: w >= 0, a number or a scalar; may be changed between runs.

    Attributes:
        scales: the scale of each latent site in the latest run, without the weight.
    """

    def __init__(self, weight: Weight = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.scales: dict[str, Any] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        self.scales[msg["name"]] = msg["scale"]
        if isinstance(self.weight, Tensor) or self.weight != 1.0:
            msg["scale"] = msg["scale"] * self.weight


class Objective(ABC):
    """The quantity that a fit maximises.

    Its public attributes are its options; its `repr` is its name with them, such as `iwae(particles=10)`.

    Attributes:
        name: the name that specs use.
        discrete: whether it works with latents that are discrete.
        continuous: whether it works with latents that are all continuous.
        reparametrized: whether the guide's draws must be differentiable in its parameters (`rsample`).
        needs: what it requires of the latents, worded as the end of a sentence; "" if nothing.
    """

    name: ClassVar[str]
    discrete: ClassVar[bool] = True
    continuous: ClassVar[bool] = True
    reparametrized: ClassVar[bool] = False
    needs: ClassVar[str] = ""

    @abstractmethod
    def __call__(self, model: Program, guide: Program, *args: Any, kl_weight: Weight = 1.0, **kwargs: Any) -> Estimate:
        """Estimate the objective, and the unweighted ELBO of the same draws.

        Args:
            model: Pyro program p(x, z).
            guide: Pyro program q(z|x); it takes the same arguments.
            *args: passed to model and guide.
            kl_weight: w; log p(x|z) + w [ log p(z) - log q(z|x) ] replaces log p(x, z) - log q(z|x).
            **kwargs: passed to model and guide.

        Raises:
            NonFiniteSite: a log probability, hence the loss, is NaN or infinite.
            ValueError: the objective does not apply to these programs.
        """

    @classmethod
    def refuses(cls, discrete: bool, reparametrized: bool) -> str | None:
        """Return None if the objective applies; else what is missing and what to use, worded as the end of a sentence.

        Args:
            discrete: the model has discrete latents.
            reparametrized: the guide's draws are differentiable in its parameters.
        """
        fits = cls.discrete if discrete else cls.continuous
        if fits and (reparametrized or not cls.reparametrized):
            return None
        return f"{cls.needs}; use {'trace_enum, elbo or wake_sleep' if discrete else 'elbo'}"

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{self.name}({options})" if options else self.name


class ELBO(Objective):
    """Evidence lower bound by draws of the guide; REINFORCE where they are not differentiable (Pyro's Trace_ELBO).

    Kingma and Welling 2014, https://arxiv.org/abs/1312.6114; Ranganath et al. 2014, https://arxiv.org/abs/1401.0118.

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
        >>> bool(abs(ELBO()(model, guide, x).elbo - dist.Normal(0.0, 2**0.5).log_prob(x).sum()) < 1e-5)
        True
    """

    name = "elbo"

    def __call__(self, model: Program, guide: Program, *args: Any, kl_weight: Weight = 1.0, **kwargs: Any) -> Estimate:
        """Estimate loss_w and the unweighted ELBO with one draw of z per datum."""
        return _TraceELBO(kl_weight).estimate(model, guide, *args, **kwargs)


class MeanFieldELBO(Objective):
    """ELBO with the KL divergence in closed form where one is known, and by draws elsewhere (Pyro's TraceMeanField_ELBO).

    loss_w = -(N / B) sum_{n in b} log p(x_n|z_n) + (N / B) w sum_{n in b} KL(q(z|x_n) || p(z))

    Its gradient has less noise far from the posterior and more at it. The ELBO beside it is that of the draws.
    Kingma and Welling 2014, https://arxiv.org/abs/1312.6114, appendix B.
    """

    name = "mean_field_elbo"
    discrete = False
    reparametrized = True
    needs = "needs a guide whose draws are differentiable in its parameters"

    def __call__(self, model: Program, guide: Program, *args: Any, kl_weight: Weight = 1.0, **kwargs: Any) -> Estimate:
        """Estimate loss_w and the unweighted ELBO with one draw of z per datum."""
        return _MeanFieldELBO(kl_weight).estimate(model, guide, *args, **kwargs)


class _TraceELBO(Trace_ELBO):
    """Pyro's Trace_ELBO for one estimate, with tensors instead of numbers, and with the ELBO without the KL weight."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.weights = {"guide": KLWeight(weight), "model": KLWeight(weight)}
        self.plain = not isinstance(weight, Tensor) and weight == 1.0

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Estimate the loss and the unweighted ELBO."""
        model, guide = self.weights["model"](model), self.weights["guide"](guide)
        model_trace, guide_trace = self._get_trace(model, guide, args, kwargs)
        objective, surrogate = self._loss(model_trace, guide_trace)
        loss = surrogate - surrogate.detach() + objective.to(surrogate.dtype)
        elbo = -objective if self.plain else self._unweighted(model_trace, guide_trace)
        return checked(Estimate(loss, objective, elbo), model_trace, guide_trace)

    def _loss(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        """Return -ELBO as a double, and a scalar with the gradient of Trace_ELBO._differentiable_loss_particle."""
        elbo: Any = 0.0
        surrogate: Any = 0.0
        for _, site in samples(model_trace):
            elbo = elbo + site["log_prob_sum"].detach().double()
            surrogate = surrogate + site["log_prob_sum"]
        log_r = None
        for _, site in samples(guide_trace):
            elbo = elbo - site["log_prob_sum"].detach().double()
            _, score, entropy = site["score_parts"]
            if not is_identically_zero(entropy):
                surrogate = surrogate - entropy.sum()
            if not is_identically_zero(score):
                log_r = _compute_log_r(model_trace, guide_trace) if log_r is None else log_r
                surrogate = surrogate + (log_r.sum_to(site["cond_indep_stack"]) * score).sum()
        return -elbo, -surrogate

    @torch.no_grad()
    def _unweighted(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        """Sum the log probabilities with the plates' scales and masks, without the KL weight."""
        total: Any = 0.0
        for program, trace, sign in (("model", model_trace, 1), ("guide", guide_trace, -1)):
            for name, site in samples(trace):
                scale = self.weights[program].scales.get(name, site["scale"])
                total = total + sign * scale_and_mask(site["unscaled_log_prob"], scale, site["mask"]).sum().double()
        return total


class _MeanFieldELBO(_TraceELBO, TraceMeanField_ELBO):
    """Pyro's TraceMeanField_ELBO in the same form; the ELBO of the draws is computed separately from its loss."""

    def __init__(self, weight: Weight) -> None:
        super().__init__(weight)
        self.plain = False

    def _loss(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        """Return -ELBO as a double, and with the gradient of TraceMeanField_ELBO._differentiable_loss_particle."""
        drawn = dict(samples(guide_trace))
        for name, site in drawn.items():
            if not getattr(site["fn"], "has_rsample", False):  # Pyro would omit its part of the gradient
                raise ValueError(f"{MeanFieldELBO.name}: {MeanFieldELBO.needs}; those of site {name!r} are not")
        order = [name for name, _ in samples(model_trace) if name in drawn]
        if order != [name for name in drawn if name in order]:
            raise ValueError(f"{MeanFieldELBO.name}: model and guide must draw their sites in the same order; use elbo")
        elbo: Any = 0.0
        for name, site in samples(model_trace):
            if site["is_observed"]:
                elbo = elbo + site["log_prob_sum"]
                continue
            q = drawn[name]
            try:
                kl = scale_and_mask(kl_divergence(q["fn"], site["fn"]), scale=q["scale"], mask=q["mask"])
            except NotImplementedError:
                elbo = elbo + site["log_prob_sum"] - q["score_parts"].entropy_term.sum()
            else:
                elbo = elbo - (kl.sum() if isinstance(kl, Tensor) else kl * q["fn"].batch_shape.numel())
        for name, q in drawn.items():
            if name not in model_trace.nodes:  # auxiliary
                elbo = elbo - q["score_parts"].entropy_term.sum()
        return -elbo.detach().double(), -elbo


def samples(trace: Trace) -> list[tuple[str, Any]]:
    """Return the sample sites of a trace, without those of sub-sampling."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    ]


def locate(model_trace: Trace, guide_trace: Trace, particles: int = 1) -> NonFiniteSite:
    """Find the first site, guide before model, that has a log probability which is not finite.

    The rightmost plate of the traces holds `particles` copies of the batch.
    """
    for program, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in samples(trace):
            log_prob, total = site["log_prob"].detach(), site["log_prob"].detach().sum()
            if bool(total.isfinite()):
                continue
            # the sum may overflow although every entry is finite; then `rows` is empty
            bad = ~log_prob.isfinite()
            value = log_prob[bad][0] if bool(bad.any()) else total
            count = bad.shape[-1] // particles if bad.ndim else 0
            rows = bad.reshape(-1, count).any(0).nonzero().flatten().tolist() if bad.ndim else []
            return NonFiniteSite(name, program, float(value), rows, count)
    return NonFiniteSite("", "model", math.nan, [], 0)
