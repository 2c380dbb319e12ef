"""fishmask: choose the few parameters with the most Fisher information, train only those, keep an exact artifact.

The public names. They are imported on first use, so that ``import pipeline`` costs nothing::

    from pipeline import ParameterIndex, base_digest                   # a model as one flat space
    from pipeline import fisher_diagonal, Ranking, Mask                # what to train
    from pipeline import MaskedParameters, fit, Recipe, LocalSGD       # training it, alone or on several workers
    from pipeline import Delta, Chain                                  # keeping it
    from pipeline import Predictor                                     # asking it

Source: Sung, Nair, Raffel, "Training Neural Networks with Fixed Sparse Masks", NeurIPS 2021 (arXiv 2111.09839).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.deltas.chain import Chain
    from pipeline.deltas.delta import Delta
    from pipeline.distributed.local_sgd import LocalSGD
    from pipeline.fisher import fisher_diagonal
    from pipeline.masks.mask import Mask
    from pipeline.masks.ranking import Ranking
    from pipeline.parameters import ParameterIndex, base_digest
    from pipeline.serving.predictor import Predictor
    from pipeline.training.loop import Recipe, fit
    from pipeline.training.masked import MaskedParameters

__all__ = [
    "Chain",
    "Delta",
    "LocalSGD",
    "Mask",
    "MaskedParameters",
    "ParameterIndex",
    "Predictor",
    "Ranking",
    "Recipe",
    "base_digest",
    "fisher_diagonal",
    "fit",
]

_HOME = {
    "Chain": "pipeline.deltas.chain",
    "Delta": "pipeline.deltas.delta",
    "LocalSGD": "pipeline.distributed.local_sgd",
    "Mask": "pipeline.masks.mask",
    "MaskedParameters": "pipeline.training.masked",
    "ParameterIndex": "pipeline.parameters",
    "Predictor": "pipeline.serving.predictor",
    "Ranking": "pipeline.masks.ranking",
    "Recipe": "pipeline.training.loop",
    "base_digest": "pipeline.parameters",
    "fisher_diagonal": "pipeline.fisher",
    "fit": "pipeline.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
