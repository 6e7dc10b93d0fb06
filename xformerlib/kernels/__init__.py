"""How attention is computed: the kernels, each checked against ``reference``, and the plan that picks among them."""

from ._plan import (
    KERNELS as KERNELS,
    Plan as Plan,
    choose as choose,
    kernel_in_use as kernel_in_use,
    strict as strict,
    using as using,
)
from ._problem import Problem as Problem
from ._scores import Scores as Scores
