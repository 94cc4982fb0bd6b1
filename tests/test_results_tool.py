"""README's table and docs/results.md say what the committed results.json files say, and nothing else."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

import cupyep as ep
from cupyep.experiments import EXPERIMENTS
from cupyep.experiments.design import Row, Scale, cell_name

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool(monkeypatch):
    """Return the tool as a module, as a script there would be."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    yield importlib.import_module("results")
    sys.modules.pop("results", None)


def write(folder, name, scale, accuracy, missing=(), **more):
    rows = EXPERIMENTS[name].at(scale).rows
    cell = {**more, "train_loss": [1.0], "test_accuracy": [accuracy], "nudge_response": [[1e-3, 1e-2]], "minutes": 2.0}
    cells = {cell_name(row.key, 0): cell for row in rows if row.key not in missing}
    about = {"experiment": name, "scale": scale, "seeds": 1, "command": "the command", "date": "2026-01-02"}
    place = folder / f"{name}-{scale}"
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps({**about, "cells": cells}))


def test_committed_pages_are_up_to_date(tool):
    found = tool.collect(ROOT / "docs" / "results")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool.with_table(readme, tool.readme_table(found)) == readme, "run: python tools/results.py"
    assert tool.results_page(found) == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_rows_that_saw_other_images_are_no_table(tool, tmp_path):
    """Whatever the code says today: the settings are those that the cells recorded."""
    write(tmp_path, "baseline", "small", 0.5)
    path = tmp_path / "baseline-small" / "results.json"
    content = json.loads(path.read_text())
    for number, cell in enumerate(content["cells"].values()):
        cell["options"] = {"dataset": "cifar10", "limit_train": 4000, "epochs": 4 if number else 8}
    path.write_text(json.dumps(content))
    with pytest.raises(ep.ConfigurationError, match="its rows differ in dataset, image_size, limit_train"):
        tool.collect(tmp_path)


def test_open_and_measured_rows(tool, tmp_path):
    write(tmp_path, "vgg7-kd-cifar10", "full", 0.9012)
    write(tmp_path, "baseline", "small", 0.5)
    write(tmp_path, "signals", "small", 0.3, missing=("kd",))
    lines = tool.readme_table(tool.collect(tmp_path)).splitlines()
    assert "| test accuracy, % | published | full size | small scale | at rest (as trained) |" in lines
    assert "| VGG-7 on CIFAR-10: EP, lambda = 1, KD | 89.67 | 90.1 | open | - |" in lines
    assert "| VGG-7 on CIFAR-10: BP, same layers | - | 90.1 | open | - |" in lines
    assert "| VGG-12 on CIFAR-100: EP, lambda = 1, KD | 64.75 | open | open | - |" in lines
    page = tool.results_page(tool.collect(tmp_path))
    (baseline,) = (line for line in page.splitlines() if "[`baseline`]" in line)
    assert baseline.startswith("| [`baseline`](results/baseline-small/REPORT.md) | small | Plain EP converges: 50.0 %")
    assert "| `signals` | small | open |" in page.splitlines()
    assert "**small** ([report](results/baseline-small/REPORT.md), `the command`, 2026-01-02)" in page
    assert "**full**: open; `cupyep reproduce baseline --scale full`; " in page
    assert "**full**: open; `cupyep reproduce memory --scale full`\n" in page


def test_medium_scale_takes_the_place_of_small(tool, tmp_path):
    """Headlines never mix scales; what has no report of medium scale stands there as before."""
    for name in ("vgg7-kd-cifar10", "signals", "graphs"):
        write(tmp_path, name, "small", 0.3)
    before = tool.readme_table(tool.collect(tmp_path))
    assert "best-" not in before
    assert "medium" not in before
    assert "| VGG-7 on CIFAR-10: EP, lambda = 1, KD | 89.67 | 30.0 | - |" in before
    rest = {"images": 1000, "as_trained": 0.9, "longer": 0.805}
    write(tmp_path, "best-cifar10", "medium", 0.9134, probes=[{}, {"rest": rest}])
    write(tmp_path, "best-svhn", "medium", 0.95)
    lines = tool.readme_table(tool.collect(tmp_path)).splitlines()
    assert "| test accuracy, % | published | medium scale | at rest (as trained) |" in lines
    assert "| Hopfield-ResNet13 on CIFAR-10: EP, lambda = 0.03 | 89.67 | 91.3 | 80.5 (90.0) |" in lines
    assert "| Hopfield-ResNet13 on CIFAR-10: BP, same network | - | 91.3 | 80.5 (90.0) |" in lines
    assert "| VGG-7 on CIFAR-10: EP, lambda = 1, KD | 89.67 | open | - |" in lines
    assert not any("CIFAR-100" in line for line in lines), "no report of this scale"
    assert not any("EP, lambda = 1, LE" in line for line in lines), "nothing published, nothing measured"
    assert lines[-1] == "Reports, with all settings: [`best-cifar10`](docs/results/best-cifar10-medium/REPORT.md)."
    page = tool.results_page(tool.collect(tmp_path))
    assert "[`best-svhn`](results/best-svhn-medium/REPORT.md) | medium | EP, lambda = 0.01: 95.00 %" in page
    assert "[`graphs`](results/graphs-small/REPORT.md) | small |" in page
    assert "**small** ([report](results/vgg7-kd-cifar10-small/REPORT.md)" in page
    assert "**medium** ([report](results/best-cifar10-medium/REPORT.md)" in page
    assert "**medium**: open; `cupyep reproduce best-cifar100 --scale medium`\n" in page


def test_operations_of_open_trainings(tool):
    """VGG-5 by hand: 3 x 3 kernels, 128 to 512 channels on maps of 32, 16, 8 and, without padding, 2 pixels a side."""
    first, *rest = (
        2 * 9 * pixels**2 * channels * above
        for pixels, channels, above in ((32, 3, 128), (16, 128, 256), (8, 256, 512), (2, 512, 512))
    )
    rest = sum(rest)
    settings = {"arch": "vgg5", "dataset": "cifar10", "epochs": 7, "feedback": 1.0, "free_steps": 5, "nudged_steps": 3}
    ep_step = (first + 5 * 2 * rest) + 2 * (3 * 2 * rest) + (first + 2 * rest)
    bp_step = 2 * first + 3 * rest
    for options, a_run in (
        ({}, 7 * ep_step),
        ({"algorithm": "bp"}, 7 * bp_step),
        ({"aug": "kd", "teacher_epochs": 2}, 7 * ep_step + 2 * bp_step),
    ):
        row = Row("one", "one", {**settings, **options})
        study = dataclasses.replace(
            EXPERIMENTS["baseline"],
            scales={"full": Scale("", (row, row), 3)},
        )
        assert tool.training_operations(study) == 3 * 2 * 50_000 * a_run


def test_a_readme_without_markers(tool):
    with pytest.raises(Exception, match="README.md lacks the lines"):
        tool.with_table("no table here", "x")
    assert tool.with_table(f"a\n{tool.BEGIN}\nold\n{tool.END}\nb", "new") == f"a\n{tool.BEGIN}\nnew\n{tool.END}\nb"
