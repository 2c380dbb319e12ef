"""torch's random number generators: read, put back, and left as they were by whoever else uses the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Read torch's random number generators: the CPU's, and the device's.

    Returns:
        ``random.<kind of device>`` -> uint8 state.
    """
    state = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["random.mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what ``random_state`` read."""
    torch.set_rng_state(state["random.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["random.cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state["random.mps"])


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let others use a model in training so that it leaves no trace in what follows.

    Args:
        model: in train mode, to which it returns.
        device: whose random number generator counts, beside the CPU's.

    Yields:
        None, while the model is in eval mode.
    """
    state = random_state(device)
    model.eval()
    try:
        yield
    finally:
        model.train()
        set_random_state(state, device)
