"""The GLUE server's files: names, header, every row once and in its order, labels as it wants them."""

import numpy as np
import pytest
import torch

from pipeline.errors import ParamsError
from pipeline.losses import outputs_of
from pipeline.tasks.base import Task
from pipeline.tasks.fetch import fetch
from pipeline.tasks.server import outputs, write_predictions


@pytest.fixture
def glue(tmp_path, bert, made):
    """Fetch a made task under a name of GLUE's."""

    def run(name: str, classes: int, *, metric: str = "accuracy", limit=None, **more) -> Task:
        label = [i / 10 for i in range(60)] if not classes else [i % classes for i in range(60)]
        splits = {"train": {"text": made.sentences(60), "label": label}}
        splits["validation"] = {"text": made.sentences(30, 300), "label": label[:30]}
        blank = -1.0 if not classes else -1
        splits |= {split: {"text": made.sentences(n, 500), "label": [blank] * n} for split, n in more.items()}
        if "test_mismatched" in more:
            for split in ("validation", "test"):
                splits[f"{split}_matched"] = splits.pop(split)
            splits["validation_mismatched"] = splits["validation_matched"]
        source = made.write(tmp_path / "data" / name, **splits)
        out = tmp_path / "fetched"
        out.mkdir()
        data, model = made.Data(source=str(source), limit=limit), made.Model(str(bert))
        fetch(name, kind="text", data=data, model=model, out=out, metric=metric)
        return Task.load(out, model, metric)

    return run


def lines(file):
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    assert rows[0] == ["index", "prediction"] and [row[0] for row in rows[1:]] == list(
        map(str, range(len(rows) - 1))
    )
    return [row[1] for row in rows[1:]]


def test_rows_stand_in_their_own_order_whatever_their_length(glue, tmp_path):
    task = glue("cola", 2, metric="matthews", test=37)
    model = task.model(0)
    found = outputs(task, model, "test", 5)
    with torch.no_grad():
        each = [outputs_of(model, task.batches("test", 1)[i]) for i in range(37)]
    np.testing.assert_allclose(found, torch.cat(each).numpy(), rtol=1e-4, atol=1e-6)
    (file,) = write_predictions(task, model, "cola", tmp_path, 5)
    assert file.name == "CoLA.tsv"
    assert lines(file) == [str(int(row.argmax())) for row in found] and len(set(lines(file))) <= 2


def test_names_where_the_server_wants_names(glue, tmp_path):
    task = glue("rte", 2, test=9)
    task.classes = ["entailment", "not_entailment"]
    (file,) = write_predictions(task, task.model(0), "rte", tmp_path, 4)
    assert file.name == "RTE.tsv" and set(lines(file)) <= {"entailment", "not_entailment"}


def test_similarities_are_numbers_from_0_to_5(glue, tmp_path):
    task = glue("stsb", 0, metric="pearson_spearman", test=9)
    model = task.model(0)
    with torch.no_grad():
        model.classifier.bias.fill_(7.0)
        model.classifier.weight[:, 0] = 30.0
    (file,) = write_predictions(task, model, "stsb", tmp_path, 4)
    values = [float(word) for word in lines(file)]
    assert file.name == "STS-B.tsv" and len(values) == 9
    assert all(0 <= value <= 5 for value in values) and {0.0, 5.0} & set(values)


def test_mnli_has_a_second_test_and_validation_split(glue, tmp_path):
    task = glue("mnli", 3, test=8, test_mismatched=6)
    assert task.reported == "validation" and task.sizes["validation_mismatched"] == 30
    assert task.manifest["splits"]["validation"]["remark"] == "matched"
    model = task.model(0)
    assert task.evaluate(model, "validation_mismatched", 8) == task.evaluate(model, "validation", 8)
    files = write_predictions(task, model, "mnli", tmp_path, 4)
    assert [file.name for file in files] == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    assert [len(lines(file)) for file in files] == [8, 6]


def test_what_the_server_would_refuse_is_refused(glue, tmp_path):
    task = glue("sst2", 2, test=9, limit={"test": 5})
    with pytest.raises(ParamsError, match="keeps 5 of 9 rows of test"):
        write_predictions(task, task.model(0), "sst2", tmp_path, 4)
    with pytest.raises(ParamsError, match="knows no task 'words'"):
        write_predictions(task, task.model(0), "words", tmp_path, 4)
    del task.manifest["splits"]["test"]
    with pytest.raises(ParamsError, match=r"without a test split; the server scores SST-2\.tsv"):
        write_predictions(task, task.model(0), "sst2", tmp_path, 4)


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("qnli", ["0", "1"], ["entailment", "not_entailment"]),
        ("mnli", ["0", "1", "2"], ["entailment", "neutral", "contradiction"]),
        ("mnli", ["contradiction", "entailment", "neutral"], ["contradiction", "entailment", "neutral"]),
        ("cola", ["acceptable", "unacceptable"], ["1", "0"]),
        ("wnli", ["not_entailment", "entailment"], ["0", "1"]),
    ],
)
def test_classes_are_called_as_the_server_calls_them_however_the_files_do(glue, tmp_path, name, own, expected):
    task = glue(name, len(own), test=9)
    task.classes = own
    model = task.model(0)
    for label, word in enumerate(expected):
        with torch.no_grad():
            model.classifier.bias.copy_(100.0 * torch.nn.functional.one_hot(torch.tensor(label), len(own)))
        (file,) = write_predictions(task, model, name, tmp_path, 4)
        assert set(lines(file)) == {word}


@pytest.mark.parametrize(
    ("classes", "metric", "glue_name", "why"),
    [
        (2, "accuracy", "stsb", "its labels are 0, 1; those of stsb are numbers"),
        (3, "accuracy", "rte", "its labels are 0, 1, 2; those of rte are entailment, not_entailment"),
        (0, "pearson", "rte", "its labels are numbers; those of rte are entailment"),
    ],
)
def test_another_tasks_labels_are_refused(glue, tmp_path, classes, metric, glue_name, why):
    task = glue("mine", classes, metric=metric, test=9)
    with pytest.raises(ParamsError, match=why):
        write_predictions(task, task.model(0), glue_name, tmp_path, 4)
    assert not list(tmp_path.glob("*.tsv"))
