"""A Predictor answers as the trained model does, by any delta over the one base, and in the rows' order."""

import threading

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.deltas.target import Layout
from pipeline.errors import ArtifactError, DataError, MismatchError, ParamsError
from pipeline.serving.predictor import Predictor
from pipeline.tasks.raw import RawSplit
from pipeline.tasks.saved import load_model, save_model
from tests.serving.folders import make_tuned

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [
    "a good film",
    "bad",
    None,
    "the road was dark and the day felt cold " * 9,
    "kind warm story",
    "  ",
    "day",
]


def expected(model, bert, *columns, length=12):
    """One text at a time through the trained model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert)
    rows = []
    for texts in zip(*columns, strict=True):
        if any(text is None or not text.strip() for text in texts):
            rows.append(None)
            continue
        with torch.no_grad():
            batch = tokenizer(*texts, truncation=True, max_length=length, return_tensors="pt")
            rows.append(model(**batch).logits[0])
    return rows


def check_classes(answers, logits, classes):
    for row, z in enumerate(logits):
        found = {name: column[row].as_py() for name, column in answers.columns.items()}
        if z is None:
            assert set(found.values()) == {None}
            continue
        p = z.softmax(0)
        assert found["prediction"] == classes[int(z.argmax())]
        assert list(found) == ["prediction", *(f"p_{name}" for name in classes)]
        np.testing.assert_allclose([found[f"p_{name}"] for name in classes], p, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_it_answers_as_the_trained_model_does(reviews, bert, batch_size):
    folder, model = reviews
    predictor = Predictor(folder, batch_size=batch_size, device="cpu")
    seen = []
    answers = predictor.answer({"id": range(7), "review": TEXTS}, progress=lambda *at: seen.append(at))
    check_classes(answers, expected(model, bert, TEXTS), ["bad", "good"])
    assert answers.missing == {"review": 2} and answers.cut == 1
    assert seen[-1] == (5, 5) and [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_several_deltas_share_one_base_and_switch_bit_for_bit(reviews, others, bert):
    folders = {"reviews": reviews} | others
    predictor = Predictor({name: folder for name, (folder, _) in folders.items()}, device="cpu")
    columns = {"review": TEXTS, "one": TEXTS, "two": TEXTS[::-1]}
    order = np.random.default_rng(0).permutation([*folders] * 5)
    first = {}
    for name in order.tolist():
        answers = predictor.use(name).answer(columns)
        held = predictor._base.use(name)
        trained = folders[name][1]
        assert all(torch.equal(p, q) for p, q in zip(held.parameters(), trained.parameters(), strict=True)), name
        again = first.setdefault(name, answers.columns)
        assert all(again[key].equals(values) for key, values in answers.columns.items())
    logits = expected(others["pairs"][1], bert, columns["one"], columns["two"])
    check_classes(predictor.answer(columns, by="pairs"), logits, ["x", "y", "z"])
    stars = predictor.answer(columns, by="stars").columns
    assert list(stars) == ["prediction"]
    wanted = [None if z is None else z.item() for z in expected(others["stars"][1], bert, TEXTS)]
    np.testing.assert_allclose(
        np.array(stars["prediction"].to_pylist(), dtype=float), np.array(wanted, dtype=float), rtol=1e-5
    )
    models = {id(variants.model): variants.model for variants in predictor._base._variants}
    assert len(models) == 3  # two classes, three classes, regression
    memory = {p.data_ptr(): p.numel() for model in models.values() for p in model.parameters()}
    one = Layout.of(reviews[1])
    heads = sum(3 * 33 if len(model.config.id2label) == 3 else 33 for model in list(models.values())[1:])
    assert sum(memory.values()) == sum(int(np.prod(shape)) for _, shape in one.parameters.values()) + heads


def test_threads_wait_for_each_other(reviews, others):
    predictor = Predictor({"a": reviews[0], "b": others["again"][0], "c": others["pairs"][0]}, device="cpu")
    columns = {"review": TEXTS, "one": TEXTS, "two": TEXTS}
    alone = {name: predictor.answer(columns, by=name).columns for name in "abc"}
    wrong = []

    def ask(name):
        for _ in range(10):
            found = predictor.answer(columns, by=name).columns
            if any(not found[key].equals(values) for key, values in alone[name].items()):
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcabc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_rows_and_rows_that_all_lack_a_value(reviews):
    predictor = Predictor(reviews[0], device="cpu")
    for texts, rows in ([], 0), ([None, ""], 2):
        answers = predictor.answer({"review": pa.array(texts, pa.string())})
        assert [len(column) for column in answers.columns.values()] == [rows] * 3
        assert all(column.null_count == rows for column in answers.columns.values())
        assert answers.columns["p_good"].type == pa.float32()
    assert predictor.answer({"review": pa.nulls(2)}).missing == {"review": 2}


def test_a_bare_delta_file_is_asked_by_what_it_says_of_itself(reviews, bert, tmp_path):
    folder, model = reviews
    file = tmp_path / "d.safetensors"
    file.write_bytes((folder / "delta.safetensors").read_bytes())
    predictor = Predictor(file, max_length=12, device="cpu")
    check_classes(predictor.answer({"n": range(7), "any": TEXTS}), expected(model, bert, TEXTS), ["bad", "good"])
    with pytest.raises(
        DataError, match=r"film.csv: cannot tell which column .* \(columns of text: a, b\); add --text"
    ):
        predictor.answer(RawSplit(pa.table({"a": TEXTS, "b": TEXTS}), "film.csv"))
    chosen = Predictor(file, text=["b"], max_length=12, device="cpu")
    check_classes(chosen.answer({"a": TEXTS, "b": TEXTS}), expected(model, bert, TEXTS), ["bad", "good"])


def test_what_does_not_fit_is_refused_in_one_line(reviews, others, bert, tmp_path):
    folder, _ = reviews
    wrong = tmp_path / "wrong"
    base = load_model(str(bert), info={"kind": "text", "outputs": 2, "seed": 0})
    with torch.no_grad():
        base.bert.embeddings.word_embeddings.weight[3, 3] += 1
    save_model(base, str(bert), wrong)
    with pytest.raises(MismatchError, match=r"wrong' and delta 'delta': .*word_embeddings.weight' differs \(1 of"):
        Predictor(folder, str(wrong))
    with pytest.raises(MismatchError, match="and delta 'b': the model is not the delta's base"):
        other = tmp_path / "other"
        make_tuned(other, wrong)
        Predictor({"a": folder, "b": other})
    with pytest.raises(ParamsError, match="there is no delta 'c'; there are: a, b"):
        Predictor({"a": folder, "b": others["again"][0]}, device="cpu").use("c")
    predictor = Predictor(folder, device="cpu")
    with pytest.raises(DataError, match=r"new.csv: no column 'review'; did you mean 'reviews'\?"):
        predictor.answer(RawSplit(pa.table({"reviews": ["x"]}), "new.csv"))
    with pytest.raises(DataError, match="column 'review' holds list.*; expected text"):
        predictor.answer({"review": [["a"]]})
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    (swapped / "tune.json").write_bytes((folder / "tune.json").read_bytes())
    (swapped / "delta.safetensors").write_bytes((others["again"][0] / "delta.safetensors").read_bytes())
    with pytest.raises(MismatchError, match="is not the delta that tune.json beside it describes"):
        Predictor(swapped)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "delta.safetensors").write_bytes((folder / "delta.safetensors").read_bytes()[:-9])
    with pytest.raises(ArtifactError):
        Predictor(torn)
