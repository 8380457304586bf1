"""Does the engine accept what its draft and policy should? A test that may be looked at after every step, for ever.

Given a text, each verification's number n of accepted drafts has a known law (`draft_models.forecast`). The sentinel
bets against it: a bet pays exp(tilt * f(n)) / E[exp(tilt * f(n))], so that its capital has expectation 1 at most while
the engine is sound, and by Ville's inequality ever reaches 1/alpha with probability alpha at most, however often one
looks (Ville 1939; test martingales: Ramdas, Gruenwald, Vovk, Shafer 2023). The bets differ in what they tilt (all
drafts, the first, the later ones), in direction and in strength, and their capital is averaged. Since an engine
may break at any time, capital enters at every look: the k-th gets the share 1/(k (k + 1)), the shares of all looks
together being 1 (a mixture over change points; Shin, Ramdas, Rinaldo 2023).

Which texts are looked at may depend on what they say, and not on how they were decoded: those that finished first, say,
accepted more than they should have.

Rounding is no fault: a sound engine may accept with any chance within `min_effect` of the forecast, at every place as
is worst for the bet. E[.] is the greatest that this allows, which a backward recursion finds exactly.

Axes: Q chains of all texts end to end, K draft depth, S verify steps, B texts, C bets.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from draft_models.forecast import forecast_acceptance
from draft_models.histogram_law import (
    STRONGEST,
    bounds,
    step_law,
    step_log_norm,
    texts_log_norm,
    texts_variance,
    unsure,
)

_STRENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0, STRONGEST)  # nats an accepted draft
_GROUPS = ("all", "first", "later")  # which drafts a bet looks at
_TRACE_WIDTH = 3


@dataclass(frozen=True, slots=True)
class Bet:
    """Pays more for more accepted drafts of its group where `tilt` is positive, for fewer where it is negative."""

    group: str
    tilt: float

    def exponent(self, num_accepted: int) -> float:
        counted = {"all": num_accepted, "first": min(num_accepted, 1), "later": max(num_accepted - 1, 0)}
        return self.tilt * counted[self.group]


BETS = tuple(Bet(group, sign * tilt) for group in _GROUPS for tilt in _STRENGTHS for sign in (-1, 1))


@dataclass(frozen=True, slots=True)
class Look:
    """Sums over the verify steps of some texts. Looks at different texts add up."""

    num_steps: Tensor  # float64 scalar: observed
    observed_K: Tensor  # float64: accepted drafts by position
    expected_K: Tensor  # in as many steps
    variance_K: Tensor  # of the difference
    variance: Tensor  # float64 scalar: of all positions' together
    log_gain_C: Tensor  # float64: of each bet, in nats

    @classmethod
    def nothing(cls, depth: int) -> Look:
        sizes = {"num_steps": (), "variance": (), "log_gain_C": (len(BETS),)}
        return cls(**{f.name: torch.zeros(sizes.get(f.name, (depth,)), dtype=torch.float64) for f in fields(cls)})

    def __add__(self, other: Look) -> Look:
        return Look(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def flat(self) -> Tensor:
        """One float64 vector, for a sum over ranks."""
        return torch.cat([getattr(self, f.name).reshape(-1) for f in fields(self)])

    @classmethod
    def from_flat(cls, flat: Tensor, depth: int) -> Look:
        shapes = [getattr(cls.nothing(depth), f.name).shape for f in fields(cls)]
        parts = flat.split([shape.numel() for shape in shapes])
        return cls(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))

    @property
    def z(self) -> float:
        """Of all accepted drafts: about a standard normal for a sound engine. 0 where nothing could vary or did."""
        return _z(float(self.observed_K.sum()), float(self.expected_K.sum()), float(self.variance))

    @property
    def z_by_position(self) -> list[float]:
        return [
            _z(*figures)
            for figures in zip(
                self.observed_K.tolist(), self.expected_K.tolist(), self.variance_K.tolist(), strict=True
            )
        ]


_NO_CHANCE_VARIANCE = 0.25  # of a count that cannot vary, as under greedy: one token more or less is rounding


def _z(observed: float, expected: float, variance: float) -> float:
    return (observed - expected) / math.sqrt(max(variance, _NO_CHANCE_VARIANCE))


# ------------------------------------------------------------ evidence of one look


def look_at_traces(posterior_QK: Tensor, num_chains: Sequence[int], traces: Sequence[bytes], min_effect: float) -> Look:
    """The engine says what each of its decode steps did, so that all starts are known.

    Args:
        posterior_QK: `forecast.accept_posterior` by chain and draft position; that of rank c follows response token c.
        num_chains: by text, response length - 1.
        traces: by text int16 [decode steps, 3]: proposals of the draft model, drafts accepted, tokens kept.

    Raises:
        ValueError: a trace that does not end where its text does.
    """
    depth = posterior_QK.shape[1]
    starts, left, steps = _starts(num_chains, traces)
    proposed_S, accepted_S = steps[:, 0], steps[:, 1]
    position_K = torch.arange(depth)
    inside_SK = position_K < torch.minimum(proposed_S, left)[:, None]
    chance_SK = torch.where(inside_SK, posterior_QK.cpu().double()[starts], 0.0)
    exponent_CM = _exponents(depth)
    after_SCM = torch.zeros(len(starts), 1, depth + 1, dtype=torch.float64)
    log_norm_SC = step_log_norm(*bounds(chance_SK, inside_SK, min_effect), after_SCM, exponent_CM)
    variance_F = _step_variance(step_law(unsure(chance_SK, inside_SK, min_effect)), _features(depth)).sum(0)
    return Look(
        num_steps=torch.tensor(len(starts), dtype=torch.float64),
        observed_K=(accepted_S[:, None] > position_K).sum(0).double(),
        expected_K=chance_SK.cumprod(-1).sum(0),
        variance_K=variance_F[:depth],
        variance=variance_F[depth],
        log_gain_C=(exponent_CM[:, accepted_S].T - log_norm_SC).sum(0),
    )


def look_at_counts(
    posterior_QK: Tensor, num_chains: Sequence[int], histograms: Sequence[Sequence[int]], min_effect: float
) -> Look:
    """The engine says only how often it accepted n drafts, n = 0..K, in each text; it always drafts K.

    Where its steps started follows a renewal process, whose law is that of the forecast. Drafts that were accepted
    behind the end of a text are taken out: tokens and steps tell how many they were. The position that they leave is
    taken to be the last ones of the longest step, which the bets do not depend on.
    """
    depth = posterior_QK.shape[1]
    counts_BM = torch.tensor([kept_histogram(h, n) for h, n in zip(histograms, num_chains, strict=True)]).double()
    chance_QK = posterior_QK.cpu().double()
    exponent_CM = _exponents(depth)
    log_norm_C = texts_log_norm(chance_QK, num_chains, exponent_CM, min_effect)
    forecast = forecast_acceptance(chance_QK, num_chains, depth)
    rate_K = torch.tensor(forecast.accepted_by_position, dtype=torch.float64) / forecast.num_verify_steps
    feature_MF = _features(depth) - torch.cat((rate_K, rate_K.sum()[None]))
    variance_F = texts_variance(chance_QK, num_chains, feature_MF, min_effect)
    return Look(
        num_steps=counts_BM.sum(),
        observed_K=torch.stack([counts_BM[:, position + 1 :].sum() for position in range(depth)]),
        expected_K=rate_K * counts_BM.sum(),
        variance_K=variance_F[:depth],
        variance=variance_F[depth],
        log_gain_C=exponent_CM @ counts_BM.sum(0) - log_norm_C,
    )


def is_of_text(histogram: Sequence[int], num_chains: int) -> bool:
    """Whether these steps alone can have brought a text of `num_chains` + 1 tokens, all but the first.

    Those of a request that SGLang threw back for want of KV memory cannot: every new prefill brings a token too.
    """
    return 0 <= _num_behind(histogram, num_chains) <= _longest(histogram)


def kept_histogram(histogram: Sequence[int], num_chains: int) -> list[int]:
    """The histogram `is_of_text` without the drafts that were accepted behind the text's end.

    Every step emits its accepted drafts and one token more, and all but the last are wholly inside the text.
    """
    kept = list(histogram)
    num_behind = _num_behind(histogram, num_chains)
    if num_behind > 1:  # one is the bonus token, of the accepted drafts none
        longest = _longest(histogram)
        kept[longest] -= 1
        kept[longest - num_behind + 1] += 1
    return kept


def _num_behind(histogram: Sequence[int], num_chains: int) -> int:
    """Tokens that the steps emitted behind the text's end."""
    return sum((n + 1) * count for n, count in enumerate(histogram)) - num_chains


def _longest(histogram: Sequence[int]) -> int:
    return max((n for n, count in enumerate(histogram) if count), default=0)


def _starts(num_chains: Sequence[int], traces: Sequence[bytes]) -> tuple[Tensor, Tensor, Tensor]:
    """Of every step in which the model drafted: its chain [S], tokens of the text behind that [S], counts [S, 3]."""
    chains, left, steps = [], [], []
    first = 0
    for number, trace in zip(num_chains, traces, strict=True):
        step_S3 = torch.frombuffer(bytearray(trace), dtype=torch.int16).long().reshape(-1, _TRACE_WIDTH)
        rank_S = step_S3[:, 2].cumsum(0) - step_S3[:, 2]
        if int(step_S3[:, 2].sum()) != number:
            raise ValueError(f"the decode steps of a text of {number} tokens kept {int(step_S3[:, 2].sum())}")
        drafted_S = step_S3[:, 0] > 0
        chains.append(first + rank_S[drafted_S])
        left.append(number - rank_S[drafted_S])
        steps.append(step_S3[drafted_S])
        first += number
    return torch.cat(chains), torch.cat(left), torch.cat(steps)


def _exponents(depth: int) -> Tensor:
    """[C, K + 1]: what each bet makes of n accepted drafts."""
    return torch.tensor([[bet.exponent(n) for n in range(depth + 1)] for bet in BETS], dtype=torch.float64)


def _features(depth: int) -> Tensor:
    """[K + 1, K + 1]: what n accepted drafts add to each position's count, and in the last column to all."""
    accepted_M1 = torch.arange(depth + 1)[:, None]
    return torch.cat((accepted_M1 > torch.arange(depth), accepted_M1), dim=1).double()


def _step_variance(law_SM: Tensor, feature_MF: Tensor) -> Tensor:
    return law_SM @ feature_MF**2 - (law_SM @ feature_MF) ** 2


# ------------------------------------------------------------ evidence over looks


class Pattern(StrEnum):
    """How observation differs from the forecast, which is what points to the cause."""

    LOST = "lost"  # little is left at the first draft, and so at all
    CHAIN = "chain"  # the first draft is right, later ones are not
    DIFFERENT = "different"  # less at every position, yet far from nothing
    HIGHER = "higher"  # more than draft and policy can have


_LOST_BELOW = 0.5  # of the expected acceptance of the first draft
_SAME_ABOVE = 0.95


def pattern(look: Look) -> Pattern:
    """Of the verify steps since an engine went wrong."""
    if look.z > 0:
        return Pattern.HIGHER
    kept = float(look.observed_K[0] / look.expected_K[0]) if look.expected_K[0] > 0 else 1.0
    if kept < _LOST_BELOW:
        return Pattern.LOST
    return Pattern.CHAIN if kept > _SAME_ABOVE else Pattern.DIFFERENT


@dataclass(frozen=True, slots=True)
class Alarm:
    """What the sentinel has seen, over the looks since it began to differ."""

    step: int  # of the look at which it was sure
    since_step: int  # of the look from which on it differs
    was_sound: bool  # looks before that one agreed
    pattern: Pattern
    num_steps: int
    accept_length: float
    expected_accept_length: float
    rates: tuple[float, ...]  # accepted / verify steps, by position
    expected_rates: tuple[float, ...]


_NUM_KEPT = 64  # looks from which an alarm can tell what it saw


class Sentinel:
    """Adds looks up and says when they can no longer be chance. After its first alarm it is done."""

    def __init__(self, alpha: float) -> None:
        """`alpha`: the chance of ever raising an alarm for a sound engine, at most."""
        self.alpha = alpha
        self.alarm: Alarm | None = None
        self._num_looks = 0
        self._log_capital_C = torch.full((len(BETS),), -math.inf, dtype=torch.float64)
        self._since_C = torch.zeros(len(BETS), dtype=torch.int64)  # the look from which on each bet wins most
        self._looks: deque[tuple[int, Look]] = deque(maxlen=_NUM_KEPT)

    @property
    def evidence(self) -> float:
        """log of the average capital, in nats: an alarm is due at log(1 / alpha)."""
        waiting = -math.log(self._num_looks + 1)  # the capital of all looks to come
        invested = float(self._log_capital_C.logsumexp(0)) - math.log(len(BETS))
        return float(torch.logaddexp(torch.tensor(waiting), torch.tensor(invested)))

    def take(self, look: Look, step: int) -> Alarm | None:
        """The next look, at the rollout of `step`; returns the alarm when it is the one that decides."""
        if self.alarm is not None or look.num_steps == 0:
            return None
        self._num_looks += 1
        self._looks.append((step, look))
        entering = -math.log(self._num_looks * (self._num_looks + 1))
        self._since_C[self._log_capital_C < entering] = self._num_looks
        self._log_capital_C = torch.logaddexp(self._log_capital_C, torch.tensor(entering).double()) + look.log_gain_C
        if self.evidence < -math.log(self.alpha):
            return None
        self.alarm = self._tell(step)
        return self.alarm

    def _tell(self, step: int) -> Alarm:
        since = int(self._since_C[self._log_capital_C.argmax()])
        bad = list(self._looks)[-(self._num_looks - since + 1) :]
        total = bad[0][1]
        for _, look in bad[1:]:
            total = total + look
        num_steps = float(total.num_steps)
        return Alarm(
            step=step,
            since_step=bad[0][0],
            was_sound=since > 1,
            pattern=pattern(total),
            num_steps=int(num_steps),
            accept_length=1 + float(total.observed_K.sum()) / num_steps,
            expected_accept_length=1 + float(total.expected_K.sum()) / num_steps,
            rates=tuple((total.observed_K / num_steps).tolist()),
            expected_rates=tuple((total.expected_K / num_steps).tolist()),
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON-able."""
        capital = self._log_capital_C.tolist() if self._num_looks else []
        return {
            "num_looks": self._num_looks,
            "log_capital": capital,
            "since": self._since_C.tolist(),
            "looks": [[step, look.flat().tolist()] for step, look in self._looks],
            "alarm": None if self.alarm is None else asdict(self.alarm),
        }

    def load_state(self, state: Mapping[str, Any], depth: int) -> None:
        """`depth`: that of the looks, K."""
        self._num_looks = state["num_looks"]
        if state["log_capital"]:
            self._log_capital_C = torch.tensor(state["log_capital"], dtype=torch.float64)
        self._since_C = torch.tensor(state["since"])
        flats = ((step, torch.tensor(flat, dtype=torch.float64)) for step, flat in state["looks"])
        self._looks = deque(((step, Look.from_flat(flat, depth)) for step, flat in flats), maxlen=_NUM_KEPT)
        alarm = state["alarm"]
        if alarm is not None:
            lists = {name: tuple(alarm[name]) for name in ("rates", "expected_rates")}
            self.alarm = Alarm(**{**alarm, **lists, "pattern": Pattern(alarm["pattern"])})


def visible_change(acceptance: Sequence[float], num_steps: int, *, alpha: float, min_effect: float) -> float:
    """The loss of acceptance, the same at every position, that the first look of `num_steps` steps sees half the time.

    `acceptance`: the forecast's, by position given that the drafts before stood, taken to be the same everywhere. A
    change after t sound looks needs about 2 log(t + 1) nats more. 1.0 when nothing smaller is seen.
    """
    depth = len(acceptance)
    chance_1K = torch.tensor([acceptance], dtype=torch.float64)
    inside_1K = torch.ones_like(chance_1K)
    exponent_CM = _exponents(depth)
    after_1CM = torch.zeros(1, 1, depth + 1, dtype=torch.float64)
    log_norm_C = step_log_norm(*bounds(chance_1K, inside_1K, min_effect), after_1CM, exponent_CM)[0]
    needed = -math.log(alpha)

    def evidence(change: float) -> float:
        law_M = step_law((chance_1K - change).clamp(min=0))[0]
        gain_C = num_steps * (exponent_CM @ law_M - log_norm_C)
        return float(gain_C.logsumexp(0)) - math.log(2 * len(BETS))  # half of the capital enters at the first look

    low, high = 0.0, 1.0
    if evidence(high) < needed:
        return high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if evidence(middle) >= needed else (middle, high)
    return high
