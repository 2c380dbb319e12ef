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
        ("seeds: [0, 1, 2]", "seeds: [0, 1, 0]", "seeds: each seed once, got [0, 1, 0]"),
        (
            "examples-32: {density: null, examples: 32}",
            "examples-32: {density: null, examples: 33}",
            "settings.examples-32.examples: unknown '33' (known: 32, 512)",
        ),
        ("kind: text", "kind: txet", "expected 'text', 'image' or 'causal'"),
    ],
)
def test_contradictions_are_one_line(write, old, new, part):
    assert part in message(write(old, new))


@pytest.mark.parametrize("group", ["ranked", "unranked", "learned"])
def test_every_method_stands_in_its_own_list_of_the_grid(group):
    """Another list's stages would declare another list's inputs."""
    from pipeline.schema import GridParams
    from pipeline.training.methods import METHODS

    for name, method in [*METHODS.items(), ("fish-spread", METHODS["fish"])]:
        own = "learned" if method.strategy == "learned" else "ranked" if method.needs_ranking else "unranked"
        grid = {"tasks": [], "methods": [name], "ranked": [], "unranked": [], "settings": [], "sweep": {}}
        if group == own:
            assert GridParams(**(grid | {group: [name]})).methods == [name]
        else:
            with pytest.raises(ValueError, match=f"'{name}' belongs in {own}, not in {group}"):
                GridParams(**(grid | {group: [name]}))


def test_a_grid_task_without_a_learning_rate_is_refused(write):
    import re

    lr = re.search(r"dense: (\{lr: \{words: [^,]+, digits: [^}]+\}\})", TEXT)
    assert lr
    assert "methods.dense.lr: unknown 'digits'" in message(write(lr.group(1), "{lr: {words: 0.1}}"))


@pytest.mark.parametrize(
    ("section", "name"), [("settings", "density-2.1e-2"), ("tasks", "a/b"), ("methods", "fish sp")]
)
def test_a_name_that_dvc_would_take_apart_is_refused(write, section, name):
    text = message(write(f"\n{section}:", f"\n{section}:\n  {name}: {{}}"))
    assert f"'{name}' is part of keys, stages and folders" in text and text.startswith("params.yaml:")


def test_a_method_that_learns_its_mask_says_how(write):
    """DVC compares `learn`, and would stop before its stage with a complaint of its own."""
    file = write("learned: []", "learned: [deviation]")
    file.write_text(
        file.read_text().replace(
            "bitfit, magnitude, head]\n  ranked", "bitfit, magnitude, head, deviation]\n  ranked", 1
        )
        + "  deviation: {lr: {words: 0.1, digits: 0.1}}\n"
    )
    assert "methods.deviation.learn: missing; methods in grid.learned need it" in message(file)
    file.write_text(file.read_text().replace("digits: 0.1}}\n", "digits: 0.1}, learn: {epochs: 1}}\n"))
    assert Params.load(file).methods["deviation"].learn.epochs == 1


@pytest.mark.parametrize("key", ["device", "precision"])
def test_what_dvc_compares_has_no_default(write, key):
    assert f"{key}: missing; it is required" in message(write(f"\n{key}: ", "\n# "))


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
