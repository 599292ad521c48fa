"""Networks: deterministic maps from a tensor of known shape to a vector of known width, without distributions.

An encoder may read more than x: marks of missing entries (1 observed, 0 missing) and covariates. Each network joins them to x
in its own way: side by side in a vector (here), as further channels of an image, as features of every step of a sequence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from elbowroom.models.networks.base import Network

Activation = Literal["silu", "tanh", "softplus", "relu"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "relu": nn.ReLU,
}


class Linear(Network):
    """One affine layer: y = A x + b."""

    def __init__(self, in_shape: tuple[int, ...], out_dim: int) -> None:
        super().__init__(in_shape, out_dim, nn.Linear(math.prod(in_shape), out_dim))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last dimension of (..., width), over all leading dimensions together.

    Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167. A batch of one has no spread: it is normalised by the running
    statistics, which it does not change.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., width) by its batch in training, by the running statistics in evaluation."""
        flat = x.reshape(-1, x.shape[-1])
        if self.training and len(flat) == 1:
            return batch_norm(flat, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps).reshape(x.shape)
        return super().forward(flat).reshape(x.shape)


class Residual(nn.Sequential):
    """y = x + f(x), where f applies the layers in order (He et al. 2016, https://arxiv.org/abs/1512.03385)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x to a tensor of the same shape."""
        return x + super().forward(x)


Norm = Literal["none", "layer", "batch"]

NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "batch": BatchNorm}


class MLP(Network):
    """A multilayer perceptron.

    A hidden layer is y = dropout(activation(norm(A x + b))), where norm and dropout are asked for.

    Smooth activations (silu, tanh, softplus) let the grid reference converge exponentially; with relu the posterior
    density has kinks and the grid converges only algebraically.

    Args:
        in_shape: shape of one input (a fact).
        out_dim: width of one output (a fact).
        hidden: widths of the hidden layers.
        activation: the nonlinearity after each hidden layer.
        residual: add its input to the output of each hidden layer that is as wide as the hidden layer before it.
        norm: normalisation before each activation: `none`, `layer` (each datum by itself) or `batch` (over the mini-batch in
            training, by running averages afterwards).
        dropout: probability with which each hidden unit is set to zero in training; 0 switches it off.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_dim: int,
        *,
        hidden: Sequence[Annotated[int, Ge(1)]] = (128, 128),
        activation: Activation = "silu",
        residual: bool = False,
        norm: Norm = "none",
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    ) -> None:
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden: every width must be at least 1, got {list(hidden)}")
        if not hidden and (norm != "none" or dropout):
            option = "norm" if norm != "none" else "dropout"
            raise ValueError(f"{option}: there is no hidden layer for it; give widths in hidden, or leave it out")
        if residual and not any(n_in == n_out for n_in, n_out in itertools.pairwise(hidden)):
            raise ValueError(
                f"residual: no hidden layer of {list(hidden)} is as wide as the one before it; "
                "give neighbours the same width, or leave it out"
            )
        widths = [math.prod(in_shape), *hidden]
        body: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            layers: list[nn.Module] = [nn.Linear(n_in, n_out)]
            if norm != "none":
                layers.append(NORMS[norm](n_out))
            layers.append(ACTIVATIONS[activation]())
            if dropout:
                layers.append(nn.Dropout(dropout))
            # an input with the width of the first hidden layer is not added, so that the layers do not depend on the data
            body += [Residual(*layers)] if residual and i and n_in == n_out else layers
        super().__init__(in_shape, out_dim, nn.Sequential(*body, nn.Linear(widths[-1], out_dim)))
