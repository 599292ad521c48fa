"""VAEs of other libraries, and those written by hand, as Pyro (model, guide) pairs that can be audited."""

from elbowroom.adapt.pair import Pair
from elbowroom.adapt.peers.pyroved import pyroved
from elbowroom.adapt.peers.pythae import pythae
from elbowroom.adapt.peers.scvi import scvi
from elbowroom.adapt.written import written as torch

__all__ = ["Pair", "pythae", "pyroved", "scvi", "torch"]
