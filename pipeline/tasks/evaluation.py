"""Score a model on batches.

Shape legend: N examples, B of a batch, T tokens, V of the vocabulary.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.losses import IGNORED, Batch, losses_from, outputs_of, targets_of, to_device, token_losses
from pipeline.tasks import metrics

_LARGEST = 100.0  # of a mean loss whose exponential is told


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    metric: str,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Run a model over batches in eval mode and without gradients; it is left in the mode it was in.

    Args:
        model: on the device.
        batches: at least one, with labels.
        metric: one of ``metrics.METRICS``.
        device: where the model is.
        autocast: dtype of ``torch.autocast``, if any; losses and metrics are computed in fp32.

    Returns:
        The metric first, what is usually shown beside it, and ``loss``, the mean over examples.
    """
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                on_device = to_device(batch, device)
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    output = outputs_of(model, on_device).float()
                # The outputs of a language model are too large to be kept: T x V of them an example.
                outputs.append(_of_completions(output, targets_of(on_device)) if output.ndim == 3 else output)
                targets.append(targets_of(on_device))
            if metrics.objective_of(metric) == "completion":
                return _completions(torch.cat(outputs))
            all_outputs, all_targets = torch.cat(outputs), torch.cat(targets)
            loss = losses_from(all_outputs, all_targets).double().mean()
    finally:
        model.train(training)
    return metrics.score(metric, all_outputs.cpu().numpy(), all_targets.cpu().numpy()) | {"loss": float(loss)}


def _of_completions(outputs_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """What is kept of each completion: its mean loss, its summed loss, its tokens, those that are the likeliest.

    Returns:
        float64 [B, 4].
    """
    asked_BT = targets_BT[:, 1:] != IGNORED
    losses_BT = token_losses(outputs_BTV, targets_BT).double()
    right_BT = (outputs_BTV[:, :-1].argmax(dim=2) == targets_BT[:, 1:]) & asked_BT
    total_B, count_B = losses_BT.sum(dim=1), asked_BT.sum(dim=1)
    return torch.stack((total_B / count_B.clamp(min=1), total_B, count_B, right_BT.sum(dim=1)), dim=1)


def _completions(kept_N4: Tensor) -> dict[str, float]:
    mean, total, count, right = kept_N4[:, 0].mean(), *kept_N4[:, 1:].sum(dim=0)
    tokens = max(float(count), 1.0)
    perplexity = math.exp(min(float(total) / tokens, _LARGEST))
    return {"token_accuracy": float(right) / tokens, "perplexity": perplexity, "loss": float(mean)}
