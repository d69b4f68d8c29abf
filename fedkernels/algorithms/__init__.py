"""The table of algorithms, one paper a file."""

from ..contract import Algorithm
from .dp_fedadamw import DpFedAdamW
from .dp_fedavg import DpFedAvg
from .dp_fedpgn import DpFedPgn
from .dp_fedsam import DpFedSam
from .fedacg import FedAcg
from .fedadamw import FedAdamW
from .fedavg import FedAvg, FedAvgM, FedProx
from .fedbcgd import FedBcgd
from .fedbcgd_plus import FedBcgdPlus
from .fedcm import FedCm
from .feddyn import FedDyn
from .fedgamma import FedGamma
from .fedlada import FedLada
from .fedlesam import FedLesam
from .fedmuon import FedMuon
from .fednsam import FedNsam
from .fedopt import FedAdagrad, FedAdam, FedYogi
from .fedpac import FedPac
from .fedsam import FedSam, MoFedSam
from .fedsmoo import FedSmoo
from .local_x import LocalAdamW, LocalMuon, LocalShampoo, LocalSoap, LocalSophia
from .scaffold import Scaffold

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "fedcm": FedCm,
    "fedacg": FedAcg,
    "feddyn": FedDyn,
    "fedlada": FedLada,
    "scaffold": Scaffold,
    "local_adamw": LocalAdamW,
    "local_muon": LocalMuon,
    "local_soap": LocalSoap,
    "local_sophia": LocalSophia,
    "local_shampoo": LocalShampoo,
    "fedadamw": FedAdamW,
    "fedmuon": FedMuon,
    "fedbcgd": FedBcgd,
    "fedbcgd_plus": FedBcgdPlus,
    "fednsam": FedNsam,
    "fedsam": FedSam,
    "mofedsam": MoFedSam,
    "fedgamma": FedGamma,
    "fedlesam": FedLesam,
    "fedsmoo": FedSmoo,
    "dp_fedavg": DpFedAvg,
    "dp_fedsam": DpFedSam,
    "dp_fedadamw": DpFedAdamW,
    "dp_fedpgn": DpFedPgn,
    "fedpac": FedPac,
}
