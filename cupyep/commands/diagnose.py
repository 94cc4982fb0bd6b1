"""What ``cupyep diagnose`` does: one batch looked at closely, layer by layer, with the learner of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend import get_device
from cupyep.batch import Batch
from cupyep.diagnostics import PhaseProbe, probe_settling
from cupyep.diagnostics.checkup import trace_of
from cupyep.diagnostics.rules import (
    LIMITS,
    Finding,
    Record,
    Setting,
    find,
    probe_record,
    scaled_response,
    shares_of_last,
)
from cupyep.errors import CheckpointError, DivergenceError
from cupyep.files import expanded, write_json
from cupyep.learning.check import bptt_gradients, compare
from cupyep.learning.gradients import layer_of
from cupyep.persistence.checkpoint import Checkpoint, load_checkpoint, restore_parameters
from cupyep.training.build import build_dataset, build_learner, build_network, build_signals, first_images
from cupyep.training.config import TrainConfig, make_config, require_used
from cupyep.training.run_directory import CHECKPOINT_FILES, RunDirectory
from cupyep.training.snapshot import check_same_network, check_unchanged
from cupyep.training.statistics import LEVELS
from cupyep.training.teacher import KEPT, teacher_path
from cupyep.training.trained import as_settled

#: Columns of the table: key of a row -> title, format.
COLUMNS = {
    "free_residual": ("residual", "8.1e"),
    "free_distance": ("to go", "5.0%"),
    "free_unsettled": ("unsettled", "9.0%"),
    "free_oscillating": ("swings", "6"),
    "nudged_residual": ("residual", "8.1e"),
    "nudged_distance": ("to go", "5.0%"),
    "nudged_unsettled": ("unsettled", "9.0%"),
    "nudged_oscillating": ("swings", "6"),
    "nudge_response": ("response", "8.1e"),
    "scaled_response": ("scaled", "8.1e"),
    "gradient_norm": ("gradient", "8.1e"),
    "cosine": ("cosine", "7.4f"),
    "activity": ("activity", "8.3f"),
    "saturated": ("saturated", "9.0%"),
    "dead": ("dead", "5.0%"),
}


@dataclass
class Diagnosis:
    """What was seen."""

    title: str
    rows: list[Record]  # one a layer and one for the readout: ``name`` and what there is of `COLUMNS`
    findings: list[Finding]  # none for a healthy network
    trace: Record  # `cupyep.diagnostics.checkup.trace_of` the batch
    notes: list[str]  # what could not be looked at

    def lines(self) -> list[str]:
        """Return title, table, notes and verdicts."""
        return [self.title, *self._table(), *(f"note: {note}" for note in self.notes), *self.verdicts()]

    def verdicts(self) -> list[str]:
        """Return what is wrong, a line each, or why the network is healthy."""
        return [f"warning: {finding.message}" for finding in self.findings] or [self._healthy()]

    def _healthy(self) -> str:
        """Return what was measured and by which limit it is healthy; backpropagation has neither phases nor a nudge."""
        layers, tolerance, parts = [row for row in self.rows if "saturated" in row], self.trace.get("tolerance"), []
        unit, rates = "sweep" if self.trace.get("schedule") == "sweeps" else "step", []
        for phase in ("free", "nudged"):
            if f"{phase}_distance" not in layers[0]:
                continue
            unsettled, most = max(row[f"{phase}_unsettled"] for row in layers), LIMITS["unsettled samples"].value
            if tolerance is None:
                left, limit = max(row[f"{phase}_distance"] for row in layers), LIMITS[f"{phase} distance"].value
                what = f"has {left:.0%} left to go in the mean, more than {limit:.0%} in {unsettled:.0%} of the samples"
            else:
                what = f"is above --tolerance {tolerance:g} in {unsettled:.0%} of the samples"
            parts.append(f"the {phase} phase {what} (limit {most:.0%})")
            rates += [f"{rho:.2g} {phase}"] if (rho := self.trace[phase].get("contraction")) is not None else []
        parts += [f"a {unit} contracts by {' and '.join(rates)}"] if rates else []
        bends = [row["nonlinearity"] for row in layers if "nonlinearity" in row]
        parts += [f"the response is proportional to the nudge within {max(bends):.0%}"] if bends else []
        parts += ["the nudge reaches every layer"] if "nudge_response" in layers[0] else []
        return "healthy: " + ", ".join([*parts, "no layer has collapsed"])

    def _table(self) -> list[str]:
        shown = {
            key: column for key, column in COLUMNS.items() if any(row.get(key, False) is not False for row in self.rows)
        }
        widths = {key: max(len(title), int(form.split(".")[0])) for key, (title, form) in shown.items()}
        first = max(9, *(len(row["name"]) + 1 for row in self.rows))
        head = f"{'node' if 'nodes' in self.trace else 'layer':<{first}}" + " ".join(
            f"{shown[key][0]:>{widths[key]}}" for key in shown
        )
        above = " " * first
        for phase in ("free", "nudged"):
            width = sum(widths[key] + 1 for key in shown if key.startswith(f"{phase}_"))
            above += f"{f' {phase} phase ':-^{width - 1}} " if width else ""
        lines = [above.rstrip(), head]
        for row in self.rows:
            cells = (_cell(row.get(key), shown[key][1], widths[key]) for key in shown)
            lines.append(f"{row['name']:<{first}}" + " ".join(cells))
        return [line.rstrip() for line in lines if line.strip()]

    def write_json(self, path: Path) -> None:
        """Write everything to `path`; what is not finite becomes null."""
        content = {
            "title": self.title,
            "layers": self.rows,
            "findings": [finding._asdict() for finding in self.findings],
            "notes": self.notes,
            "settling": self.trace,
        }
        write_json(path, content, indent=1)


def diagnose(path: str | Path, which: str = "last", given: Mapping[str, Any] | None = None, bptt: bool = False) -> Any:
    """Look closely at a batch of training images with the learner of a run, or with a checkpoint file, at `path`.

    `which` is the checkpoint of a run directory: "best", "last" or "previous". Options `given` may differ from the
    run's; as many images are looked at as ``batch_size`` says. With `bptt` the gradient is compared with that of
    backpropagation through time from the same free state. `CupyepError` if run, checkpoint or data set cannot be read.
    """
    file, saved, config = _open(Path(path), which)
    given = given or {}
    follows = {"relaxation": None} if "schedule" in given else {}  # that of the run belongs to the run's schedule
    config = as_settled(config, saved, {**follows, **given})
    require_used(given, vars(config))
    dataset = build_dataset(config)
    check_unchanged(f"checkpoint '{file}'", saved.images.get("fingerprint", ""), dataset)
    network = build_network(config, dataset, get_device(config.device))
    check_same_network(file, saved, network)
    signals, notes = _signals(config, network, dataset, file.parent)
    learner = build_learner(config, network, signals, np.random.default_rng(config.seed))
    if any(name.startswith("signals.") and name not in saved.parameters for name in learner.parameters()):
        signals, notes = [], [*notes, f"without the intermediate signals of the run: '{file}' lacks their learned maps"]
        learner = build_learner(config, network, signals, np.random.default_rng(config.seed))
    own = {name: a for name, a in saved.parameters.items() if signals or not name.startswith("signals.")}
    restore_parameters(file, own, learner.parameters(), network.device)
    for signal in signals:
        signal.anneal(min(saved.epoch / config.epochs, 1.0))
    batch = first_images(dataset, network, config.batch_size)
    title = f"{path}, epoch {saved.epoch}: {config.arch}, {len(batch)} training images of {config.dataset}"
    return examine(learner, batch, title, saved.epoch, bptt, notes)


def examine(
    learner: Any, batch: Batch, title: str = "", epoch: int = 0, bptt: bool = False, notes: Sequence[str] = ()
) -> Diagnosis:
    """Return the diagnosis of `learner` on `batch`; see `diagnose`."""
    setting = Setting.of(learner, len(batch))
    probes = probe_settling(learner, batch)
    record = _step_record(learner, batch) | probe_record(probes, None)
    record |= {"epoch": epoch, "kappa": max((signal.kappa for signal in learner.signals), default=None)}
    for phase, probe in probes.items():
        record[f"{phase}_residual_per_layer"] = probe.per_sample.mean(axis=1).tolist()
        if setting.tolerance is not None:
            record[f"{phase}_unsettled"] = (probe.per_sample > setting.tolerance).mean(axis=1).tolist()
    rows, notes = _rows(record, setting, probes), list(notes)
    if bptt and "free" in probes:
        try:
            for row, cosine in zip(rows, _cosines(learner, batch), strict=True):
                row["cosine"] = cosine
        except DivergenceError as error:
            notes.append(str(error))
    trace = trace_of(probes, setting, len(batch), epoch)
    return Diagnosis(title, rows, find(record, setting, probes), trace, notes)


def _open(path: Path, which: str) -> tuple[Path, Checkpoint, TrainConfig]:
    if path.is_dir() or not path.exists():
        directory = RunDirectory.open(path)
        return path / CHECKPOINT_FILES[which], directory.load(which), directory.config
    saved = load_checkpoint(path)
    if not saved.config:
        raise CheckpointError(f"checkpoint '{path}' does not hold the options of its run; give the run directory")
    return path, saved, make_config(saved.config)


def _signals(config: TrainConfig, network: Any, dataset: Any, run: Path) -> tuple[list[Any], list[str]]:
    if config.aug != "kd":
        return build_signals(config, network, dataset, None), []
    teacher = expanded(config.teacher) if config.teacher else teacher_path(config, dataset)
    teacher = run / KEPT if (run / KEPT).is_file() else teacher
    if not teacher.is_file():
        return [], [f"without the distillation of the run: its teacher file {teacher} is not there"]
    return build_signals(config, network, dataset, teacher), []


def _step_record(learner: Any, batch: Batch) -> Record:
    """Return what a step says of the batch, as an epoch's record has it."""
    host = learner.network.device.to_numpy
    with np.errstate(over="ignore", invalid="ignore"):
        result = learner.step(batch)
        norms = host(result.gradients.norms()).tolist()
    names = result.gradients.layers
    response = result.nudge_response
    return {
        **{name: host(getattr(result, name)).tolist() for name in LEVELS},
        "nudge_response": None if response is None else host(response).tolist(),
        "gradient_norm": [norm for name, norm in zip(names, norms, strict=True) if not name.startswith("signals.")],
    }


def _rows(record: Record, setting: Setting, probes: Mapping[str, PhaseProbe]) -> list[Record]:
    depth = len(setting.units)
    columns: dict[str, Sequence[Any]] = {name: record[name] for name in LEVELS}
    for phase, probe in probes.items():
        columns[f"{phase}_residual"] = record[f"{phase}_residual_per_layer"]
        columns[f"{phase}_distance"] = record[f"{phase}_distance"]
        columns[f"{phase}_unsettled"] = record[f"{phase}_unsettled"]
        columns[f"{phase}_oscillating"] = probe.oscillating.tolist()
    if "nonlinearity" in record:
        columns["nonlinearity"] = record["nonlinearity"]
    if record["nudge_response"] is not None:
        columns["nudge_response"] = record["nudge_response"]
        columns["scaled_response"] = scaled_response(record, setting.weights).tolist()
        columns["response_share"], columns["gradient_share"] = (s.tolist() for s in shares_of_last(record, setting))
    names = setting.names or [str(n + 1) for n in range(depth)]
    rows = [{"name": names[n], **{key: values[n] for key, values in columns.items()}} for n in range(depth)]
    if len(record["gradient_norm"]) > depth:
        rows.append({"name": "readout"})
    for row, norm in zip(rows, record["gradient_norm"], strict=True):
        row["gradient_norm"] = norm
    return rows


def _cosines(learner: Any, batch: Batch) -> list[float]:
    """Return the cosine of each layer's weight gradient with BPTT's, from one free state."""
    network, nudged = learner.network, getattr(learner, "nudged_steps", learner.free_steps)
    free = learner.settle_free(batch).copy()
    steps = nudged if learner.schedule == "synchronous" else None
    gradients = learner.step_from(batch, free).gradients, bptt_gradients(network, batch, free, learner.signals, steps)
    host = [{path: network.device.to_numpy(g).copy() for path, g in found.items()} for found in gradients]
    weights: dict[str, list[str]] = {}  # several lead into some nodes
    for path in host[0]:
        if path.endswith(".weight") and not path.startswith("signals."):
            weights.setdefault(layer_of(path), []).append(path)
    joined = ([np.concatenate([g[path].ravel() for path in paths]) for g in host] for paths in weights.values())
    return [compare(*pair)["cosine"] for pair in joined]


def _cell(value: Any, form: str, width: int) -> str:
    if isinstance(value, bool):
        return f"{'yes' if value else '-':>{width}}"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return f"{'':>{width}}"
    return f"{value:>{width}{form[form.index('.') :]}}"
