"""Synthetic tasks, each of which tells some families of models apart."""

from .tasks import Task as Task
from .tasks import autoregressive as autoregressive
from .tasks import copying as copying
from .tasks import delay as delay
from .tasks import lorenz as lorenz
from .tasks import stable_coefficients as stable_coefficients
