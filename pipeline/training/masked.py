"""Masked training: the k trained values as ONE vector θ that any ``torch.optim`` optimizer takes.

The optimizer never sees the network, so nothing it does (weight decay, momentum, clipping) can reach a frozen
value, and its state is O(k). θ is the fp32 master of the trained values: bf16 weights lose updates below about
1e-3 of their size, θ does not. Source: DESIGN, "Masked training"; issue 2.

Shape legend: k trained values; m of them in one tensor.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.errors import MismatchError, ModelError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import put_, take, unwrapped
from pipeline.training.bunches import Bunch, bunched, pays
from pipeline.training.embeddings import sole_embeddings
from pipeline.training.gathering import Gathering

_masked: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[MaskedParameters]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Segment:
    """The stretch of θ that belongs to one tensor.

    Attributes:
        parameter: the tensor.
        owner: the module that holds it.
        key: its name in that module.
        start: its first element in θ.
        stop: one past its last.
        coordinates: int64 [m] on the tensor's device, row-major and ascending; None where all are trained, which
            makes gather and write plain copies.
        flat: its elements as one vector, made once; None where its strides do not allow that.
    """

    parameter: nn.Parameter
    owner: nn.Module
    key: str
    start: int
    stop: int
    coordinates: Tensor | None
    flat: Tensor | None

    @property
    def stands(self) -> bool:
        """Whether ``flat`` still is the tensor: not of other strides, nor moved, replaced or cast since."""
        own = self.owner._parameters.get(self.key) is self.parameter
        return own and self.flat is not None and self.flat.data_ptr() == self.parameter.data_ptr()


class MaskedParameters:
    """The trained values of a model as one vector θ; everything outside the mask stays bit-identical.

    A post-accumulate hook on each tensor that has coordinates adds its gradient there to ``values.grad`` and drops
    the dense gradient at once, so that at most one tensor's dense gradient is alive (all of them under
    ``torch.compile``, whose backward is one graph; on a GPU those of small tensors wait for each other, 32 MiB of
    them at most, and are gathered by a few kernels before the backward ends). Tensors without a coordinate do not
    require grad. Large embeddings give sparse gradients, so that no gradient of V x D elements is formed. Every
    call of ``backward`` adds to ``values.grad``; a tensor that took no part in it counts as zero gradient.
    Gradients that the parameters held before are dropped.

    Masking a model again releases the earlier object. Move or cast the model before masking it, not after.

    Args:
        model: any module on one device, plain or wrapped by ``torch.compile``; tied weights count once.
        mask: the coordinates, of this model's trainable parameters.

    Attributes:
        values: θ, fp32 [k] (float64 where the model holds float64) on the model's device: tensors in the order of
            the mask's index, coordinates ascending. It is all the state a resume needs; call ``write_`` after
            loading it.
        mask: the coordinates.
        segments: name -> the stretch of θ that belongs to that tensor, for tensors that have coordinates.

    Raises:
        MismatchError: if the mask belongs to another model; names the first tensor that differs.
        ModelError: if the parameters lie on several devices, or are no real floats.
    """

    def __init__(self, model: nn.Module, mask: Mask) -> None:
        self._model = unwrapped(model)
        parameters = fitting_parameters(self._model, mask)
        earlier = _masked.get(self._model)
        if earlier is not None and (owner := earlier()) is not None:
            owner.release()
        dtypes = {p.dtype for p in parameters.values()}
        self._dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self._device = _only_device(parameters)
        self._flags = {p: p.requires_grad for p in self._model.parameters()}
        self._handles: list[Any] = []
        self._sparse: list[nn.Embedding] = []
        self._bunches: list[tuple[list[str], list[Tensor], Bunch]] = []
        self.segments: dict[str, Segment] = {}
        self.mask = mask
        self.values = nn.Parameter(torch.empty(0, dtype=self._dtype, device=self._device))
        self._gathering = Gathering(self.values)
        self._bind(parameters)
        self.values.data = self._read()
        self._open = True
        _masked[self._model] = weakref.ref(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def model(self) -> nn.Module:
        """The masked model, without the wrapper of ``torch.compile``."""
        return self._model

    @property
    def chosen(self) -> Mask:
        """The coordinates that gradients reach: those of ``mask``, but for ``pipeline.training.leak``."""
        return self.mask

    def __repr__(self) -> str:
        return f"MaskedParameters({self.values.numel()} of {self.mask.index.total}, {self._device})"

    @torch.no_grad()
    def write_(self) -> None:
        """Write θ into the model at the mask's coordinates, rounded to each tensor's dtype.

        Raises:
            ModelError: if a tensor was moved or replaced after the model was masked (``load_state_dict`` with
                ``assign=True`` replaces), or this object was released.
        """
        self._check_open()
        theta, counts = self.values.detach(), [part.stop - part.start for part in self.segments.values()]
        strange = dict.fromkeys(name for name, part in self.segments.items() if not part.stands)
        for name in strange:
            part = self.segments[name]
            if part.parameter.device != self._device or part.owner._parameters.get(part.key) is not part.parameter:
                raise ModelError(
                    f"tensor '{name}' was moved or replaced while masked; prepare the model first, then build "
                    "MaskedParameters on it"
                )
        done: set[str] = set()
        for names, flats, bunch in self._bunches:
            if strange.keys().isdisjoint(names):
                bunch.write(flats, theta.to(flats[0].dtype))
                done.update(names)
        if len(done) == len(self.segments):
            return
        pieces: dict[torch.dtype, tuple[Tensor, ...]] = {}  # one cast of the whole vector per dtype, and one cut
        whole: tuple[list[Tensor], list[Tensor]] = [], []
        for number, (name, part) in enumerate(self.segments.items()):
            if name in done:
                continue
            weight = part.parameter
            if weight.dtype not in pieces:
                pieces[weight.dtype] = theta.to(weight.dtype).split(counts)
            piece = pieces[weight.dtype][number]
            if part.flat is None or name in strange:
                put_(weight, part.coordinates, piece)
            elif part.coordinates is None:
                whole[0].append(part.flat)
                whole[1].append(piece)
            else:
                part.flat.index_copy_(0, part.coordinates, piece)
        if whole[0]:
            torch._foreach_copy_(*whole)  # one kernel for many tensors on a GPU

    @torch.no_grad()
    def remask_(self, mask: Mask, optimizer: Optimizer | None = None) -> None:
        """Train other coordinates from now on, with the same ``values`` object and optimizer.

        θ is written first. Coordinates that stay keep θ and every per-element state of the optimizer (moments);
        new ones start from the model's weights with zero state; step counters go on. ``values.grad`` becomes None.
        A mask of another model is refused before anything changes.

        Args:
            mask: the new coordinates, of the same model.
            optimizer: the one that holds ``values``; None where none was made yet.

        Raises:
            ParamsError: if the optimizer does not hold ``values``.
        """
        self._check_open()
        if optimizer is not None and not any(
            self.values is p for g in optimizer.param_groups for p in g["params"]
        ):
            raise ParamsError("the optimizer given to remask_ does not hold masked.values; pass the one that does")
        parameters = fitting_parameters(self._model, mask)
        self.write_()
        old, theta = self.mask, self.values.detach()
        self._unbind()
        self.mask = mask
        self._bind(parameters)
        kept, source = (t.to(self._device) for t in staying(old, mask))
        fresh = self._read()
        fresh[kept] = theta[source]
        self.values.grad = None
        self.values.data = fresh
        state = {} if optimizer is None else optimizer.state.get(self.values, {})
        for key, moment in state.items():
            if isinstance(moment, Tensor) and moment.shape == theta.shape:
                moved = moment.new_zeros(fresh.shape)
                moved[kept] = moment[source]
                state[key] = moved

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Give the model back for a while, for scores or whatever else needs it as it was before masking.

        Yields:
            None, while hooks are away and every parameter requires a gradient as it did before.

        Raises:
            ModelError: if this object was released.
        """  # noqa: DOC502 - raised by what it calls
        self._check_open()
        parameters = {name: segment.parameter for name, segment in self.segments.items()}
        self._unbind()
        self._restore_flags()
        try:
            yield
        finally:
            self._bind(parameters)

    def release(self) -> None:
        """Give the model back: hooks removed, ``requires_grad`` and ``Embedding.sparse`` as before.

        The weights stay as they were last written. Releasing twice does nothing.
        """
        if self._open:
            self._open = False
            self._unbind()
            self._restore_flags()
            _masked.pop(self._model, None)

    def _check_open(self) -> None:
        if not self._open:
            raise ModelError("this MaskedParameters was released; build a new one on the model")

    def _bind(self, parameters: dict[str, nn.Parameter]) -> None:
        """Point θ at the mask's coordinates: segments, hooks, flags."""
        start = 0
        for name in self.mask.index:
            count = self.mask.count(name)
            if count:
                part = None if self.mask.whole(name) else self.mask.indices[name].to(self._device)
                path, _, key = name.rpartition(".")
                owner = self._model.get_submodule(path)
                weight = parameters[name]
                flat = weight.detach().view(-1) if weight.is_contiguous() else None
                self.segments[name] = Segment(weight, owner, key, start, start + count, part, flat)
                start += count
        parted = {
            name: (part.flat, (part.start, part.stop, part.coordinates, part.flat.numel()))
            for name, part in self.segments.items()
            if part.coordinates is not None and part.flat is not None and pays(part.flat)
        }
        self._bunches = list(bunched(parted))
        self._gathering.forget()
        trained = {segment.parameter for segment in self.segments.values()}
        for parameter in self._flags:
            parameter.grad = None
            parameter.requires_grad_(parameter in trained)
        for segment in self.segments.values():
            hook = self._collector(segment)
            self._handles.append(segment.parameter.register_post_accumulate_grad_hook(hook))
        self._sparse = [m for m in sole_embeddings(self._model) if m.weight in trained]
        for module in self._sparse:
            module.sparse = True

    def _unbind(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._sparse:
            module.sparse = False
        for part in self.segments.values():
            part.parameter.grad = None
        self._handles, self._sparse, self.segments, self._bunches = [], [], {}, []

    def _restore_flags(self) -> None:
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)

    def _read(self) -> Tensor:
        """Copy the model's weights at the coordinates: [k]."""
        parts = [take(s.parameter, s.coordinates).to(self._dtype) for s in self.segments.values()]
        return torch.cat(parts) if parts else torch.empty(0, dtype=self._dtype, device=self._device)

    def _collector(self, part: Segment) -> Callable[[Tensor], None]:
        """Make the hook that moves one tensor's gradient into θ's."""
        stretch = part.start, part.stop, part.coordinates, part.parameter.numel()
        gathering, together = self._gathering, pays(part.parameter)

        def collect(parameter: Tensor) -> None:
            grad = parameter.grad
            parameter.grad = None
            if grad is None:
                return
            if torch.is_grad_enabled():  # of a backward that creates a graph: seldom, and the switch has its price
                with torch.no_grad():
                    gathering.add(grad, stretch, together=together)
            else:
                gathering.add(grad, stretch, together=together)

        return collect


def fitting_parameters(model: nn.Module, mask: Mask) -> dict[str, nn.Parameter]:
    """Find the parameters a mask speaks of, and check that it is this model's.

    Returns:
        name -> parameter, in the mask's order.

    Raises:
        MismatchError: if a tensor is missing, shaped otherwise, or trainable and unknown to the mask.
    """
    have = dict(unwrapped(model).named_parameters())
    for name, shape in mask.index.shapes.items():
        if name not in have:
            raise MismatchError(f"the mask is of another model: tensor '{name}' {list(shape)} is not in this one")
        if tuple(have[name].shape) != shape:
            raise MismatchError(
                f"the mask is of another model: tensor '{name}' is {list(shape)} in the mask and "
                f"{list(have[name].shape)} in this one"
            )
    for name, parameter in have.items():
        if parameter.requires_grad and name not in mask.index:
            raise MismatchError(
                f"the mask is of another model: tensor '{name}' {list(parameter.shape)} requires grad and is not "
                "in the mask; freeze it, or build the mask with it"
            )
    return {name: have[name] for name in mask.index}


def _only_device(parameters: dict[str, nn.Parameter]) -> torch.device:
    """Find the one device of the parameters; refuse several, and what θ cannot hold."""
    first: torch.device | None = None
    for name, parameter in parameters.items():
        first = first or parameter.device
        if parameter.device != first:
            raise ModelError(
                f"tensor '{name}' is on {parameter.device} and others are on {first}; masked training needs the "
                "whole model on one device"
            )
        if not parameter.is_floating_point():
            raise ModelError(f"tensor '{name}' is {parameter.dtype}; masked training needs real floats")
    return first or torch.device("cpu")


def staying(old: Mask, new: Mask) -> tuple[Tensor, Tensor]:
    """Match the coordinates that two masks of one model share.

    Returns:
        Their positions in the new θ and in the old θ: two int64 vectors of one length.
    """
    before, after = _starts(old), _starts(new)
    kept, source = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    for name in new.index:
        if name in old.index and old.count(name) and new.count(name):
            was, now = old.indices[name], new.indices[name]
            at = torch.searchsorted(was, now).clamp_(max=was.numel() - 1)
            stays = was[at] == now
            kept.append(after[name] + stays.nonzero().reshape(-1))
            source.append(before[name] + at[stays])
    return torch.cat(kept), torch.cat(source)


def _starts(mask: Mask) -> dict[str, int]:
    """Find where each tensor's stretch of θ begins."""
    starts: dict[str, int] = {}
    position = 0
    for name in mask.index:
        starts[name] = position
        position += mask.count(name)
    return starts
