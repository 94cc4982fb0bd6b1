"""The paper's headline rows, their counterparts, and the best that weak feedback gives."""

from __future__ import annotations

from typing import Any

from cupyep.experiments import figures
from cupyep.experiments.design import SEEN, Experiment, Results, Row
from cupyep.experiments.feedback import SMALL_WEAK, lambda_options
from cupyep.experiments.signals import BEST_LE, FEW_EPOCHS, KD, LE, PAPER, SMALL
from cupyep.experiments.trained import COLUMNS, TEST_ACCURACY, accuracy, train_cell
from cupyep.recipes import find_recipe
from cupyep.training.config import read_toml

LABELS = {
    "kd": "EP, lambda = 1, KD",
    "le": "EP, lambda = 1, LE",
    "none": "EP, lambda = 1, no signals",
    "feedback0.1": "EP, lambda = 0.1, no signals",
    "feedback0.03": "EP, lambda = 0.03, no signals",
    "bptt": "BPTT, lambda = 1, no signals",
    "bp": "BP, same layers",
}
#: What a hundred classes need to get away from a guess at the small scale; BPTT would take hours for that.
LONGER = {"limit_train": 10_000, "limit_test": 2000, "epochs": 6, "crop": False, "flip": False}
BPTT_STEPS = {"algorithm": "bptt", "schedule": "synchronous", "free_steps": 40, "nudged_steps": 20}


def _full_rows(arch: str, dataset: str, published: float) -> tuple[Row, ...]:
    rows = []
    for key, label in LABELS.items():
        recipe = read_toml(find_recipe(f"{arch}-{'none' if key == 'bptt' else key}-{dataset}"))
        found = {TEST_ACCURACY.title: published} if key == "kd" else {}
        options = {**recipe, **(BPTT_STEPS if key == "bptt" else {})}
        rows.append(Row(key, label, options, found, PAPER if found else ""))
    return tuple(rows)


def _small_rows(arch: str, dataset: str, published: float, longer: dict[str, Any]) -> tuple[Row, ...]:
    strong, everywhere = {**SMALL, "epochs": FEW_EPOCHS}, {"signal_layers": "all"}
    # Rows of one table see the same images, as often and in the same way.
    where = {**{name: strong[name] for name in SEEN if name in strong}, **longer, "arch": arch, "dataset": dataset}
    options: dict[str, dict[str, Any]] = {
        "kd": {**strong, **KD, **everywhere},
        # With LE on all layers the deepest network's upper ones died in the fourth epoch.
        "le": {**strong, **(BEST_LE if longer else {**LE, **everywhere})},
        "none": strong,
        "feedback0.1": {**SMALL_WEAK, **lambda_options(0.1)},
        "feedback0.03": {**SMALL_WEAK, **lambda_options(0.03)},
        "bptt": {**strong, **BPTT_STEPS},
        "bp": {**SMALL_WEAK, "algorithm": "bp", "feedback": 0.1, "gain": 1.2},
    }
    return tuple(
        Row(
            key,
            LABELS[key],
            {**own, **where},
            {f"{TEST_ACCURACY.title}, full size": published} if key == "kd" else {},
            PAPER if key == "kd" else "",
        )
        for key, own in options.items()
        if not (longer and key == "bptt")
    )


def _verdict(results: Results) -> str:
    best = max((key for key in LABELS if key.startswith("feedback")), key=lambda key: accuracy(results, key))
    chance = 1.0 if results.rows[0].options["dataset"] == "cifar100" else 10.0
    near = max(accuracy(results, key) for key in LABELS) < 2 * chance
    caution = f"Nothing gets far from chance ({chance:.0f} %) here, so this is no ranking: " if near else ""
    return (
        f"{caution}KD {accuracy(results, 'kd'):.1f} %, LE {accuracy(results, 'le'):.1f} %, no signals "
        f"{accuracy(results, 'none'):.1f} % in the paper's network (lambda = 1); the best without signals is "
        f"{LABELS[best]}, {accuracy(results, best):.1f} %; BP {accuracy(results, 'bp'):.1f} %."
    )


def _small_setting(longer: dict[str, Any]) -> str:
    if longer:
        return (
            f"{longer['limit_train']} images as they are, {longer['epochs']} epochs, LE on layers 4 to 6 (tried first, "
            "on all layers, the upper ones died), no BPTT (it would take hours)"
        )
    return f"{SMALL['limit_train']} training images as they are, {FEW_EPOCHS} epochs"


def _headline(arch: str, dataset: str, published: float, longer: dict[str, Any]) -> Experiment:
    network = f"VGG-{arch[3:]}"
    return Experiment(
        name=f"{arch}-kd-{dataset}",
        title=f"{network} on {'CIFAR-10' if dataset == 'cifar10' else 'CIFAR-100'}, the paper's headline row",
        claim=f"{network} with KD reaches {published} % test accuracy ({PAPER}).",
        setting={
            "small": f"{network} of 16 to 64 channels, 16 x 16 pixels, {_small_setting(longer)}: a look at the "
            "ranking, not at the figures.",
            "full": f"{network}, full width; every row is a recipe (`cupyep recipes`), BPTT that without signals with "
            f"{BPTT_STEPS['free_steps']} + {BPTT_STEPS['nudged_steps']} steps.",
        },
        base={"small": {}, "full": {}},
        rows={"small": _small_rows(arch, dataset, published, longer), "full": _full_rows(arch, dataset, published)},
        seeds={"small": 1, "full": 1},
        measure=train_cell,
        columns=COLUMNS,
        figures={"courses": figures.courses("train_loss", "test_accuracy")},
        verdict=_verdict,
    )


VGG7 = _headline("vgg7", "cifar10", 89.67, {})
VGG12 = _headline("vgg12", "cifar100", 64.75, LONGER)
