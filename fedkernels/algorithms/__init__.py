"""The table of algorithms, one paper a file."""

from ..contract import Algorithm
from .fedadamw import FedAdamW
from .fedavg import FedAvg
from .fedbcgd import FedBcgd
from .fedbcgd_plus import FedBcgdPlus
from .fedgamma import FedGamma
from .fedlesam import FedLesam
from .fedmuon import FedMuon
from .fednsam import FedNsam
from .fedsam import FedSam, MoFedSam
from .fedsmoo import FedSmoo
from .local_adamw import LocalAdamW
from .local_muon import LocalMuon
from .scaffold import Scaffold

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "scaffold": Scaffold,
    "local_adamw": LocalAdamW,
    "local_muon": LocalMuon,
    "fedadamw": FedAdamW,
    "fedmuon": FedMuon,
    "fedbcgd": FedBcgd,
    "fednsam": FedNsam,
    "fedsam": FedSam,
    "mofedsam": MoFedSam,
    "fedgamma": FedGamma,
    "fedlesam": FedLesam,
    "fedsmoo": FedSmoo,
    "fedbcgd_plus": FedBcgdPlus,
}
