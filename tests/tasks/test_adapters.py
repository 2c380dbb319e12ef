"""LoRA and SHiRA: PEFT's own, within the budget, in our loop; what is saved is what PEFT reads."""

import pytest
import torch
from peft import ShiraConfig, get_peft_model
from torch import nn

from pipeline.errors import ParamsError
from pipeline.losses import example_losses
from pipeline.parameters import ParameterIndex
from pipeline.tasks.adapters import attach, load_adapter, lora, save_adapter, shira
from pipeline.tasks.choosing import parameters_of, trained_model
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import Recipe

HEAD = ["classifier"]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=2, pad_token_id=0
    )
    return GPT2ForSequenceClassification(config).eval()


def train(task, model, mask, epochs=1, lr=1e-2):
    with MaskedParameters(model, mask) as masked:
        fit(model, lambda e: task.batches("train", 8, seed=0, epoch=e), masked=masked, recipe=Recipe(epochs, lr))


def test_lora_has_the_largest_rank_that_fits(make, folder):
    model = make(folder).model(0)
    index = ParameterIndex.of(model)
    each = sum(
        sum(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "classifier"
    )
    head = sum(index.numel(n) for n in index.within(HEAD))
    for rank in (1, 3):
        density = (head + rank * each + each // 2) / index.total
        _, mask = lora(make_again(model), density, HEAD, 0)
        assert mask.nnz == head + rank * each <= density * index.total
        assert mask.info["adapter"]["rank"] == rank and parameters_of(mask) == index.total
    with pytest.raises(ParamsError, match="holds no LoRA or SHiRA of rank 1"):
        lora(model, (head + each // 2) / index.total, HEAD, 0)


def make_again(model):
    import copy

    return copy.deepcopy(model)


def test_a_trained_adapter_leaves_the_base_alone_and_is_read_by_peft(make, folder, tmp_path):
    task = make(folder)
    batch = task.batches("validation", 8)[0]
    base = task.model(0)
    before = base(**batch).logits
    model, mask = lora(task.model(0), 0.3, HEAD, seed=0)
    torch.testing.assert_close(model(**batch).logits, before)  # B is zero: nothing has changed yet
    train(task, model, mask)
    for name, p in base.named_parameters():
        if not name.startswith("classifier"):
            module, _, leaf = name.rpartition(".")
            own = model.base_model.model.get_submodule(module)
            assert torch.equal(p, getattr(getattr(own, "base_layer", own), leaf))
    model.eval()
    after = model(**batch).logits
    assert not torch.allclose(after, before)
    made = save_adapter(model, tmp_path / "adapter", "some/model")
    files = sorted(p.name for p in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert made["delta_bytes"] == sum(p.stat().st_size for p in (tmp_path / "adapter").iterdir())
    again = load_adapter(task.model(2), tmp_path / "adapter")
    assert torch.equal(again(**batch).logits, after)
    assert save_adapter(again, tmp_path / "twice", "some/model") == made
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_a_mask_makes_the_same_adapter_again(make, folder):
    task = make(folder)
    model, mask = lora(task.model(3), 0.3, HEAD, seed=3)
    state = torch.get_rng_state()
    again = trained_model(task.model(3), mask)
    assert torch.equal(torch.get_rng_state(), state)
    assert ParameterIndex.of(again) == mask.index
    for (name, one), (other, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(one, two)
    assert trained_model(model, shira(task.model(3), 0.3, HEAD, 3)) is model


def test_lora_takes_the_transposed_layers_of_gpt2():
    model, mask = lora(gpt2(), 0.2, ["score"], seed=0)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in mask.index if ".lora_" in name}
    assert adapted == {"c_attn", "c_proj", "c_fc"}
    assert ParameterIndex.of(attach(gpt2(), mask.info["adapter"])) == mask.index
    with pytest.raises(ParamsError, match="no linear layer"):
        shira(gpt2(), 0.2, ["score"], seed=0)


def test_a_layer_that_peft_takes_for_the_head_stays_as_it_is(tmp_path):
    """DistilBERT's `pre_classifier` ends as its `classifier` does."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    def distilbert():
        torch.manual_seed(0)
        config = DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=2)
        return DistilBertForSequenceClassification(config).eval()

    model, mask = lora(distilbert(), 0.2, HEAD, seed=0)
    assert not any("pre_classifier" in name for name in mask.index)
    assert {n for n in mask.index if "lora" not in n} == {
        f"base_model.model.classifier.modules_to_save.default.{leaf}" for leaf in ("bias", "weight")
    }
    inputs = torch.arange(12).reshape(3, 4)
    with MaskedParameters(model, mask) as masked:
        masked.values.data.add_(torch.linspace(-0.1, 0.1, mask.nnz))
        masked.write_()
    after = model(input_ids=inputs).logits
    assert not torch.allclose(after, distilbert()(input_ids=inputs).logits)
    save_adapter(model, tmp_path, "some/model")
    again = load_adapter(distilbert(), tmp_path)
    assert torch.equal(again(input_ids=inputs).logits, after)
    for name, p in again.merge_and_unload().named_parameters():
        if name.startswith("pre_classifier"):
            assert torch.equal(p, dict(distilbert().named_parameters())[name])


@pytest.mark.filterwarnings("ignore")  # of PEFT's: names on their way out, sparse tensors left unchecked
def test_shira_trains_what_peft_trains(make, folder):
    task = make(folder)
    mask = shira(task.model(0), 0.3, HEAD, seed=5)
    peers = sorted({n.rpartition(".")[0] for n in mask.index if mask.count(n)} - {"classifier"})
    config = ShiraConfig(r=mask.info["rank"], random_seed=5, target_modules=peers, modules_to_save=HEAD)
    peer = get_peft_model(task.model(0), config).eval()
    ours = task.model(0)
    batches = list(task.batches("train", 8, seed=0))[:5]
    trained = [p for p in peer.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == mask.nnz
    theirs = torch.optim.Adam(trained, lr=1e-2)
    with MaskedParameters(ours, mask) as masked:
        own = torch.optim.Adam([masked.values], lr=1e-2)
        for batch in batches:
            for model, optimizer in ((peer, theirs), (ours, own)):
                optimizer.zero_grad()
                example_losses(model, batch).mean().backward()
                optimizer.step()
            masked.write_()
    merged = dict(peer.merge_and_unload().named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, merged[name], rtol=1e-4, atol=1e-5)
