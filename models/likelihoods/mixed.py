"""A table with columns of several kinds, each with its own likelihood."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from elbowroom.errors import nearest
from elbowroom.models.columns import Column
from elbowroom.models.likelihoods.base import Likelihood
from elbowroom.models.likelihoods.missing import entrywise

BY_KIND: dict[str, str] = {
    "real": "gaussian",
    "positive": "log_normal",
    "proportion": "beta",
    "count": "negative_binomial",
    "binary": "bernoulli",
    "ordinal": "ordinal",
    "categorical": "categorical",
}

ONE_COLUMN: dict[str, str] = {
    "bernoulli": "binary:Bernoulli",
    "beta": "continuous:Beta",
    "beta_binomial": "counts:BetaBinomial",
    "binomial": "counts:Binomial",
    "categorical": "categorical:Categorical",
    "continuous_bernoulli": "binary:ContinuousBernoulli",
    "discretized_logistic": "categorical:DiscretizedLogistic",
    "gamma": "continuous:Gamma",
    "gaussian": "continuous:Gaussian",
    "laplace": "continuous:Laplace",
    "log_normal": "continuous:LogNormal",
    "negative_binomial": "counts:NegativeBinomial",
    "ordinal": "categorical:Ordinal",
    "poisson": "counts:Poisson",
    "student_t": "continuous:StudentT",
    "zero_inflated_negative_binomial": "counts:ZeroInflatedNegativeBinomial",
    "zero_inflated_poisson": "counts:ZeroInflatedPoisson",
    "zero_one_inflated_beta": "inflated:ZeroOneInflatedBeta",
}
"""name -> module and class of every likelihood that can be that of one column."""


class _RowSupport(constraints.Constraint):
    """Rows with each column in its own support."""

    event_dim = 1

    def __init__(self, parts: list[tuple[Tensor, Any]]) -> None:
        self.parts = parts
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return whether rows lie in the support, (...)."""
        return torch.stack([support.check(value[..., index]) for index, support in self.parts]).all(0)


class Columns(TorchDistribution):
    """A row with independent groups of columns; `parts` holds the columns of each group and their joint distribution."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, parts: list[tuple[Tensor, TorchDistribution]]) -> None:
        batch = broadcast_shape(*[p.batch_shape for _, p in parts])
        self.parts = [(index, p if p.batch_shape == batch else p.expand(batch)) for index, p in parts]
        order = torch.cat([index for index, _ in parts])
        self.back = order.argsort()
        super().__init__(batch, torch.Size([len(order)]), validate_args=False)

    @property
    def support(self) -> Any:
        """The support of every column."""
        if len(self.parts) == 1:
            return self.parts[0][1].support
        return _RowSupport([(index, p.support) for index, p in self.parts])

    def expand(self, batch_shape: Any, _instance: Any = None) -> Columns:
        """Return the distribution with another batch shape."""
        return Columns([(index, p.expand(torch.Size(batch_shape))) for index, p in self.parts])

    def log_prob_entries(self, x: Tensor) -> Tensor:
        """Return log p of each column, (..., D)."""
        return self._joined([entrywise(p, x[..., index]) for index, p in self.parts])

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the sum over the columns."""
        return self.log_prob_entries(x).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw rows."""
        return self._joined([p.sample(torch.Size(sample_shape)) for _, p in self.parts])

    @property
    def mean(self) -> Tensor:
        """Mean of each column; the mean code for columns of codes."""
        return self._joined([p.mean for _, p in self.parts])

    @property
    def variance(self) -> Tensor:
        """Variance of each column."""
        return self._joined([p.variance for _, p in self.parts])

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(torch.broadcast_tensors(*parts) if not parts[0].dim() else parts, -1)[..., self.back]


class Mixed(Likelihood):
    """One likelihood per column of a table, chosen by the kind of its values: log p(x|z) = sum_j log p_j(x_j|z).

    By default real columns are gaussian, positive ones log_normal, proportions beta, counts negative_binomial, binary
    ones bernoulli, ordered codes ordinal and unordered ones categorical (HI-VAE; Nazabal et al. 2020,
    https://arxiv.org/abs/1807.03653). Every column has its own learned scale, shape or dispersion. An exposure multiplies
    the means of counts. An encoder sees one-hot categories, logarithms of positive numbers and of 1 + counts, and ordered
    codes as numbers.

    Args:
        event_shape: shape of one datum, (number of columns,) (a fact).
        columns: what is known of the columns (a fact).
        override: name of a column -> name of the likelihood it takes instead.
    """

    takes_exposure: ClassVar[bool] = True

    def __init__(
        self, event_shape: tuple[int, ...], columns: tuple[Column, ...] | None, *, override: Mapping[str, str] = {}
    ) -> None:
        super().__init__(event_shape)
        if columns is None or len(event_shape) != 1 or len(columns) != event_shape[0]:
            raise ValueError("mixed: needs a table, one row of columns per datum; use another likelihood for arrays")
        self.names = [column.name for column in columns]
        for name, likelihood in override.items():
            if name not in self.names:
                raise ValueError(f"override: there is no column {name!r}{nearest(name, self.names)}")
            if likelihood not in ONE_COLUMN:
                raise ValueError(
                    f"override.{name}: no likelihood of one column is called {likelihood!r}{nearest(likelihood, ONE_COLUMN)}"
                )
            kind = columns[self.names.index(name)].kind
            if kind == "categorical" and likelihood != "categorical":
                raise ValueError(
                    f"override.{name}: {likelihood} is for numbers or codes with an order, and column {name!r} holds "
                    "categories without one; leave it out, or declare another kind in data.kinds"
                )
        groups: dict[tuple[str, int], list[int]] = {}
        for j, column in enumerate(columns):
            chosen = override.get(column.name, BY_KIND[column.kind])
            groups.setdefault((chosen, column.levels if _needs_levels(chosen) else 0), []).append(j)
        self.groups = list(groups.values())
        self.parts = nn.ModuleList(
            _one_column(name, len(index), levels, self.names[index[0]]) for (name, levels), index in groups.items()
        )
        self.param_dim = sum(part.param_dim for _, part in self._each())
        for i, index in enumerate(self.groups):
            self.register_buffer(f"index_{i}", torch.tensor(index), persistent=False)
        inside = [0.0] * len(columns)
        for index, part in self._each():
            for j in index:
                inside[j] = float(part.inside)
        self.inside = torch.tensor(inside)

    def _each(self) -> list[tuple[list[int], Likelihood]]:
        return list(zip(self.groups, self.parts, strict=True))  # type: ignore[arg-type]

    def forward(self, params: Tensor, exposure: Tensor | None = None) -> TorchDistribution:
        """Return the joint distribution of the columns."""
        pieces = params.split([part.param_dim for _, part in self._each()], -1)
        parts = []
        for i, ((_, part), piece) in enumerate(zip(self._each(), pieces, strict=True)):
            p = part(piece, exposure) if exposure is not None and part.takes_exposure else part(piece)
            parts.append((self.get_buffer(f"index_{i}"), p))
        return Columns(parts)

    def problem(self, x: Tensor) -> str | None:
        """Refuse a column with values outside its own support."""
        which = {j: part for index, part in self._each() for j in index}
        for j, name in enumerate(self.names):
            problem = which[j].problem(x[:, j])
            if problem is not None:
                return f"column {name!r}: {problem.replace('model.likelihood = ', f'model.likelihood.override.{name} = ')}"
        return None

    def adapt(self, x: Tensor, exposure: Tensor | None = None) -> None:
        """Set the constants of every column's likelihood."""
        for index, part in self._each():
            if exposure is not None and part.takes_exposure:
                part.adapt(x[:, index], exposure)  # type: ignore[call-arg]
            else:
                part.adapt(x[:, index])

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Total width of the encoder's view of the columns."""
        return (sum(part.feature_shape[0] for _, part in self._each()),)

    def features(self, x: Tensor) -> Tensor:
        """Return the encoder's view, one group of columns after the other."""
        return torch.cat([part.features(x[:, index]) for index, part in self._each()], -1)

    def centre(self, p: TorchDistribution) -> Tensor:
        """Return the mean of each column, the most likely category, the median of ordered codes."""
        centres = [part.centre(q) for (_, part), (_, q) in zip(self._each(), p.parts, strict=True)]
        return torch.cat(centres, -1)[..., p.back]


def _class(name: str) -> type[Likelihood]:
    module, _, attribute = ONE_COLUMN[name].partition(":")
    found = getattr(importlib.import_module(f"elbowroom.models.likelihoods.{module}"), attribute)
    return found


def _needs_levels(name: str) -> bool:
    return "levels" in inspect.signature(_class(name)).parameters


def _one_column(name: str, n: int, levels: int, first: str) -> Likelihood:
    """Build the likelihood of a group of n columns; `first` is the name of its first column."""
    if name == "gaussian":
        from elbowroom.models.likelihoods.continuous import Gaussian

        return Gaussian((n,), scale="per_dimension")
    if not _needs_levels(name):
        return _class(name)((n,))
    if not levels:
        raise ValueError(f"override.{first}: {name} needs a column of codes; declare the column ordinal or categorical")
    return _class(name)((n,), levels)  # type: ignore[call-arg]
