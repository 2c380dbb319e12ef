"""Networks for small images by name: residual ones (He et al. 2016, arXiv 1512.03385), with a 3x3 stem; a ViT.

Every head is named ``fc``.

Shape legend: B examples, C channels, H rows, W columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.tasks.vit import ViT


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Convolution and BatchNorm, sizes kept up to the stride."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: y = relu(f(x) + s(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.conv2 = _conv(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, stride, kernel=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Apply the block.

        Returns:
            [B, outputs, H / stride, W / stride].
        """
        return torch.relu(self.conv2(torch.relu(self.conv1(x_BCHW))) + self.shortcut(x_BCHW))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the width in between is a quarter of the outputs."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1 = _conv(inputs, width, kernel=1)
        self.conv2 = _conv(width, width, stride)
        self.conv3 = _conv(width, outputs, kernel=1)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, stride, kernel=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Apply the block.

        Returns:
            [B, outputs, H / stride, W / stride].
        """
        y_BCHW = torch.relu(self.conv2(torch.relu(self.conv1(x_BCHW))))
        return torch.relu(self.conv3(y_BCHW) + self.shortcut(x_BCHW))


class ResNet(nn.Module):
    """Stem, stages of blocks (each but the first halves the image), average over the image, linear head ``fc``."""

    def __init__(
        self,
        channels: int,
        classes: int,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        *,
        pool: bool = False,
        deep: bool = False,
    ) -> None:
        """Build it; weights are drawn from torch's generator.

        Args:
            channels: of the input images.
            classes: outputs.
            widths: channels of each stage.
            blocks: blocks of each stage.
            pool: halve the image after the stem by max-pooling.
            deep: of bottleneck blocks, which give four times as many channels.
        """
        super().__init__()
        self.stem = nn.Sequential(_conv(channels, widths[0]), nn.ReLU())
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                outputs = 4 * width if deep else width
                kind = Bottleneck if deep else Block
                stages.append(kind(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)
        _draw(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Classify images.

        Returns:
            Logits [B, classes].
        """
        logits: Tensor = self.fc(self.blocks(self.pool(self.stem(x_BCHW))).mean(dim=(2, 3)))
        return logits


class ResNet9(nn.Module):
    """The nine-layer network of DAWNBench's CIFAR-10 entries (Page 2018), with plain max-pooling at the end."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, *, halve: bool) -> nn.Sequential:
            return nn.Sequential(_conv(inputs, outputs), nn.ReLU(), nn.MaxPool2d(2) if halve else nn.Identity())

        self.stem = layer(channels, 64, halve=False)
        self.layer1, self.residual1 = layer(64, 128, halve=True), self._residual(128)
        self.layer2 = layer(128, 256, halve=True)
        self.layer3, self.residual2 = layer(256, 512, halve=True), self._residual(512)
        self.fc = nn.Linear(512, classes)
        _draw(self)

    @staticmethod
    def _residual(width: int) -> nn.Sequential:
        return nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Classify images of at least 8x8 pixels.

        Returns:
            Logits [B, classes].
        """
        x_BCHW = self.layer1(self.stem(x_BCHW))
        x_BCHW = self.layer2(x_BCHW + self.residual1(x_BCHW))
        x_BCHW = self.layer3(x_BCHW)
        logits: Tensor = self.fc((x_BCHW + self.residual2(x_BCHW)).amax(dim=(2, 3)))
        return logits


def _draw(model: nn.Module) -> None:
    """He initialisation for convolutions; BatchNorm at identity and the head's as torch draws them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


_FOUR = (64, 128, 256, 512)
BUILTIN: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet-digits": lambda channels, classes: ResNet(channels, classes, (32, 64, 128), (1, 1, 1)),
    "resnet9": ResNet9,
    # The first implementation kept ImageNet's max-pooling behind the 3x3 stem; so do these, to be comparable.
    "resnet18": lambda channels, classes: ResNet(channels, classes, _FOUR, (2, 2, 2, 2), pool=True),
    "resnet34": lambda channels, classes: ResNet(channels, classes, _FOUR, (3, 4, 6, 3), pool=True),
    "resnet50": lambda channels, classes: ResNet(channels, classes, _FOUR, (3, 4, 6, 3), pool=True, deep=True),
    "vit": lambda channels, classes: ViT(channels, classes),
}


def build(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    """Build a network of this file from scratch; torch's own generator is left as it was.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        ModelError: if there is no such network.
    """
    if name not in BUILTIN:
        raise ModelError(
            f"model.source: no model 'builtin:{name}'; expected one of builtin:{', builtin:'.join(BUILTIN)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return BUILTIN[name](channels, classes).eval()
