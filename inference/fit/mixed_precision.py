"""Precision of the matrix products in training steps, and its effect on the ELBO.

    highest   as torch is set (float32 or float64 throughout)
    tf32      factors of float32 matrix products rounded to 10 bits of mantissa, on a GPU; sums in float32
    bf16      encoder and decoder under `torch.autocast` to bfloat16 (7 bits), their outputs cast back to float32

Weights, Adam, draws and log densities stay float32. Validation and all reported numbers are computed with `highest`, so the
validation ELBO of a history shows the effect of the rounding on the fitted model. The effect on the ELBO estimate itself is
reported separately, over n training rows at the best weights, with S draws from the same noise in both precisions:

    d_n = (1/S) sum_s [ l_ns (rounded) - l_ns (full) ],   l = log p(x, z) - log q(z|x)
    difference = mean d_n,     standard error = sd(d_n) / sqrt(n)

TF32 and bfloat16: https://docs.pytorch.org/docs/stable/generated/torch.set_float32_matmul_precision.html,
https://docs.pytorch.org/docs/stable/amp.html.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from elbowroom.errors import SpecError
from elbowroom.inference.fit.record import Effect
from elbowroom.inference.fit.rows import Rows
from elbowroom.inference.objectives.log_weights import log_weights
from elbowroom.inference.randomness import contained, mode
from elbowroom.models.vae import VAE

log = logging.getLogger("elbowroom")

Precision = Literal["highest", "tf32", "bf16"]

ROWS, DRAWS, TOGETHER = 512, 8, 256


def check(precision: str, dtype: str, place: torch.device) -> None:
    """Refuse a precision that is not possible; warn if it has no effect.

    Raises:
        SpecError: there is no such precision, or the weights are not float32.
    """
    if precision not in get_args(Precision):
        raise SpecError(f"fit.precision: must be highest, tf32 or bf16, got {precision!r}")
    if precision != "highest" and dtype != "float32":
        raise SpecError(f"fit.precision: {precision} rounds float32, but fit.dtype is {dtype}; use highest")
    if precision == "tf32" and place.type == "cpu":
        log.warning("fit: precision tf32 changes nothing on a CPU, which multiplies in float32")


@contextmanager
def lowered(vae: VAE, precision: Precision) -> Iterator[None]:
    """Compute the matrix products of a VAE in a lower precision inside a `with` block.

    With `bf16`, only the calls of encoder and decoder are autocast; distributions get float32.
    """
    if precision == "highest":  # this runs at every training step
        yield
        return
    place = next((value.device.type for value in vae.parameters()), "cpu")
    with ExitStack() as stack:
        if precision == "tf32" and place != "cpu":
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")
        if precision == "bf16":
            for network in (vae.decoder, vae.posterior.encoder):
                stack.enter_context(_autocast(network, place))
        yield


@contextmanager
def _autocast(network: nn.Module, place: str) -> Iterator[None]:
    """Run a network's calls under autocast to bfloat16, with float32 outputs."""
    forward, own = network.forward, "forward" in vars(network)

    def lower(*args: Any, **kwargs: Any) -> Any:
        # no cache of cast weights: it would outlive a trace
        with torch.autocast(place, torch.bfloat16, cache_enabled=False):
            out = forward(*args, **kwargs)
        return pytree.tree_map(_float32, out)

    network.forward = lower
    try:
        yield
    finally:
        if own:
            network.forward = forward
        else:
            del network.forward


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def effect(vae: VAE, train: Rows, precision: Precision, seed: int) -> Effect | None:
    """Estimate the effect of a precision on the ELBO of a fitted VAE with float32 weights; None where there is none."""
    if precision == "highest" or (precision == "tf32" and train.device.type == "cpu"):
        return None
    count = min(ROWS, len(train))
    index = torch.arange(count, device=train.device) * len(train) // count
    full, rounded = (_elbos(vae, train, index, each, seed) for each in ("highest", precision))
    error = float((rounded - full).std()) / math.sqrt(count) if count > 1 else math.nan
    return Effect(precision, count, float(full.mean()), float(rounded.mean()), error)


def _elbos(vae: VAE, train: Rows, index: Tensor, precision: Precision, seed: int) -> Tensor:
    """Return the mean of l over draws for each row, (n,), in double precision."""
    found = []
    with contained(seed, train.device), mode(vae, training=False), torch.no_grad(), lowered(vae, precision):
        for part in index.split(TOGETHER):
            weights = log_weights(vae.model, vae.guide, (), train.take(part), particles=DRAWS)
            found.append(weights.weighed().mean(0))
    return torch.cat(found)
