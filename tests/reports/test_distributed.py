"""Tables 2 and 3 and their figures, from metrics written by hand."""

import csv
import io

import pytest

from pipeline.reports.distributed import bytes_figure, share_table, steps_figure
from pipeline.reports.page import write_report
from pipeline.reports.reading import load_results
from pipeline.reports.reference import reference_rows, reference_table

HOW = {"workers": 2, "every": 4, "average": "mean", "own_masks": False, "shard": True, "warmup": 1}
HOW |= {"lr": None, "epochs": None}


def share(
    metrics, method="fish", setting="a", scores=(0.9, 0.8, 1.0), kind="image", first=0.5, task="digits", **how
):
    density = 1.0 if method == "dense" else 0.02
    values = int(100_000 * density)
    seeds = {
        str(seed): {
            "metric": score, "density": density, "dense_bytes": 400_000,
            "bytes": {"values": values, "control": 500},
            "merges": [
                {"merge": 1, "step": 4, "bytes": values // 2, "drift": 1.0, "accuracy": first},
                {"merge": 2, "step": 8, "bytes": values // 2 + 10},
                {"merge": 3, "step": 12, "bytes": values, "drift": 3.0, "accuracy": score},
            ],
        }
        if score is not None
        else {"metric": None, "diverged": "the loss", "dense_bytes": 400_000}
        for seed, score in enumerate(scores)
    }  # fmt: skip
    content = {
        "task": task, "method": method, "setting": setting, "metric": "accuracy", "lr": 0.1, "kind": kind,
        "params": {f"distribute.{setting}": HOW | how, f"tasks.{task}.train": {"epochs": 5}}, "seeds": seeds,
        "data": {"rows": {"train": 1433, "validation": 364}, "reported": "validation", "source": "package:x"},
    }  # fmt: skip
    metrics.write("distribute", f"{task}-{method}-{setting}", content)


@pytest.fixture
def shares(metrics):
    share(metrics)
    share(metrics, setting="b", every=12, scores=(0.7, None, 0.9))
    share(metrics, "dense", scores=(1.0, 1.0, 1.0), first=0.96)
    share(metrics, kind="text", task="words", own_masks=True, average="sum", warmup=0)
    return metrics.folder


def texts(table):
    return [[entry.text for entry in row] for row in table.rows]


def test_the_tables_tell_scores_and_bytes(shares):
    results = load_results(shares)
    dense, fish, rare = texts(share_table(results, "image"))
    assert dense == [
        "digits", "dense", "–", "mean", "4", "100 %", "100.0 ± 0.0", "3", "100 kB", "100 kB", "50 kB", "2", "0.1",
    ]  # fmt: skip
    assert fish[:11] == [
        "digits", "fish", "shared", "mean", "4", "2 %", "90.0 ± 10.0", "3", "2.5 kB", "2 kB", "–",
    ]  # fmt: skip
    assert rare[4:8] == ["12", "2 %", "80.0 ± 14.1", "2"]
    (words,) = texts(share_table(results, "text"))
    assert words[:5] == ["words", "fish", "own", "sum", "4"]
    notes = " ".join(share_table(results, "image").notes)
    assert (
        "n = 2 to 3 seeds" in notes and "95.0 on digits" in notes and "diverged and not counted: seed 1" in notes
    )
    assert "2 workers, each with a part of the data, 5 epochs, of which the first trains everything" in notes
    assert "scored on 364 validation rows" in notes and "not searched for these workers" in notes
    assert notes.count("all rows") == 1
    records = list(csv.DictReader(io.StringIO(share_table(results, "image").csv())))
    assert float(records[0]["sent_bytes"]) == 100_500 and float(records[0]["bytes_to_goal"]) == 50_000
    assert (
        records[1]["bytes_to_goal"] == "" and records[2]["seed_1"] == "" and records[1]["control_bytes"] == "500.0"
    )


def test_the_figures_show_score_against_bytes_and_local_steps(shares):
    results = load_results(shares)
    described = bytes_figure(results).description
    assert "digits, fish 2 %, 4 steps: 90.0 after 2 kB" in described
    assert "words, fish 2 %, own masks, sum, 4 steps: 90.0 after 2 kB" in described
    steps = steps_figure(results)
    assert steps.description == "digits, fish 2 %: 90.0 ± 10.0 at 4, 80.0 ± 14.1 at 12."
    assert steps.svg == steps_figure(results).svg


def test_one_worker_sends_nothing_and_stands_in_no_figure(metrics):
    share(metrics, "dense", workers=1)
    results = load_results(metrics.folder)
    (row,) = texts(share_table(results, "image"))
    assert row[2:5] == ["–", "one worker", "–"] and row[11] == "–"
    assert steps_figure(results) is None


def test_only_the_grids_cells_are_shown_beside_what_was_logged_before(shares, tmp_path):
    assert list(load_results(shares, shares={("words", "fish", "a")}).shares) == [("words", "fish", "a")]
    files = write_report(shares, tmp_path / "none", "demo", shares=set())
    assert not any("table" in path.name for path in files)
    files = write_report(shares, tmp_path / "all", "demo")
    names = {path.name for path in files}
    assert {"table2.md", "table3.csv", "bytes.svg", "local-steps.svg", "reference-table2.csv"} <= names
    page = files[0].read_text()
    assert 'id="distributed"' in page and "Not comparable with ResNet-34" in page


def test_the_logged_figures_are_those_of_the_first_implementation():
    rows = reference_rows()
    assert {row["table"] for row in rows} == {"2", "3", "4"} and all(0 <= float(row["score"]) <= 1 for row in rows)
    means = {tuple(row[1:4]) + (row[5],): row[6] for row in texts(reference_table("2"))}
    assert means["fish", "own", "sum", "10"] == "84.7" and means["fish", "own", "sum", "100"] == "83.9"
    assert means["dense", "–", "sum", "30"] == "85.0" and means["dense", "one worker", "–", "–"] == "84.7"
    assert not any(kind[2] == "mean" for kind in means)  # logged for some of the tasks only
    assert len(texts(reference_table("2", ["rte"]))) == 10 and len(texts(reference_table("3"))) == 12
    fixed = [row for row in texts(reference_table("4")) if row[2] == "fixed" and row[4] == "10 %"]
    assert [(row[5], row[6]) for row in fixed] == [("0.4", "10.0"), ("0.04", "91.3")]


def test_notes_tell_rows_of_another_course_or_rate_apart(metrics):
    share(metrics, lr={"fish": 0.1}, epochs=2)
    share(metrics, "random", workers=3, shard=False, warmup=0)
    share(metrics, "dense", workers=1, warmup=2)
    notes = share_table(load_results(metrics.folder), "image").notes
    (course,) = [note for note in notes if note.startswith("digits: ")]
    assert "fish 2 %, 4 steps: 2 workers, each with a part of the data, 2 epochs, of which the first" in course
    assert "random 2 %, 4 steps: 3 workers, each with all of the data, 5 epochs;" in course
    assert "1 worker with all of the data, 5 epochs, of which the first 2 train everything" in course
    (rates,) = [note for note in notes if note.startswith("lr is")]
    assert rates.endswith("which may favour a method: digits random 2 %, 4 steps.")


def test_what_was_logged_says_whether_it_is_comparable(shares):
    for number, tasks, fit in (
        ("2", ["words"], "not "),
        ("2", ["rte"], ""),
        ("3", ["digits"], "not "),
        ("4", [], "not "),
    ):
        table = reference_table(number, tasks)
        assert f": {fit}comparable" in table.title
        assert ("Not comparable" in table.notes[0]) == bool(fit)
