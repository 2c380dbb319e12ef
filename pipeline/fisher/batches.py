"""Trees of tensors: walking, moving and cutting whatever a model or a loss takes as a batch.

The first dimension of every tensor of a batch counts examples.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.losses import sent


def leaves_of(tree: Any) -> Iterator[Any]:
    """Walk nested mappings, lists and tuples depth first.

    Yields:
        What is none of these: tensors, numbers, None, and objects of any other kind.
    """
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves_of(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves_of(value)
    else:
        yield tree


def map_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Rebuild a tree with ``change`` applied to each leaf, in the order of ``leaves_of``.

    Returns:
        A tree of the same form, its mappings as plain dicts.
    """
    if isinstance(tree, Mapping):
        return {key: map_leaves(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(value, change) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)([map_leaves(value, change) for value in tree])
    return change(tree)


def moved(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch.

    Returns:
        A batch of the same form.
    """
    return map_leaves(batch, lambda leaf: sent(leaf, device) if isinstance(leaf, Tensor) else leaf)


def size_of(batch: Any) -> int:
    """Count the examples of a batch: the length of its targets, or of its first tensor where it has none.

    Returns:
        B, the number of examples.

    Raises:
        DataError: if the batch holds no tensor with a first dimension.
    """
    targets = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        targets = batch[1]
    for leaf in (targets, *leaves_of(batch)):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise DataError(
        f"a batch of type {type(batch).__name__} holds no tensor with one row per example; "
        "batches yield a mapping with 'labels', or (inputs, targets)"
    )


def rows_of(batch: Any, start: int, stop: int, size: int) -> Any:
    """Cut examples ``start`` to ``stop`` out of a batch of ``size``.

    Tensors, and lists without tensors, that are ``size`` long are cut; anything else is shared by all examples.

    Returns:
        A batch of the same form.
    """
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: rows_of(value, start, stop, size) for key, value in batch.items()}
    if isinstance(batch, list) and len(batch) == size and not any(isinstance(x, Tensor) for x in leaves_of(batch)):
        return batch[start:stop]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(rows_of(value, start, stop, size) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)([rows_of(value, start, stop, size) for value in batch])
    return batch
