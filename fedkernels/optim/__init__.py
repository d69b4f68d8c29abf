"""Local optimizers: transforms from flat gradients `[C, d]` to directions `[C, d]`."""

from .adamw import AdamW
from .muon import Muon
from .sgd import Sgd

OPTIMIZERS = {"sgd": Sgd, "adamw": AdamW, "muon": Muon}

__all__ = ["OPTIMIZERS", "AdamW", "Muon", "Sgd"]
