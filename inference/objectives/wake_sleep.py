"""Wake-sleep: the model learns from the guide's draws, the guide from data simulated by the model ("dreams").

    wake    sum_n log mean_k p(x_n, z_kn) / q(z_kn|x_n),   z_kn ~ q(z|x_n)  held constant      gradient for the model alone
    sleep   sum_n log q(z'_n|x'_n),                        z', x' ~ p(z, x) held constant      gradient for the guide alone

Draws are constants, so neither phase needs differentiable draws, and the single loss -(wake + sleep) gives both gradients
without mixing them. The guide minimises the forward KL(p(z|x) || q(z|x)), averaged over dreams: it covers all modes, where
the ELBO seeks one. K = 1 is Hinton et al. 1995, https://doi.org/10.1126/science.7761831; K > 1 has the wake phase of
Bornschein and Bengio 2015, https://arxiv.org/abs/1406.2751.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.utils import _pytree as pytree

from elbowroom.inference.objectives.bounds import finished, log_mean_exp
from elbowroom.inference.objectives.elbo import Estimate, Objective, Program, Weight, checked, samples
from elbowroom.inference.objectives.log_weights import Plate, length, log_weights


class Dream(Messenger):
    """A Pyro handler that draws the observed sites, in the dtype of the observed values, and keeps these in `observed`.

    It calls `sample`, since no gradient is needed; `poutine.uncondition` calls `rsample`, which not every distribution has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observed: dict[str, Any] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] and isinstance(msg["value"], Tensor):
            data = self.observed[msg["name"]] = msg["value"]
            msg["value"], msg["is_observed"] = msg["fn"].sample().to(data.dtype), False


class WakeSleep(Objective):
    """Model: log p of data at the guide's draws. Guide: log q at data simulated by the model. No draw need be differentiable.

    Simulated data keep the covariates, the exposure and the missing values of the batch. The value is the sum of the two parts,
    in nats; the KL weight applies to the wake part. Hinton et al. 1995, https://doi.org/10.1126/science.7761831; Bornschein and
    Bengio 2015, https://arxiv.org/abs/1406.2751.

    Args:
        particles: draws K of z per datum in the wake phase, weighed as in `iwae`; 1 is the classical algorithm.
    """

    name = "wake_sleep"

    def __init__(self, *, particles: Annotated[int, Ge(1)] = 1) -> None:
        self.particles = particles

    def __call__(self, model: Program, guide: Program, *args: Any, kl_weight: Weight = 1.0, **kwargs: Any) -> Estimate:
        """Estimate -(wake + sleep), and the unweighted ELBO of the wake phase's draws."""
        try:
            wake = log_weights(model, guide, args, kwargs, particles=self.particles, detach=True)
            wake.guide.update({name: log_q.detach() for name, log_q in wake.guide.items()})
            awake = log_mean_exp(wake.weighed(kl_weight)).sum()
            finished(wake, awake)  # raises if a weight is not finite
            with torch.no_grad(), Dream() as asleep:
                dream = poutine.trace(model).get_trace(*args, **kwargs)
            dreamt = _with_dreams(dream, asleep.observed, (args, kwargs))
            sleep = poutine.trace(poutine.replay(guide, trace=dream)).get_trace(*dreamt[0], **dreamt[1])
            sleep.compute_log_prob()
            plate = Plate.around([sleep], length(dreamt))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        log_q = torch.stack([plate.density(site) for _, site in samples(sleep)]).sum()
        checked(Estimate(log_q, log_q.detach(), log_q.detach()), sleep, sleep)
        return finished(wake, awake, log_q)


def _with_dreams(dream: Trace, observed: dict[str, Any], tree: Any) -> Any:
    """Return the arguments with the simulated values in place of the observed ones.

    Raises:
        ValueError: an observed value is not one of the arguments, so that the guide could not be given the simulated one.
    """
    for name, data in observed.items():
        dreamt = dream.nodes[name]["value"]
        if not any(leaf is data for leaf in pytree.tree_leaves(tree)):
            raise ValueError(f"the value of observed site {name!r} is none of the arguments as they are; use elbo")
        tree = pytree.tree_map(lambda leaf, x=data, y=dreamt: y if leaf is x else leaf, tree)
    return tree
