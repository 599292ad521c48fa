"""The start of a fit at the weights of another one; the model may be frozen so that only the guide is trained.

A frozen model p(x, z) = p(z) p(x|z) gives unlimited data. A share s of each mini-batch may be drawn from it; the guide then
maximises, for fixed p,

    (1 - s) E_data ELBO(x) + s E_p(x) ELBO(x),      log p(x) - ELBO(x) = KL(q(z|x) || p(z|x))

Both parts are largest at q(z|x) = p(z|x) for every s. An encoder can overfit the few data of the first part, but not the
unlimited draws of the second. (The sleep phase of wake-sleep draws the same data for another divergence, Hinton et al. 1995,
https://doi.org/10.1126/science.7761831; encoders that overfit: Cremer, Li and Duvenaud 2018, https://arxiv.org/abs/1801.03558;
training them on the model's own data: Zhang, Hayes and Barber 2022, https://arxiv.org/abs/2205.11640.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elbowroom.errors import SpecError
from elbowroom.models.vae import VAE, Batch

MODEL = ("prior", "likelihood", "decoder")
GUIDE = "posterior."


@dataclass(frozen=True, eq=False)
class Start:
    """The weights that a fit starts at.

    Attributes:
        weights: the state of the VAE that they come from, without its guide if that guide is of another kind.
        sha256: of those weights, names and values.
        freeze: leave the model as it is, its data-dependent constants too, and train the guide alone.
        simulated: share of each mini-batch that is drawn from the frozen model.
    """

    weights: Mapping[str, Tensor]
    sha256: str
    freeze: bool = True
    simulated: float = 0.0

    def apply(self, vae: VAE) -> None:
        """Load the weights into a VAE that is adapted to its data: all of the model, and the guide only if all its weights fit.

        Raises:
            SpecError: the model is another one.
        """
        own = vae.state_dict()
        model = {name: value for name, value in self.weights.items() if not name.startswith(GUIDE)}
        if set(model) != {name for name in own if not name.startswith(GUIDE)} or not _fits(model, own):
            raise SpecError("fit.start.run: the weights there are those of another model")
        guide = {name: value for name, value in self.weights.items() if name.startswith(GUIDE)}
        vae.load_state_dict({**own, **model, **(guide if _fits(guide, own) else {})})

    @contextmanager
    def frozen(self, vae: VAE) -> Iterator[None]:
        """With `freeze`, exclude the model from training: no gradients, and its networks in eval mode."""
        parts = [getattr(vae, name) for name in MODEL] if self.freeze else []
        trained = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
        for part in parts:
            part.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def mixed(self, vae: VAE, batch: Batch) -> tuple[Batch, Tensor]:
        """Return a mini-batch with its first rows drawn from the model, and a mask of the drawn rows, (B,).

        A drawn row keeps the covariates, the exposure and the missing values (NaN) of the row that it replaces. A draw that the
        likelihood would refuse, because it was rounded to the edge of the support, is not used.
        """
        x = batch["x"]
        drawn_rows = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        count = int(self.simulated * len(x) + 0.5)
        if not count:
            return batch, drawn_rows
        beside: dict[str, Any] = {name: value[:count] for name, value in batch.items() if name != "x"}
        with torch.no_grad():
            drawn = vae.model(**beside, n=count).to(x.dtype)
            good = drawn.flatten(1).isfinite().all(1)
            if not bool(good.all()) or vae.likelihood.problem(drawn) is not None:
                rows = [bool(ok) and vae.likelihood.problem(row[None]) is None for ok, row in zip(good, drawn, strict=True)]
                good = torch.tensor(rows, device=x.device)
            drawn_rows[:count] = good
            holes = drawn.masked_fill(x[:count].isnan(), torch.nan)
            keep = good.reshape(-1, *[1] * (x.ndim - 1))
            return {**batch, "x": torch.cat([torch.where(keep, holes, x[:count]), x[count:]])}, drawn_rows


def _fits(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return all(name in own and own[name].shape == value.shape for name, value in weights.items())
