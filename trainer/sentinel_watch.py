"""The sentinel in a run: looks at every rollout, and at an alarm the run goes on without speculation.

Every rank holds one, in the same state; only rank 0 has an engine to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from draft_models.sentinel import Alarm, Look, Pattern, Sentinel
from rollout_engine.config import RolloutConfig
from rollout_engine.types import Sample
from trainer.config import RunConfig
from trainer.config_check import why_unwatched
from trainer.draft_forecast import Key
from trainer.draft_learner import choose_look

# What each pattern points to, and where to look; with and without looks before that were sound.
_CAUSES = {
    (Pattern.LOST, False): (
        "the engine never had the draft that the learner has: no or a foreign lm_head, random weights, or the "
        "policy's tensors under the draft's names",
        "compare the tensors of the draft that was loaded with draft/ of the run",
    ),
    (Pattern.LOST, True): (
        "the engine lost its draft: not filled again after its memory was given back, or overwritten",
        "look at what happened to the engine before that step (offload, a restart, another publisher)",
    ),
    (Pattern.CHAIN, False): (
        "the first draft of a step is right and the later ones are not: positions, KV rows or states handed on "
        "within the chain",
        "set rollout.speculative_num_steps = 1, and compare the engine's chain with draft_models.training.unroll",
    ),
    (Pattern.DIFFERENT, False): (
        "the engine runs the draft on something else than the learner: other captured layers, another layout of "
        "q, k and v, another norm or dtype, or an older draft",
        "compare draft.aux_layer_ids, rollout.dtype and the tensors of engine and draft/",
    ),
    (Pattern.HIGHER, False): (
        "the engine accepts more than draft and policy can have: another rule or temperature than it was told, or "
        "it counts otherwise; its samples may not follow the policy's law",
        "look at surprise_gap_z and logp_diff_mean before you trust the run",
    ),
}


class SentinelWatch:
    """`stopped`: the engine decodes plainly because of an alarm."""

    def __init__(self, config: RunConfig) -> None:
        speculation, rollout = config.speculation, config.rollout
        self._config = config
        self._is_on = speculation.sentinel and rollout.speculative_algorithm == "EAGLE3" and not why_unwatched(config)
        self._sentinel = Sentinel(speculation.sentinel_alpha)
        self.stopped = False

    @property
    def is_watching(self) -> bool:
        return self._is_on and self._sentinel.alarm is None

    def choose(self, samples: Sequence[Sample], plan: Sequence[frozenset[Key]], step: int) -> frozenset[Key]:
        """Samples to look at beside those of the draft's first update."""
        if not self.is_watching:
            return frozenset()
        return choose_look(samples, plan, self._config.speculation.sentinel_tokens, self._config.seed, step)

    def take(self, look: Look | None, step: int) -> tuple[dict[str, Any], str]:
        """Metrics of the step, and the alarm in one line, or ''. Afterwards `stopped` says whether the engine is to
        stop. `look` is None in a step that compared nothing."""
        if look is None or look.num_steps == 0:
            return {}, ""
        alarm = self._sentinel.take(look, step)
        found = look_metrics(look) | {"sentinel_evidence": self._sentinel.evidence}
        if alarm is None:
            return found, ""
        self.stopped = can_stop(self._config.rollout)
        line = alarm_line(alarm, self._config)
        return found | {"sentinel_alarm": line}, line

    def state(self) -> dict[str, Any]:
        """For a checkpoint's counters: JSON."""
        return {"sentinel": self._sentinel.state(), "stopped": self.stopped}

    def resume(self, state: dict[str, Any] | None) -> None:
        """`state` is None from a checkpoint made before there was one. What was stopped stays so, unless the sentinel
        is off now: whoever mended the engine says so by that."""
        if state is None or not self._is_on:
            return
        self._sentinel.load_state(state["sentinel"], self._config.rollout.speculative_num_steps)
        self.stopped = state["stopped"]


def look_metrics(look: Look) -> dict[str, Any]:
    num_steps = float(look.num_steps)
    return {
        "sentinel_verify_steps": int(num_steps),
        "sentinel_accept_length": 1 + float(look.observed_K.sum()) / num_steps,
        "sentinel_expected_accept_length": 1 + float(look.expected_K.sum()) / num_steps,
        "sentinel_z": look.z,
        "sentinel_z_by_position": look.z_by_position,
    }


def can_stop(rollout: RolloutConfig) -> bool:
    """An engine is replaced by one without a draft; a server at an address is not ours to restart."""
    return not (rollout.engine == "sglang" and rollout.sglang_address)


def plain_rollout(rollout: RolloutConfig) -> RolloutConfig:
    """The same engine without speculation."""
    flags = {name: value for name, value in rollout.sglang.items() if not name.startswith("speculative_")}
    return replace(rollout, speculative_algorithm="NONE", speculative_draft_model_path="", sglang=flags)


def alarm_line(alarm: Alarm, config: RunConfig) -> str:
    """What was seen, what follows, what it likely is and how to mend it, in one line."""
    if can_stop(config.rollout):
        outcome = "speculation is stopped and the run goes on without it"
    else:
        outcome = (
            f"the server at {config.rollout.sglang_address} cannot stop speculating and goes on (its samples stay the "
            "policy's); restart it without a draft"
        )
    since = "since the first step" if not alarm.was_sound else f"since step {alarm.since_step}"
    lengths, expected_lengths = f"{alarm.accept_length:.2f}", f"{alarm.expected_accept_length:.2f}"
    rates, expected = ("/".join(f"{r:.2f}" for r in rates) for rates in (alarm.rates, alarm.expected_rates))
    cause, mend = _CAUSES.get((alarm.pattern, alarm.was_sound)) or _CAUSES[alarm.pattern, False]
    changed = f" (it was sound up to there: look at the sync of version {alarm.since_step})" if alarm.was_sound else ""
    return (
        f"sentinel, step {alarm.step}: {outcome}; {since} the engine brought {lengths} tokens a verify step where its "
        f"draft and policy should bring {expected_lengths} (by position {rates} for {expected}, over {alarm.num_steps} "
        f"steps; a sound engine does so in at most {config.speculation.sentinel_alpha:g} of all runs). Likely "
        f"cause{changed}: {cause}. To mend it: {mend}; then --resume with --speculation.sentinel false speculates again"
    )
