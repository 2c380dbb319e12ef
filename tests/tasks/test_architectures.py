"""Encoders and decoders by folder: fetched, scored, masked and trained; padding never reaches a score."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.losses import outputs_of
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.tasks.base import Task
from pipeline.tasks.fetch import fetch
from pipeline.tasks.scoring import scores_for
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import Recipe

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
KINDS = {
    "Roberta": ("classifier", SIZES | {"max_position_embeddings": 40, "pad_token_id": 0, "type_vocab_size": 1}),
    "DistilBert": ("classifier", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}),
    "DebertaV2": (
        "classifier",
        SIZES
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
            "pooler_hidden_size": 16,
        },
    ),
    "Electra": ("classifier", SIZES | {"embedding_size": 8}),
    "Albert": ("classifier", SIZES | {"embedding_size": 8}),  # its layers share their weights
    "GPT2": ("score", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "Llama": ("score", SIZES | {"num_key_value_heads": 1}),
}
DECODERS = ("GPT2", "Llama")


@pytest.fixture(params=KINDS)
def opened(request, tmp_path, made):
    """A model folder built from a config, data fetched with its tokenizer, some texts blank; and its head."""
    import transformers

    name = request.param
    head, sizes = KINDS[name]
    words = [f"w{i}" for i in range(40)]
    # A decoder has neither a padding token nor special tokens around a text, as GPT-2's.
    special = ["[END]", "[UNK]"] if name in DECODERS else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: number for number, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if name in DECODERS:
        named = {"eos_token": "[END]", "unk_token": "[UNK]"}
    else:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, model_input_names=["input_ids", "attention_mask"], **named
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=len(vocabulary), **sizes)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    texts = made.sentences(60)
    texts[7] = ""
    splits = {"train": {"text": texts, "label": [i % 2 for i in range(60)]}}
    splits["validation"] = {"text": ["", *made.sentences(11, 200)], "label": [i % 2 for i in range(12)]}
    source, out = made.write(tmp_path / "data", **splits), tmp_path / "fetched"
    out.mkdir()
    model = made.Model(str(folder))
    fetch("made", kind="text", data=made.Data(source=str(source)), model=model, out=out, metric="accuracy")
    return Task.load(out, model, "accuracy"), [head]


def test_an_architecture_is_scored_masked_and_trained(opened):
    task, head = opened
    model = task.model(0)
    how = {"kind": "label", "power": "square", "examples": 40, "batch_size": 8, "seed": 0, "head": head}
    scores = scores_for("fish", task, model, warm_head=1, selection="per-layer", **how)
    mask = Mask.top_k(scores, 0.2, head)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with MaskedParameters(model, mask) as masked:
        fit(model, lambda e: task.batches("train", 8, seed=0, epoch=e), masked=masked, recipe=Recipe(2, 1e-2))
    moved = {name: p.detach() != before[name] for name, p in model.named_parameters()}
    chosen = mask.to_bool()
    assert all(not bool((moved[name] & ~chosen[name]).any()) for name in mask.index)
    assert sum(int(m.sum()) for m in moved.values()) > 0.3 * mask.nnz
    assert ParameterIndex.of(model) == mask.index
    assert 0 <= task.evaluate(model, "validation", 5)["accuracy"] <= 1


def test_padding_changes_no_output(opened):
    task, _ = opened
    model = task.model(0)
    with torch.no_grad():
        together = outputs_of(model, task.batches("validation", 12)[0])
        alone = torch.cat([outputs_of(model, batch) for batch in task.batches("validation", 1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
