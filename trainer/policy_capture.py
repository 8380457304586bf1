"""Takes the draft's training data out of the policy's own forward: hooks, a byte budget, the trip to the last stage.

Nothing here changes a value of the policy: every tensor is detached and copied out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from draft_models.types import DraftSample
from rollout_engine.types import Sample
from trainer.policy_batch import MicroBatch
from trainer.policy_layout import RankLayout, all_gather_cat

_GOLDEN = (math.sqrt(5) - 1) / 2
EMBEDS, FINAL, TOKENS = "embeds", "final", "tokens"  # beside the captured layers; FINAL is what the output layer reads


@dataclass(frozen=True, slots=True)
class CaptureSpec:
    """What the draft needs from the policy's forward. Layer id k is the OUTPUT of decoder layer k, 0-based."""

    aux_layer_ids: tuple[int, int, int]
    # On each data-parallel rank; samples beyond it are left out, and counted. One copy of the output layer, which their
    # logits are computed from, comes on top.
    max_bytes: int


def aux_name(layer_id: int) -> str:
    return f"aux.{layer_id}"


def draft_bytes_per_token(hidden_size: int, element_bytes: int) -> int:
    """Of a `DraftSample`: the id, its embedding row, three hidden states and the output layer's input."""
    return 8 + element_bytes * 5 * hidden_size


def choose_captured(num_bytes: Mapping[int, int], max_bytes: int, turn: int) -> frozenset[int]:
    """Samples to capture within the budget, spread over the batch and other ones at another `turn`.

    They are taken in the order of the golden-ratio sequence, whose first n members lie evenly for every n, up to the
    first one beyond the budget: going on to those that still fit would prefer short ones.
    """
    order = sorted(num_bytes, key=lambda i: ((i + 1 + turn) * _GOLDEN) % 1.0)
    chosen, left = [], max_bytes
    for i in order:
        if num_bytes[i] <= left:
            chosen.append(i)
            left -= num_bytes[i]
        elif chosen:
            break
    return frozenset(chosen)


def captured_modules(model: nn.Module, layer_offset: int, aux_layer_ids: Sequence[int]) -> dict[str, nn.Module]:
    """Those of this pipeline stage (a GPTModel whose layer 0 is `layer_offset` of all) whose outputs are recorded."""
    layers = model.decoder.layers
    modules = {aux_name(k): layers[k - layer_offset] for k in aux_layer_ids if 0 <= k - layer_offset < len(layers)}
    if model.pre_process:
        modules[EMBEDS] = model.embedding
    if model.post_process:
        modules[FINAL] = model.decoder.final_layernorm
    return modules


def copy_of_head(model: nn.Module, layout: RankLayout) -> torch.Tensor:
    """The last stage's output layer as it is now, whole, [V, H]. Collective over the tensor-parallel ranks."""
    part = model.output_layer.weight
    if part is None:  # tied, and the embedding is on this stage
        part = model.shared_embedding_or_output_weight()
    part = part.detach()
    return all_gather_cat(part, layout.tp.group, dim=0) if layout.vocab_group else part.clone()


@dataclass
class StageRecorder:
    """Copies rows of the chosen samples from this pipeline stage's modules while a micro-batch runs.

    Under sequence parallelism a module puts out [T / ranks, 1, H]; the parts are gathered first.
    """

    modules: dict[str, nn.Module]
    hidden_size: int
    chosen: frozenset[int]
    layout: RankLayout
    sequence_parallel: bool
    head_VH: torch.Tensor | None = None  # the last stage's output layer, whole, as it was before the update
    rows: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    _spans: dict[int, tuple[int, int]] | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def recording(self, batch: MicroBatch) -> Iterator[None]:
        """Around the model's forward only: a recomputed forward during backward must not be recorded again."""
        self._spans = {i: span for i, span in batch.spans.items() if i in self.chosen}
        if self.layout.is_last_stage:
            self._keep(TOKENS, batch.tokens_T)
        try:
            yield
        finally:
            self._spans = None

    def _hook(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            if self._spans is None:
                return
            hidden = output[0] if isinstance(output, tuple) else output  # a decoder layer returns (hidden, context)
            rows = hidden.detach()
            if self.sequence_parallel:
                rows = all_gather_cat(rows, self.layout.tp.group, dim=0)
            self._keep(name, rows[:, 0])

        return record

    def _keep(self, name: str, rows_TX: torch.Tensor) -> None:
        """Copies the chosen rows, in one block: a view of the source would keep the whole activation alive."""
        if not self._spans:
            return
        block = torch.cat([rows_TX[start:end] for start, end in self._spans.values()])
        parts = block.split([end - start for start, end in self._spans.values()])
        self.rows.setdefault(name, {}).update(zip(self._spans, parts, strict=True))

    def bring_to_last_stage(self) -> None:
        """Sends what earlier pipeline stages recorded to the last one, one message a stage. Collective there."""
        group, pp = self.layout.pp.group, self.layout.pp
        names: list[list[str]] = [[] for _ in range(pp.size)]
        dist.all_gather_object(names, [name for name in self.rows if name not in (FINAL, TOKENS)], group=group)
        order = sorted(self.chosen)
        if not order:
            return
        if self.layout.is_last_stage:
            self._receive(names[:-1], order, group)
        elif names[pp.rank]:
            blocks = [torch.cat([self.rows[name][i] for i in order]) for name in names[pp.rank]]
            dist.send(torch.cat(blocks, dim=-1), group=group, group_dst=pp.size - 1)

    def _receive(self, names: Sequence[Sequence[str]], order: Sequence[int], group: dist.ProcessGroup) -> None:
        lengths = [self.rows[FINAL][i].shape[0] for i in order]
        for stage, stage_names in enumerate(names):
            if not stage_names:
                continue
            message = self.rows[FINAL][order[0]].new_empty(sum(lengths), len(stage_names) * self.hidden_size)
            dist.recv(message, group=group, group_src=stage)
            for name, block in zip(stage_names, message.chunk(len(stage_names), dim=-1), strict=True):
                self.rows[name] = dict(zip(order, block.split(lengths), strict=True))

    def counts(self, num_samples: int) -> dict[str, float]:
        """Samples captured and dropped on all data-parallel ranks, of this rank's `num_samples`. Collective."""
        mine = [len(self.chosen), num_samples - len(self.chosen)]
        counts = torch.tensor(mine, dtype=torch.float64, device=self.layout.device)
        dist.all_reduce(counts, group=self.layout.dp.group)
        captured, dropped = counts.tolist()
        return {"draft_samples_captured": captured, "draft_samples_dropped": dropped}

    def draft_samples(self, samples: Sequence[Sample], spec: CaptureSpec) -> list[DraftSample]:
        """What the last stage holds, in sample order."""
        return [self._draft_sample(samples[i], i, spec) for i in sorted(self.chosen)]

    def _draft_sample(self, sample: Sample, index: int, spec: CaptureSpec) -> DraftSample:
        request = sample.request
        assert self.head_VH is not None
        return DraftSample(
            prompt_id=request.prompt_id,
            sample_id=request.sample_id,
            token_ids=self.rows[TOKENS][index],
            embeds=self.rows[EMBEDS][index],
            aux_hidden=torch.cat([self.rows[aux_name(k)][index] for k in spec.aux_layer_ids], dim=-1),
            target_hidden=self.rows[FINAL][index],
            target_head=self.head_VH,
            prompt_len=len(request.prompt_ids),
            temperature=request.sampling.temperature,
            seed=request.sampling.seed,
            policy_version=sample.policy_versions[-1].version,
        )
