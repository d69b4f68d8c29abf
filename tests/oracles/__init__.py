"""Independent oracles: every algorithm in float64 loops over named tensors, straight from its equations.

No flat vector, no engine, no optimizer of the package. Only what must coincide is shared: which clients, which samples
and which blocks a round draws. A family has its loops and its cases in a module here.
"""

from . import adaptive, averaging, fedpac
from .comparison import Case

CASES: dict[str, Case] = averaging.CASES | adaptive.CASES | fedpac.CASES
