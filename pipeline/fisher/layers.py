"""Exact per-example squares, one rule per layer kind, from the layer's input and the gradient at its output.

A rule adds Σ_n ψ(∂ℓ_n/∂parameter) to the scores of the parameters it is given. It holds for exactly the module
types in ``RULES`` with their own ``forward``; whatever else a model has takes an exact way of ``fallback.py``.

Shape legend: B examples, T positions (everything between example and feature), D features, L output positions of a
convolution, K kernel elements.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.fisher.products import TILE, Work, add_outer

Into = Mapping[str, Tensor]
Rule = Callable[[Any, Tensor, Tensor, Into, Work], None]


def rule_for(module: nn.Module) -> Rule | None:
    """Find the rule of a module.

    Returns:
        The rule, or None if the module's type, options, hooks or replaced ``forward`` make its arithmetic unknown.
    """
    kind = type(module)
    rule = RULES.get(kind)
    if rule is None and kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        rule = _transposed_linear
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if rule is None or "forward" in vars(module) or any(hooks):
        return None
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return None
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        return None  # it normalises with the batch's own statistics: examples are coupled
    return rule


def zero_scores(parameter: Tensor) -> Tensor:
    """Allocate the sum of a parameter's scores, convolutions' channels last, the order of their columns.

    Returns:
        Zeros shaped like the parameter, fp32, or float64 for a float64 parameter.
    """
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    if parameter.ndim < 3:
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
    first, second, *rest = parameter.shape
    return torch.zeros(first, *rest, second, dtype=dtype, device=parameter.device).movedim(-1, 1)


def takes_planes(module: nn.Module) -> int | None:
    """Say whether a rule wants [B, C, *space] as it is, rather than [B, ..., D].

    Returns:
        The number of spatial dimensions (-1 for any), or None for token-wise layers.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return len(module.kernel_size)
    return -1 if isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)) else None


def _tokens(x: Tensor, features: int = 1) -> Tensor:
    """View [B, ..., *features] as [B, T, D].

    Returns:
        The view, or a copy where the strides do not allow one.
    """
    return x.reshape(len(x), math.prod(x.shape[1 : x.ndim - features]), math.prod(x.shape[x.ndim - features :]))


def _add_sum(g_BTD: Tensor, into: Tensor, work: Work) -> None:
    into.add_(work.psi(g_BTD.to(into.dtype).sum(1)).sum(0).view_as(into))


def _linear(module: nn.Module, a: Tensor, g: Tensor, into: Into, work: Work) -> None:
    a_BTI, g_BTO = _tokens(a), _tokens(g)
    if "weight" in into:
        weight = into["weight"]
        # Half precision is converted a group at a time; otherwise nothing is copied.
        copied = 0 if a.dtype == g.dtype == weight.dtype else a_BTI[0].numel() + g_BTO[0].numel()
        for part in work.groups(len(g), copied * weight.element_size()):
            add_outer(g_BTO[part], a_BTI[part], weight, work)
    if "bias" in into:
        _add_sum(g_BTO, into["bias"], work)


def _transposed_linear(module: nn.Module, a: Tensor, g: Tensor, into: Into, work: Work) -> None:
    # transformers' Conv1D is a Linear whose weight is [I, O].
    flipped = {name: t.t() if name == "weight" else t for name, t in into.items()}
    _linear(module, a, g, flipped, work)


def _embedding(module: nn.Embedding, ids: Tensor, g: Tensor, into: Into, work: Work) -> None:
    weight = into["weight"]
    ids_BT, g_BTD = ids.reshape(len(ids), -1), _tokens(g)
    for part in work.groups(len(g), 2 * g_BTD[0].numel() * weight.element_size()):
        row = torch.arange(len(ids_BT[part]), device=ids.device)[:, None]
        # A token's occurrences within one example add up before they are squared: one key per (example, token).
        keys, where = torch.unique((row * len(weight) + ids_BT[part]).flatten(), return_inverse=True)
        sums = weight.new_zeros(len(keys), weight.shape[1])
        sums.index_add_(0, where, g_BTD[part].reshape(-1, weight.shape[1]).to(weight.dtype))
        tokens = keys % len(weight)
        if module.padding_idx is not None:
            sums[tokens == module.padding_idx] = 0
        weight.index_add_(0, tokens, work.psi(sums))


def _channels(x: Tensor) -> Tensor:
    """View [B, C, *space] as [B, L, C].

    Returns:
        The view, or a copy where the strides do not allow one.
    """
    return x.reshape(len(x), x.shape[1], -1).transpose(1, 2)


def _scaled(
    normalise: Callable[[Tensor], Tensor], a: Tensor, g: Tensor, into: Into, work: Work, features: int
) -> None:
    """Add the scores of y = weight · x̂ + bias, whose gradients are Σ_t g x̂ and Σ_t g.

    ``features`` counts the trailing dimensions that are scaled; 0 stands for channels, [B, C, *space].
    """
    some = next(iter(into.values()))
    for part in work.groups(len(g), 3 * g[0].numel() * some.element_size()):
        g_BTD = (_tokens(g[part], features) if features else _channels(g[part])).to(some.dtype)
        if "weight" in into:
            x = normalise(a[part].to(some.dtype))
            _add_sum(g_BTD * (_tokens(x, features) if features else _channels(x)), into["weight"], work)
        if "bias" in into:
            _add_sum(g_BTD, into["bias"], work)


def _layer_norm(module: nn.LayerNorm, a: Tensor, g: Tensor, into: Into, work: Work) -> None:
    shape = module.normalized_shape
    _scaled(lambda x: F.layer_norm(x, shape, None, None, module.eps), a, g, into, work, len(shape))


def _rms_norm(module: nn.RMSNorm, a: Tensor, g: Tensor, into: Into, work: Work) -> None:
    shape = module.normalized_shape
    eps = torch.finfo(a.dtype).eps if module.eps is None else module.eps
    _scaled(lambda x: F.rms_norm(x, list(shape), None, eps), a, g, into, work, len(shape))


def _group_norm(module: nn.GroupNorm, a: Tensor, g: Tensor, into: Into, work: Work) -> None:
    _scaled(lambda x: F.group_norm(x, module.num_groups, None, None, module.eps), a, g, into, work, 0)


def _batch_norm(module: nn.BatchNorm2d, a: Tensor, g: Tensor, into: Into, work: Work) -> None:
    mean, variance = module.running_mean, module.running_var
    assert mean is not None and variance is not None  # rule_for
    shape = (-1, *[1] * (a.ndim - 2))

    def normalise(x: Tensor) -> Tensor:
        return (x - mean.to(x.dtype).view(shape)) * (variance.to(x.dtype) + module.eps).rsqrt().view(shape)

    _scaled(normalise, a, g, into, work, 0)


def _padded(module: Any, a: Tensor) -> Tensor:
    """Pad an input as the convolution does, so that what is left is a convolution without padding.

    Returns:
        The padded input [B, C, *space].
    """
    dims = list(zip(module.kernel_size, module.dilation, strict=True))
    if module.padding == "same":
        spare = [d * (k - 1) for k, d in dims]
        sides = [(s // 2, s - s // 2) for s in spare]
    else:
        sides = [(0, 0)] * len(dims) if module.padding == "valid" else [(p, p) for p in module.padding]
    if not any(map(any, sides)):
        return a
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(a, [side for pair in reversed(sides) for side in pair], mode=mode)


def _convolution(module: Any, a: Tensor, g: Tensor, into: Into, work: Work) -> None:
    if "bias" in into:
        _add_sum(_channels(g), into["bias"], work)
    if "weight" not in into:
        return
    if module.groups == 1 and not module.transposed and len(module.kernel_size) <= 2:
        _dense_convolution(module, a, g, into["weight"], work)
    else:
        _grouped_convolution(module, a, g, into["weight"], work)


def _dense_convolution(module: Any, a: Tensor, g: Tensor, weight: Tensor, work: Work) -> None:
    """Take the convolution as a product with its columns [B, L, K·C]; channels last makes each copy a long run."""
    if len(module.kernel_size) == 1:
        a, g = a.unsqueeze(2), g.unsqueeze(2)
    height, width = (1, *module.kernel_size)[-2:]
    down, right = (1, *module.stride)[-2:]
    deep, wide = (1, *module.dilation)[-2:]
    channels, outputs, (rows, columns) = a.shape[1], g.shape[1], g.shape[2:]
    elements = height * width * channels
    bytes_row = columns * elements * weight.element_size()
    shaped = weight if len(module.kernel_size) == 2 else weight.unsqueeze(2)
    flat = shaped.permute(0, 2, 3, 1)
    total = flat.view(outputs, elements) if flat.is_contiguous() else weight.new_zeros(outputs, elements)
    # A weight of one tile needs one example's columns at a time, best multiplied while they are still in cache.
    chunk = work.chunk
    few = a.device.type == "cpu" and outputs * elements <= TILE * TILE
    work = replace(work, chunk=min(work.chunk, 2**20)) if few else work
    for part in work.groups(len(a), rows * bytes_row):
        x = _padded(module, a[part] if len(module.kernel_size) == 2 else a[part].squeeze(2))
        x = x if x.ndim == 4 else x.unsqueeze(2)
        x = x.to(weight.dtype).permute(0, 2, 3, 1).contiguous()
        by_n, by_y, by_x, _ = x.stride()
        strides = (by_n, down * by_y, right * by_x, deep * by_y, wide * by_x, 1)
        patches = x.as_strided((len(x), rows, columns, height, width, channels), strides)
        g_BOL = g[part].to(weight.dtype).reshape(len(x), outputs, rows * columns)
        if rows * bytes_row <= chunk or rows == 1:
            columns_BLK = patches.reshape(len(x), rows * columns, elements)
            add_outer(g_BOL.transpose(1, 2), columns_BLK, total, work)
            continue
        # One image alone is over the chunk: sum its gradient over bands of rows, then square.
        band = max(1, chunk // bytes_row)
        gradient = torch.zeros_like(total)
        for top in range(0, rows, band):
            g_part = g_BOL[0, :, top * columns : (top + band) * columns]
            gradient.addmm_(g_part, patches[0, top : top + band].reshape(-1, elements))
        total.add_(work.psi(gradient))
    if not flat.is_contiguous():
        flat.add_(total.view(flat.shape))


def _grouped_convolution(module: Any, a: Tensor, g: Tensor, weight: Tensor, work: Work) -> None:
    """Let each example be its own group of one wide convolution: its weight gradient holds every example's."""
    dims = len(module.kernel_size)
    bytes_each = weight.element_size() * (3 * weight.numel() + a[0].numel() + g[0].numel())
    padding = list(module.padding) if module.transposed else [0] * dims
    added = list(module.output_padding) if module.transposed else [0] * dims
    for part in work.groups(len(a), bytes_each):
        x = (a[part] if module.transposed else _padded(module, a[part])).to(weight.dtype)
        size, channels, space = len(x), x.shape[1], x.shape[2:]
        gradient = torch.ops.aten.convolution_backward(
            g[part].to(weight.dtype).reshape(1, -1, *g.shape[2:]),
            x.reshape(1, size * channels, *space),
            weight.new_empty(1).expand(size * weight.shape[0], *weight.shape[1:]),
            None,
            list(module.stride),
            padding,
            list(module.dilation),
            module.transposed,
            added,
            size * module.groups,
            [False, True, False],
        )[1]
        weight.add_(work.psi(gradient.view(size, *weight.shape)).sum(0))


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.ConvTranspose1d: _convolution,
    nn.ConvTranspose2d: _convolution,
    nn.ConvTranspose3d: _convolution,
}
