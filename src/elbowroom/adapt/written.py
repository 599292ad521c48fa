"""`er.adapt.torch`: a VAE that was written by hand in PyTorch, as a Pyro pair.

    q(z|x) = N(mu(x), exp(logvar(x)))  by `encode`,        p(x|z)  by `decode` and `likelihood`,        p(z)  by `prior`

The likelihood is what the reconstruction loss says it is. Each name below belongs to a loss, summed over the entries of a
datum; -ELBO is then that loss plus the KL term plus the constant, which losses leave out (D entries per datum):

    name                 decode gives             loss                                              constant
    bernoulli            probabilities            F.binary_cross_entropy                            0
    bernoulli_logits     logits                   F.binary_cross_entropy_with_logits                0
    continuous_bernoulli probabilities            the same less log C(p), which makes it a density  0
    mse                  mean                     F.mse_loss (its scale is 1/sqrt(2))               D/2 log pi
    normal               mean                     0.5 F.mse_loss (its scale is 1)                   D/2 log 2 pi
    normal               (mean, log variance)     F.gaussian_nll_loss(full=True)                    0
    laplace              mean                     F.l1_loss (its scale is 1)                        D log 2
    poisson              rate                     F.poisson_nll_loss(log_input=False)               sum log x!
    poisson_log          log rate                 F.poisson_nll_loss                                sum log x!
    categorical          logits, classes last     F.cross_entropy                                   0

Known faults of such losses, with which -ELBO must not be expected to agree: reduction="mean" divides the reconstruction by the
entries (and so weighs KL by D); a weight of KL other than 1; a mean over the batch of one term and a sum of the other; the
clamping of log p at -100 in F.binary_cross_entropy. The audit is that of the model, not of the loss.

Kingma, Welling (2014), https://arxiv.org/abs/1312.6114.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from elbowroom.adapt.distributions import in_pyro
from elbowroom.adapt.pair import Pair, Programs, at_many, in_shape, per_datum, rows_of
from elbowroom.errors import UserError, nearest

WHERE = "adapt.torch"
Maker = Callable[..., Any]  # decoded parameters -> distribution


def _normal(mean: Tensor, log_variance: Tensor | None = None, *, check: bool | None = None) -> Any:
    scale = torch.ones_like(mean) if log_variance is None else (0.5 * log_variance).exp()
    return dist.Normal(mean, scale, validate_args=check)


LIKELIHOODS: dict[str, Maker] = {
    "bernoulli": lambda p, *, check=None: dist.Bernoulli(p, validate_args=check),
    "bernoulli_logits": lambda a, *, check=None: dist.Bernoulli(logits=a, validate_args=check),
    "categorical": lambda a, *, check=None: dist.Categorical(logits=a, validate_args=check),
    "continuous_bernoulli": lambda p, *, check=None: dist.ContinuousBernoulli(p, validate_args=check),
    "laplace": lambda m, *, check=None: dist.Laplace(m, torch.ones_like(m), validate_args=check),
    "mse": lambda m, *, check=None: dist.Normal(m, torch.full_like(m, math.sqrt(0.5)), validate_args=check),
    "normal": _normal,
    "poisson": lambda r, *, check=None: dist.Poisson(r, validate_args=check),
    "poisson_log": lambda a, *, check=None: dist.Poisson(a.exp(), validate_args=check),
}
PRIORS: dict[str, Callable[[Tensor], Any]] = {
    "laplace": lambda zero: dist.Laplace(zero, torch.ones_like(zero)),
    "normal": lambda zero: dist.Normal(zero, torch.ones_like(zero)),
}


def written(
    *,
    encode: Callable[..., Any],
    decode: Callable[..., Any],
    prior: str | Any = "normal",
    likelihood: str | Callable[..., Any] = "bernoulli",
    validate_args: bool | None = None,
) -> Pair:
    """Make a Pyro pair of a VAE that was written in PyTorch.

    model: z ~ prior, x ~ likelihood(decode(z)); guide: z ~ q(z|x) by encode(x); both in plate `data`. -ELBO is the VAE's own
    loss per datum, up to the constant and the faults that the module names.

    Args:
        encode: x (N, ...) -> (mu, logvar), each (N, d), log *variances*; or a distribution of torch or Pyro over z.
        decode: z (N, d) -> a tensor, or several, of parameters, with rows first; or a distribution over x.
        prior: `normal`, N(0, 1) per latent; `laplace`, with scale 1; a distribution over one datum's z; or a
            callable that returns one, in which case its weights are read anew (a mixture that was trained).
        likelihood: a name (see the module), or a callable that makes a distribution of what `decode` returns: one argument for
            each tensor. Left out where `decode` returns a distribution.
        validate_args: False takes values outside the support of a likelihood given by name, as grey pixels under `bernoulli`:
            the density is then no probability, and the audit says so.

    Further arguments, of a VAE with conditions, go to all: `er.audit(*pair, x, c)` calls encode(x, c), decode(z, c) and
    prior(c).

    Returns:
        The pair: `model, guide = pair`, `er.audit(*pair, x)`. Weights stay where they are; modules are put into eval mode for
        an audit, and back.

    Raises:
        UserError: an unknown name, something that cannot be called, or, when it is run, a result that is no such thing.

    Example:
        >>> pair = er.adapt.torch(encode=vae.encode, decode=vae.decode, likelihood="bernoulli")  # doctest: +SKIP
        >>> er.audit(*pair, x_test[:50])  # doctest: +SKIP
    """
    for name, given in (("encode", encode), ("decode", decode)):
        if not callable(given):
            raise UserError(f"{WHERE}: {name} must be callable, a function or a module; got {given!r}")
    _check_word("prior", prior, PRIORS)
    _check_word("likelihood", likelihood, LIKELIHOODS)
    if not isinstance(likelihood, str) and not callable(likelihood):
        raise UserError(f"{WHERE}: likelihood must be a name or callable; got {likelihood!r}")
    if not isinstance(prior, str | torch.distributions.Distribution) and not callable(prior):
        raise UserError(f"{WHERE}: prior must be a name, a distribution or callable; got {prior!r}")
    parts = _Parts(encode, decode, prior, likelihood, validate_args)
    programs = Programs(parts.p_z, parts.q_z, parts.p_x, rows_of)
    return Pair(programs.model, programs.guide)


def _check_word(kind: str, word: Any, table: dict[str, Any]) -> None:
    if isinstance(word, str) and word not in table:
        raise UserError(f"{WHERE}: no {kind} {word!r}{nearest(word, table)}; or give one as a callable")


class _Parts:
    """Prior, guide and likelihood by the user's callables."""

    def __init__(self, encode: Maker, decode: Maker, prior: Any, likelihood: str | Maker, validate_args: bool | None) -> None:
        self.encode, self.decode, self.prior, self.likelihood = encode, decode, prior, likelihood
        self.check = validate_args
        self.shape: tuple[int, ...] | None = None  # of the latents of one datum

    def q_z(self, x: Tensor, *context: Any) -> dict[str, Any]:
        """q(z|x), with batch shape (N,)."""
        found = self.encode(x, *context)
        if isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(part, Tensor) for part in found):
            mu, logvar = found
            if mu.shape != logvar.shape:
                raise UserError(
                    f"{WHERE}: encode returned mu {tuple(mu.shape)} and logvar {tuple(logvar.shape)}; shapes must agree"
                )
            q = dist.Normal(mu, (0.5 * logvar).exp())
        elif isinstance(found, Tensor | tuple | list | dict):
            what = f"{len(found)} values" if isinstance(found, tuple | list) else f"a {type(found).__name__}"
            raise UserError(
                f"{WHERE}: encode returned {what}; return (mu, logvar) or a distribution: lambda x: vae.encode(x)[:2]"
            )
        else:
            q = in_pyro(found, f"{WHERE}: encode")
        shape = tuple(q.batch_shape + q.event_shape)
        if not shape or shape[0] != len(x):
            raise UserError(f"{WHERE}: encode gave z of shape {shape} for {len(x)} data; the rows come first: ({len(x)}, d)")
        self.shape = shape[1:]
        return {"z": per_datum(q, len(self.shape))}

    def p_z(self, x: Tensor, *context: Any) -> dict[str, Any]:
        """p(z), whose event is the latents of one datum."""
        if self.shape is None:
            with torch.no_grad():
                self.q_z(x, *context)
        shape = self.shape or ()
        if isinstance(self.prior, str):
            p = PRIORS[self.prior](torch.zeros(shape, dtype=x.dtype if x.is_floating_point() else None, device=x.device))
        else:
            given = self.prior if isinstance(self.prior, torch.distributions.Distribution) else self.prior(*context)
            p = in_pyro(given, f"{WHERE}: prior")
        if p.event_dim == 0 and p.batch_shape in ((), (1,)):
            p = p.expand(shape)
        own = tuple(p.batch_shape + p.event_shape)
        if own[len(own) - len(shape) :] != shape or len(own) not in (len(shape), len(shape) + 1):
            raise UserError(f"{WHERE}: prior has draws of shape {own}, the latents of one datum {shape}; give it that shape")
        return {"z": per_datum(p, len(shape))}

    def p_x(self, z: dict[str, Tensor], x: Tensor, *context: Any) -> tuple[Any, Tensor]:
        """p(x|z), and x in its shape."""
        found = self.decode(z["z"], *context) if context else at_many(self.decode, z["z"], len(self.shape or (1,)))
        if isinstance(found, torch.distributions.Distribution):
            p = in_pyro(found, f"{WHERE}: decode")
        else:
            values = tuple(found) if isinstance(found, tuple | list) else (found,)
            if not all(isinstance(value, Tensor) for value in values):
                raise UserError(f"{WHERE}: decode returned {type(found).__name__}; return a tensor, several, or a distribution")
            if not isinstance(self.likelihood, str):
                p = in_pyro(self.likelihood(*values), f"{WHERE}: likelihood")
            elif len(values) > (2 if self.likelihood == "normal" else 1):
                raise UserError(
                    f"{WHERE}: decode returned {len(values)} tensors, too many for likelihood {self.likelihood!r}; give "
                    "likelihood as a callable that makes a distribution of them"
                )
            else:
                p = LIKELIHOODS[self.likelihood](*values, check=self.check)
        return p, in_shape(x, p, f"{WHERE}: decode")
