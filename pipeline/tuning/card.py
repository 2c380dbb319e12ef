"""The model card of a tuned folder, and the table and lines that end a run."""

from typing import Any

from pipeline.tuning.manifest import DELTA, Tuned

_ROWS = {
    "base": "untrained",
    "head": "head only",
    "fish": "fish, {density:.2%} of all",
    "dense": "dense, every parameter",
}


def lines_to_load(folder: str) -> str:
    """The two lines that load a tuned model."""
    return f'from pipeline.tuning.loading import load_tuned\nmodel = load_tuned("{folder}")'


def labels(tuned: Tuned) -> dict[str, str]:
    """Method -> what the table calls it, for those that have scores."""
    return {m: name.format(density=tuned.delta.density) for m, name in _ROWS.items() if m in tuned.scores}


def rows(tuned: Tuned) -> list[tuple[str, str, str]]:
    """What was trained, its metric and its loss, as the table shows them."""
    return [
        (label, f"{tuned.scores[method][tuned.metric]:.4f}", f"{tuned.scores[method]['loss']:.4f}")
        for method, label in labels(tuned).items()
    ]


def text(tuned: Tuned, folder: str) -> str:
    """Write the card: what it is, how good, on what, and how to use it.

    Args:
        tuned: the description.
        folder: where the folder is, for the lines to copy.

    Returns:
        Markdown, with the front matter that model hubs read.
    """
    training, data, delta = tuned.training, tuned.data, tuned.delta
    table = "\n".join(f"| {name} | {score} | {loss} |" for name, score, loss in rows(tuned))
    heldout = "rows held out from train" if data.validation is None else f"`{data.validation}`"
    facts: list[tuple[str, Any]] = [
        ("base", f"`{tuned.base.source}`" + (f" at `{tuned.base.revision}`" if tuned.base.revision else "")),
        ("base digest", f"`{tuned.base.digest}`"),
        (
            "trained",
            f"{delta.values:,} of {delta.parameters:,} parameters ({delta.density:.3%}), {delta.bytes:,} bytes",
        ),
        ("delta digest", f"`{delta.digest}`"),
        ("task", tuned.objective + (f": {', '.join(tuned.classes)}" if tuned.classes else "")),
        ("input", _input(tuned)),
        ("train", f"`{data.train}`, {data.rows['train']:,} rows"),
        ("validation", f"{heldout}, {data.rows.get('validation', data.rows.get('test', 0)):,} rows"),
        ("data digest", f"`{data.digest}`"),
        (
            "training",
            f"{training.method}, {training.epochs} epochs, batch {training.batch_size}, {training.optimizer}, "
            f"rate {training.lr[training.method]:g} ({training.schedule}), seed {training.seed}, "
            f"{training.precision} on {training.device}",
        ),
        ("versions", ", ".join(f"{name} {number}" for name, number in tuned.versions.items())),
    ]
    about = "\n".join(f"| {name} | {value} |" for name, value in facts)
    remarks = "\n".join(f"- {remark}" for remark in data.remarks) or "- nothing"
    base = (
        f'base_model: "{tuned.base.source}"\n' if "/" in tuned.base.source and ":" not in tuned.base.source else ""
    )
    return f"""---
library_name: fishmask
{base}tags: [fishmask, sparse-fine-tuning]
metrics: [{tuned.metric}]
---

# {tuned.name}

The {delta.density:.2%} of a network's parameters that carry the most Fisher information for a task, trained; the
rest is the base, bit for bit. This folder holds what changed (`{DELTA}`), not the base.

| what was trained | {tuned.metric} | loss |
|---|---|---|
{table}

Measured on the validation rows after the last epoch, one seed. Learning rates were chosen on a part of train.

| | |
|---|---|
{about}

What was noticed in the data:

{remarks}

## Use it

```python
{lines_to_load(folder)}
```

or as an ordinary model folder:

```
fishmask apply {folder} --base {tuned.base.source} --out model
```
"""


def _input(tuned: Tuned) -> str:
    if tuned.image is not None:
        channels, height, width = tuned.image.shape
        return f"images of {height} x {width} pixels, {channels} channels"
    assert tuned.text is not None
    columns = ", ".join(f"`{name}`" for name in tuned.columns.text)
    return f"column {columns} -> `{tuned.columns.label}`, {tuned.text.max_length} tokens at most"
