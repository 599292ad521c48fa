"""Where a fit starts: at the weights of another one, whose model may be frozen so that the guide alone is trained.

A frozen model p(x, z) = p(z) p(x|z) is a source of data without end. A step may draw a share s of its mini-batch from it, so
that the guide maximises, for fixed p,

    (1 - s) E_data ELBO(x) + s E_p(x) ELBO(x),      log p(x) - ELBO(x) = KL(q(z|x) || p(z|x))

Both parts are largest at q(z|x) = p(z|x), whatever s; but no encoder can learn the draws of the second part by heart, as it can
the few data of the first. (Wake-sleep's sleep phase draws the same data for another divergence, Hinton et al. 1995,
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
        weights: the state of the VAE they come from; where its guide is another one, without that.
        sha256: of those weights, names and values.
        freeze: leave the model as it is, its data-dependent constants too, and train the guide alone.
        simulated: share of each mini-batch that is drawn from the frozen model.
    """

    weights: Mapping[str, Tensor]
    sha256: str
    freeze: bool = True
    simulated: float = 0.0

    def apply(self, vae: VAE) -> None:
        """Give a VAE that is adapted to its data these weights: those of the model all, those of the guide if all fit.

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
        """Take the model out of the training, with `freeze`: no gradients, and dropout and batch statistics as in use."""
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
        """Return a mini-batch whose first rows are drawn from the model in place of data, and which rows those are, (B,).

        A row that is drawn keeps the covariates, the exposure and the holes (NaN) of the one that it replaces. A draw that the
        likelihood itself would refuse, for it was rounded to the edge of its support, is not used.
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
