"""What an option is: a field of `TrainConfig` with its group, kind, help line, rule, and what it needs.

What an option needs to have an effect is a condition on the values of all. Numbers that make another option idle
(kappa 0, momentum 0) are points of a sweep, and no condition.
"""

from __future__ import annotations

import math
import operator
import re
import shlex
from collections.abc import Mapping
from dataclasses import Field, field
from typing import Any

import numpy as np

from cupyep.data.sources import SOURCES, is_own
from cupyep.errors import LARGEST, ConfigurationError, choose, is_integer, is_number, printable, require, shown

KIND_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a number or a list of numbers",
}
#: Rules for numbers: key in an option's table entry -> words of the message, comparison.
RULES = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}
MIRRORED = tuple(name for name, source in SOURCES.items() if source.flip)
REGISTERED = ("arch", "activation", "aug")  # options whose values a plugin may add to
#: Conditions: name -> the words of the refusal, and a test of all values by name.
NEEDS = {
    "mirrored": (
        f"--dataset {', '.join(MIRRORED)} or one of your own",
        lambda c: c["dataset"] in MIRRORED or is_own(c["dataset"]),
    ),
    "own data": ("--dataset file:PATH or folder:PATH", lambda c: is_own(c["dataset"])),
    "sizes": ("a named data set or --dataset folder:PATH", lambda c: not c["dataset"].startswith("file:")),
    "readout": ("--loss cross_entropy", lambda c: c["loss"] == "cross_entropy"),
    "ep": ("--algorithm ep", lambda c: c["algorithm"] == "ep"),
    "settling": ("--algorithm ep or bptt", lambda c: c["algorithm"] != "bp"),
    "feedback": (
        "--algorithm ep or bptt, or no --gain and no --init-from",
        lambda c: c["algorithm"] != "bp" or (c["gain"], c["init_from"]) == (None, None),
    ),
    "auto": ("--free-steps auto or --nudged-steps auto", lambda c: "auto" in (c["free_steps"], c["nudged_steps"])),
    "drawn": ("no --init-from", lambda c: c["init_from"] is None),
    "finite": ("--scheme centered, onesided or random", lambda c: c["scheme"] != "tangent"),
    "signal": ("--aug le or kd", lambda c: c["aug"] != "none"),
    "mapped": ("--aug le or kd", lambda c: c["aug"] in ("le", "kd")),
    "kd": ("--aug kd", lambda c: c["aug"] == "kd"),
    "maps": ("--no-teacher-features", lambda c: c["aug"] != "kd" or not c["teacher_features"]),
    "softmax": ("--signal-loss cross_entropy", lambda c: c["signal_loss"] == "cross_entropy"),
    "own teacher": ("no --teacher", lambda c: c["teacher"] is None),
    "sgd": ("--optimizer sgd", lambda c: c["optimizer"] == "sgd"),
}


def option(group: str, default: Any, kind: type, text: str, **rule: Any) -> Any:
    """Return a dataclass field that is one option.

    Parameters
    ----------
    group, text : str
        Heading and line in ``--help-all``.
    default : object
        None where the option may be left out.
    kind : {int, float, str, bool, list}
        ``list`` is one number, or several (one a layer).
    **rule
        `choices` (names), `low` (at least), `above`, `high` (at most), `below`; for lists they hold for every number;
        `word`, which may stand for the number in a training, and `word_text`, what the line says of it; `check` (of a
        text, a function of value and name that raises; its `choices` are suggestions then); `needs` (names of
        `NEEDS`), without which the option has no effect; `machine` (True) of what says nothing on another machine.
    """
    return field(default=default, metadata={"group": group, "kind": kind, "text": text, **rule})


def missing(spec: Field, values: Mapping[str, Any]) -> list[str]:
    """Return what the option `spec` lacks among the `values` of all to have an effect, in words."""
    needs = [NEEDS[need] for need in spec.metadata.get("needs", ())]
    return [words for words, holds in needs if not holds(values)]


def checked(spec: Field, value: Any, name: str, plugin: Any = None) -> Any:
    """Return `value` in the kind of the option `spec`, or raise ConfigurationError with its `name`, rule and value.

    Numbers and booleans are Python's or NumPy's, and returned as Python's, which TOML and JSON can write.
    `plugin` is what stands beside it as the option of that name: the message says so of a text that it may know.
    """
    try:
        return _checked(spec, value, name)
    except ConfigurationError:
        if spec.name not in REGISTERED or not isinstance(value, str) or not isinstance(plugin, str):
            raise
        told = f"{name} '{value}' is of a plugin, which is code; if you trust it, give --plugin {shlex.quote(plugin)}"
        raise ConfigurationError(printable(told)) from None


def _checked(spec: Field, value: Any, name: str) -> Any:
    kind = spec.metadata["kind"]
    if value is None:
        require(spec.default is None, f"{name} must be {KIND_NAMES[kind]}")
        return None
    if isinstance(value, str) and value == spec.metadata.get("word"):
        return value
    if kind is list and isinstance(value, (list, tuple)):
        require(len(value) > 0, f"{name} must hold at least one number")
        numbers = [_number(spec, name, v, float) for v in value]
        return numbers[0] if len(numbers) == 1 else numbers
    if kind in (list, float, int):
        return _number(spec, name, value, float if kind is list else kind)
    value = bool(value) if isinstance(value, np.bool_) else value
    require(isinstance(value, kind), f"{name} must be {KIND_NAMES[kind]} (got {shown(value)})")
    if kind is str:
        require(not re.search("[\0\ud800-\udfff]", value), f"{name} must be a text of valid characters (got {value!r})")
    if "check" in spec.metadata:
        spec.metadata["check"](value, name)
    elif "choices" in spec.metadata:
        choose(name, value, spec.metadata["choices"])
    return value


def _number(spec: Field, name: str, value: Any, kind: type) -> Any:
    is_right = is_number(value) and math.isfinite(value)
    if kind is int:
        is_right = is_integer(value) and abs(value) <= LARGEST
    word = spec.metadata.get("word")
    rule = KIND_NAMES[spec.metadata["kind"]] + (f" or {word}" if word else "")
    require(is_right, f"{name} must be {rule} (got {shown(value)})")
    for key, (words, holds) in RULES.items():
        limit = spec.metadata.get(key)
        require(limit is None or holds(value, limit), f"{name} must be {words} {limit} (got {value})")
    return kind(value)
