"""Gated recurrent networks for sequences (T, F): one class that reads a sequence as an encoder and makes one as a decoder.

Cho et al. 2014 (https://arxiv.org/abs/1406.1078), in the form of `torch.nn.GRU`:

    r = sigmoid(A_r x + a_r + B_r h + b_r)           u = sigmoid(A_u x + a_u + B_u h + b_u)
    c = tanh(A_c x + a_c + r (B_c h + b_c))          h' = (1 - u) c + u h

The steps are written as ordinary tensor operations on (..., hidden). `torch.nn.GRU` takes only one batch dimension, does not
support `torch.func.vmap`, and computes A x again at each step even if x is always the same z; on a CPU it is slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, cast

import torch
from annotated_types import Ge
from torch import Tensor, nn

from elbowroom.models.networks.base import Network


class Cell(nn.Module):
    """One gated recurrent unit.

    Attributes:
        given: x (..., n_in) -> [A_r x + a_r, A_u x + a_u, A_c x + a_c], (..., 3 hidden); for many steps at once.
        recurrent: h -> [B_r h + b_r, B_u h + b_u, B_c h + b_c].
    """

    def __init__(self, n_in: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.given = nn.Linear(n_in, 3 * hidden)
        self.recurrent = nn.Linear(hidden, 3 * hidden)

    def forward(self, given: Tensor, h: Tensor) -> Tensor:
        """Take one step from h (..., hidden), given A x + a (..., 3 hidden)."""
        two = 2 * self.hidden
        recurrent = self.recurrent(h)
        r, u = torch.sigmoid(given[..., :two] + recurrent[..., :two]).chunk(2, -1)
        c = torch.tanh(torch.addcmul(given[..., two:], r, recurrent[..., two:]))
        return torch.lerp(c, h, u)

    def unrolled(self, given: Sequence[Tensor], h: Tensor, counts: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the state after each step, from the initial state h and A x + a of each step (`given`).

        `counts` says for each step, (..., 1), whether it counts; other steps leave the state unchanged.
        """
        states = []
        for t, x in enumerate(given):
            new = self(x, h)
            h = new if counts is None else torch.where(counts[t], new, h)
            states.append(h)
        return states


class SequenceEncoder(nn.Module):
    """The last states of gated recurrent layers, and one affine layer: (..., T*F) -> (..., out_dim).

    Each layer reads the states of the one below. With `bidirectional` it also reads backwards, from the last step that counts.
    With `marks` the last feature of each step says whether the step counts. With `every`, each step gives an output,
    (..., T*P), and is read backwards, or both ways: what is said about a step then knows all later ones.
    """

    def __init__(
        self, steps: int, width: int, out_dim: int, hidden: int, layers: int, bidirectional: bool, marks: bool, every: bool
    ) -> None:
        super().__init__()
        self.shape, self.marks, self.every = (steps, width), marks, every
        ways = 1 + bidirectional
        widths = [width - marks] + [ways * hidden] * (layers - 1)
        self.forwards = nn.ModuleList([Cell(n_in, hidden) for n_in in widths])
        self.backwards = nn.ModuleList([Cell(n_in, hidden) for n_in in widths] if bidirectional else [])
        self.head = nn.Linear(ways * hidden, out_dim // steps if every else out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map flattened sequences (..., T*F) to (..., out_dim)."""
        x = x.unflatten(-1, self.shape).movedim(-2, 0)
        turned = self.every and not self.backwards
        x = x.flip(0) if turned else x
        counts: Sequence[Tensor] | None = None
        if self.marks:
            counts, x = (x[..., -1:] > 0).unbind(0), x[..., :-1]
        states, last = [x], x
        for i, cell in enumerate(_cells(self.forwards)):
            states = _states(cell, x, counts)
            last = states[-1]
            if self.backwards:
                behind = _states(_cells(self.backwards)[i], x.flip(0), None if counts is None else counts[::-1])
                last = torch.cat([last, behind[-1]], -1)
                states = [torch.cat(both, -1) for both in zip(states, reversed(behind), strict=True)]
            if i + 1 < len(self.forwards):
                x = torch.stack(states)
        if not self.every:
            return self.head(last)
        return self.head(torch.stack(states[::-1] if turned else states)).movedim(0, -2).flatten(-2)


class SequenceDecoder(nn.Module):
    """Gated recurrent layers that start from z and read z at each step, and one affine layer: (..., d) -> (..., k*T*F).

    Each further layer reads the states of the one below.
    """

    def __init__(self, width: int, out_shape: tuple[int, int, int], hidden: int, layers: int) -> None:
        super().__init__()
        self.steps = out_shape[1]
        self.step_shape = (out_shape[0], out_shape[2])
        self.start = nn.Linear(width, layers * hidden)
        self.cells = nn.ModuleList([Cell(hidden if i else width, hidden) for i in range(layers)])
        self.head = nn.Linear(hidden, math.prod(self.step_shape))

    def forward(self, z: Tensor) -> Tensor:
        """Map z (..., d) to flattened parameters (..., k*T*F)."""
        states: list[Tensor] = []
        for i, (cell, h) in enumerate(zip(_cells(self.cells), self.start(z).chunk(len(self.cells), -1), strict=True)):
            given = cell.given(torch.stack(states)).unbind(0) if i else [cell.given(z)] * self.steps
            states = cell.unrolled(given, h)
        y = self.head(torch.stack(states)).unflatten(-1, self.step_shape)  # (T, ..., k, F)
        return y.movedim(0, -2).flatten(-3)


class GRU(Network):
    """A gated recurrent network for sequences (T, F).

    As an encoder it takes the state after the last step with an observed entry: with `marks`, padding at the end (NaN) has no
    effect; without them every step counts. Marks of missing entries and covariates are features of each step. For the guide
    `markov` it gives each step's parameters from the state there, read backwards, from the last step that counts.
    As a decoder it makes each step from z and its state alone: given z the steps are independent,
    log p(x|z) = sum_t log p(x_t|z).

    Args:
        in_shape: shape of one input: (T, F) for an encoder, (d,) for a decoder (a fact).
        out_dim: width of one output (a fact).
        out_shape: (k, T, F) for a decoder with k parameters per entry; (T, P) for an encoder of every step (a fact).
        marks: whether the input comes with marks of what was seen, as `join` lays them out (a fact).
        hidden: width of the states.
        layers: number of recurrent layers, one upon the other.
        bidirectional: an encoder also reads backwards, from the last step to the first.
    """

    sequences: ClassVar[bool] = True  # figures draw a datum step by step; otherwise (T, F) may be drawn as an image

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_dim: int,
        out_shape: tuple[int, ...],
        marks: bool,
        *,
        hidden: Annotated[int, Ge(1)] = 128,
        layers: Annotated[int, Ge(1)] = 1,
        bidirectional: bool = False,
    ) -> None:
        if len(in_shape) == 2:
            steps, width = in_shape
            every = len(out_shape) == 2 and out_shape[0] == steps
            body: nn.Module = SequenceEncoder(steps, width, out_dim, hidden, layers, bidirectional, marks, every)
        elif len(in_shape) == 1 and len(out_shape) == 3:
            if bidirectional:
                raise ValueError("bidirectional: is for encoders; a decoder makes its steps in order: leave it out")
            body = SequenceDecoder(in_shape[0], (out_shape[0], out_shape[1], out_shape[2]), hidden, layers)
        else:
            what = f"reads {tuple(in_shape)}" if len(out_shape) == 1 else f"makes {tuple(out_shape[1:])}"
            raise ValueError(
                f"gru is for sequences, (T, F), and this network {what}: reshape the data to sequences "
                "(one number per step is (T, 1)), or use mlp"
            )
        super().__init__(in_shape, out_dim, body)

    @classmethod
    def joined_shape(cls, shape: tuple[int, ...], *, marks: bool, covariates: int) -> tuple[int, ...]:
        """Return (T, F (1 + marks) + covariates + marks); a sequence alone keeps its shape."""
        if len(shape) != 2 or not (marks or covariates):  # `__init__` refuses other shapes
            return tuple(shape)
        return (shape[0], shape[1] * (1 + marks) + covariates + marks)

    def join(self, x: Tensor, seen: Tensor | None, covariates: Tensor | None) -> Tensor:
        """Join features, marks, covariates, and a flag that is 1 up to the last step with an observed entry: (N, T, F').

        Arguments as in `Network.join`.
        """
        if seen is None and covariates is None:
            return x
        parts = [x]
        if seen is not None:
            parts.append(seen)
        if covariates is not None:
            parts.append(covariates[:, None, :].expand(-1, x.shape[1], -1))
        if seen is not None:
            counts = seen.amax(-1, keepdim=True).flip(1).cummax(1).values.flip(1)
            # without any observed entry, the first step counts, so that the covariates are read
            parts.append(torch.cat([torch.ones_like(counts[:, :1]), counts[:, 1:]], 1))
        return torch.cat(parts, -1)


def _cells(cells: nn.ModuleList) -> list[Cell]:
    return cast(list[Cell], list(cells))  # nn.ModuleList has no element type


def _states(cell: Cell, x: Tensor, counts: Sequence[Tensor] | None) -> list[Tensor]:
    """Return the states of a cell, from 0, along x (T, ..., n_in)."""
    given = cell.given(x)
    return cell.unrolled(given.unbind(0), torch.zeros_like(given[0, ..., : cell.hidden]), counts)
