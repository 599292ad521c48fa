"""The gradient of a training step as one graph (`elbowroom.inference.compiled`).

    (parameters, buffers, batch, KL weight) -> (objective, ELBO, tested values of branches, gradients)

A replayed graph gives the numbers of the eager step bit for bit: the same operations, the same draws. A compiled one has the
same draws and agrees to rounding. A branch on a value (`if x.isnan().any()`) takes the path that it took on the example
batch; the tested value is an output, so that another outcome is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from elbowroom.errors import first_line
from elbowroom.inference.compiled.branches import Branches
from elbowroom.inference.compiled.graph import Graph, Operations, Untraceable, log
from elbowroom.inference.compiled.side_effects import left_alone
from elbowroom.inference.fit.mixed_precision import Precision
from elbowroom.inference.objectives.elbo import Estimate, Objective, unchecked
from elbowroom.models.vae import VAE, Batch
from elbowroom.system.stages import stage

# largest allowed difference from the eager run, relative to the largest entry; rounding errors are smaller
TOLERANCE: dict[Precision, float] = {"highest": 1e-3, "tf32": 1e-2, "bf16": 5e-2}
TINY = 1e-12


def evaluate(objective: Objective, vae: VAE, batch: Batch, size: int, kl_weight: float | Tensor) -> Estimate:
    """Estimate the objective of all N data on a mini-batch."""
    return objective(vae.model, vae.guide, **batch, size=size, kl_weight=kl_weight)


class GradientGraph:
    """The objective, the ELBO and the gradients of a step as one graph.

    Args:
        vae: the model and guide.
        objective: the objective to differentiate.
        size: number of data N that each mini-batch stands for.
        batch: an example of the batches.
        precision: of matrix products; the caller has set it (`lowered`) at every call.

    Attributes:
        flops: floating-point operations of its matrix products and convolutions, counted in an eager run.
        outcomes: the outcome of each branch, in order.
        weight: the KL weight of the next step, a scalar.

    Raises:
        Untraceable: the programs cannot be a graph.
    """

    def __init__(self, vae: VAE, objective: Objective, size: int, batch: Batch, precision: Precision) -> None:
        self.vae, self.objective, self.size, self.precision = vae, objective, size, precision
        self.names, self.shapes, self.modes = list(batch), [value.shape for value in batch.values()], modes(vae)
        self.paths, self.places = _state(vae)
        self.trained = [path for path, value in vae.named_parameters() if value.requires_grad]
        self.weight = torch.ones((), dtype=torch.float64, device=batch["x"].device)
        self.used: list[bool] = []
        self.outcomes: list[bool] = []
        self.flops = 0
        self.eager = self._run(batch)
        self.graph: Graph | None = None

    def _run(self, batch: Batch) -> list[Tensor]:
        """Run the programs eagerly once on copies of their state; record branch outcomes and operations, return the values."""
        inputs = [value.detach().clone() for value in self._inputs(batch)]
        before = [value.clone() for value in inputs]
        branches, counter = Branches(), Operations()
        with left_alone(self.vae) as hidden:
            try:
                with again(batch["x"].device), counter:
                    values = self._gradients(inputs, branches)
            except Exception as error:  # any error of a program; the eager step will report it
                raise Untraceable(f"it does not run on copies of its state ({first_line(error)})") from error
            changed = hidden.changed()
        for path, value, was in zip(self.paths, inputs, before, strict=False):
            if not torch.equal(value, was) and not bool(was.isnan().any()):
                raise Untraceable(f"it changes {path} as it goes (batch statistics, or the like)")
        if changed:
            raise Untraceable(f"it changes {changed} as it goes, which a graph would not")
        self.outcomes, self.flops = list(branches.outcomes), counter.flops
        return list(values)

    def trace(self, batch: Batch) -> None:
        """Make the graph and compare it with the eager run.

        Raises:
            Untraceable: the programs cannot be a graph.
        """

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self._gradients(tensors, Branches(outcomes=list(self.outcomes)))

        with stage("trace"), left_alone(self.vae):
            self.graph = Graph(function, self._inputs(batch))
        self._check_branches(self.graph.module.graph)
        self._compare(batch, "graph")

    def compile(self, batch: Batch) -> float:
        """Compile the graph and compare it with the eager run; returns the seconds it took.

        On CUDA, torch captures the step as a CUDA graph if it can; otherwise the log gives the reason.

        Raises:
            Untraceable: it cannot be compiled.
        """
        assert self.graph is not None
        check = lambda _: self._compare(batch, "compiled graph")
        if batch["x"].device.type == "cuda":
            try:
                return self.graph.compile(check, capture=True)
            except Untraceable as error:
                log.info(f"fit: step not captured as a CUDA graph: {error}")
        return self.graph.compile(check)

    def __call__(self, batch: Batch, kl_weight: float) -> tuple[float, float, list[Tensor | None]] | None:
        """Return objective and ELBO for all N data, and a gradient for each trained parameter.

        Returns None, with the random generators restored, if the eager step must be taken: the batch has another shape, a
        branch another outcome, a network another mode, or a value is not finite.
        """
        same = list(batch) == self.names and [value.shape for value in batch.values()] == self.shapes
        if self.graph is None or not same or modes(self.vae) != self.modes:
            return None
        streams = generators(batch["x"].device)
        before = states(streams)
        self.weight.fill_(kl_weight)
        values, *gradients = self.graph(*self._inputs(batch))
        objective, elbo, *outcomes = values.tolist()
        if not (math.isfinite(objective) and math.isfinite(elbo)) or [outcome != 0 for outcome in outcomes] != self.outcomes:
            put_back(streams, before)
            return None
        found = iter(gradients)
        return objective, elbo, [next(found) if used else None for used in self.used]

    def _gradients(self, tensors: Sequence[Tensor], branches: Branches) -> tuple[Tensor, ...]:
        """Return (objective, ELBO, tested value of each branch) in one tensor, then the gradients that exist."""
        many = len(self.paths)
        given = dict(zip(self.paths, tensors, strict=False))
        given.update({path: given[path].detach().requires_grad_() for path in self.trained})
        batch, weight = dict(zip(self.names, tensors[many:], strict=False)), tensors[-1]
        with _apart(), _reparametrize_module(self.vae, given, tie_weights=True), branches, torch.enable_grad():
            estimate = evaluate(self.objective, self.vae, batch, self.size, weight)
            found = torch.autograd.grad(estimate.loss, [given[path] for path in self.trained], allow_unused=True)
        if len(branches.tested) != len(self.outcomes):
            raise Untraceable("it branches differently when it is traced")
        self.used = [gradient is not None for gradient in found]
        scalars = [estimate.objective, estimate.elbo, *branches.tested]
        values = torch.stack([torch.as_tensor(value).detach().reshape(()).to(self.weight) for value in scalars])
        return values, *_owned([gradient for gradient in found if gradient is not None], tensors)

    def _inputs(self, batch: Batch) -> list[Tensor]:
        """Return the inputs: the current parameters and buffers, the batch and the KL weight."""
        return [*[place[name] for place, name in self.places], *batch.values(), self.weight]

    def _check_branches(self, graph: torch.fx.Graph) -> None:
        """Raise Untraceable if a branch tests a drawn or learned value: only tests of data alone keep their outcome."""
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
        """Raise Untraceable if the graph's values differ from the eager run beyond rounding."""
        assert self.graph is not None
        with again(batch["x"].device):
            values, *gradients = self.graph(*self._inputs(batch))
        compare([*self.eager[0][:2], *self.eager[1:]], [*values[:2], *gradients], whose, self.precision)


def compare(expected: Sequence[Tensor], found: Sequence[Tensor], whose: str, precision: Precision) -> None:
    """Raise Untraceable where values differ from those of the eager step beyond rounding."""
    for value, other in zip(expected, found, strict=True):
        if value.numel() and not bool((value - other).abs().max() <= TOLERANCE[precision] * value.abs().max() + TINY):
            raise Untraceable(f"the {whose} has other values than the eager step")


def _owned(gradients: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients laid out as parameters are, each in its own memory, because Adam and clipping change them in place."""
    taken = {value.untyped_storage()._cdata for value in others}
    owned = []
    for gradient in gradients:
        value = gradient.contiguous()
        owned.append(value.clone() if value.untyped_storage()._cdata in taken else value)
        taken.add(owned[-1].untyped_storage()._cdata)
    return owned


@contextmanager
def _apart() -> Iterator[None]:
    """Run programs without checks of values, and discard their parameter store afterwards."""
    with unchecked(), pyro.validation_enabled(False), pyro.get_param_store().scope():
        yield


def generators(device: torch.device) -> list[torch.Generator]:
    """Return the generators that programs draw from on a device."""
    cuda = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    return [torch.default_generator, *cuda]


def states(streams: Sequence[torch.Generator]) -> list[Tensor]:
    """Return the states of generators; this does not wait for a GPU."""
    return [stream.get_state() for stream in streams]


def put_back(streams: Sequence[torch.Generator], before: Sequence[Tensor]) -> None:
    """Restore the states of generators."""
    for stream, state in zip(streams, before, strict=True):
        stream.set_state(state)


@contextmanager
def again(device: torch.device) -> Iterator[None]:
    """Restore the random generators on exit, so that the same numbers can be drawn again."""
    streams = generators(device)
    before = states(streams)
    try:
        yield
    finally:
        put_back(streams, before)


def modules(vae: VAE) -> list[nn.Module]:
    """Return all modules, each as often as it is used; faster than `vae.modules()`, for use at every step."""
    found: list[nn.Module] = [vae]
    for module in found:  # which grows
        found += [child for child in module._modules.values() if child is not None]
    return found


def modes(vae: VAE) -> list[bool]:
    """Return which modules are in train mode."""
    return [module.training for module in modules(vae)]


def _state(vae: VAE) -> tuple[list[str], list[tuple[dict[str, Any], str]]]:
    """Return the paths of parameters and buffers, and the dictionary and name under which each is stored."""
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
