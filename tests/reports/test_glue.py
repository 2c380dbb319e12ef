"""Tables of the GLUE experiments: rates, macro average, forgetting, overlaps, Figure 2; every number by hand."""

import csv
import io

import pytest

from pipeline.reports.average import average_table, averages
from pipeline.reports.figure2 import cross_figure, crossed
from pipeline.reports.forgetting import forgetting_table, overlap_table
from pipeline.reports.page import write_report
from pipeline.reports.rates import rate_table
from pipeline.reports.reading import load_results
from pipeline.reports.table import metric_title
from pipeline.reports.tables import main_table


def texts(table):
    return [[entry.text for entry in row] for row in table.rows]


@pytest.fixture
def glue(metrics):
    for task, low in (("cola", 0.40), ("mrpc", 0.80), ("rte", 0.60)):
        metrics.train(task, "dense", [low + 0.03, low + 0.04, low + 0.05], density=1.0)
        metrics.train(task, "fish", [low + 0.02, low + 0.03, low + 0.04])
        metrics.train(task, "fish-global", [low, low + 0.02, low + 0.01])
        metrics.train(task, "lora", [low, None, low + 0.02])
    seeds = {"0": {"distance": {"l2": 1.0, "relative": 0.02}, "rte": {"before": 0.6, "after": 0.5}},
             "1": {"distance": {"l2": 1.0, "relative": 0.04}, "rte": {"before": 0.6, "after": 0.54}}}  # fmt: skip
    content = {
        "method": "fish",
        "setting": "main",
        "probe": "head",
        "metrics": {"cola": "matthews", "rte": "accuracy"},
    }
    content |= {"tasks": {"cola": seeds}}
    content |= {
        "overlap": {"tasks": {"cola, rte": {"0": 0.2, "1": 0.4}}, "seeds": {"cola": {"0, 1": 0.5}, "rte": {}}}
    }
    metrics.write("forget", "fish-main", content)
    tried = {"0.001": [0.5, 0.6], "0.002": [0.75, 0.5], "0.01": [None]}
    methods = {"fish": {"best": 0.002, "tried": tried}}
    record = {"task": "cola", "metric": "accuracy", "rows": {"fit": 1600, "tune": 400}, "methods": methods}
    metrics.write("tune-lr", "cola", record)
    metrics.write("tune-lr", "words", record | {"task": "words"})
    return metrics


def test_rates_show_the_search_of_this_profiles_tasks(glue):
    table = rate_table(load_results(glue.folder))
    assert texts(table) == [
        ["cola", "fish", "main", "0.002", "62.5", "2", "0.001: 55.0, 0.002: 62.5, 0.01: diverged"]
    ]
    assert "trained on 1,600 and scored on 400 rows of train; the reported split was not read" in table.notes[0]
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert [(row["lr"], row["best"]) for row in rows] == [("0.001", "False"), ("0.002", "True"), ("0.01", "False")]
    assert float(rows[1]["mean"]) == pytest.approx(0.625) and rows[2]["mean"] == ""
    assert rate_table(load_results(glue.folder / "none")) is None


def test_the_macro_average_is_taken_seed_by_seed(glue):
    results = load_results(glue.folder)
    assert averages(results, "fish") == pytest.approx({0: 62.0, 1: 63.0, 2: 64.0})
    assert averages(results, "lora") == pytest.approx({0: 60.0, 2: 62.0})  # a seed that lacks a task is left out
    assert averages(results, "random") == {}
    table = average_table(results)
    assert texts(table)[0] == ["dense", "64.0 ± 1.0", "3", "−1.00", "[−1.00, −1.00]", "–"]
    assert [row[0] for row in texts(table)] == ["dense", "fish", "fish-global", "lora"]
    assert not any("Left out" in note for note in table.notes)
    assert texts(table)[1][3:] == ["–", "–", "–"] and texts(table)[2][3] == "+2.00"
    only = {key for key in results.cells if key[0] != "rte"}
    assert average_table(load_results(glue.folder, only)) is None


def test_methods_without_an_average_are_named(glue):
    glue.train("cola", "bitfit", [0.4, 0.4, 0.4])
    for task in ("cola", "mrpc", "rte"):
        glue.train(task, "random", [0.5, None, None] if task == "rte" else [None, 0.5, None])
    table = average_table(load_results(glue.folder))
    assert [row[0] for row in texts(table)] == ["dense", "fish", "fish-global", "lora"]
    assert table.notes[-1] == "Left out, since no seed of theirs has every task: random, bitfit."


def test_forgetting_and_overlaps(glue):
    results = load_results(glue.folder)
    assert texts(forgetting_table(results)) == [
        ["fish main", "cola", "rte", "60.0 ± 0.0", "52.0 ± 2.8", "−8.00", "3 %", "2"]
    ]
    assert texts(overlap_table(results)) == [
        ["fish main", "seeds of cola", "0.5000"], ["fish main", "cola, rte", "0.3000"],
    ]  # fmt: skip


def test_the_second_validation_split_of_mnli_is_told(metrics):
    metrics.train("mnli", "fish", [0.7, 0.71, 0.72])
    file = metrics.folder / "train" / "mnli-fish-main.json"
    import json

    content = json.loads(file.read_text())
    for seed, values in content["seeds"].items():
        values["mismatched"] = 0.6 + int(seed) / 100
    file.write_text(json.dumps(content))
    table = main_table(load_results(metrics.folder))
    assert "mnli fish main: 61.0 ± 1.0 on the mismatched validation split." in table.notes


def test_figure_2_crosses_density_and_examples(metrics):
    for density in (0.001, 0.005):
        for examples in (32, 1024):
            main = (density, examples) == (0.005, 1024)
            setting = "main" if main else f"density-{density}-examples-{examples}"
            metrics.train("rte", "fish", [0.6, 0.61, 0.62], setting=setting, density=density, examples=examples)
    results = load_results(metrics.folder)
    assert {d: [c.examples for c in cells] for d, cells in crossed(results, "rte", "fish").items()} == {
        0.001: [32, 1024],
        0.005: [32, 1024],
    }
    figure = cross_figure(results)
    assert "density 0.1 %: 61.0 ± 1.0 at 32, 61.0 ± 1.0 at 1,024" in figure.description
    assert cross_figure(load_results(metrics.folder, {("rte", "fish", "main")})) is None


def test_the_page_holds_them(glue, tmp_path):
    files = {file.name for file in write_report(glue.folder, tmp_path / "reports", "glue")}
    assert {"rates.md", "average.md", "forgetting.md", "overlaps.md"} <= files


def test_pairs_of_metrics_are_named_and_shown_in_points():
    assert metric_title("accuracy_f1") == "mean of accuracy and F1 × 100"
    assert metric_title("pearson_spearman") == "mean of Pearson and Spearman × 100"
