"""Convolutional networks for images: one class that reads an image as an encoder and makes one as a decoder.

Radford et al. 2016 (https://arxiv.org/abs/1511.06434): convolutions with stride 2 halve the image, transposed convolutions
double it, without pooling. Images may have any height and width: each halving rounds up, ceil(n / 2), and its mirror in the
decoder restores exactly the previous size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from elbowroom.models.networks.base import Network
from elbowroom.models.networks.mlp import ACTIVATIONS, Activation


class ImageEncoder(nn.Module):
    """Convolutions with stride 2 and odd kernels, then one affine layer: (..., C*H*W) -> (..., out_dim)."""

    def __init__(
        self, image: tuple[int, int, int], out_dim: int, channels: Sequence[int], kernel: int, activation: Activation
    ) -> None:
        super().__init__()
        self.image = image
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise([image[0], *channels]):
            layers += [nn.Conv2d(n_in, n_out, kernel, stride=2, padding=kernel // 2), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1] * math.prod(_halvings(image[1:], len(channels))[-1]), out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map flattened images (..., C*H*W) to (..., out_dim)."""
        lead = x.shape[:-1]
        y = self.layers(x.reshape(math.prod(lead), *self.image))
        return self.head(y.flatten(1)).reshape(*lead, self.head.out_features)


class ImageDecoder(nn.Module):
    """One affine layer, then transposed convolutions with stride 2 and odd kernels: (..., d) -> (..., C*H*W)."""

    def __init__(
        self, width: int, image: tuple[int, int, int], channels: Sequence[int], kernel: int, activation: Activation
    ) -> None:
        super().__init__()
        sizes = _halvings(image[1:], len(channels))[::-1]
        self.small = (channels[0], *sizes[0])
        self.start = nn.Linear(width, math.prod(self.small))
        layers: list[nn.Module] = []
        for (n_in, n_out), (small, large) in zip(
            itertools.pairwise([*channels, image[0]]), itertools.pairwise(sizes), strict=True
        ):
            # n pixels become 2 n - 1, or 2 n with one more pixel at the end, which reverses ceil(n / 2) for odd and even sizes
            more = (large[0] - (2 * small[0] - 1), large[1] - (2 * small[1] - 1))
            up = nn.ConvTranspose2d(n_in, n_out, kernel, stride=2, padding=kernel // 2, output_padding=more)
            layers += [ACTIVATIONS[activation](), up]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Map z (..., d) to flattened images (..., C*H*W)."""
        lead = z.shape[:-1]
        y = self.layers(self.start(z).reshape(math.prod(lead), *self.small))
        return y.reshape(*lead, math.prod(y.shape[1:]))


class Conv(Network):
    """A convolutional network for images (H, W) or (C, H, W) of any size.

    As an encoder it halves the image with each convolution and ends in an affine layer; marks of missing entries are further
    channels, and so is each covariate (the same number at every pixel). As a decoder it is the mirror image.

    Args:
        in_shape: shape of one input: an image for an encoder, (d,) for a decoder (a fact).
        out_dim: width of one output (a fact).
        out_shape: (k, H, W) or (k, C, H, W) for a decoder with k parameters per pixel (a fact).
        channels: channels after each convolution, from the image inwards; each one halves height and width.
        kernel: height and width of the kernels, an odd number.
        activation: the nonlinearity between the layers.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_dim: int,
        out_shape: tuple[int, ...],
        *,
        channels: Sequence[Annotated[int, Ge(1)]] = (32, 64),
        kernel: Annotated[int, Ge(3)] = 3,
        activation: Activation = "silu",
    ) -> None:
        if not channels or any(n < 1 for n in channels):
            raise ValueError(f"channels: at least one number of channels, each at least 1, is needed, got {list(channels)}")
        if kernel < 3 or kernel % 2 == 0:
            raise ValueError(f"kernel: must be odd and at least 3, so that it has a centre, got {kernel}; use 3 or 5")
        if len(in_shape) in (2, 3):
            body: nn.Module = ImageEncoder(_image(in_shape), out_dim, channels, kernel, activation)
        elif len(in_shape) == 1 and len(out_shape) in (3, 4):
            body = ImageDecoder(in_shape[0], _image(out_shape), channels[::-1], kernel, activation)
        else:
            what = f"reads {tuple(in_shape)}" if len(out_shape) == 1 else f"makes {tuple(out_shape[1:])}"
            raise ValueError(
                f"conv is for images, (H, W) or (C, H, W), and this network {what}: reshape the data to images, or use mlp"
            )
        super().__init__(in_shape, out_dim, body)

    @classmethod
    def joined_shape(cls, shape: tuple[int, ...], *, marks: bool, covariates: int) -> tuple[int, ...]:
        """Return (C (1 + marks) + covariates, H, W); an image alone keeps its shape."""
        if len(shape) not in (2, 3) or not (marks or covariates):  # `__init__` refuses other shapes
            return tuple(shape)
        return (math.prod(shape[:-2]) * (1 + marks) + covariates, *shape[-2:])

    def join(self, x: Tensor, seen: Tensor | None, covariates: Tensor | None) -> Tensor:
        """Stack image, marks and covariates along the channels: (N, C', H, W). Arguments as in `Network.join`."""
        if seen is None and covariates is None:
            return x
        n, size = len(x), x.shape[-2:]
        parts = [image.reshape(n, -1, *size) for image in (x, seen) if image is not None]
        if covariates is not None:
            parts.append(covariates[:, :, None, None].expand(-1, -1, *size))
        return torch.cat(parts, 1)


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (C, H, W) for (..., H, W)."""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _halvings(size: Sequence[int], times: int) -> list[tuple[int, ...]]:
    """Return a height and width, and their sizes after each halving."""
    sizes = [tuple(size)]
    for _ in range(times):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    return sizes
