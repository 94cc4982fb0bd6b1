"""What stays on the disk and is read back: sealed HDF5, the file of a network, the checkpoint of a training."""

from cupyep.persistence.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]
