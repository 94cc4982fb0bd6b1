"""`cupyep compare`. Oracle: runs written by hand, whose table is written by hand."""

from __future__ import annotations

import csv
import json

import pytest

from cupyep.commands.compare import compare, run_names
from cupyep.training.config import make_config
from cupyep.training.run_directory import RunDirectory


def record(epoch, test, loss=1.5, **more):
    return {
        "epoch": epoch,
        "train_loss": loss,
        "test_loss": loss + 0.25,
        "train_accuracy": 0.5,
        "test_accuracy": test,
        "validation_accuracy": None,
        "elapsed_s": 90.0 * epoch,
        "free_distance": [0.1],
        "findings": [],
        **more,
    }


UNSETTLED = {"findings": [{"signature": "convergence", "layers": [1], "message": "it does not settle"}]}


@pytest.fixture
def made(tmp_path):
    """Write a run with some options and records; return its folder."""

    def make(name, records=(), **options):
        directory = RunDirectory.create(tmp_path / name, make_config({"epochs": 4}, options))
        directory._write("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        return tmp_path / name

    return make


@pytest.fixture
def three(made):
    return [
        made("ep", [record(1, 0.5), record(2, 0.75), record(3, 0.75, 0.5, **UNSETTLED)], feedback=0.25),
        made("bp", [record(1, 0.875, free_distance=None)], algorithm="bp", feedback=0.1, learning_rate=[0.1, 0.01]),
        made("new", feedback=0.25, learning_rate=0.5),
    ]


TABLE = """\
run  feedback  algorithm  learning_rate  done  epochs  best_accuracy  best_epoch  last_accuracy  train_loss  test_loss  minutes  settled
ep   0.25      ep         0.001          3     4       75.00%         2           75.00%         0.5000      0.7500     4.5      no
bp   0.1       bp         0.1,0.01       1     4       87.50%         1           87.50%         1.5000      1.7500     1.5      -
new  0.25      ep         0.5            0     4       -              -           -              -           -          -        -
"""  # noqa: E501


def test_the_table_shows_what_differs_and_what_came_of_it(three, invoke):
    code, out, err = invoke("compare", *three)
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [line.split() for line in TABLE.splitlines()]
    heads = out.splitlines()[0]
    for line in out.splitlines()[1:]:
        assert line[heads.index("settled") :] in ("yes", "no", "-"), "columns are aligned"


def test_the_best_epoch_is_that_of_best_h5(made):
    """The first of equals; by validation images where there are some, and then their epoch's test accuracy."""
    records = [record(1, 0.9, validation_accuracy=0.25), record(2, 0.5, validation_accuracy=0.75),
               record(3, 0.625, validation_accuracy=0.75)]  # fmt: skip
    (row,) = compare([made("run", records)]).rows
    assert (row["best_epoch"], row["best_accuracy"], row["last_accuracy"], row["settled"]) == (2, 0.5, 0.625, True)


@pytest.mark.parametrize(
    ("column", "order"),
    [
        ("best_accuracy", ["bp", "ep", "new"]),
        ("train_loss", ["ep", "bp", "new"]),
        ("minutes", ["bp", "ep", "new"]),
        ("done", ["new", "bp", "ep"]),
        ("algorithm", ["bp", "ep", "new"]),
        ("learning_rate", ["ep", "new", "bp"]),
        ("settled", ["ep", "bp", "new"]),
        ("tolerance", ["ep", "bp", "new"]),
    ],
)
def test_sorted_by_any_column(column, order, three):
    """Accuracies from the highest, all else from the lowest; what is unknown comes last, equals stay in their order."""
    assert [row["run"] for row in compare(three).sorted(column).rows] == order


def test_the_csv_holds_all_digits(three, invoke, tmp_path):
    code, out, _ = invoke("compare", *three, "--sort", "best_accuracy", "--csv", tmp_path / "runs.csv")
    assert (code, out.splitlines()[-1]) == (0, f"written to {tmp_path / 'runs.csv'}")
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["bp", "ep", "new"]
    assert rows[0] | {"best_accuracy": "0.875", "learning_rate": "0.1,0.01", "settled": "", "minutes": "1.5"} == rows[0]
    assert rows[1] | {"best_accuracy": "0.75", "settled": "false", "path": str(three[0])} == rows[1]
    assert rows[2]["best_accuracy"] == ""


def test_no_more_curves_than_colours(made, invoke, tmp_path):
    pytest.importorskip("matplotlib")
    from cupyep.commands.plots import learning_of

    runs = [made(f"run{k}", [record(1, k / 10), record(2, 0.5)]) for k in range(9)]
    code, out, _ = invoke("compare", *runs, "--sort", "last_accuracy", "--plot", tmp_path / "runs.png")
    assert (code, out.splitlines()[-1]) == (0, f"drawn in {tmp_path / 'runs.png'}")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    figure = learning_of(runs)
    assert len({line.get_color() for line in figure.axes[1].get_lines()}) == 8
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"run{k}" for k in range(8)]
    assert figure.get_suptitle() == "8 of 9 runs"


def test_wrong_calls_are_one_line(three, made, invoke, tmp_path):
    for words, code, text in (
        ([], 2, "Missing argument 'RUN...'."),
        ([tmp_path], 1, f"'{tmp_path}' is not a run directory: it has no config.toml"),
        ([*three, "--sort", "best_acuracy"], 2, "did you mean 'best_accuracy'?"),
        ([*three, "--plot", "runs.pdf"], 2, "--plot must end in .png or .svg (got 'runs.pdf')"),
        ([*three, "--csv", tmp_path / "none" / "runs.csv"], 2, f"there is no folder '{tmp_path / 'none'}'"),
    ):
        found = invoke("compare", *words)
        assert (found[0], found[1], found[2].count("\n")) == (code, "", 1)
        assert text in found[2]


@pytest.mark.parametrize("line", ['{"epoch": 1, "test_accuracy": "high"}', '{"epoch": 1, "elapsed_s": [1]}'])
@pytest.mark.parametrize("command", ["compare", "plot"])
def test_a_damaged_record_is_one_line(command, line, made, invoke):
    """And one without an accuracy is drawn and shown without."""
    path = made("run")
    (path / "metrics.jsonl").write_text(f"{line}\n{json.dumps(record(2, 0.5))}\n")
    code, _, err = invoke(command, path)
    assert (code, err) == (1, f"Error: '{path / 'metrics.jsonl'}' line 1 is not a record of an epoch; restore that "
                           "line, or start a new run\n")  # fmt: skip
    (path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert invoke(command, path)[0] == 0


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "other", tmp_path / "other"]
    folder = tmp_path.name
    assert run_names(paths) == ["a-run", "b-run", f"{folder}-other-3", f"{folder}-other-4"]
