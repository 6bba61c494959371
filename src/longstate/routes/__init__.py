"""Routes: mixers made of mixers."""

from ..mixers import Mixer
from .bidirectional import Bidirectional as Bidirectional
from .hierarchical import HiSS as HiSS

# The names by which models call them.
ROUTES: dict[str, type[Mixer]] = {"bidirectional": Bidirectional, "hiss": HiSS}
