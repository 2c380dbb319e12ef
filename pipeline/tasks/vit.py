"""A plain vision transformer for small images (Dosovitskiy et al. 2021), as simplified by Beyer et al. 2022.

Fixed sine and cosine positions and a mean over patches (arXiv 2205.01580): no class token, no learnt positions, so
that images of any size that the patch divides can be taken.

Shape legend: B examples, C channels, H rows, W columns, T patches, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """Self-attention and a perceptron of four times the width, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Apply the layer.

        Returns:
            [B, T, D].
        """
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.norm1(x_BTD)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(B, T, D)
        x_BTD = x_BTD + self.out(mixed)
        added: Tensor = x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))
        return added


class ViT(nn.Module):
    """Patches of 4x4 pixels, six layers of width 192 with three heads, a mean over patches, the head ``fc``."""

    def __init__(
        self, channels: int, classes: int, *, patch: int = 4, width: int = 192, depth: int = 6, heads: int = 3
    ) -> None:
        """Build it; weights are drawn from torch's generator.

        Args:
            channels: of the input images.
            classes: outputs.
            patch: side of a patch, in pixels.
            width: D, a multiple of four and of the heads.
            depth: layers.
            heads: of each attention.
        """
        super().__init__()
        self.stem = nn.Conv2d(channels, width, patch, patch)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Classify images.

        Returns:
            Logits [B, classes].

        Raises:
            ValueError: if patches do not fill the images.
        """
        if any(side % patch for side, patch in zip(x_BCHW.shape[2:], self.stem.kernel_size, strict=True)):
            raise ValueError(f"sides of {list(x_BCHW.shape[2:])} pixels; expected multiples of the patch's")
        x_BDHW = self.stem(x_BCHW)
        x_BTD = x_BDHW.flatten(2).transpose(1, 2) + _positions(x_BDHW)
        logits: Tensor = self.fc(self.norm(self.layers(x_BTD)).mean(dim=1))
        return logits


def _positions(x_BDHW: Tensor) -> Tensor:
    """Sines and cosines of each patch's row and column at D / 4 frequencies: [T, D]."""
    D, H, W = x_BDHW.shape[1:]
    row_H, column_W, rates = (torch.arange(n, device=x_BDHW.device).float() for n in (H, W, D // 4))
    rates = 10_000 ** -(rates / max(D // 4 - 1, 1))
    row_HD, column_WD = row_H[:, None] * rates, column_W[:, None] * rates
    waves = [
        wave.expand(H, W, D // 4)
        for angle in (column_WD[None], row_HD[:, None])
        for wave in (angle.sin(), angle.cos())
    ]
    return torch.cat(waves, dim=2).reshape(H * W, D).to(x_BDHW.dtype)
