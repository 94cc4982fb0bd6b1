"""Does it settle, does the nudge reach every layer, is anything dead? A look at a learner, and rules that judge it."""

from cupyep.diagnostics.probe import PhaseProbe, probe_settling

__all__ = ["PhaseProbe", "probe_settling"]
