"""The shape legend, and the annotations written in it.

Letters, in the order in which axes appear:

    b     sequences of a batch                                    d      channels (``d_model`` or the inner width)
    t     steps (time)                                            n      states of a channel (``d_state``)
    s     steps of the past, when ``t`` is the present            k      taps of a short convolution, or key channels
    c     steps of a chunk                                        l      taps of a long convolution
    j     chunks of a sequence                                    h      heads
    g     groups of heads that share keys (or queries)            p      channels of a head (``head_dim``)
    v     entries of the vocabulary

``Float[Tensor, "b t d"]`` is jaxtyping's notation. Annotations are checked at run time under test only, by an import
hook of jaxtyping's; where jaxtyping (a development dependency) was not imported before, they are plain ``Tensor``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Inexact as Inexact
    from jaxtyping import Int as Int
    from jaxtyping import Shaped as Shaped
elif "jaxtyping" in sys.modules:  # not merely installed: nothing else of it is used, and its import takes 10 ms
    from jaxtyping import Bool, Float, Inexact, Int, Shaped
else:

    class _Plain:
        def __class_getitem__(cls, item: Any) -> Any:
            return item[0]

    Bool = Float = Inexact = Int = Shaped = _Plain

__all__ = ["Bool", "Float", "Inexact", "Int", "Shaped", "Tensor"]
