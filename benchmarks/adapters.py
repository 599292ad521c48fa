"""`.venv-peers/bin/python -m benchmarks.adapters`: a trained model of each peer, audited; the table of docs/adapters.md.

What stands beside each figure is the peer's own: its loss, and its estimate of log p(x) where it has one. `make test-peers`
makes the environment.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def plots_of_pyroved() -> None:
    """Put an empty module in the place of a missing torchvision.

    pyroVED imports torchvision.utils.make_grid for its plots, and torchvision's wheel on PyPI does not load beside a CPU torch.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    package, utils = ModuleType("torchvision"), ModuleType("torchvision.utils")
    utils.make_grid = package.utils = utils  # type: ignore[attr-defined]
    sys.modules.update({"torchvision": package, "torchvision.utils": utils})
