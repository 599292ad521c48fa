"""Formulas that stand in for torch's own: the same values and slopes, at the ends of their parameters too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import pytest
import torch

from elbowroom.inference.program.densities.bilinear import Bilinear
from elbowroom.inference.program.densities.factorised import log_prob, shared_log_prob


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("form", ["probs", "logits"])
def test_bernoulli_is_that_of_torch(form: str, grey: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 8 * torch.randn(50, 20, generator=generator, dtype=dtype)
    given = (logits.sigmoid() if form == "probs" else logits).requires_grad_()
    x = torch.rand(20, generator=generator, dtype=dtype)
    x = x if grey else x.round()
    fn = dist.Bernoulli(**{form: given}, validate_args=False)
    for found, wanted in ((fn, fn), (fn.to_event(1), fn.to_event(1))):
        ours, theirs = log_prob(found, x), wanted.log_prob(x)
        close = {torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
        slopes = [torch.autograd.grad(value.sum(), given, retain_graph=True)[0] for value in (ours, theirs)]
        inside = (logits.abs() < 7) | torch.tensor(dtype == torch.float64)  # where p is a number next to 0 or 1
        torch.testing.assert_close(slopes[0][inside], slopes[1][inside], rtol=1e-3, atol=1e-3)


def test_probabilities_of_zero_and_one_have_the_floor_of_torch() -> None:
    p, x = torch.tensor([0.0, 1.0, 0.0, 1.0]).double(), torch.tensor([1.0, 0.0, 0.0, 1.0]).double()
    fn = dist.Bernoulli(probs=p)
    torch.testing.assert_close(log_prob(fn, x), fn.log_prob(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [dist.Bernoulli, partial(dist.Binomial, 5), partial(dist.NegativeBinomial, 5.0)])
def test_probabilities_factorise_as_logits_do(make: Callable[..., Any]) -> None:
    """Plates expand parameters as views: logits made of expanded probabilities would be those of every datum."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 1, 6, generator=generator, dtype=torch.float64).expand(40, 30, 6)
    x = make(logits=logits[0]).sample()
    found = [shared_log_prob(make(**given).to_event(1), x) for given in ({"logits": logits}, {"probs": logits.sigmoid()})]
    views = shared_log_prob(make(probs=logits[:, :1].sigmoid().expand(40, 30, 6)).to_event(1), x)
    want = make(logits=logits).to_event(1).log_prob(x)
    for one in (found[0], views):
        assert isinstance(one, Bilinear)
        torch.testing.assert_close(one.dense(30), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1] if not isinstance(found[1], Bilinear) else found[1].dense(30), want)
