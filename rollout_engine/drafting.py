"""Drafters as the engine drives them: what they keep per slot, and what they propose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from draft_models.eagle3 import Eagle3
from draft_models.layers import Numerics
from draft_models.ngram import NgramDrafter
from rollout_engine.kv_cache import KVCache, KVView
from rollout_engine.rows import Row
from rollout_engine.sampling import Proposal, RowSampling


class EagleDrafter:
    """EAGLE-3 as a chain of depth k, with SGLang's alignment.

    The draft's row t takes embed(x_{t+1}) and the target's captured states at t, so a sequence of length n has
    draft rows 0 .. n-2; the last of them proposes x_n. Rows that follow within a chain hold the draft's own states and
    are computed again from the target's once those are known. `_filled[slot]` rows are computed from target states;
    the others wait in `_aux` until a proposal is asked for.
    """

    def __init__(self, draft: Eagle3, embed_VH: torch.Tensor, num_slots: int, numerics: Numerics) -> None:
        config = draft.config
        self.capture = config.aux_layer_ids
        self._draft = draft
        self._embed_VH = embed_VH
        self._numerics = numerics
        self._cache = self._new_cache(num_slots)
        self._aux = embed_VH.new_zeros(num_slots, 0, len(config.aux_layer_ids) * config.hidden_size)
        self._filled = [0] * num_slots

    def prefill(self, tokens_BP: torch.Tensor, aux_BPA: torch.Tensor) -> KVView:
        """Draft rows 0 .. P-2 of B padded prompts: what siblings share. Views [1, B, G, P-1, D]."""
        num_rows, length = tokens_BP.shape
        cache = self._new_cache(num_rows)
        cache.reserve(length)
        view = cache.view(num_rows, length - 1)
        if length > 1:
            positions = torch.arange(length - 1, device=tokens_BP.device).expand(num_rows, -1)
            self._step(tokens_BP[:, 1:], self._draft.fuse(aux_BPA[:, :-1], self._numerics), positions, view)
        return view

    def admit(self, slots: list[int], draft_kv: KVView, last_aux_A: torch.Tensor) -> None:
        """Give siblings their prompt's draft rows, and the captured states of its last token."""
        length = draft_kv.keys.shape[3]
        self.reserve(length + 1)
        self._cache.write(slots, draft_kv)
        self._aux[slots, length] = last_aux_A
        for slot in slots:
            self._filled[slot] = length

    def reserve(self, num_positions: int) -> None:
        self._cache.reserve(num_positions)
        missing = self._cache.capacity - self._aux.shape[1]
        if missing > 0:
            self._aux = F.pad(self._aux, (0, 0, 0, missing))

    def record(self, positions_BM: torch.Tensor, aux_BMA: torch.Tensor) -> None:
        """Keep the captured states of the tokens that the target has just seen."""
        self._aux[_row_index(positions_BM), positions_BM] = aux_BMA

    def forget(self, num_rows: int, keep: int = 0) -> None:
        """Draft rows from `keep` on are to be computed again from the captured states."""
        self._filled[:num_rows] = [max(keep, 0)] * num_rows

    def move(self, source: int, target: int, num_positions: int) -> None:
        """Row `source`, with captured states below `num_positions`, takes the place of row `target`."""
        filled = self._filled[source]
        self._cache.move(source, target, filled)
        self._aux[target, filled:num_positions] = self._aux[source, filled:num_positions]
        self._filled[target] = filled

    def release(self) -> None:
        """Give the memory back."""
        self._cache.release()
        self._aux = self._aux[:, :0].clone()

    def lag(self, rows: Sequence[Row]) -> int:
        """The most draft rows that one of `rows` has still to compute before it can propose."""
        return max(len(row.tokens) - 1 - filled for row, filled in zip(rows, self._filled, strict=False))

    def propose(self, rows: Sequence[Row], depth: int, sampling: RowSampling) -> Proposal:
        """`depth` drafts for each of `rows`, which are the first ones of the batch."""
        device = self._embed_VH.device
        lengths = [len(row.tokens) for row in rows]
        length_B = torch.tensor(lengths, device=device)
        view_length = max(lengths) + max(depth, self.lag(rows))
        self.reserve(view_length)
        view = self._cache.view(len(rows), view_length)
        state = self._catch_up(rows, lengths, view)
        target_ids_D = self._draft.target_ids
        tokens: list[torch.Tensor] = []
        probs: list[torch.Tensor] = []
        for step in range(depth):
            logits = self._draft.logits(state, self._numerics)[:, 0]
            token_B, q_BV = sampling.draft(logits, length_B + step, target_ids_D, len(self._embed_VH))
            tokens.append(token_B)
            if q_BV is not None:
                probs.append(q_BV)
            if step + 1 < depth:
                state = self._step(token_B[:, None], state, length_B[:, None] + (step - 1), view)
        return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1) if probs else None, [depth] * len(rows))

    def _catch_up(self, rows: Sequence[Row], lengths: list[int], view: KVView) -> torch.Tensor:
        """Compute every row's missing draft rows; returns the state of each row's last one, [B, 1, H].

        Rows are padded to the longest lag: what the padding writes lies at or behind the row's chain and is
        overwritten before anything sees it.
        """
        device = self._embed_VH.device
        starts = self._filled[: len(rows)]
        counts = [length - 1 - start for length, start in zip(lengths, starts, strict=True)]
        width = max(counts)
        padded = [
            row.tokens[start + 1 :] + [0] * (width - count)
            for row, start, count in zip(rows, starts, counts, strict=True)
        ]
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
        aux = self._aux[_row_index(positions), positions]
        hidden = self._draft.fuse(aux, self._numerics)
        state = self._step(torch.tensor(padded, device=device), hidden, positions, view)
        self._filled[: len(rows)] = [length - 1 for length in lengths]
        if width == 1:
            return state
        last = torch.tensor(counts, device=device) - 1
        return state[torch.arange(len(rows), device=device), last][:, None]

    def _step(
        self, tokens_BM: torch.Tensor, hidden_BMH: torch.Tensor, positions_BM: torch.Tensor, view: KVView
    ) -> torch.Tensor:
        # Padding and chains may run past the draft's last position; no row of a full context is needed there.
        positions_BM = positions_BM.clamp(max=self._draft.config.max_position_embeddings - 1)
        embeds = F.embedding(tokens_BM, self._embed_VH)
        keys, values = view.keys[0], view.values[0]
        return self._draft.step(embeds, hidden_BMH, positions_BM, keys, values, self._numerics)

    def _new_cache(self, num_slots: int) -> KVCache:
        config = self._draft.config
        return KVCache(1, num_slots, config.num_key_value_heads, config.head_dim, self._embed_VH)


class NgramProposer:
    """N-gram drafts, looked up on the host in a prompt's own text and its siblings'.

    What siblings have written so far depends on scheduling: under TARGET_ONLY and REJECTION so do the tokens, though
    not their law; under GREEDY and COUPLED nothing does.
    """

    def __init__(self, min_match: int, max_match: int, device: torch.device) -> None:
        self._matches = (min_match, max_match)
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Drop all texts."""
        self._drafter = NgramDrafter(*self._matches)
        self._known: dict[tuple[int, int], int] = {}  # tokens of each text that the index has

    def propose(self, rows: Sequence[Row], depth: int) -> Proposal | None:
        """Up to `depth` drafts for each of the first rows; None when no row has any."""
        for row in rows:
            key = row.request.key
            self._drafter.extend(key, row.tokens[self._known.get(key, 0) :])
            self._known[key] = len(row.tokens)
        drafts = [self._drafter.propose(row.request.key, depth) for row in rows]
        width = max(len(tokens) for tokens in drafts)
        if width == 0:
            return None
        padded = [tokens + [0] * (width - len(tokens)) for tokens in drafts]
        return Proposal(torch.tensor(padded, device=self._device), None, [len(tokens) for tokens in drafts])


def _row_index(positions_BM: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(positions_BM), device=positions_BM.device)[:, None]
