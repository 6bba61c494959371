"""Operators: one public function each, a readable reference, and fast backends that agree with it."""

from . import convolution as convolution
from ._register import backends as backends
from .cauchy import cauchy as cauchy
from .delta_rule import delta_rule as delta_rule
from .dplr_scan import dplr_scan as dplr_scan
from .linear import linear as linear
from .linear_attention import linear_attention as linear_attention
from .linear_attention import linear_attention_decay as linear_attention_decay
from .matrix_scan import matrix_scan as matrix_scan
from .norm import rms_norm as rms_norm
from .scan import scan as scan
from .scan import scan_decay as scan_decay
from .selective_scan import selective_scan as selective_scan
from .selective_scan import selective_scan_decay as selective_scan_decay
from .state_space import state_space as state_space
from .vandermonde import vandermonde as vandermonde
