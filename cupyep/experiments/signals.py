"""Experiments on intermediate signals in the paper's network (lambda = 1), and on networks without them."""

from __future__ import annotations

import math

from cupyep.experiments import figures
from cupyep.experiments.design import Column, Experiment, Results, Row
from cupyep.experiments.trained import COLUMNS, accuracy, first_layer, loss, train_cell
from cupyep.recipes import find_recipe
from cupyep.training.config import read_toml

PAPER = "arXiv 2508.15989 (Lin, Bal, Sengupta)"
#: Where the networks of the paper train at a scale of minutes; this project's own choice.
SMALL = {
    "dataset": "cifar10",
    "image_size": 16,
    "limit_train": 4000,
    "limit_test": 1000,
    "crop": False,
    "flip": False,
    "width": 0.125,
    "feedback": 1.0,
    "gain": 0.5,
    "schedule": "sweeps",
    "free_steps": 5,
    "nudged_steps": 2,
    "beta": 0.5,
    "kappa_annealing": "constant",
    "optimizer": "sgd",
    "learning_rate": 0.02,
    "batch_size": 32,
    "epochs": 8,
    "teacher_epochs": 15,
}
# At the paper's size all settings but those of the rows are the recipe's, which follow the small experiments.
RECIPE = "vgg11-none-cifar10"
FULL = {name: value for name, value in read_toml(find_recipe(RECIPE)).items() if name not in ("arch", "aug")}
FEW_EPOCHS = 4  # where many settings are compared
SMALL_SETTING = (
    "of 16 to 64 channels, CIFAR-10 reduced to 16 x 16 pixels, 4000 training and 1000 test images, {epochs} epochs of "
    "batches of 32, no augmentation, SGD 0.02 with momentum 0.9 and a cosine, gain 0.5, lambda = 1, 5 free and 2 "
    "nudged sweeps, beta 0.5, deviation form, softmax readout, kappa constant unless said."
)
FULL_SETTING = (
    f"full width, CIFAR-10, {FULL['epochs']} epochs, lambda = 1; options that no row names are those of the recipe "
    f"`{RECIPE}`."
)
LE = {"aug": "le", "kappa": 0.6, "signal_layers": "1-8"}
KD = {"aug": "kd", "kappa": 0.3, "signal_layers": "1-8"}
# By the experiments kappa and placement.
BEST_LE = {**LE, "signal_layers": "4-6", "kappa_annealing": "cosine"}
FIGURES = {
    "courses": figures.courses("train_loss", "test_accuracy"),
    "layers": figures.over_layers("nudge_response", "gradient_norm"),
}
FIRST_OVER_LAST = Column("response, first / last layer", first_layer("nudge_response"), ".1e")


def _setting(what: str, epochs: int = FEW_EPOCHS) -> dict[str, str]:
    return {"small": f"{what} {SMALL_SETTING.format(epochs=epochs)}", "full": f"{what}, {FULL_SETTING}"}


def _both(rows: tuple[Row, ...]) -> dict[str, tuple[Row, ...]]:
    return {"small": rows, "full": rows}


def _verdict_baseline(results: Results) -> str:
    best, bp = accuracy(results, "ep"), accuracy(results, "bp")
    word = "converges" if best > 45 else "does not reach 45 %"
    return (
        f"Plain EP {word}: {best:.1f} % test accuracy in the paper's network, {accuracy(results, 'weak'):.1f} % "
        f"with weak feedback, {bp:.1f} % by backpropagation through the same layers."
    )


BASELINE = Experiment(
    name="baseline",
    title="a shallow network needs no help",
    claim=f"Plain EP trains VGG-5 on CIFAR-10 (Laborieux et al., arXiv 2101.05536: 88.3 % centered; {PAPER}).",
    setting={
        "small": "VGG-5 of 32 to 128 channels, CIFAR-10 reduced to 16 x 16 pixels, 10 000 training and 2000 test "
        "images, 10 epochs, Adam with a cosine, crop and flip, deviation form, no signals.",
        "full": "VGG-5, full width, CIFAR-10, 120 epochs, no signals; EP at lambda = 1 as published, by the recipe "
        "`vgg5-plain`, the others as `cupyep train`.",
    },
    base={
        "small": {
            **{name: SMALL[name] for name in ("dataset", "image_size", "schedule", "beta")},
            "arch": "vgg5",
            "width": 0.25,
            "limit_train": 10_000,
            "limit_test": 2000,
            "epochs": 10,
            "batch_size": 64,
        },
        "full": {"arch": "vgg5", "dataset": "cifar10", "epochs": 120},
    },
    rows={
        scale: (
            Row(
                "ep",
                "EP, lambda = 1",
                strong,
                {"test accuracy, %": 88.3},
                "Laborieux et al., arXiv 2101.05536, 120 epochs",
            ),
            Row("weak", "EP, lambda = 0.1", {"feedback": 0.1}),
            Row("bp", "BP, same layers", {"algorithm": "bp", "feedback": 0.1}),
        )
        for scale, strong in {
            "small": {"feedback": 1.0, "gain": 0.6, "free_steps": 6, "nudged_steps": 3},
            "full": read_toml(find_recipe("vgg5-plain")),
        }.items()
    },  # fmt: skip
    seeds={"small": 1, "full": 1},
    measure=train_cell,
    columns=COLUMNS,
    figures={"courses": FIGURES["courses"]},
    verdict=_verdict_baseline,
)

DEPTHS = (5, 7, 9, 11, 12)


def _verdict_vanishing(results: Results) -> str:
    shallow, deep = (results.mean(f"vgg{depth}", FIRST_OVER_LAST.value) for depth in (5, 12))
    losses = ", ".join(f"{loss(results, f'vgg{depth}'):.2f}" for depth in DEPTHS)
    return (
        f"Training losses from VGG-5 to VGG-12: {losses} (chance is {math.log(10):.2f}); the first layer's response "
        f"is {shallow:.0e} of the last one's in VGG-5 and {deep:.0e} in VGG-12."
    )


VANISHING = Experiment(
    name="vanishing",
    title="the nudge dies out with depth",
    claim="Without intermediate signals EP fails in deep networks: the nudge does not reach the early layers "
    f"({PAPER}).",
    setting=_setting("VGG-5, 7, 9, 11 and 12 without signals,"),
    base={"small": {**SMALL, "epochs": FEW_EPOCHS}, "full": FULL},
    rows=_both(tuple(Row(f"vgg{depth}", f"VGG-{depth}", {"arch": f"vgg{depth}"}) for depth in DEPTHS)),
    seeds={"small": 3, "full": 1},
    measure=train_cell,
    columns=(*COLUMNS, FIRST_OVER_LAST),
    figures=FIGURES,
    verdict=_verdict_vanishing,
)

PLAIN = {
    "none": Row("none", "no signals, the same setting"),
    "none-tuned": Row("none-tuned", "no signals, tuned: gain 0.65", {"gain": 0.65}),
}


def _verdict_signals(results: Results) -> str:
    plain = loss(results, "none")
    tuned = min(PLAIN, key=lambda key: loss(results, key))
    signals = ", ".join(
        f"{name} {loss(results, key):.2f} / {accuracy(results, key):.0f} %"
        for key, name in (("le", "LE"), ("kd", "KD"))
    )
    stuck = "stays at chance" if abs(plain - math.log(10)) < 0.1 else "moves"
    return (
        f"At the matched setting VGG-11 without signals {stuck} (training loss {plain:.2f}, ln 10 = "
        f"{math.log(10):.2f}), with signals it learns ({signals}); the better of the plain ones, "
        f"'{PLAIN[tuned].label}', reaches {loss(results, tuned):.2f} / {accuracy(results, tuned):.0f} %."
    )


SIGNALS = Experiment(
    name="signals",
    title="intermediate signals repair the deep network",
    claim=f"LE and KD at intermediate layers restore learning where plain EP fails; KD is best ({PAPER}).",
    setting=_setting("VGG-11", SMALL["epochs"]),
    base={"small": {**SMALL, "arch": "vgg11"}, "full": {**FULL, "arch": "vgg11"}},
    rows=_both(
        (
            *PLAIN.values(),
            Row("le", "LE, layers 4 to 6, kappa 0.6 annealed by a cosine", BEST_LE),
            Row("kd", "KD, layers 1 to 8, kappa 0.3", KD),
        )
    ),
    seeds={"small": 3, "full": 1},
    measure=train_cell,
    columns=(*COLUMNS, FIRST_OVER_LAST),
    figures=FIGURES,
    verdict=_verdict_signals,
    remarks="""A large response is not by itself useful learning: a signal moves its layer whatever the readout needs,
so the response figure shows that the early layers are reached, and only loss and accuracy show what for.

Depth alone is not the whole story either. The plain network was tuned like the others; of gains from 0.5 to 0.65, SGD
at 0.01 to 0.03 and Adam at 5e-4 (which fell back to chance), its best setting is in the table.""",
)

PLACES = {"early": "1-3", "middle": "4-6", "late": "7-10", "even": "2,4,6,8,10", "most": "1-8", "all": "all"}


def _verdict_placement(results: Results) -> str:
    ranked = sorted((loss(results, key), key) for key in PLACES)
    return (
        f"Lowest training loss with LE on layers {PLACES[ranked[0][1]]} ({ranked[0][0]:.2f}), highest on layers "
        f"{PLACES[ranked[-1][1]]} ({ranked[-1][0]:.2f})."
    )


PLACEMENT = Experiment(
    name="placement",
    title="which layers need a signal",
    claim=f"The paper places signals at chosen layers without publishing which ({PAPER}); here LE at different ones.",
    setting=_setting("VGG-11, local error,"),
    base={"small": {**SMALL, "epochs": FEW_EPOCHS, "arch": "vgg11"}, "full": {**FULL, "arch": "vgg11"}},
    rows=_both(tuple(Row(key, f"layers {layers}", {**LE, "signal_layers": layers}) for key, layers in PLACES.items())),
    seeds={"small": 3, "full": 1},
    measure=train_cell,
    columns=(*COLUMNS, FIRST_OVER_LAST),
    figures=FIGURES,
    verdict=_verdict_placement,
)

KAPPAS = (0.1, 0.3, 0.6, 1.0)


def _verdict_kappa(results: Results) -> str:
    keys = [row.key for row in results.rows]
    best = min(keys, key=lambda key: loss(results, key))
    label = next(row.label for row in results.rows if row.key == best)
    return f"Lowest training loss {loss(results, best):.2f} / {accuracy(results, best):.0f} % with {label}."


KAPPA = Experiment(
    name="kappa",
    title="how strong a signal, and for how long",
    claim=f"kappa weighs the signals and is annealed by a cosine ({PAPER}); its value is not published.",
    setting=_setting("VGG-11, local error on layers 1 to 8,"),
    base={"small": {**SMALL, **LE, "epochs": FEW_EPOCHS, "arch": "vgg11"}, "full": {**FULL, **LE, "arch": "vgg11"}},
    rows=_both(
        tuple(
            Row(
                f"{annealing}-{kappa:g}",
                f"kappa {kappa:g}, {annealing}",
                {"kappa": kappa, "kappa_annealing": annealing},
            )
            for annealing in ("constant", "cosine")
            for kappa in KAPPAS
        )
    ),
    seeds={"small": 3, "full": 1},
    measure=train_cell,
    columns=COLUMNS,
    figures={
        "kappa": figures.against(
            "kappa",
            "kappa",
            {name: [f"{name}-{kappa:g}" for kappa in KAPPAS] for name in ("constant", "cosine")},
            {column.title: column.value for column in COLUMNS[:2]},
        ),
        "courses": FIGURES["courses"],
    },
    verdict=_verdict_kappa,
)

KD_LAYERS = {"signal_layers": "3-6", "crop": False}
VARIANTS = {
    "fixed": Row("fixed", "fixed random map, T = 1", {"learned_maps": False}),
    "learned": Row("learned", "learned map, T = 1", {"learned_maps": True}),
    "learned-t2": Row("learned-t2", "learned map, T = 2", {"learned_maps": True, "temperature": 2.0}),
    "learned-t4": Row("learned-t4", "learned map, T = 4", {"learned_maps": True, "temperature": 4.0}),
    "logits": Row(
        "logits", "learned map, squared error on logits", {"learned_maps": True, "signal_loss": "squared_error"}
    ),
    "features": Row("features", "no map: the teacher's activations", {"teacher_features": True}),
    "none": Row("none", "no signal", {"aug": "none"}),
}


def _verdict_variants(results: Results) -> str:
    ranked = sorted((loss(results, key), key) for key in VARIANTS)
    best, worst = ranked[0][1], ranked[-1][1]
    return (
        f"Lowest training loss with '{VARIANTS[best].label}' ({loss(results, best):.2f} / "
        f"{accuracy(results, best):.0f} %), highest with '{VARIANTS[worst].label}' ({loss(results, worst):.2f} / "
        f"{accuracy(results, worst):.0f} %)."
    )


KD_VARIANTS = Experiment(
    name="kd-variants",
    title="what the teacher says, and through which map",
    claim="KD brings a teacher's outputs to intermediate layers; whether through a map or unweighted is open "
    f"({PAPER}).",
    setting=_setting("VGG-7, distillation on layers 3 to 6, no crops,"),
    base={
        "small": {**SMALL, **KD, **KD_LAYERS, "epochs": FEW_EPOCHS, "arch": "vgg7"},
        "full": {**FULL, **KD, **KD_LAYERS, "arch": "vgg7", "signal_layers": "6"},
    },
    rows=_both(tuple(VARIANTS.values())),
    seeds={"small": 3, "full": 1},
    measure=train_cell,
    columns=COLUMNS,
    figures={"courses": FIGURES["courses"]},
    verdict=_verdict_variants,
    remarks="""The teacher is the same network trained by backpropagation; where its activations are the targets it
has the student's activation function, so that both have one range. At full size only layer 6 gets a signal:
activations of all layers for all images in two views would fill tens of gigabytes.""",
)
