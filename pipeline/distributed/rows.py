"""Several tensors as one matrix of bytes with a row per rank, so that one exchange carries them all.

Shape legend: W ranks; n elements of one part of a tensor, ceil(size / W).
"""

from collections.abc import Container, Mapping

import torch
from torch import Tensor

_ALIGNMENT = 8  # bytes: of the widest dtype


class Rows:
    """Where each tensor's parts stand: part r, in row r, is what rank r adds up.

    Args:
        tensors: name -> tensor.
        halved: names that travel in bf16.
        size: W.

    Attributes:
        nbytes: name -> bytes of one part.
        width: bytes of a row.
    """

    def __init__(self, tensors: Mapping[str, Tensor], halved: Container[str], size: int) -> None:
        dtypes = {n: torch.bfloat16 if n in halved else tensor.dtype for n, tensor in tensors.items()}
        self.nbytes: dict[str, int] = {}
        self._at: dict[str, tuple[int, int, torch.dtype]] = {}
        start = 0  # of the next stretch: with the widest dtypes first each starts at a multiple of its own
        for name in sorted(dtypes, key=lambda n: -dtypes[n].itemsize):
            self.nbytes[name] = -(-tensors[name].numel() // size) * dtypes[name].itemsize
            self._at[name] = (start, start + self.nbytes[name], dtypes[name])
            start += self.nbytes[name]
        self.width = -(-start // _ALIGNMENT) * _ALIGNMENT

    @property
    def padding(self) -> int:
        """Bytes of a row that carry nothing."""
        return self.width - sum(self.nbytes.values())

    def part(self, matrix: Tensor, name: str) -> Tensor:
        """View one tensor's parts in a matrix of bytes, uint8 [W, width].

        Returns:
            [W, n], in the dtype in which it travels.
        """
        start, stop, dtype = self._at[name]
        return matrix[:, start:stop].view(dtype)

    def fill(self, matrix: Tensor, name: str, flat: Tensor) -> None:
        """Cut a vector into the rows of a matrix, the rest zeros."""
        rows_Wn = self.part(matrix, name)
        if rows_Wn.shape[1]:
            full, rest = divmod(len(flat), rows_Wn.shape[1])
            rows_Wn[:full].copy_(flat[: len(flat) - rest].view(full, -1))
            rows_Wn[full:].zero_()
            if rest:
                rows_Wn[full, :rest].copy_(flat[len(flat) - rest :])

    def read(self, matrix: Tensor, name: str, flat: Tensor) -> None:
        """Put the rows of a matrix together again, into a vector."""
        rows_Wn = self.part(matrix, name)
        if rows_Wn.shape[1]:
            full, rest = divmod(len(flat), rows_Wn.shape[1])
            flat[: len(flat) - rest].view(full, -1).copy_(rows_Wn[:full])
            if rest:
                flat[len(flat) - rest :].copy_(rows_Wn[full, :rest])
