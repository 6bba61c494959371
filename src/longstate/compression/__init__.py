"""Models made smaller."""

from .quantization import quantize as quantize
