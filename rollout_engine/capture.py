"""What a draft learns from, taken by the compact decoder: the policy's states on texts that are known whole.

In a run the policy's own training forward gives these states for nothing. Where there is no such forward (a draft that
is fine-tuned, or measured, on recorded text) this one pass over the text gives the same.

Axes: B texts, T tokens of the longest, A captured width (3H).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from draft_models.types import DraftSample
from rollout_engine.decoder import Decoder
from rollout_engine.kv_cache import KVCache
from rollout_engine.types import Sample

_MAX_PADDED_TOKENS = 4096  # of one forward


@torch.no_grad()
def capture_samples(decoder: Decoder, samples: Sequence[Sample], aux_layer_ids: Sequence[int]) -> list[DraftSample]:
    """Hidden states of each sample's prompt and response, in the order of `samples`, in the decoder's dtype.

    Layer id k is the OUTPUT of layer k, as in SGLang. All share the decoder's output layer as `target_head`. The caller
    bounds the memory: a token takes 5 H numbers, kept as long as its DraftSample.
    """
    captured: dict[int, DraftSample] = {}
    for batch in _by_length([len(s.request.prompt_ids) + len(s.token_ids) for s in samples]):
        captured |= zip(batch, _forward(decoder, [samples[i] for i in batch], tuple(aux_layer_ids)), strict=True)
    return [captured[i] for i in range(len(samples))]


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of bounded padded size, short ones first, so that little is padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[index] > _MAX_PADDED_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _forward(decoder: Decoder, samples: Sequence[Sample], aux_layer_ids: tuple[int, ...]) -> list[DraftSample]:
    texts = [s.request.prompt_ids + s.token_ids for s in samples]
    width = max(map(len, texts))
    ids_BT = torch.tensor([text + (0,) * (width - len(text)) for text in texts], device=decoder.device)
    positions_BT = torch.arange(width, device=decoder.device).expand(len(texts), -1)
    config = decoder.config
    cache = KVCache(config.num_layers, len(texts), config.num_kv_heads, config.head_dim, decoder.embed)
    cache.reserve(width)
    out = decoder.forward(ids_BT, positions_BT, cache.view(len(texts), width), capture=aux_layer_ids)
    assert out.aux_BMA is not None
    return [
        _draft_sample(decoder, sample, ids_BT[b, : len(text)], out.aux_BMA[b, : len(text)], out.hidden_BMH[b])
        for b, (sample, text) in enumerate(zip(samples, texts, strict=True))
    ]


def _draft_sample(
    decoder: Decoder, sample: Sample, ids_T: torch.Tensor, aux_TA: torch.Tensor, hidden_TH: torch.Tensor
) -> DraftSample:
    sampling = sample.request.sampling
    return DraftSample(
        prompt_id=sample.request.prompt_id,
        sample_id=sample.request.sample_id,
        token_ids=ids_T,
        embeds=torch.nn.functional.embedding(ids_T, decoder.embed),
        aux_hidden=aux_TA,
        target_hidden=hidden_TH[: len(ids_T)],
        target_head=decoder.head,
        prompt_len=len(sample.request.prompt_ids),
        temperature=sampling.temperature,
        seed=sampling.seed,
        policy_version=0,
    )
