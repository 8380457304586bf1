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

_GOLDEN = (math.sqrt(5) - 1) / 2
EMBEDS, LOGITS = "embeds", "logits"


@dataclass(frozen=True, slots=True)
class CaptureSpec:
    """What the draft needs from the policy's forward. Layer id k is the OUTPUT of decoder layer k, 0-based."""

    aux_layer_ids: tuple[int, int, int]
    max_bytes: int  # on each data-parallel rank; samples beyond it are left out, and counted


def aux_name(layer_id: int) -> str:
    return f"aux.{layer_id}"


def draft_sample_bytes(length: int, hidden_size: int, vocab_size: int, element_bytes: int) -> int:
    """Bytes of one `DraftSample`: ids, embedding rows, three hidden states and logits."""
    return length * (8 + element_bytes * (4 * hidden_size + vocab_size))


def choose_captured(num_bytes: Mapping[int, int], max_bytes: int, turn: int) -> frozenset[int]:
    """Samples to capture within the budget, spread over the batch and other ones at another `turn`.

    They are tried in the order of the golden-ratio sequence, whose first n members lie evenly for every n.
    """
    order = sorted(num_bytes, key=lambda i: ((i + 1 + turn) * _GOLDEN) % 1.0)
    chosen, left = [], max_bytes
    for i in order:
        if num_bytes[i] <= left:
            chosen.append(i)
            left -= num_bytes[i]
    return frozenset(chosen)


@dataclass
class StageRecorder:
    """Copies rows of the chosen samples from this pipeline stage's modules while a micro-batch runs.

    `gather_sequence` makes [T, 1, H] of the [T / ranks, 1, H] that a module puts out under sequence parallelism.
    """

    modules: dict[str, nn.Module]
    hidden_size: int
    chosen: frozenset[int]
    gather_sequence: Callable[[torch.Tensor], torch.Tensor]
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
        try:
            yield
        finally:
            self._spans = None

    def _hook(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            if self._spans is None:
                return
            hidden = output[0] if isinstance(output, tuple) else output  # a decoder layer returns (hidden, context)
            self.keep(name, self.gather_sequence(hidden.detach())[:, 0], self._spans)

        return record

    def keep(self, name: str, rows_TX: torch.Tensor, spans: Mapping[int, tuple[int, int]]) -> None:
        kept = self.rows.setdefault(name, {})
        for i, (start, end) in spans.items():
            kept[i] = rows_TX[start:end].clone()  # a view would keep the whole activation alive

    def keep_logits(self, logits_TV: torch.Tensor, batch: MicroBatch, group: dist.ProcessGroup | None) -> None:
        """Rows of the output layer, gathered over the tensor-parallel group to the whole vocabulary."""
        for i, (start, end) in batch.spans.items():
            if i in self.chosen:
                part = logits_TV[start:end].detach()
                self.keep(LOGITS, _gather_vocabulary(part, group), {i: (0, end - start)})

    def bring_to_last_stage(self, group: dist.ProcessGroup) -> None:
        """Sends what earlier pipeline stages recorded to the last one, one message a stage. Collective in `group`."""
        names: list[list[str]] = [[] for _ in range(group.size())]
        dist.all_gather_object(names, [name for name in self.rows if name != LOGITS], group=group)
        order = sorted(self.chosen)
        last = group.size() - 1
        if group.rank() < last and names[group.rank()] and order:
            message = torch.cat(
                [torch.cat([self.rows[name][i] for i in order]) for name in names[group.rank()]], dim=-1
            )
            dist.send(message, group=group, group_dst=last)
        elif group.rank() == last and order:
            self._receive(names[:last], order, group)

    def _receive(self, names: Sequence[Sequence[str]], order: Sequence[int], group: dist.ProcessGroup) -> None:
        lengths = [self.rows[LOGITS][i].shape[0] for i in order]
        for stage, stage_names in enumerate(names):
            if not stage_names:
                continue
            message = self.rows[LOGITS][order[0]].new_empty(sum(lengths), len(stage_names) * self.hidden_size)
            dist.recv(message, group=group, group_src=stage)
            for name, block in zip(stage_names, message.chunk(len(stage_names), dim=-1), strict=True):
                self.rows[name] = dict(zip(order, block.split(lengths), strict=True))

    def draft_samples(self, samples: Sequence[Sample], spec: CaptureSpec) -> list[DraftSample]:
        """What the last stage holds, in sample order."""
        return [self._draft_sample(samples[i], i, spec) for i in sorted(self.chosen)]

    def _draft_sample(self, sample: Sample, index: int, spec: CaptureSpec) -> DraftSample:
        request = sample.request
        logits_TV = self.rows[LOGITS][index]
        return DraftSample(
            prompt_id=request.prompt_id,
            sample_id=request.sample_id,
            token_ids=torch.tensor([*request.prompt_ids, *sample.token_ids], device=logits_TV.device),
            embeds=self.rows[EMBEDS][index],
            aux_hidden=torch.cat([self.rows[aux_name(k)][index] for k in spec.aux_layer_ids], dim=-1),
            target_logits=logits_TV,
            prompt_len=len(request.prompt_ids),
            temperature=request.sampling.temperature,
            seed=request.sampling.seed,
            policy_version=sample.policy_versions[-1].version,
        )


def _gather_vocabulary(part_TV: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return part_TV
    parts = [torch.empty_like(part_TV) for _ in range(group.size())]
    dist.all_gather(parts, part_TV.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
