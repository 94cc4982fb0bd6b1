"""The model table. Oracle: counting and sizes by hand."""

import numpy as np
import pytest

import cupyep as ep
from cupyep.graph import Connection
from cupyep.layers import Conv2d, Identity, Linear
from cupyep.models import TABLE, default_gain, slug
from cupyep.training.build import build_network
from cupyep.training.config import TrainConfig
from cupyep.training.run_directory import default_path
from cupyep.training.teacher import teacher_config

SIZES = {  # sides of the state maps for 32 x 32 images, by hand: 3 x 3 with padding 1 keeps the size, a pool halves it
    5: [16, 8, 4, 1],  # the last convolution is unpadded: 4 -> 2, pooled to 1
    7: [32, 16, 16, 8, 4, 2],
    9: [32, 16, 16, 8, 8, 4, 4, 2],
    11: [32, 16, 16, 16, 8, 8, 8, 4, 4, 2],
    12: [32, 16, 16, 16, 8, 8, 8, 4, 4, 4, 2],
    16: [32, 16, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2, 2, 1],
}


@pytest.mark.parametrize("depth", SIZES)
def test_vgg_n_has_n_weight_layers(depth):
    """Readout included, whether it is a softmax or the last state."""
    for loss in ("cross_entropy", "squared_error"):
        net = ep.vgg(depth, width=0.03, loss=loss, device="cpu", feedback=1.0)
        assert sum(path.endswith(".weight") for path in net.parameters()) == depth


@pytest.mark.parametrize("depth", SIZES)
def test_sizes_and_channels(depth):
    net = ep.vgg(depth, width=1 / 64, device="cpu", feedback=1.0)
    assert [shape[0] for shape in net.state_shapes] == SIZES[depth]
    assert [shape[1] for shape in net.state_shapes] == SIZES[depth]
    # 128, 256 and 512 channels at a 64th of the width; the number doubles after the first pools and stops at 512
    assert {shape[2] for shape in net.state_shapes} == {2, 4, 8}
    channels = [shape[2] for shape in net.state_shapes]
    assert channels == sorted(channels)
    assert TABLE[f"vgg{depth}"].layers.count("p") == {5: 4, 7: 4, 9: 4, 11: 4, 12: 4, 16: 5}[depth]


def test_published_vgg5():
    """Laborieux et al. (2021): 128, 256, 512, 512 channels, four pools, 10 outputs."""
    net = ep.vgg(5, width=1.0, device="cpu", input_shape=(32, 32, 3), feedback=1.0)
    assert net.state_shapes == [(16, 16, 128), (8, 8, 256), (4, 4, 512), (1, 1, 512)]
    assert net.parameters()["layers.1.weight"].shape == (3, 3, 3, 128)
    assert net.parameters()["readout.weight"].shape == (512, 10)


@pytest.mark.parametrize(
    ("depth", "size", "channels"), [(5, 28, 1), (5, 16, 3), (7, 28, 1), (7, 16, 3), (9, 28, 1), (11, 16, 3)]
)
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_other_image_sizes_settle_and_learn(depth, size, channels, pooling):
    net = ep.vgg(depth, input_shape=(size, size, channels), width=0.02, pooling=pooling, device="cpu", feedback=1.0)
    images = np.random.default_rng(0).uniform(0, 1, (2, size, size, channels))
    result = ep.EquilibriumPropagation(net, free_steps=3, nudged_steps=2, schedule="synchronous").step(images, [3, 7])
    assert set(result.gradients) == set(net.parameters())
    assert float(abs(result.gradients["readout.weight"]).max()) > 0
    assert net.predict(images, steps=3, schedule="synchronous").shape == (2,)


@pytest.mark.parametrize(
    ("depth", "shape", "parts"),
    [
        (5, (15, 15, 3), ["15x15", "vgg5", "4 times", "at least 16 pixels"]),
        (11, (8, 8, 3), ["8x8", "vgg11", "at least 16 pixels"]),
        (16, (28, 28, 1), ["28x28", "vgg16", "5 times", "at least 32 pixels"]),
        (7, (32, 4, 3), ["32x4", "vgg7", "at least 16 pixels"]),
    ],
)
def test_too_small_images_are_one_line(depth, shape, parts):
    with pytest.raises(ep.ConfigurationError) as error:
        ep.vgg(depth, input_shape=shape, device="cpu", feedback=1.0)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("depth", SIZES)
def test_the_smallest_size_named_is_enough(depth):
    size = 2 ** TABLE[f"vgg{depth}"].layers.count("p")
    assert ep.vgg(depth, input_shape=(size, size, 3), width=0.01, device="cpu", feedback=1.0).state_shapes[-1][0] == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"classes": 7, "input_shape": (16, 20, 1), "width": 0.05, "activation": "tanh", "pooling": "average"},
        {"loss": "squared_error", "feedback": 0.1, "gain": 0.9, "seed": 5, "precision": "float64"},
        {"gain": [0.4, 0.7, 0.6, 0.3]},
    ],
)
def test_config_rebuilds_the_network(options):
    """The same parameters, shapes and settled states, from the configuration alone."""
    net = ep.build("vgg5", **({"width": 0.03, "feedback": 1.0, "device": "cpu"} | options))
    again = ep.build(**net.config, device="cpu")
    assert again.config == net.config
    assert again.parameters().keys() == net.parameters().keys()
    for path, p in net.parameters().items():
        np.testing.assert_array_equal(p, again.parameters()[path])
        assert p.dtype == again.parameters()[path].dtype
    x = np.random.default_rng(0).uniform(0, 1, (2, *net.input_shape))
    for a, b in zip(
        net.settle(x, steps=3, schedule="synchronous").layers,
        again.settle(x, steps=3, schedule="synchronous").layers,
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_seed_and_width_matter():
    a, b = (ep.vgg(5, width=0.03, seed=seed, device="cpu", feedback=1.0) for seed in (0, 1))
    assert not np.array_equal(a.parameters()["layers.1.weight"], b.parameters()["layers.1.weight"])
    assert ep.vgg(5, width=1e-6, device="cpu", feedback=1.0).state_shapes[0] == (16, 16, 1)


def test_default_gain_by_activation_and_feedback():
    """A slope of one half wants twice the gain; strong feedback wants less."""
    assert default_gain("half_hard_sigmoid", 1.0) == 2 * default_gain("hard_sigmoid", 1.0)
    assert default_gain("hard_sigmoid", 0.1) > default_gain("hard_sigmoid", 1.0)
    assert default_gain(ep.ACTIVATIONS["half_hard_sigmoid"], 0.1) == default_gain("half_hard_sigmoid", 0.1)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ep.build("vgg6", feedback=1.0), "did you mean 'vgg"),
        (lambda: ep.build("resnet", feedback=1.0), "choose from vgg5, vgg7"),
        (lambda: ep.vgg(6, feedback=1.0), "there is no VGG of depth 6"),
        (lambda: ep.build("", feedback=1.0), "unknown architecture ''"),
        (lambda: ep.build(7, feedback=1.0), "unknown architecture '7'"),
        (lambda: ep.build("hopfieldresnet13", feedback=1.0), "did you mean 'hopfield-resnet13'"),
        (lambda: ep.build("mlp", feedback=1.0), "or 'mlp:512,512'"),
        (lambda: ep.build("mlp:", feedback=1.0), "'' in 'mlp:' is no number of units"),
        (lambda: ep.build("mlp:64,x", feedback=1.0), "'x' in 'mlp:64,x' is no number of units"),
        (lambda: ep.build("32 64x", feedback=1.0), "'64x' is no layer or block"),
        (lambda: ep.build("32 64ps", feedback=1.0), "'64ps' is no layer or block"),
        (lambda: ep.build("32 64+", feedback=1.0), "'64[+]' is no layer or block"),
        (lambda: ep.build("+ 64 32", feedback=1.0), "'[+]64' is no layer or block"),
        (lambda: ep.build("64++64", feedback=1.0), "is no layer or block; write layers as in"),
        (lambda: ep.build("0", feedback=1.0), "'0' is no layer or block"),
        (lambda: ep.build("32\n64", feedback=1.0), r"'32\\n64' is no layer or block"),
        (lambda: ep.build("8 " * 257, feedback=1.0), "at most 256 layers, not 257"),
        (
            lambda: ep.build("8p+8s", input_shape=(6, 6, 3), feedback=1.0),
            r"block 1 makes \(2, 2\) of \(6, 6\), its skip \(1, 1\)",
        ),
        (
            lambda: ep.build("8p 8p", readout_pool=9, feedback=1.0),
            "readout_pool must be 'global', None or an integer from 1 to 8",
        ),
        (
            lambda: ep.build("8p", input_shape=(8, 6, 3), readout_pool="global", feedback=1.0),
            "needs a square last map, not 4x3",
        ),
        (lambda: ep.build("mlp:8", readout_pool="global", feedback=1.0), "needs a map as the last state"),
        (lambda: ep.build("8p", loss="squared_error", readout_pool=2, feedback=1.0), "there is no readout to pool for"),
        (lambda: ep.vgg(5, width=0, feedback=1.0), "width must be above 0"),
        (lambda: ep.vgg(5, classes=1, feedback=1.0), "classes must be an integer of at least 2"),
        (lambda: ep.vgg(5, input_shape=(32, 32), feedback=1.0), "input_shape"),
        (lambda: ep.vgg(5, pooling="none", feedback=1.0), "unknown pooling 'none'"),
        (lambda: ep.vgg(5, loss="cross-entropy", feedback=1.0), "did you mean 'cross_entropy'"),
    ],
)
def test_wrong_arguments_are_one_line(make, word):
    with pytest.raises(ep.ConfigurationError, match=word) as error:
        make()
    assert "\n" not in str(error.value)


# --- graphs ---------------------------------------------------------------------------------------------------------

# Hopfield-ResNet13 (arXiv 2509.26003): four blocks of 3 x 3, 3 x 3 of stride 2 and, around both, 1 x 1 of stride 2.
RESNET13 = {
    "layers.block1_1.weight": (3, 3, 3, 128),
    "layers.block1_2.weight": (3, 3, 128, 128),
    "layers.block1_2.image.weight": (1, 1, 3, 128),
    "layers.block2_1.weight": (3, 3, 128, 256),
    "layers.block2_2.weight": (3, 3, 256, 256),
    "layers.block2_2.block1_2.weight": (1, 1, 128, 256),
    "layers.block3_1.weight": (3, 3, 256, 512),
    "layers.block3_2.weight": (3, 3, 512, 512),
    "layers.block3_2.block2_2.weight": (1, 1, 256, 512),
    "layers.block4_1.weight": (3, 3, 512, 512),
    "layers.block4_2.weight": (3, 3, 512, 512),
    "layers.block4_2.block3_2.weight": (1, 1, 512, 512),
}
RESNET13_BIASES = {f"layers.block{n}_{k}.bias": (c,) for n, c in enumerate((128, 256, 512, 512), 1) for k in (1, 2)}
PLAIN = {"weights": "plain", "width": 1 / 32, "feedback": 1.0, "device": "cpu"}
EVERY = [*TABLE, "4 4p 8s", "4+4 4+8s+8p", "mlp:8,4"]


def shapes(net):
    return {path: tuple(p.shape) for path, p in net.parameters().items()}


def test_hopfield_resnet13_is_the_published_one():
    """13 weights, the readout of all of the last map included, on the classes or as their state."""
    net = ep.build("hopfield-resnet13", device="cpu", feedback=1.0)
    assert shapes(net) == RESNET13 | RESNET13_BIASES | {"readout.weight": (2048, 10), "readout.bias": (10,)}
    assert sum(path.endswith("weight") for path in net.parameters()) == 13
    sides = dict(zip(net.graph.names, net.state_shapes, strict=True))
    assert [sides[f"block{n}_{k}"][0] for n in (1, 2, 3, 4) for k in (1, 2)] == [32, 16, 16, 8, 8, 4, 4, 2]
    # 3 x 3: 9 (3 + 128) 128 + 9 (128 + 256) 256 + 9 (256 + 512) 512 + 9 (512 + 512) 512, 1 x 1, biases, readout
    by_hand = 150912 + 884736 + 3538944 + 4718592 + (384 + 32768 + 131072 + 262144) + 2 * 1408 + 20490
    assert sum(p.size for p in net.parameters().values()) == by_hand
    assert net.activation.name == "relu6"
    assert 0.6 <= default_gain("relu6", 1.0, TABLE["hopfield-resnet13"].gains) <= 0.8


def test_hopfield_resnet13_with_squared_error():
    net = ep.build("hopfield-resnet13", loss="squared_error", width=1 / 64, device="cpu", feedback=1.0)
    assert net.graph.names[-1] == "output"
    assert net.parameters()["layers.output.weight"].shape == (32, 10)
    assert net.readout.identity
    assert "readout.weight" not in net.parameters()


def residual_by_hand():
    """What "4 8p 8+8 12+12s 6" is, node by node."""
    image, after, small = (16, 16, 3), (8, 8, 8), (4, 4, 12)
    return [
        Connection("image", "conv1", Conv2d(image, 4)),
        Connection("conv1", "conv2", Conv2d((16, 16, 4), 8, pooling="max")),
        Connection("conv2", "block1_1", Conv2d(after, 8)),
        Connection("block1_1", "block1_2", Conv2d(after, 8)),
        Connection("conv2", "block1_2", Identity(after)),
        Connection("block1_2", "block2_1", Conv2d(after, 12)),
        Connection("block2_1", "block2_2", Conv2d((8, 8, 12), 12, stride=2)),
        Connection("block1_2", "block2_2", Conv2d(after, 12, kernel=1, stride=2, padding=0, bias=False)),
        Connection("block2_2", "conv3", Conv2d(small, 6)),
    ]


@pytest.mark.parametrize("text", ["4 8p 8+8 12+12s 6", "  4  8p 8 + 8 12+ 12s 6 "])
def test_a_residual_text_is_the_graph_written_by_hand(text):
    net = ep.build(text, input_shape=(16, 16, 3), gain=0.8, seed=3, device="cpu", feedback=1.0)
    own = ep.Network(residual_by_hand(), 10, gain=0.8, seed=3, device="cpu", feedback=1.0)
    assert net.describe() == own.describe()
    x = np.random.default_rng(0).uniform(0, 1, (2, 16, 16, 3))
    np.testing.assert_array_equal(
        net.scores(x, steps=4, schedule="synchronous"), own.scores(x, steps=4, schedule="synchronous")
    )


def test_the_skip_of_a_block_has_its_strides_and_pools():
    net = ep.build("4+6s+6p", input_shape=(16, 16, 3), pooling="average", device="cpu", feedback=1.0)
    skip = net.layers[-1]
    assert net.graph.paths[-1] == "layers.block1_3.image"
    assert net.graph.depths == [1, 2, 3]
    assert (skip.kernel, skip.stride, skip.padding, skip.pooling, skip.pool) == (1, 2, 0, "average", 2)
    assert skip.out_shape == (4, 4, 6)
    assert not skip.has_bias


def test_a_text_without_blocks_is_a_chain():
    """The parameters of VGG-7, by its own row as a text."""
    text = ep.build(TABLE["vgg7"].layers, width=1 / 32, device="cpu", feedback=1.0)
    assert text.graph.is_chain
    assert text.describe() == ep.vgg(7, width=1 / 32, device="cpu", feedback=1.0).describe()
    assert shapes(text) == shapes(ep.vgg(7, width=1 / 32, device="cpu", feedback=1.0))


def test_mlp():
    net = ep.build("mlp:12,8", input_shape=(4, 4, 3), classes=5, width=0.5, device="cpu", feedback=1.0)
    own = ep.Network([Linear((4, 4, 3), 6), Linear((6,), 4)], 5, gain=0.6, device="cpu", feedback=1.0)
    assert net.describe() == own.describe()
    assert shapes(net) == {
        "layers.1.weight": (48, 6), "layers.1.bias": (6,), "layers.2.weight": (6, 4), "layers.2.bias": (4,),
        "readout.weight": (4, 5), "readout.bias": (5,),
    }  # fmt: skip
    squared = ep.build("mlp:12", input_shape=(4, 4, 3), loss="squared_error", device="cpu", feedback=1.0)
    assert squared.state_shapes == [(12,), (10,)]


@pytest.mark.parametrize(("arch", "weights", "side", "pooled"), [("resnet9", 9, 4, 3), ("resnet18", 18, 4, 0)])
def test_resnets_for_weak_feedback(arch, weights, side, pooled):
    """The skips aside, N weights; ResNet-9 pools three times; the readout sees one average a channel."""
    net = ep.build(arch, **PLAIN)
    own = [path for path in net.parameters() if path.endswith("weight") and path.count(".") == 2]
    assert len(own) + 1 == weights
    assert sum(edge.has_winners for edge in net.graph.edges) == pooled
    assert net.state_shapes[-1] == (side, side, 16)
    assert net.readout.pool == side
    assert net.parameters()["readout.weight"].shape == (16, 10)
    assert net.activation.name == "relu"
    assert TABLE[arch].weights == "standardized"


@pytest.mark.parametrize("arch", EVERY)
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_every_architecture_learns_and_is_saved(arch, loss, tmp_path):
    """A step has a gradient for every parameter; the file and the configuration give the same network back."""
    net = ep.build(arch, **PLAIN | {"loss": loss, "feedback": 0.1, "seed": 2})
    images = np.random.default_rng(0).uniform(0, 1, (2, 32, 32, 3))
    step = ep.EquilibriumPropagation(net, free_steps=2, nudged_steps=2, schedule="sweeps", nudge="deviation")
    gradients = step.step(images, [3, 7]).gradients
    assert set(gradients) == set(net.parameters())
    assert all(np.isfinite(g).all() for g in gradients.values())
    net.save(tmp_path / "net.h5")
    scores = net.scores(images, steps=3, schedule="synchronous")
    loaded = ep.Network.load(tmp_path / "net.h5", device="cpu")
    for again in (loaded, ep.build(**net.config, device="cpu")):
        assert again.config | {"input_shape": (32, 32, 3)} == net.config
        assert again.describe() == net.describe()
        np.testing.assert_array_equal(again.scores(images, steps=3, schedule="synchronous"), scores)


def test_a_pooled_readout_sees_averages():
    """By plain means, whole and in windows that leave a column out."""
    state = np.random.default_rng(1).uniform(0, 1, (2, 5, 5, 4)).astype(np.float32)
    for pool, seen in (("global", state.mean((1, 2))), (2, state[:, :4, :4].reshape(2, 2, 2, 2, 2, 4).mean((2, 4)))):
        net = ep.build("4", input_shape=(5, 5, 3), readout_pool=pool, device="cpu", feedback=1.0)
        by_hand = seen.reshape(2, -1) @ net.readout.weight + net.readout.bias
        np.testing.assert_allclose(net.readout.output(state), by_hand, rtol=1e-5)
    for pool in (None, 1):
        assert ep.build("4", input_shape=(5, 5, 3), readout_pool=pool, device="cpu", feedback=1.0).readout.pool is None


def test_options_of_the_command_line_reach_the_network(quadrants_like):
    given = {"arch": "4s 4+4", "readout_pool": "2", "device": "cpu"}
    net = build_network(TrainConfig(**given), quadrants_like, "cpu")
    assert (net.readout.pool, net.activation.name, net.config["weights"]) == (2, "hard_sigmoid", "plain")
    config = TrainConfig(arch="resnet9")
    assert (config.activation, config.weights, config.readout_pool) == ("relu", "standardized", None)
    net = build_network(TrainConfig(arch="resnet9", width=0.05, weights="plain"), quadrants_like, "cpu")
    assert net.readout.pool == net.state_shapes[-1][0]
    assert TrainConfig(arch="hopfield-resnet13", activation="tanh").activation == "tanh"


def test_a_teacher_is_of_its_students_architecture():
    """Weights and readout too; a sum of connections into a node wants the smaller gain of its architecture."""
    own = teacher_config(TrainConfig(arch="resnet9", aug="kd", readout_pool="2", weights="standardized-fixed"))
    assert (own.arch, own.weights, own.readout_pool, own.gain) == ("resnet9", "standardized-fixed", "2", None)
    assert teacher_config(TrainConfig(arch="vgg7", aug="kd")).gain == 1.4


@pytest.fixture
def quadrants_like():
    """What a network is built for."""

    class Images:
        classes, image_shape = ("a", "b"), (16, 16, 3)

    return Images()


def test_a_text_names_a_run_directory():
    """Letters, digits, - and _ alone, on every system, and no longer than a name may be."""
    assert slug("32 32p 64+64s") == "32_32p_64_64s"
    assert slug("mlp:512,512") == "mlp_512_512"
    assert slug("hopfield-resnet13") == "hopfield-resnet13"
    assert len(slug("8 " * 200)) == 40
    assert default_path(TrainConfig(arch="mlp:8,8"), "nowhere").name == "mlp_8_8-none-cifar10-seed0"
