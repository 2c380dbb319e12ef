"""The models that are measured, built from their configs with random weights, and a batch for each."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _bert(classes: int, tokenised: tuple[int, int], **shape: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(num_labels=classes, **shape)
    ids = torch.randint(config.vocab_size, tokenised)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return BertForSequenceClassification(config), batch | {"labels": torch.randint(classes, tokenised[:1])}


MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def minilm(classes: int = 2) -> tuple[nn.Module, Any]:
    """MiniLM-L6's shape: 6 layers of 384, 12 heads, 22.7 M parameters; 16 sequences of 128 tokens."""
    return _bert(classes, (16, 128), **MINILM)


def bert_large(classes: int = 2) -> tuple[nn.Module, Any]:
    """BERT-large: 24 layers of 1,024, 16 heads, 335 M parameters; 16 sequences of 128 tokens."""
    return _bert(classes, (16, 128), **LARGE)


def _resnet(name: str, classes: int, size: int) -> tuple[nn.Module, Any]:
    import torchvision

    model = getattr(torchvision.models, name)(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return model, (torch.randn(size, 3, 32, 32), torch.randint(classes, (size,)))


def resnet18(classes: int = 10) -> tuple[nn.Module, Any]:
    """Torchvision's ResNet-18 with a 3x3 stem of stride 1, 11.2 M parameters; 32 images of 32x32."""
    return _resnet("resnet18", classes, 32)


def resnet34(classes: int = 10) -> tuple[nn.Module, Any]:
    """The same with 34 layers, 21.3 M parameters: this project's own where torchvision is missing; 128 images."""
    try:
        return _resnet("resnet34", classes, 128)
    except ModuleNotFoundError:
        from pipeline.tasks.resnet import build

        model = build("resnet34", 3, classes, 0)
        return model, (torch.randn(128, 3, 32, 32), torch.randint(classes, (128,)))


MODELS: Mapping[str, Callable[..., tuple[nn.Module, Any]]] = {
    "minilm": minilm,
    "bert-large": bert_large,
    "resnet18": resnet18,
    "resnet34": resnet34,
}
