"""Replacements for operations that, under `vmap`, would fix the number of rows as a constant of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class VmapRules(TorchFunctionMode):
    """Replaces these operations by equivalent ones while a function is traced; others stay as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        substitute = SUBSTITUTES.get(func)
        if substitute is not None:
            found = substitute(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return func(*args, **(kwargs or {}))


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Pad with zeros and add; parts without entries add nothing."""
    parts = [t for t in tensors if t.dim() > 1 or t.numel()]
    if not parts or any(not t.is_floating_point() for t in parts) or len({t.dim() for t in parts}) > 1:
        return NotImplemented
    place = dim if dim < 0 else dim - parts[0].dim()  # from the end, as padding counts
    widths = [t.shape[place] for t in parts]
    before, total = 0, sum(widths)
    whole: Any = 0.0
    for part, width in zip(parts, widths, strict=True):
        whole = whole + functional.pad(part, [0, 0] * (-place - 1) + [before, total - before - width])
        before += width
    return whole


def _gather(source: Tensor, dim: int, index: Tensor, **_: Any) -> Any:
    """Pick one entry of the last dimension by comparing positions."""
    if dim not in (-1, source.dim() - 1) or index.shape[-1] != 1:
        return NotImplemented
    places = torch.arange(source.shape[-1], device=source.device)
    return torch.where(index == places, source, 0.0).sum(-1, keepdim=True)


def _index_select(source: Tensor, dim: int, index: Tensor) -> Any:
    return source.movedim(dim, -1)[..., index].movedim(-1, dim)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    dims = list(range(-len(shape), 0))
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return _affine((x - mean) * torch.rsqrt(variance + eps), weight, bias)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Any:
    """Normalise by fixed moments; channels are in the second dimension."""
    if training or mean is None or variance is None:
        return NotImplemented
    shape = [-1, *[1] * (x.dim() - 2)]
    along = [None if t is None else t.reshape(shape) for t in (weight, bias)]
    return _affine((x - mean.reshape(shape)) * torch.rsqrt(variance.reshape(shape) + eps), *along)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _folded(convolution: Any) -> Any:
    """Return a convolution that treats the rows under `vmap` as further images of its batch."""
    functorch = torch._C._functorch

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        own = [t for t in (weight, bias) if t is not None and functorch.is_batchedtensor(t)]
        if own or x.dim() != weight.dim():  # each row has its own kernels, or an image without a batch
            return NotImplemented
        if not functorch.is_batchedtensor(x):
            return convolution(x, weight, bias, *args, **kwargs)
        rows = functorch.get_unwrapped(x).movedim(functorch.maybe_get_bdim(x), 0)
        out = run(rows.flatten(0, 1), weight, bias, *args, **kwargs).unflatten(0, rows.shape[:2])
        return functorch._add_batch_dim(out, 0, functorch.maybe_get_level(x))

    return run


CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")

SUBSTITUTES: dict[Any, Any] = {
    **{getattr(torch, name): _folded(getattr(torch, name)) for name in CONVOLUTIONS},
    torch.cat: _cat,
    torch.gather: _gather,
    torch.Tensor.gather: _gather,
    torch.index_select: _index_select,
    torch.Tensor.index_select: _index_select,
    torch.layer_norm: _layer_norm,
    torch.batch_norm: _batch_norm,
}
