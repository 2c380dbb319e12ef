"""Load base models and tokenizers: from a package, the hub or a folder, by safetensors only; or build one."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import FishmaskError, ModelError
from pipeline.tasks import resnet, zoo
from pipeline.tasks.settings import ModelSettings
from pipeline.tasks.sources import ZOOS, hub_error, package_model, parse, prepare_hub

_KEY = "model.source"
AUTO = {"text": "SequenceClassification", "image": "ImageClassification", "causal": "CausalLM"}
_PURPOSES = {"text": "classifying texts", "image": "classifying images", "causal": "completing texts"}
_LAYOUT = "a folder in the hub's layout (config.json, model.safetensors, tokenizer.json)"


def load_model(
    model: ModelSettings,
    *,
    kind: str,
    outputs: int,
    seed: int,
    classes: list[str] | None = None,
    channels: int = 3,
) -> nn.Module:
    """Load a base model with an output layer for the task.

    Tensors that the checkpoint lacks, or holds for another number of classes, are drawn anew with the seed, and
    nothing else depends on it. torch's own generator is left as it was.

    Args:
        model: where it comes from.
        kind: ``text`` (sequence classification), ``image``, or ``causal`` (a language model, without a new head).
        outputs: classes, or 1 for regression; 0 for ``causal``.
        seed: of what is drawn anew.
        classes: their names; None for regression.
        channels: of the images that a builtin model takes.

    Returns:
        The model in fp32 and eval mode, on the CPU.

    Raises:
        ModelError: if it cannot be found or loaded, or does not fit the task.
    """
    source = parse(model.source)
    if source.kind == "builtin":
        if kind != "image":
            raise ModelError(f"{_KEY}: '{model.source}' is for images; expected a pretrained text model")
        return resnet.build(source.name, channels, outputs, seed)
    if source.kind in ZOOS:
        if kind != "image":
            raise ModelError(f"{_KEY}: '{model.source}' is for images; expected a pretrained text model")
        return zoo.load(source, outputs, seed)
    path = located(model)
    if Path(path).is_dir():
        _check_folder(Path(path))
    with _hub_library(model, "a model"), torch.random.fork_rng(devices=[]):
        import transformers

        auto = f"AutoModelFor{AUTO[kind]}"
        config = transformers.AutoConfig.from_pretrained(path, revision=model.revision)
        if not class_name(kind, str(config.model_type)):
            raise ModelError(
                f"{_KEY}: '{model.source}' is a model of type '{config.model_type}', which is not for "
                f"{_PURPOSES[kind]}; expected one that is"
            )
        if kind != "causal":
            config.num_labels = outputs
            config.problem_type = problem_type(bool(classes))
        if classes:
            config.id2label = dict(enumerate(classes))
            config.label2id = {name: number for number, name in enumerate(classes)}
        torch.default_generator.manual_seed(seed)
        network, report = getattr(transformers, auto).from_pretrained(
            path, config=config, revision=model.revision, dtype=torch.float32, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    _check_loaded(model, network, report, outputs)
    if kind == "causal" and _sees_ahead(network):
        raise ModelError(
            f"{_KEY}: '{model.source}' sees the tokens that it is to predict, as an encoder does; completions "
            "need a causal language model, such as GPT-2 or Llama"
        )
    if kind == "text" and network.config.pad_token_id is None:  # a decoder looks for the end of a text by it
        network.config.pad_token_id = int(load_tokenizer(model).pad_token_id)
    loaded: nn.Module = network
    return loaded.eval()


@torch.no_grad()
def _sees_ahead(network: Any) -> bool:
    """Tell whether outputs depend on later tokens."""
    network.eval()
    seen = torch.ones(1, 3, dtype=torch.int64)
    one, other = (
        network(input_ids=torch.tensor([[0, 1, last]]), attention_mask=seen).logits[0, 0] for last in (0, 1)
    )
    return not torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def problem_type(classes: bool) -> str:
    """Name the problem as a config.json does.

    Returns:
        The name that picks the library's loss.
    """
    return "single_label_classification" if classes else "regression"


def class_name(kind: str, model_type: str) -> str:
    """Name the class that ``load_model`` makes of a model type.

    Returns:
        As a config.json's ``architectures`` has it; empty where the library knows none.
    """
    from transformers.models.auto import modeling_auto as auto

    known: Any = {
        "text": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    return str(known[kind].get(model_type, ""))


def load_tokenizer(model: ModelSettings) -> Any:
    """Load the tokenizer that belongs to a model.

    Returns:
        A ``transformers`` tokenizer with a padding token (the end-of-text token, where it has none of its own).

    Raises:
        ModelError: if there is none to be had.
    """
    if parse(model.source).kind in ("builtin", *ZOOS):
        raise ModelError(f"{_KEY}: '{model.source}' is for images; expected a pretrained text model")
    path = located(model)
    with _hub_library(model, "a tokenizer"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, revision=model.revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{_KEY}: the tokenizer of '{model.source}' has no padding token; expected one")
    return tokenizer


def model_config(model: ModelSettings) -> dict[str, Any]:
    """Read a model's config.json, as its architecture completes it; a ModelError if there is none to be had.

    Returns:
        Its content.
    """
    path = located(model)
    with _hub_library(model, "a config.json"):
        from transformers import AutoConfig

        return dict(AutoConfig.from_pretrained(path, revision=model.revision).to_dict())


def located(model: ModelSettings) -> str:
    """Find a model of the hub's layout.

    Returns:
        The folder of a package's or folder's model, or the hub id.

    Raises:
        ModelError: if it is not there.
    """
    source = parse(model.source)
    if source.kind == "package":
        return str(package_model(source.name))
    if source.kind == "hub":
        return source.name
    folder = Path(source.name).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"{_KEY}: no folder '{source.name}'; expected package:NAME, builtin:NAME, a hub id "
            f"(owner/name) or {_LAYOUT}"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{_KEY}: {folder} holds no config.json; expected {_LAYOUT}")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{_KEY}: {folder / 'config.json'} is no JSON ({error})") from None
    return str(folder)


def _check_folder(folder: Path) -> None:
    names = ("model.safetensors", "model.safetensors.index.json")
    if any((folder / name).is_file() for name in names):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise ModelError(
            f"{_KEY}: {folder / pickled[0]} is a pickle, which can run any code and is never loaded; "
            "expected model.safetensors, convert it with save_pretrained"
        )
    raise ModelError(f"{_KEY}: {folder} holds no model.safetensors; expected {_LAYOUT}")


def _check_loaded(model: ModelSettings, network: nn.Module, report: dict[str, Any], outputs: int) -> None:
    """Refuse a checkpoint that left more than an output layer to chance."""
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    missing = sum(sizes.get(name, 0) for name in report.get("missing_keys", ()))
    if 2 * missing > sum(sizes.values()):
        raise ModelError(
            f"{_KEY}: the weights of '{model.source}' lack {missing:,} of {sum(sizes.values()):,} parameters "
            f"of its {type(network).__name__}; expected a checkpoint of that architecture"
        )
    for name, held, wanted in report.get("mismatched_keys", ()):
        if not wanted or wanted[0] != outputs:
            raise ModelError(
                f"{_KEY}: tensor '{name}' of '{model.source}' is {list(held)}; its config.json "
                f"makes it {list(wanted)}"
            )


@contextlib.contextmanager
def _hub_library(model: ModelSettings, what: str) -> Iterator[None]:
    """Import and run transformers in silence; whatever it raises is a ModelError of one line."""
    hub = parse(model.source).kind == "hub"
    if hub:
        prepare_hub()
    import transformers.utils.logging

    chatter: Any = transformers.utils.logging
    before, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FishmaskError:  # also a SIGTERM meanwhile
        raise
    except Exception as error:  # the library's own errors, and those of the files and formats beneath it
        if hub:
            way_out = "name a local folder or a package as the model's source"
            raise hub_error(ModelError, _KEY, model.source, way_out, error) from error
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
        raise ModelError(f"{_KEY}: cannot load {what} from '{model.source}': {why}; expected {_LAYOUT}") from error
    finally:
        chatter.set_verbosity(before)
        if bars:
            chatter.enable_progress_bar()
