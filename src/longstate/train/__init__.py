"""Training a language model on text: ``train(Options(minutes=3))``."""

from .loop import train as train
from .options import Options as Options
