"""Models: stacks of mixers with a task at either end."""

from .classifier import Classifier as Classifier
from .language import LanguageModel as LanguageModel
from .stack import Stack as Stack
