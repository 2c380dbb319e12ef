"""The `paper` profile's model without its weights: BERT-large from its config is scored, masked, trained 3 steps.

    python -m benchmarks.paper                     # CPU
    python -m benchmarks.paper --device cuda       # the same on a GPU

Shapes, batch, length, density, selection and recipe are the profile's; the weights and tokens are drawn. What is
measured is time and memory: the peak of the process (CPU) or of the device.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.rounds import header, publish, synchronize, table
from pipeline.fisher import fisher_diagonal
from pipeline.masks.ranking import Ranking
from pipeline.masks.selection import selected
from pipeline.params import Params
from pipeline.runtime.cpu import set_up_cpu
from pipeline.training.loop import fit
from pipeline.training.masked import MaskedParameters
from pipeline.training.recipe import Recipe

PROFILE = Path(__file__).parent.parent / "pipeline" / "profiles" / "paper.yaml"
STEPS = 3


def bert_large() -> nn.Module:
    """BERT-large cased with two outputs: 24 layers of 1,024 units, 28,996 tokens, 333.6 M parameters."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=28_996, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


def batches(count: int, size: int, length: int) -> list[dict[str, Tensor]]:
    """Batches of drawn tokens, every place filled: the dearest case."""
    generator = torch.Generator().manual_seed(1)
    shape = (size, length)
    return [
        {
            "input_ids": torch.randint(5, 28_996, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
            "token_type_ids": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.randint(2, (size,), generator=generator),
        }
        for _ in range(count)
    ]


def main() -> None:
    """Measure, and write the table."""
    set_up_cpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--examples", type=int, default=16, help="scored examples, a multiple of the batch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = Params.load(PROFILE).tasks["mrpc"]
    size, length, device = task.train.batch_size, task.model.max_length or 128, options.device
    rows: list[list[str]] = []

    def measured(name: str, work: Callable[[], object]) -> object:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = work()
        synchronize(device)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak()
        rows.append([name, f"{seconds:.1f}", f"{peak / 2**30:.2f}"])
        print(" | ".join(rows[-1]), flush=True)
        return result

    model = measured("build", lambda: bert_large().to(device))
    assert isinstance(model, nn.Module)
    total = sum(p.numel() for p in model.parameters())
    data = [{k: v.to(device) for k, v in b.items()} for b in batches(options.examples // size, size, length)]
    how = task.score
    scores = measured(
        f"score {options.examples} examples ({how.kind}, {how.power})",
        lambda: fisher_diagonal(model, data, kind=how.kind, power=how.power),
    )
    assert isinstance(scores, dict)
    comparable = selected(scores, how.selection)
    ranking = measured(f"rank the top {how.keep:.0%}", lambda: Ranking.of(comparable, how.keep, task.head))
    assert isinstance(ranking, Ranking)
    scores.clear()
    comparable.clear()
    mask = measured(f"cut {task.density:.1%}", lambda: ranking.cut(task.density))
    settings = task.train.model_dump(exclude={"batch_size"}) | {"epochs": 1}
    steps = [{k: v.to(device) for k, v in b.items()} for b in batches(STEPS, size, length)]
    recipe = Recipe(lr=5e-5, **settings)
    autocast = torch.bfloat16 if device == "cuda" else None
    with MaskedParameters(model, mask) as masked:  # type: ignore[arg-type]
        measured(
            f"{STEPS} steps of {size} x {length} tokens",
            lambda: fit(model, lambda _: steps, masked=masked, recipe=recipe, autocast=autocast),
        )
        trained = masked.values.numel()
    text = header("The paper's model, BERT-large from its config", device, "One run.")
    text += [f"{total:,} parameters, {trained:,} of them trained; batch {size}, length {length}.", ""]
    memory = "device" if device == "cuda" else "process"
    publish(f"paper-{device}.md", text + table(["what", "seconds", f"peak {memory} memory so far, GiB"], rows))


def _peak() -> int:
    """The largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
