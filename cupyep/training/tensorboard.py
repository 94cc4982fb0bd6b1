"""The records of a run as TensorBoard's event files, through tensorboardX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cupyep.errors import ConfigurationError

FOLDER = "tensorboard"
LEFT_OUT = ("epoch", "findings", "nodes")
SETTINGS = ("learning_rate", "kappa")  # lists of these are no values of nodes
SPLITS = ("train", "validation", "test")


def writer_class() -> Any:
    """Return tensorboardX's writer; `ConfigurationError`, with the command that installs it, if it is missing."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        remedy = 'pip install "cupyep[tensorboard]"'
        raise ConfigurationError(f"--tensorboard needs tensorboardX ({error}): {remedy}") from error
    return SummaryWriter


class EventLog:
    """Writes the records of epochs as scalars, one a layer where a record holds a list.

    Every log is a file of its own in `folder`, made if missing, that holds the whole run, with the `records` of the
    epochs that are done: what older files say is void.
    """

    def __init__(self, folder: Path, records: Sequence[dict[str, Any]] = ()):
        self._writer = writer_class()(logdir=str(folder), purge_step=1)
        for record in records:
            self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Write the record of an epoch, and see that it is in the file."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by TensorBoard's names.

    Losses and accuracies of all splits share a chart (``loss/train``); so do the layers of a list (``dead/2``, by its
    name where the network is no chain; the norm of the readout's gradient is ``gradient_norm/readout``).
    """
    depth = len(record["activity"])
    found: dict[str, float] = {}
    for key, value in record.items():
        if key in LEFT_OUT or value is None:
            continue
        if isinstance(value, list):
            whose = [str(n + 1) for n in range(len(value))]
            if key not in SETTINGS:
                whose[:depth] = record.get("nodes") or whose[:depth]
            if key == "gradient_norm" and len(value) > depth:
                whose[depth] = "readout"
            found |= {f"{key}/{name}": float(number) for name, number in zip(whose, value, strict=True)}
            continue
        split, _, kind = key.partition("_")
        found[f"{kind}/{split}" if split in SPLITS else key] = float(value)
    return found
