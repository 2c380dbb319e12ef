"""The training methods by name: which coordinates each one trains. How to train them is the same for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pipeline.errors import ParamsError, unknown
from pipeline.masks.mask import Mask
from pipeline.masks.ranking import Ranking
from pipeline.masks.select import STRATEGIES
from pipeline.parameters import unwrapped
from pipeline.training.masked import fitting_parameters


@dataclass(frozen=True)
class Method:
    """One way to choose what is trained.

    Attributes:
        name: as in params.yaml and on the command line.
        strategy: its key in ``pipeline.masks.select.STRATEGIES``; or ``adapter``, ``peft`` or ``learned``, of
            which ``pipeline.tasks.choosing`` knows.
        needs_ranking: whether its mask is cut from a ranking of Fisher scores.
        doc: one line for people.
        variant: of the task's ``score.variants``; empty for the task's own scores.
    """

    name: str
    strategy: str
    needs_ranking: bool
    doc: str
    variant: str = ""


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
        Method("lora", "adapter", False, "LoRA of the largest rank that fits the budget, and the head (PEFT)"),
        Method(
            "shira", "peft", False, "coordinates drawn in every linear layer as SHiRA does, and the head (PEFT)"
        ),
        Method("deviation", "learned", False, "the parameters that dense training moves farthest, and the head"),
        Method("diff-pruning", "learned", False, "the parameters that L0 gates leave open, and the head"),
    )
}


def method_named(name: str) -> Method:
    """Find a method; ``fish-<variant>`` is ``fish`` by the scores of that variant.

    Returns:
        The method.

    Raises:
        ParamsError: if there is none of that name; suggests the closest.
    """
    base, _, variant = name.partition("-")
    if name not in METHODS and base == "fish" and variant:
        return replace(METHODS[base], name=name, variant=variant)
    if name not in METHODS:
        raise ParamsError(f"unknown method {unknown(name, METHODS)}")
    return METHODS[name]


def mask_for(
    method_name: str,
    model: nn.Module,
    *,
    density: float,
    head: Sequence[str],
    seed: int,
    ranking: Ranking | Mapping[str, Tensor] | None = None,
) -> Mask:
    """Choose what a method trains of a model.

    Args:
        method_name: a key of ``METHODS``.
        model: the base; its weights matter to ``magnitude`` alone.
        density: chosen / all, head included; ``dense``, ``bitfit`` and ``head`` have their own.
        head: the head's module names, always trained.
        seed: of ``random``.
        ranking: a ranking of Fisher scores, or the scores; for methods that need one.

    Returns:
        The mask, with method and density in its provenance, and the seed where it was used.

    Raises:
        ParamsError: if the method is unknown, or needs a ranking that is missing.
    """
    method = method_named(method_name)
    if method.needs_ranking and ranking is None:
        raise ParamsError(f"method '{method.name}' needs a ranking of Fisher scores; run the score stage first")
    if method.strategy not in STRATEGIES:
        raise ParamsError(f"method '{method.name}' takes more than the base and a ranking; use the mask stage")
    model = unwrapped(model)
    mask = STRATEGIES[method.strategy](model, density=density, always=head, seed=seed, ranking=ranking)
    fitting_parameters(model, mask)  # a ranking may be of another model
    _refuse_excluded(mask, head)
    mask.info |= {"method": method.name, "density": mask.density}
    if method.strategy == "random":
        mask.info["seed"] = seed
    return mask


def _refuse_excluded(mask: Mask, head: Sequence[str]) -> None:
    """Refuse a mask that had to take coordinates which its scores leave out."""
    excluded = mask.info.get("exclude") or []
    spilt = set(mask.index.within(excluded)) - set(mask.index.within(head))
    if any(mask.count(name) for name in spilt):
        raise ParamsError(
            f"density {mask.density:g} needs more coordinates than lie outside score.exclude "
            f"({', '.join(excluded)}); lower the density, or exclude less"
        )
