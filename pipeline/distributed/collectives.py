"""What the workers of a run say to each other; every byte is counted.

A sum over the workers is made of two all-to-alls: each rank adds up one part of the vector, in the order of the
ranks, and hands it to all. That is as many bytes as a ring all-reduce (each rank sends 2 (W-1)/W of the vector),
in two journeys over the network instead of 2 (W-1), and with an order of summation that no backend, device or
number of buckets changes: all ranks end bitwise equal, and equal to W workers simulated in one process that adds
in the order of the ranks.

Shape legend: W ranks; n elements of one part, ceil(size / W).
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed.rows import Rows
from pipeline.errors import MismatchError, WorkerError
from pipeline.parameters import byte_view


class Collectives:
    """The reductions of one process group; without one, those of a single worker, which send nothing.

    Args:
        group: the process group; None for the default one.

    Attributes:
        rank: of this process, from 0.
        size: W, the number of processes.
        bytes: what this rank has handed to collectives for other ranks, by purpose.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        there = dist.is_available() and dist.is_initialized()
        self._group = group
        self.rank: int = dist.get_rank(group) if there else 0
        self.size: int = dist.get_world_size(group) if there else 1
        self._on_device = there and "nccl" in dist.get_backend(group)
        self.bytes: Counter[str] = Counter()
        self._room: Tensor | None = None

    @property
    def bytes_sent(self) -> int:
        """All bytes that this rank has handed over so far."""
        return self.bytes.total()

    def sum_(self, tensors: Mapping[str, Tensor], residuals: MutableMapping[str, Tensor] | None = None) -> None:
        """Add tensors up over the ranks, all of them in one exchange; each is overwritten by its sum.

        s = ((x_0 + x_1) + x_2) + ..., in the tensor's own dtype, so that integers stay exact. A tensor that has a
        residual travels in bf16 with error feedback: what rounding to bf16 loses, before the sum and after it, is
        kept in the residual and added to the next call's. The sums are bitwise equal on all ranks.

        Args:
            tensors: purpose -> contiguous tensor, of the same shapes and dtypes on every rank.
            residuals: purpose -> fp32 tensor like it, this rank's rounding errors so far; updated in place.

        Raises:
            WorkerError: if another worker died, hung, or cannot be reached.
        """  # noqa: DOC502 - raised by what it calls
        if self.size == 1:
            return
        residuals = residuals or {}
        rows = Rows(tensors, residuals, self.size)
        sent, received = self._matrices(rows.width)
        for name, tensor in tensors.items():
            flat = tensor.detach().view(-1)
            if name in residuals:
                exact = residuals[name].view(-1).add_(flat)
                flat = exact.to(torch.bfloat16)
                exact -= flat
            rows.fill(sent, name, flat)
            self.bytes[name] += 2 * (self.size - 1) * rows.nbytes[name]
        if rows.padding:
            self.bytes["padding"] += 2 * (self.size - 1) * rows.padding
        self._all_to_all(received, sent)
        for name, tensor in tensors.items():
            part_Wn = rows.part(received, name)
            total_n = part_Wn[0].to(tensor.dtype)
            for row_n in part_Wn[1:]:
                total_n += row_n
            rounded_n = total_n.to(part_Wn.dtype)
            if name in residuals:
                mine = residuals[name].view(-1)[self.rank * len(total_n) :][: len(total_n)]
                mine += (total_n - rounded_n)[: len(mine)].to(mine.device)
            rows.part(sent, name).copy_(rounded_n)
        self._all_to_all(received, sent)
        for name, tensor in tensors.items():
            rows.read(received, name, tensor.detach().view(-1))

    def all_reduce_(self, name: str, tensor: Tensor) -> None:
        """Add a tensor up over the ranks in place, as the backend does it: what plain data-parallel training uses.

        Args:
            name: the purpose, for the count of bytes: those of a ring, 2 (W-1)/W of the tensor.
            tensor: overwritten by the sum.

        Raises:
            WorkerError: if another worker died, hung, or cannot be reached.
        """  # noqa: DOC502 - raised by what it calls
        if self.size == 1:
            return
        self.bytes[name] += 2 * (self.size - 1) * -(-tensor.numel() // self.size) * tensor.element_size()
        sent = self._placed(tensor)
        with self._talking():
            dist.all_reduce(sent, group=self._group)
        if sent is not tensor:
            tensor.copy_(sent)

    def gather(self, name: str, tensor: Tensor) -> Tensor:
        """Collect a tensor of one shape from every rank.

        Args:
            name: the purpose, for the count of bytes.
            tensor: any shape and dtype.

        Returns:
            [W, ...], in the order of the ranks.

        Raises:
            WorkerError: if another worker died, hung, or cannot be reached.
        """  # noqa: DOC502 - raised by what it calls
        flat = byte_view(tensor)
        self.bytes[name] += (self.size - 1) * flat.numel()
        return self._all_gather(flat).view(tensor.dtype).view(self.size, *tensor.shape)

    def gather_bytes(self, name: str, data: Tensor) -> list[Tensor]:
        """Collect byte strings of any length from every rank.

        Args:
            name: the purpose, for the count of bytes.
            data: uint8 [length].

        Returns:
            One uint8 tensor per rank.

        Raises:
            WorkerError: if another worker died, hung, or cannot be reached.
        """  # noqa: DOC502 - raised by what it calls
        lengths = self.gather(name, torch.tensor([data.numel()])).reshape(-1).tolist()
        padded = data.new_zeros(max(lengths))
        padded[: data.numel()] = data
        return [row[:length] for row, length in zip(self.gather(name, padded), lengths, strict=True)]

    def largest(self, name: str, value: int) -> int:
        """Find the largest of the ranks' integers.

        Returns:
            The same number on every rank.
        """
        return int(self.gather(name, torch.tensor([value])).max())

    def agree(self, what: str, digest: str) -> None:
        """Check that something is the same on every rank, by its digest.

        Args:
            what: the thing, for the message.
            digest: hexadecimal, of one length on all ranks.

        Raises:
            MismatchError: if it is not; names the first rank that differs from rank 0. All ranks raise it.
        """
        rows = self.gather("digests", torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8))
        for rank, row in enumerate(rows):
            if not torch.equal(row, rows[0]):
                raise MismatchError(
                    f"{what} on rank {rank} differs from rank 0's; every worker needs the same software, kind of "
                    "device and settings"
                )

    def _matrices(self, width: int) -> tuple[Tensor, Tensor]:
        """Two matrices of bytes [W, width] where the backend reads them, kept for the next time."""
        need = self.size * width
        if self._room is None or self._room.shape[1] < need:
            self._room = torch.empty(2, need, dtype=torch.uint8, device="cuda" if self._on_device else "cpu")
        return self._room[0, :need].view(self.size, width), self._room[1, :need].view(self.size, width)

    def _all_to_all(self, received: Tensor, sent: Tensor) -> None:
        """Send row r to rank r, and collect the rows that were sent here, in the order of the ranks."""
        received[self.rank].copy_(sent[self.rank])
        group = self._group or dist.distributed_c10d._get_default_group()
        others = [(self.rank + i) % self.size for i in range(1, self.size)]
        there = {r: dist.get_global_rank(group, r) for r in others}
        # Receives first: gloo announces them in the stream that sends fill, so that a link would go one way at a
        # time (all_to_all_single does: twice as long over a slow link).
        steps = [dist.P2POp(dist.irecv, received[r], there[r], group) for r in others]
        steps += [dist.P2POp(dist.isend, sent[r], there[r], group) for r in others]
        with self._talking():
            for work in dist.batch_isend_irecv(steps):
                work.wait()

    def _all_gather(self, row: Tensor) -> Tensor:
        """Collect one row from every rank: [W, length]."""
        if self.size == 1:
            return row[None].clone()
        sent = self._placed(row).expand(self.size, -1).contiguous()
        received = torch.empty_like(sent)
        self._all_to_all(received, sent)
        return received.to(row.device)

    def _placed(self, tensor: Tensor) -> Tensor:
        """Put a tensor where the backend reads it: gloo in main memory, NCCL on the GPU."""
        if self._on_device and not tensor.is_cuda:
            return tensor.cuda()
        return tensor if self._on_device else tensor.cpu()

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise WorkerError(
                f"rank {self.rank} of {self.size}: the exchange with the other workers failed: one of them died, "
                f"hung or cannot be reached ({first}); run the same command again to go on from the last merge"
            ) from None
