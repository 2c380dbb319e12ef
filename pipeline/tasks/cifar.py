"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), and the augmentation they are trained with.

Shape legend: B examples, C channels, H rows, W columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import ParamsError
from pipeline.losses import sent
from pipeline.tasks.published import Published

AUGMENT = "crop-flip-cutout"
_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
_TERMS = "no licence stated; cite Krizhevsky 2009"

TASKS = {
    "cifar10": Published(
        "image", "uoft-cs/cifar10", (), "label", "accuracy", tuple(_NAMES.split()), 50000, _TERMS, AUGMENT
    ),
    "cifar100": Published("image", "uoft-cs/cifar100", (), "fine_label", "accuracy", (), 50000, _TERMS, AUGMENT),
}


def defaults(task: str) -> dict[str, Any]:
    """The part of ``tasks.<task>`` in params.yaml that follows from the data set.

    Returns:
        ``kind``, ``data`` and ``metric``.

    Raises:
        ParamsError: if the task is neither ``cifar10`` nor ``cifar100``.
    """
    if task not in TASKS:
        raise ParamsError(f"CIFAR has no task '{task}'; expected one of {', '.join(TASKS)}")
    return TASKS[task].defaults()


def augment(x_BCHW: Tensor, seed: int, *, padding: int = 4, hole: int = 8) -> Tensor:
    """Shift by up to ``padding`` pixels (zeros come in), mirror half of the images, and cut out one square.

    The draws are made on the CPU, so that the same seed augments alike on every device; the work is done where
    the images are. The cut-out square is centred anywhere and clipped at the border (DeVries & Taylor 2017,
    arXiv 1708.04552). Zero is the mean of normalised images.

    Args:
        x_BCHW: normalised images.
        seed: of this batch's draws.
        padding: largest shift, in pixels.
        hole: side of the square, in pixels; 0 cuts nothing.

    Returns:
        [B, C, H, W] of the same dtype and device.
    """
    B, _, H, W = x_BCHW.shape
    device = x_BCHW.device
    generator = torch.Generator().manual_seed(seed)

    # In this order, and sent in one go: each copy to a GPU costs as much as all of them.
    highs = (2 * padding + 1, 2 * padding + 1, 2, H, W)
    draws = torch.stack([torch.randint(high, (B, 1, 1), generator=generator) for high in highs])
    down, right, mirror, y, x = sent(draws, device)
    row_H1, column_1W = torch.arange(H, device=device)[:, None], torch.arange(W, device=device)[None, :]
    column_B1W = torch.where(mirror == 1, W - 1 - column_1W, column_1W)
    padded = F.pad(x_BCHW, (padding, padding, padding, padding))
    image = torch.arange(B, device=device)[:, None, None]
    out_BHWC = padded.permute(0, 2, 3, 1)[image, row_H1 + down, column_B1W + right]
    low, high = hole // 2, hole - hole // 2
    cut_BHW = (row_H1 >= y - low) & (row_H1 < y + high) & (column_1W >= x - low) & (column_1W < x + high)
    return out_BHWC.masked_fill(cut_BHW[..., None], 0).permute(0, 3, 1, 2).contiguous()
