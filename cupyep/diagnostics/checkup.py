"""The checkup of an epoch: a few training images settled longer than the run does, and a diagnosis of all numbers.

It costs about as much as one or two batches, draws no random numbers and leaves the training as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cupyep.batch import Batch, shared_out
from cupyep.diagnostics.contraction import contraction
from cupyep.diagnostics.pace import Pace, settled_with
from cupyep.diagnostics.probe import PhaseProbe, probe_settling
from cupyep.diagnostics.rules import Finding, Record, Setting, find, finite, probe_record
from cupyep.parallel import Communicator

PROBE_IMAGES = 32
DIGITS = 4


class Checkup:
    """Looks at a learner once an epoch: the images of `batch`, or a rank's share, are settled for a closer look.

    `trace` is `trace_of` the last look, for settling.json. With a `pace` the learner follows what is seen.
    """

    def __init__(self, learner: Any, batch: Batch, batch_size: int, pace: Pace | None = None):
        self.learner = learner
        self.batch = batch
        self.batch_size = batch_size
        self.pace = pace
        self.trace: dict[str, Any] = {}

    @property
    def ends(self) -> bool:
        """Whether the run is to end after what was seen last."""
        return self.pace is not None and self.pace.ends

    def start(self, ranks: Communicator | None = None) -> list[Finding]:
        """Look at the network before it is trained; return what is wrong with its phases.

        A pace takes its first steps from it.
        """
        setting = Setting.of(self.learner, self.batch_size)
        probes = probe_settling(self.learner, self.batch, ranks or Communicator())
        found = find(probe_record(probes, setting.tolerance), setting, probes)
        if self.pace is None:
            return found
        return self.pace.start(probes) + [finding for finding in found if finding.signature != "convergence"]

    def begin(self) -> None:
        """Let the learner follow what was seen last: an epoch begins."""
        if self.pace is not None:
            self.pace.begin()

    def look(self, record: Record, records: Sequence[Record], ranks: Communicator | None = None) -> Record:
        """Return what is to be added to the `record` of an epoch, given the `records` of the epochs before.

        That is how the epoch settled (``free_steps``, ``nudged_steps``, ``feedback``), `probe_record`, and
        ``findings``, a list of ``{"signature", "layers", "message"}``.
        """
        setting = Setting.of(self.learner, self.batch_size)  # a pace changes it
        ranks = ranks or Communicator()
        probes = probe_settling(self.learner, self.batch, ranks)
        self.trace = trace_of(probes, setting, shared_out(self.batch)[1], record["epoch"])
        seen = settled_with(self.learner) | probe_record(probes, setting.tolerance)
        findings = find(record | seen, setting, probes, records)
        if self.pace is not None:
            findings += self.pace.follow(probes, ranks)
        # Lists, as a file gives them back.
        return {**seen, "findings": [finding._asdict() | {"layers": list(finding.layers)} for finding in findings]}


def trace_of(probes: Mapping[str, PhaseProbe], setting: Setting, images: int, epoch: int) -> dict[str, Any]:
    """Return how the phases settled, as settling.json holds it.

    ``epoch``, ``images``, ``schedule`` and ``tolerance``; where the network is no chain ``nodes``, their names. Of each
    phase, by its name, ``steps``, the learner's own, ``contraction``, and ``residual``: for every step, also those
    beyond, a number a layer (None where it is not finite).
    """
    phases = {
        phase: {
            "steps": probe.steps,
            "contraction": finite(contraction(probe)),
            "residual": [[finite(float(f"{r:.{DIGITS}g}")) for r in row] for row in probe.residual],
        }
        for phase, probe in probes.items()
    }
    return {
        "epoch": epoch,
        "images": images,
        "schedule": setting.schedule,
        "tolerance": setting.tolerance,
        **({"nodes": list(setting.names)} if setting.names else {}),
        **phases,
    }


def check_trace(trace: Any) -> dict[str, Any]:
    """Return `trace` if it is as `trace_of` makes it, else raise `ValueError`."""
    for key, kind in (("epoch", int), ("images", int), ("schedule", str)):
        if not isinstance(trace[key], kind):
            raise ValueError(f"'{key}' is {trace[key]!r}")
    tolerance = trace["tolerance"]
    if tolerance is not None and not isinstance(tolerance, float):
        raise ValueError(f"'tolerance' is {tolerance!r}")
    for phase in ("free", "nudged"):
        if phase in trace:
            residual = np.array(trace[phase]["residual"], float)
            if residual.ndim != 2 or not 1 <= int(trace[phase]["steps"]) <= len(residual):
                raise ValueError(f"the residuals of the {phase} phase are not a table of steps and layers")
            names = trace.get("nodes", ["?"] * residual.shape[1])
            if not (
                isinstance(names, list) and len(names) == residual.shape[1] and all(isinstance(n, str) for n in names)
            ):
                raise ValueError(f"'nodes' is {names!r}")
    return trace
