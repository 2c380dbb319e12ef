"""Reading metrics: what is paired, what is bold, what belongs to a sweep, and what is refused."""

import pytest

from pipeline.errors import DataError
from pipeline.reports.reading import load_results


def test_a_cell_is_read_with_its_seeds(demo):
    cell = load_results(demo).main("digits", "fish")
    assert cell.scores == {0: 0.96, 1: None, 2: 0.97} and cell.values == [0.96, 0.97]
    assert cell.diverged == (1,)
    assert (cell.nnz, cell.parameters, cell.density, cell.lr) == (1000, 200_000, 0.005, 0.001)
    assert cell.delta_bytes == 1100 and cell.dense_bytes == 800_000


def test_quantities_of_the_cell_may_stand_with_the_cell(metrics):
    metrics.train("words", "fish", [0.5], density=0.005, nnz=7, parameters=14)
    cell = load_results(metrics.folder).main("words", "fish")
    assert (cell.nnz, cell.parameters) == (7, 14)


def test_a_score_that_is_not_a_number_is_no_score(metrics):
    metrics.train("words", "fish", [float("nan"), 0.5])
    assert load_results(metrics.folder).main("words", "fish").scores == {0: None, 1: 0.5}


def test_differences_are_paired_by_seed_not_by_position(metrics):
    metrics.train("words", "fish", [None, 0.9, 0.8, 0.7])
    metrics.train("words", "dense", [0.1, 0.7, None, 0.6])
    difference = load_results(metrics.folder).difference("words", "fish", "dense")
    assert difference.values == pytest.approx((0.2, 0.1))


def test_no_difference_without_a_common_seed_or_cell(metrics):
    metrics.train("words", "fish", [None, 0.9])
    metrics.train("words", "dense", [0.1, None])
    results = load_results(metrics.folder)
    assert results.difference("words", "fish", "dense") is None
    assert results.difference("words", "fish", "random") is None


@pytest.mark.parametrize(
    ("fish", "random", "best"),
    [
        ([0.9, 0.9, 0.9], [0.8, 0.7, 0.8], "fish"),
        ([0.8, 0.7, 0.8], [0.9, 0.9, 0.9], "random"),
        ([0.9, 0.9, 0.9], [0.8, 0.7, 0.95], None),  # higher mean, but not on every seed
        ([0.9, 0.9, 0.9], [0.9, 0.8, 0.8], None),  # an interval that touches 0
        ([0.9, 0.9], [0.1, 0.2], None),  # two seeds never tell
    ],
)
def test_the_best_sparse_method_needs_every_interval_above_zero(metrics, fish, random, best):
    metrics.train("words", "dense", [0.99] * len(fish))
    metrics.train("words", "fish", fish)
    metrics.train("words", "random", random)
    assert load_results(metrics.folder).best_sparse("words") == best


def test_one_method_that_is_not_told_apart_prevents_bold(metrics):
    metrics.train("words", "fish", [0.9, 0.9, 0.9])
    metrics.train("words", "random", [0.8, 0.7, 0.8])
    metrics.train("words", "head", [0.9, 0.91, 0.8])
    assert load_results(metrics.folder).best_sparse("words") is None


def test_a_single_sparse_method_is_not_best_of_anything(metrics):
    metrics.train("words", "fish", [0.9, 0.9, 0.9])
    assert load_results(metrics.folder).best_sparse("words") is None


def test_sweeps_hold_what_differs_in_one_quantity_only(demo, metrics):
    metrics.train("words", "fish", [0.5], setting="both", density=0.02, examples=32)
    results = load_results(demo)
    assert [c.setting for c in results.sweep("words", "fish", "density")] == ["density-low", "main"]
    assert [c.setting for c in results.sweep("words", "fish", "examples")] == ["examples-few", "main"]
    assert results.sweep("words", "random", "density") == [] and results.sweep("words", "head", "density") == []


def test_examples_come_from_the_mask_where_training_does_not_say(metrics):
    layers = [{"layer": "a", "count": 1, "numel": 1}]
    metrics.write("mask", "words-fish-main", {
        "task": "words", "method": "fish", "setting": "main", "examples": 64,
        "seeds": {"0": {"nnz": 1, "density": 1, "bytes": 2, "digest": "d", "layers": layers}},
    })  # fmt: skip
    metrics.train("words", "fish", [0.5])
    file = metrics.folder / "train" / "words-fish-main.json"
    file.write_text(file.read_text().replace('"examples": 1024, ', ""))
    assert load_results(metrics.folder).main("words", "fish").examples == 64


@pytest.mark.parametrize(
    ("stage", "content", "said"),
    [
        ("train", "{", "not readable as JSON"),
        ("train", "[]", "expected a JSON object, found a list"),
        ("train", '{"task": "w", "method": "m", "setting": "s"}', "the key 'seeds' is missing"),
        (
            "train",
            '{"task": "w", "method": "m", "setting": "s", "metric": "a", "seeds": {"x": {}}}',
            "not the metrics of",
        ),
        ("mask", '{"task": "w", "method": "m", "setting": "s", "seeds": {}}', "it has no seed"),
    ],
)
def test_a_broken_file_is_named_in_one_line(metrics, stage, content, said):
    file = metrics.folder / stage / "w-m-s.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(DataError) as caught:
        load_results(metrics.folder)
    message = str(caught.value)
    assert str(file) in message and said in message and "\n" not in message


def test_tasks_and_methods_have_a_fixed_order(metrics):
    metrics.train("b", "zeta", [0.5])
    metrics.train("b", "head", [0.5])
    metrics.train("a", "random", [0.5])
    metrics.train("c", "dense", [0.5], parameters=10**9)
    results = load_results(metrics.folder)
    assert results.tasks == ["c", "a", "b"]  # the largest model first
    assert results.methods == ["dense", "random", "head", "zeta"]
