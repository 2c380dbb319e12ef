"""Decoders: with a head that classifies, and as language models whose completions alone are learnt."""

import json

import pytest
import torch

from pipeline.deltas.delta import Delta
from pipeline.errors import ModelError
from pipeline.losses import IGNORED, example_losses
from pipeline.schema import DataParams, ModelParams
from pipeline.tasks.base import Task
from pipeline.tasks.fetch import fetch
from pipeline.tasks.models import load_model
from pipeline.tasks.saved import ModelSource
from pipeline.tuning.loading import load_tuned
from pipeline.tuning.plan import Asked
from pipeline.tuning.tune import tune

pytestmark = pytest.mark.parametrize("name", ["gpt2", "llama"])


def write(path, reviews, count=120):
    rows = [
        {"prompt": f"{text} verdict :", "completion": "good_one bright" if verdict == "good" else "bad_one"}
        for text, verdict in reviews(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_a_decoder_with_a_head_classifies(tmp_path, decoder, reviews, write_csv, name):
    file = write_csv("r.csv", ["text", "label"], reviews(160))
    asked = Asked(model=str(decoder(name)), train=str(file), density=0.1, batch_size=8, epochs=6, lr=0.01)
    tuned = tune(asked, tmp_path / "out", track=False).tuned
    assert (tuned.kind, tuned.objective, tuned.training.head) == ("text", "classification", ["score"])
    assert tuned.scores["fish"]["accuracy"] > tuned.scores["head"]["accuracy"]
    model = load_tuned(tmp_path / "out")
    assert model.config.pad_token_id == tuned.text.pad
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, tuned.text.pad, tuned.text.pad]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():  # a padded row is judged as it is alone
        both, alone = model(ids, attention_mask=mask).logits[1], model(ids[1:, :2]).logits[0]
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


def test_a_language_model_learns_the_completions(tmp_path, decoder, reviews, name):
    file = write(tmp_path / "d.jsonl", reviews)
    asked = Asked(model=str(decoder(name)), train=str(file), density=0.05, batch_size=8, epochs=4, lr=0.02)
    tuned = tune(asked, tmp_path / "out", track=False).tuned
    assert (tuned.kind, tuned.objective, tuned.metric) == ("causal", "completion", "token_accuracy")
    assert tuned.training.head == [] and set(tuned.scores) == {"base", "fish"}
    assert tuned.scores["fish"]["token_accuracy"] > 0.3 + tuned.scores["base"]["token_accuracy"]
    assert tuned.scores["fish"]["perplexity"] < tuned.scores["base"]["perplexity"]
    model = load_tuned(tmp_path / "out")
    delta = Delta.load(tmp_path / "out" / "delta.safetensors")
    assert delta.mask.nnz == tuned.delta.values == int(0.05 * tuned.delta.parameters)
    if name == "gpt2":  # its output layer is its embedding, and counts once
        assert model.lm_head.weight is model.transformer.wte.weight
        assert "lm_head.weight" not in delta.mask.index
    generated = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False, pad_token_id=1)
    assert generated.shape[1] <= 5


def test_the_loss_is_of_the_completion_only(tmp_path, decoder, reviews, name):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        write(tmp_path / "data" / f"{split}.jsonl", reviews, 12)
    data = DataParams(source=str(tmp_path / "data"), text=["prompt"], label="completion")
    model = ModelParams(source=str(decoder(name)), max_length=10)
    out = tmp_path / "fetched"
    out.mkdir()
    fetch("d", kind="causal", data=data, model=model, out=out, metric="token_accuracy")
    task = Task.load(out, model, "token_accuracy")
    batch = task.batches("train", 6)[0]
    network = task.model(0)
    with torch.no_grad():
        losses = example_losses(network, batch)
        for row in range(6):  # one example at a time, in float64, without padding
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            asked = batch["labels"][row][: len(ids)]
            text = tokens_of(decoder(name), ids)
            assert text.split()[-1] == "</s>" and asked[-1] == 1
            assert tokens_of(decoder(name), asked[asked != IGNORED]).split()[0] in ("good_one", "bad_one")
            logits = network.double()(ids[None]).logits[0].log_softmax(dim=1)
            expected = torch.stack([-logits[t - 1, ids[t]] for t in range(len(ids)) if asked[t] != IGNORED]).mean()
            network.float()
            assert float(losses[row]) == pytest.approx(float(expected), rel=1e-4)
    scores = task.evaluate(network, "validation", 5)
    each = [example_losses(network, batch).detach() for batch in task.batches("validation", 4)]
    assert scores["loss"] == pytest.approx(float(torch.cat(each).mean()), rel=1e-5)


def tokens_of(folder, ids):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).decode(ids)


def test_a_model_that_sees_ahead_is_refused(tmp_path, bert, decoder, reviews, name):
    write(tmp_path / "d.jsonl", reviews, 20)
    with pytest.raises(ModelError, match="--model: '.*bert' sees the tokens that it is to predict, as an encoder"):
        tune(Asked(model=str(bert), train="d.jsonl", density=0.2), tmp_path / "out", track=False)
    assert not (tmp_path / ".out.tune").exists()
    with pytest.raises(ModelError, match="of type '.*', which is not for classifying images"):
        load_model(ModelSource(str(decoder(name))), kind="image", outputs=2, seed=0, classes=["a", "b"])


def test_long_prompts_lose_their_start(decoder, name):
    import pyarrow as pa

    from pipeline.tasks.text import Tokenizer

    tokenizer = Tokenizer(ModelParams(source=str(decoder(name)), max_length=8))
    long = "the a film story day house road song walk meal"
    made = tokenizer.completions(
        pa.array([long, "the a", ""]), pa.array(["warm sweet", " ".join(["calm"] * 20), "warm"])
    )
    rows, starts = made["input_ids"].to_pylist(), made["start"].to_pylist()
    assert all(len(row) <= 8 for row in rows)
    first = tokens_of(decoder(name), rows[0])
    assert first == ("<s> road" if name == "llama" else "house road") + " song walk meal warm sweet </s>"
    assert 1 <= starts[1] < 8 and starts[2] == 1
