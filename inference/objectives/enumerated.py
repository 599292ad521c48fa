"""The ELBO with discrete latents summed out instead of drawn.

    ELBO = (N / B) sum_{n in b} sum_k q(k|x_n) [ log p(x_n|k) + w ( log p(k) - log q(k|x_n) ) ]

Every discrete site of the guide is enumerated in parallel, in its own dimension to the left of the plates; the decoder
broadcasts over it, (K, 1, d) -> (K, N, ...). Discrete sites add no noise; continuous ones are drawn.

Pyro's TraceEnum_ELBO, https://docs.pyro.ai/en/stable/inference_algos.html#pyro.infer.traceenum_elbo.TraceEnum_ELBO.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.traceenum_elbo import _compute_dice_elbo

from elbowroom.inference.objectives.elbo import Estimate, Objective, Program, Weight, checked, samples
from elbowroom.inference.randomness import undisturbed


class TraceEnum(Objective):
    """ELBO with the discrete latents of the guide summed out of the expectation (Pyro's TraceEnum_ELBO).

    Exact, without noise, where all latents are discrete; its cost grows with the number of joint values.
    """

    name = "trace_enum"
    continuous = False
    needs = "needs discrete latents that the guide draws"

    def __init__(self) -> None:
        self._nested: tuple[Program, Program, int] | None = None

    def __call__(self, model: Program, guide: Program, *args: Any, kl_weight: Weight = 1.0, **kwargs: Any) -> Estimate:
        """Estimate loss_w and the unweighted ELBO; continuous latents are drawn once per datum."""
        elbo = TraceEnum_ELBO(max_plate_nesting=self._nesting(model, guide, args, kwargs), strict_enumeration_warning=False)
        ((model_trace, guide_trace),) = elbo._get_traces(model, config_enumerate(guide), args, kwargs)
        latent = {name for name, _ in samples(guide_trace)}
        if not any(site["infer"].get("_enumerate_dim") is not None for _, site in samples(guide_trace)):
            raise ValueError(f"{self.name}: {self.needs}; use elbo")
        plain = total = torch.as_tensor(_compute_dice_elbo(model_trace, guide_trace))
        if isinstance(kl_weight, torch.Tensor) or kl_weight != 1.0:
            for trace in (model_trace, guide_trace):
                for name in latent & set(trace.nodes):
                    _weigh(trace.nodes[name]["packed"], kl_weight)
            total = torch.as_tensor(_compute_dice_elbo(model_trace, guide_trace))
        estimate = Estimate(-total, -total.detach().double(), plain.detach().double())
        return checked(estimate, model_trace, guide_trace)

    def _nesting(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return how many batch dimensions the plates take, found by one run of each pair of programs."""
        if self._nested is None or self._nested[:2] != (model, guide):
            probe, pyros = TraceEnum_ELBO(), logging.getLogger("pyro.infer.elbo")
            level = pyros.level
            pyros.setLevel(logging.WARNING)  # Pyro would log the number of plates
            try:
                with undisturbed((args, kwargs)), torch.no_grad():
                    probe._guess_max_plate_nesting(model, guide, args, kwargs)
            finally:
                pyros.setLevel(level)
            self._nested = (model, guide, int(probe.max_plate_nesting))
        return self._nested[2]


def _weigh(packed: dict[str, Any], weight: Weight) -> None:
    """Multiply a latent site's log density by the KL weight, but not the probabilities of the sum over its values."""
    weighed: Any = packed["log_prob"] * weight
    weighed._pyro_dims = packed["log_prob"]._pyro_dims
    packed["log_prob"] = weighed
