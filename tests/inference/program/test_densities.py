"""Formulas that stand in for torch's own: the same values and slopes, at the ends of their parameters too."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from elbowroom.inference.program.densities.factorised import log_prob


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
