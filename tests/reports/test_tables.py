"""Tables: the numbers in them, what they say about themselves, and what they do not claim."""

import csv
import io

import pytest
from rich.console import Console

from pipeline.reports.reading import load_results
from pipeline.reports.table import metric_title, p_text, percent, signed, size
from pipeline.reports.tables import all_tables, difference_table, main_table, mask_table, sweep_table


def rows(table):
    return [[entry.text for entry in row] for row in table.rows]


def records(table):
    return list(csv.DictReader(io.StringIO(table.csv())))


def test_the_main_table_by_hand(demo):
    table = main_table(load_results(demo))
    assert rows(table) == [
        # equal models, so tasks by name; sd of .96 and .97 is .01 / sqrt 2
        ["digits", "dense", "98.0 ± 1.0", "3", "100 %", "1.1 kB", "800 kB", "0.001"],
        ["digits", "fish", "96.5 ± 0.7", "2", "0.5 %", "1.1 kB", "800 kB", "0.001"],
        ["digits", "random", "–", "–", "–", "–", "–", "–"],
        ["words", "dense", "92.0 ± 1.0", "3", "100 %", "1.1 kB", "800 kB", "0.001"],
        ["words", "fish", "91.0 ± 1.0", "3", "0.5 %", "1.1 kB", "800 kB", "0.001"],
        ["words", "random", "89.0 ± 1.0", "3", "0.5 %", "1.1 kB", "800 kB", "0.001"],
    ]
    assert [row[2].text for row in table.rows if row[2].bold] == ["91.0 ± 1.0"]


def test_csv_holds_raw_numbers_seeds_and_data(demo):
    fish = next(
        r for r in records(main_table(load_results(demo))) if (r["task"], r["method"]) == ("digits", "fish")
    )
    assert float(fish["mean"]) == pytest.approx(0.965) and float(fish["sd"]) == pytest.approx(0.01 / 2**0.5)
    assert (fish["seeds"], fish["seeds_diverged"], fish["seed_0"], fish["seed_1"]) == ("2", "1", "0.96", "")
    assert (fish["rows_train"], fish["rows_validation"]) == ("3000", "1400")
    assert fish["data_remark"] == "train: 3000 of 5697 rows" and fish["artifact_bytes"] == "1100.0"
    missing = records(main_table(load_results(demo)))[2]
    assert missing["method"] == "random" and missing["mean"] == "" and missing["seeds"] == ""


def test_every_table_of_scores_says_seeds_spread_and_data(demo):
    for table in all_tables(load_results(demo)):
        if table.name in {"masks", "differences"}:
            continue
        notes = " ".join(table.notes)
        assert "sample standard deviation over n = " in notes and "seeds" in notes
        said = (
            "scored on 1,400 validation rows, trained on 3,000 train rows; package:words 3.3; train: 3000 of 5697"
        )
        assert said in notes
        assert all(note in table.markdown() for note in table.notes)


def test_a_seed_that_diverged_is_named(demo, metrics):
    metrics.train("words", "random", [0.1, 0.9, 0.9])
    file = demo / "train" / "words-random-main.json"
    file.write_text(file.read_text().replace('"diverged": false', '"diverged": true', 1))
    notes = " ".join(main_table(load_results(demo)).notes)
    assert "digits fish main: seed 1 diverged and is not counted." in notes
    assert "words random main: seed 0 diverged and is counted." in notes


def test_bold_is_explained_and_its_absence_too(demo):
    notes = " ".join(main_table(load_results(demo)).notes)
    assert "words: fish is bold" in notes
    assert "digits: no sparse method is told apart from all the others, so none is bold." in notes
    assert (
        "With 3 seeds such an interval is the range of the differences" in notes and "1 of 4 comparisons" in notes
    )


def test_differences_by_hand(demo):
    table = difference_table(load_results(demo))
    assert rows(table)[-2:] == [
        ["words", "fish − dense", "−1.00", "[−1.00, −1.00]", "–", "3", "fish below"],
        # .02, .01, .03: t = .02 / (.01 / sqrt 3) = 3.464 with 2 degrees of freedom
        ["words", "fish − random", "+2.00", "[+1.00, +3.00]", "0.074", "3", "fish above"],
    ]
    assert rows(table)[0][:2] == ["digits", "fish − dense"] and rows(table)[0][5:] == ["2", "too few seeds"]
    assert "1 of 4 comparisons" in " ".join(table.notes)


def test_a_seed_that_is_lost_is_told_once_and_pairs_count_their_own_seeds(metrics):
    metrics.train("words", "fish", [0.9, None, 0.92])
    for method in ("dense", "random", "bitfit"):
        metrics.train("words", method, [0.8, 0.81, 0.82])
    table = difference_table(load_results(metrics.folder))
    assert [row[5:] for row in rows(table)] == [["2", "too few seeds"]] * 3
    assert table.notes.count("words fish main: seed 1 diverged and is not counted.") == 1
    assert not any("With 3 seeds" in note for note in table.notes)  # no pair has three


def test_sweeps_hold_the_main_setting_and_dense(demo):
    results = load_results(demo)
    assert [row[:5] for row in rows(sweep_table(results, "density"))] == [
        ["words", "fish", "density-low", "0.1 %", "86.0 ± 1.0"],
        ["words", "fish", "main", "0.5 %", "91.0 ± 1.0"],
        ["words", "dense", "main", "100 %", "92.0 ± 1.0"],
    ]
    assert [row[2:5] for row in rows(sweep_table(results, "examples"))] == [
        ["examples-few", "32", "89.0 ± 0.0"],
        ["main", "1,024", "91.0 ± 1.0"],
        ["main", "–", "92.0 ± 1.0"],
    ]


def test_the_data_may_have_one_remark_or_none(metrics):
    metrics.train("words", "fish", [0.5], data={"rows": {"train": 1, "validation": 2}, "remark": "by family."})
    metrics.train("digits", "fish", [0.5], data={})
    notes = main_table(load_results(metrics.folder)).notes
    assert "words: accuracy, %; scored on 2 validation rows, trained on 1 train rows; by family." in notes
    assert "digits: accuracy, %; rows not recorded." in notes


def test_masks_by_hand(demo):
    assert rows(mask_table(load_results(demo)))[0] == [
        "words",
        "fish",
        "main",
        "10",
        "2.5 %",
        "20 B",
        "16.00",
        "3",
    ]


def test_one_seed_has_no_spread_and_nothing_is_compared(metrics):
    metrics.train("words", "fish", [0.9])
    metrics.train("words", "random", [0.1])
    results = load_results(metrics.folder)
    assert rows(main_table(results))[0][2] == "90.0"
    assert rows(difference_table(results))[0][2:] == ["+80.00", "–", "–", "1", "too few seeds"]


def test_markdown_shows_foreign_characters_as_they_are(metrics):
    metrics.train("a|b", "x*y_<i>", [0.5])
    text = main_table(load_results(metrics.folder)).markdown()
    assert "| a\\|b | x\\*y\\_\\<i> |" in text
    assert len({line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_terminal_shows_every_number_at_80_columns(demo, metrics):
    metrics.train("words", "magnitude", [0.88, 0.90, 0.89], delta_bytes=454_000)
    console = Console(width=80, record=True, file=io.StringIO())
    table = main_table(load_results(demo))
    console.print(table.terminal())
    text = console.export_text()
    for row in rows(table):
        assert any(all(entry in line for entry in row) for line in text.splitlines())


def test_no_metrics_give_an_empty_main_table_and_nothing_else(tmp_path):
    tables = all_tables(load_results(tmp_path))
    assert [(table.name, table.rows) for table in tables] == [("main", ())]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (454_000, "454 kB"), (90_868_224, "90.9 MB"),
                        (1_360_000_000, "1.36 GB"), (5e12, "5,000 GB")],
)  # fmt: skip
def test_sizes(count, text):
    assert size(count) == text


def test_numbers_as_text():
    assert signed(-0.0251) == "−0.03" and signed(2.0) == "+2.00"
    assert percent(0.005) == "0.5 %" and percent(1) == "100 %" and p_text(0.0001) == "<0.001"
    assert metric_title("accuracy") == "accuracy, %" and metric_title("mcc") == "mcc × 100"
    assert metric_title("rmse") == "rmse"
