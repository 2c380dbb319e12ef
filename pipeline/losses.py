"""One batch through a model: its outputs, and each example's own loss.

A batch is either a mapping with ``labels`` and whatever else the model takes (the transformers convention)
or a pair ``(inputs, targets)``.

Shape legend: B examples, C classes or outputs, T tokens of a text, V tokens of a vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Mapping[str, Any] | tuple[Any, Any] | list[Any]
IGNORED = -100
"""The target of a token that is not to be predicted: of the prompt, or padding."""


def targets_of(batch: Batch) -> Tensor:
    """Pick the targets out of a batch: int64 classes [B], floats [B] or [B, C], or int64 tokens [B, T].

    Returns:
        The targets.
    """
    targets: Tensor = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    return targets


def outputs_of(model: nn.Module, batch: Batch) -> Tensor:
    """Run a batch through the model without its labels, so that the model computes no loss of its own.

    Returns:
        Outputs [B, C]: logits of C classes, or C regression outputs; [B, T, V] of a language model.
    """
    if isinstance(batch, Mapping):
        result = model(**{key: value for key, value in batch.items() if key != "labels"})
    else:
        inputs = batch[0]
        result = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    if isinstance(result, Tensor):
        return result
    logits = getattr(result, "logits", None)
    return logits if isinstance(logits, Tensor) else result[0]


def losses_from(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each example's own loss, computed in fp32 at least.

    Classification (integer targets): cross-entropy -log p(y|x). Regression (float targets): the squared error
    (f(x) - y)², averaged over the outputs, as transformers trains it. Language models: -log p(token | those
    before), averaged over the example's targets that are not ``IGNORED``.

    Args:
        outputs: [B, C], or [B] for regression, or [B, T, V].
        targets: int64 [B], or floats [B] or [B, C], or int64 [B, T].

    Returns:
        Losses [B].

    Raises:
        ValueError: if outputs and targets do not pair up as above; pass a ``loss`` of your own then.
    """
    outputs = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    if not targets.is_floating_point() and outputs.ndim == 2 and targets.ndim == 1:
        return F.cross_entropy(outputs, targets, reduction="none")
    if not targets.is_floating_point() and outputs.ndim == 3 and targets.shape == outputs.shape[:2]:
        losses_BT = token_losses(outputs, targets)
        return losses_BT.sum(dim=1) / (targets[:, 1:] != IGNORED).sum(dim=1).clamp(min=1)
    if targets.is_floating_point() and outputs.numel() == targets.numel():
        difference = outputs.reshape(len(targets), -1) - targets.reshape(len(targets), -1).to(outputs.dtype)
        return difference.square().mean(dim=1)
    raise ValueError(
        f"outputs {list(outputs.shape)} and targets {list(targets.shape)} ({targets.dtype}) are neither "
        "classification ([B, C] and int64 [B]) nor regression (as many floats); pass loss=(model, batch) -> [B]"
    )


def token_losses(outputs_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Each token's own loss -log p(token | those before); 0 where the target is ``IGNORED``.

    Returns:
        Losses [B, T - 1] of the tokens from the second on.
    """
    logits_BVT = outputs_BTV[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits_BVT, targets_BT[:, 1:], reduction="none", ignore_index=IGNORED)


def example_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The default ``loss``: each example's own loss under the model.

    Returns:
        Losses [B].
    """
    return losses_from(outputs_of(model, batch), targets_of(batch))


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move every tensor of a batch.

    Returns:
        A batch of the same form.
    """
    where = torch.device(device)
    if isinstance(batch, Mapping):
        return {k: sent(v, where) if isinstance(v, Tensor) else v for k, v in batch.items()}
    inputs, targets = batch
    if isinstance(inputs, (tuple, list)):
        return tuple(sent(x, where) for x in inputs), sent(targets, where)
    return sent(inputs, where), sent(targets, where)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor to a device; from the CPU to a GPU without waiting for the work that is queued there.

    Returns:
        The tensor on the device; itself where it is there already.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait
    return tensor.to(device)  # without waiting, a copy back to the CPU might be read before it is there
