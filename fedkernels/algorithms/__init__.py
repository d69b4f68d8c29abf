"""The table of algorithms, one paper a file."""

from ..contract import Algorithm
from .fedadamw import FedAdamW
from .fedavg import FedAvg
from .fedbcgd import FedBcgd
from .fedbcgd_plus import FedBcgdPlus
from .fedmuon import FedMuon
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
    "fedbcgd_plus": FedBcgdPlus,
}
