"""What the loop asks of a batch: its number of examples, and the layout of its images."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.fisher.batches import rows_of
from pipeline.losses import Batch


def count_examples(batch: Batch) -> int:
    """Count the examples of a batch, before it goes through the model.

    Returns:
        The length of its labels or targets, or of its first tensor where it has none.

    Raises:
        DataError: if it has none.
    """
    if not isinstance(batch, Mapping):
        count = len(batch[1])
    elif "labels" in batch:
        count = len(batch["labels"])
    else:
        count = next((len(value) for value in batch.values() if isinstance(value, Tensor)), 0)
    if count == 0:
        raise DataError("a training batch has no examples; leave empty batches out")
    return count


def pieces(batch: Batch, size: int, most: int) -> Iterator[tuple[Batch, int]]:
    """Cut a batch into pieces of some examples each.

    Args:
        batch: of ``size`` examples.
        size: how many.
        most: examples in a piece; 0 leaves the batch whole.

    Yields:
        Each piece, and its number of examples.
    """
    if most == 0 or size <= most:
        yield batch, size
        return
    for start in range(0, size, most):
        stop = min(start + most, size)
        yield rows_of(batch, start, stop, size), stop - start


def to_channels_last(batch: Batch) -> Batch:
    """Give the images (4-D tensors) of a batch the channels-last layout, which convolutions on CUDA prefer.

    Returns:
        A batch of the same form and values.
    """

    def convert(value: Any) -> Any:
        images = isinstance(value, Tensor) and value.ndim == 4
        return value.contiguous(memory_format=torch.channels_last) if images else value

    if isinstance(batch, Mapping):
        return {key: convert(value) for key, value in batch.items()}
    inputs = batch[0]
    if isinstance(inputs, (tuple, list)):
        return tuple(convert(value) for value in inputs), batch[1]
    return convert(inputs), batch[1]
