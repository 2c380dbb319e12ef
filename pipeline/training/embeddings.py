"""Sparse gradients of large embeddings, so that no gradient of V x D elements is ever formed.

Shape legend: m trained values of one embedding; V rows, D columns; U distinct rows in the batch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Batches hold some thousand tokens: an embedding of fewer rows has a dense gradient no larger than its sparse one.
SPARSE_ROWS = 2048


def sole_embeddings(model: nn.Module) -> Iterator[nn.Embedding]:
    """Find the embeddings that may give sparse gradients: large, and used by no other module (untied).

    Yields:
        Embeddings that do not give sparse gradients yet.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for module in model.modules():
        # torch refuses sparse gradients together with scale_grad_by_freq.
        if isinstance(module, nn.Embedding) and not module.sparse and not module.scale_grad_by_freq:
            if module.num_embeddings >= SPARSE_ROWS and uses.get(id(module.weight)) == 1:
                yield module


def add_rows(target: Tensor, grad: Tensor, coordinates: Tensor | None) -> None:
    """Add the sparse gradient of an embedding to the gradient of its trained values, without a dense copy.

    Args:
        target: fp32 [m], added to.
        grad: sparse [V, D], coalesced or not.
        coordinates: int64 [m], row-major; None where all V·D are trained.
    """
    if grad.dtype in (torch.float16, torch.bfloat16):
        grad = grad.float()  # repeated tokens are summed below: in fp32, as the dense gradient is at best
    grad = grad.coalesce()
    rows_U, values_UD = grad.indices()[0], grad.values()
    if coordinates is None:
        target.view(grad.shape).index_add_(0, rows_U, values_UD.to(target.dtype))
    elif rows_U.numel():
        width = grad.shape[1]
        row_m = coordinates // width
        at_m = torch.searchsorted(rows_U, row_m).clamp_(max=rows_U.numel() - 1)
        found_m = values_UD.reshape(-1).index_select(0, at_m * width + coordinates % width)
        # `where`, not a product: a row outside the mask may hold an infinity under a loss scale.
        target.add_(torch.where(rows_U[at_m] == row_m, found_m, 0))
