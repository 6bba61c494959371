"""The command line: ``longstate train``, ``generate``, ``info`` and ``doctor``."""

from .app import app as app
from .app import main as main
