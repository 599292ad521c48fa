"""Encoders and decoders; `base` says what a network is."""

from elbowroom.models.networks.mlp import Network

__all__ = ["Network"]
