#!/usr/bin/env python3
"""How much of the reading of images that stay in a file is hidden behind the training step?"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

import cupyep as ep
from cupyep.cli.shared import OneLineErrors
from cupyep.data import stored

EXAMPLES = """\b
Examples:
  loading.py                                        VGG-7 at a quarter of its width
  loading.py --width 0.5 --device cuda --batch-size 256
"""


def files(images: int, size: int, folder: Path) -> Iterator[ep.Dataset]:
    """Yield a data set of random images whose training part is in memory, and the same left in its file."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (images, size, size, 3), dtype=np.uint8), np.arange(images) % 10
    np.savez(folder / "images.npz", x=x, y=y)
    for resident in (1 << 62, 0):
        stored.RESIDENT_BYTES = resident
        yield ep.load_dataset(f"file:{folder / 'images.npz'}")


def milliseconds(batches: Callable[[], Any], work: Callable[[Any], Any], repeats: int) -> float:
    """Return the least time of a batch over some passes, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        started, count = time.perf_counter(), 0
        for batch in batches():
            work(batch)
            count += 1
        times.append((time.perf_counter() - started) / count)
    return 1e3 * min(times[1:])


@click.command(cls=OneLineErrors, epilog=EXAMPLES)
@click.option("--arch", default="vgg7", show_default=True, help="Architecture, see cupyep train.")
@click.option("--width", default=0.25, show_default=True, help="Multiplies the number of channels.")
@click.option("--images", default=1280, show_default=True, help="Training images.")
@click.option("--size", default=32, show_default=True, help="Pixels a side.")
@click.option("--batch-size", default=128, show_default=True, help="Images in a batch.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Passes over the images, the fastest counts.",
)
def main(arch: str, width: float, images: int, size: int, batch_size: int, device: str, repeats: int) -> None:
    """Time batches of images in memory and in a file, alone and with a step of EP."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        net = ep.build(arch, classes=10, input_shape=(size, size, 3), width=width, gain=0.5, device=device)
        learner = ep.EquilibriumPropagation(net)

        def step(batch: Any) -> None:
            float(learner.step(batch).loss)

        loaders = [
            ep.Loader(data, "train", batch_size, net.device, net.dtype, shuffle=True, augment=True,
                      generator=np.random.default_rng(0))
            for data in files(images, size, Path(folder))
        ]  # fmt: skip
        one = next(iter(loaders[0]))
        alone = milliseconds(lambda: [one] * len(loaders[0]), step, repeats)
        reading = [milliseconds(loader.__iter__, lambda batch: None, repeats) for loader in loaders]
        both = [milliseconds(loader.__iter__, step, repeats) for loader in loaders]
    click.echo(f"a step: {alone:.1f} ms; ms a batch:")
    for name, read, trained in zip(("memory", "file"), reading, both, strict=True):
        click.echo(f"  {name:7} read {read:6.2f}   read and trained on {trained:7.1f}")
    added = both[1] - both[0]
    click.echo(f"images left in the file make a step {added:+.1f} ms longer ({100 * added / both[0]:+.1f} %)")


if __name__ == "__main__":
    main()
