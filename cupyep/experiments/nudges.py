"""Experiments on the nudge: classical against deviation form, in training and in fidelity to BPTT."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from cupyep.backend import get_device
from cupyep.data import Loader
from cupyep.experiments import figures
from cupyep.experiments.design import Cell, Column, Experiment, Results, Row
from cupyep.experiments.feedback import smallest
from cupyep.experiments.probes import PROBE_IMAGES, cosines
from cupyep.experiments.signals import FULL, FULL_SETTING, LE, SMALL
from cupyep.experiments.trained import COLUMNS, accuracy, loss, train_cell
from cupyep.learning.check import compare_forms
from cupyep.training.build import build_dataset, build_network, build_signals
from cupyep.training.config import make_config

FORMS = ("classical", "deviation")


def _traced_cell(cell: Cell) -> dict[str, Any]:
    return train_cell(cell, cosines, every_epoch=True)


def _draw_cosines(results: Results) -> Any:
    """Draw the mean cosine with BPTT of the layers below the readout over the epochs."""
    figure, (axis,) = figures.plain_axes(1)
    for number, row in enumerate(results.rows):
        found = [
            [_mean([c for c in probe["bptt"][:-1] if c is not None]) for probe in cell["probes"]]
            for cell in results.of(row.key)
            if cell.get("probes")
        ]
        if found:
            epochs = min(map(len, found))
            figures.band(axis, range(1, epochs + 1), np.array([course[:epochs] for course in found]), row.label, number)
    axis.set(xlabel="epoch", ylabel="cosine with BPTT, mean of layers", ylim=(-0.1, 1.05))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize="small", frameon=False)
    return figure


def _mean(numbers: list[float]) -> float:
    return float(np.mean(numbers)) if numbers else math.nan


def _figures(results: Results, key: str) -> str:
    return f"{loss(results, key):.2f} / {accuracy(results, key):.0f} %"


def _verdict_nudge(results: Results) -> str:
    better = sum(loss(results, f"deviation-{beta}") <= loss(results, f"classical-{beta}") + 0.02 for beta in BETAS)
    parts = [
        f"beta {beta}: {_figures(results, f'deviation-{beta}')} against {_figures(results, f'classical-{beta}')}"
        for beta in BETAS
    ]
    word = "at least as good as" if better == len(BETAS) else "not always as good as"
    return f"In training the deviation form is {word} the classical one at equal cost ({'; '.join(parts)})."


BETAS = (0.5, 0.1, 0.02)
NUDGE = Experiment(
    name="nudge",
    title="classical and deviation form of the nudged phases",
    claim="Nudged phases computed as deviations from the free state, at its pooling winners, give the better "
    "gradient at the same cost (this project's own).",
    setting={
        "small": "VGG-5 of 32 to 128 channels, CIFAR-10 reduced to 16 x 16 pixels, 2000 training and 1000 test "
        "images, 4 epochs of batches of 32, crop and flip, Adam 1e-3 with a cosine, lambda = 1, gain 0.6, 6 free "
        "and 3 nudged sweeps, centered.",
        "full": f"VGG-5, {FULL_SETTING}",
    },
    base={
        "small": {
            **{name: SMALL[name] for name in ("dataset", "image_size", "limit_test", "schedule")},
            "batch_size": 32,
            "arch": "vgg5",
            "width": 0.25,
            "limit_train": 2000,
            "feedback": 1.0,
            "gain": 0.6,
            "free_steps": 6,
            "nudged_steps": 3,
            "learning_rate": 1e-3,
            "epochs": 4,
        },
        "full": {**FULL, "arch": "vgg5"},
    },
    rows={
        scale: tuple(
            Row(f"{form}-{beta}", f"{form}, beta {beta}", {"nudge": form, "beta": beta})
            for beta in BETAS
            for form in FORMS
        )
        for scale in ("small", "full")
    },
    seeds={"small": 3, "full": 1},
    measure=_traced_cell,
    columns=(*COLUMNS, Column("lowest cosine with BPTT, trained", smallest("bptt"))),
    figures={"courses": figures.courses("train_loss", "test_accuracy"), "cosines": _draw_cosines},
    verdict=_verdict_nudge,
    remarks="""The cosines are those of weight gradients on the first 32 training images after every epoch, from one
well settled free state, with the three nudged sweeps of the training; where no stable equilibrium is found there is
none. From such a state the two forms hardly differ in this network. What differs is training: its six sweeps leave
the free state on its way, the nudged states of the classical form go on from there, and the smaller beta, the larger
that movement is beside the response. The deviation form is free of it.""",
)


def _fidelity_cell(cell: Cell) -> dict[str, Any]:
    """Compare both forms with BPTT on an untrained network, well settled."""
    options = dict(cell.options)
    config = make_config(options)
    dataset = build_dataset(dataclasses.replace(config, limit_train=PROBE_IMAGES, limit_test=1))
    network = build_network(config, dataset, get_device(config.device, config.scratch_mb))
    batch = next(iter(Loader(dataset, "train", config.batch_size, network.device, network.dtype)))
    signals = build_signals(config, network, dataset, None)
    names = ("beta", "free_steps", "nudged_steps", "scheme", "schedule", "relaxation", "tolerance")
    settings = {name: getattr(config, name) for name in names}
    forms = compare_forms(network, batch, forms=FORMS, signals=signals, **settings)
    keep = ("cosine", "nudge_response")
    return {
        form: {name: [_plain(row[name]) for row in rows] for name in keep} for form, rows in forms.items()
    }  # fmt: skip


def _plain(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else float(f"{number:.5g}")


def _lowest(form: str) -> Any:
    def value(cell: Any) -> float | None:
        found = [c for c in cell.get(form, {}).get("cosine", []) if c is not None]
        return min(found) if found else None

    return value


def _draw_fidelity(results: Results) -> Any:
    """Draw the cosine of every layer, a panel a form, a line a row."""
    figure, axes = figures.plain_axes(2)
    for axis, form in zip(axes, FORMS, strict=True):
        for number, row in enumerate(results.rows):
            found = [
                [np.nan if c is None else c for c in cell[form]["cosine"]]
                for cell in results.of(row.key)
                if form in cell
            ]
            if found:
                figures.band(axis, range(1, len(found[0]) + 1), np.array(found), row.label, number)
        axis.set(xlabel="layer (the last is the readout)", ylabel=f"cosine with BPTT, {form} form", ylim=(-0.1, 1.05))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure


def _verdict_fidelity(results: Results) -> str:
    parts = []
    for beta in FIDELITY_BETAS:
        keys = [row.key for row in results.rows if row.options["beta"] == beta]
        lowest = {form: min(results.mean(key, _lowest(form)) for key in keys) for form in FORMS}
        parts.append(f"{beta:g}: {lowest['deviation']:.4f} and {lowest['classical']:.3f}")
    return (
        "Lowest cosine with BPTT of any layer and row, deviation and classical form, by beta: " + "; ".join(parts) + "."
    )


FIDELITY_BETAS = (0.5, 0.05, 0.005)
SETTLED = {"schedule": "evenodd", "free_steps": 500, "nudged_steps": 160, "tolerance": 1e-6, "batch_size": 4}
DEEP = {"arch": "vgg11", "gain": 0.5}
FIDELITY = Experiment(
    name="fidelity",
    title="EP's gradient against BPTT's, layer by layer",
    claim="EP's gradient equals that of BPTT from the same free state as beta goes to 0 (Ernoult et al. 2019): in "
    "deviation form at any depth, with strong and with weak feedback.",
    setting={
        "small": "Untrained networks, quarter width, 4 CIFAR-10 images, lambda = 1, settled by even/odd up to 500 "
        "iterations to 1e-6, 160 nudged iterations, float32 and gain 0.6 unless said.",
        "full": "The same at full width.",
    },
    base={
        "small": {"dataset": "cifar10", "feedback": 1.0, "width": 0.25, **SETTLED},
        "full": {"dataset": "cifar10", "feedback": 1.0, **SETTLED},
    },
    rows={
        scale: (
            *(Row(f"vgg5-{beta}", f"VGG-5, beta {beta:g}", {"arch": "vgg5", "beta": beta}) for beta in FIDELITY_BETAS),
            Row("vgg7", "VGG-7, beta 0.05", {"arch": "vgg7", "beta": 0.05}),
            *(
                Row(f"vgg11-{beta}", f"VGG-11, gain 0.5, beta {beta:g}", {**DEEP, "beta": beta})
                for beta in FIDELITY_BETAS
            ),
            Row("vgg11-le", "VGG-11, gain 0.5, LE, beta 0.05", {**DEEP, **LE, "beta": 0.05}),
            Row("vgg11-gain", "VGG-11, LE, beta 0.05", {**LE, "arch": "vgg11", "beta": 0.05}),
            Row("vgg11-0.1", "VGG-11, lambda 0.1, beta 0.05", {"arch": "vgg11", "beta": 0.05, "feedback": 0.1}),
        )
        for scale in ("small", "full")
    },
    seeds={"small": 3, "full": 1},
    measure=_fidelity_cell,
    columns=(
        Column("lowest cosine, deviation", _lowest("deviation"), ".4f"),
        Column("lowest cosine, classical", _lowest("classical")),
    ),
    figures={"cosines": _draw_fidelity},
    verdict=_verdict_fidelity,
    remarks="""Where a network does not settle, no form can equal BPTT: the theorem is about equilibria. What the
deviation form lacks at a larger beta are units that the nudge pushes across an end of their range; a network with a
higher gain settles closer to such ends. The classical form lets pooling winners flip between the phases and takes
its response as the difference of float32 states.""",
)
