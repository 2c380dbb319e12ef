"""The training methods by name: which coordinates each one trains. How to train them is the same for all."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from pipeline.errors import MismatchError, ParamsError
from pipeline.masks import select
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.parameters import ParameterIndex


@dataclass(frozen=True)
class Method:
    """One way to choose what is trained.

    Attributes:
        name: as in params.yaml and on the command line.
        strategy: its key in ``pipeline.masks.select.STRATEGIES``.
        needs_ranking: whether its mask is cut from a ranking of Fisher scores.
        doc: one line for people.
    """

    name: str
    strategy: str
    needs_ranking: bool
    doc: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("dense", "dense", False, "every parameter: ordinary fine-tuning"),
        Method(
            "fish", "fisher", True, "the parameters with the largest empirical Fisher information, and the head"
        ),
        Method("random", "random", False, "parameters drawn at random with the seed, and the head"),
        Method("bitfit", "bias", False, "every bias, and the head"),
        Method("magnitude", "magnitude", False, "the largest weights by absolute value, and the head"),
        Method("head", "head", False, "the head alone"),
    )
}


def method_named(name: str) -> Method:
    """Find a method.

    Returns:
        The method.

    Raises:
        ParamsError: if there is none of that name; suggests the closest.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ParamsError(f"unknown method '{name}'; {hint}methods: {', '.join(METHODS)}")
    return METHODS[name]
