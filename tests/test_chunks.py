"""How a batch is cut into chunks. Oracle: hand values."""

import numpy as np
import pytest

import cupyep as ep
from cupyep.backend import get_precision
from cupyep.ops.conv import chunked
from cupyep.ops.cuda_conv import CudaConvOps


@pytest.mark.parametrize(
    ("batch", "most", "multiple", "lengths"),
    [
        (10, 4, 1, [4, 4, 2]),
        (10, 100, 1, [10]),
        (10, 0, 1, [1] * 10),
        (128, 21, 4, [20] * 6 + [8]),  # equal chunks would hold 19
        (128, 19, 4, [16] * 8),
        (128, 3, 4, [3] * 42 + [2]),
        (128, 4, 4, [4] * 32),
        (6, 8, 4, [6]),  # one chunk is one chunk
        (100, 60, 16, [48, 48, 4]),
    ],
)
def test_chunks_by_hand(batch, most, multiple, lengths):
    chunks = chunked(batch, most, multiple)
    assert [m for _, m in chunks] == lengths
    assert [i for part, _ in chunks for i in range(part.start, part.stop)] == list(range(batch))


def test_products_on_a_gpu_have_whole_tiles_of_rows():
    """Maps of 6 x 6 pixels: 64 samples fill whole tiles of 256 rows; with 8 x 8, four do."""
    precision = get_precision("float32")
    for size, multiple in ((6, 64), (8, 4), (32, 1)):
        geometry = ep.Conv2d((size, size, 8), 8, pooling="max").geometry
        one = CudaConvOps(geometry, 1, 1, precision, np, None).nbytes
        ops = CudaConvOps(geometry, 200, int(one * (multiple + 3.5)), precision, np, None)
        assert ops.chunks[0][1] % multiple == 0
        assert len(ops.chunks) > 1


@pytest.mark.parametrize("kind", ["numpy", "cuda"])
@pytest.mark.parametrize(("stride", "pooling"), [(1, "none"), (1, "max"), (2, "none")])
def test_the_edge_of_the_image_plans_no_topdown_product(fake_gpu, kind, stride, pooling):
    """The columns of the image, 27 numbers a pixel, decide on its chunks, and not those of 32 channels above."""
    device = fake_gpu if kind == "cuda" else ep.get_device("cpu")
    first, alone = (ep.Conv2d((8, 8, 3), 32, stride=stride, pooling=pooling) for _ in range(2))
    edges = [first, ep.Linear(first.out_shape, 5)]
    net = ep.Network(edges, 3, device=device, precision="float32", feedback=1.0)
    assert [edge.reads_image for edge in edges] == [True, False]
    budget, samples = 256 << 10, 64
    ops, full = (edge.prepare(samples, budget, net.precision, device) for edge in (first, alone))
    pixels = (8 // stride) ** 2
    padded = 28 if kind == "cuda" else 27
    image = 4 * (pixels * padded + (kind == "numpy") * 10 * 10 * 3 + (pooling != "none") * pixels * 32)
    if pooling == "max" and kind == "numpy":
        image += pixels // 4 * 32  # bytes of a mask
    assert ops.chunks[0][1] <= budget // image
    assert ops.chunks[0][1] >= min(samples, 0.7 * budget / image - 4)
    assert len(ops.chunks) < len(full.chunks) or stride == 2  # there the product comes first
    assert len(ops.derived) == len(full.derived) - (stride == 1)
    with pytest.raises(TypeError, match="an edge that reads the image have no top-down"):
        ops.topdown(None, None, None, 1)


def test_an_edge_is_checked_whole_wherever_it_is():
    """`check_edge` of a network's first edge asks it for a top-down product, too."""
    edges = [ep.Conv2d((4, 4, 3), 3), ep.Conv2d((4, 4, 3), 3)]
    assert [edge.reads_image for edge in edges] == [None, None]
    ep.Network(edges, 3, device="cpu", feedback=1.0)
    ep.learning.check_edge(edges[0], "cpu")
    assert [edge.reads_image for edge in edges] == [True, False]
