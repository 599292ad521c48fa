"""A training step that nobody waits for: gradient, clipping and Adam on the device, from buffers and into buffers.

A step that reports its loss makes the host wait for the device, and on a GPU that waiting, with the launches of some hundred
small kernels, is most of a small step. Here the step is a function of buffers (batch, KL weight, learning rate) whose result
(objective, ELBO, whether it was bad) is a row of a buffer too, looked at once for many steps. On CUDA it is captured as one
CUDA graph, which is launched at once.

What the host would have looked at is decided on the device. A step is bad where objective or ELBO is not finite, or a branch
came to something else than in the graph; so are all after it until somebody looks. Adam takes the flag as `found_inf`, by
which `torch.amp.GradScaler` makes it skip a step: weights, moments and its counter of steps stay as they were before the first
bad one.

CUDA graphs: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elbowroom.errors import first_line
from elbowroom.inference.compiled.graph import Untraceable
from elbowroom.inference.fit.mixed_precision import lowered
from elbowroom.inference.fit.step_graph import GradientGraph, compare, generators, modes, put_back, states
from elbowroom.models.vae import Batch

WINDOW = {"cpu": 1, "cuda": 64}
"""Most steps between two looks, by kind of device; with 1 each step is looked at, and none is a `WholeStep`."""
WARM_UP = 3  # runs on a side stream before a capture, as torch's documentation asks for


class WholeStep:
    """A whole step of SVI as a function of buffers.

    Args:
        graph: of its gradient.
        optimizer: fused Adam.
        parameters: what it trains, in the order of the graph's gradients.
        clip: largest norm of the gradient of the loss of all N data; None clips nothing.
        batch: an example of the batches.

    Attributes:
        most: how many steps may be taken between two looks.
    """

    def __init__(
        self,
        graph: GradientGraph,
        optimizer: torch.optim.Adam,
        parameters: Sequence[nn.Parameter],
        clip: float | None,
        batch: Batch,
    ) -> None:
        self.graph, self.parameters, self.clip = graph, parameters, clip
        self.optimizer: Any = optimizer
        self.device = device = batch["x"].device
        self.most = WINDOW[device.type]
        self.batch = {name: value.clone() for name, value in batch.items()}
        # what Adam's kernels read: float32 on a GPU
        self.rate = torch.zeros((), dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device)
        self.bad = torch.zeros((), dtype=torch.float32, device=device)  # Adam wants float32 on any device
        self.outcomes = torch.tensor(graph.outcomes, dtype=torch.bool, device=device)
        self.rows = torch.zeros(self.most, 3, dtype=torch.float64, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.taken = 0
        self.moments, self.places = optimizer.state, graph.addresses()
        self.captured: Any = None

    def covers(self, count: int) -> bool:
        """Say whether a step on so many data is this one: the batch as long, modes and tensors those it was made for."""
        same = count == len(self.batch["x"]) and self.optimizer.state is self.moments
        return same and self.graph.addresses() == self.places and modes(self.graph.vae) == self.graph.modes

    def __call__(self, batch: Batch, kl_weight: float, learning_rate: float) -> None:
        """Take a step, without waiting for it; one of at most `most` until the next look."""
        if self.taken == self.most:
            raise RuntimeError(f"{self.most} steps were taken without a look")
        for name, value in self.batch.items():
            value.copy_(batch[name])
        self.graph.weight.fill_(kl_weight)
        self.rate.fill_(learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.taken += 1
        if self.captured is not None:
            self.captured.replay()
            return
        with lowered(self.graph.vae, self.graph.precision):
            self._run()

    def look(self) -> list[tuple[float, float]]:
        """Return objective and ELBO for all N data of the steps since the last look, up to the first bad one; forget them."""
        rows = self.rows[: self.taken].tolist()
        self._forget()
        return [(objective, elbo) for objective, elbo, _ in itertools.takewhile(lambda row: row[2] == 0, rows)]

    def _forget(self, bad: float = 0.0) -> None:
        self.taken = 0
        self.row.zero_()
        self.bad.fill_(bad)

    def _run(self) -> None:
        """The step itself: what is captured."""
        values, gradients = self.graph.run(self.batch)
        good = values[:2].isfinite().all() & ((values[2:] != 0) == self.outcomes).all()
        self.bad.copy_(torch.maximum(self.bad, (~good).to(self.bad)))
        self.rows.index_copy_(0, self.row, torch.cat([values[:2], self.bad.to(values)[None]])[None])
        self.row += 1
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        with self._from_buffers():
            self.optimizer.step()

    @contextmanager
    def _from_buffers(self) -> Iterator[None]:
        """Let Adam read rate and flag from the device; it and its checkpoints are otherwise as in any other step."""
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        (group,) = self.optimizer.param_groups
        before = {name: group[name] for name in ("lr", "capturable")}
        group.update(lr=self.rate, capturable=capturing)
        self.optimizer.found_inf = self.bad
        try:
            yield
        finally:
            group.update(before)
            del self.optimizer.found_inf

    # CUDA

    def capture(self) -> None:
        """Capture the step as a CUDA graph and compare it with the step; weights, moments and random numbers stay as they are.

        Raises:
            Untraceable: it cannot be captured, or differs.
        """
        streams = generators(self.device)
        before = states(streams)
        try:
            with torch.cuda.device(self.device):
                self.captured = self._capture(before)
        except Untraceable:
            raise
        except Exception as error:  # whatever CUDA raises
            for stream in streams[1:]:  # older versions of torch take a capture that failed for one that goes on
                stream.graphsafe_set_state(torch.Generator(self.device))
            raise Untraceable(f"capturing failed ({first_line(error)})") from error
        finally:
            put_back(streams, before)
            self._forget()
            self.optimizer.zero_grad()

    def _capture(self, before: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        streams = generators(self.device)

        def ready() -> None:
            put_back(streams, before)
            self._forget(bad=1.0)  # so that nothing is updated

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                ready()
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        expected = self._results()
        graph = torch.cuda.CUDAGraph()
        ready()
        with torch.cuda.graph(graph, stream=side):
            self._run()
        ready()
        graph.replay()
        compare(expected, self._results(), "captured step", self.graph.precision)
        return graph

    def _results(self) -> list[Tensor]:
        """Return copies of objective, ELBO and gradients of the last step."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return [value.clone() for value in (*self.rows[0, :2], *gradients)]
