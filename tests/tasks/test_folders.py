"""Which file is which split, by name."""

import pytest

from pipeline.errors import DataError
from pipeline.tasks.folders import find_splits


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def found(folder):
    splits = find_splits(folder)
    return {name: ([p.name for p in files.paths], files.variant) for name, files in splits.items()}


def test_plain_names_and_synonyms(tmp_path):
    touch(tmp_path, "train.csv", "dev.tsv", "test.parquet", "README.md", "notes.txt", ".train.csv")
    assert found(tmp_path) == {
        "train": (["train.csv"], ""),
        "validation": (["dev.tsv"], ""),
        "test": (["test.parquet"], ""),
    }


def test_subsets_keep_what_their_names_say(tmp_path):
    touch(tmp_path, "train_subset.parquet", "validation_heldout_from_train.parquet")
    assert found(tmp_path) == {
        "train": (["train_subset.parquet"], "subset"),
        "validation": (["validation_heldout_from_train.parquet"], "heldout_from_train"),
    }


def test_the_plain_name_wins_then_the_matched_one(tmp_path):
    touch(tmp_path, "train.csv", "train_subset.csv", "validation_matched.csv", "validation_mismatched.csv")
    splits = found(tmp_path)
    assert splits["train"] == (["train.csv"], "") and splits["validation"] == (
        ["validation_matched.csv"],
        "matched",
    )


@pytest.mark.parametrize("below", ["", "data/", "plain_text/"])
def test_the_hubs_shards(tmp_path, below):
    shards = [f"train-0000{i}-of-00002.parquet" for i in (0, 1)]
    touch(tmp_path, *[below + shard for shard in shards], below + "test-00000-of-00001.parquet")
    assert found(tmp_path) == {"train": (shards, ""), "test": (["test-00000-of-00001.parquet"], "")}


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ([], "holds no data file; expected train.parquet and validation.parquet"),
        (["README.md"], "holds no data file"),
        (
            ["validation.csv"],
            "split 'train' is missing; expected train.parquet (or .csv, .tsv, .jsonl, .json), found",
        ),
        (["train.csv", "trained.csv"], "split 'validation' is missing"),
        (["train.csv", "train.parquet", "test.csv"], "could each be the split"),
        (["train_a.csv", "train_b.csv", "test.csv"], "train_a and train_b could each be split 'train'"),
        (["train.csv", "dev.csv", "validation.csv"], "dev and validation could each be split 'validation'"),
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet", "test.csv"], "number 00001 is missing"),
    ],
)
def test_what_is_missing_or_ambiguous_is_named(tmp_path, names, why):
    with pytest.raises(DataError) as caught:
        find_splits(touch(tmp_path, *names))
    assert why in str(caught.value) and str(tmp_path) in str(caught.value)
