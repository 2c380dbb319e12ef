"""The models on which fisher_diagonal must agree with its oracle: `case` and `network`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Case:
    """A model in fp32, its batches, and the routes its parameters must not take."""

    model: nn.Module
    batches: list[Any]
    fast: bool  # every parameter is scored batch-wise: no example is run alone, except one for the plan


class Net(nn.Module):
    """Modules by name, and a forward given as a function of the net and its input."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def floats(*shape: int, batches: tuple[int, ...] = (5, 4), classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(b, *shape), torch.randint(classes, (b,))) for b in batches]


def ids(positions: int, vocabulary: int = 11, batches: tuple[int, ...] = (5, 4)) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(vocabulary, (b, positions)), torch.randint(3, (b,))) for b in batches]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def pooled(x: Tensor) -> Tensor:
    return x.flatten(2).mean(-1)


def convolution(layer: nn.Module, *shape: int, head: int) -> Case:
    net = Net(lambda s, x: s.fc(pooled(torch.tanh(s.layer(x)))), layer=layer, fc=nn.Linear(head, 3))
    return Case(net, floats(*shape), True)


def after(layer: nn.Module, *shape: int, width: int, fast: bool = True) -> Case:
    """The layer between a first Linear and a head, on [B, *shape]."""
    first = nn.Linear(shape[-1], shape[-1])
    net = Net(
        lambda s, x: s.fc(torch.tanh(s.layer(s.first(x))).flatten(1)),
        first=first,
        layer=layer,
        fc=nn.Linear(width, 3),
    )
    return Case(net, floats(*shape), fast)


def trained_norm(norm: Any) -> Any:
    """Away from ones, zeros and unit statistics, so that no factor can be forgotten unseen."""
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if getattr(norm, "running_mean", None) is not None:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Experts(nn.Module):
    """Each token goes to one of two experts, whose inputs have neither the batch's shape nor its order."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        weight = self.gate(flat).softmax(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            chosen = weight.argmax(-1) == i
            out[chosen] = expert(flat[chosen]) * weight[chosen, i : i + 1]
        return out.view_as(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(x))).mean(1))


def tokens(embedding: nn.Module, fast: bool = True) -> Case:
    net = Net(lambda s, x: s.fc(torch.tanh(s.embed(x)).mean(1)), embed=embedding, fc=nn.Linear(4, 3))
    return Case(net, ids(6), fast)


def positions() -> Case:
    def forward(s: Net, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)[None]
        return s.fc(torch.tanh(s.embed(x) + s.place(place)).mean(1))

    return Case(
        Net(forward, embed=nn.Embedding(11, 4), place=nn.Embedding(8, 4), fc=nn.Linear(4, 3)), ids(6), True
    )


def bare() -> Case:
    def forward(s: Net, x: Tensor) -> Tensor:
        x = torch.cat([s.token.expand(len(x), -1, -1), s.fc1(x)], 1) + s.place
        return s.head(torch.tanh(s.scale * x + s.shift)[:, 0] + x.mean(1))

    net = Net(
        forward, token=parameter(1, 1, 4), place=parameter(1, 7, 4), fc1=nn.Linear(4, 4), scale=parameter(4),
        shift=parameter(7, 1), head=nn.Linear(4, 3),
    )  # fmt: skip
    return Case(net, floats(6, 4), True)


def odd_parameter() -> Case:
    net = Net(lambda s, x: s.fc(torch.tanh(x @ s.w.exp()) * s.w.sum()), w=parameter(4, 4), fc=nn.Linear(4, 3))
    return Case(net, floats(4), False)


def twice() -> Case:
    net = Net(lambda s, x: s.fc(torch.tanh(s.a(torch.tanh(s.a(x))))), a=nn.Linear(4, 4), fc=nn.Linear(4, 3))
    return Case(net, floats(4), False)


def functional_too() -> Case:
    net = Net(lambda s, x: s.fc(s.a(x) + F.linear(x.cos(), s.a.weight)), a=nn.Linear(4, 4), fc=nn.Linear(4, 3))
    return Case(net, floats(4), False)


def in_place() -> Case:
    layers = [nn.Conv2d(2, 4, 3, bias=False), trained_norm(nn.BatchNorm2d(4)), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)]
    return Case(nn.Sequential(*layers), floats(2, 6, 6), True)


def residual_in_place() -> Case:
    def forward(s: Net, x: Tensor) -> Tensor:
        h = s.a(x)
        y = s.b(torch.tanh(h))
        y += h
        return s.fc(F.relu_(y))

    return Case(Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), fc=nn.Linear(4, 3)), floats(4), True)


def no_grad_inside() -> Case:
    def forward(s: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = s.a(x)
        return s.fc(x) + s.unused_scale.detach().sum()

    net = Net(forward, a=nn.Linear(4, 4), fc=nn.Linear(4, 3), never=nn.Linear(2, 2), unused_scale=parameter(2))
    return Case(net, floats(4), True)


def frozen() -> Case:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    net[0].weight.requires_grad_(False)
    net[1].requires_grad_(False)
    return Case(net, floats(4), True)


def checkpointed(reentrant: bool) -> Case:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.fc(checkpoint(s.block, s.first(x), use_reentrant=reentrant))

    block = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    return Case(Net(forward, first=nn.Linear(4, 4), block=block, fc=nn.Linear(4, 3)), floats(4), not reentrant)


def attention(batch_first: bool) -> Case:
    def forward(s: Net, x: Tensor) -> Tensor:
        x = s.first(x) if batch_first else s.first(x).transpose(0, 1)
        x = s.attend(x, x, x, need_weights=False)[0]
        return s.fc(x.mean(1 if batch_first else 0))

    attend = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    # As many positions as examples: only a run with one example tells the dimensions apart.
    return Case(Net(forward, first=nn.Linear(4, 4), attend=attend, fc=nn.Linear(4, 3)), floats(5, 4), False)


def time_first() -> Case:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.fc(s.norm(torch.tanh(s.a(x.transpose(0, 1)))).mean(0))

    return Case(
        Net(forward, a=nn.Linear(4, 4), norm=trained_norm(nn.LayerNorm(4)), fc=nn.Linear(4, 3)), floats(5, 4), True
    )


def windows() -> Case:
    """Windows folded into the batch dimension, as Swin does."""

    def forward(s: Net, x: Tensor) -> Tensor:
        y = torch.tanh(s.a(x.reshape(-1, 2, 4)))
        return s.fc(y.reshape(len(x), 6, 4).mean(1))

    return Case(Net(forward, a=nn.Linear(4, 4), fc=nn.Linear(4, 3)), floats(6, 4), True)


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = parameter(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def position_major(layer: nn.Module) -> Case:
    """All examples' first positions, then all second ones: by shape alone this looks like windows."""

    def forward(s: Net, x: Tensor) -> Tensor:
        y = torch.tanh(s.layer(x.transpose(0, 1).reshape(-1, 4)))
        return s.fc(y.view(6, len(x), 4).transpose(0, 1).mean(1))

    return Case(Net(forward, layer=layer, fc=nn.Linear(4, 3)), floats(6, 4), False)


def recurrent() -> Case:
    net = Net(lambda s, x: s.fc(s.rnn(x)[0][:, -1]), rnn=nn.GRU(4, 5, batch_first=True), fc=nn.Linear(5, 3))
    return Case(net, floats(4, 4), False)


def coupled() -> Case:
    """Statistics of the batch itself: alone, an example has another loss."""
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    layers = [nn.Conv1d(2, 4, 1, bias=False), norm, nn.Flatten(), nn.Linear(16, 3)]
    return Case(nn.Sequential(*layers), floats(2, 4), False)


def experts() -> Case:
    net = Net(
        lambda s, x: s.fc(s.moe(s.first(x)).mean(1)), first=nn.Linear(4, 4), moe=Experts(), fc=nn.Linear(4, 3)
    )
    return Case(net, floats(3, 4), False)


def parametrized() -> Case:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    return Case(nn.Sequential(nn.Linear(4, 4), layer, nn.Tanh(), nn.Linear(4, 3)), floats(4), False)


def user_hook() -> Case:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    net[0].register_forward_hook(lambda module, args, output: output * 2 + args[0])
    return Case(net, floats(4), False)


def padded_text() -> Case:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            mask = attention_mask[..., None].float()
            return self.fc((torch.tanh(self.embed(input_ids)) * mask).sum(1) / mask.sum(1))

    batches = []
    for size, length in ((5, 6), (5, 4), (2, 7)):
        ids = torch.randint(1, 11, (size, length))
        mask = torch.arange(length)[None] < torch.randint(1, length + 1, (size, 1))
        labels = torch.randint(3, (size,))
        batches.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels})
    return Case(Model(), batches, True)


def regression(outputs: int) -> Case:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))
    return Case(net, [(torch.randn(b, 4), torch.randn(b, outputs)) for b in (5, 4)], True)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: Case(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), floats(4), True),
    "linear-two-classes": lambda: Case(
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), floats(4, classes=2), True
    ),
    "linear-many-positions": lambda: after(nn.Linear(80, 90), 9, 80, width=810),
    "linear-few-positions": lambda: after(nn.Linear(80, 90, bias=False), 3, 80, width=270),
    "linear-more-dimensions": lambda: after(nn.Linear(4, 4), 2, 3, 4, width=24),
    "conv1d": lambda: convolution(nn.Conv1d(3, 4, 3, padding=1), 3, 9, head=4),
    "conv1d-dilated": lambda: convolution(nn.Conv1d(3, 4, 3, dilation=2, stride=2, bias=False), 3, 11, head=4),
    "conv2d": lambda: convolution(nn.Conv2d(3, 4, 3, padding=1), 3, 6, 6, head=4),
    "conv2d-strided": lambda: convolution(nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), 3, 7, 6, head=4),
    "conv2d-dilated-same": lambda: convolution(
        nn.Conv2d(3, 4, (2, 3), dilation=2, padding="same"), 3, 6, 7, head=4
    ),
    "conv2d-grouped": lambda: convolution(nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2), 4, 6, 6, head=6),
    "conv2d-depthwise": lambda: convolution(nn.Conv2d(4, 4, 3, groups=4, padding=1), 4, 6, 6, head=4),
    "conv2d-reflect": lambda: convolution(
        nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), 3, 6, 6, head=4
    ),
    "conv2d-large": lambda: convolution(nn.Conv2d(24, 32, 3, padding=1), 24, 4, 4, head=32),
    "conv3d": lambda: convolution(nn.Conv3d(2, 4, 2, padding=1), 2, 3, 4, 3, head=4),
    "conv-transposed": lambda: convolution(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), 4, 4, 4, head=6
    ),
    "embedding": lambda: tokens(nn.Embedding(11, 4)),
    "embedding-padding": lambda: tokens(nn.Embedding(11, 4, padding_idx=0)),
    "embedding-frequency": lambda: tokens(nn.Embedding(11, 4, scale_grad_by_freq=True), False),
    "embedding-sparse": lambda: tokens(nn.Embedding(11, 4, sparse=True)),
    "positions-broadcast": positions,
    "layer-norm": lambda: after(trained_norm(nn.LayerNorm(6)), 5, 6, width=30),
    "layer-norm-two-dimensions": lambda: after(trained_norm(nn.LayerNorm((5, 6))), 5, 6, width=30),
    "rms-norm": lambda: after(nn.RMSNorm(6), 5, 6, width=30),
    "rms-norm-custom": lambda: after(RootMeanSquare(6), 5, 6, width=30),
    "group-norm": lambda: after(trained_norm(nn.GroupNorm(2, 4)), 4, 6, width=24),
    "batch-norm-1d": lambda: after(trained_norm(nn.BatchNorm1d(6)), 6, width=6),
    "batch-norm-2d": lambda: after(trained_norm(nn.BatchNorm2d(4)), 4, 3, 6, width=72),
    "instance-norm": lambda: after(trained_norm(nn.InstanceNorm1d(4, affine=True)), 4, 6, width=24, fast=False),
    "prelu": lambda: after(nn.PReLU(4), 4, 6, width=24, fast=False),
    "bilinear": lambda: Case(
        Net(lambda s, x: s.fc(s.a(x, x.cos())), a=nn.Bilinear(4, 4, 5), fc=nn.Linear(5, 3)), floats(4), False
    ),
    "bare-parameters": bare,
    "odd-parameter": odd_parameter,
    "used-twice": twice,
    "used-functionally-too": functional_too,
    "tied": lambda: Case(Tied(), [(x, x[:, 0]) for x, _ in ids(6)], False),
    "in-place": in_place,
    "residual-in-place": residual_in_place,
    "no-grad-and-unused": no_grad_inside,
    "frozen": frozen,
    "checkpoint": lambda: checkpointed(False),
    "checkpoint-reentrant": lambda: checkpointed(True),
    "attention": lambda: attention(True),
    "attention-time-first": lambda: attention(False),
    "time-first": time_first,
    "windows": windows,
    "position-major-linear": lambda: position_major(nn.Linear(4, 4)),
    "position-major-bias": lambda: position_major(Shift()),
    "position-major-replay": lambda: position_major(nn.Sequential(Shift(), nn.PReLU(4))),
    "recurrent": recurrent,
    "coupled": coupled,
    "experts": experts,
    "parametrized": parametrized,
    "user-hook": user_hook,
    "padded-text": padded_text,
    "regression": lambda: regression(2),
    "regression-one": lambda: regression(1),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


@dataclass
class Network(Case):
    """An architecture built from its config, tiny.

    ConvNeXt's own LayerNorms, ALBERT's shared layers and torchvision's attention have no rule.
    """

    label_only: bool = False


def text_batches(vocabulary: int = 50) -> list[dict[str, Tensor]]:
    """Padded sequences, ragged last batch."""
    batches = []
    for size, length in ((4, 9), (2, 6)):
        mask = torch.arange(length)[None] < torch.randint(2, length + 1, (size, 1))
        ids = torch.randint(2, vocabulary, (size, length)) * mask + ~mask
        batches.append({"input_ids": ids, "attention_mask": mask.long(), "labels": torch.randint(3, (size,))})
    return batches


def transformer(name: str, fast: bool = True, **config: Any) -> Network:
    import transformers

    made = getattr(transformers, name + "Config")(**config, num_labels=3)
    head = "ForImageClassification" if "image_size" in config else "ForSequenceClassification"
    model = getattr(transformers, name + head)(made)
    for p in model.parameters():  # away from zeros and ones, so that no factor can be forgotten unseen
        p.data.add_(0.05 * torch.randn_like(p))
    if "image_size" in config:
        images = [{"pixel_values": torch.randn(b, 3, 16, 16), "labels": torch.randint(3, (b,))} for b in (4, 2)]
        return Network(model, images, fast)
    return Network(model, text_batches(), fast)


def vision(name: str, size: int, fast: bool = True) -> Network:
    import torchvision

    model = getattr(torchvision.models, name)(weights=None, num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            trained_norm(module)
            nn.init.uniform_(module.weight, 0.5, 1)
    return Network(model, floats(3, size, size, batches=(2, 1)), fast, True)


def vit_torchvision() -> Network:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero, which hides everything below
    return Network(model, floats(3, 16, 16, batches=(4, 2)), False)


def convnext_torchvision() -> Network:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    model = ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], layer_scale=0.5, num_classes=3)
    return Network(model, floats(3, 32, 32, batches=(3, 2)), False)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
NETWORKS: dict[str, Callable[[], Network]] = {
    "bert": lambda: transformer("Bert", **SMALL, vocab_size=50, max_position_embeddings=16),
    "roberta": lambda: transformer("Roberta", **SMALL, vocab_size=50, max_position_embeddings=16, pad_token_id=1),
    "distilbert": lambda: transformer("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=50),
    "gpt2": lambda: transformer(
        "GPT2", n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16, pad_token_id=1
    ),
    "vit": lambda: transformer("ViT", **IMAGE),
    "convnext": lambda: transformer(
        "ConvNext", False, hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=16
    ),
    "albert": lambda: transformer(
        "Albert", False, **SMALL, vocab_size=50, embedding_size=8, max_position_embeddings=16
    ),
    "deberta": lambda: transformer(
        "DebertaV2",
        False,
        **SMALL,
        vocab_size=50,
        max_position_embeddings=16,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=4,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
    ),
    "llama": lambda: transformer(
        "Llama", **SMALL, num_key_value_heads=1, vocab_size=50, max_position_embeddings=16, pad_token_id=1
    ),
    "resnet18": lambda: vision("resnet18", 32),
    "mobilenet": lambda: vision("mobilenet_v3_small", 32),
    "convnext-torchvision": convnext_torchvision,
    "vit-torchvision": vit_torchvision,
}


@pytest.fixture(params=NETWORKS, ids=str)
def network(request: pytest.FixtureRequest) -> Network:
    torch.manual_seed(0)
    return NETWORKS[request.param]()
