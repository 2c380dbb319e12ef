"""Images as stored bytes, normalised batch by batch when read.

Shape legend: N images of a split, B of a batch, C channels, H rows, W columns.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.losses import sent
from pipeline.tasks.draws import Rows

if TYPE_CHECKING:  # batches are made where there is no pyarrow too (benchmarks/table4.py)
    import pyarrow as pa


def pixel_column(pixels_NCHW: np.ndarray) -> "pa.Array":
    """Pack images for storage.

    Returns:
        Fixed-size binary [N], row-major C, H, W.
    """
    import pyarrow as pa

    size = int(np.prod(pixels_NCHW.shape[1:]))
    data = pa.py_buffer(np.ascontiguousarray(pixels_NCHW, dtype=np.uint8).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(pixels_NCHW), [None, data])


def pixel_array(column: "pa.Array", shape: tuple[int, ...]) -> np.ndarray:
    """Unpack what ``pixel_column`` packed.

    Returns:
        uint8 [N, C, H, W], writable.
    """
    size = int(np.prod(shape))
    flat = np.frombuffer(column.buffers()[1], dtype=np.uint8)[column.offset * size :][: len(column) * size]
    return flat.reshape(len(column), *shape).copy()


def statistics(pixels_NCHW: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, on the scale 0..1.

    Summed in integers, hence the same on every machine; rounded to 4 digits. A constant channel's deviation
    reads as 1.

    Returns:
        C means and C deviations.
    """
    counts = [
        np.bincount(pixels_NCHW[:, c].reshape(-1), minlength=256).tolist() for c in range(pixels_NCHW.shape[1])
    ]
    means, deviations = [], []
    for count in counts:
        total = sum(count)
        mean = sum(value * n for value, n in enumerate(count)) / total
        square = sum(value * value * n for value, n in enumerate(count)) / total
        means.append(round(mean / 255, 4))
        deviations.append(round(max(square - mean * mean, 0.0) ** 0.5 / 255, 4) or 1.0)
    return means, deviations


class ImageSplit:
    """The pixels of one fetched split, moved to a device once and normalised there.

    Attributes:
        lengths: None: images are all of one size.
    """

    lengths = None

    def __init__(self, pixels: np.ndarray, labels: Tensor | None, mean: list[float], std: list[float]) -> None:
        """Keep the pixels as bytes.

        Args:
            pixels: uint8 [N, C, H, W].
            labels: [N]; None for an unlabelled split, whose targets read as -1.
            mean: of each channel, on the scale 0..1.
            std: likewise.
        """
        labels = torch.full((len(pixels),), -1) if labels is None else labels
        scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self._on: dict[torch.device, tuple[Tensor, ...]] = {
            torch.device("cpu"): (torch.from_numpy(pixels), labels, *scale)
        }

    def batch(
        self, rows: Rows, device: torch.device | None = None, augment: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalise some images, and augment them.

        Returns:
            float32 [B, C, H, W] and targets [B], on the device.
        """
        device = device or torch.device("cpu")
        if device not in self._on:
            self._on[device] = tuple(tensor.to(device) for tensor in self._on[torch.device("cpu")])
        pixels, labels, mean, std = self._on[device]
        chosen = sent(torch.from_numpy(rows), device)
        x_BCHW = (pixels[chosen].float() / 255 - mean) / std
        return (augment(x_BCHW) if augment else x_BCHW), labels[chosen]
