"""The model card of a published delta: the front matter that model hubs read, and what a person wants to know."""

import io
import json
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML

from pipeline.deltas.delta import Delta
from pipeline.serving.interface import Interface
from pipeline.tasks.sources import parse
from pipeline.tuning.manifest import DELTA, Tuned

_TASKS = {"text": "text-classification", "image": "image-classification", "causal": "text-generation"}
_NAMES = {"head": "head only", "dense": "every parameter", "base": "untrained"}


def model_card(
    name: str, delta: Delta, size: int, interface: Interface, tuned: Tuned | None, licence: str | None = None
) -> str:
    """Write the card.

    Args:
        name: of the model.
        delta: that is published.
        size: bytes of its file.
        interface: how it is asked.
        tuned: what is known of how it was made.
        licence: its identifier on the hub, such as ``apache-2.0``.

    Returns:
        Markdown.
    """
    front = io.StringIO()
    YAML().dump(front_matter(name, interface, tuned, licence), front)
    parts = [f"---\n{front.getvalue()}---", f"# {_plain(name)}", _about(delta, size)]
    if tuned is not None and tuned.scores:
        parts.append(_scores(tuned))
    parts += [_use(interface, tuned), "## Where it comes from", _table(provenance(delta, interface, tuned))]
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
        name = _NAMES.get(method, method) if method != tuned.training.method else f"**this delta** ({method})"
        lines.append(f"| {name} | {' | '.join(held)} |")
    return "## Scores\n\n" + "\n".join(lines) + "\n\nOn the validation rows after the last epoch, one seed."


def _judged(scores: Mapping[str, float]) -> dict[str, float]:
    """Those of the validation rows."""
    return {name: value for name, value in scores.items() if not name.startswith("train_")}


def _use(interface: Interface, tuned: Tuned | None) -> str:
    columns = interface.text or ["image" if interface.kind == "image" else "text"]
    rows = ", ".join(f"{json.dumps(column, ensure_ascii=False)}: [...]" for column in columns)
    base = parse(interface.base).kind == "folder"
    where = ', base="FOLDER-OF-THE-BASE"' if base else ""
    named = "FOLDER-OF-THE-BASE" if base else interface.base
    option = f" --base {named}" if base else ""
    return f"""## Use it

```python
from huggingface_hub import snapshot_download
from pipeline import Predictor  # of fishmask

predictor = Predictor(snapshot_download("OWNER/NAME"){where})  # or a local copy of this folder
predictor.answer({{{rows}}}).columns["prediction"]
```

From a local copy of this folder, at the shell:

```
fishmask predict --delta .{option} --input rows.csv --out answers.csv
fishmask apply . --base {named} --out model    # an ordinary model folder
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
