"""Linear-time sequence models: one recurrence, many faces."""

from . import ops as ops
from . import state as state
from . import systems as systems
from .checkpoints import load as load
from .checkpoints import load_pretrained as load_pretrained
from .checkpoints import save as save
from .generate import generate as generate
from .mixers import H3 as H3
from .mixers import LRU as LRU
from .mixers import LSSL as LSSL
from .mixers import RGLRU as RGLRU
from .mixers import S4 as S4
from .mixers import S4D as S4D
from .mixers import S5 as S5
from .mixers import STU as STU
from .mixers import TNN as TNN
from .mixers import Attention as Attention
from .mixers import Hyena as Hyena
from .mixers import LiquidS4 as LiquidS4
from .mixers import LongConv as LongConv
from .mixers import Mamba as Mamba
from .mixers import Mamba2 as Mamba2
from .mixers import Mega as Mega
from .mixers import Megalodon as Megalodon
from .mixers import Mixer as Mixer
from .mixers import SGConv as SGConv
from .mixers import ShortConv as ShortConv
from .mixers import SpaceTime as SpaceTime
from .models import Classifier as Classifier
from .models import LanguageModel as LanguageModel
from .models import Stack as Stack
from .timeline import Timeline as Timeline

__version__ = "0.1.0"
