"""A prompt is computed once and handed to every sibling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from draft_models.layers import Numerics
from rollout_engine.decoder import Decoder
from rollout_engine.drafting import EagleDrafter
from rollout_engine.kv_cache import KVCache, KVView

_MAX_PADDED_TOKENS = 8192  # of one prefill forward
_AHEAD_TOKENS = 1024  # of prompts that are computed before their turn, since a few short ones cost as much as one


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a prompt of P tokens leaves behind. Views have one row."""

    logits_V: torch.Tensor  # of the first response token
    kv: KVView  # [layers, 1, G, P, D]
    draft_kv: KVView | None  # [1, 1, G, P-1, D]: the draft's last row embeds the first sampled token, so it is each
    last_aux_A: torch.Tensor | None  # sibling's own, and these are the captured states that it needs


class PrefixCache:
    """Prefixes of prompts that waiting requests still need."""

    def __init__(self, decoder: Decoder, drafter: EagleDrafter | None, numerics: Numerics) -> None:
        self._decoder = decoder
        self._drafter = drafter
        self._numerics = numerics
        self._waiting: Counter[tuple[int, ...]] = Counter()
        self._prefixes: dict[tuple[int, ...], Prefix] = {}

    def expect(self, prompts: Iterable[tuple[int, ...]]) -> None:
        """Requests with these prompts will come."""
        self._waiting.update(prompts)

    def release(self, prompt: tuple[int, ...]) -> None:
        """One request fewer waits for `prompt`; the last one takes the prefix out of the cache."""
        self._waiting[prompt] -= 1
        if self._waiting[prompt] <= 0:
            del self._waiting[prompt]
            self._prefixes.pop(prompt, None)

    def clear(self) -> None:
        """The weights have changed: nothing computed so far may be used."""
        self._prefixes.clear()

    def take(self, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
        """The prefix of every prompt, one `release` each. Those not known yet, and a few of the next, are computed."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prefixes]
        if unknown:
            unknown += self._next_ones(set(unknown))
        for batch in _batches(sorted(unknown, key=len)):
            self._prefixes.update(zip(batch, self._compute(batch), strict=True))
        prefixes = [self._prefixes[prompt] for prompt in prompts]
        for prompt in prompts:
            self.release(prompt)
        return prefixes

    def _next_ones(self, taken: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Prompts that wait, in their order, up to the budget."""
        ahead: list[tuple[int, ...]] = []
        left = _AHEAD_TOKENS
        for prompt in self._waiting:
            if prompt in taken or prompt in self._prefixes:
                continue
            left -= len(prompt)
            if left < 0:
                break
            ahead.append(prompt)
        return ahead

    def _compute(self, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
        decoder, config = self._decoder, self._decoder.config
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        device = decoder.device
        padded = [prompt + (0,) * (width - len(prompt)) for prompt in prompts]
        tokens = torch.tensor(padded, device=device)
        positions = torch.arange(width, device=device).expand(len(prompts), -1)
        cache = KVCache(config.num_layers, len(prompts), config.num_kv_heads, config.head_dim, decoder.embed)
        cache.reserve(width)
        view = cache.view(len(prompts), width)
        capture = self._drafter.capture if self._drafter else ()
        out = decoder.forward(tokens, positions, view, numerics=self._numerics, capture=capture)
        rows = torch.arange(len(prompts), device=device)
        last = torch.tensor(lengths, device=device) - 1
        logits = decoder.logits(out.hidden_BMH[rows, last], self._numerics)
        drafted = last_aux = None
        if self._drafter is not None and out.aux_BMA is not None:
            drafted, last_aux = self._drafter.prefill(tokens, out.aux_BMA), out.aux_BMA[rows, last]
        return [
            Prefix(
                logits_V=logits[row],
                kv=view.row(row, length),
                draft_kv=None if drafted is None else drafted.row(row, length - 1),
                last_aux_A=None if last_aux is None else last_aux[row],
            )
            for row, length in enumerate(lengths)
        ]


def _batches(prompts: Sequence[tuple[int, ...]]) -> Iterable[list[tuple[int, ...]]]:
    """Cut prompts, sorted by length, into batches of bounded padded size."""
    batch: list[tuple[int, ...]] = []
    for prompt in prompts:
        if batch and (len(batch) + 1) * len(prompt) > _MAX_PADDED_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch
