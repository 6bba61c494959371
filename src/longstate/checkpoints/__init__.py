"""Models in files."""

from .native import load as load
from .native import save as save
