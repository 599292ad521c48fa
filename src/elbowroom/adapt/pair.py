"""A Pyro (model, guide) pair out of four callables: prior, guide, likelihood, and the number of data.

    model:   z_n ~ p(z),  x_n ~ p(x|z_n)        guide:   z_n ~ q(z|x_n)        n = 1 .. N, in the plate "data"

This is all that a VAE is, whatever library it was written in. The adapters fill in the callables with the library's own
networks, so that weights are read where they are, and `er.audit(*pair, ...)` runs the two programs as any others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
from torch import Tensor

from elbowroom.errors import UserError

Distributions = Mapping[str, Any]  # site -> distribution
PLATE = "data"


class Pair:
    """A model and a guide: `model, guide = pair`, `er.audit(*pair, *pair.rows(range(40)))`.

    Attributes:
        model: Pyro program p(x, z), with plate `data`, latent site `z` (with scvi-tools also `library`) and observed site `x`.
        guide: Pyro program q(z|x), with the same plate.
        notes: sentences about how the pair differs from what its library trains; an audit repeats them.
    """

    def __init__(
        self,
        model: Callable[..., None],
        guide: Callable[..., None],
        notes: Sequence[str] = (),
        rows: Callable[[Sequence[int]], tuple[Any, ...]] | None = None,
    ) -> None:
        self.model, self.guide, self.notes = model, guide, tuple(notes)
        self._rows = rows
        if isinstance(owner := getattr(model, "__self__", None), Programs):
            owner.audit_notes = self.notes

    def __iter__(self) -> Iterator[Callable[..., None]]:
        """Unpack as model, guide."""
        return iter((self.model, self.guide))

    def rows(self, which: Sequence[int]) -> tuple[Any, ...]:
        """Return the arguments of both programs for some rows of the data that the library's model holds.

        Args:
            which: numbers of the rows.

        Raises:
            UserError: this library's models hold no data, or not those rows.
        """
        if self._rows is None:
            raise UserError("rows: this model holds no data; give the rows themselves: er.audit(*pair, x)")
        return self._rows(which)

    def __repr__(self) -> str:
        return "\n".join(["Pair(model, guide)", *(f"  {note}" for note in self.notes)])


class Programs:
    """The two programs. It holds what they need and nothing else: an audit holds still all modules that it reaches.

    Args:
        prior: arguments -> p(z), site -> distribution, in the order of sampling; each has the latents of one datum as its
            event.
        encode: arguments -> q(z|x), likewise, with batch shape (N,).
        observe: latents, arguments -> p(x|z), and the value x (N, ...) observed.
        size: arguments -> N.

    Attributes:
        audit_notes: sentences that an audit of these programs repeats.
    """

    audit_notes: tuple[str, ...] = ()

    def __init__(
        self,
        prior: Callable[..., Distributions],
        encode: Callable[..., Distributions],
        observe: Callable[..., tuple[Any, Tensor]],
        size: Callable[..., int],
    ) -> None:
        self.prior, self.encode, self.observe, self.size = prior, encode, observe, size

    def model(self, *args: Any) -> None:
        """Sample z from the prior, and observe x."""
        with pyro.plate(PLATE, self.size(*args)):
            z = {site: pyro.sample(site, fn) for site, fn in self.prior(*args).items()}
            fn, x = self.observe(z, *args)
            pyro.sample("x", per_datum(fn, x.dim() - 1), obs=x)

    def guide(self, *args: Any) -> None:
        """Sample z from the encoder."""
        with pyro.plate(PLATE, self.size(*args)):
            for site, fn in self.encode(*args).items():
                pyro.sample(site, fn)


def per_datum(fn: Any, event_dim: int) -> Any:
    """Return a distribution whose last `event_dim` dimensions are those of one datum."""
    return fn.to_event(event_dim - fn.event_dim) if event_dim > fn.event_dim else fn


def at_many(decode: Callable[[Tensor], Any], z: Tensor, event_dim: int = 1) -> Any:
    """Return decode(z), one tensor or several, for z with any number of leading dimensions, as of draws and rows.

    Networks of the peers, and those with convolutions, take rows alone.
    """
    lead = z.shape[: z.dim() - event_dim]
    if len(lead) == 1:
        return decode(z)
    found = decode(z.reshape(-1, *z.shape[len(lead) :]))

    def back(value: Any) -> Any:
        return value.reshape(*lead, *value.shape[1:]) if isinstance(value, Tensor) else value

    return tuple(map(back, found)) if isinstance(found, tuple | list) else back(found)


def in_shape(x: Tensor, fn: Any, place: str) -> Tensor:
    """Return x (N, ...) in the shape of a draw of the likelihood, which may be flat where x is not, or the other way round.

    Args:
        x: the data.
        fn: p(x|z), with N first in its shape.
        place: who made it, for the message.

    Raises:
        UserError: a draw has another number of entries than a datum.
    """
    shape = [*fn.batch_shape, *fn.event_shape]
    own = list(x.shape[1:])
    if shape[len(shape) - len(own) :] == own and len(shape) > len(own):
        return x
    if math.prod(shape[1:]) != math.prod(own):
        raise UserError(
            f"{place}: a draw of its p(x|z) has shape {tuple(shape)}, the data have {tuple(x.shape)}; one row of each, in this "
            "order, and as many entries per row"
        )
    return x.reshape(-1, *shape[1:])


def rows_of(x: Tensor, *context: Any) -> int:
    """Return N, the number of rows of the first argument."""
    return len(x)
