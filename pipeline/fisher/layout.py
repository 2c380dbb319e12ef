"""Where the examples are in a tensor inside the model: found by comparing a batch with one of its examples."""

from dataclasses import dataclass

from torch import Tensor

from pipeline.parameters import Shape


@dataclass(frozen=True)
class Layout:
    """Examples lie along dimension ``dim``, each owning ``rows`` consecutive entries ([B·rows] in all).

    A batch of one (``size`` 1) owns its tensors whole; then ``dim`` and ``rows`` mean nothing.
    """

    dim: int
    rows: int
    size: int

    def split(self, x: Tensor) -> Tensor:
        """View with the examples first.

        Returns:
            [B, ...] with the dimensions of ``part`` behind B.
        """
        if self.size == 1:
            return x.unsqueeze(0)
        rows: Tensor = x.unflatten(self.dim, (self.size, self.rows))
        return rows.movedim(self.dim, 0)

    def part(self, x: Tensor, n: int) -> Tensor:
        """Cut example ``n`` out, as the model would have seen it alone.

        Returns:
            A view with the dimensions of ``x``.
        """
        return x if self.size == 1 else x.narrow(self.dim, n * self.rows, self.rows)


def layout_of(shape: Shape, single: Shape, size: int) -> Layout | None:
    """Compare a tensor's shape in a batch of ``size`` with its shape for one example.

    Returns:
        The layout, or None if the shapes do not differ in exactly one dimension by the factor ``size``.
    """
    if size == 1:
        return Layout(0, 1, 1)
    if len(shape) != len(single):
        return None
    changed = [d for d, (many, one) in enumerate(zip(shape, single, strict=True)) if many != one]
    if len(changed) != 1 or shape[changed[0]] != size * single[changed[0]]:
        return None
    return Layout(changed[0], single[changed[0]], size)
