"""How: growth methods as values. `propose` is a pure function of statistics."""

from irgrow.growth.methods.base import Method
from irgrow.growth.methods.gradmax import GradMax
from irgrow.growth.methods.random import Random
from irgrow.growth.methods.tiny import Tiny

__all__ = ["GradMax", "Method", "Random", "Tiny"]
