"""`report.html` of a run: one self-contained page made from config.toml and metrics.jsonl alone."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sync.atomic import write_file
from trainer import report_plots as plots
from trainer import report_text as text
from trainer.metrics import METRICS_FILE, MetricsError, read_metrics
from trainer.progress import number, phase_seconds
from trainer.report_page import Card, Tile, flatten, folded, page, table

REPORT_FILE = "report.html"
CONFIG_FILE = "config.toml"
STEP_COLUMNS = (  # metrics key, heading, format
    ("step", "step", "d"),
    ("reward", "reward", ".3f"),
    ("eval_reward", "eval", ".3f"),
    ("accept_length", "accept length", ".2f"),
    ("expected_accept_length", "expected", ".2f"),
    ("predicted_accept_length", "predicted at full depth", ".2f"),
    ("frozen_accept_length", "frozen draft", ".2f"),
    ("draft_accept_length", "draft model's steps", ".2f"),
    ("history_accept_length", "history's steps", ".2f"),
    ("history_share", "their share", ".0%"),
    ("tokens_per_forward", "tokens/forward", ".2f"),
    ("tokens_per_s", "tokens/s", ".0f"),
    ("speedup_vs_plain", "vs plain", ".2f"),
    ("logp_diff_mean", "mean Δlogp", ".1e"),
    ("logp_diff_max", "max Δlogp", ".1e"),
    ("response_len_mean", "mean length", ".1f"),
    ("response_len_max", "longest", "d"),
    ("entropy", "entropy", ".3f"),
    ("draft_loss", "draft loss", ".3f"),
    ("draft_decision", "draft", "s"),
    ("draft_token_share", "learned from", ".0%"),
    ("draft_saved_time_s", "saved s", ".2f"),
    ("draft_spent_time_s", "spent s", ".2f"),
    ("policy_version", "version", "d"),
)


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path. Raises MetricsError (one line) for files that cannot be read."""
    lines = read_metrics(run_dir / METRICS_FILE)
    config = read_config(run_dir / CONFIG_FILE)
    title = f"Slipstream run: {config.get('name', run_dir.name)}"
    html = page(title, lead(lines, config), tiles(lines, config), cards(lines), tables(lines, config))
    path = run_dir / REPORT_FILE
    write_file(path, html)
    return path


def read_config(path: Path) -> dict[str, Any]:
    """The resolved settings of the run. MetricsError names a file that is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MetricsError(f"{path}: no settings there; give the folder of a run (it holds {CONFIG_FILE})") from error
    except tomllib.TOMLDecodeError as error:
        raise MetricsError(f"{path}: not TOML ({error}); restore the file") from error


def lead(lines: text.Lines, config: Mapping[str, Any]) -> str:
    rule = text.rule_name(config)
    what = f"Verification rule: {text.RULES[rule]}" if rule in text.RULES else "No speculation in this run."
    rollout = config.get("rollout", {})
    engine = text.ENGINES.get(rollout.get("engine", "torch"), "unknown engine")
    drafter = rollout.get("speculative_algorithm", "none")
    depth = rollout.get("speculative_num_steps")
    speculation = f"drafter {drafter}" + (f", up to {depth} draft tokens" if depth else "")
    seconds = sum(sum(phase_seconds(line).values()) for line in lines)
    count = f"{len(lines)} steps" if len(lines) > 1 else "1 step"
    return f"{count}, {seconds:.0f} s; {engine}, {speculation}. {what}{text.caveats(config)}"


def tiles(lines: text.Lines, config: Mapping[str, Any]) -> list[Tile]:
    """The run's key numbers; one that was not measured says so."""
    probes = [line for line in lines if "speedup_vs_plain" in line]
    speed = Tile("speed vs plain decoding", "not measured")
    if probes:
        low, high = (f(line["speedup_vs_plain"] for line in probes) for f in (min, max))
        note = f"last of {len(probes)} probes; {low:.2f} to {high:.2f}" if len(probes) > 1 else "one probe"
        speed = Tile("speed vs plain decoding", f"{probes[-1]['speedup_vs_plain']:.2f} x", note)
    rule = text.rule_name(config)
    exactness = "lossy settings allowed" if text.allows_lossy(config) else "exact"
    return [
        span_tile("reward", lines, "reward", ".2f"),
        span_tile("accept length", lines, "accept_length", ".2f"),
        speed,
        Tile("verification rule", rule.replace("_", "-"), "no speculation" if rule == "none" else exactness),
        span_tile("tokens per second", lines, "tokens_per_s", ".0f"),
    ]


def span_tile(name: str, lines: text.Lines, key: str, spec: str) -> Tile:
    ends = text.start_and_end(lines, key)
    if ends is None:
        return Tile(name, "not recorded")
    count = len(text.values(lines, key))
    if count == 1:
        return Tile(name, f"{ends[0]:{spec}}", "one step")
    n = text.window(count)
    note = "first → last step" if n == 1 else f"first {n} → last {n} steps"
    return Tile(name, f"{ends[0]:{spec}} → {ends[1]:{spec}}", note)


def cards(lines: text.Lines) -> list[Card]:
    """Every figure with its words, in the order in which one asks."""

    def svg(figure: Any) -> str | None:
        drawn = figure(lines)
        return None if drawn is None else plots.to_svg(drawn, figure.__name__)

    return [
        Card("Reward", svg(plots.reward), text.change(lines, "reward", "Mean reward"), ALARMS["reward"]),
        Card("Accept length", svg(plots.accept_length), text.accept_length(lines), ALARMS["accept_length"]),
        Card("Acceptance by position", svg(plots.acceptance_by_position), text.forecast(lines), ALARMS["position"]),
        Card("Speed against plain decoding", svg(plots.speed_vs_plain), text.speed(lines), ALARMS["speed"]),
        Card("|logp of trainer - logp of rollout|", svg(plots.logp_gap), text.logp_gap(lines), ALARMS["logp"]),
        Card("Anatomy of a step", svg(plots.step_anatomy), text.anatomy(lines), ALARMS["anatomy"]),
        Card("Response length", svg(plots.response_length), text.lengths(lines), ALARMS["length"]),
        Card(
            "Distribution of lengths",
            svg(plots.length_histogram),
            "Share of samples by response length, in bins that double.",
            ALARMS["histogram"],
        ),
        Card("Running batch", svg(plots.running_batch), text.running(lines), ALARMS["running"]),
        Card(
            "Throughput",
            svg(plots.throughput),
            text.change(lines, "tokens_per_s", "Tokens per second", ".0f"),
            ALARMS["throughput"],
        ),
        Card("Saved and spent by the draft", svg(plots.draft_account), text.draft_account(lines), ALARMS["account"]),
        Card("Draft loss", svg(plots.draft_loss), text.draft_loss(lines), ALARMS["draft"]),
        Card(
            "Acceptance in the draft's training",
            svg(plots.draft_acceptance),
            text.draft_acceptance(lines),
            ALARMS["draft_acceptance"],
        ),
        Card("Entropy", svg(plots.entropy), text.change(lines, "entropy", "Entropy of the policy"), ALARMS["entropy"]),
    ]


def tables(lines: text.Lines, config: Mapping[str, Any]) -> list[str]:
    shown = [column for column in STEP_COLUMNS if any(column[0] in line for line in lines)]
    rows = [[number(line, key, spec) for key, _, spec in shown] for line in lines]
    steps = table([title for _, title, _ in shown], rows)
    phases = sorted({name for line in lines for name in phase_seconds(line)})
    times = table(["step", *phases], [phase_row(line, phases) for line in lines])
    settings = table([], flatten(config), "settings")
    return [
        folded("All steps, in numbers", steps),
        folded("Seconds by phase", times),
        folded("Settings of the run", settings),
    ]


def phase_row(line: Mapping[str, Any], phases: list[str]) -> list[str]:
    seconds = phase_seconds(line)
    return [str(line["step"]), *(f"{seconds[name]:.3f}" if name in seconds else "·" for name in phases)]


ALARMS = {
    "reward": "a curve that stays flat while most groups carry a signal, or falls and does not come back; an "
    "evaluation that falls while the training reward rises.",
    "accept_length": "observed clearly below expected (the engine does not run the draft that the learner thinks it "
    "runs: look at sync, layout and dtype), or a trained draft that does no better than the frozen one.",
    "position": "a solid curve that leaves its dotted forecast; the first position falling step after step while the "
    "policy learns.",
    "speed": "below 1 for long with an adaptive controller: its cost table is then wrong for this machine.",
    "logp": "a jump, or a mean above about 1e-2: trainer and engine then disagree about the policy (weights, dtype, "
    "temperature or position), and the gradient is no longer that of the tokens.",
    "anatomy": "draft or sync taking a growing share; a phase that grows from step to step.",
    "length": "the maximum sitting on the length limit for ever more samples, or the median collapsing.",
    "histogram": "one bar at the far right: responses that never end.",
    "running": "a long thin tail: most of the time then goes to a few long responses.",
    "throughput": "a fall that neither longer responses nor a lower accept length explains.",
    "account": "the spent curve rising as fast as the saved one: draft.train_when = 'pays' trains less; a saved curve "
    "that falls: the draft costs more than it brings.",
    "draft": "a loss that rises over many steps: the policy moves faster than the draft learns.",
    "draft_acceptance": "a loss that falls while this stands: draft.loss does not fit the verify rule; late steps far "
    "below the first: the draft is unrolled for fewer steps than the engine drafts.",
    "entropy": "a drop towards zero early: the policy has collapsed; high acceptance is then no merit of the draft.",
}
