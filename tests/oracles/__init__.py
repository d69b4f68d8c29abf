"""Independent oracles: every algorithm in float64 loops over named tensors, straight from its equations.

No flat vector, no engine, no optimizer of the package. Only what must coincide is shared: which clients, which samples
and which blocks a round draws. A family has its loops and its cases in a module here.
"""

from . import adaptive, averaging, baselines, blocks, fedpac, private, sam
from .comparison import Case

FAMILIES = (averaging, adaptive, baselines, blocks, fedpac, private, sam)
CASES: dict[str, Case] = {name: case for family in FAMILIES for name, case in family.CASES.items()}
