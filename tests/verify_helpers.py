"""Exact enumeration of what speculative decoding emits, driving the real `verify`.

`verify` turns uniforms into decisions that are monotone in each uniform: a draft is kept below a threshold, and the
drawn token id grows with u. So the measure of every outcome is found by bisection on the function itself, whatever
formula stands in it, to the last bit of float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draft_models import verify as verify_module
from draft_models.types import VerifyRule
from draft_models.verify import Noise, expand_draft_vocab, target_probs
from rollout_engine.sampling import Proposal

Prefix = tuple[int, ...]
ALMOST_ONE = 1 - 2.0**-53


@dataclass(frozen=True)
class Toy:
    """A target and a proposal over a tiny vocabulary; both depend on the whole prefix and on nothing else."""

    rule: VerifyRule
    vocab: int = 3
    k: int = 2
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    q_temperature: float = 1.0
    q_top_p: float = 1.0
    q_top_k: int = 0
    q_ids: tuple[int, ...] = ()  # a reduced draft vocabulary
    q_is_p: bool = False
    vary_num_drafts: bool = False
    gives: bool = False  # after some prefixes, other drafts than the model's are proposed: point masses, and deeper
    peeks: bool = False  # a fault: whether drafts are given depends on the one that the model drew
    stale_q: bool = False  # a fault: verification is told the proposal of another prefix

    def p(self, prefix: Prefix) -> Tensor:
        return random_law((self.seed, 0, *prefix), self.vocab, self.temperature, self.top_p, self.top_k)

    def q(self, prefix: Prefix) -> Tensor:
        """The law of the proposal; a point mass (argmax) for target-only."""
        if self.q_is_p:
            return self.p(prefix)
        ids = self.q_ids or tuple(range(self.vocab))
        q = random_law((self.seed, 1, *prefix), len(ids), self.q_temperature, self.q_top_p, self.q_top_k)
        q = expand_draft_vocab(q, torch.tensor(ids), self.vocab)
        if self.rule is VerifyRule.TARGET_ONLY:
            return torch.nn.functional.one_hot(q.argmax(), self.vocab).double()
        return q

    def num_drafts(self, prefix: Prefix) -> int:
        return hash((self.seed, 2, *prefix)) % (self.k + 1) if self.vary_num_drafts else self.k

    def given(self, prefix: Prefix) -> Prefix:
        """1 to k + 1 tokens, or none, which leaves the draft model's."""
        number = hash((self.seed, 3, *prefix))
        if not self.gives or number % 2:
            return ()
        return tuple((number >> (5 * i)) % self.vocab for i in range(1, number // 2 % (self.k + 1) + 2))


@functools.cache
def random_law(key: Prefix, size: int, temperature: float, top_p: float, top_k: int) -> Tensor:
    seed = hash(key) % (1 << 62)  # the hash of integers is the same in every process
    logits = 1.5 * torch.randn(1, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return target_probs(logits, torch.tensor([temperature]), torch.tensor([top_p]), torch.tensor([top_k]))[0]


def plain_law(toy: Toy, length: int) -> Tensor:
    """P of every text of `length` tokens under plain sampling, [V] * length."""
    law = torch.zeros([toy.vocab] * length, dtype=torch.float64)
    for text in itertools.product(range(toy.vocab), repeat=length):
        law[text] = torch.stack([toy.p(text[:i])[text[i]] for i in range(length)]).prod()
    return law


def speculative_law(toy: Toy, length: int) -> Tensor:
    """P of every text's first `length` tokens when the real `verify` is called until they are there."""
    mass: dict[Prefix, float] = {(): 1.0}
    for done in range(length):
        starts = {prefix: weight for prefix, weight in mass.items() if len(prefix) == done}
        for (prefix, weight), law in zip(starts.items(), steps(toy, list(starts)), strict=True):
            del mass[prefix]
            for emitted, probability in law.items():
                text = (prefix + emitted)[:length]
                mass[text] = mass.get(text, 0.0) + weight * probability
    total = torch.zeros([toy.vocab] * length, dtype=torch.float64)
    for text, weight in mass.items():
        total[text] = weight
    return total


def steps(toy: Toy, prefixes: Sequence[Prefix]) -> list[dict[Prefix, float]]:
    """P of the tokens that one verification emits after each prefix, over all proposals and all uniforms.

    All prefixes' rows are verified in one batch, those with given drafts among the others.
    """
    rows = [(prefix, *row) for prefix in prefixes for row in proposals(toy, prefix)]
    given = [toy.given(prefix) for prefix, _, _ in rows]
    if toy.peeks:
        given = [tokens if tokens[:1] != draft[:1] else () for tokens, (_, draft, _) in zip(given, rows, strict=True)]
    padded = [draft + (0,) * (toy.k - len(draft)) for _, draft, _ in rows]
    q_BKV = torch.stack(
        [
            torch.stack([toy.q(((9,) if toy.stale_q else ()) + row[0] + d[:j]) for j in range(toy.k)])
            for row, d in zip(rows, padded, strict=True)
        ]
    )
    proposal = Proposal(torch.tensor(padded), q_BKV, [len(draft) for _, draft, _ in rows])
    if any(given):
        proposal = proposal.with_given(given)
    drafts = proposal.tokens_BK.tolist()
    p_BMV = torch.stack(
        [
            torch.stack([toy.p(row[0] + tuple(d[:j])) for j in range(len(d) + 1)])
            for row, d in zip(rows, drafts, strict=True)
        ]
    )
    assert proposal.probs_BKV is not None
    num_drafts = torch.tensor(proposal.num_drafts)
    outcome = outcome_law(toy.rule, p_BMV, proposal.probs_BKV, proposal.tokens_BK, num_drafts)
    laws: dict[Prefix, dict[Prefix, float]] = {prefix: {} for prefix in prefixes}
    for row, (prefix, _, chance) in enumerate(rows):
        for accepted in range(proposal.num_drafts[row] + 1):
            for token in range(toy.vocab):
                emitted = (*drafts[row][:accepted], token)
                probability = chance * outcome[row, accepted, token].item()
                laws[prefix][emitted] = laws[prefix].get(emitted, 0.0) + probability
    return [laws[prefix] for prefix in prefixes]


def proposals(toy: Toy, prefix: Prefix) -> list[tuple[Prefix, float]]:
    """Every chain that the draft model may propose after the prefix, with its chance; none where drafts are given."""
    n = 0 if toy.given(prefix) and not toy.peeks else toy.num_drafts(prefix)
    drafts = list(itertools.product(range(toy.vocab), repeat=n))
    chances = [torch.stack([toy.q(prefix + d[:j])[d[j]] for j in range(n)]).prod().item() if n else 1.0 for d in drafts]
    return [(d, chance) for d, chance in zip(drafts, chances, strict=True) if chance > 0]


def outcome_law(
    rule: VerifyRule, p_BMV: Tensor, q_BKV: Tensor | None, drafts_BK: Tensor, num_drafts_B: Tensor
) -> Tensor:
    """P(number accepted, final token) of one real verification, [B, M, V], measured by bisection."""
    rows, k = drafts_BK.shape
    vocab = p_BMV.shape[-1]

    def run(accept: Tensor, resample: Tensor) -> tuple[Tensor, Tensor]:
        noise = Noise(accept_BK=accept, resample_BM=resample[:, None].expand(rows, k + 1))
        result = verify_module.verify(rule, p_BMV, q_BKV, drafts_BK, num_drafts_B, noise)
        final = result.tokens_BM.gather(1, result.num_accepted_B[:, None])[:, 0]
        return result.num_accepted_B, final

    def uniforms_until(position: int, value: Tensor | float) -> Tensor:
        accept = torch.zeros(rows, k, dtype=torch.float64)  # 0 accepts whatever can be accepted
        if position < k:
            accept[:, position] = value
        return accept

    half = torch.full((rows,), 0.5, dtype=torch.float64)
    reach = torch.ones(rows, dtype=torch.float64)
    law = torch.zeros(rows, k + 1, vocab, dtype=torch.float64)
    for n in range(k + 1):
        if n < k:
            kept = measure(lambda u, n=n: run(uniforms_until(n, u), half)[0] > n, rows)
        else:
            kept = torch.zeros(rows, dtype=torch.float64)
        stop = uniforms_until(n, ALMOST_ONE)
        up_to = [measure(lambda u, t=t, s=stop: run(s, u)[1] <= t, rows) for t in range(vocab - 1)]
        cdf = torch.stack([torch.zeros_like(reach), *up_to, torch.ones_like(reach)], dim=1)
        law[:, n] = (reach * (1 - kept))[:, None] * cdf.diff(dim=1)
        reach = reach * kept
    return law


def measure(holds: Callable[[Tensor], Tensor], rows: int) -> Tensor:
    """The length of {u in [0, 1): holds(u)}, an interval that starts at 0, for each row."""
    low, high = torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
    at_zero = holds(low)
    for _ in range(54):
        middle = (low + high) / 2
        inside = holds(middle.clamp(max=ALMOST_ONE))
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where(at_zero, high, 0.0)
