"""`fishmask tune` from a file to a folder: what it makes, that it is exact, and that a stopped run ends alike."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.deltas.delta import Delta
from pipeline.errors import ArtifactError, MismatchError, ParamsError
from pipeline.tuning.loading import load_tuned
from pipeline.tuning.manifest import Tuned
from pipeline.tuning.plan import Asked, default_epochs
from pipeline.tuning.rates import next_rate
from pipeline.tuning.tune import tune


@pytest.fixture
def asked(bert, write_csv, reviews):
    file = write_csv("reviews.csv", ["movie snippet", "verdict"], reviews(200))
    return Asked(model=str(bert), train=str(file), density=0.3, batch_size=8, epochs=16, lr=0.01)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dense", [False, True])
def test_a_csv_becomes_a_delta_that_loads(tmp_path, asked, bert, dense):
    asked = Asked(**vars(asked) | {"dense": dense})
    result = tune(asked, tmp_path / "out", track=False)
    tuned = Tuned.load(tmp_path / "out")
    assert tuned == result.tuned and tuned.classes == ["bad", "good"] and tuned.columns.text == ["movie snippet"]
    assert set(tuned.scores) == {"head", "fish"} | ({"dense"} if dense else set())
    assert tuned.scores["fish"]["accuracy"] > 0.1 + tuned.scores["head"]["accuracy"]
    assert tuned.data.rows == {"train": 160, "validation": 40}
    assert tuned.delta.values == int(0.3 * tuned.delta.parameters)
    model = load_tuned(tmp_path / "out")
    delta = Delta.load(tmp_path / "out" / "delta.safetensors")
    assert delta.digest == tuned.delta.digest and delta.info["task"] == "out"
    for name, value in model.named_parameters():
        if name in delta.mask.index and delta.mask.count(name):
            at = delta.at(name)
            flat = value.detach().reshape(-1)
            assert torch.equal(
                flat if at is None else flat[at], delta.resolve(load_base(bert, tuned)).values[name]
            )
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{tuned.scores['fish']['accuracy']:.4f}" in card and tuned.data.digest in card
    assert list(tmp_path.glob(".out*")) == []  # nothing of the unfinished run is left


def load_base(bert, tuned):
    from pipeline.tasks.saved import load_model

    return load_model(str(bert), info={"kind": "text", "outputs": 2, "classes": tuned.classes, "seed": 0})


def test_another_base_or_delta_is_refused(tmp_path, asked, bert):
    tune(asked, tmp_path / "out", track=False)
    other = load_base(bert, Tuned.load(tmp_path / "out"))
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="is not the delta's base"):
        load_tuned(tmp_path / "out", base=str(tmp_path / "other"))
    raw = json.loads((tmp_path / "out" / "tune.json").read_text())
    raw["delta"]["digest"] = "0" * 64
    (tmp_path / "out" / "tune.json").write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="is not the delta that tune.json describes"):
        load_tuned(tmp_path / "out")


def test_regression_by_a_column_of_numbers(tmp_path, bert, write_csv, reviews):
    rows = [(text, 0.25 + 0.5 * (verdict == "good")) for text, verdict in reviews(240)]
    file = write_csv("r.csv", ["text", "score"], rows)
    asked = Asked(model=str(bert), train=str(file), density=0.5, batch_size=8, epochs=8, lr=0.01)
    tuned = tune(asked, tmp_path / "out", track=False).tuned
    assert (tuned.objective, tuned.metric, tuned.classes) == ("regression", "pearson", None)
    assert tuned.scores["fish"]["pearson"] > max(0.5, tuned.scores["head"]["pearson"])
    assert load_tuned(tmp_path / "out").config.num_labels == 1


def test_long_texts_are_cut_at_what_the_model_takes_and_said(tmp_path, bert, write_csv, reviews, capsys):
    rows = [(f"{text} {'film ' * (60 if i < 5 else 0)}", verdict) for i, (text, verdict) in enumerate(reviews(60))]
    file = write_csv("r.csv", ["text", "label"], rows)
    tuned = tune(
        Asked(model=str(bert), train=str(file), density=0.1, epochs=1), tmp_path / "out", track=False
    ).tuned
    assert tuned.text.max_length == 32
    cut = [line for line in tuned.data.remarks if "are cut at 32 tokens" in line]
    assert sum(int(line.split()[1]) for line in cut) == 5
    assert all(line in capsys.readouterr().err for line in cut[:1])


def test_a_stopped_or_killed_run_ends_with_the_same_bytes(tmp_path, bert, write_csv, reviews):
    write_csv("reviews.csv", ["movie snippet", "verdict"], reviews(80))
    arguments = ["--model", str(bert), "--train", "reviews.csv", "--density", "0.1", "--epochs", "12"]
    arguments += ["--batch-size", "4", "--threads", "1", "--no-mlflow", "--out", "out"]
    process = start(arguments, "fish: 1/", signal.SIGINT)
    assert process.returncode == 143
    assert process.said[-1].rstrip().endswith("to go on: fishmask tune --resume --out out")
    assert not Path("out").exists()
    asked = Asked(
        model=str(bert), train="reviews.csv", density=0.1, epochs=12, batch_size=4, threads=1,
    )  # fmt: skip
    with pytest.raises(ParamsError, match="an unfinished run is there; add --resume to go on"):
        tune(asked, Path("out"), track=False)
    with pytest.raises(ParamsError, match=r"--density is 0.2, the unfinished run of out has 0.1; leave it out"):
        tune(Asked(density=0.2), Path("out"), track=False, resume=True)
    # All in processes of the command: it computes in AVX2 everywhere, this one may not.
    assert start(["--resume", "--out", "out", "--no-mlflow"], "fish: ", signal.SIGKILL).returncode == -9
    assert start(["--resume", "--out", "out", "--no-mlflow"]).returncode == 0
    resumed = files(Path("out"))
    shutil.rmtree("out")
    assert start(arguments).returncode == 0
    again = files(Path("out"))
    assert json.loads(again["tune.json"]) == json.loads(resumed["tune.json"])
    assert again == resumed


def start(arguments, until=None, stop=None):
    """Start the command; send it a signal once it has said something of the real training, if one is given."""
    command = [sys.executable, "-m", "pipeline.cli", "tune", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    process.said = []
    for line in process.stderr:
        process.said.append(line)
        if until is not None and until in line and "trying" not in line:
            process.send_signal(stop)
            break
    process.said += process.communicate()[1].splitlines()
    return process


def test_little_memory_gives_the_same_model_and_is_said(tmp_path, asked, monkeypatch, capsys):
    from transformers import BertForSequenceClassification

    asked = Asked(**vars(asked) | {"epochs": 1})
    whole = tune(asked, tmp_path / "whole", track=False).tuned
    forward, most = BertForSequenceClassification.forward, 5

    def small(self, input_ids=None, **rest):
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(BertForSequenceClassification, "forward", small)
    tuned = tune(asked, tmp_path / "out", track=False).tuned
    said = capsys.readouterr().err
    for what in ("micro-batches of 4 examples instead of 8", "scoring batches of 4", "evaluation batches of 4"):
        assert f"out of memory: {what}" in said
    assert tuned.scores["fish"]["loss"] == pytest.approx(whole.scores["fish"]["loss"], abs=0.05)
    # The loss differs by the dropout that smaller batches draw, the mask not at all.
    masks = [Delta.load(tmp_path / name / "delta.safetensors").mask.digest for name in ("whole", "out")]
    assert masks[0] == masks[1]


def test_a_run_lands_in_mlflow_and_can_be_kept_out_of_it(tmp_path, asked):
    from pipeline.tracking import runs_of

    tune(asked, tmp_path / "silent", track=False)
    assert not (tmp_path / "mlflow.db").exists()
    tune(asked, tmp_path / "out")
    assert len(runs_of(tmp_path, {"stage": "tune", "cell": "out", "level": "cell"})) == 1
    assert len(runs_of(tmp_path, {"stage": "tune", "cell": "out", "level": "seed"})) == 2


@pytest.mark.parametrize(("budget", "epochs"), [("0.001s", 1), ("1h", 30)])
def test_a_budget_decides_the_epochs(tmp_path, asked, write_csv, reviews, capsys, budget, epochs):
    file = write_csv("few.csv", ["text", "label"], reviews(30))
    asked = Asked(**vars(asked) | {"epochs": None, "budget": budget, "train": str(file)})
    result = tune(asked, tmp_path / "out", track=False)
    assert result.tuned.training.epochs == epochs
    said = capsys.readouterr().err
    assert ("training one epoch" if epochs == 1 else "30 of them fit the budget") in said


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": None}, "--model is missing"),
        ({"train": None}, "--train is missing"),
        ({"budget": "soon"}, "--budget soon: expected a time such as 90s, 10m or 1.5h"),
        ({"budget": "1m"}, "--epochs and --budget: one of them decides"),
        ({"metric": "acuracy"}, "--metric: 'acuracy' is unknown"),
        ({"density": 0.0}, "--density 0: expected a share of all parameters: above 0, at most 1"),
        ({"density": 2.0}, "--density 2: expected"),
        ({"lr": -1.0}, "--lr -1: expected a number above 0"),
        ({"lr": 1e9}, "training diverged; lower lr"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"precision": "fp16"}, "precision 'fp16' is unknown"),
        ({"model": "nowhere"}, "--model: no folder 'nowhere'"),
        ({"train": "owner/name"}, "cannot load 'owner/name' from the hub"),
        ({"metric": "pearson"}, "column 'verdict' holds no numbers; regression needs them"),
        ({"density": 0.001}, "the head (classifier: 66 parameters) is larger than the budget"),
    ],
)
def test_bad_options_are_refused_in_one_line_and_leave_nothing(tmp_path, asked, changes, line):
    from pipeline.errors import FishmaskError

    with pytest.raises(FishmaskError) as refused:
        tune(Asked(**vars(asked) | changes), tmp_path / "out", track=False)
    assert line in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.tune" / "plan.json").exists()


def test_nothing_that_stands_there_is_lost(tmp_path, asked):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ParamsError, match="holds something else than a tuned model"):
            tune(asked, tmp_path / "out", track=False, force=force)
    with pytest.raises(ParamsError, match="--resume: there is no unfinished run"):
        tune(asked, tmp_path / "new", track=False, resume=True)


def test_default_epochs_follow_the_rows():
    assert [default_epochs(rows, 16) for rows in (5, 160, 1600, 100_000)] == [12, 12, 3, 3]


def test_a_search_goes_on_once_beyond_the_end():
    def search(loss, **most):
        tried = {}
        while (rate := next_rate(tried, 2e-3, **most)) is not None:
            tried[rate] = loss(rate)
        return sorted(tried)

    assert search(lambda rate: abs(rate - 2e-3)) == [7e-4, 2e-3, 6e-3]
    assert search(lambda rate: rate) == [2e-4, 7e-4, 2e-3, 6e-3]
    assert search(lambda rate: -rate) == [7e-4, 2e-3, 6e-3, 2e-2]
    assert search(lambda rate: -rate, tries=6) == [7e-4, 2e-3, 6e-3, 2e-2, 6e-2, 0.2]
