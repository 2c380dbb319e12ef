"""Out of memory: the same work again in smaller pieces."""

from collections.abc import Callable
from typing import TypeVar

import torch

from pipeline.errors import ModelError

T = TypeVar("T")
Say = Callable[[str], None]
# The last is what cuBLAS and cuDNN say where their own memory runs out.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Tell an allocation that failed, on any device, from other errors."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def halved(size: int, what: str, say: Say | None) -> int:
    """Halve a size after it was too much; memory that nobody holds goes back to the device.

    Args:
        size: of what did not fit.
        what: it counts, for the message.
        say: takes a sentence on it.

    Returns:
        The new size.

    Raises:
        ModelError: if nothing is left to halve.
    """
    if size <= 1:
        raise ModelError(
            f"out of memory with a single example, {what} cannot be smaller; take a smaller model, shorter texts "
            "or smaller images, or a device with more memory"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if say is not None:
        say(f"out of memory: {what} of {size // 2} examples instead of {size} from here on")
    return size // 2


def in_pieces_that_fit(work: Callable[[int], T], size: int, what: str, say: Say | None = None) -> tuple[T, int]:
    """Do work whose result does not depend on the size of its pieces, with smaller ones until they fit.

    Args:
        work: takes a size.
        size: to begin with.
        what: it counts, for the message.
        say: takes a sentence where the size is lowered.

    Returns:
        The result, and the size that fitted. A ModelError if not even 1 fits.
    """  # noqa: DOC501 - what is no want of memory goes through
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        size = halved(size, what, say)  # outside the handler: its traceback holds what is to be freed
