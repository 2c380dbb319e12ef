"""The model card of a delta: the front matter that model hubs read, and what a person wants to know."""

import io
import json
import shlex
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML

from pipeline.deltas.delta import Delta
from pipeline.tasks.sources import parse
from pipeline.tuning.interface import Interface
from pipeline.tuning.manifest import DELTA, Tuned

_TASKS = {"text": "text-classification", "image": "image-classification", "causal": "text-generation"}
_NAMES = {
    "base": "untrained",
    "head": "head only",
    "fish": "fish, {density:.2%} of all",
    "dense": "dense, every parameter",
}


def lines_to_load(folder: str) -> str:
    """The two lines that load a tuned model."""
    return f"from pipeline.tuning.loading import load_tuned\nmodel = load_tuned({json.dumps(folder)})"


def labels(tuned: Tuned) -> dict[str, str]:
    """Method -> what a table of scores calls it."""
    return {method: _NAMES.get(method, method).format(density=tuned.delta.density) for method in tuned.scores}


def model_card(
    name: str, delta: Delta, size: int, interface: Interface, tuned: Tuned | None, *,
    at: str | None = None, licence: str | None = None,
) -> str:  # fmt: skip
    """Write the card.

    Args:
        name: of the model.
        delta: that the folder holds.
        size: bytes of its file.
        interface: how it is asked.
        tuned: what is known of how it was made.
        at: where the folder lies on this machine; None for one that is published.
        licence: its identifier on the hub, such as ``apache-2.0``.

    Returns:
        Markdown.
    """
    front = io.StringIO()
    YAML().dump(front_matter(name, interface, tuned, licence), front)
    parts = [f"---\n{front.getvalue()}---", f"# {_plain(name)}", _about(delta, size)]
    if tuned is not None and tuned.scores:
        parts.append(_scores(tuned))
    parts += [_use(interface, tuned, at), "## Where it comes from", _table(provenance(delta, interface, tuned))]
    if tuned is not None and tuned.data.remarks:
        parts.append("What was noticed in the data:\n\n" + "\n".join(f"- {_plain(r)}" for r in tuned.data.remarks))
    return "\n\n".join(parts) + "\n"


def front_matter(
    name: str, interface: Interface, tuned: Tuned | None, licence: str | None = None
) -> dict[str, Any]:
    """Collect what the hub reads: the base, the kind of task, the scores (``model-index``).

    Returns:
        Plain values for YAML.
    """
    task = _TASKS[interface.kind]
    front: dict[str, Any] = {"library_name": "fishmask", "pipeline_tag": task}
    front["tags"] = ["fishmask", "sparse-fine-tuning", "fish-mask"]
    if parse(interface.base).kind == "hub":
        front |= {"base_model": interface.base, "base_model_relation": "adapter"}
    if licence is not None:
        front["license"] = licence
    if tuned is None:
        return front
    data, scores = tuned.data, _judged(tuned.scores.get(tuned.training.method, {}))
    source = parse(data.train)
    if source.kind == "hub":
        front["datasets"] = [source.name]
    front["metrics"] = [tuned.metric]
    if scores:
        found = [{"type": key, "name": key.replace("_", " "), "value": value} for key, value in scores.items()]
        dataset: dict[str, Any] = {"name": data.train, "type": source.name if source.kind == "hub" else "own"}
        dataset |= {"config": source.config} if source.config else {}
        dataset |= {"split": "validation"} | ({"revision": data.revision} if data.revision else {})
        results = [{"task": {"type": task}, "dataset": dataset, "metrics": found}]
        front["model-index"] = [{"name": name, "results": results}]
    return front


def provenance(delta: Delta, interface: Interface, tuned: Tuned | None) -> dict[str, str]:
    """Say where a delta comes from, as far as is known.

    Returns:
        What -> how, for a table.
    """
    scored = {k: delta.mask.info[k] for k in ("kind", "power", "examples") if k in delta.mask.info}
    facts = {
        "base": interface.base + (f" at {interface.revision}" if interface.revision else ""),
        "base digest": delta.base,
        "delta digest": delta.digest,
        "mask": f"{delta.mask.digest}" + (f" (scores: {', '.join(map(str, scored.values()))})" if scored else ""),
        "input": _input(interface),
        "classes": ", ".join(interface.classes or []),
    }
    if tuned is None:
        known = {"task": "task", "method": "method", "seed": "seed", "data": "data digest", "fishmask": "fishmask"}
        facts |= {label: str(delta.info[key]) for key, label in known.items() if delta.info.get(key) is not None}
        return {key: value for key, value in facts.items() if value}
    training, data = tuned.training, tuned.data
    held = data.validation or "held out from train"
    rows = data.rows.get("validation", data.rows.get("test", 0))
    facts |= {
        "train": f"{data.train}, {data.rows.get('train', 0):,} rows",
        "validation": f"{held}, {rows:,} rows",
        "data digest": data.digest,
        "training": f"{training.method} at density {training.density:g}, {training.epochs} epochs, batch "
        f"{training.batch_size}, {training.optimizer}, rate {training.lr[training.method]:g} "
        f"({training.schedule}), seed {training.seed}, {training.precision} on {training.device}",
        "versions": ", ".join(f"{package} {number}" for package, number in tuned.versions.items()),
    }
    return {key: value for key, value in facts.items() if value}


def _about(delta: Delta, size: int) -> str:
    mask = delta.mask
    return (
        f"This folder holds what fine-tuning changed, not the model: {mask.nnz:,} of {mask.index.total:,} "
        f"parameters ({mask.density:.3%}), {size:,} bytes in `{DELTA}`. The base with these values is the trained "
        "model, bit for bit; another base, or a damaged file, is refused."
    )


def _scores(tuned: Tuned) -> str:
    metrics = list(dict.fromkeys(metric for found in tuned.scores.values() for metric in _judged(found)))
    lines = [f"| trained | {' | '.join(metrics)} |", "|---|" + "---:|" * len(metrics)]
    for method, found in tuned.scores.items():
        held = [f"{found[metric]:.4f}" if metric in found else "–" for metric in metrics]
        name = labels(tuned)[method]
        name = f"**{name}** (this delta)" if method == tuned.training.method else name
        lines.append(f"| {name} | {' | '.join(held)} |")
    return (
        "## Scores\n\n" + "\n".join(lines) + "\n\nOn the validation rows after the last epoch, one seed; "
        "learning rates were chosen on a part of train."
    )


def _judged(scores: Mapping[str, float]) -> dict[str, float]:
    """Those of the validation rows."""
    return {name: value for name, value in scores.items() if not name.startswith("train_")}


def _use(interface: Interface, tuned: Tuned | None, at: str | None) -> str:
    """How to load it and ask it: the folder where it is, or a copy of a published one."""
    columns = interface.text or ["image" if interface.kind == "image" else "text"]
    rows = ", ".join(f"{json.dumps(column, ensure_ascii=False)}: [...]" for column in columns)
    elsewhere = at is None and parse(interface.base).kind == "folder"
    base = "FOLDER-OF-THE-BASE" if elsewhere else interface.base
    imports = "from pipeline import Predictor  # of fishmask"
    folder = 'snapshot_download("OWNER/NAME")' if at is None else json.dumps(at)
    if at is None:
        imports = f"from huggingface_hub import snapshot_download\n{imports}"
    load = f"```python\n{lines_to_load(at)}\n```\n\nor ask it:\n\n" if at is not None and tuned is not None else ""
    shell = "From a local copy of this folder, at" if at is None else "At"
    named, option = shlex.quote(at or "."), f" --base {shlex.quote(base)}" if elsewhere else ""
    return f"""## Use it

{load}```python
{imports}

predictor = Predictor({folder}{f", base={json.dumps(base)}" if elsewhere else ""})
predictor.answer({{{rows}}}).columns["prediction"]
```

{shell} the shell:

```
fishmask predict --delta {named}{option} --input rows.csv --out answers.csv
fishmask apply {named} --base {shlex.quote(base)} --out model    # an ordinary model folder
```"""


def _input(interface: Interface) -> str:
    if interface.image is not None:
        channels, height, width = interface.image.shape
        return f"images, {height} x {width} pixels, {channels} channels"
    length = f", {interface.max_length} tokens at most" if interface.max_length else ""
    return (", ".join(interface.text) or "a column of texts") + length


def _table(facts: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {_plain(value)} |" for key, value in facts.items())


def _plain(text: str) -> str:
    """A text that means nothing to Markdown: one line, no cell ends, no tags."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
