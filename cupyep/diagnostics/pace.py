"""Settling that looks after itself: after every epoch, how many iterations the next one settles, with what feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cupyep.batch import Batch
from cupyep.diagnostics.contraction import contraction, most_steps, steps_to_rest
from cupyep.diagnostics.probe import PhaseProbe, probe_settling
from cupyep.diagnostics.rules import Finding
from cupyep.errors import ConfigurationError, choose
from cupyep.parallel import Communicator

ON_UNSETTLED = ("warn", "lower", "stop")
MOST_LOWERINGS = 5  # after one epoch


class Pace:
    """Chooses the steps of a learner's phases, and looks after a network that stops to contract.

    Phases are probed on `batch`; `begin` sets the steps of the learner and the feedback of its network. The steps of
    the phases in `auto` ("free", "nudged") follow what is measured, from 1 to `most_steps`. When a phase does not
    contract, or needs more, that is said, and `on_unsettled` tells what else to do: "warn" nothing; "lower" halve the
    feedback, until the phases contract or `MOST_LOWERINGS` times; "stop" end the run, as `ends` says then.
    """

    def __init__(self, learner: Any, batch: Batch, auto: Sequence[str], on_unsettled: str = "warn"):
        self.learner, self.network, self.batch = learner, learner.network, batch
        self.auto = [choose("phase", phase, ("free", "nudged")) for phase in auto]
        self.on_unsettled = choose("on_unsettled", on_unsettled, ON_UNSETTLED)
        self.ends = False
        self.next = self.now()

    def now(self) -> dict[str, Any]:
        """Return ``free_steps``, ``nudged_steps`` (where there are such) and ``feedback`` of the learner."""
        return settled_with(self.learner)

    def start(self, probes: Mapping[str, PhaseProbe]) -> list[Finding]:
        """Take the first steps from probes of the network before it is trained; return what does not contract."""
        self.next, problem = self.now() | self._steps(probes), self._problem(probes)
        return [Finding("contraction", (), f"{problem}; lower --feedback or --gain")] if problem else []

    def begin(self) -> None:
        """Let the learner settle as the last look found best, from here on."""
        self._set(self.next)

    def _set(self, values: Mapping[str, Any]) -> None:
        self.network.feedback = values["feedback"]
        for name, value in values.items():
            if name != "feedback":
                setattr(self.learner, name, value)

    def follow(self, probes: Mapping[str, PhaseProbe], ranks: Communicator) -> list[Finding]:
        """Decide on the next epoch, given the probes of this one; return what does not contract."""
        now, problem = self.now(), self._problem(probes)
        try:
            if problem and self.on_unsettled == "lower":
                probes = self._lower(now["feedback"], probes, ranks)
            self.next = now | {"feedback": self.network.feedback} | self._steps(probes)
        finally:
            self._set(now)
        self.ends = bool(problem) and self.on_unsettled == "stop"
        if not problem:
            return []
        return [Finding("contraction", (), f"{problem}; {self._remedy(now, self.next, self._problem(probes))}")]

    def _lower(
        self, feedback: float, probes: Mapping[str, PhaseProbe], ranks: Communicator
    ) -> Mapping[str, PhaseProbe]:
        """Halve the feedback until the phases contract, as often as that may be; return how they settle then."""
        for halvings in range(1, MOST_LOWERINGS + 1):
            try:
                self.network.feedback = self.network.checked_feedback(feedback * 0.5**halvings)
            except ConfigurationError:  # weights of layers would be too large for the numbers
                break
            probes = probe_settling(self.learner, self.batch, ranks)
            if not self._problem(probes):
                break
        return probes

    def _steps(self, probes: Mapping[str, PhaseProbe]) -> dict[str, int]:
        """Return the steps that follow the probes; a phase that does not contract keeps its own."""
        wanted = {phase: steps_to_rest(probes[phase]) for phase in self.auto}
        most = most_steps(self.learner.schedule)
        return {f"{phase}_steps": min(steps, most) for phase, steps in wanted.items() if steps is not None}

    def _problem(self, probes: Mapping[str, PhaseProbe]) -> str:
        """Return which phase does not come to rest in the steps that there may be, and why; empty if all do."""
        most, unit = most_steps(self.learner.schedule), "sweep" if self.learner.schedule == "sweeps" else "step"
        for phase, probe in probes.items():
            steps, rho = steps_to_rest(probe), contraction(probe)
            if steps is None:
                return f"the {phase} phase does not contract: a {unit} multiplies what is left to go by {rho:.3g}"
            if steps > most:
                return (
                    f"the {phase} phase needs {steps} {unit}s to settle, more than the {most} that it is given: "
                    f"a {unit} multiplies what is left to go by {rho:.3g}"
                )
        return ""

    def _remedy(self, now: Mapping[str, Any], then: Mapping[str, Any], left: str) -> str:
        if self.on_unsettled == "stop":
            return "the run ends here (--on-unsettled stop); lower --feedback or --gain"
        if now["feedback"] == then["feedback"]:
            return "lower --feedback or --gain" + (
                "" if self.on_unsettled == "lower" else " (or use --on-unsettled lower)"
            )
        enough = f", which is not enough: {left}" if left else ""
        return f"the feedback goes from {now['feedback']:g} to {then['feedback']:g}{enough}"

    def state_dict(self) -> dict[str, Any]:
        """Return `now` and what is next, by names that begin with ``next_``."""
        return self.now() | {f"next_{name}": value for name, value in self.next.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`, or stay as made where it is empty."""
        if state:
            self._set({name: state[name] for name in self.next})
            self.next = {name: state[f"next_{name}"] for name in self.next}


def settled_with(learner: Any) -> dict[str, Any]:
    """Return the steps of the phases that a learner has, and the feedback; nothing of one without phases."""
    steps = {name: getattr(learner, name) for name in ("free_steps", "nudged_steps") if hasattr(learner, name)}
    return steps | {"feedback": learner.network.feedback} if steps else {}
