"""Base models: only the head depends on the seed; what cannot be loaded is one line; nothing is unpickled."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError
from pipeline.tasks.models import load_model, load_tokenizer
from pipeline.tasks.saved import load_model as load_saved
from pipeline.tasks.saved import save_model


def load(made, source, **options):
    return load_model(
        made.Model(str(source)), **{"kind": "text", "outputs": 3, "seed": 0, "classes": list("abc")} | options
    )


def state(model):
    return dict(model.named_parameters())


def test_only_the_head_depends_on_the_seed(made, bert):
    one, again, other = load(made, bert), load(made, bert), load(made, bert, seed=1)
    checkpoint = load_file(bert / "model.safetensors")
    for name, value in state(one).items():
        assert torch.equal(value, state(again)[name])
        assert torch.equal(value, state(other)[name]) == (name != "classifier.weight")
        if not name.startswith("classifier"):
            assert torch.equal(value, checkpoint[name.removeprefix("bert.")])
    assert one.classifier.weight.shape == (3, 16) and one.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert not one.training and one.dtype == torch.float32


def test_loading_leaves_the_generator_alone_and_prints_nothing(made, bert, capfd):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load(made, bert, seed=3)
    load(made, "builtin:resnet-digits", kind="image")
    assert torch.equal(torch.get_rng_state(), before)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_half_precision_weights_become_fp32(made, bert, tmp_path):
    shutil.copytree(bert, tmp_path / "half")
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(bert / "model.safetensors").items()}
    save_file(tensors, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    assert {p.dtype for p in load(made, tmp_path / "half").parameters()} == {torch.float32}


def test_a_head_for_other_classes_is_drawn_anew(made, bert, tmp_path):
    load(made, bert).save_pretrained(tmp_path / "three")
    kept = load(made, tmp_path / "three", seed=7)
    assert torch.equal(kept.classifier.weight, load(made, bert).classifier.weight)
    two = load(made, tmp_path / "three", outputs=2, classes=["a", "b"])
    assert two.classifier.weight.shape == (2, 16)
    assert torch.equal(two.bert.pooler.dense.weight, kept.bert.pooler.dense.weight)


def broken(bert, folder, name):
    shutil.copytree(bert, folder)
    if name == "config gone":
        (folder / "config.json").unlink()
    elif name == "config torn":
        (folder / "config.json").write_text("{")
    elif name == "weights gone":
        (folder / "model.safetensors").unlink()
    elif name == "weights torn":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif name == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif name == "foreign":
        save_file({"other.weight": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    elif name == "misshapen":
        tensors = load_file(folder / "model.safetensors")
        tensors["embeddings.word_embeddings.weight"] = torch.zeros(5, 16)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif name == "unknown kind":
        (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    return folder


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("config gone", "holds no config.json; expected a folder in the hub's layout"),
        ("config torn", "config.json is no JSON"),
        ("weights gone", "holds no model.safetensors"),
        ("weights torn", "cannot load a model"),
        ("pickle", "pytorch_model.bin is a pickle, which can run any code and is never loaded"),
        ("foreign", "lack"),
        ("misshapen", "word_embeddings.weight"),
        ("unknown kind", "cannot load a model"),
    ],
)
def test_a_broken_folder_is_one_line(made, bert, tmp_path, name, why):
    folder = broken(bert, tmp_path / "model", name)
    with pytest.raises(ModelError) as caught:
        load(made, folder)
    assert why in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_models_that_are_not_there_are_one_line(made, tmp_path):
    for source, why in [
        (str(tmp_path / "gone"), "no folder"),
        ("owner/no-such-model", "cannot load 'owner/no-such-model' from the hub"),
        ("builtin:resnet-digits", "is for images; expected a pretrained text model"),
    ]:
        with pytest.raises(ModelError, match=why) as caught:
            load(made, source)
        assert "\n" not in str(caught.value)
        with pytest.raises(ModelError):
            load_tokenizer(made.Model(source))
    with pytest.raises(ModelError, match="no model 'builtin:resnet99'; expected one of builtin:resnet-digits, "):
        load(made, "builtin:resnet99", kind="image")


def test_a_saved_model_loads_again(made, bert, tmp_path):
    model = load(made, bert, seed=4)
    save_model(model, str(bert), tmp_path / "saved")
    again = load_saved(str(tmp_path / "saved"), info={})
    assert all(torch.equal(value, state(again)[name]) for name, value in state(model).items())
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    base = load_saved(str(bert), info={"kind": "text", "outputs": 3, "seed": 4})
    assert all(torch.equal(value, state(base)[name]) for name, value in state(model).items())
    with pytest.raises(ModelError, match="cannot tell its kind and number of outputs"):
        load_saved(str(bert), info={})


def test_a_saved_builtin_holds_its_state(made, tmp_path):
    info = {"kind": "image", "outputs": 10, "seed": 2, "channels": 1}
    model = load_saved("builtin:resnet-digits", info=info)
    save_model(model, "builtin:resnet-digits", tmp_path / "saved")
    held = load_file(tmp_path / "saved" / "model.safetensors")
    assert held.keys() == model.state_dict().keys()
    assert all(torch.equal(held[name], value) for name, value in model.state_dict().items())


def test_an_image_model_of_a_folder_takes_pixels(made, tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes = dict(image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1)
    ViTModel(ViTConfig(**sizes, num_attention_heads=2, intermediate_size=16)).save_pretrained(tmp_path / "vit")
    model = load(made, tmp_path / "vit", kind="image")
    assert model(torch.zeros(2, 1, 8, 8)).logits.shape == (2, 3)
