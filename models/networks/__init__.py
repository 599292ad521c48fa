"""Encoders and decoders; `base` says what a network is."""

from elbowroom.models.networks.base import Network

__all__ = ["Network"]
