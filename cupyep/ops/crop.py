"""Images of a batch, gathered, cropped, mirrored, a square hidden, normalised.

`CropOps` is plain array code for NumPy and CuPy alike, and the reference, which takes 26 operations; ``crop.cu`` does
the same in one kernel (`CudaCropOps`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend import array_module
from cupyep.backend.device import launcher_for
from cupyep.ops.launch import launch_map, require_type, type_name

SOURCE = Path(__file__).with_name("crop.cu")
STORED = {"uint8": "unsigned char", "float32": "float"}  # CUDA names of the types of stored images


class CropOps:
    """Crops of images widened by `pad` pixels on each side, which are zero after normalisation."""

    def crop(self, stored: Any, draws: Any, scale: Any, shift: Any, pad: int, side: int, own: bool) -> Any:
        """Return a new array (B, H, W, C): ``pixels * scale + shift``, zero in the frame and in hidden squares.

        Parameters
        ----------
        stored : array of shape (N, H, W, C)
        draws : int64 array of shape (B, 6)
            Row of `stored`; first row and first column of the crop in the widened image; 1 where it is mirrored, else
            0; first row and first column of the hidden square in the image that comes out, which may lie outside.
        scale, shift : arrays of shape (C,)
            Of the type of the result.
        pad : int
        side : int
            Of the hidden square, 0 for none.
        own : bool
            Image b is row b of `stored`, whatever row is drawn.
        """
        xp = array_module(stored)
        height, width, channels = stored.shape[1:]
        places, dy, dx, flip, top, left = draws.T[:, :, None]
        if own:
            places = xp.arange(len(draws))[:, None]
        y = xp.arange(height) + dy - pad  # (B, H) row of the stored image, or outside of it
        x = xp.arange(width)
        x = xp.where(flip == 1, width - 1 - x, x) + dx - pad  # (B, W)
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
        if side:
            down, right = xp.arange(height) - top, xp.arange(width) - left  # from the square's first corner
            rows, columns = (down >= 0) & (down < side), (right >= 0) & (right < side)
            inside &= ~(rows[:, :, None] & columns[:, None, :])
        y, x = y.clip(0, height - 1), x.clip(0, width - 1)
        pixel = ((places * height + y) * width)[:, :, None] + x[:, None, :]  # (B, H, W) row in the flat image list
        images = xp.take(stored.reshape(-1, channels), pixel, axis=0).astype(scale.dtype)
        images *= scale
        images += shift
        images *= inside[..., None]
        return images


class CudaCropOps(CropOps):
    """`CropOps` through the kernel of ``crop.cu``, `launcher` being that of `SOURCE`."""

    def __init__(self, launcher: Any):
        self.launcher = launcher

    def crop(self, stored: Any, draws: Any, scale: Any, shift: Any, pad: int, side: int, own: bool) -> Any:
        if stored.dtype.name not in STORED:
            return super().crop(stored, draws, scale, shift, pad, side, own)
        require_type(np.int64, draws)
        require_type(scale.dtype, shift)
        height, width, channels = stored.shape[1:]
        out = array_module(stored).empty((len(draws), *stored.shape[1:]), scale.dtype)
        types, threads = [STORED[stored.dtype.name], type_name(scale.dtype)], (width * channels, height, len(draws))
        sizes = (height, width, channels, pad, side, own)
        launch_map(self.launcher, "crop", types, threads, (stored, draws, scale, shift, out), sizes)
        return out


def crop(stored: Any, draws: Any, scale: Any, shift: Any, pad: int, side: int = 0, own: bool = False) -> Any:
    """Return the images of a batch: see `CropOps`."""
    launcher = launcher_for(stored, SOURCE)
    ops = CropOps() if launcher is None else CudaCropOps(launcher)
    return ops.crop(stored, draws, scale, shift, pad, side, own)
