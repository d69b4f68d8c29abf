"""The table of algorithms, one paper a file."""

from ..contract import Algorithm
from .fedadamw import FedAdamW
from .fedavg import FedAvg
from .fedbcgd import FedBcgd
from .fedmuon import FedMuon
from .fedpac import FedPac
from .local_x import LocalAdamW, LocalMuon, LocalShampoo, LocalSoap, LocalSophia
from .scaffold import Scaffold

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "scaffold": Scaffold,
    "local_adamw": LocalAdamW,
    "local_muon": LocalMuon,
    "local_soap": LocalSoap,
    "local_sophia": LocalSophia,
    "local_shampoo": LocalShampoo,
    "fedadamw": FedAdamW,
    "fedmuon": FedMuon,
    "fedbcgd": FedBcgd,
    "fedpac": FedPac,
}
