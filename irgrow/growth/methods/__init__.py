"""How: growth methods as values. `propose` is a pure function of statistics."""

from irgrow.growth.methods.base import Method
from irgrow.growth.methods.copies import Copies
from irgrow.growth.methods.gradmax import GradMax
from irgrow.growth.methods.north import North
from irgrow.growth.methods.random import Random
from irgrow.growth.methods.silent import Silent
from irgrow.growth.methods.tiny import Tiny
from irgrow.growth.methods.variance_transfer import VarianceTransfer
from irgrow.growth.methods.with_model import NeedsModel

__all__ = ["Copies", "GradMax", "Method", "NeedsModel", "North", "Random", "Silent", "Tiny", "VarianceTransfer"]
