"""Steps of a fit, looked at a window at a time where they are taken without looking (`whole_step`).

A window ends where the whole step does not cover the next one (the last, smaller batch of an epoch), with the epoch, or when it
is full. Then it is looked at. From the first bad step on nothing was updated, so the generators are put back to where they were
before that step, and it is taken anew and looked at: that names the site where its loss is not finite, and is right where
a branch went the other way. What follows it is taken in new windows.

What comes out does not depend on how long windows are. The first one, and the next one after a bad step, is of one step, the
others are twice as long as the one before: where many steps are bad, few are taken in vain.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.fit.step import Step
from elbowroom.inference.fit.step_graph import put_back, states
from elbowroom.models.vae import Batch


@dataclass(frozen=True, eq=False)
class Turn:
    """What a step is to be taken on.

    Attributes:
        step: its number in the fit, counted from 0.
        index: positions of its training rows, (B,).
        rate: learning rate.
        weight: KL weight.
    """

    step: int
    index: Tensor
    rate: float
    weight: float


Make = Callable[[Turn], Batch]
Take = Callable[[Turn], tuple[float, float]]


class Window:
    """Takes steps in order.

    Args:
        step: takes one.
        streams: the generators that batches and steps draw from.
    """

    def __init__(self, step: Step, streams: Sequence[torch.Generator]) -> None:
        self.step, self.streams = step, streams
        self.length = 1

    def __call__(self, turns: Sequence[Turn], batch: Make, take: Take) -> Iterator[tuple[Turn, tuple[float, float]]]:
        """Yield each turn with loss and ELBO before its step, in nats per datum.

        Args:
            turns: in their order.
            batch: makes the mini-batch of a turn; the same again, where the generators are put back.
            take: makes it, takes the step, and looks.
        """
        left = deque(turns)
        while left:
            before = self.ahead(left, batch)
            good = self._look(len(before))
            for losses in good:
                yield left.popleft(), losses
            bad = len(good) < len(before)
            if bad:
                put_back(self.streams, before[len(good)])
            if before:
                self.length = 1 if bad else max(self.length, 2 * len(before))
            if bad or not before:
                turn = left.popleft()
                yield turn, take(turn)

    def ahead(self, turns: Iterable[Turn], batch: Make) -> list[list[Tensor]]:
        """Take steps without looking, as many as may be; return where the generators were before each."""
        before: list[list[Tensor]] = []
        whole = self.step.whole
        if whole is None:
            return before
        for turn in itertools.islice(turns, min(self.length, whole.most)):
            if not whole.covers(len(turn.index)):
                break
            before.append(states(self.streams))
            whole(batch(turn), turn.weight, turn.rate)
        return before

    def _look(self, taken: int) -> list[tuple[float, float]]:
        """Return loss and ELBO of the steps that were taken ahead, up to the first bad one."""
        if self.step.whole is None or not taken:
            return []
        size = self.step.size
        return [(objective / size, elbo / size) for objective, elbo in self.step.whole.look()]
