"""The embedded engine: continuous batching, shared prompts and exact speculation, on the CPU or one CUDA GPU.

Axes: B running rows, M tokens per row and forward, V vocabulary. A request's tokens depend on its prompt, settings and
seed, and on the weights; batch, order of admission and slots touch them only through floating-point rounding, and
with `batch_invariant` not even so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from draft_models.eagle3 import Eagle3
from draft_models.layers import BATCH_INVARIANT, FAST
from draft_models.types import VerifyRule
from rollout_engine.checks import check_config, check_requests
from rollout_engine.config import RolloutConfig, SpeculationConfig
from rollout_engine.decoder import Decoder
from rollout_engine.drafting import EagleDrafter, NgramProposer
from rollout_engine.history import HistoryDrafter
from rollout_engine.kv_cache import KVCache
from rollout_engine.prefill import Prefix, PrefixCache
from rollout_engine.rows import Row
from rollout_engine.sampling import Proposal, RowSampling
from rollout_engine.speculation import CostTable, DepthController, SpecPlan, load_cost_table, measure_steps
from rollout_engine.stopping import Detokenize, kept_before_stop
from rollout_engine.types import EngineError, FinishReason, RolloutRequest, Sample
from sync.inprocess import InProcessTransport
from sync.plan import SyncError
from sync.receiver import WeightReceiver

_EAGLE3_ALONE = SpeculationConfig()
_MEASURED_LENGTH = 64  # tokens of the rows that cost measurements decode


class TorchEngine:
    """Implements `RolloutEngine`. One `generate` at a time; weights may be received between its samples."""

    def __init__(
        self,
        decoder: Decoder,
        config: RolloutConfig,
        *,
        draft: Eagle3 | None = None,
        eos_token_ids: Sequence[int] = (),
        detokenize: Detokenize | None = None,
        version: int = 0,
        speculation: SpeculationConfig = _EAGLE3_ALONE,
    ) -> None:
        """`detokenize` turns token ids into text; only requests with stop strings need it.

        A draft is used by EAGLE3 alone, but its weights are received with any algorithm. Raises EngineConfigError for
        settings that contradict themselves, the decoder, the draft or the cost table.
        """
        check_config(config, decoder.config, draft, decoder.device, speculation)
        self._decoder = decoder
        self._config = config
        self._rule = VerifyRule(config.verify_rule)
        self._context_length = config.context_length or decoder.config.max_positions
        self._eos = frozenset(eos_token_ids)
        self._detokenize = detokenize
        self._numerics = BATCH_INVARIANT if config.batch_invariant else FAST
        tensors = {f"policy.{name}": tensor for name, tensor in decoder.named_tensors().items()}
        if draft is not None:
            tensors |= {f"draft.{name}": tensor for name, tensor in draft.named_tensors().items()}
        self._receiver = WeightReceiver(tensors, version)
        self._version = version

        sizes = decoder.config
        slots = config.max_running_requests
        self._cache = KVCache(sizes.num_layers, slots, sizes.num_kv_heads, sizes.head_dim, decoder.embed)
        algorithm = config.speculative_algorithm
        self._eagle = None
        if algorithm == "EAGLE3" and draft is not None:
            self._eagle = EagleDrafter(draft, decoder.embed, slots, self._numerics)
        self._ngram = None
        if algorithm == "NGRAM":
            self._ngram = NgramProposer(config.ngram_min_match, config.ngram_max_match, decoder.device)
        self._max_depth = 0 if algorithm == "NONE" else config.speculative_num_steps
        most_given = speculation.history_num_steps or self._max_depth if speculation.history else 0
        table = None
        if self._max_depth and config.controller == "adaptive" and config.cost_table:
            table = load_cost_table(Path(config.cost_table), self._max_depth, most_given)
        self._controller = DepthController(self._max_depth, table, learns_costs=not config.cost_table)
        self._speculation = speculation
        self._history = self._new_history()
        self._prefixes = PrefixCache(decoder, self._eagle, self._numerics)
        self._rows: list[Row] = []
        self._sampling: RowSampling | None = None  # of the present rows; None when they have changed
        self._pending: deque[RolloutRequest] = deque()
        self._aborted: set[tuple[int, int]] = set()
        self._is_generating = False

    @property
    def receiver(self) -> WeightReceiver:
        return self._receiver

    @property
    def transport(self) -> InProcessTransport:
        return InProcessTransport(self._receiver)

    def generate(self, requests: Iterable[RolloutRequest]) -> Iterator[Sample]:
        """Samples as they finish, in no fixed order.

        Raises BadRequest for a request that cannot be served and EngineError while weights are a mixture; both
        before any work. Abandoning the iterator drops what is running.
        """
        pending = deque(requests)
        check_requests(pending, self._context_length, has_detokenizer=self._detokenize is not None)
        self._require_free()
        self._require_clean()
        self.warm_up()
        self._pending = pending
        return self._generate(pending)

    def warm_up(self) -> None:
        """Measure step costs if the controller needs them and has none. `generate` does it too, on its own time."""
        if self._max_depth > 0 and self._config.controller == "adaptive" and self._controller.table is None:
            self._controller.table = self.measure_costs()

    @property
    def controller(self) -> DepthController:
        """What chooses the depth; its state belongs into a checkpoint."""
        return self._controller

    def step_costs(self) -> CostTable | None:
        """The depth controller's: measured once, then corrected while decoding."""
        return self._controller.step_costs()

    def state(self) -> dict[str, Any]:
        """The depth controller's, JSON-able, and with history its texts, as tensors."""
        return self._controller.state() | ({"history": self._history.state()} if self._history is not None else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises EngineConfigError when it was saved with another depth."""
        self._controller.load_state(state)
        if self._history is not None and "history" in state:
            self._history.load_state(state["history"])

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """For an evaluation: greedy acceptance says little of the next rollout's, and its texts are not to be drafted
        from. History is empty inside, because copying gigabytes of texts to forget a few would take longer."""
        self._require_free()
        kept = self._controller.state(), self._history, self._version
        self._history = self._new_history()
        try:
            yield
        finally:
            # With the old version new weights are still to come: whatever fades with them does so afterwards.
            before, self._history, self._version = kept
            self._controller.load_state(before)

    def _new_history(self) -> HistoryDrafter | None:
        if not self._speculation.history:
            return None
        return HistoryDrafter(self._speculation, self._controller, self._max_depth)

    @torch.inference_mode()
    def measure_costs(self, budget_s: float = 1.0) -> CostTable:
        """Time decode steps of every depth at several batch sizes. Call it while nothing is generated."""
        request = RolloutRequest(0, 0, (0,) * min(_MEASURED_LENGTH, self._context_length - 1))
        slots = self._config.max_running_requests
        rows = [Row(request, self._context_length, list(request.prompt_ids)) for _ in range(slots)]
        sampling = RowSampling.of([request.sampling] * slots, self._rule, self._decoder.device)

        def step(batch: int, depth: int, width: int) -> None:
            if self._eagle is not None:
                self._eagle.forget(batch, keep=len(request.prompt_ids) - 2 - depth)
            given = ((0,) * width,) * batch if width else ()
            self._decode(rows[:batch], sampling.first(batch), SpecPlan(depth, batch if depth else 0, given))

        most_given = self._history.max_tokens if self._history is not None else 0
        table = measure_steps(step, slots, self._max_depth, budget_s, most_given)
        if self._ngram is not None:
            self._ngram.reset()
        return table

    def abort(self, keys: Iterable[tuple[int, int]] | None = None) -> None:
        """Finish requests early, all of them by default: each still yields what it has so far."""
        if keys is None:
            keys = [row.request.key for row in self._rows] + [request.key for request in self._pending]
        self._aborted.update(keys)

    def without_speculation(self) -> TorchEngine:
        """An engine over the same weights and receiver that decodes plainly.

        Its KV memory is its own, and as large as this engine's is now, so that neither of the two grows it while they
        are compared. The caller closes it after use.
        """
        plain = TorchEngine(
            self._decoder,
            replace(self._config, speculative_algorithm="NONE"),
            eos_token_ids=tuple(self._eos),
            detokenize=self._detokenize,
        )
        plain._receiver, plain._version = self._receiver, self._receiver.version
        plain._cache.reserve(self._cache.capacity)
        return plain

    def offload(self) -> None:
        """Give the KV memory back; the weights are small beside it and stay. Raises EngineError while generating."""
        self._require_free()
        self.close()

    def onload(self) -> None:
        """Nothing: KV memory grows again as it is needed."""

    def close(self) -> None:
        """Give the KV memory back; what is running is dropped."""
        self._rows.clear()
        self._cache.release()
        if self._eagle is not None:
            self._eagle.release()

    # ------------------------------------------------------------ the loop

    def _generate(self, pending: deque[RolloutRequest]) -> Iterator[Sample]:
        self._require_free()
        self._is_generating, self._pending = True, pending
        self._prefixes.expect(request.prompt_ids for request in pending)
        if self._history is not None:
            self._history.expect(request.prompt_ids for request in pending)
        try:
            while pending or self._rows:
                self._require_clean()
                self._follow_weights()
                # The consumer may send weights whenever it holds a sample: none is handed out before the step is over,
                # so that a step never runs on other weights than those checked and followed just above.
                finished = self._take_aborted() + self._admit()
                if self._rows:
                    finished += self._step()
                yield from finished
        finally:
            for request in pending:
                self._prefixes.release(request.prompt_ids)
            pending.clear()
            self._rows.clear()
            self._aborted.clear()
            for drafter in (self._ngram, self._history):
                if drafter is not None:
                    drafter.reset()
            self._sampling, self._is_generating = None, False

    @torch.inference_mode()
    def _admit(self) -> list[Sample]:
        """Fill free slots, each new row with the prefix of its prompt and its first token."""
        num_running = len(self._rows)
        num_new = min(self._config.max_running_requests - num_running, len(self._pending))
        if num_new == 0:
            return []
        requests = [self._pending.popleft() for _ in range(num_new)]
        prefixes = self._prefixes.take([request.prompt_ids for request in requests])
        slots: dict[tuple[int, ...], list[int]] = {}
        for slot, request in enumerate(requests, start=num_running):
            limit = min(len(request.prompt_ids) + request.sampling.max_new_tokens, self._context_length)
            row = Row(request, limit, list(request.prompt_ids))
            row.set_version(self._version)
            self._rows.append(row)
            slots.setdefault(request.prompt_ids, []).append(slot)
        for request, prefix in zip(requests, prefixes, strict=True):
            if (siblings := slots.pop(request.prompt_ids, None)) is not None:
                self._place(prefix, siblings)
        self._sampling = None

        device = self._decoder.device
        sampling = RowSampling.of([request.sampling for request in requests], self._rule, device)
        logits_BMV = torch.stack([prefix.logits_V for prefix in prefixes])[:, None]
        first_B = torch.tensor([len(request.prompt_ids) for request in requests], device=device)
        emitted = self._choose(logits_BMV, sampling, first_B, None)
        return self._commit(range(num_running, num_running + num_new), emitted, None)

    def _place(self, prefix: Prefix, slots: list[int]) -> None:
        self._cache.reserve(prefix.kv.keys.shape[3])
        self._cache.write(slots, prefix.kv)
        if self._eagle is not None and prefix.draft_kv is not None and prefix.last_aux_A is not None:
            self._eagle.admit(slots, prefix.draft_kv, prefix.last_aux_A)

    @torch.inference_mode()
    def _step(self) -> list[Sample]:
        """One target forward for all rows, and what follows from it."""
        rows = self._rows
        if self._sampling is None:
            params = [row.request.sampling for row in rows]
            self._sampling = RowSampling.of(params, self._rule, self._decoder.device)
        num_rows, start_s = len(rows), perf_counter()
        plan = self._plan(rows)
        emitted, proposal = self._decode(rows, self._sampling, plan)
        if self._history is not None:
            self._history.observe(plan, emitted.tokens, emitted.num_accepted)
        elif plan.depth:
            self._controller.observe(plan, emitted.num_accepted[: plan.num_rows])
        num_drafts = proposal.num_drafts if proposal else [0] * num_rows
        samples = self._commit(range(num_rows), emitted, num_drafts, plan.given)
        self._controller.observe_seconds(plan, num_rows, perf_counter() - start_s)
        return samples

    def _plan(self, rows: list[Row]) -> SpecPlan:
        if self._history is not None:
            return self._history.plan(rows)
        return self._controller.plan(len(rows)) if self._max_depth else SpecPlan(0, 0)

    def _decode(self, rows: list[Row], sampling: RowSampling, plan: SpecPlan) -> tuple[Emitted, Proposal | None]:
        """Every row's last token and its drafts through the target; as many tokens out as stand."""
        device = self._decoder.device
        proposal = self._propose(rows, sampling, plan)
        depth = 0 if proposal is None else proposal.tokens_BK.shape[1]
        lengths = [len(row.tokens) for row in rows]
        length_B = torch.tensor(lengths, device=device)
        tokens_BM = torch.tensor([row.tokens[-1:] for row in rows], device=device)
        positions_BM = length_B[:, None] - 1
        if proposal is not None:
            tokens_BM = torch.cat((tokens_BM, proposal.tokens_BK), dim=1)
            positions_BM = positions_BM + torch.arange(depth + 1, device=device)
        logits_BMV = self._forward(tokens_BM, positions_BM, max(lengths) + depth)
        return self._choose(logits_BMV, sampling, length_B, proposal), proposal

    def _propose(self, rows: list[Row], sampling: RowSampling, plan: SpecPlan) -> Proposal | None:
        if plan.depth == 0:
            return Proposal.of_given(plan.given, self._decoder.device) if plan.given else None
        proposal, first = None, rows[: plan.num_rows]
        if self._eagle is not None:
            proposal = self._eagle.propose(first, plan.depth, sampling.first(plan.num_rows))
        elif self._ngram is not None:
            proposal = self._ngram.propose(first, plan.depth)
        if proposal is None:
            return None
        proposal = proposal.padded(len(rows))
        return proposal.with_given(plan.given) if plan.given else proposal

    def _forward(self, tokens_BM: torch.Tensor, positions_BM: torch.Tensor, view_length: int) -> torch.Tensor:
        """Logits [B, M, V] of the first rows' tokens; K, V and captured states are kept."""
        self._cache.reserve(view_length)
        view = self._cache.view(len(tokens_BM), view_length)
        capture = self._eagle.capture if self._eagle is not None else ()
        out = self._decoder.forward(tokens_BM, positions_BM, view, numerics=self._numerics, capture=capture)
        if self._eagle is not None and out.aux_BMA is not None:
            self._eagle.reserve(view_length)
            self._eagle.record(positions_BM, out.aux_BMA)
        return self._decoder.logits(out.hidden_BMH, self._numerics)

    def _choose(
        self, logits_BMV: torch.Tensor, sampling: RowSampling, first_B: torch.Tensor, proposal: Proposal | None
    ) -> Emitted:
        verified = sampling.choose(logits_BMV, first_B, proposal)
        logprobs_BM = sampling.logprobs(logits_BMV, verified.tokens_BM)
        return Emitted(verified.tokens_BM.tolist(), verified.num_accepted_B.tolist(), logprobs_BM.tolist())

    def _commit(
        self, slots: range, emitted: Emitted, num_drafts: list[int] | None, given: Sequence[tuple[int, ...]] = ()
    ) -> list[Sample]:
        """Append the emitted tokens to the rows of `slots`, and take out those that are finished.

        `num_drafts` is None for tokens sampled from a prefill, which no decode statistics count. `given` is the plan's.
        """
        finished: list[tuple[int, FinishReason]] = []
        for index, slot in enumerate(slots):
            row, num_accepted = self._rows[slot], emitted.num_accepted[index]
            num_new = min(num_accepted + 1, row.limit - len(row.tokens))
            tokens = emitted.tokens[index][:num_new]
            row.add(tokens, emitted.logprobs[index][:num_new])
            num_kept = self._kept(row, num_new)
            if num_kept is not None:
                row.cut(num_new - num_kept)
                finished.append((slot, FinishReason.STOP))
            elif len(row.tokens) == row.limit:
                finished.append((slot, FinishReason.LENGTH))
            if num_drafts is not None:
                num_stood = num_new if num_kept is None else num_kept
                from_history = bool(given) and len(given[index]) > 0
                row.counts.add_step(num_drafts[index], num_accepted, num_stood, from_history=from_history)
        samples = [self._rows[slot].sample(reason) for slot, reason in finished]
        self._remove([slot for slot, _ in finished])
        return samples

    def _kept(self, row: Row, num_new: int) -> int | None:
        sampling = row.request.sampling
        stop_ids = self._eos.union(sampling.stop_token_ids) if sampling.stop_token_ids else self._eos
        response = row.tokens[row.prompt_len :] if sampling.stop else row.tokens
        return kept_before_stop(response, num_new, stop_ids, sampling.stop, self._detokenize)

    def _remove(self, slots: Iterable[int]) -> None:
        """Rows stay compact: the last one takes a removed one's place."""
        for slot in sorted(slots, reverse=True):
            if self._history is not None:
                self._history.finish(self._rows[slot])
            last = self._rows.pop()
            if slot < len(self._rows):
                num_positions = len(last.tokens) - 1
                self._rows[slot] = last
                self._cache.move(len(self._rows), slot, num_positions)
                if self._eagle is not None:
                    self._eagle.move(len(self._rows), slot, num_positions)
            self._sampling = None

    # ------------------------------------------------------------ between steps

    @torch.inference_mode()
    def _follow_weights(self) -> None:
        """After a sync nothing computed under older weights is used: running rows are computed again whole."""
        if self._receiver.version == self._version:
            return
        self._version = self._receiver.version
        self._prefixes.clear()
        self._controller.new_weights()
        if self._history is not None:
            self._history.new_weights()
        if not self._rows:
            return
        device = self._decoder.device
        width = max(len(row.tokens) for row in self._rows) - 1
        padded = [row.tokens[:-1] + [0] * (width + 1 - len(row.tokens)) for row in self._rows]
        positions_BM = torch.arange(width, device=device).expand(len(padded), -1)
        self._forward(torch.tensor(padded, device=device), positions_BM, width)
        if self._eagle is not None:
            self._eagle.forget(len(self._rows))
        for row in self._rows:
            row.set_version(self._version)

    def _take_aborted(self) -> list[Sample]:
        if not self._aborted:
            return []
        slots = [slot for slot, row in enumerate(self._rows) if row.request.key in self._aborted]
        samples = [self._rows[slot].sample(FinishReason.ABORT) for slot in slots]
        with torch.inference_mode():
            self._remove(slots)
        for request in [request for request in self._pending if request.key in self._aborted]:
            self._pending.remove(request)
            self._prefixes.release(request.prompt_ids)
            if self._history is not None:
                self._history.release(request.prompt_ids)
            samples.append(Sample(request, (), (), (), FinishReason.ABORT))
        self._aborted.clear()
        return samples

    def _require_free(self) -> None:
        if self._is_generating:
            raise EngineError("generate() was called while another generate() of this engine is still being read")

    def _require_clean(self) -> None:
        try:
            self._receiver.require_clean()
        except SyncError as error:
            raise EngineError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Emitted:
    """One step's result on the host: per row M candidate tokens, of which num_accepted + 1 stand."""

    tokens: list[list[int]]
    num_accepted: list[int]
    logprobs: list[list[float]]
