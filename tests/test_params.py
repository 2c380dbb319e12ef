"""params.yaml: what is read, and the one line that each mistake becomes."""

from pathlib import Path

import pytest

from pipeline.errors import ParamsError
from pipeline.params import Params
from pipeline.runtime.yaml_files import edit_yaml, parse_overrides

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "params.yaml").read_text()


@pytest.fixture
def write(tmp_path):
    def write(old, new):
        assert TEXT.count(old) >= 1, f"the committed params.yaml no longer holds {old!r}"
        file = tmp_path / "params.yaml"
        file.write_text(TEXT.replace(old, new, 1))
        return file

    return write


def message(file, **overrides):
    with pytest.raises(ParamsError) as caught:
        Params.load(file, overrides or None)
    text = str(caught.value)
    assert "\n" not in text
    return text


def row(file, part):
    return next(i for i, line in enumerate(file.read_text().splitlines(), 1) if part in line)


def test_the_committed_file_is_the_demo_profile():
    assert TEXT == (ROOT / "pipeline" / "profiles" / "demo.yaml").read_text()
    params = Params.load(ROOT / "params.yaml")
    assert params.profile == "demo"
    assert len(params.seeds) >= 3


def test_dotted_lookup_gives_values_and_models():
    params = Params.load(ROOT / "params.yaml")
    assert params.at("tasks.words.density") == params.tasks["words"].density
    assert params.at("tasks.words.train") is params.tasks["words"].train
    assert params.at("methods.fish.lr.words") == params.methods["fish"].lr["words"]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("tasks.wrods", "unknown task 'wrods'; did you mean 'words'?"),
        ("methods.fsh.lr.words", "unknown method 'fsh'; did you mean 'fish'?"),
        ("settings.mian", "unknown setting 'mian'; did you mean 'main'?"),
    ],
)
def test_an_unknown_name_gets_the_closest(key, hint):
    with pytest.raises(ParamsError, match="params.yaml: ") as caught:
        Params.load(ROOT / "params.yaml").at(key)
    assert hint in str(caught.value)


def test_a_misspelt_key_names_line_and_suggestion(write):
    file = write("    density: 0.005", "    densty: 0.005")
    text = message(file)
    assert text.startswith(f"params.yaml:{row(file, 'densty')}: tasks.words.densty: unknown key")
    assert "did you mean 'density'?" in text


@pytest.mark.parametrize("value", ["0", "-0.1", "1.5", "much", "null", ".nan", ".inf"])
def test_a_density_outside_0_1_is_refused_with_its_line(write, value):
    file = write("    density: 0.005", f"    density: {value}")
    text = message(file)
    assert text.startswith(f"params.yaml:{row(file, f'density: {value}')}: tasks.words.density: expected")


def test_a_missing_key_is_named(write):
    assert "tasks.words.metric: missing" in message(write("    metric: accuracy\n", ""))


def test_numbers_are_read_as_yaml_1_2_does(write):
    file = write("weight_decay: 0.0,", "weight_decay: 5e-5,")
    assert Params.load(file).tasks["words"].train.weight_decay == 5e-5


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("tasks: [words, digits]", "tasks: [wrods]", "grid.tasks: unknown 'wrods'; did you mean 'words'?"),
        ("ranked: [fish]", "ranked: []", "exactly one of ranked, unranked and learned"),
        ("examples: [32, 512]", "examples: [512, 32]", "ascending"),
        ("seeds: [0, 1, 2]", "seeds: []", "seeds: expected"),
        ("kind: text", "kind: txet", "expected 'text', 'image' or 'causal'"),
    ],
)
def test_contradictions_are_one_line(write, old, new, part):
    assert part in message(write(old, new))


def test_a_grid_task_without_a_learning_rate_is_refused(write):
    import re

    lr = re.search(r"dense: (\{lr: \{words: [^,]+, digits: [^}]+\}\})", TEXT)
    assert lr
    assert "methods.dense.lr: unknown 'digits'" in message(write(lr.group(1), "{lr: {words: 0.1}}"))


def test_broken_yaml_names_the_line(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("profile: demo\nseeds: [0, 1\ngrid: {\n")
    assert message(file).startswith("params.yaml:")
    file.write_text("- a list\n")
    assert "expected a mapping" in message(file)
    assert "no such file" in message(tmp_path / "absent.yaml")


def test_overrides_are_checked_like_the_file():
    assert parse_overrides(["a.b=5e-5", "c=[1, 2]", "d=off"]) == {"a.b": 5e-5, "c": [1, 2], "d": "off"}
    with pytest.raises(ParamsError, match="KEY=VALUE"):
        parse_overrides(["density"])
    told = message(ROOT / "params.yaml", **{"tasks.words.density": 0})
    assert told == "tasks.words.density as given in place of params.yaml's: expected greater than 0, got 0"
    told = message(ROOT / "params.yaml", **{"tasks.words.train.epochs": 1, "tasks.words.train.lrr": 1})
    assert told.startswith("tasks.words.train.lrr as given in place of params.yaml's: unknown key 'lrr'")


def test_editing_changes_the_value_and_nothing_else(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(TEXT)
    edit_yaml(file, {"methods.fish.lr.words": 0.5, "tasks.words.density": 0.25})
    params = Params.load(file)
    assert params.methods["fish"].lr["words"] == 0.5
    assert params.tasks["words"].density == 0.25
    back = Params.load(ROOT / "params.yaml")
    edit_yaml(file, {"methods.fish.lr.words": back.methods["fish"].lr["words"], "tasks.words.density": 0.005})
    assert Params.load(file) == back
    assert [line.split("#")[1:] for line in file.read_text().splitlines()] == [
        line.split("#")[1:] for line in TEXT.splitlines()
    ]


@pytest.mark.parametrize("key", ["methods.fsh.lr.words", "tasks.words.train", "grid.tasks"])
def test_editing_refuses_what_is_not_a_value(tmp_path, key):
    file = tmp_path / "params.yaml"
    file.write_text(TEXT)
    with pytest.raises(ParamsError, match=key):
        edit_yaml(file, {key: 1})
    assert file.read_text() == TEXT
