r"""One training step: the objective's gradient on a mini-batch, and one fused Adam.

    loss = -(1/N) objective,      with the gradient of N loss given to Adam, as `pyro.infer.SVI` with `pyro.optim.Adam` does.

The gradient is evaluated eagerly, by running the Pyro programs, or by a graph of them (`compiled`), made of the function

    (parameters, buffers, batch, KL weight) -> (objective, ELBO, outcomes of branches, gradients)

A graph that is replayed has the numbers of the eager step bit for bit: the same operations, the same draws. One that is
compiled has the same draws and agrees to rounding. A branch on a value (`if x.isnan().any()`) is followed as on the batch that
the graph was made with; what it comes to on others is an output, and where it differs the eager step is taken. So it is for
batches of other shapes, and where a value is not finite: the eager step, at the same draws, names the site.

Whether to compile is decided by the plan, never by the clock, so that the same seed gives the same numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from elbowroom.errors import first_line
from elbowroom.inference.branches import Branches
from elbowroom.inference.compiled import Compile, Graph, Operations, Untraceable
from elbowroom.inference.objectives import ELBO, Estimate, Objective, unchecked
from elbowroom.inference.rounding import Precision, lowered
from elbowroom.inference.rows import Batch
from elbowroom.models.vae import VAE
from elbowroom.stages import stage

log = logging.getLogger("elbowroom.compiled")

# what an eager step is predicted to take: Pyro's handlers, and so many floating-point operations per second
HANDLER_SECONDS, FLOPS = 4e-3, 8e10
# predicted seconds of all planned steps that repay making a graph, and compiling it
TRACE_AFTER, COMPILE_AFTER = 6.0, 20.0
FEW = 50  # steps that repay nothing, whatever they are
# how far a graph may be from the eager run, as a share of the largest entry; rounding is less
TOLERANCE: dict[Precision, float] = {"highest": 1e-3, "tf32": 1e-2, "bf16": 5e-2}
TINY = 1e-12


class Step:
    """One step of SVI on a mini-batch.

    Pyro's global parameter store gets the VAE's parameters when the programs run; open
    `pyro.get_param_store().scope()` around the steps to keep it clean (`fit` does).

    Args:
        vae: the model and guide.
        size: number of data N for which each mini-batch stands.
        learning_rate: Adam's.
        gradient_clip: largest Euclidean norm of the gradient of the loss per datum; None clips nothing.
        objective: what is maximised; the ELBO by default.
        compile: whether the gradient is a compiled graph: where the planned steps repay it, wherever it can be, or never.
        steps: planned steps, for `auto`.
        precision: of matrix products.
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
        self.parameters = _trainable(vae)
        self.gradient_clip = gradient_clip
        self.objective = objective or ELBO()
        self.compile, self.steps, self.precision = compile, steps, precision
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, fused=True)
        self.prepared = compile == "never"
        self.graph: GradientGraph | None = None

    def __call__(
        self, x: Tensor, *, kl_weight: float = 1.0, learning_rate: float | None = None, **beside: Tensor
    ) -> tuple[float, float]:
        """Take one step.

        Args:
            x: a mini-batch, (B, *event).
            **beside: covariates (B, C) and exposure (B,), where the model takes them.
            kl_weight: weight of the KL part in the objective.
            learning_rate: changes Adam's from this step on.

        Returns:
            The objective's loss and the unweighted ELBO before the step, in nats per datum.

        Raises:
            NonFiniteSite: the loss is not finite; the weights are as they were.
        """
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        batch = {"x": x, **beside}
        self.prepare(batch)
        self._follow()
        with lowered(self.vae, self.precision):
            found = None if self.graph is None else self.graph(batch, kl_weight)
            if found is None:
                self.optimizer.zero_grad()
                estimate = evaluate(self.objective, self.vae, batch, self.size, kl_weight)
                estimate.loss.backward()
                found = float(estimate.objective), float(estimate.elbo), [value.grad for value in self.parameters]
        objective, elbo, gradients = found
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.gradient_clip * self.size)
        self.optimizer.step()
        return objective / self.size, elbo / self.size

    def prepare(self, batch: Batch) -> None:
        """Decide how gradients are evaluated, and make the graph, on an example of the batches to come.

        The decision depends on the example, the plan and the options alone, and so do the graph's numbers.
        """
        if self.prepared:
            return
        self.prepared = True
        if self.compile == "auto" and self.steps < FEW:
            return
        with lowered(self.vae, self.precision):
            self._make(batch)

    def _make(self, batch: Batch) -> None:
        """Make the graph, as far as it is worth it and can be."""
        graph = None
        try:
            graph = GradientGraph(self, batch)
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
        """Let Adam follow parameters that were replaced (`load_state_dict(assign=True)`), with the moments it had for them."""
        now = _trainable(self.vae)
        if len(now) == len(self.parameters) and all(a is b for a, b in zip(now, self.parameters, strict=True)):
            return
        state = self.optimizer.state_dict()
        self.parameters = now
        self.optimizer = torch.optim.Adam(now, lr=self.optimizer.param_groups[0]["lr"], fused=True)
        self.optimizer.load_state_dict(state)


def evaluate(objective: Objective, vae: VAE, batch: Batch, size: int, kl_weight: float | Tensor) -> Estimate:
    """Estimate the objective of all N data on a mini-batch."""
    return objective(vae.model, vae.guide, **batch, size=size, kl_weight=kl_weight)


class GradientGraph:
    """The objective, the ELBO and the gradients of a step as one graph.

    Args:
        step: what it is the gradient of.
        batch: an example of the batches.

    Attributes:
        flops: floating-point operations of its matrix products and convolutions, counted in an eager run.

    Raises:
        Untraceable: the programs cannot be a graph.
    """

    def __init__(self, step: Step, batch: Batch) -> None:
        self.step, self.names = step, list(batch)
        self.shapes, self.modes = [value.shape for value in batch.values()], _modes(step.vae)
        self.paths, self.places = _state(step.vae)
        self.trained = [path for path, value in step.vae.named_parameters() if value.requires_grad]
        self.weight = torch.ones((), dtype=torch.float64, device=batch["x"].device)
        self.used: list[bool] = []
        self.outcomes: list[bool] = []
        self.flops = 0
        self.eager = self._run(batch)
        self.graph: Graph | None = None

    def _run(self, batch: Batch) -> list[Tensor]:
        """Run the programs eagerly once, on copies of their state: what branches come to, operations counted, values."""
        inputs = [value.detach().clone() for value in self._inputs(batch, 1.0)]
        before = [value.clone() for value in inputs]
        branches, counter = Branches(), Operations()
        try:
            with _again(batch), counter:
                values = self._gradients(inputs, branches)
        except Exception as error:  # whatever a program raises on copies of its state; the eager step says what is wrong
            raise Untraceable(f"it does not run on copies of its state ({first_line(error)})") from error
        for path, value, was in zip(self.paths, inputs, before, strict=False):
            if not torch.equal(value, was) and not bool(was.isnan().any()):
                raise Untraceable(f"it changes {path} as it goes (batch statistics, or the like)")
        self.outcomes, self.flops = list(branches.outcomes), counter.total
        return list(values)

    def trace(self, batch: Batch) -> None:
        """Make the graph and compare it with the eager run.

        Raises:
            Untraceable: the programs cannot be a graph.
        """

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self._gradients(tensors, Branches(outcomes=list(self.outcomes)))

        with stage("trace"):
            self.graph = Graph(function, self._inputs(batch, 1.0))
        self._check_branches(self.graph.module.graph)
        self._compare(batch, "graph")

    def compile(self, batch: Batch) -> float:
        """Compile the graph and compare it with the eager run; returns the seconds it took.

        Raises:
            Untraceable: it cannot be compiled.
        """
        assert self.graph is not None
        return self.graph.compile(lambda _: self._compare(batch, "compiled graph"))

    def __call__(self, batch: Batch, kl_weight: float) -> tuple[float, float, list[Tensor | None]] | None:
        """Return objective and ELBO for all N data, and a gradient for each trained parameter.

        None where the eager step has to be taken, at the same random numbers: the batch has another shape, a branch another
        outcome, a network another mode, or a value is not finite.
        """
        same = list(batch) == self.names and [value.shape for value in batch.values()] == self.shapes
        if self.graph is None or not same or _modes(self.step.vae) != self.modes:
            return None
        device = batch["x"].device
        state = _random_state(device)
        values, *gradients = self.graph(*self._inputs(batch, kl_weight))
        objective, elbo, *outcomes = values.tolist()
        if not (math.isfinite(objective) and math.isfinite(elbo)) or [outcome != 0 for outcome in outcomes] != self.outcomes:
            _set_random_state(device, state)
            return None
        found = iter(gradients)
        return objective, elbo, [next(found) if used else None for used in self.used]

    def _gradients(self, tensors: Sequence[Tensor], branches: Branches) -> tuple[Tensor, ...]:
        """Return (objective, ELBO, what each branch tests) in one tensor, and the gradients that there are."""
        many, step = len(self.paths), self.step
        given = dict(zip(self.paths, tensors, strict=False))
        given.update({path: given[path].detach().requires_grad_() for path in self.trained})
        batch, weight = dict(zip(self.names, tensors[many:], strict=False)), tensors[-1]
        with _apart(), _reparametrize_module(step.vae, given, tie_weights=True), branches, torch.enable_grad():
            estimate = evaluate(step.objective, step.vae, batch, step.size, weight)
            found = torch.autograd.grad(estimate.loss, [given[path] for path in self.trained], allow_unused=True)
        if len(branches.tested) != len(self.outcomes):
            raise Untraceable("it branches differently when it is traced")
        self.used = [gradient is not None for gradient in found]
        scalars = [estimate.objective, estimate.elbo, *branches.tested]
        values = torch.stack([torch.as_tensor(value).detach().reshape(()).to(self.weight) for value in scalars])
        return values, *_owned([gradient for gradient in found if gradient is not None], tensors)

    def _inputs(self, batch: Batch, kl_weight: float) -> list[Tensor]:
        """Return the inputs: parameters and buffers as they are now, looked up anew, the batch and the weight."""
        return [*[place[name] for place, name in self.places], *batch.values(), self.weight.fill_(kl_weight)]

    def _check_branches(self, graph: torch.fx.Graph) -> None:
        """Raise Untraceable where a branch tests a value that is drawn or learned: only data have the same outcome again."""
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        trained = {node for node, path in zip(inputs, self.paths, strict=False) if path in self.trained}
        (outputs,) = graph.output_node().args
        values: Any = outputs[0]  # type: ignore[index]
        waiting: list[torch.fx.Node] = list(values.args[0][2:])  # what was stacked
        seen: set[torch.fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if node in trained or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise Untraceable("it branches on a value that is drawn or learned")
            if node not in seen:
                seen.add(node)
                waiting += node.all_input_nodes

    def _compare(self, batch: Batch, whose: str) -> None:
        """Raise Untraceable where the graph has other values than the eager run, beyond rounding."""
        assert self.graph is not None
        with _again(batch):
            found = self.graph(*self._inputs(batch, 1.0))
        mine, theirs = self.eager[0][:2], found[0][:2]
        tolerance = TOLERANCE[self.step.precision]
        pairs = [*zip(mine, theirs, strict=True), *zip(self.eager[1:], found[1:], strict=True)]
        for value, other in pairs:
            if not bool((value - other).abs().max() <= tolerance * value.abs().max() + TINY):
                raise Untraceable(f"the {whose} has other values than the eager step")


def _owned(gradients: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients laid out as parameters are, each in memory of its own: Adam and the clipping go over it in place."""
    taken = {value.untyped_storage()._cdata for value in others}
    owned = []
    for gradient in gradients:
        value = gradient.contiguous()
        owned.append(value.clone() if value.untyped_storage()._cdata in taken else value)
        taken.add(owned[-1].untyped_storage()._cdata)
    return owned


@contextmanager
def _apart() -> Iterator[None]:
    """Run programs without their checks, and with a parameter store that is forgotten."""
    with unchecked(), pyro.validation_enabled(False), pyro.get_param_store().scope():
        yield


@contextmanager
def _again(batch: Batch) -> Iterator[None]:
    """Draw random numbers that are drawn again afterwards."""
    device = batch["x"].device
    state = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(device, state)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _trainable(vae: VAE) -> list[nn.Parameter]:
    return [parameter for parameter in vae.parameters() if parameter.requires_grad]


def _modes(vae: VAE) -> list[bool]:
    return [module.training for module in vae.modules()]


def _state(vae: VAE) -> tuple[list[str], list[tuple[dict[str, Any], str]]]:
    """Return the paths of parameters and buffers, and where each is found: in which dictionary, by which name."""
    paths: list[str] = []
    places: list[tuple[dict[str, Any], str]] = []
    seen: set[int] = set()
    stores: tuple[dict[str, Any], ...]
    for prefix, module in vae.named_modules():
        stores = (module._parameters, module._buffers)
        for place in stores:
            for name, value in place.items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    paths.append(f"{prefix}.{name}" if prefix else name)
                    places.append((place, name))
    return paths, places
