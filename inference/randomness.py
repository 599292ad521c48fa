"""Scopes that contain changes to global state: random seeds, Pyro's switches, train and eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import nn
from torch.utils import _pytree as pytree


@contextmanager
def contained(seed: int, place: torch.device) -> Iterator[None]:
    """Seed torch inside; on exit restore its generators, Pyro's validation and Pyro's parameter store."""
    cuda = [place] if place.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        pyro.validation_enabled(False),
        pyro.get_param_store().scope(),
    ):
        # not torch.manual_seed: it would seed every GPU, also those in use by others
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(place):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every part of `module` into train or eval mode; on exit restore each part's mode."""
    before = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, was in before.items():
            part.training = was


@contextmanager
def undisturbed(tree: Any) -> Iterator[None]:
    """Restore torch's random generators on exit, on the CPU and on the GPUs that hold tensors of a tree."""
    devices = {t.device for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and t.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside, and restore their states on exit."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        # not torch.manual_seed: where there is no GPU it formats the stack three times, which takes a millisecond
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def validation_kept() -> Iterator[None]:
    """Restore the switch for distributions' own checks on exit; the first `torch.compile` of a process turns it off."""
    before = torch.distributions.Distribution._validate_args
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)
