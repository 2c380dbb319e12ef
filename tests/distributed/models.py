"""Networks of several kinds: local SGD by real workers, and what it must equal.

python models.py RANK SIZE FOLDER
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.distributed.local_sgd import LocalSGD
from pipeline.losses import example_losses
from pipeline.masks import select
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex
from pipeline.tasks.resnet import ResNet
from pipeline.training.masked import MaskedParameters

EVERY, STEPS = 2, 5
NAMES = ("bert", "resnet", "gpt2", "lstm", "vit", "tied", "plain-norm", "bf16")


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    if name == "resnet":
        return ResNet(3, 2, (4, 8), (1, 1)).to(dtype).train()
    if name in OWN:
        return OWN[name]().to(torch.bfloat16 if name == "bf16" and dtype == torch.float32 else dtype).train()
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

    if name == "bert":
        config = BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return BertForSequenceClassification(config).to(dtype).train()
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, pad_token_id=0, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = Tied(GPT2ForSequenceClassification(config))
    return model.to(dtype).train()


class Tied(nn.Module):
    """GPT-2 whose class scores add those of an output layer that is the input embedding."""

    def __init__(self, gpt: nn.Module) -> None:
        super().__init__()
        self.gpt = gpt
        self.tied = nn.Linear(16, 40, bias=False)
        self.tied.weight = gpt.transformer.wte.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = self.gpt(input_ids=input_ids, attention_mask=attention_mask).logits
        hidden = self.gpt.transformer(input_ids=input_ids).last_hidden_state[:, -1]
        return logits + self.tied(hidden)[:, :2]


class Lstm(nn.Module):
    """A bidirectional LSTM that classifies token sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 12)
        self.lstm = nn.LSTM(12, 10, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(20, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.lstm(self.tokens(input_ids))[0]
        return self.out((states * attention_mask[..., None]).sum(1) / 7)


class Vit(nn.Module):
    """A vision transformer: patches, a class token and positions that are bare parameters, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, 5, 16) * 0.1)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        together = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.out(self.layers(together)[:, 0])


class TiedBags(nn.Module):
    """An autoencoder of bags of tokens whose output layer is its input embedding; two of its words are classes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 16)
        self.middle = nn.Linear(16, 16)
        self.words = nn.Linear(16, 40)
        self.words.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        bag = (self.tokens(input_ids) * attention_mask[..., None]).mean(1)
        return self.words(torch.tanh(self.middle(bag)))[:, :2]


class PlainNorm(nn.Module):
    """BatchNorm without scale and shift, and one that averages its statistics over all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.inner = nn.Linear(6, 8)
        self.steady = nn.BatchNorm1d(8, affine=False, momentum=None)
        self.out = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.out(self.steady(self.inner(features)))


OWN = {"lstm": Lstm, "vit": Vit, "tied": TiedBags, "plain-norm": PlainNorm, "bf16": Vit}
IMAGES = ("resnet", "vit", "plain-norm", "bf16")


def batch(name: str, rank: int, step: int, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(1000 * rank + step)
    labels = torch.randint(0, 2, (6,), generator=draw)
    if name in IMAGES:
        return (torch.randn(6, 3, 8, 8, generator=draw) * (1 + rank) + rank).to(dtype), labels
    ids = torch.randint(1, 40, (6, 7), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def mask_of(model: nn.Module) -> Mask:
    return select.random(ParameterIndex.of(model), 0.3, 1, [])


def step_of(name: str, model: nn.Module, masked, optimizer, rank: int, step: int) -> None:
    dtype = next(model.parameters()).dtype
    example_losses(model, batch(name, rank, step, dtype)).mean().backward()
    optimizer.step()
    masked.write_()
    optimizer.zero_grad()


def work(name: str, rank: int, *, plain: bool = False, every: int = EVERY, sgd: bool = False) -> nn.Module:
    """Train one worker's copy; ``plain`` leaves LocalSGD out, ``sgd`` is plain SGD in float64."""
    model = build(name, torch.float64 if sgd else torch.float32)
    with MaskedParameters(model, mask_of(model)) as masked:
        kind = torch.optim.SGD if sgd else torch.optim.AdamW
        optimizer = kind([masked.values], lr=1e-2)
        sync = None if plain else LocalSGD(masked, optimizer, every=every, debug=True)
        for step in range(STEPS):
            step_of(name, model, masked, optimizer, rank, step)
            if sync is not None:
                sync.step()
        if sync is not None:
            sync.finish()
    return model


def main() -> None:
    import torch.distributed as dist
    from safetensors.torch import save_file

    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    for name in NAMES:
        for how, options in (("local", {}), ("averaging", {"every": 1, "sgd": True})):
            model = work(name, rank, **options)
            state = dict(model.named_parameters()) | dict(model.named_buffers())
            save_file({n: t.detach().clone() for n, t in state.items()}, folder / f"{name}-{how}-{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
