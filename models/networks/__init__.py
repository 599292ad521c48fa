"""Encoders and decoders; `base` defines the interface of a network."""

from elbowroom.models.networks.base import Network

__all__ = ["Network"]
