"""Score a model on batches."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.losses import Batch, losses_from, outputs_of, targets_of, to_device
from pipeline.tasks import metrics


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
                    outputs.append(outputs_of(model, on_device).float())
                targets.append(targets_of(on_device))
            all_outputs, all_targets = torch.cat(outputs), torch.cat(targets)
            loss = losses_from(all_outputs, all_targets).double().mean()
    finally:
        model.train(training)
    return metrics.score(metric, all_outputs.cpu().numpy(), all_targets.cpu().numpy()) | {"loss": float(loss)}
