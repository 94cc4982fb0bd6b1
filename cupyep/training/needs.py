"""What options of `TrainConfig` need to have an effect: the words of the refusal, and a test of all values by name.

Numbers that make another option idle (kappa 0, momentum 0) are points of a sweep, and no condition.
"""

from __future__ import annotations

from cupyep.data.sources import SOURCES

MIRRORED = tuple(name for name, source in SOURCES.items() if source.flip)
NEEDS = {
    "mirrored": (f"--dataset {', '.join(MIRRORED[:-1])} or {MIRRORED[-1]}", lambda c: c["dataset"] in MIRRORED),
    "readout": ("--loss cross_entropy", lambda c: c["loss"] == "cross_entropy"),
    "ep": ("--algorithm ep", lambda c: c["algorithm"] == "ep"),
    "settling": ("--algorithm ep or bptt", lambda c: c["algorithm"] != "bp"),
    "feedback": ("--algorithm ep or bptt, or no --gain", lambda c: c["algorithm"] != "bp" or c["gain"] is None),
    "finite": ("--scheme centered, onesided or random", lambda c: c["scheme"] != "tangent"),
    "signal": ("--aug le or kd", lambda c: c["aug"] != "none"),
    "kd": ("--aug kd", lambda c: c["aug"] == "kd"),
    "maps": ("--no-teacher-features", lambda c: c["aug"] != "kd" or not c["teacher_features"]),
    "softmax": ("--signal-loss cross_entropy", lambda c: c["signal_loss"] == "cross_entropy"),
    "own teacher": ("no --teacher", lambda c: c["teacher"] is None),
    "sgd": ("--optimizer sgd", lambda c: c["optimizer"] == "sgd"),
}
