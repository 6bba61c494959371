"""Models in files."""

from .native import load as load
from .published import load_pretrained as load_pretrained
from .published import save as save
