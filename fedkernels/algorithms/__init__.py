"""The table of algorithms, one paper a file."""

from ..contract import Algorithm
from .dp_fedadamw import DpFedAdamW
from .dp_fedavg import DpFedAvg
from .dp_fedpgn import DpFedPgn
from .dp_fedsam import DpFedSam
from .fedadamw import FedAdamW
from .fedavg import FedAvg
from .fedbcgd import FedBcgd
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
    "dp_fedavg": DpFedAvg,
    "dp_fedsam": DpFedSam,
    "dp_fedadamw": DpFedAdamW,
    "dp_fedpgn": DpFedPgn,
}
