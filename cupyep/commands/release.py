"""A trained run to pass on: a run directory with what it takes to use it, in halves, and a card about it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.data import Dataset
from cupyep.data.sources import SOURCES, short_name
from cupyep.errors import CheckpointError, reporting, require
from cupyep.files import LOCK, temporary_path, write_file
from cupyep.learning import Backpropagation
from cupyep.persistence import Checkpoint, save_checkpoint
from cupyep.training.build import build_dataset, evaluation_batches, rest_batches
from cupyep.training.config import MACHINE, OPTIONS, TrainConfig, make_config
from cupyep.training.display import Display
from cupyep.training.results import LONGER, at_rest, evaluate
from cupyep.training.run_directory import BEST, METRICS, SETTLING, RunDirectory, check_free
from cupyep.training.snapshot import check_unchanged
from cupyep.training.trained import TrainedRun, load_trained

CARD = "README.md"


def release_run(path: str | Path, output: Path, which: str = "best", display: Display | None = None) -> list[str]:
    """Write the run in `path` to a new folder `output`, as far as it is needed to use its network or to start from it.

    That is config.toml, metrics.jsonl, best.h5 with the parameters in float16 (the running average, where there is one;
    neither the optimizer's arrays nor learned maps), and README.md, a card: accuracies of the test images by these very
    files, settled and feed-forward, options, how it settles, licence of the images. The data set must be there. The
    folder appears when it is complete.

    Returns lines that say what was written. `CheckpointError` if the run cannot be loaded, its numbers are too large
    for float16, or the folder is there already or cannot be written.
    """
    check_free(output)
    run, path = RunDirectory.open(path), Path(path)
    checkpoint = halved(run.load(which))
    dataset = build_dataset(run.config)
    check_unchanged("this checkpoint", checkpoint.images.get("fingerprint", ""), dataset)
    with _folder(output) as folder:
        config = make_config(vars(run.config), {name: OPTIONS[name].default for name in (*MACHINE, "init_from")})
        new = RunDirectory.create(folder, config)
        for name in filter(lambda name: (run.path / name).is_file(), (METRICS, SETTLING)):
            shutil.copyfile(run.path / name, folder / name)
        require(checkpoint.epoch > 0, f"'{path}' has not finished an epoch; export it after one")
        if not any(each["epoch"] == checkpoint.epoch and "test_accuracy" in each for each in new.metrics()):
            raise CheckpointError(f"'{path / METRICS}' lacks epoch {checkpoint.epoch}, that of the weights")
        save_checkpoint(folder / BEST, checkpoint)
        trained = load_trained(folder)
        accuracies = measured(trained, dataset, display or Display())
        nbytes = (folder / BEST).stat().st_size
        card = model_card(trained, run.config, new.metrics(), accuracies, nbytes, checkpoint.batch)
        write_file(folder / CARD, card.encode())
        (folder / LOCK).unlink(missing_ok=True)  # of the folder's making
    lines = [f"{output}: {nbytes / 1e6:.2f} MB, epoch {checkpoint.epoch} ({which}); test accuracy by these files:"]
    return lines + [f"  {accuracy:.2%} {name}" for name, accuracy in accuracies.items()]


def measured(run: TrainedRun, dataset: Dataset, display: Display) -> dict[str, float]:
    """Return accuracies of the test images by what was done: feed-forward, settled as in training, and for longer."""
    batches, settles = evaluation_batches(run.config, dataset, run.network), run.config.algorithm != "bp"
    learners = {"feed-forward": Backpropagation(run.network)}
    learners |= {"settled as in training": run.learner} if settles else {}
    found = {}
    for name, learner in learners.items():
        found[name] = evaluate(learner, display.over(batches, f"test images, {name}"))[1]
    if settles:
        rest = at_rest(run.learner, rest_batches(run.config, dataset, run.network))
        found[f"the same, {rest['images']} of the images"] = rest["as_trained"]
        found[f"settled {LONGER} times as long, these {rest['images']}"] = rest["longer"]
    return found


def halved(checkpoint: Checkpoint) -> Checkpoint:
    """Return what is needed to use a network, its parameters as float16."""
    arrays = checkpoint.weights()
    largest = max(np.abs(array).max(initial=0) for array in arrays.values())
    if largest > np.finfo(np.float16).max:
        raise CheckpointError(f"a parameter is {largest:.3g}, beyond float16; use cupyep export --format npz")
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    return dataclasses.replace(checkpoint, parameters=halves, optimizer={}, statistics={}, generators={}, config={})


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which becomes `path` at the end, or disappears."""
    temporary = temporary_path(path)
    try:
        with reporting(CheckpointError, f"cannot write '{path}'"):
            yield temporary
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_card(
    run: TrainedRun,
    began: TrainConfig,
    records: Sequence[Mapping[str, Any]],
    accuracies: Mapping[str, float],
    nbytes: int,
    batches: int = 0,
) -> str:
    """Return the text of README.md: `accuracies` are of the files themselves, `records` are the run's epochs.

    The weights are those after `run.epoch` epochs and some `batches` more. `began` are the options of the training, of
    which `run` has those that its network needs.
    """
    record = next(each for each in records if each["epoch"] == run.epoch)
    config, count = run.config, sum(array.size for array in run.network.parameters().values())
    name = short_name(config.dataset)
    source = SOURCES.get(name)
    images = f"{name} (licence: {source.licence})" if source else name
    later = f"; these weights are {batches} batch{'es' if batches > 1 else ''} later" if batches else ""
    rows = "\n".join(f"| {name} | {accuracy:.2%} |" for name, accuracy in accuracies.items())
    return CARD_TEXT.format(
        name=f"{config.arch}, width {config.width:g}, on {name}",
        count=count,
        mb=nbytes / 1e6,
        classes=len(run.images.classes),
        size=" x ".join(map(str, run.images.image_shape)),
        rows=rows,
        trained=f"{record['test_accuracy']:.2%}",
        epoch=f"epoch {run.epoch}{later}",
        how=_how(began, config.feedback, len(records)),
        settling=_settling(config, record),
        hours=records[-1]["elapsed_s"] / 3600,
        images=images,
    )


def _how(config: TrainConfig, feedback: float, done: int) -> str:
    names = {"ep": "Equilibrium Propagation", "bptt": "backpropagation through time", "bp": "backpropagation"}
    known = {"none": "no intermediate signals", "le": "local error", "kd": "knowledge distillation"}
    signals = known.get(config.aug, f"the signal '{config.aug}' of a plugin")
    weight = "" if config.algorithm == "bp" else f" at feedback weight lambda = {feedback:g}"
    epochs = f"{done} epochs" if done == config.epochs else f"{done} of {config.epochs} epochs"
    start = ", from weights of another training" if config.init_from else ""
    return (
        f"{names[config.algorithm]}{weight}, {signals}; {epochs}{start}, seed {config.seed}, every option in "
        "[config.toml](config.toml)"
    )


def _settling(config: TrainConfig, record: Mapping[str, Any]) -> str:
    if record.get("free_distance") is None:
        return "This network does not settle: one pass up."
    unit = {"sweeps": "sweep"}.get(config.schedule, "step")
    steps, left = config.settling["steps"], max(record["free_distance"])
    return (
        f"After {steps} {unit}{'s' if steps > 1 else ''} of the free phase the layer that is farthest from rest has "
        f"{left:.0%} of its size left to go (a few training images, epoch {record['epoch']})."
    )


CARD_TEXT = """# {name}

{count:,} parameters as float16 ({mb:.2f} MB), for images of {size}, {classes} classes.
Made by `cupyep export --format run`.

| accuracy on the test images, these files | |
| --- | ---: |
{rows}

In training, before rounding to float16: {trained} after {epoch}.

- Trained by: {how}; {hours:.1f} hours.
- Settling: {settling}
- Images: {images}. None of them is in these files.
- Licence of the network: that of cupyep, MIT.

```sh
cupyep evaluate .
cupyep predict . picture.png
cupyep diagnose . --checkpoint best
cupyep export . --format onnx --output network.onnx
cupyep train --recipe config.toml --init-from best.h5     # go on from here
cupyep train --recipe config.toml                         # the same training again
```
"""
