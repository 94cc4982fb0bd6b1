"""From options to objects, and the teachers of distillation.

Oracles: the options themselves; NumPy on the raw images for exported logits; a flag that no second training happens.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from oracle import Oracle
from quadrants import SILENT, TINY, Recorder, quadrant_data
from small import Teacher

import cupyep as ep
from cupyep.commands.gradient_check import CHECK_DEFAULTS
from cupyep.errors import TeacherError
from cupyep.parallel import Communicator
from cupyep.training import build, runs, teacher
from cupyep.training.config import TrainConfig, make_config


@pytest.fixture
def quadrants(monkeypatch):
    """Whatever data set a configuration names, the quadrants are loaded."""
    dataset = quadrant_data()
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: dataset)
    return dataset


# --- every option reaches its object --------------------------------------------------------------------------------


def test_options_of_network_and_learner(quadrants):
    values = {
        "width": 0.03, "activation": "tanh", "pooling": "average", "loss": "squared_error", "gain": 0.7,
        "feedback": 0.4, "seed": 5, "precision": "float64", "beta": 0.2, "free_steps": 7, "nudged_steps": 5,
        "scheme": "onesided", "nudge": "classical", "schedule": "evenodd", "tolerance": 1e-4,
    }  # fmt: skip
    settings = make_config({"arch": "vgg7", "device": "cpu"}, values)
    network = build.build_network(settings, quadrants, "cpu")
    for name in ("width", "activation", "pooling", "loss", "gain", "feedback", "seed", "precision", "arch"):
        assert network.config[name] == getattr(settings, name), name
    assert (network.classes, network.input_shape) == (2, (16, 16, 3))
    learner = build.build_learner(settings, network, [], np.random.default_rng(0))
    assert isinstance(learner, ep.EquilibriumPropagation)
    for name in ("beta", "free_steps", "nudged_steps", "scheme", "nudge", "schedule", "tolerance"):
        assert getattr(learner, name) == getattr(settings, name), name
    through_time = dataclasses.replace(settings, algorithm="bptt")
    learner = build.build_learner(through_time, network, [], np.random.default_rng(0))
    assert (learner.free_steps, learner.unrolled_steps, learner.schedule) == (7, 5, "evenodd")


@pytest.mark.parametrize("told", [{}, {"feedback": 1.0}, {"schedule": "evenodd"}, {"schedule": "synchronous"}])
@pytest.mark.parametrize("algorithm", ["ep", "bptt"])
def test_library_training_and_check_agree_on_their_defaults(quadrants, algorithm, told):
    """The same options left out give the same network, settled by the same phases, whichever door they come through."""
    settings = TrainConfig(algorithm=algorithm, device="cpu", **told)
    network = build.build_network(settings, quadrants, "cpu")
    feedback = {name: told[name] for name in ("feedback",) if name in told}
    schedule = {name: told[name] for name in ("schedule",) if name in told}
    own = ep.vgg(5, classes=2, input_shape=quadrants.image_shape, device="cpu", **feedback)
    assert (own.describe(), own.config) == (network.describe(), network.config)
    for path, p in own.parameters().items():
        np.testing.assert_array_equal(p, network.parameters()[path])
    assert ep.Network([ep.Linear((2,), 2)], 2, device="cpu").feedback == TrainConfig().feedback == 0.01
    usual = dict(zip(("steps", "schedule", "relaxation"), own.settles(**schedule), strict=True))
    assert network.settling == usual | ({"unrolled_steps": 20} if algorithm == "bptt" else {})
    made = {"ep": ep.EquilibriumPropagation, "bptt": ep.BackpropagationThroughTime}[algorithm](own, **schedule)
    trained = build.build_learner(settings, network, [], np.random.default_rng(0))
    plain = (int, float, str, type(None))
    values = [{k: v for k, v in vars(each).items() if isinstance(v, plain)} for each in (made, trained)]
    assert values[0] == values[1]
    assert set(values[0]) >= {"free_steps", "schedule", "relaxation", "tolerance", "micro_batch"}
    checked = make_config(CHECK_DEFAULTS, told)
    plain_network = dataclasses.replace(checked, exact=False)
    assert build.build_network(plain_network, quadrants, "cpu").describe() == network.describe()


def test_options_of_the_signals(quadrants, tmp_path):
    values = {"aug": "le", "signal_layers": "2-3", "kappa": 0.3, "kappa_annealing": "constant", "seed": 9,
              "signal_loss": "squared_error", "signal_pool": 2, "device": "cpu"}  # fmt: skip
    settings = make_config(TINY, values)
    network = build.build_network(settings, quadrants, "cpu")
    (signal,) = build.build_signals(settings, network, quadrants, None)
    assert isinstance(signal, ep.LocalError)
    assert (signal.layers, signal.kappa, signal.annealing, signal.pool, signal.seed) == ([2, 3], 0.3, "constant", 2, 9)
    assert signal.criterion.name == "squared_error"
    assert not signal.learned, "unset: le has fixed maps"
    learned = dataclasses.replace(settings, learned_maps=True)
    assert build.build_signals(learned, network, quadrants, None)[0].learned
    path = tmp_path / "t.h5"
    teacher.export_logits(lambda x: np.ones((len(x), 2)), quadrants, path, teacher="constant", display=SILENT)
    more = {"aug": "kd", "temperature": 2.5, "learned_maps": True, "signal_loss": "cross_entropy"}
    (signal,) = build.build_signals(dataclasses.replace(settings, **more), network, quadrants, path)
    assert isinstance(signal, ep.Distillation)
    assert (signal.criterion.temperature, signal.learned, signal.layers) == (2.5, True, [2, 3])
    assert make_config(TINY, {"aug": "kd"}).learned_maps, "unset: kd learns its maps"
    fixed = dataclasses.replace(settings, **more | {"learned_maps": False})
    assert not build.build_signals(fixed, network, quadrants, path)[0].learned
    assert build.build_signals(make_config(TINY), network, quadrants, None) == []


def test_rates_of_layers_and_of_learned_maps():
    """One number a layer for weight and bias, the last for the readout; learned maps take that one, too."""
    network = ep.Network([ep.Linear((4,), 3), ep.Linear((3,), 2)], 2, device="cpu", precision="float64", feedback=1.0)
    signal = ep.Distillation(Teacher(), [1], learned=True)
    parameters = ep.EquilibriumPropagation(network, signals=[signal], schedule="synchronous").parameters()
    for optimizer in ("sgd", "adam"):
        rates = [0.5, 0.25, 0.125]
        made = build.build_optimizer(
            TrainConfig(optimizer=optimizer, learning_rate=rates, weight_decay=0.0), parameters
        )
        assert made.rates == {
            "layers.1.weight": 0.5,
            "layers.1.bias": 0.5,
            "layers.2.weight": 0.25,
            "layers.2.bias": 0.25,
            "readout.weight": 0.125,
            "readout.bias": 0.125,
            "signals.0.layer1.weight": 0.125,
        }
        one = build.build_optimizer(TrainConfig(optimizer=optimizer, learning_rate=0.25, weight_decay=0.0), parameters)
        assert set(one.rates.values()) == {0.25}
    before = {path: array.copy() for path, array in parameters.items()}
    values = {"optimizer": "sgd", "learning_rate": rates, "momentum": 0.0, "weight_decay": 0.0}
    ones = {path: np.ones_like(array) for path, array in parameters.items()}
    build.build_optimizer(TrainConfig(**values), parameters).step(ones)
    for path, rate in made.rates.items():
        np.testing.assert_allclose(before[path] - parameters[path], rate, rtol=1e-12, err_msg=path)


def test_relaxation_micro_batch_and_kappa_reach_every_learner(quadrants):
    settings = make_config(TINY, {"device": "cpu", "relaxation": 1.25, "schedule": "evenodd", "micro_batch": 3})
    network = build.build_network(settings, quadrants, "cpu")
    for algorithm in ("ep", "bptt", "bp"):
        learner = build.build_learner(
            dataclasses.replace(settings, algorithm=algorithm), network, [ep.LocalError([1])], np.random.default_rng(0)
        )
        assert (learner.micro_batch, len(learner.signals)) == (3, 1)
        assert algorithm == "bp" or learner.relaxation == 1.25


def test_generators_of_a_run_are_those_of_its_seed(quadrants):
    """Order and crops from the first stream of the seed, signs of the random scheme from the second."""
    settings = make_config(TINY, {"device": "cpu", "seed": 11, "scheme": "random"})
    network = build.build_network(settings, quadrants, "cpu")
    trainer = build.build_trainer(settings, quadrants, network)
    draws, signs = map(np.random.default_rng, np.random.SeedSequence(11).spawn(2))
    assert trainer.train.generator.bit_generator.state == draws.bit_generator.state
    assert trainer.learner.generator.bit_generator.state == signs.bit_generator.state
    assert trainer.generators["learner"] is trainer.learner.generator
    assert (trainer.train.split, trainer.test.split) == (quadrants.train, quadrants.test)
    assert (trainer.train.shuffle, trainer.test.shuffle, trainer.test.augment) == (True, False, False)


def test_options_of_the_trainer(quadrants):
    values = {"epochs": 7, "lr_schedule": "step", "warmup": 2, "patience": 3, "checkpoint_minutes": 2}
    settings = make_config(TINY, values, {"on_divergence": "halve-lr"})
    trainer = build.build_trainer(settings, quadrants, build.build_network(settings, quadrants, "cpu"))
    assert (trainer.epochs, trainer.patience, trainer.checkpoint_s, trainer.on_divergence) == (7, 3, 120, "halve-lr")
    # 3 batches an epoch: a sixth of the warm-up is over when the first is done; then 1, and 0.1 from epoch 3.5 on
    factors = [trainer.schedules.set(done, 7) for done in (0, 5 / 3, 3, 3.5)]
    np.testing.assert_allclose(factors, [1 / 6, 1, 1, 0.1], rtol=1e-12)


def test_every_rank_has_its_share_of_all_batches(quadrants):
    """Rank 1 of 3 has 13 of 40 images, 7 of 20, and 11 of the 32 that the checkup looks at."""
    ranks = Communicator()
    ranks.rank, ranks.size = 1, 3
    settings = make_config(TINY, {"batch_size": 40})
    held = dataclasses.replace(quadrants, validation=dataclasses.replace(quadrants.train, name="validation"))
    trainer = build.build_trainer(
        settings, held, build.build_network(settings, held, "cpu"), communicator=ranks, display=SILENT
    )
    shares = [next(iter(batches)).share for batches in (trainer.train, trainer.validation, trainer.test)]
    assert shares == [(13, 40), (13, 40), (7, 20)]
    assert trainer.checkup.batch.share == (11, 32)


def test_options_of_the_optimizer():
    parameters = {"layers.1.weight": np.zeros(2), "signals.0.layer1.weight": np.zeros(1)}
    values = {"optimizer": "sgd", "learning_rate": [0.3], "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}
    sgd = build.build_optimizer(TrainConfig(**values), parameters)
    assert isinstance(sgd, ep.SGD)
    assert (sgd.momentum, sgd.nesterov, sgd.weight_decay) == (0.8, True, 0.01)
    assert sgd.rates == dict.fromkeys(parameters, 0.3)
    adam = build.build_optimizer(TrainConfig(optimizer="adam", weight_decay=0.02, learning_rate=1e-3), parameters)
    assert isinstance(adam, ep.Adam)
    assert (adam.ema, adam.clip_unit_norm) == (None, None)
    more = build.build_optimizer(TrainConfig(optimizer="adamw", ema=0.9, clip_unit_norm=0.01), parameters)
    assert (type(more), more.ema, more.clip_unit_norm) == (ep.AdamW, 0.9, 0.01)
    assert (adam.weight_decay, adam.rates["layers.1.weight"]) == (0.02, 1e-3)


@pytest.mark.parametrize(
    ("crop", "flip", "augment", "pad"),
    [(True, True, True, 2), (True, False, True, 2), (False, True, True, 0), (False, False, False, 0)],
)
def test_options_of_the_batches(crop, flip, augment, pad, quadrants):
    settings = make_config(TINY, {"crop": crop, "flip": flip, "batch_size": 7})
    network = build.build_network(settings, quadrants, "cpu")
    loader = build.training_batches(settings, quadrants, network, np.random.default_rng(0))
    assert (loader.augment, loader.pad, loader.flip, loader.shuffle, loader.batch_size) == (augment, pad, flip, True, 7)
    more = dataclasses.replace(settings, cutout=5, crop=True, label_smoothing=0.2, class_weights="balanced")
    loader = build.training_batches(more, quadrants, network, np.random.default_rng(0))
    assert (loader.cutout, loader.label_smoothing, loader.balance) == (5, 0.2, True)
    plain = build.evaluation_batches(settings, quadrants, network)
    assert (plain.augment, plain.shuffle, plain.split.name) == (False, False, "test")


# --- teachers ------------------------------------------------------------------------------------------------------


def test_exported_logits_are_those_of_each_view(tmp_path):
    """Oracle: a linear teacher applied by NumPy to the normalised raw images and their mirror images."""
    dataset = quadrant_data(train=7, test=5)
    weight = np.random.default_rng(1).standard_normal((16 * 16 * 3, 2)).astype(np.float32)
    accuracy = teacher.export_logits(
        lambda images: images.reshape(len(images), -1) @ weight, dataset, tmp_path / "t.h5", teacher="linear",
        batch_size=3, display=SILENT,
    )  # fmt: skip
    with ep.TeacherFile(tmp_path / "t.h5") as file:
        file.check(dataset)
        for name in ("train", "test"):
            split = dataset.split(name)
            x = (split.images / 255.0 - dataset.mean) / dataset.std
            for view, images in enumerate((x, x[:, :, ::-1])):
                expected = images.reshape(len(x), -1) @ weight
                np.testing.assert_allclose(file.logits(name, np.arange(len(x)), view), expected, rtol=1e-4, atol=1e-3)
                if view == 0:
                    assert accuracy[name] == np.mean(expected.argmax(axis=1) == split.labels)
        assert file.teacher == "linear"


def test_only_the_identity_view_where_mirroring_is_not_allowed(tmp_path):
    dataset = quadrant_data(train=4, test=2, flip=False)
    teacher.export_logits(
        lambda x: np.ones((len(x), 2)), dataset, tmp_path / "t.h5", teacher="constant", display=SILENT
    )
    with ep.TeacherFile(tmp_path / "t.h5") as file:
        assert file.views == ("identity",)


def test_the_teacher_is_trained_once_and_found_again(quadrants, tmp_path, monkeypatch):
    student = make_config(TINY, {"aug": "kd", "teacher_epochs": 2, "data_dir": str(tmp_path), "beta": 0.1})
    recorder = Recorder()
    path = teacher.cached_teacher(student, quadrants, "cpu", recorder)
    assert path.parent == tmp_path / "cache" / "teachers"
    assert "trained by backpropagation for 2 epochs" in recorder.texts("note")[0]
    assert len(recorder.texts("epoch")) == 2
    with ep.TeacherFile(path) as file:
        file.check(quadrants)
        assert file.views == ("identity", "hflip")
    monkeypatch.setattr(teacher, "train_teacher", lambda *_: pytest.fail("the teacher was trained again"))
    same = dataclasses.replace(student, beta=0.9, signal_layers="2", epochs=99, feedback=0.5)
    assert teacher.cached_teacher(same, quadrants, "cpu", recorder) == path
    assert "from an earlier run" in recorder.texts("note")[-1]
    for change in ({"seed": 1}, {"width": 0.03}, {"teacher_epochs": 3}, {"crop": False}):
        other = teacher.teacher_config(dataclasses.replace(student, **change))
        assert teacher._digest(other, quadrants, "") not in path.name
    assert teacher._digest(teacher.teacher_config(student), quadrants, "2") not in path.name
    quadrants.test.images[-1, -1, -1, -1] ^= 1
    assert teacher._digest(teacher.teacher_config(student), quadrants, "") not in path.name


def test_activations_of_the_teacher(quadrants, tmp_path):
    """In the file are the feed-forward states of the trained teacher, and the signal pulls towards them."""
    options = {"aug": "kd", "teacher_epochs": 1, "data_dir": str(tmp_path), "teacher_features": True, "crop": False}
    own = {"signal_layers": "2-3", "activation": "tanh", "kappa": 0.3, "kappa_annealing": "constant"}
    student = make_config(TINY, options, own)
    trained = teacher.train_teacher(teacher.teacher_config(student), quadrants, "cpu", SILENT)
    assert trained.activation.name == "tanh"
    path = teacher.cached_teacher(student, quadrants, "cpu", SILENT)
    mirrored = ((quadrants.train.images / 255.0 - quadrants.mean) / quadrants.std)[:3, :, ::-1]
    states = Oracle(trained).forward(mirrored)
    with ep.TeacherFile(path) as file:
        assert set(file.feature_layers) == {"layer2", "layer3"}
        found = file.feature("layer3", "train", np.arange(3), np.ones(3, np.uint8))
    np.testing.assert_allclose(found, states[2], rtol=1e-4, atol=1e-5)
    (signal,) = build.build_signals(student, trained, quadrants, path)
    assert (signal.layers, signal.kappa, signal.annealing) == ([2, 3], 0.3, "constant")
    ep.EquilibriumPropagation(trained, signals=[signal], schedule="synchronous")
    batch = ep.Batch(mirrored, quadrants.train.labels[:3], np.arange(3), np.ones(3, np.uint8))
    nudges = {nudge.term.layer: nudge for nudge in signal.nudges(batch)}
    np.testing.assert_allclose(nudges[3].target, states[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(signal.term(3).loss(states[2] + 0.5, states[2]), 0.125 * states[2][0].size)


def test_activations_of_a_teacher_belong_to_the_image_as_it_is():
    with pytest.raises(ep.ConfigurationError, match="--teacher-features needs --no-crop"):
        make_config({"aug": "kd", "teacher_features": True})


def test_the_teacher_is_a_feed_forward_network_of_the_students_shape():
    student = TrainConfig(
        arch="vgg9", aug="kd", width=0.5, seed=3, teacher_epochs=4, feedback=0.1, loss="squared_error"
    )
    own = teacher.teacher_config(student)
    assert (own.arch, own.width, own.seed, own.epochs) == ("vgg9", 0.5, 3, 4)
    assert (own.algorithm, own.aug, own.loss) == ("bp", "none", "cross_entropy")


def test_a_teacher_without_mirrored_views_is_refused_before_the_run_begins(quadrants, tmp_path):
    path, still = tmp_path / "t.h5", quadrant_data(flip=False)
    teacher.export_logits(lambda x: np.ones((len(x), 2)), still, path, teacher="constant", display=SILENT)

    def start(values):
        return runs.start_run(make_config(TINY, values), tmp_path / "run", display=SILENT)

    with pytest.raises(TeacherError, match="no view 'hflip'"):
        start({"aug": "kd", "teacher": str(path)})
    assert not (tmp_path / "run").exists()
    start({"aug": "kd", "teacher": str(path), "flip": False, "epochs": 1}).run()
