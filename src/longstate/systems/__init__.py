"""Linear systems as plain float64 matrices: HiPPO measures and discretisation."""

from .discretization import bilinear as bilinear
from .discretization import zoh as zoh
from .hippo import DiagonalSystem as DiagonalSystem
from .hippo import diagonal_modes as diagonal_modes
from .hippo import legs as legs
from .hippo import legs_normal as legs_normal
