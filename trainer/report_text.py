"""What the report says in words: every sentence is computed from the metrics lines, none is a claim of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.metrics import MAX_SURPRISE_Z, total_surprise
from trainer.progress import phase_seconds

Lines = Sequence[Mapping[str, Any]]
EVEN = 0.05  # a speed this near to 1 is neither faster nor slower: a single probe is not more exact
MEASUREMENTS = ("eval", "probe")  # phases that a run without measurements would not have

ENGINES = {"torch": "embedded engine", "sglang": "engine SGLang"}

RULES = {
    "greedy": "greedy: a draft token is kept when it is the policy's own argmax. Exact at temperature 0.",
    "target_only": "target-only: the draft's argmax is kept with the policy's probability of it, else a token is "
    "drawn from the policy without it. Exact: the tokens follow the policy's law.",
    "rejection": "rejection sampling: a token drawn from the draft is kept with min(1, p/q), else one is drawn from "
    "the positive part of p - q. Exact: the tokens follow the policy's law.",
    "coupled": "coupled: policy and draft share the random noise, and a draft token is kept when both choose it. "
    "Exact, and the tokens are those of plain decoding.",
}


def rule_name(config: Mapping[str, Any]) -> str:
    """The verification rule that a run's settings lead to: a key of RULES, or "none" without speculation."""
    rollout = config.get("rollout", {})
    if rollout.get("speculative_algorithm", "NONE").upper() == "NONE":
        return "none"
    if rollout.get("temperature") == 0:
        return "greedy"
    if rollout["speculative_algorithm"].upper() == "NGRAM" and rollout.get("verify_rule") == "rejection":
        return "target_only"  # a point-mass proposal: rejection and target-only are the same rule
    return rollout.get("verify_rule", "none")


def allows_lossy(config: Mapping[str, Any]) -> bool:
    """Whether the run could have settings under which its samples leave the policy's law."""
    rollout = config.get("rollout", {})
    return bool(rollout.get("allow_lossy")) and rollout.get("engine") == "sglang"


def caveats(config: Mapping[str, Any]) -> str:
    """What a reader has to know about this engine's samples before comparing runs; '' when there is nothing."""
    if config.get("rollout", {}).get("engine") != "sglang":
        return ""
    lossy = " Lossy settings were allowed: see the settings before you call the rule exact." * allows_lossy(config)
    return f" SGLang takes no seeds: an equal run gives other samples.{lossy}"


def values(lines: Lines, key: str) -> list[float]:
    return [line[key] for line in lines if key in line]


def window(count: int) -> int:
    """How many steps at either end are averaged for a run's start and end: a fifth of them, at most five."""
    return max(1, min(5, count // 5))


def start_and_end(lines: Lines, key: str) -> tuple[float, float] | None:
    """Means over the first and over the last `window` steps that have the metric; None without any."""
    found = values(lines, key)
    if not found:
        return None
    n = window(len(found))
    return sum(found[:n]) / n, sum(found[-n:]) / n


def change(lines: Lines, key: str, name: str, spec: str = ".2f") -> str:
    """One sentence: from where to where a metric went."""
    ends = start_and_end(lines, key)
    if ends is None:
        return f"{name} was not recorded in this run."
    count = len(values(lines, key))
    if count == 1:
        return f"{name} was {ends[0]:{spec}} in the one step that recorded it."
    n = window(count)
    how = "first and last step" if n == 1 else f"means of the first and last {n} steps"
    return f"{name} went from {ends[0]:{spec}} to {ends[1]:{spec}} ({how})."


def draft_loss(lines: Lines) -> str:
    kinds = [line["draft_loss_kind"] for line in lines if "draft_loss_kind" in line]
    return change(lines, "draft_loss", f"Draft loss ({kinds[-1]})" if kinds else "Draft loss")


def draft_acceptance(lines: Lines) -> str:
    """The ends of the first and of the last unroll step."""
    rows = [line["draft_accept_by_step"] for line in lines if line.get("draft_accept_by_step")]
    if not rows:
        return "The rule's acceptance in training was not recorded in this run."
    first, last = rows[0], rows[-1]
    depth = min(len(first), len(last))
    return (
        f"On the texts learned from, the verify rule would have accepted {first[0]:.0%} of the draft's first tokens in "
        f"the first step and {last[0]:.0%} in the last; of its tokens {depth}, {first[depth - 1]:.0%} and "
        f"{last[depth - 1]:.0%}."
    )


def accept_length(lines: Lines) -> str:
    text = change(lines, "accept_length", "Accept length")
    frozen = [line for line in lines if "frozen_accept_length" in line and "predicted_accept_length" in line]
    if frozen:
        last = frozen[-1]
        text += (
            f" Drafting the full depth at step {last['step']}, the trained draft would have had "
            f"{last['predicted_accept_length']:.2f} tokens per verify step, the frozen one "
            f"{last['frozen_accept_length']:.2f}."
        )
    return text + history(lines)


def history(lines: Lines) -> str:
    """What history drafts did over the run; empty where there were none."""
    needed = {"verify_steps", "history_verify_steps", "history_accept_length"}
    with_history = [line for line in lines if needed <= line.keys()]
    if not with_history:
        return ""
    steps = sum(line["history_verify_steps"] for line in with_history)
    length = sum(line["history_verify_steps"] * line["history_accept_length"] for line in with_history) / steps
    share = steps / sum(line["verify_steps"] for line in with_history)
    model = [line for line in with_history if "draft_accept_length" in line]
    of_model = [line["verify_steps"] - line["history_verify_steps"] for line in model]
    text = (
        f" In the steps where siblings and earlier epochs were looked up, {share:.0%} of the verify steps took their "
    )
    text += f"drafts from there, at {length:.2f} tokens each"
    if model:
        length = sum(n * line["draft_accept_length"] for n, line in zip(of_model, model, strict=True)) / sum(of_model)
        text += f"; the others were the draft model's, at {length:.2f}"
    return f"{text}.{history_tokens(with_history)}"


def history_tokens(lines: Lines) -> str:
    """How many of either drafter's tokens stood; empty for metrics that were written without these counts."""
    counted = [
        line for line in lines if {"history_proposed", "history_accepted", "proposed_by_position"} <= line.keys()
    ]
    proposed, accepted = (sum(line[f"history_{what}"] for line in counted) for what in ("proposed", "accepted"))
    if not proposed:
        return ""
    text = f" Of history's {proposed:,} drafted tokens {accepted / proposed:.0%} stood"
    others = sum(sum(line["proposed_by_position"]) for line in counted) - proposed
    if others:
        stood = sum((line["accept_length"] - 1) * line["verify_steps"] for line in counted) - accepted
        text += f", of the model's {others:,} {stood / others:.0%}"
    return text + "."


def forecast(lines: Lines) -> str:
    """How far the learner's expectation was from what the engine showed, at worst."""
    both = [line for line in lines if "accept_length" in line and "expected_accept_length" in line]
    if not both:
        return "The learner's expectation was not recorded in this run." + sentinel(lines)
    worst = max(both, key=lambda line: abs(line["accept_length"] - line["expected_accept_length"]))
    gap = abs(worst["accept_length"] - worst["expected_accept_length"])
    return (
        f"The largest gap between expected and observed accept length was {gap:.2f}, at step {worst['step']} "
        f"({worst['expected_accept_length']:.2f} expected, {worst['accept_length']:.2f} observed)."
    ) + sentinel(lines)


def sentinel(lines: Lines) -> str:
    """Whether the engine drafted and accepted as draft and policy should; '' where nothing watched it."""
    looks = [line for line in lines if {"sentinel_evidence", "sentinel_verify_steps"} <= line.keys()]
    if not looks:
        return ""
    alarms = [line["sentinel_alarm"] for line in looks if "sentinel_alarm" in line]
    if alarms:
        stopped = any("speculation_stopped" in line for line in lines)
        return f" {'Speculation was stopped' if stopped else 'An alarm was raised'}: {alarms[0]}."
    steps = sum(line["sentinel_verify_steps"] for line in looks)
    nearest = max(line["sentinel_evidence"] for line in looks)
    return (
        f" The sentinel held {steps} verify steps against their own forecasts and raised no alarm (its evidence never "
        f"passed {nearest:.1f} nats)."
    )


def logp_gap(lines: Lines) -> str:
    maxima = [line for line in lines if "logp_diff_max" in line]
    if not maxima:
        return "The log-probabilities were not compared in this run."
    worst = max(maxima, key=lambda line: line["logp_diff_max"])
    mean = max(values(lines, "logp_diff_mean"), default=None)
    text = f"The largest difference of any token was {worst['logp_diff_max']:.2g} nats, at step {worst['step']}"
    text += f"; the largest mean of a step was {mean:.2g}." if mean is not None else "."
    return text + surprise(lines)


def surprise(lines: Lines) -> str:
    """Whether the tokens were drawn from the policy's own law, over the whole run; empty where no step tells."""
    seen = total_surprise(lines)
    if seen is None:
        return ""
    verdict = "as it is when tokens are drawn from the policy's own law"
    if abs(seen.z) >= MAX_SURPRISE_Z:
        verdict = (
            "too far from 0 for tokens drawn from the policy's own law (but top-p, top-k and min-p make it negative)"
        )
    gap = f"{seen.mean:+.4f} nats from the entropy, z = {seen.z:+.1f}"
    return f" Over the run, -log p of the sampled tokens lies {gap}: {verdict}."


def speed(lines: Lines) -> str:
    """Speed against plain decoding at the last probe, and why it is what it is."""
    probes = [line for line in lines if "speedup_vs_plain" in line]
    if not probes:
        return (
            "Plain decoding was not measured in this run; plain_probe_interval = N rolls out every N-th step's prompts "
            "once more without speculation."
        )
    last = probes[-1]
    ratio = last["speedup_vs_plain"]
    text = (
        f"At step {last['step']} the rollout ran at {ratio:.2f} times the speed of plain decoding of the same prompts. "
    )
    if "tokens_per_forward" not in last:
        return text.strip()
    if last.get("decode_steps"):
        text += f"{last.get('verify_steps', 0) / last['decode_steps']:.0%} of its forwards verified drafts. "
    gain = last["tokens_per_forward"]
    cost = gain / ratio
    text += (
        f"A forward of the policy gave a sequence {gain:.2f} tokens, and took {cost:.2f} times as long as a plain one"
    )
    if abs(ratio - 1) < EVEN:
        return text + ": speculation was about as fast as plain decoding."
    if ratio < 1:
        return text + (
            f": drafting and verifying cost more than they brought, so speculation was slower here. It would break "
            f"even at {cost:.2f} tokens per forward, or with a cheaper forward: a larger policy or a smaller batch, "
            "where the time goes into reading weights and further tokens are nearly free."
        )
    return text + ": the tokens brought more than drafting and verifying cost, so speculation was faster."


def anatomy(lines: Lines) -> str:
    totals: dict[str, float] = {}
    for line in lines:
        for name, seconds in phase_seconds(line).items():
            totals[name] = totals.get(name, 0.0) + seconds
    if not totals:
        return "The time of the phases was not recorded in this run."
    whole = sum(totals.values())
    shares = ", ".join(f"{n} {s / whole:.1%}" for n, s in sorted(totals.items(), key=lambda item: -item[1]))
    measuring = sum(totals.get(name, 0.0) for name in MEASUREMENTS)
    note = f" Of these {measuring:.1f} s were measurement, not training (eval, probe)." if measuring else ""
    return f"{whole:.1f} s in all: {shares}.{note}"


def draft_account(lines: Lines) -> str:
    """What speculation saved and the draft cost over the run, and in how many steps it trained and why."""
    saved, spent = values(lines, "draft_saved_time_s"), values(lines, "draft_spent_time_s")
    if not saved or not spent:
        return "No draft was trained or scored in this run."
    bases = {line.get("draft_saved_time_basis") for line in lines}
    at_most = "at most " if "bound" in bases else ""
    whole = sum(sum(phase_seconds(line).values()) for line in lines)
    share = f", {sum(spent) / whole:.1%} of the run's time" if whole else ""
    text = f"Speculation saved {at_most}{sum(saved):.1f} s of rollouts"
    if sum(saved) < 0:
        text = f"Rollouts took {-sum(saved):.1f} s longer than they would have without speculation"
    text += f"; the draft's updates and syncs took {sum(spent):.1f} s{share}."
    if at_most:
        text += (
            " What a step that verifies costs was not known in every step (plain_probe_interval measures it): there it "
            "is taken to cost no more than a plain one."
        )
    shares = values(lines, "draft_token_share")
    if shares:
        trained = sum(share > 0 for share in shares)
        text += f" It trained in {trained} of {len(shares)} steps, on {sum(shares) / len(shares):.0%} of the tokens."
    reasons = Counter(line["draft_decision"] for line in lines if "draft_decision" in line)
    if reasons:
        text += f" Decisions: {', '.join(f'{reason} {count}' for reason, count in reasons.most_common())}."
    if reasons["losing"]:
        text += " In the steps called losing the draft cost more than it brought, and training promised no change."
    return text


def lengths(lines: Lines) -> str:
    last = lines[-1]
    if "response_len_max" not in last or "response_len_p50" not in last:
        return "Response lengths were not recorded in the last step."
    text = (
        f"In the last step half of the responses had at most {last['response_len_p50']} tokens and the longest had "
        f"{last['response_len_max']}."
    )
    cut = last.get("finish_reasons", {}).get("length", 0)
    total = sum(last.get("finish_reasons", {}).values())
    return text + (f" {cut} of {total} were cut off by the length limit." if total else "")


def running(lines: Lines) -> str:
    profiles = [line for line in lines if "running_batch" in line]
    if not profiles:
        return "The running batch was not recorded in this run."
    profile = profiles[-1]["running_batch"]
    peak = max(profile)
    thin = sum(n <= peak / 4 for n in profile) / len(profile)
    return (
        f"At step {profiles[-1]['step']} the batch peaked at {peak:.0f} running requests; during {thin:.0%} of the "
        "rollout's time a quarter of that or less was running."
    )
