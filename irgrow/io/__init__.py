"""Files: networks and checkpoints, without pickle, hashed, replaced as a whole."""

from irgrow.io.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from irgrow.io.network import load, read_extra, save

__all__ = ["Checkpoint", "load", "load_checkpoint", "read_extra", "save", "save_checkpoint"]
