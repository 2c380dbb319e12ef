"""Scores of parameters: the exact diagonal of the empirical and expected Fisher information."""

from pipeline.fisher.diagonal import fisher_diagonal
from pipeline.fisher.reference import fisher_diagonal_reference

__all__ = ["fisher_diagonal", "fisher_diagonal_reference"]
