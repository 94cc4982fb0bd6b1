"""The search of docs/sweeps.md, with Optuna where it is installed, and with a stand-in of the functions it uses."""

from __future__ import annotations

import random
import sys
from types import ModuleType, SimpleNamespace

import pytest
from documents import ROOT, blocks


class Study:
    """Asks at random and remembers what it is told."""

    def __init__(self):
        self.told, self.rng = [], random.Random(0)

    def ask(self):
        params = {}

        def of(name, value):
            return params.setdefault(name, value)

        return SimpleNamespace(
            params=params,
            suggest_float=lambda name, low, high, log: of(name, low * (high / low) ** self.rng.random()),
            suggest_categorical=lambda name, choices: of(name, self.rng.choice(choices)),
        )

    def tell(self, trial, value):
        self.told.append((value, trial.params))

    best_value = property(lambda self: max(self.told, key=lambda pair: pair[0])[0])
    best_params = property(lambda self: max(self.told, key=lambda pair: pair[0])[1])


def stand_in():
    module = ModuleType("optuna")
    module.create_study = lambda direction, sampler: Study()
    module.samplers = SimpleNamespace(TPESampler=lambda seed: seed)
    return module


@pytest.mark.filterwarnings("ignore")  # a library's own
@pytest.mark.parametrize("real", [False, True])
def test_the_search_runs_and_its_best_is_the_best_run(real, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    if real:
        pytest.importorskip("optuna")
    else:
        monkeypatch.setitem(sys.modules, "optuna", stand_in())
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs" / "sweeps.md", "python")
    assert len(block.text.splitlines()) <= 15
    space = {}
    exec(compile(block.text, "sweeps.md", "exec"), space)
    from cupyep.commands.compare import compare

    rows = compare([tmp_path / "runs" / "search" / str(k) for k in range(3)]).sorted("best_accuracy").rows
    assert space["study"].best_value == rows[0]["best_accuracy"]
    assert {name: rows[0][name] for name in ("beta", "feedback")} == space["study"].best_params
