"""Mixers: modules that map a sequence to a sequence, from a state to a state."""

from ._base import Mixer as Mixer
from .attention import Attention as Attention
from .h3 import H3 as H3
from .hyena import Hyena as Hyena
from .liquid_s4 import LiquidS4 as LiquidS4
from .long_conv import LongConv as LongConv
from .lru import LRU as LRU
from .lssl import LSSL as LSSL
from .mamba import Mamba as Mamba
from .mamba2 import Mamba2 as Mamba2
from .mega import Mega as Mega
from .megalodon import Megalodon as Megalodon
from .rglru import RGLRU as RGLRU
from .s4 import S4 as S4
from .s4d import S4D as S4D
from .s5 import S5 as S5
from .sg_conv import SGConv as SGConv
from .short_conv import ShortConv as ShortConv
from .spacetime import SpaceTime as SpaceTime
from .spectral import STU as STU
from .tnn import TNN as TNN

# The names by which models call them.
MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "h3": H3,
    "hyena": Hyena,
    "liquid_s4": LiquidS4,
    "long_conv": LongConv,
    "lru": LRU,
    "lssl": LSSL,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mega": Mega,
    "megalodon": Megalodon,
    "rglru": RGLRU,
    "s4": S4,
    "s4d": S4D,
    "s5": S5,
    "sg_conv": SGConv,
    "short_conv": ShortConv,
    "spacetime": SpaceTime,
    "stu": STU,
    "tnn": TNN,
}
