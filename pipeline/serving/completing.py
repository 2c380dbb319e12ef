"""Completions of prompts by a language model: greedy, in batches of prompts of similar length.

Shape legend: B prompts, T tokens of the longest one, G tokens generated.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from pipeline.errors import ParamsError
from pipeline.tasks.batches import by_length
from pipeline.tasks.models import load_tokenizer
from pipeline.tasks.settings import ModelSettings


class Completer:
    """A tokenizer that knows how prompts were read in training (``Tokenizer.completions``).

    Args:
        model: whose tokenizer; its ``max_length`` bounds prompt and completion together.
        new_tokens: tokens of a completion at most; None takes half of that, and not more than 64.

    Attributes:
        new_tokens: likewise.

    Raises:
        ParamsError: if no room is left for a prompt.
    """

    def __init__(self, model: ModelSettings, new_tokens: int | None = None) -> None:
        self._tokenizer = load_tokenizer(model)
        self._limit = model.max_length or 512
        self.new_tokens = new_tokens or min(64, self._limit // 2)
        if self.new_tokens > self._limit - 2:
            raise ParamsError(
                f"--max-new-tokens {self.new_tokens}: the model takes {self._limit} tokens, prompt and completion "
                "together; name fewer"
            )

    def prompt(self, text: str) -> tuple[list[int], bool]:
        """Tokenise a prompt; of one that is too long the start is lost, but for a special token there.

        Returns:
            Its ids, and whether it was cut.
        """
        tokenizer, room = self._tokenizer, self._limit - self.new_tokens
        ids: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
        if not ids:
            first = tokenizer.bos_token_id
            return [first if first is not None else tokenizer.eos_token_id], False
        if len(ids) <= room:
            return ids, False
        opening = ids[:1] if ids[0] in set(tokenizer.all_special_ids) else []
        return opening + ids[len(ids) - (room - len(opening)) :], True

    def complete(
        self, network: nn.Module, texts: Sequence[str], batch_size: int,
        autocast: torch.dtype | None = None, progress: Callable[[int, int], None] | None = None,
    ) -> tuple[list[str], int]:  # fmt: skip
        """Complete prompts: at each step the likeliest token, until the end-of-text token or ``new_tokens``.

        Args:
            network: the language model, on its device.
            texts: the prompts.
            batch_size: B.
            autocast: dtype of ``torch.autocast``, if any.
            progress: called with prompts done and prompts in all.

        Returns:
            The completions in order, and how many prompts were cut.
        """
        model: Any = network
        prompts = [self.prompt(text) for text in texts]
        lengths = np.array([len(ids) for ids, _ in prompts], dtype=np.int64)
        device = next(network.parameters()).device
        found, done = [""] * len(prompts), 0
        for group in by_length(np.arange(len(prompts), dtype=np.int64), batch_size, lengths):
            rows = group.tolist()
            width = int(lengths[group].max())
            pad = self._tokenizer.pad_token_id
            ids_BT = torch.tensor([[pad] * (width - len(prompts[r][0])) + prompts[r][0] for r in rows])
            filled_BT = torch.tensor([[0] * (width - lengths[r]) + [1] * lengths[r] for r in rows])
            with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                made_BG = model.generate(
                    ids_BT.to(device), attention_mask=filled_BT.to(device), generation_config=self._greedy()
                )[:, width:]
            for row, ids in zip(rows, made_BG.tolist(), strict=True):
                found[row] = self._tokenizer.decode(ids, skip_special_tokens=True)
            done += len(rows)
            if progress is not None:
                progress(done, len(prompts))
        return found, sum(was_cut for _, was_cut in prompts)

    def _greedy(self) -> Any:
        import transformers

        tokenizer, config = self._tokenizer, cast(Any, transformers.GenerationConfig)
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        return config(max_new_tokens=self.new_tokens, do_sample=False, num_beams=1, use_cache=True, **ids)
