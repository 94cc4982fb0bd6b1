"""Convolution as one matrix product: padding and the column matrix (im2col), channels last.

With a map padded to ``(n, Hp, Wp, C)``, row (image, y, x) of the column matrix holds the ``k * k * C`` inputs
that the kernel sees at output position (y, x), in the order (ky, kx, channel) of a weight ``(k, k, C, K)``. Hence
``columns @ weight.reshape(k * k * C, K)`` is the convolution (cross-correlation, as in every deep-learning library).
"""

from __future__ import annotations

from typing import Any

from cupyep.backend import array_module


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Return the length of a convolved axis, ``floor((size + 2 padding - kernel) / stride) + 1``."""
    return (size + 2 * padding - kernel) // stride + 1


def inner_view(padded: Any, size: tuple[int, int], offset: int, step: int = 1) -> Any:
    """Zero the frame of `padded` (n, Hp, Wp, C) and return the view (n, H, W, C) of the map inside, of `size` (H, W).

    The map starts at `offset` on both spatial axes; its pixels lie `step` apart (the adjoint of a strided convolution
    spreads its map), and the gaps are zeroed, too.
    """
    height, width = size
    bottom, right = offset + (height - 1) * step + 1, offset + (width - 1) * step + 1
    if step > 1:
        padded[...] = 0
    else:
        padded[:, :offset] = 0
        padded[:, bottom:] = 0
        padded[:, offset:bottom, :offset] = 0
        padded[:, offset:bottom, right:] = 0
    return padded[:, offset:bottom:step, offset:right:step]


def im2col(padded: Any, kernel: int, stride: int, out: Any) -> None:
    """Write the column matrix of `padded` into `out`.

    Parameters
    ----------
    padded : array of shape (n, Hp, Wp, C), C-contiguous
    kernel, stride : int
    out : array of shape (n, Ho, Wo, kernel, kernel * C)
        ``kernel * C`` neighbours along a row of a channels-last map are contiguous, so a row of the column
        matrix is `kernel` runs.
    """
    n, ho, wo, _, run = out.shape
    sn, sy, sx, sc = padded.strides
    windows = array_module(padded).lib.stride_tricks.as_strided(
        padded, (n, ho, wo, kernel, run), (sn, sy * stride, sx * stride, sy, sc)
    )
    out[...] = windows


def col2im(columns: Any, kernel: int, stride: int, padded: Any) -> None:
    """Write the transpose of `im2col` applied to `columns` into `padded`: what falls on one pixel is added.

    Parameters
    ----------
    columns : array of shape (n, Ho, Wo, kernel, kernel * C)
    kernel, stride : int
    padded : array of shape (n, Hp, Wp, C)
    """
    _, ho, wo, _, run = columns.shape
    channels = run // kernel
    padded[...] = 0
    for ky in range(kernel):
        for kx in range(kernel):
            bottom, right = ky + (ho - 1) * stride + 1, kx + (wo - 1) * stride + 1
            place = padded[:, ky:bottom:stride, kx:right:stride]
            place += columns[:, :, :, ky, kx * channels : (kx + 1) * channels]
