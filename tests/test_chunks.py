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
