"""Plugins: what a module registers is a name like others, and no module is imported because a file says so.

Oracle: the same networks and signals put together by hand, without a name; a plugin that leaves a file behind when it
is imported.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from quadrants import numbers
from small import Halved, Sparsity

import cupyep as ep
from cupyep import activations, models, plugins
from cupyep.cli import main
from cupyep.errors import Interrupted
from cupyep.experiments.sweep import grid, train_point
from cupyep.persistence.checkpoint import load_checkpoint
from cupyep.training.config import read_toml
from cupyep.training.run_directory import RunDirectory

PLUGIN = """
import pathlib

import cupyep as ep

pathlib.Path("imported").touch()
"""
PLUGIN += f"\n\n{inspect.getsource(Halved)}\n\n{inspect.getsource(Sparsity)}"
PLUGIN += """


def halved(input_shape, width, pooling):
    conv = ep.Conv2d(input_shape, round(8 * width), pooling=pooling)
    return [conv, Halved(conv.out_shape, 6)]


def skipping(input_shape, width, pooling):
    first, second = ep.Conv2d(input_shape, 4), ep.Conv2d((4, 4, 4), 4)
    joined = [ep.Connection("image", "a", first), ep.Connection("a", "b", second)]
    return [*joined, ep.Connection("image", "b", ep.Conv2d(input_shape, 4, 1, 1, 0, bias=False))]


def broken(input_shape, width, pooling):
    raise RuntimeError("no such luck")


ep.register_architecture("halved", halved)
ep.register_architecture("skipping", skipping)
ep.register_architecture("broken", broken)
ep.register_architecture("nothing", lambda *_: [3])
ep.register_architecture("short", "4p 6", activation="two-sided", gains=(0.5, 0.75))
ep.register_activation(ep.Clip("two-sided", slope=1.0, low=-1.0, high=1.0))
ep.register_signal("sparsity", Sparsity)
ep.register_signal("no-signal", lambda **_: 3)
"""
COMMANDS = (
    ("train", "--resume", "--run-dir"), ("evaluate",), ("diagnose",), ("plot",), ("compare",), ("predict", "own.npz"),
    ("export", "--format", "npz", "--output", "w.npz"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """A working folder with a plugin and a data set."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PLUGIN)
    rng, labels = np.random.default_rng(0), np.arange(40) % 2
    images = (rng.integers(0, 100, (40, 4, 4, 1)) + 100 * labels[:, None, None, None]).astype(np.uint8)
    np.savez("own.npz", x=images, y=labels)
    return tmp_path


TRAIN = ["train", "--dataset", "file:own.npz", "--epochs", 1, "--free-steps", 3, "--nudged-steps", 3, "--device", "cpu",
         "--no-crop", "--no-flip", "--batch-size", 16, "--run-dir", "run", "--quiet"]  # fmt: skip
OWN = ["--arch", "halved", "--activation", "two-sided", "--aug", "sparsity", "--kappa", 0.01]


def test_a_run_of_a_plugin_is_a_run_like_others(invoke, work):
    """Train, go on, look at it, export; every command with the plugin."""
    code, out, err = invoke(*TRAIN, "--plugin", "mine.py", *OWN)
    assert (code, err) == (0, "")
    config = read_toml("run/config.toml")
    assert [config[name] for name in ("plugin", "arch", "activation", "aug")] == [
        "mine.py", "halved", "two-sided", "sparsity"]  # fmt: skip
    going_on = ["train", "--resume", "--run-dir", "run", "--epochs", 2, "--stretch-schedule", "--quiet"]
    assert invoke(*going_on, "--plugin", work / "mine.py")[0] == 0, "the same plugin by another path"
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2
    assert "halved on the 8 test images" in invoke("evaluate", "run", "--plugin", "mine.py")[1]
    assert "halved, 16 training images" in invoke("diagnose", "run", "--plugin", "mine.py", "--json", "d.json")[1]
    assert len(json.loads(Path("d.json").read_text())["layers"]) == 3
    assert invoke("diagnose", "run/best.h5", "--plugin", "mine.py")[0] == 0
    assert invoke("plot", "run", "--plugin", "mine.py")[0] == 0
    assert invoke("predict", "run", "own.npz", "--plugin", "mine.py")[2].startswith("Error: 1 of 1 pictures")
    code, _, err = invoke("export", "run", "--format", "npz", "--output", "w.npz", "--plugin", "mine.py")
    assert "layer 2 is a Halved; only Conv2d and Linear can be exported" in err


def test_no_command_imports_what_a_run_names(invoke, forget):
    """Neither the run's folder nor a checkpoint, a recipe, or the options of a network."""
    assert invoke(*TRAIN, "--plugin", "mine.py", *OWN)[0] == 0
    forget()
    Path("imported").unlink()
    path = Path("run/config.toml")
    path.write_text('plugin = "mine.py"\n' + path.read_text().replace('plugin = "mine.py"\n', ""))  # it comes first
    shutil.copy("mine.py", "run/mine.py")
    lines = [invoke(*command[:1], *command[1:2] * (command[0] == "train"), *command[2:] * (command[0] == "train"),
                    "run", *command[1:] * (command[0] != "train")) for command in COMMANDS]  # fmt: skip
    lines += [invoke("diagnose", "run/best.h5")]
    shutil.copy("run/config.toml", "mine.toml")
    lines += [invoke("train", "--recipe", "mine.toml", "--run-dir", "other"), invoke("recipes", "mine.toml")]
    lines += [invoke("check", "--recipe", "mine.toml")]
    for code, out, err in lines:
        assert (code, out) == (2, "")
        assert err.startswith("Error: ")
        assert err.endswith("'halved' is of a plugin, which is code; if you trust it, give --plugin mine.py\n")
    assert not Path("imported").exists()
    assert not any("mine" in name for name in sys.modules if name.startswith(("mine", "cupyep_plugin")))


REPORT = ["--dataset", "file:own.npz", "--device", "cpu", "--batch-size", 4]
#: A recipe of the plugin, and what else it says.
RECIPE = 'plugin = "mine.py"\narch = "halved"\nactivation = "two-sided"  # [own]\naug = "sparsity"\n'


def test_commands_without_a_run_take_a_plugin(invoke, forget):
    """By hand: 9 x 8 + 8, 32 x 6 + 6 and 6 x 2 + 2 parameters are 292, of four bytes; EP's gradient is BPTT's."""
    Path("mine.toml").write_text(RECIPE)
    code, out, err = invoke("info", "--plugin", "mine.py", "--arch", "halved", *REPORT)
    assert (code, err) == (0, "")
    assert "2: Halved" in out or "2: Linear((2, 2, 8) -> (6,))" in out
    assert "parameters     292\n" in out
    forget()
    assert (
        invoke("memory", "--plugin", "mine.py", "--arch", "halved", *REPORT, "--steps", 2, "--json", "m.json")[0] == 0
    )
    assert json.loads(Path("m.json").read_text())["steps"][0]["planned"]["parameters"] == 4 * 292
    forget()
    code, out, err = invoke("check", "--plugin", "mine.py", "--recipe", "mine.toml", *REPORT, "--json", "c.json")
    assert (code, err) == (0, "")
    found = json.loads(Path("c.json").read_text())
    assert [row["name"] for row in found["layers"]] == ["layers.1", "layers.2", "readout"]
    assert min(row["cosine"] for row in found["layers"]) > 0.999
    assert (found["options"]["arch"], found["options"]["plugin"]) == ("halved", "mine.py")
    forget()
    assert invoke("recipes", "mine.toml", "--plugin", "mine.py") == (0, RECIPE, "")
    forget()
    options = ["--train-bp", "short", "--epochs", 1, "--output", "teacher.h5", "--quiet"]
    assert invoke("teacher", "--plugin", "mine.py", *REPORT, *options)[0] == 0
    assert ep.TeacherFile("teacher.h5").teacher.startswith("short trained by backpropagation, 1 epochs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info"], "--plugin says nothing by itself; give --arch, too"),
        (["recipes"], "--plugin is for one recipe: give its FILE, too"),
        (["teacher", "--onnx", "net.onnx", "--output", "t.h5"], "--plugin is for --train-bp, not for --onnx"),
        (["reproduce", "signals"], "no such option '--plugin'"),  # the experiments are the package's own
    ],
)
def test_a_plugin_that_changes_nothing_is_refused(words, message, invoke):
    assert invoke(*words, "--plugin", "mine.py") == (2, "", f"Error: {message}\n")


def test_runs_of_a_sweep_know_the_plugin_in_processes_of_their_own(invoke, forget):
    """One of them is this process, made one that has imported nothing."""
    options = {"dataset": "file:own.npz", "epochs": 1, "device": "cpu", "crop": False, "flip": False, "free_steps": 3}
    plugins.load_plugin("mine.py")
    (point,) = grid({"arch": ["halved"]}, Path("sweep"), options | {"plugin": "mine.py"})
    forget()
    name, right, text = train_point(point, {"plugin": "mine.py"})
    assert (name, right) == ("arch=halved", True), text
    forget()
    code, out, err = invoke("compare", "sweep/arch=halved", "--plugin", "mine.py")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].startswith("arch=halved  1 ")


@pytest.mark.slow
def test_a_sweep_in_several_processes(invoke):
    sweep = ["--sweep", "arch=halved,skipping", "--jobs", 2]
    assert invoke(*TRAIN, "--plugin", "mine.py", *sweep)[0] == 0
    assert {path.name for path in Path("run").glob("*/best.h5")} == {"best.h5"}
    assert len(list(Path("run").glob("*/best.h5"))) == 2


@pytest.mark.parametrize("name", ["arch", "activation", "aug"])
def test_each_registered_name_asks_for_the_plugin(name, invoke, forget):
    options = dict(zip(OWN[0::2], OWN[1::2], strict=True))
    given = [f"--{name}", options[f"--{name}"], *(["--arch", "mlp:6"] if name != "arch" else [])]
    assert invoke(*TRAIN, "--plugin", "mine.py", *given)[0] == 0
    forget()
    code, _, err = invoke("evaluate", "run")
    assert code == 2
    assert f"{name} '{options[f'--{name}']}' is of a plugin" in err


def test_control_codes_in_a_name_do_not_reach_the_terminal(invoke):
    Path("run").mkdir()
    Path("run/config.toml").write_text('arch = "evil"\nplugin = "a\\u001b[2J\\nb.py"\n')
    code, _, err = invoke("evaluate", "run")
    assert code == 2
    assert err.count("\n") == 1
    assert err.strip().isprintable()
    assert "give --plugin 'a\\x1b[2J b.py'" in err


def test_a_wrong_name_without_a_plugin_is_answered_as_before(invoke):
    code, _, err = invoke("train", "--arch", "vgg6")
    assert (code, "unknown --arch 'vgg6'; did you mean" in err) == (2, True)
    code, _, err = invoke("train", "--plugin", "mine.py", "--arch", "halfed")
    assert (code, "unknown --arch 'halfed'; did you mean 'halved'" in err) == (2, True)


def test_a_plugin_that_is_a_module_and_one_that_python_imported(invoke, monkeypatch, forget):
    assert invoke(*TRAIN, "--plugin", "mine", "--arch", "short")[0] == 0
    config = read_toml("run/config.toml")
    assert (config["plugin"], config["activation"]) == ("mine", "two-sided"), "the architecture's own activation"
    forget()
    plugins.load_plugin("mine")  # as Python code does
    assert invoke("evaluate", "run")[0] == 0, "names that are known need no option"


def test_fit_leaves_a_run_that_the_commands_take(invoke, forget):
    plugins.load_plugin("mine.py")
    data = ep.load_dataset("file:own.npz")
    net = ep.build("skipping", 2, (4, 4, 1), device="cpu")
    ep.fit(net, data, run_dir="run", epochs=1, plugin="mine.py", aug="sparsity", quiet=True, flip=False)
    forget()
    assert "give --plugin mine.py" in invoke("evaluate", "run")[2]
    assert not invoke("evaluate", "run", "--plugin", "mine.py")[0]


FIT = {"batch_size": 16, "quiet": True, "flip": False, "crop": False, "seed": 3}
AS_OWN = (
    "import cupyep as ep\n\n\ndef layers(shape, width, pooling):\n    return [ep.Conv2d(shape, {}), ep.Linear({}, 6)]"
)
AS_OWN += "\n\n\nep.register_architecture('own', layers)\n"


def by_hand():
    return ep.Network([ep.Conv2d((4, 4, 1), 3), ep.Linear((4, 4, 3), 6)], 2, device="cpu", seed=5)


def test_a_run_of_a_network_put_together_by_hand_goes_on_where_a_plugin_registers_it(invoke, work):
    """The command goes on as `fit` itself would: bit for bit, and its line is that of a run."""
    data = ep.load_dataset("file:own.npz", seed=3)  # which also draws the test images
    for name in ("run", "python"):
        ep.fit(by_hand(), data, run_dir=name, epochs=2, on_epoch=lambda _: True, **FIT)
    Path("own.py").write_text(AS_OWN.format(3, (4, 4, 3)))
    code, _, err = invoke("train", "--run-dir", "run", "--resume", "--plugin", "own.py", "--quiet")
    assert (code, err) == (0, "")
    ep.fit(by_hand(), data, run_dir="python", epochs=2, resume=True, **FIT)
    one, two = (RunDirectory.open(work / name) for name in ("run", "python"))
    assert len(one.metrics()) == 2
    assert numbers(one) == numbers(two)
    assert "own on the 8 test images" in invoke("evaluate", "run", "--plugin", "own.py")[1]


@pytest.mark.parametrize(
    "how",
    [{"seed": 4}, {"seed": 3, "limit_train": 20}, {"seed": 3, "test_fraction": 0.3}, {"seed": 3, "limit_test": 4}],
)
def test_other_images_than_it_began_with_are_refused(how, invoke):
    """A run by `fit` does not know how its data were loaded: no image of a test may become one of a training."""
    ep.fit(by_hand(), ep.load_dataset("file:own.npz", **how), run_dir="run", epochs=1, **FIT)
    Path("own.py").write_text(AS_OWN.format(3, (4, 4, 3)))
    code, _, err = invoke("train", "--run-dir", "run", "--resume", "--plugin", "own.py", "--epochs", 2)
    assert (code, "belongs to a run on other images of file:own.npz: limits, or a seed" in err) == (1, True), err
    with pytest.raises(ep.CheckpointError, match="other images"):
        ep.fit(by_hand(), ep.load_dataset("file:own.npz", seed=3), run_dir="run", epochs=2, resume=True, **FIT)
    ep.fit(by_hand(), ep.load_dataset("file:own.npz", **how), run_dir="run", epochs=2, resume=True, **FIT)


def test_without_one_it_is_told_how_it_goes_on(invoke, forget):
    data = ep.load_dataset("file:own.npz")
    ep.fit(by_hand(), data, run_dir="run", epochs=1, **FIT)
    ep.fit(by_hand(), (data.train.images[:], data.train.labels), run_dir="arrays", epochs=1, **FIT)
    here = "a network made in Python goes on there, by ep.fit(resume=True), or with the --plugin that registers it so"
    for words in (
        ["train", "--resume", "--run-dir", "run"],
        ["evaluate", "run"],
        ["train", "--recipe", "run/config.toml"],
    ):
        code, out, err = invoke(*words)
        assert (code, out, err) == (2, "", f"Error: 'run/config.toml': unknown arch 'own'; {here}\n")
    Path("own.py").write_text(AS_OWN.format(5, (4, 4, 5)))
    code, _, err = invoke("train", "--resume", "--run-dir", "run", "--plugin", "own.py", "--epochs", 2)
    assert (code, "belongs to another network: layers 1 channels: saved 3, this network 5" in err) == (1, True), err
    code, _, err = invoke("train", "--resume", "--run-dir", "arrays", "--plugin", "own.py", "--epochs", 2)
    told = "unknown dataset 'arrays'; a run on data made in Python goes on there, by ep.fit(resume=True)"
    assert (code, err) == (2, f"Error: 'arrays/config.toml': {told}\n")
    forget()
    Path("other.py").write_text(PLUGIN)
    code, _, err = invoke("train", "--resume", "--run-dir", "run", "--plugin", "other.py")
    assert (code, err) == (2, f"Error: 'run/config.toml': unknown arch 'own'; {here}\n")


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("arch", ["halved", "skipping"])
def test_a_built_network_is_the_one_put_together_by_hand(arch, loss):
    plugins.load_plugin("mine.py")
    module = sys.modules["cupyep_plugin_mine"]
    layers = getattr(module, arch)((4, 4, 1), 1.0, "max")
    if loss == "squared_error":
        edge = ep.Linear((6,) if arch == "halved" else (4, 4, 4), 2)
        layers.append(edge if arch == "halved" else ep.Connection("b", "output", edge))
    options = {"feedback": 0.5, "gain": 0.7, "seed": 3, "loss": loss, "activation": "two-sided", "device": "cpu"}
    wanted, found = ep.Network(layers, 2, **options), ep.build(arch, 2, (4, 4, 1), **options)
    images = np.random.default_rng(1).random((5, 4, 4, 1)).astype(np.float32)
    assert found.describe() == wanted.describe()
    for path, array in wanted.parameters().items():
        np.testing.assert_array_equal(found.parameters()[path], array)
    learners = [ep.EquilibriumPropagation(net, free_steps=4, nudged_steps=3) for net in (wanted, found)]
    states = [learner.settled(learner.network.batch(images)).layers for learner in learners]
    for pair in zip(*states, strict=True):
        np.testing.assert_array_equal(*pair)


def test_gains_of_a_registered_architecture():
    plugins.load_plugin("mine.py")
    strong, weak = (ep.build("short", 2, (4, 4, 1), feedback=f, device="cpu") for f in (1.0, 0.1))
    ratio = [np.abs(weak.parameters()[p]).max() / np.abs(strong.parameters()[p]).max()
             for p in strong.parameters() if p.endswith("weight") and "readout" not in p]  # fmt: skip
    np.testing.assert_allclose(ratio, 1.5, rtol=1e-5)


def test_an_activation_of_a_plugin_is_still_checked_and_not_saved():
    """It has a name now, and is as foreign as before."""

    class Wrong(ep.Tanh):
        def slope(self, g, out):
            super().slope(g, out)
            out *= 2

    wrong = Wrong("wrong", 0.0, 1.0, 1.0)
    ep.register_activation(wrong)
    net = ep.Network([ep.Linear((4,), 3)], 2, activation="wrong", device="cpu", precision="float64")
    assert net.activation is wrong
    with pytest.raises(ep.ConfigurationError, match="slope"):
        ep.check_gradients(net, np.ones((2, 4)), np.array([0, 1]), beta=0.01, free_steps=3, nudged_steps=3)
    with pytest.raises(ep.ConfigurationError, match="activation 'wrong' is not one of cupyep's"):
        net.save("net.h5")


def test_another_network_under_the_same_name_is_refused(invoke, forget):
    assert invoke(*TRAIN, "--plugin", "mine.py", *OWN)[0] == 0
    assert load_checkpoint("run/best.h5").epoch == 1
    forget()
    Path("mine.py").write_text(PLUGIN.replace("Halved(conv.out_shape, 6)", "Halved(conv.out_shape, 7)"))
    code, _, err = invoke("evaluate", "run", "--plugin", "mine.py")
    assert (code, "belongs to another network" in err) == (1, True)


def test_an_interrupted_run_says_how_it_goes_on(invoke, monkeypatch):
    def interrupted(self):
        raise Interrupted

    monkeypatch.setattr("cupyep.training.trainer.Trainer.run", interrupted)
    for folder, word in (("run", "run"), ("my run", "'my run'")):
        code, _, err = invoke(*TRAIN, "--plugin", "mine.py", "--arch", "short", "--run-dir", folder)
        assert code == 130
        assert f"go on with: cupyep train --run-dir {word} --resume --plugin mine.py" in err


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("gone.py", 2, "--plugin gone.py: there is no such file"),
        ("gone", 2, "--plugin gone: ModuleNotFoundError: No module named 'gone'; run from the folder that holds gone"),
        ("../mine", 2, "--plugin ../mine: neither a module (package.module) nor a file that ends in .py"),
        ("raising.py", 1, "--plugin raising.py: ZeroDivisionError"),
        ("unreadable.py", 1, "--plugin unreadable.py: SyntaxError"),
        ("leaving.py", 1, "Error: not on this machine"),
        ("taking.py", 2, "'vgg5' is a name of the package's own; choose another"),
    ],
)
def test_wrong_plugins(text, code, message, invoke):
    Path("raising.py").write_text("1 / 0")
    Path("unreadable.py").write_text("def")
    Path("leaving.py").write_text("raise SystemExit('not on this machine')")
    Path("taking.py").write_text("import cupyep as ep\nep.register_architecture('vgg5', '4 4')\n")
    for command in (TRAIN, ["evaluate", "run"]):
        got, out, err = invoke(*command, "--plugin", text)
        assert (got, out) == (code, "")
        assert err.startswith("Error: ")
        assert message in err
        assert err.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "broken"], "architecture broken: RuntimeError: no such luck"),
        (["--arch", "nothing"], "the builder of nothing must return Edges, or Connections, as Network takes them"),
        (["--arch", "4", "--aug", "no-signal"], "what the maker of --aug no-signal returns must be"),
        (["--aug", "sparsity", "--signal-loss", "squared_error"], "--signal-loss needs --aug le or kd"),
        (["--aug", "sparsity", "--temperature", 2], "--temperature needs --aug kd"),
    ],
)
def test_what_a_plugin_registers_may_be_wrong(options, message, invoke):
    code, out, err = invoke(*TRAIN, "--plugin", "mine.py", *options)
    assert code in (1, 2)
    assert message in err
    assert err.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ep.register_architecture("resnet9", "4 4"), "'resnet9' is a name of the package's own"),
        (lambda: ep.register_architecture("a b", "4 4"), "a name is up to 40 letters, digits, - and _"),
        (lambda: ep.register_architecture("../a", "4 4"), "a name is up to 40 letters"),
        (lambda: ep.register_architecture(3, "4 4"), "a name is up to 40 letters"),
        (lambda: ep.register_architecture("mine", "4 x"), "'x' is no layer or block"),
        (lambda: ep.register_architecture("mine", [4]), "layers must be a text or a function"),
        (lambda: ep.register_architecture("mine", "4", gain=1), "an architecture has the defaults activation, weights"),
        (lambda: ep.register_activation("relu"), "activation must be"),
        (lambda: ep.register_activation(ep.Clip("relu", 1.0, 0.0, 9.0)), "'relu' is a name of the package's own"),
        (lambda: ep.register_signal("kd", dict), "'kd' is a name of the package's own"),
        (lambda: ep.register_signal("mine", 3), "maker must be a function or a class"),
    ],
)
def test_wrong_registrations(call, message):
    with pytest.raises(ep.ConfigurationError, match=message):
        call()
    assert tuple(models.TABLE) == models.ARCHITECTURES
    assert tuple(activations.ACTIVATIONS) == activations.BUILT_IN
    assert tuple(plugins.SIGNALS) == plugins.BUILT_IN


def test_a_registered_name_that_begins_like_a_vgg_is_none():
    ep.register_architecture("vgg-small", "4p 6")
    assert ep.vgg(5, width=0.01, device="cpu").depth == 4
    with pytest.raises(ep.ConfigurationError, match=r"no VGG of depth 6 \(choose from 5, 7, 9, 11, 12, 16\)"):
        ep.vgg(6)


def test_a_shell_that_completes_runs_no_code(monkeypatch, capsys):
    monkeypatch.setenv("_CUPYEP_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "cupyep train --plugin mine.py --ar")
    monkeypatch.setenv("COMP_CWORD", "4")
    with pytest.raises(SystemExit):
        main([], prog_name="cupyep")
    assert "--arch" in capsys.readouterr().out
    assert not Path("imported").exists()


def in_any_order(shape, width, pooling):
    connections = [("a", "b", ep.Linear((4,), 5)), ("image", "a", ep.Linear(shape, 4))]
    return [ep.Connection(*each) for each in connections]


@pytest.mark.parametrize("made", [list, ep.Graph, iter], ids=["list", "graph", "iterator"])
def test_a_builder_may_return_what_a_network_takes(made, forget):
    """In any order: squared error's layer stands on the output."""
    ep.register_architecture("mine", lambda *given: made(in_any_order(*given)))
    for loss, tops in {"cross_entropy": "ab", "squared_error": ["a", "b", "output"]}.items():
        net = ep.build("mine", 3, (2, 2, 1), loss=loss, device="cpu")
        assert net.graph.names == list(tops)
        assert [c.below for c in net.graph.connections] == ["image", *tops[:-1]]
    ep.register_architecture("mine", lambda shape, *_: ep.Graph([ep.Linear(shape, 4)]))
    assert ep.build("mine", 3, (2, 2, 1), loss="squared_error", device="cpu").graph.is_chain


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "the builder of mine must return Edges, or Connections"),
        (
            [ep.Connection("image", "output", ep.Linear((2, 2, 1), 4))],
            "squared error adds a node 'output'; give that of",
        ),
    ],
)
def test_a_builder_may_return_what_none_takes(made, message, forget):
    ep.register_architecture("mine", lambda *_: made)
    with pytest.raises(ep.ConfigurationError, match=message):
        ep.build("mine", 3, (2, 2, 1), loss="squared_error", device="cpu")


@pytest.mark.parametrize("gains", [0.5, (0.5,), (0.5, -1), "ab"])
def test_gains_that_are_not_two_numbers(gains):
    with pytest.raises(ep.ConfigurationError, match="gains"):
        ep.register_architecture("gainless", "4p 6", gains=gains)
