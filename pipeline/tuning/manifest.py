"""tune.json: what a tuned folder is, so that base + delta can be loaded, judged and served without asking again.

A tuned folder holds ``delta.safetensors`` (the trained values), ``tune.json`` (this) and ``README.md`` (the model
card). Reading is strict: a key that is missing, unknown, mistyped or contradicts another one is refused.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ArtifactError, unknown
from pipeline.files import write_json
from pipeline.runtime.canonical import strict_json

FORMAT, VERSION = "fishmask-tune", 1
FILE, DELTA, CARD = "tune.json", "delta.safetensors", "README.md"

Text = Annotated[str, Field(min_length=1)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BaseModelSource(_Strict):
    """The model that was tuned, by reference.

    Attributes:
        source: package:NAME, builtin:NAME, torchvision:NAME@FILE, timm:NAME@FILE, a hub id, or a folder.
        revision: of a hub id; null where none was asked for.
        digest: of its parameters, as the delta names it: those that the delta covers whole (a head) left out.
    """

    source: Text
    revision: str | None
    digest: Digest


class Columns(_Strict):
    """The columns of the user's files. Of images by folder both are empty: the folder's name is the class.

    Attributes:
        text: one column, or two for pairs; for completions the prompt.
        label: the class, the number, or for completions the completion; null for images by folder.
    """

    text: list[Text]
    label: Text | None


class TextInput(_Strict):
    """How texts become tokens: by the base's own tokenizer.

    Attributes:
        max_length: tokens, special ones included, to which texts are cut.
        pad: the id that fills shorter texts.
    """

    max_length: Positive
    pad: Annotated[int, Field(ge=0)]


class ImageInput(_Strict):
    """How images become tensors: resized, cropped to the middle, divided by 255, minus mean, over std.

    Attributes:
        shape: channels, height, width.
        mean: of each channel.
        std: of each channel.
    """

    shape: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    mean: Annotated[list[float], Field(min_length=1)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _channels(self) -> "ImageInput":
        if not len(self.mean) == len(self.std) == self.shape[0]:
            raise ValueError(f"mean and std must name {self.shape[0]} channels each, as shape has them")
        return self


class DeltaFile(_Strict):
    """The delta beside this file.

    Attributes:
        digest: of its content (``Delta.digest``).
        bytes: of the file.
        values: trained values.
        parameters: all parameters of the model, head included.
        density: values / parameters.
    """

    digest: Digest
    bytes: Positive
    values: Positive
    parameters: Positive
    density: Share


class Training(_Strict):
    """How it was trained: enough to do it again.

    Attributes:
        method: of ``pipeline.training.methods``; whose mask the delta is of.
        density: as asked for; the mask holds floor(density * parameters) values.
        head: module names of the output layer, trained whole; empty for completions.
        seed: of the head, the examples that were scored, the order of the data.
        lr: method -> peak learning rate, for every method that was trained.
        epochs: passes over train.
        batch_size: examples per optimizer step.
        optimizer, weight_decay, schedule, warmup, clip: see ``pipeline.training.recipe.Recipe``.
        examples: that the Fisher scores are averaged over.
        score_batch: examples per scoring batch.
        threads: CPU threads; another count ends in other last bits.
        device: where, such as ``cpu``.
        precision: ``fp32`` or ``bf16`` (autocast).
    """

    method: Text
    density: Share
    head: list[Text]
    seed: Annotated[int, Field(ge=0)]
    lr: dict[Text, Annotated[float, Field(gt=0)]]
    epochs: Positive
    batch_size: Positive
    optimizer: Text
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Text
    warmup: Annotated[float, Field(ge=0, le=1)]
    clip: Annotated[float, Field(gt=0)] | None
    examples: Positive
    score_batch: Positive
    threads: Positive
    device: Text
    precision: Literal["fp32", "bf16"]


class Data(_Strict):
    """The data it was trained on, by reference.

    Attributes:
        train: the file, folder or hub id, as it was named.
        validation: likewise; null where rows of train were held out.
        revision: of a hub id.
        digest: of all that reached the model (``Task.data_digest``).
        rows: split -> rows used.
        remarks: what was done to the rows, one sentence each: dropped, held out, cut.
    """

    train: Text
    validation: str | None
    revision: str | None
    digest: Digest
    rows: dict[Text, Positive]
    remarks: list[str]


class Tuned(_Strict):
    """The whole file.

    Attributes:
        format, version: of the file.
        name: of the task; the default name to register it under.
        base: the model that was tuned.
        kind: ``text`` (a classifier of texts, encoder or decoder), ``image``, or ``causal`` (a language model).
        objective: ``classification``, ``regression``, or ``completion`` (``causal`` alone).
        columns: of the user's files.
        classes: names in label order; null but for classification.
        text: how texts are read; null for images.
        image: how images are read; null for texts.
        delta: the trained values.
        training: how.
        metric: what the scores are measured by; each of them holds it, and ``loss``.
        scores: what was trained (``head`` alone, ``fish``, ``dense``; ``base``: the untrained language model) ->
            metric -> value, on the validation rows after the last epoch.
        data: what on.
        versions: package -> version.
    """

    format: Literal["fishmask-tune"]
    version: Literal[1]
    name: Text
    base: BaseModelSource
    kind: Literal["text", "image", "causal"]
    objective: Literal["classification", "regression", "completion"]
    columns: Columns
    classes: Annotated[list[Text], Field(min_length=2)] | None
    text: TextInput | None
    image: ImageInput | None
    delta: DeltaFile
    training: Training
    metric: Text
    scores: dict[Text, dict[Text, float]]
    data: Data
    versions: dict[Text, Text]

    @model_validator(mode="after")
    def _consistent(self) -> "Tuned":
        rules = [
            ("objective", (self.kind == "causal") == (self.objective == "completion"), f"kind '{self.kind}'"),
            ("classes", (self.classes is not None) == (self.objective == "classification"), self.objective),
            ("text", (self.text is not None) == (self.kind != "image"), f"kind '{self.kind}'"),
            ("image", (self.image is not None) == (self.kind == "image"), f"kind '{self.kind}'"),
            ("columns.text", bool(self.columns.text) or self.kind == "image", f"kind '{self.kind}'"),
            ("training.lr", self.training.method in self.training.lr, f"method '{self.training.method}'"),
            ("scores", all(self.metric in score for score in self.scores.values()), f"metric '{self.metric}'"),
        ]
        for key, holds, other in rules:
            if not holds:
                raise ValueError(f"{key} does not fit {other}")
        return self

    @classmethod
    def load(cls, folder: Path | str) -> "Tuned":
        """Read and check the description of a tuned folder; the delta is not opened.

        Args:
            folder: what ``fishmask tune --out`` wrote.

        Returns:
            The description.

        Raises:
            ArtifactError: one line that names the file, the key and what was expected.
        """
        path = Path(folder) / FILE
        try:
            raw = strict_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtifactError(
                f"{path}: cannot be read: {error.strerror}; expected a folder that `fishmask tune --out` wrote"
            ) from None
        except ValueError as error:  # no UTF-8, no JSON
            raise ArtifactError(f"{path}: is no JSON ({error}); copy the folder or tune again") from None
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise ArtifactError(f"{path}: format is {found!r}; expected '{FORMAT}', as `fishmask tune` writes it")
        if type(raw.get("version")) is int and raw["version"] > VERSION:
            raise ArtifactError(
                f"{path}: version {raw['version']}, written by a newer fishmask; this one reads {VERSION}: upgrade"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise ArtifactError(f"{path}: {_line(error, raw)}") from None

    def save(self, folder: Path) -> None:
        """Write the description into a folder, atomically."""
        write_json(folder / FILE, self.model_dump())


def _line(error: ValidationError, raw: Any) -> str:
    """The first mistake; a misspelt key before the key that it leaves missing."""
    mistakes = error.errors()
    first = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    parts = [part for part in first["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in parts)
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key {unknown(str(parts[-1]), _fields(parts[:-1]))}"
    if first["type"] == "missing":
        return f"{key}: missing; it is required"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: expected {message}, got {first['input']!r}"


def _fields(parts: list[Any]) -> list[str]:
    model: Any = Tuned
    for part in parts:
        annotation = getattr(model, "model_fields", {}).get(part)
        model = annotation.annotation if annotation else None
    return list(getattr(model, "model_fields", {}))
