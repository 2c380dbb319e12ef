"""What is differentiated: per-example losses or outputs, and the backward passes that make up a score.

Shape legend: B examples, C classes or outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.losses import example_losses, outputs_of

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """A kind of Fisher diagonal as backward passes through one forward.

    The score of example n is Σ_s ψ(J_nᵀ s_n) over the passes' seeds s, where J_n is the Jacobian of row n of the
    root with respect to the parameters and ψ is the square or the absolute value.

    Attributes:
        kind: "label" (each example's own loss) or "expect" (all classes, weighted by the model's p(y|x)).
        power: "square" or "absolute".
        loss: (model, batch) -> per-example losses [B]; None for ``pipeline.losses.example_losses``.
    """

    kind: str
    power: str
    loss: Loss | None = None

    def root(self, model: nn.Module, batch: Any, size: int) -> Tensor:
        """Run the model forward.

        Returns:
            Losses [B] for "label", outputs [B, C] for "expect"; at least fp32.

        Raises:
            DataError: if targets are missing or do not fit the outputs, or a value is not finite.
        """
        if self.kind == "label":
            root = self.loss(model, batch) if self.loss else _default_losses(model, batch)
            if not isinstance(root, Tensor) or root.shape != (size,):
                shape = list(root.shape) if isinstance(root, Tensor) else type(root).__name__
                raise DataError(
                    f"the loss of a batch of {size} examples came back as {shape}; expected one value per "
                    f"example, [{size}] (reduction='none')"
                )
        else:
            root = outputs_of(model, batch)
            if root.ndim == 0 or len(root) != size or (not _regression(batch) and root.ndim != 2):
                raise DataError(
                    f"kind='expect' found outputs {list(root.shape)} for {size} examples; expected "
                    f"[{size}, classes] with integer targets, or one row per example with float targets"
                )
            root = root.reshape(size, -1)
        if root.dtype in (torch.float16, torch.bfloat16):
            root = root.float()
        if not bool(torch.isfinite(root.detach()).all()):
            raise DataError(
                f"the {'loss' if self.kind == 'label' else 'output'} of an example is not finite; look for NaN or "
                "inf in the batch and in the model's weights"
            )
        return root

    def seeds(self, root: Tensor, batch: Any) -> list[Tensor]:
        """Seeds of the backward passes, each shaped like the root.

        Classes: Σ_y p_y (∂ log p_y)² = diag(Jᵀ (diag(p) - p pᵀ) J), so any factor S Sᵀ of that matrix gives C - 1
        exact passes. The absolute value does not factor: Σ_y p_y |∂ log p_y| takes C, but two classes share one.

        Returns:
            One tensor per pass.
        """
        if self.kind == "label":
            return [torch.ones_like(root)]
        classes = root.shape[1]
        if _regression(batch):
            return [_one_hot(root, c) for c in range(classes)]
        wide = torch.float32 if root.device.type == "mps" else torch.float64
        p_BC = root.detach().to(wide).softmax(dim=1)
        if self.power == "square":
            seeds = _factor(p_BC)
        elif classes == 2:
            weight_B = 2 * p_BC[:, 0] * p_BC[:, 1]
            seeds = [torch.stack((weight_B, -weight_B), dim=1)]
        else:
            seeds = [p_BC[:, c : c + 1] * (_one_hot(p_BC, c) - p_BC) for c in range(classes)]
        return [seed.to(root.dtype) for seed in seeds]


def _default_losses(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping) and "labels" not in batch:
        raise DataError(f"a batch has no 'labels', only {', '.join(map(str, batch))}; add them, or pass loss=")
    try:
        return example_losses(model, batch)
    except ValueError as error:
        raise DataError(str(error)) from error


def _factor(p_BC: Tensor) -> list[Tensor]:
    """Columns of the Cholesky factor of diag(p) - p pᵀ (Tanabe and Sagae 1992), without any subtraction.

    With the tails q_j = Σ_{k>j} p_k: L_jj = √(p_j q_j / q_{j-1}) and L_ij = -(p_i / q_j) L_jj below the diagonal.

    Returns:
        C - 1 seeds [B, C].
    """
    tiny = torch.finfo(p_BC.dtype).tiny
    tails_BC = p_BC.flip(1).cumsum(1).flip(1)
    seeds = []
    for j in range(p_BC.shape[1] - 1):
        before, after = tails_BC[:, j], tails_BC[:, j + 1]
        diagonal = (p_BC[:, j] * (after / before.clamp(min=tiny))).sqrt()
        column = torch.zeros_like(p_BC)
        column[:, j] = diagonal
        column[:, j + 1 :] = -(diagonal / after.clamp(min=tiny))[:, None] * p_BC[:, j + 1 :]
        seeds.append(column)
    return seeds


def _one_hot(like_BC: Tensor, column: int) -> Tensor:
    seed = torch.zeros_like(like_BC)
    seed[:, column] = 1
    return seed


def _regression(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        targets = batch.get("labels")
    else:
        targets = batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
    if not isinstance(targets, Tensor):
        raise DataError(
            "kind='expect' needs targets to tell classes (integers) from regression (floats): batches yield a "
            "mapping with 'labels', or (inputs, targets)"
        )
    return targets.is_floating_point()
