"""Routes: mixers made of mixers."""

from .bidirectional import Bidirectional as Bidirectional
