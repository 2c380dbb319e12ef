"""Deltas of models that nothing was tuned for, in every float dtype, from modules and from sharded checkpoints."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts.application import apply, revert
from pipeline.deltas.delta import Delta
from pipeline.deltas.format import FORMAT, VERSION
from pipeline.deltas.target import same_bits
from pipeline.deltas.variants import Variants
from pipeline.files import read_header
from pipeline.fisher import fisher_diagonal
from pipeline.losses import example_losses
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.training.masked import MaskedParameters

pytestmark = pytest.mark.usefixtures("one_thread")


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM  # whose decoder is tied to the embeddings

    return BertForMaskedLM(
        BertConfig(
            vocab_size=90,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            max_position_embeddings=20,
        )  # fmt: skip
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=70, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            image_size=16,
            patch_size=4,
            num_labels=5,
        )  # fmt: skip
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            max_position_embeddings=16,
        )  # fmt: skip
    )


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=12, hidden_sizes=[12, 20], depths=[1, 1], layer_type="basic", num_labels=5)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "vit": vit,
    "resnet": resnet,
}
INFO = {"vit": {"kind": "image", "outputs": 5}}  # whose files name its tensors otherwise: it is built in memory
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@torch.no_grad()
def trained(base: nn.Module, seed: int) -> tuple[nn.Module, Mask]:
    """Steps of the size that training makes, some values not finite, buffers moved."""
    draw = torch.Generator().manual_seed(seed)
    index, model = ParameterIndex.of(base), copy.deepcopy(base)
    mask = Mask.from_bool({name: torch.rand(shape, generator=draw) < 0.2 for name, shape in index.shapes.items()})
    for name, parameter in model.named_parameters():
        at = mask.indices[name]
        change = 0.001 * torch.randn(len(at), generator=draw)
        parameter.view(-1)[at] = (parameter.view(-1)[at].float() + change).to(parameter.dtype)
        parameter.view(-1)[at[:3]] = torch.tensor([torch.inf, torch.nan, -0.0])[: len(at)].to(parameter.dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer += 0.5
    return model, mask


def batches(model: nn.Module, images: bool) -> list[dict[str, Tensor]]:
    """Three batches of noise: images with classes, or tokens that are their own targets."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for _ in range(3):
        if images:
            pixels = torch.randn(4, 3, 16, 16, generator=draw).to(next(model.parameters()).dtype)
            made.append({"pixel_values": pixels, "labels": torch.randint(5, (4,), generator=draw)})
        else:
            tokens = torch.randint(2, 60, (4, 7), generator=draw)
            made.append({"input_ids": tokens, "labels": tokens})
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_scored_masked_trained_and_taken_as_a_delta(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = MODELS[name]().to(dtype)
    data = batches(base, name in ("vit", "resnet"))
    mask = Mask.top_k(fisher_diagonal(base, data), 0.05)
    model = copy.deepcopy(base).train()
    with MaskedParameters(model, mask) as masked:
        optimizer = torch.optim.AdamW([masked.values], lr=0.01, weight_decay=0.1)
        for batch in data:
            example_losses(model, batch).mean().backward()
            optimizer.step()
            masked.write_()
            optimizer.zero_grad()
    delta = Delta.of(model, mask, base=base)
    moved = sum(int((p != q).sum()) for p, q in zip(model.parameters(), base.parameters(), strict=True))
    assert mask.nnz == int(0.05 * mask.index.total)
    assert 0.5 * mask.nnz < moved <= mask.nnz  # in bf16 some steps are less than a unit in the last place
    for against in (None, base):
        delta.save(tmp_path / "delta", base=against)
        there = copy.deepcopy(base)
        loaded = Delta.load(tmp_path / "delta")
        loaded.apply_(there)
        assert holds(there, model)
        loaded.revert_(there)
        assert holds(there, base)


def bytes_of_values(path: Path) -> int:
    sizes = read_header(path, format=FORMAT, version=VERSION)[1]
    return sum(size for name, size in sizes.items() if name.startswith(("values.", "against.")))


def holds(model: nn.Module, wanted: nn.Module) -> bool:
    state = wanted.state_dict()
    return all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_in_memory_and_from_shards(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = MODELS[name]().to(dtype)
    models = {}
    for seed in (1, 2):
        models[f"{seed}"], mask = trained(base, seed)
        delta = Delta.of(models[f"{seed}"], mask, base=base, info=INFO.get(name))
        delta.save(tmp_path / f"{seed}.a")
        delta.save(tmp_path / f"{seed}.t", base=base)
        alone, thin = (bytes_of_values(tmp_path / f"{seed}.{kind}") for kind in "at")
        assert thin < 0.9 * alone < 0.9 * sum(values.nbytes for values in delta.values.values())
    hot = Variants(copy.deepcopy(base), {seed: Delta.load(tmp_path / f"{seed}.t") for seed in models})
    for use in ("1", "2", None, "2", "1"):
        assert holds(hot.use(use), models[use] if use else base)
    again = copy.deepcopy(base)
    delta = Delta.load(tmp_path / "1.t")
    delta.apply_(again)
    assert holds(again, models["1"])
    delta.revert_(again)
    assert holds(again, base)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are not finite, from the library
        base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
        models["1"].save_pretrained(tmp_path / "wanted", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 1
    apply(tmp_path / "1.t", str(tmp_path / "base"), tmp_path / "tuned")
    revert(tmp_path / "1.t", str(tmp_path / "tuned"), tmp_path / "back", str(tmp_path / "base"))
    for made, wanted in (("tuned", "wanted"), ("back", "base")):
        for shard in shards if name not in INFO else ():
            one, two = (load_file(tmp_path / folder / shard) for folder in (made, wanted))
            assert one.keys() == two.keys() and all(same_bits(one[key], two[key]) for key in one)
    for made, wanted_model in (("tuned", models["1"]), ("back", base)):
        assert holds(type(base).from_pretrained(tmp_path / made, dtype=dtype), wanted_model)
