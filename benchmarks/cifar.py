"""An epoch of our loop against the fastest plain dense loop; mask recomputation and optimizer steps beside them.

    python -m benchmarks.cifar --images 512 --batch 64 --model resnet18 --rounds 3 --threads 1   # CPU: minutes
    python -m benchmarks.cifar --device cuda                                                   # the real sizes

Contestants, one after the other in every round: ``fit`` on a fish mask of 0.5 % and on all parameters, and plain
dense loops over torchvision's ResNet-34 (3x3 stem; our own of the same shape where torchvision is missing); each
as it is and in every ``--compile`` mode of ``torch.compile``. All have their data on the device, augment it there
in batches (shift, mirror, cut-out), and train in bf16 with channels_last on a GPU. Random pixels: time does not
depend on them. Writes results/cifar-<device>.md.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rounds import header, interleaved, options, publish, ratios, spread, table
from pipeline.fisher import fisher_diagonal
from pipeline.masks.mask import Mask
from pipeline.masks.select import dense
from pipeline.parameters import ParameterIndex
from pipeline.tasks import cifar
from pipeline.tasks.batches import Batches, shuffled
from pipeline.tasks.image import ImageSplit
from pipeline.tasks.resnet import build
from pipeline.training.device import choose_device
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import Recipe

DENSITY, EXAMPLES = 0.005, 1024


def reference_model(name: str) -> tuple[nn.Module, str]:
    """Torchvision's network with a 3x3 stem and max-pool; ours of the same shape where it is missing."""
    try:
        import torchvision
    except ImportError:
        return build(name, 3, 10, 0), f"our {name}"
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return model, f"torchvision's {name}"


class Plain:
    """The fastest plain loop: everything resident, draws on the device, a fused optimizer, no bookkeeping."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch: int, mode: str | None) -> None:
        device = images.device
        self._cuda = device.type == "cuda"
        model = model.to(device).train()
        model = model.to(memory_format=torch.channels_last) if self._cuda else model
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        )
        self._model = torch.compile(model, mode=mode) if mode else model
        self._images, self._labels, self._batch = images, labels, batch
        self._rows, self._columns = (torch.arange(size, device=device) for size in images.shape[2:])

    def epoch(self) -> None:
        """Train one epoch."""
        for x, y in self._batches():
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self._cuda):
                loss = F.cross_entropy(self._model(x), y)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, device = len(self._images), self._images.device
        for rows in torch.randperm(count, device=device).split(self._batch):
            B, (H, W) = len(rows), self._images.shape[2:]
            down, right = torch.randint(0, 9, (2, B, 1, 1), device=device)
            mirror = torch.rand(B, 1, 1, device=device) < 0.5
            columns = torch.where(mirror, W - 1 - self._columns, self._columns)
            padded = F.pad(self._images[rows], (4, 4, 4, 4)).permute(0, 2, 3, 1)
            image = torch.arange(B, device=device)[:, None, None]
            x = padded[image, self._rows[:, None] + down, columns + right]
            top, left = torch.randint(0, H, (2, B, 1, 1), device=device)
            cut = ((self._rows[:, None] - top).abs() < 4) & ((self._columns - left).abs() < 4)
            yield x.masked_fill(cut[..., None], 0).permute(0, 3, 1, 2), self._labels[rows]


def ours(
    model: nn.Module, mask: Mask | None, split: ImageSplit, count: int, batch: int, device: str, mode: str | None
) -> Callable[[], object]:
    """An epoch of ``fit`` as the stages call it, state and masking included."""
    place = choose_device(device)
    run = torch.compile(model, mode=mode) if mode else model
    recipe = Recipe(
        epochs=1, lr=1e-3, optimizer="sgd", weight_decay=5e-4, schedule="piecewise", warmup=0.05, seed=0
    )
    chosen = dense(ParameterIndex.of(model)) if mask is None else mask

    def batches(epoch: int) -> Batches:
        groups = shuffled(np.arange(count), batch, None, 0, epoch)
        return Batches(
            groups,
            lambda n, rows: split.batch(rows, place.device, lambda x: cifar.augment(x, seed=n)),
        )

    def epoch() -> None:
        with MaskedParameters(model, chosen) as masked:
            fit(run, batches, masked=masked, recipe=recipe, device=place, channels_last=device == "cuda")

    return epoch


class _Given(torch.autograd.Function):
    """A loss of 0 whose gradients are given: a backward without a network."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *ctx.gradients


def optimizer_steps(model: nn.Module, mask: Mask) -> dict[str, Callable[[], object]]:
    """A backward that hands out ready gradients, and a step: of all parameters; of θ, gathered and written too."""
    parameters = list(model.parameters())
    how = {"lr": 1e-6, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
    whole = torch.optim.SGD(parameters, **how)
    twin = copy.deepcopy(model)
    masked = MaskedParameters(twin, mask)
    sparse = torch.optim.SGD([masked.values], **how)
    hooked = [part.parameter for part in masked.segments.values()]
    gradients, hooked_gradients = ([torch.randn_like(p) for p in tensors] for tensors in (parameters, hooked))

    def dense_step() -> None:
        _Given.apply(gradients, *parameters).backward()
        whole.step()
        whole.zero_grad(set_to_none=True)

    def masked_step() -> None:
        _Given.apply(hooked_gradients, *hooked).backward()
        sparse.step()
        masked.write_()
        sparse.zero_grad(set_to_none=True)

    return {"dense step": dense_step, "masked step": masked_step}


def main() -> None:
    """Measure and write the table."""
    parser = options(__doc__)
    parser.add_argument("--model", default="resnet34", help="resnet18, resnet34 or resnet50")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument(
        "--compile", nargs="*", default=["default"], metavar="MODE", help="reduce-overhead: CUDA graphs"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    pixels = np.random.default_rng(0).integers(0, 256, (args.images, 3, 32, 32), dtype=np.uint8)
    labels = torch.arange(args.images) % 10
    split = ImageSplit(pixels, labels, [0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
    resident, targets = split.batch(np.arange(args.images), device)

    def fresh() -> nn.Module:
        return build(args.model, 3, 10, 0).to(device)

    scored = fresh()

    def recompute() -> Mask:
        batches = [split.batch(rows, device) for rows in np.array_split(np.arange(EXAMPLES) % args.images, 8)]
        return Mask.top_k(fisher_diagonal(scored, batches, examples=EXAMPLES), DENSITY, ["fc"])

    mask = recompute()
    contestants: dict[str, Callable[[], object]] = {}
    for mode in (None, *args.compile):
        suffix = "" if mode is None else f", compiled ({mode})"
        network, named = reference_model(args.model)
        contestants[f"plain dense{suffix}"] = Plain(network, resident, targets, args.batch, mode).epoch
        for name, chosen in (("fit, fish 0.5 %", mask), ("fit, dense", None)):
            contestants[name + suffix] = ours(fresh(), chosen, split, args.images, args.batch, args.device, mode)
    contestants["mask of 1,024 examples"] = recompute
    times = interleaved(contestants, args.rounds, args.device)
    best = [min(of) for of in zip(*(t for n, t in times.items() if n.startswith("plain")), strict=True)]
    steps = interleaved(optimizer_steps(fresh(), mask), 5 * args.rounds, args.device)
    rows = [[name, spread(t, 0), ratios(t, best)] for name, t in times.items()]
    rows += [[name, spread(t, 2), f"{ratios(t, steps['dense step'])} of dense"] for name, t in steps.items()]
    fastest = 1e3 * args.images / min(best)
    lines = header(f"An epoch of {args.model} on {args.images:,} images of 32x32, batch {args.batch}", args.device)
    lines += [
        f"The plain loops train {named}. Random pixels. Fastest plain loop: {fastest:,.0f} images per second."
    ]
    lines += ["", *table(["", "ms (range)", "ratio to the fastest plain loop (range)"], rows)]
    publish(f"cifar-{args.device}.md", lines)


if __name__ == "__main__":
    main()
