"""The hub: what it gives goes the same way as a folder; what it does not give is one line with a way out."""

import datasets
import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.tasks.raw import read_raw


def test_a_hub_data_set_reads_as_a_folder_does(monkeypatch, made):
    features = datasets.Features({
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["no", "yes"]),
    })
    rows = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    part = datasets.Dataset.from_dict(rows, features=features)
    seen = []

    def load(name, config, revision):
        seen.append((name, config, revision))
        return datasets.DatasetDict(train=part, validation_matched=part, validation_mismatched=part)

    monkeypatch.setattr(datasets, "load_dataset", load)
    raw = read_raw("t", made.Data("owner/set:part", revision="abc"))
    assert seen == [("owner/set", "part", "abc")]
    assert raw.splits["train"].table.to_pydict() == rows
    assert raw.splits["train"].class_names("label") == ["no", "yes"]
    assert raw.splits["validation"].remark == "matched" and raw.revision == "abc"


def test_what_was_downloaded_from_the_hub_as_files_is_found_offline(tmp_path, monkeypatch, made):
    """`hf download nyu-mll/glue --repo-type dataset`: parquet by configuration and split, named in its README."""
    import huggingface_hub.constants

    home, revision = tmp_path / "hub", "b" * 40
    folder = home / "datasets--nyu-mll--glue"
    snapshot, blobs = folder / "snapshots" / revision, folder / "blobs"
    splits = [
        "train",
        *(f"{split}_{kind}" for split in ("validation", "test") for kind in ("matched", "mismatched")),
    ]
    lines = ["---", "configs:", "- config_name: mnli", "  data_files:"]
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    for name in (snapshot / "mnli", blobs):
        name.mkdir(parents=True)
    for number, split in enumerate(splits):
        label = [-1] * 4 if split.startswith("test") else [0, 1, 2, 1]
        texts = [f"w{number}"] * 4
        made.write(blobs, **{split: {"premise": texts, "hypothesis": texts, "label": label}})
        (snapshot / "mnli" / f"{split}-00000-of-00001.parquet").symlink_to(blobs / f"{split}.parquet")
        lines += [f"  - split: {split}", f"    path: mnli/{split}-*"]
    (snapshot / "README.md").write_text("\n".join([*lines, "---"]) + "\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "made")
    read = read_raw("mnli", made.Data("nyu-mll/glue:mnli", text=("premise", "hypothesis"))).splits
    first = {name: part.table.column("premise")[0].as_py() for name, part in read.items()}
    assert first == {
        "train": "w0", "validation": "w1", "validation_mismatched": "w2", "test": "w3", "test_mismatched": "w4"
    }  # fmt: skip
    for source in ("nyu-mll/glue:rte", "nyu-mll/other"):
        with pytest.raises(DataError, match="cannot load .* its cache does not hold it"):
            read_raw("t", made.Data(source))


def test_an_unreachable_hub_says_so_and_what_to_do(monkeypatch, made):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue'\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as caught:
        read_raw("cola", made.Data("nyu-mll/glue:cola"))
    message = str(caught.value)
    assert "tasks.cola.data.source: cannot load 'nyu-mll/glue:cola' from the hub" in message
    assert "FISHMASK_DATA" in message and "folder" in message and "\n" not in message


def test_fishmask_data_is_read_in_place_of_the_hub(tmp_path, monkeypatch, made):
    made.write(
        tmp_path / "cola", train_subset=made.examples(20, classes=2), validation=made.examples(10, classes=2)
    )
    monkeypatch.setenv("FISHMASK_DATA", str(tmp_path))
    raw = read_raw("cola", made.Data("nyu-mll/glue:cola"))
    assert raw.splits["train"].remark == "subset: 0.2 % of train"
    made.write(tmp_path / "cola", train_subset=made.examples(2, classes=2))
    assert read_raw("cola", made.Data("nyu-mll/glue:cola")).splits["train"].remark == "subset: 0.02 % of train"
    assert raw.published.classes == ("unacceptable", "acceptable") and raw.licence.startswith("fair use")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("package:nowhere", "no data is read from package 'nowhere'; expected package:vaderSentiment or"),
        ("builtin:resnet9", "'builtin:' names models"),
    ],
)
def test_sources_without_data_are_refused(source, why, made):
    with pytest.raises(DataError, match=why):
        read_raw("t", made.Data(source))


def test_single_files_stand_in_for_a_folder(tmp_path, made):
    made.write(tmp_path, mine=made.examples(9), other=made.examples(6))
    files = {"train": tmp_path / "mine.parquet", "validation": tmp_path / "other.parquet"}
    raw = read_raw("t", made.Data("unused"), files)
    assert {name: split.table.num_rows for name, split in raw.splits.items()} == {"train": 9, "validation": 6}
    with pytest.raises(DataError, match="expected a file for train and one for validation or test"):
        read_raw("t", made.Data("unused"), {"train": tmp_path / "mine.parquet"})


def test_shards_are_joined_and_must_agree(tmp_path, made):
    made.write(tmp_path, **{"train-00000-of-00002": made.examples(4), "train-00001-of-00002": made.examples(5, 4)})
    made.write(tmp_path, test=made.examples(3))
    table = read_raw("t", made.Data(str(tmp_path))).splits["train"].table
    assert table.column("text").to_pylist() == made.sentences(9)
    made.write(tmp_path, **{"train-00001-of-00002": {"other": pa.array([1.5])}})
    with pytest.raises(DataError, match="shards differ in their columns"):
        read_raw("t", made.Data(str(tmp_path)))
