"""cupyep teacher: teachers from ONNX, from PyTorch and from backpropagation, and every wrong use.

Oracle: the teachers are one matrix product, computed here in NumPy from the raw pixels, for the image and its mirror
image; the accuracies are counted from the logits in the file.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import shlex
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from data_files import random_arrays

import cupyep as ep
from cupyep.cli import main
from cupyep.cli.teacher import teacher
from cupyep.commands.teacher import unwrapped

TOOL = Path(__file__).parents[1] / "tools" / "export_teacher_logits.py"
SPLITS = dict(zip(("train", "test"), random_arrays((32, 32, 3), 10), strict=True))  # as the fixture cifar has
RNG = np.random.default_rng(11)
WEIGHT = RNG.standard_normal((3 * 32 * 32, 10)).astype(np.float32) / 50
BIAS = RNG.standard_normal(10).astype(np.float32)
MODULE = """
import collections
import dataclasses
import functools

import torch

class As(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)

@dataclasses.dataclass
class Output:
    loss: object
    logits: object

Auxiliary = collections.namedtuple("Auxiliary", "logits aux_logits")
FORMS = {
    "two_outputs": lambda x: (x, -x),
    "one_entry": lambda x: {"out": x},
    "mapping": lambda x: {"features": -x, "logits": x},
    "with_fields": lambda x: Output(None, x),
    "auxiliary": lambda x: Auxiliary(x, -x),
    "no_tensor": lambda x: {"features": x, "attention": x},
    "nothing": lambda x: None,
}
for name, form in FORMS.items():
    globals()[name] = functools.partial(lambda form: torch.nn.Sequential(build(), As(form)), form)

def build(size=3072):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(size, 10))

class Takes(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        if x.dtype != self.dtype:
            raise TypeError(f"{x.dtype}, not {self.dtype}")
        return x.float()

def bytes(): return torch.nn.Sequential(Takes(torch.uint8), build())
def halves(): return torch.nn.Sequential(Takes(torch.float16), build())
def pretrained():
    module = build()
    module.load_state_dict(torch.load("w.pt", weights_only=True))
    return module
def narrow(): return build(27)
def deep(): return torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(9)])
def number(): return 3
def failing(): raise RuntimeError("no such luck,\\nreally")
def with_argument(size): return build(size)
"""


@pytest.fixture(autouse=True)
def work(cifar):
    """The empty working folder, where each test imports modules of its own."""
    yield Path.cwd()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("model", "package")]:
        del sys.modules[name]


@pytest.fixture
def export(capsys):
    """Run the command; return (exit code, stdout, stderr)."""

    def run(*args):
        with pytest.raises(SystemExit) as end:
            main(["teacher", *map(str, args)], prog_name="cupyep")
        streams = capsys.readouterr()
        return end.value.code, streams.out, streams.err

    return run


@pytest.fixture
def refused(export, work):
    """Run the command; assert that it gives one line, and changes no file; return (exit code, that line)."""

    def run(*args):
        before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if "__pycache__" not in path.parts}
        code, out, err = export(*args)
        assert out == ""
        err = err.strip()  # an interruption begins with a line break, behind the ^C of the terminal
        assert err.startswith("Error: ")
        assert "\n" not in err
        assert {p: p.stat().st_mtime_ns for p in work.rglob("*") if "__pycache__" not in p.parts} == before
        return code, err

    return run


def onnx_model(path, batch="N", shape=(3, 32, 32), classes=10, inputs=1, dtype="FLOAT", second="", weight=None):
    """Write cast, flatten, then one dense map with WEIGHT and BIAS (or zeros, where they do not fit).

    The images are of `dtype`; an output called `second` is minus the logits, and comes first.
    """
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    fits = (int(np.prod(shape)), classes) == WEIGHT.shape
    if weight is None:
        weight = WEIGHT if fits else np.zeros((int(np.prod(shape)), classes), np.float32)
    names = [f"x{k}" for k in range(inputs)]
    nodes = [
        helper.make_node("Cast", ["x0"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["logits"]),
    ]
    nodes += [helper.make_node("Neg", ["logits"], [second])] if second else []
    graph = helper.make_graph(
        nodes,
        "teacher",
        [helper.make_tensor_value_info(name, getattr(TensorProto, dtype), [batch, *shape]) for name in names],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, classes])
            for name in filter(None, (second, "logits"))
        ],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(BIAS[:classes], "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def expected_logits(split, layout="nchw", mean=None, std=None):
    """Return the logits of both views, (2, N, 10), in float64 from the raw pixels."""
    train = SPLITS["train"][0] / 255
    mean = train.mean(axis=(0, 1, 2)) if mean is None else np.array(mean)
    std = train.std(axis=(0, 1, 2)) if std is None else np.array(std)
    images = (SPLITS[split][0] / 255 - mean) / std
    views = np.stack([images, images[:, :, ::-1]])
    views = views.transpose(0, 1, 4, 2, 3) if layout == "nchw" else views
    return views.reshape(2, len(images), -1) @ WEIGHT.astype(np.float64) + BIAS


def check_file(path, out, atol=1e-4, **teacher):
    """Assert that the file holds the expected logits, and that the accuracies stored and printed are theirs."""
    words = []
    with h5py.File(path) as file:
        assert list(file.attrs["views"]) == ["identity", "hflip"]
        for split, (_, labels) in SPLITS.items():
            wanted = expected_logits(split, **teacher)
            np.testing.assert_allclose(file[f"{split}/logits"], wanted, rtol=1e-4, atol=atol)
            np.testing.assert_array_equal(file[f"{split}/labels"], labels)
            accuracy = (wanted[0].argmax(axis=1) == labels).mean()
            assert file[split].attrs["accuracy"] == pytest.approx(accuracy)
            words.append(f"{split} accuracy {accuracy:.2%}")
    assert out == f"{path}: {', '.join(words)}\n"


# --- ONNX -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("batch", ["N", 7])  # 7 divides neither 50 nor 10 nor a batch of 25
def test_onnx_logits_of_both_views(layout, batch, export, work):
    model = onnx_model("model.onnx", batch, (3, 32, 32) if layout == "nchw" else (32, 32, 3))
    code, out, err = export("--onnx", model, "--layout", layout, "--batch-size", 25, "--output", "t.h5", "--quiet")
    assert (code, err) == (0, "")
    check_file(Path("t.h5"), out, layout=layout)
    assert sorted(p.name for p in work.iterdir()) == ["model.onnx", "t.h5"]
    with ep.TeacherFile("t.h5") as file:
        file.check(ep.load_dataset("cifar10"))
        assert file.teacher == f"model.onnx, cupyep {ep.__version__}"


@pytest.mark.parametrize(
    "given",
    [
        {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
        {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.25, 0.3]},
        {"std": [0.2, 0.25, 0.3]},  # the other one is the data set's
        {"mean": [0.3, 0.4, 0.5]},
    ],
)
def test_a_teacher_with_its_own_normalisation(given, export):
    model = onnx_model("model.onnx")
    options = [word for name, numbers in given.items() for word in (f"--{name}", ",".join(map(str, numbers)))]
    code, out, _ = export("--onnx", model, *options, "--teacher-name", "mine", "--output", "t.h5")
    assert code == 0
    check_file(Path("t.h5"), out, **given)
    with ep.TeacherFile("t.h5") as file:
        assert file.teacher == "mine"


def test_limits_and_a_data_set_without_mirrored_view(export):
    pytest.importorskip("sklearn")
    model = onnx_model("model.onnx", shape=(1, 8, 8))
    options = ["--dataset", "digits", "--limit-train", 30, "--limit-test", 4]
    assert export("--onnx", model, *options, "--output", "t.h5")[0] == 0
    with h5py.File("t.h5") as file:
        assert list(file.attrs["views"]) == ["identity"]
        assert file["train/logits"].shape == (1, 30, 10)
        np.testing.assert_allclose(file["test/logits"], np.broadcast_to(BIAS, (1, 4, 10)), rtol=1e-5)


# --- PyTorch --------------------------------------------------------------------------------------------------------


def torch_model(name="model", weights=None):
    """Write the module and a state dict with WEIGHT and BIAS; return torch."""
    torch = pytest.importorskip("torch")
    Path(f"{name}.py").write_text(MODULE)
    torch.save(weights or {"2.weight": torch.from_numpy(WEIGHT.T.copy()), "2.bias": torch.from_numpy(BIAS)}, "w.pt")
    return torch


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_torch_logits_of_both_views(layout, export):
    """The module has a dropout layer: it is off."""
    torch_model()
    options = ["--torch", "model:build", "--weights", "w.pt", "--layout", layout, "--output", "t.h5"]
    code, out, err = export(*options, "--batch-size", 25)
    assert (code, err) == (0, "")
    check_file(Path("t.h5"), out, layout=layout)


def test_torch_factory_of_a_package_and_own_normalisation(export):
    torch_model()
    Path("package").mkdir()
    Path("model.py").rename("package/nets.py")
    options = ["--mean", "0,0,0", "--std", "1,1,1", "--output", "t.h5"]
    code, out, _ = export("--torch", "package.nets:build", "--weights", "w.pt", *options)
    assert code == 0
    check_file(Path("t.h5"), out, mean=[0, 0, 0], std=[1, 1, 1])


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_code_in_a_weights_file_is_not_executed(how, refused):
    torch = torch_model()
    if how == "pickle":
        Path("w.pt").write_bytes(pickle.dumps({"2.weight": Malicious()}))
    else:
        torch.save({"2.weight": Malicious()}, "w.pt")
    code, line = refused("--torch", "model:build", "--weights", "w.pt", "--output", "t.h5")
    assert code == 1
    what = f" ({os.mkdir.__module__}.mkdir)" if how == "torch.save" else ""
    assert line == (
        f"Error: w.pt is damaged or holds more than weights{what}; save them by torch.save(model.state_dict(), ...)"
    )
    assert not Path("executed").exists()
    if how == "pickle":
        pickle.loads(Path("w.pt").read_bytes())
    else:
        torch.load("w.pt", weights_only=False)
    assert Path("executed").exists(), "the file is as malicious as it should be"


def own_state(torch):
    return {"2.weight": torch.from_numpy(WEIGHT.T.copy()), "2.bias": torch.from_numpy(BIAS)}


def under(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


CHECKPOINTS = {
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
    "model": lambda state: {"model": state, "args": {"lr": 0.1}},
    "net": lambda state: {"net": state, "acc": 93.1},
    "DataParallel": under("module."),
    "compiled": under("_orig_mod."),
    "compiled, parallel, in a checkpoint": lambda state: {"model": under("module._orig_mod.")(state)},
    "Lightning": lambda state: {"pytorch-lightning_version": "2", "state_dict": under("model.")(state)},
    "averaged": lambda state: {"n_averaged": state["2.bias"][0], **under("module.")(state)},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_weights_in_a_checkpoint_are_found(case, export):
    torch = torch_model()
    torch.save(CHECKPOINTS[case](own_state(torch)), "w.pt")
    code, out, err = export("--torch", "model:build", "--weights", "w.pt", "--output", "t.h5")
    assert (code, err) == (0, "")
    check_file(Path("t.h5"), out)


def test_a_name_that_the_module_has_itself_is_not_a_prefix():
    state = {"module.weight": np.ones(2), "module.bias": np.ones(1)}
    assert unwrapped(state, state.keys(), Path("w.pt")) == state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"epoch": 3, "optimizer": {}, "args": {}},
            "w.pt holds 'epoch, optimizer, args' and no state dict (looked for",
        ),
        ([1, 2], "w.pt holds list and no state dict"),
        ({}, "w.pt holds '' and no state dict"),
    ],
)
def test_a_checkpoint_without_weights_says_what_it_holds(content, message, refused):
    torch = torch_model()
    torch.save(content, "w.pt")
    code, line = refused("--torch", "model:build", "--weights", "w.pt", "--output", "t.h5")
    assert code == 1
    assert message in line


def test_a_checkpoint_that_holds_itself_comes_to_an_end(refused):
    torch = torch_model()
    content = {}
    content["model"] = content
    torch.save(content, "w.pt")
    assert "no state dict" in refused("--torch", "model:build", "--weights", "w.pt", "--output", "t.h5")[1]


def test_safetensors(export, refused, monkeypatch):
    torch = torch_model()
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(under("module.")(own_state(torch)), "w.safetensors")
    options = ["--torch", "model:build", "--weights", "w.safetensors", "--output", "t.h5"]
    code, out, err = export(*options)
    assert (code, err) == (0, "")
    check_file(Path("t.h5"), out)
    Path("t.h5").unlink()
    content = Path("w.safetensors").read_bytes()
    for damaged in (b"", content[:9], content[:-1], b"\xff" * 8 + content[8:]):
        Path("w.safetensors").write_bytes(damaged)
        code, line = refused(*options)
        assert (code, "w.safetensors is not a readable safetensors file" in line) == (1, True)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    code, line = refused(*options)
    assert (code, line) == (2, "Error: w.safetensors needs safetensors: pip install safetensors")


@pytest.mark.parametrize("factory", ["two_outputs", "one_entry", "mapping", "with_fields", "auxiliary"])
def test_logits_are_found_in_what_a_module_returns(factory, export):
    torch = pytest.importorskip("torch")
    torch_model(weights=under("0.")(own_state(torch)))
    code, out, err = export("--torch", f"model:{factory}", "--weights", "w.pt", "--output", "t.h5")
    assert (code, err) == (0, "")
    check_file(Path("t.h5"), out)


@pytest.mark.parametrize("name", ["net.pt", "net.PTH", "net.safetensors", "my net.onnx"])
def test_a_model_given_as_teacher_file_is_told_how_to_become_one(name):
    """The command that is named has options that there are."""
    Path(name).write_bytes(b"whatever")
    with pytest.raises(ep.TeacherError, match=f"'{name}' is a model, no teacher file; make one of it by: ") as error:
        ep.TeacherFile(name)
    command = shlex.split(str(error.value).partition("make one of it by: ")[2])
    assert command[:2] == ["cupyep", "teacher"]
    known = {option for parameter in teacher.params for option in parameter.opts}
    assert {word for word in command if word.startswith("--")} < known
    assert name in command


WRONG_TORCH = {
    "model": (2, "--torch takes package.module:factory, not 'model'"),
    "../model:build": (2, "--torch takes package.module:factory"),
    "model:missing": (2, "module 'model' has no attribute 'missing'; run from the folder that holds model"),
    "elsewhere.nets:build": (2, "No module named 'elsewhere'; run from the folder that holds elsewhere"),
    "model:number": (1, "returned int, not a torch.nn.Module"),
    "model:failing": (1, "--torch model:failing: RuntimeError: no such luck, really"),
    "model:with_argument": (1, "missing 1 required positional argument"),
    "model:narrow": (
        1,
        "w.pt does not hold the weights of model:narrow; of another shape: 2.weight (10, 3072) for (10,",
    ),
    "model:two_outputs": (1, "missing: 0.2.weight, 0.2.bias; unexpected: 2.weight, 2.bias"),
    "model:deep": (1, "missing: 0.weight, 0.bias, 1.weight, 1.bias and 12 more; of another shape: 2.weight"),
}


@pytest.mark.parametrize("factory", WRONG_TORCH)
def test_wrong_torch_module(factory, refused):
    torch_model()
    code, line = refused("--torch", factory, "--weights", "w.pt", "--output", "t.h5")
    assert (code, WRONG_TORCH[factory][1] in line) == (WRONG_TORCH[factory][0], True), line


@pytest.mark.parametrize(
    ("factory", "key", "message"),
    [
        ("narrow", "2", "model:narrow cannot run on images of shape (50, 3, 32, 32): RuntimeError"),
        ("no_tensor", "0.2", "model:no_tensor returns dict with features, attention; wanted: a tensor of logits, or"),
        ("nothing", "0.2", "model:nothing returns NoneType; wanted: a tensor of logits"),
    ],
)
def test_a_torch_module_that_cannot_run(factory, key, message, refused):
    torch = pytest.importorskip("torch")
    size = 27 if factory == "narrow" else 3072
    torch_model(weights={f"{key}.weight": torch.zeros(10, size), f"{key}.bias": torch.zeros(10)})
    code, line = refused("--torch", f"model:{factory}", "--weights", "w.pt", "--output", "t.h5")
    assert code == 1
    assert message in line


@pytest.mark.parametrize(("device", "code"), [("cuda", 1), ("cuda:3", 1), ("gpu", 2)])
def test_a_device_that_torch_has_not(device, code, refused, monkeypatch):
    torch = torch_model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    got, line = refused("--torch", "model:build", "--weights", "w.pt", "--device", device, "--output", "t.h5")
    assert got == code
    assert line.startswith(
        f"Error: device '{device}' cannot be used for this teacher: PyTorch finds no CUDA device"
        if code == 1
        else f"Error: unknown device '{device}' (choose from auto, cpu, cuda, cuda:N)"
    )


# --- which images, which output -------------------------------------------------------------------------------------


def logits_in(path, split="train"):
    with h5py.File(path) as file:
        return file[f"{split}/logits"][...]


def test_the_tool_is_the_command(capsys):
    spec = importlib.util.spec_from_file_location("export_teacher_logits", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = onnx_model("model.onnx")
    with pytest.raises(SystemExit) as end:
        module.main(["--onnx", str(model), "--output", "t.h5"], prog_name="export_teacher_logits.py")
    assert not end.value.code
    check_file(Path("t.h5"), capsys.readouterr().out)


def test_a_factory_that_loads_its_own_weights(export):
    torch_model()
    code, out, err = export("--torch", "model:pretrained", "--output", "t.h5")
    assert (code, err) == (0, "")
    check_file(Path("t.h5"), out)
    with ep.TeacherFile("t.h5") as file:
        assert file.teacher.startswith("model:pretrained with its own weights")


@pytest.mark.parametrize("version", ["2.5.1+cpu", "1.13.0", "strange"])
def test_a_file_is_not_given_to_a_torch_that_would_run_code_in_it(version, refused, export, monkeypatch):
    torch = torch_model()
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was read"))
    code, line = refused("--torch", "model:build", "--weights", "w.pt", "--output", "t.h5")
    assert code == 2
    assert line.startswith(f"Error: w.pt could run code in PyTorch {version} (CVE-2025-32434): update PyTorch to 2.6")
    if not version.startswith("2"):  # safetensors reads the version, too
        return
    pytest.importorskip("safetensors.torch").save_file(own_state(torch), "w.safetensors")
    code, out, _ = export("--torch", "model:build", "--weights", "w.safetensors", "--output", "t.h5")
    assert code == 0
    check_file(Path("t.h5"), out)


@pytest.mark.parametrize("kind", ["torch", "onnx", "onnx asked"])
def test_a_teacher_that_takes_pixels_as_bytes(kind, export):
    """The logits are those of the stored pixels, from 0 to 255."""
    if kind == "torch":
        torch = pytest.importorskip("torch")
        torch_model(weights=under("1.")(own_state(torch)))
        options = ["--torch", "model:bytes", "--weights", "w.pt", "--input-dtype", "uint8"]
    else:
        options = ["--onnx", onnx_model("model.onnx", dtype="UINT8")]
        options += ["--input-dtype", "uint8"] if kind == "onnx asked" else []
    code, out, err = export(*options, "--output", "t.h5")
    assert (code, err) == (0, "")
    check_file(Path("t.h5"), out, atol=255e-4, mean=[0, 0, 0], std=[1 / 255] * 3)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_teacher_that_takes_halves(kind, export):
    if kind == "torch":
        torch = pytest.importorskip("torch")
        torch_model(weights=under("1.")(own_state(torch)))
        options = ["--torch", "model:halves", "--weights", "w.pt", "--input-dtype", "float16"]
    else:
        options = ["--onnx", onnx_model("model.onnx", dtype="FLOAT16")]
    assert export(*options, "--output", "t.h5")[0] == 0
    # Pixels are off by 2^-11 of themselves, by less than that of 2 in the mean; the sum over 3072 is a random walk.
    np.testing.assert_allclose(logits_in("t.h5"), expected_logits("train"), atol=2 * 2**-11 * 4)
    assert abs(logits_in("t.h5") - expected_logits("train")).max() > 1e-5, "halves were asked for"


def test_images_of_the_size_that_the_teacher_takes(export):
    """Pillow makes them, channel by channel."""
    image = pytest.importorskip("PIL.Image")
    weight = RNG.standard_normal((3 * 20 * 20, 10)).astype(np.float32) / 20
    model = onnx_model("model.onnx", shape=(3, 20, 20), weight=weight)
    assert export("--onnx", model, "--resize", 20, "--output", "t.h5")[0] == 0
    pixels = SPLITS["train"][0] / 255
    pixels = ((pixels - pixels.mean(axis=(0, 1, 2))) / pixels.std(axis=(0, 1, 2))).astype(np.float32)
    for k, view in enumerate((pixels, pixels[:, :, ::-1])):
        planes = [
            [image.fromarray(np.ascontiguousarray(one[..., c])).resize((20, 20), image.Resampling.BILINEAR)
             for c in range(3)] for one in view
        ]  # fmt: skip
        small = np.array([[np.asarray(plane) for plane in one] for one in planes])
        np.testing.assert_allclose(logits_in("t.h5")[k], small.reshape(50, -1) @ weight + BIAS, atol=1e-4)


@pytest.mark.parametrize("name", [None, "logits", "1"])
def test_an_onnx_output_by_name_or_number(name, export):
    model = onnx_model("model.onnx", second="negative")
    code, out, _ = export("--onnx", model, *(["--logits", name] if name else []), "--output", "t.h5")
    assert code == 0
    check_file(Path("t.h5"), out)


@pytest.mark.parametrize("name", ["negative", "0"])
def test_another_onnx_output(name, export):
    model = onnx_model("model.onnx", second="negative")
    assert export("--onnx", model, "--logits", name, "--output", "t.h5")[0] == 0
    np.testing.assert_allclose(logits_in("t.h5"), -expected_logits("train"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("factory", "name", "sign"),
    [
        ("two_outputs", "0", 1), ("two_outputs", "1", -1), ("mapping", "features", -1), ("mapping", "1", 1),
        ("with_fields", "logits", 1), ("auxiliary", "aux_logits", -1), ("auxiliary", "1", -1),
    ],
)  # fmt: skip
def test_an_output_of_a_module_by_name_or_number(factory, name, sign, export):
    torch = pytest.importorskip("torch")
    torch_model(weights=under("0.")(own_state(torch)))
    options = ["--torch", f"model:{factory}", "--weights", "w.pt", "--logits", name]
    assert export(*options, "--output", "t.h5")[0] == 0
    np.testing.assert_allclose(logits_in("t.h5"), sign * expected_logits("train"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("factory", "name", "message"),
    [
        ("two_outputs", "2", "returns tuple of 2; wanted: something with --logits 2"),
        ("mapping", "scores", "returns dict with features, logits; wanted: something with --logits scores"),
        ("with_fields", "loss", "returns Output; wanted: something with --logits loss"),
    ],
)
def test_an_output_that_a_module_has_not(factory, name, message, refused):
    torch = pytest.importorskip("torch")
    torch_model(weights=under("0.")(own_state(torch)))
    options = ["--torch", f"model:{factory}", "--weights", "w.pt", "--logits", name]
    code, line = refused(*options, "--output", "t.h5")
    assert (code, message in line) == (1, True), line


def own_file(dtype=np.uint8):
    """Write 60 images of 2 classes, 4 x 4, the second brighter; return the arrays."""
    rng = np.random.default_rng(3)
    labels = np.arange(60) % 2
    images = (rng.integers(0, 100, (60, 4, 4, 3)) + 100 * labels[:, None, None, None]).astype(dtype)
    np.savez("own.npz", x=images, y=labels)
    return images, labels


def test_a_teacher_of_own_data(export):
    """The part for testing is the one that a run of the same options sets apart."""
    images, _ = own_file()
    stored = {image.tobytes() for image in images}
    brightness = np.stack([-np.ones(48), np.ones(48)], axis=1).astype(np.float32)
    model = onnx_model("model.onnx", shape=(3, 4, 4), classes=2, weight=brightness)
    options = ["--dataset", "file:own.npz", "--test-fraction", 0.3, "--seed", 5]
    code, out, err = export("--onnx", model, *options, "--output", "t.h5")
    assert (code, err) == (0, "")
    data = ep.load_dataset("file:own.npz", test_fraction=0.3, seed=5)
    assert (len(data.train), len(data.test)) == (42, 18)
    with ep.TeacherFile("t.h5") as file:
        file.check(data)
    assert {image.tobytes() for image in data.test.images} < stored
    normal = (np.asarray(data.test.images) / 255 - data.mean) / data.std
    total = normal.reshape(18, -1).sum(axis=1)
    np.testing.assert_allclose(logits_in("t.h5", "test")[0][:, 1], total + BIAS[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("knows", [False, True])
def test_a_teacher_that_knows_nothing_is_warned_of(knows, export):
    """One that says for all images the same is right by chance."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    means = np.stack([digits.images[digits.target == c].mean(axis=0).ravel() for c in range(10)], axis=1)
    weight = (means - means.mean(axis=1, keepdims=True)) if knows else np.zeros((64, 10))
    model = onnx_model("model.onnx", shape=(1, 8, 8), weight=weight.astype(np.float32))
    code, out, err = export("--onnx", model, "--dataset", "digits", "--output", "t.h5")
    assert code == 0
    assert "test accuracy" in out
    assert ("Warning: this teacher knows no more of the labels than chance" in err) is not knows


# --- a teacher trained here -----------------------------------------------------------------------------------------


def test_train_bp_on_digits(export, work):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    options = ["--dataset", "digits", "--image-size", 16, "--batch-size", 16, "--epochs", 2, "--seed", 1]
    code, out, err = export("--train-bp", "vgg5", *options, "--width", 0.05, "--device", "cpu", "--output", "t.h5")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["epoch 1/2", "epoch 2/2"]
    with h5py.File("t.h5") as file:
        for split, labels in (("train", digits.target[:1437]), ("test", digits.target[1437:])):
            np.testing.assert_array_equal(file[f"{split}/labels"], labels)
            accuracy = (file[f"{split}/logits"][0].argmax(axis=1) == labels).mean()
            assert file[split].attrs["accuracy"] == pytest.approx(accuracy)
            assert f"{split} accuracy {accuracy:.2%}" in lines[-1]
            assert accuracy > 0.25, "chance is 0.1"
        assert file.attrs["teacher"] == f"vgg5 trained by backpropagation, 2 epochs, cupyep {ep.__version__}"
    assert f"test accuracy {accuracy:.2%}" in lines[-1]
    assert f"acc {accuracy:.2%}" in lines[-2], "the logits are those of the trained network"
    assert [p.name for p in work.iterdir()] == ["t.h5"]


# --- wrong use ------------------------------------------------------------------------------------------------------

OUT = ["--output", "t.h5"]
MODEL = ["--onnx", "model.onnx"]
WRONG = {
    "no teacher": (OUT, 2, "name one teacher: --onnx FILE, or --torch"),
    "two teachers": ([*MODEL, "--train-bp", "vgg5", *OUT], 2, "name one teacher"),
    "weights without torch": ([*MODEL, "--weights", "w.pt", *OUT], 2, "--weights is for --torch, not for --onnx"),
    "epochs of an ONNX model": ([*MODEL, "--epochs", 3, *OUT], 2, "--epochs is for --train-bp, not for --onnx"),
    "own mean for --train-bp": (["--train-bp", "vgg5", "--mean", 0, *OUT], 2, "--mean is for --onnx and --torch"),
    "no output": (MODEL, 2, "Missing option '--output'"),
    "output nowhere": ([*MODEL, "--output", "no/t.h5"], 2, "--output: there is no folder 'no'"),
    "output is a folder": ([*MODEL, "--output", "."], 2, "is a folder"),
    "no model": (["--onnx", "none.onnx", *OUT], 2, "--onnx: there is no file none.onnx"),
    "no model but junk": (["--onnx", "junk.onnx", *OUT], 1, "junk.onnx is not an ONNX model that can be run"),
    "two inputs": (["--onnx", "two.onnx", *OUT], 1, "two.onnx has 2 inputs (x0, x1); one is needed"),
    "other image size": (["--onnx", "large.onnx", *OUT], 1, "large.onnx cannot run on images of shape (50, 3, 32, 32)"),
    "other layout": ([*MODEL, "--layout", "nhwc", *OUT], 1, "model.onnx cannot run on images of shape (50, 32, 32, 3)"),
    "other classes": (["--onnx", "seven.onnx", *OUT], 1, "logits have shape (50, 7), expected (50, 10)"),
    "layout misspelt": ([*MODEL, "--layout", "nhcw", *OUT], 2, "unknown --layout 'nhcw'; did you mean 'nhwc'?"),
    "option misspelt": (["--onyx", "model.onnx", *OUT], 2, "no such option '--onyx'; did you mean '--onnx'?"),
    "unknown data set": ([*MODEL, "--dataset", "cifar11", *OUT], 2, "unknown --dataset 'cifar11'"),
    "missing data": ([*MODEL, "--data-dir", "empty", *OUT], 1, "/empty (no "),
    "too few means": ([*MODEL, "--mean", "0,0", *OUT], 2, "--mean needs 3 numbers for cifar10, one a channel"),
    "mean is not finite": ([*MODEL, "--mean", "0,nan,0", *OUT], 2, "--mean needs 3 numbers"),
    "mean is no number": ([*MODEL, "--mean", "0,a", *OUT], 2, "'0,a' is neither a number nor numbers with commas"),
    "std 0": ([*MODEL, "--std", "1,0,1", *OUT], 2, "--std must be above 0 (got [1.0, 0.0, 1.0])"),
    "unknown device": ([*MODEL, "--device", "gpu", *OUT], 2, "unknown device 'gpu'"),
    "unknown architecture": (["--train-bp", "vgg8", *OUT], 2, "unknown --train-bp 'vgg8'; did you mean 'vgg"),
    "no such output": (
        [*MODEL, "--logits", "scores", *OUT],
        2,
        "--logits: model.onnx has no output 'scores', but",
    ),
    "no such number": ([*MODEL, "--logits", 1, *OUT], 2, "--logits: model.onnx has no output '1', but logits"),
    "dtype": ([*MODEL, "--input-dtype", "uint16", *OUT], 2, "unknown --input-dtype 'uint16'; did you mean 'uint8'"),
    "other dtype": ([*MODEL, "--input-dtype", "uint8", *OUT], 1, "model.onnx cannot run on images of shape"),
    "mean of bytes": ([*MODEL, "--input-dtype", "uint8", "--mean", "0,0,0", *OUT], 2, "no --mean, no --std"),
    "size 0": ([*MODEL, "--resize", 0, *OUT], 2, "'--resize': 0 is not in the range"),
    "resize --train-bp": (["--train-bp", "vgg5", "--resize", 64, *OUT], 2, "--resize is for --onnx and --torch, not"),
    "floats as bytes": ([*MODEL, "--dataset", "file:own.npz", "--input-dtype", "uint8", *OUT], 2, "npz are floats"),
    "fraction of a named set": ([*MODEL, "--test-fraction", 0.3, *OUT], 2, "--test-fraction needs --dataset file:PATH"),
    "no epochs": (["--train-bp", "vgg5", "--epochs", 0, *OUT], 2, "'--epochs': 0 is not in the range"),
    "width": (["--train-bp", "vgg5", "--width", "-1", *OUT], 2, "--width must be above 0 (got -1.0)"),
    "limit": ([*MODEL, "--limit-train", 51, *OUT], 2, "cifar10 has 50 train images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line_and_leaves_nothing(case, refused, monkeypatch):
    monkeypatch.setattr("cupyep.data.loading.fetch", lambda *_: "no network")
    onnx_model("model.onnx")
    onnx_model("large.onnx", shape=(3, 64, 64))
    onnx_model("seven.onnx", classes=7)
    onnx_model("two.onnx", inputs=2)
    Path("junk.onnx").write_bytes(b"junk")
    own_file(np.float32)
    args, wanted, message = WRONG[case]
    code, line = refused(*args)
    assert message in line
    assert code == wanted


def test_no_gpu_for_onnx(refused, monkeypatch):
    onnx_model("model.onnx")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    code, line = refused(*MODEL, *OUT, "--device", "cuda:0")
    assert code == 1
    assert line.startswith("Error: device 'cuda:0' cannot be used for this teacher: this onnxruntime was built without")


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (MemoryError("8 GiB"), 1), (ValueError(), 1)])
def test_an_export_that_ends_early_keeps_the_old_file(stop, code, refused, monkeypatch):
    """The third batch, in the middle of the training split, fails."""
    onnx_model("model.onnx")
    Path("t.h5").write_bytes(b"the old one")
    session = pytest.importorskip("onnxruntime").InferenceSession
    calls = []

    class Failing:
        def __init__(self, *args, **more):
            self.session = session(*args, **more)
            self.get_inputs, self.get_outputs = self.session.get_inputs, self.session.get_outputs

        def run(self, *args):
            calls.append(1)
            if len(calls) == 3:
                raise stop
            return self.session.run(*args)

    monkeypatch.setattr("onnxruntime.InferenceSession", Failing)
    assert refused(*MODEL, *OUT, "--batch-size", 10)[0] == code
    assert len(calls) == 3
    assert Path("t.h5").read_bytes() == b"the old one"


def test_missing_libraries_are_named(refused, monkeypatch):
    for name, extra in (("onnxruntime", 'pip install "cupyep[teacher]"'), ("torch", "https://pytorch.org")):
        monkeypatch.setitem(sys.modules, name, None)
        args = MODEL if name == "onnxruntime" else ["--torch", "model:build", "--weights", "w.pt"]
        code, line = refused(*args, *OUT)
        assert code == 2
        assert extra in line


def test_help_names_every_teacher(export):
    code, out, _ = export("--help-all")
    assert code == 0
    for word in ("--onnx", "--torch", "--train-bp", "--weights", "--layout", "--mean", "--std", "Examples:"):
        assert word in out
