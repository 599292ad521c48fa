"""One training step: the objective's gradient on a mini-batch, and one update of a fused Adam.

    loss = -(1/N) objective,      with the gradient of N loss given to Adam, as `pyro.infer.SVI` with `pyro.optim.Adam` does.

The gradient is evaluated eagerly, by running the Pyro programs, or by a graph of them (`step_graph`), replayed or compiled.
The eager step is taken instead of the graph for a batch of another shape, when a branch on a value has another outcome than
in the graph, and when a value is not finite; in the last case the eager step, with the same draws, names the site.

The plan decides whether to compile, never the clock, so that the same seed gives the same numbers.
"""

from __future__ import annotations

import logging
from operator import is_

import torch
from torch import Tensor, nn

from elbowroom.inference.compiled.graph import Untraceable
from elbowroom.inference.compiled.policies import Compile
from elbowroom.inference.fit.mixed_precision import Precision, lowered
from elbowroom.inference.fit.step_graph import GradientGraph, evaluate, modules
from elbowroom.inference.objectives.elbo import ELBO, Objective
from elbowroom.models.vae import VAE, Batch

log = logging.getLogger("elbowroom.compiled")

# predicted cost of an eager step: seconds in Pyro's handlers, and floating-point operations per second
HANDLER_SECONDS, FLOPS = 4e-3, 8e10
# predicted seconds of all planned steps above which a graph is traced, and compiled
TRACE_AFTER, COMPILE_AFTER = 6.0, 20.0
FEW = 50  # fewer steps than this never repay a graph


class Step:
    """One step of SVI on a mini-batch.

    The programs put the VAE's parameters into Pyro's global parameter store. Open `pyro.get_param_store().scope()` around the
    steps to keep it clean (`fit` does).

    Args:
        vae: the model and guide.
        size: number of data N that each mini-batch stands for.
        learning_rate: Adam's.
        gradient_clip: largest Euclidean norm of the gradient of the loss per datum; None clips nothing.
        objective: what is maximised; the ELBO by default.
        compile: make the gradient a compiled graph if the planned steps repay it, wherever possible, or never.
        steps: planned steps, for `auto`.
        precision: of matrix products.

    Attributes:
        graph: of the gradient, once one is made.
    """

    def __init__(
        self,
        vae: VAE,
        *,
        size: int,
        learning_rate: float,
        gradient_clip: float | None = None,
        objective: Objective | None = None,
        compile: Compile = "auto",
        steps: int = 0,
        precision: Precision = "highest",
    ) -> None:
        self.vae, self.size = vae, size
        self.parameters, self.seen = _trainable(vae), _seen(vae)
        self.clip = None if gradient_clip is None else gradient_clip * size
        self.objective = objective or ELBO()
        self.compile, self.steps, self.precision = compile, steps, precision
        self.optimizer = torch.optim.Adam(self.parameters, learning_rate, fused=True)
        self.prepared = compile == "never"
        self.graph: GradientGraph | None = None

    def __call__(
        self, x: Tensor, *, kl_weight: float = 1.0, learning_rate: float | None = None, **beside: Tensor
    ) -> tuple[float, float]:
        """Take one step.

        Args:
            x: a mini-batch, (B, *event).
            **beside: covariates (B, C) and exposure (B,), if the model takes them.
            kl_weight: weight of the KL part in the objective.
            learning_rate: Adam's, from this step on; None keeps the last one.

        Returns:
            The objective's loss and the unweighted ELBO before the step, in nats per datum.

        Raises:
            NonFiniteSite: the loss is not finite; the weights are unchanged.
        """
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        batch = {"x": x, **beside}
        self.prepare(batch)
        self._follow()
        for parameter in self.parameters:  # frees the memory of the last gradients for the next ones
            parameter.grad = None
        with lowered(self.vae, self.precision):
            found = None if self.graph is None else self.graph(batch, kl_weight)
            if found is None:
                estimate = evaluate(self.objective, self.vae, batch, self.size, kl_weight)
                estimate.loss.backward()
                found = float(estimate.objective), float(estimate.elbo), [value.grad for value in self.parameters]
        objective, elbo, gradients = found
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return objective / self.size, elbo / self.size

    def prepare(self, batch: Batch) -> None:
        """Decide how gradients are evaluated, and make the graph, from an example of the batches to come.

        The decision and the graph's numbers depend only on the example, the plan and the options.
        """
        if self.prepared:
            return
        self.prepared = True
        if self.compile == "auto" and self.steps < FEW:
            return
        with lowered(self.vae, self.precision):
            self._make(batch)

    def _make(self, batch: Batch) -> None:
        """Trace the graph and compile it, as far as possible and worthwhile."""
        graph = None
        try:
            graph = GradientGraph(self.vae, self.objective, self.size, batch, self.precision)
            seconds = self.steps * (HANDLER_SECONDS + graph.flops / FLOPS)
            if self.compile == "auto" and seconds < TRACE_AFTER:
                return
            graph.trace(batch)
            self.graph = graph
            if self.compile == "auto" and seconds < COMPILE_AFTER:
                log.info(f"fit: step traced, not compiled: about {seconds:.0f} s of work planned, which would not repay it")
                return
            log.info(f"fit: step compiled in {graph.compile(batch):.1f} s; {self.steps:,} steps planned")
        except Untraceable as error:
            kept = "eager" if self.graph is None else "traced, not compiled"
            log.info(f"fit: step {kept}: {error}")
        finally:
            if graph is not None:
                graph.eager.clear()  # as large as the model

    def _follow(self) -> None:
        """Point Adam to parameters that were replaced (`load_state_dict(assign=True)`) and keep its moments."""
        seen = _seen(self.vae)
        if len(seen) == len(self.seen) and all(map(is_, seen, self.seen)):
            return
        state = self.optimizer.state_dict()
        self.parameters, self.seen = _trainable(self.vae), seen
        self.optimizer = torch.optim.Adam(self.parameters, self.optimizer.param_groups[0]["lr"], fused=True)
        self.optimizer.load_state_dict(state)


def _trainable(vae: VAE) -> list[nn.Parameter]:
    return [parameter for parameter in vae.parameters() if parameter.requires_grad]


def _seen(vae: VAE) -> list[nn.Parameter]:
    """Return the trainable parameters in traversal order (not Adam's); fast enough for every step."""
    parameters = (parameter for module in modules(vae) for parameter in module._parameters.values())
    return [parameter for parameter in parameters if parameter is not None and parameter.requires_grad]
