"""Local optimizers: steps of flat parameters `[C, d]` along directions made of flat gradients `[C, d]`."""

from .adamw import AdamW
from .muon import Muon
from .sgd import Sgd
from .shampoo import Shampoo
from .soap import Soap
from .sophia import Sophia

OPTIMIZERS = {"sgd": Sgd, "adamw": AdamW, "muon": Muon, "soap": Soap, "sophia": Sophia, "shampoo": Shampoo}

__all__ = ["OPTIMIZERS", "AdamW", "Muon", "Sgd", "Shampoo", "Soap", "Sophia"]
