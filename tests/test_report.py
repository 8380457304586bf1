"""The report prints numbers that the metrics hold, needs nothing from outside, and works with partial data."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from tests.report_helpers import CONFIG, full_line, make_run
from trainer import report_text
from trainer.metrics import MetricsError
from trainer.progress import Progress, plain_line, sparkline
from trainer.report import write_report

LINES = [full_line(step) for step in range(6)]


class Page(HTMLParser):
    """The text of a page outside its style sheet, the texts of elements by class, and every address in it."""

    def __init__(self, html: str):
        super().__init__()
        self.texts: list[tuple[str, str]] = []  # (class of the innermost element with one, text)
        self.addresses: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        self.addresses += re.findall(r"url\(([^)]*)\)", " ".join(v or "" for v in attributes.values()))
        if tag not in ("meta", "use", "path", "rect", "br"):
            self._open.append((tag, attributes.get("class") or ""))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self._open and self._open[-1][0] != "style" and data.strip():
            self.texts.append((self._open[-1][1], data.strip()))

    def of_class(self, name: str) -> list[str]:
        return [text for css_class, text in self.texts if css_class == name]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text())


def test_the_key_numbers_are_those_of_the_metrics(tmp_path: Path):
    page = page_of(make_run(tmp_path, LINES))
    assert page.of_class("value") == ["0.10 → 0.60", "1.20 → 2.20", "0.80 x", "rejection", "700 → 750"]
    assert "last of 6 probes; 0.55 to 0.80" in page.of_class("note")


def test_the_table_of_steps_holds_every_line(tmp_path: Path):
    html = write_report(make_run(tmp_path, LINES)).read_text()
    for line in LINES:
        assert f"<td>{line['accept_length']:.2f}</td>" in html
        assert f"<td>{line['reward']:.3f}</td>" in html
        assert f"<td>{line['logp_diff_max']:.1e}</td>" in html


@pytest.mark.parametrize(
    ("settings", "said", "unsaid", "note"),
    [
        ("", "embedded engine, drafter EAGLE3", "SGLang", "exact"),
        ('engine = "sglang"\n', "engine SGLang, drafter EAGLE3", "Lossy", "exact"),
        ('engine = "sglang"\nallow_lossy = true\n', "takes no seeds: an equal run gives other samples. Lossy",
         "embedded", "lossy settings allowed"),
    ],
)  # fmt: skip
def test_the_report_names_the_engine_and_what_its_samples_are(tmp_path: Path, settings, said, unsaid, note):
    page = page_of(make_run(tmp_path, LINES, CONFIG + settings))
    (lead,) = [text for _, text in page.texts if "steps," in text and "drafter" in text]
    assert said in lead and unsaid not in lead
    assert note in page.of_class("note")


def test_another_run_gives_other_numbers(tmp_path: Path):
    """Negative control: were a number a constant of the page, both pages would show it."""
    worse = [line | {"speedup_vs_plain": 0.31, "reward": 0.02} for line in LINES]
    values = page_of(make_run(tmp_path, worse)).of_class("value")
    assert values[0] == "0.02 → 0.02" and values[2] == "0.31 x"


def test_the_page_needs_nothing_from_outside(tmp_path: Path):
    path = write_report(make_run(tmp_path, LINES))
    html = path.read_text()
    addresses = Page(html).addresses
    assert addresses and all(address.startswith("#") for address in addresses)
    assert "http" not in html and "@import" not in html and "<script" not in html
    ids = re.findall(r' id="([^"]*)"', html)
    assert {a[1:] for a in addresses} <= set(ids)


def test_every_figure_is_drawn_from_full_data_and_marked_empty_without(tmp_path: Path):
    full = write_report(make_run(tmp_path / "full", LINES)).read_text()
    assert full.count("<svg") == full.count('<figure class="card">') and "Nothing of this was recorded" not in full
    bare = write_report(make_run(tmp_path / "bare", [{"step": 0}])).read_text()
    assert bare.count("<svg") == 0
    assert bare.count("Nothing of this was recorded") == bare.count('<figure class="card">')


KEYS = tuple(key for key in full_line(0) if key != "step")


@pytest.mark.parametrize("missing", [KEYS[::2], KEYS[1::2], ("logp_diff_mean", "finish_reasons", "tokens_per_forward")])
def test_missing_keys_are_fine(tmp_path: Path, missing: tuple[str, ...]):
    one_step_without = [{k: v for k, v in full_line(2).items() if k not in missing}]
    page_of(make_run(tmp_path, one_step_without))


def test_a_key_that_only_some_steps_have_is_fine(tmp_path: Path):
    mixed = [line if line["step"] % 2 else {"step": line["step"], "reward": 0.0} for line in LINES]
    assert "accept length" in page_of(make_run(tmp_path, mixed)).of_class("name")


def test_the_frozen_draft_is_compared_with_the_trained_one_at_equal_depth():
    line = {"step": 2, "accept_length": 1.5, "predicted_accept_length": 2.75, "frozen_accept_length": 2.25}
    assert "would have had 2.75 tokens per verify step, the frozen one 2.25" in report_text.accept_length([line])


def test_history_and_the_draft_model_are_told_apart():
    good = {"proposed_by_position": [300, 200], "history_accepted": 30}
    poor = {"history_verify_steps": 120, "history_accept_length": 1.0, "history_proposed": 120, "history_accepted": 0}
    lines = [{**full_line(0), **good}, {**full_line(1), **good, **poor}]
    said = report_text.accept_length(lines)
    assert "30% of the verify steps took their drafts from there, at 1.50 tokens each" in said
    assert "the others were the draft model's, at 1.19" in said
    assert "Of history's 300 drafted tokens 10% stood, of the model's 700 21%." in said
    older = [{key: value for key, value in line.items() if key != "history_proposed"} for line in lines]
    assert report_text.accept_length(older).endswith("at 1.19.")
    without = {key: value for key, value in full_line(2).items() if "history" not in key}
    assert "siblings" not in report_text.accept_length([without])


def test_zero_log_prob_difference_is_said_though_a_log_axis_cannot_draw_it(tmp_path: Path):
    lines = [line | {"logp_diff_mean": 0.0, "logp_diff_max": 0.0} for line in LINES]
    html = write_report(make_run(tmp_path, lines)).read_text()
    assert "The largest difference of any token was 0 nats" in html


def test_slow_speculation_is_said_with_its_reason():
    line = {"step": 4, "speedup_vs_plain": 0.5, "tokens_per_forward": 1.5}
    said = report_text.speed([line])
    assert "0.50 times the speed" in said and "slower" in said
    assert "1.50 tokens, and took 3.00 times as long" in said  # 1.5 / 0.5
    assert "75% of its forwards verified drafts" in report_text.speed([full_line(3)])
    assert "faster" in report_text.speed([line | {"speedup_vs_plain": 1.2}])
    assert "about as fast" in report_text.speed([line | {"speedup_vs_plain": 0.98}])
    assert "not measured" in report_text.speed([{"step": 0}])


@pytest.mark.parametrize(
    ("rollout", "rule"),
    [
        ({"speculative_algorithm": "EAGLE3", "verify_rule": "coupled", "temperature": 1.0}, "coupled"),
        ({"speculative_algorithm": "EAGLE3", "verify_rule": "coupled", "temperature": 0.0}, "greedy"),
        ({"speculative_algorithm": "NGRAM", "verify_rule": "rejection", "temperature": 1.0}, "target_only"),
        ({"speculative_algorithm": "NONE", "verify_rule": "rejection", "temperature": 1.0}, "none"),
    ],
)
def test_the_rule_named_is_the_one_that_ran(rollout: dict, rule: str):
    assert report_text.rule_name({"rollout": rollout}) == rule


def test_what_the_draft_saved_and_cost_is_summed_and_a_bound_is_called_one():
    said = report_text.draft_account(LINES)
    assert "saved 12.0 s of rollouts" in said and "took 3.0 s, 10.0% of the run's time" in said
    assert "trained in 3 of 6 steps, on 25% of the tokens" in said and "rising 3, losing 3" in said
    assert "cost more than it brought" in said
    bound = report_text.draft_account([line | {"draft_saved_time_basis": "bound"} for line in LINES[:3]])
    assert "at most 6.0 s" in bound and "cost more" not in bound
    assert "draft losing" in plain_line(LINES[5], 6)
    worse = report_text.draft_account([line | {"draft_saved_time_s": -1.0} for line in LINES])
    assert "Rollouts took 6.0 s longer than they would have without speculation" in worse


def test_text_of_the_run_cannot_become_markup(tmp_path: Path):
    config = CONFIG.replace("made-up", "<script>alert(1)</script>")
    assert "<script" not in write_report(make_run(tmp_path, LINES, config)).read_text()


def test_broken_files_are_one_clear_error_and_no_page(tmp_path: Path):
    folder = make_run(tmp_path, LINES)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:7: not JSON") as caught:
        write_report(folder)
    assert "\n" not in str(caught.value) and not (folder / "report.html").exists()
    (folder / "config.toml").write_text("[rollout")
    make_lines_whole = (folder / "metrics.jsonl").read_text().splitlines()[:6]
    (folder / "metrics.jsonl").write_text("\n".join(make_lines_whole))
    with pytest.raises(MetricsError, match=r"config\.toml: not TOML"):
        write_report(folder)


def test_progress_without_a_terminal_is_one_line_a_step():
    console = Console(force_terminal=False, width=40, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with Progress(6, "made-up", console=console) as progress:
        for line in LINES[:2]:
            progress.status("rolling out")
            progress.step(line)
    shown = console.export_text().splitlines()
    assert len(shown) == 2 and shown[1].startswith("step 2/6 | reward 0.200 | accept len 1.40")


def test_progress_on_a_terminal_and_its_summary_show_the_metrics():
    console = Console(force_terminal=True, width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with Progress(6, "made-up", lines=LINES[:3], console=console) as progress:
        progress.step(LINES[3])
    progress.print_summary()
    shown = console.export_text()
    assert "4/6" in shown and "draft token 1" in shown and "predicted" in shown and "summary" in shown


def test_a_step_without_speculation_or_reward_is_shown():
    assert plain_line({"step": 0, "tokens_per_s": 10.0}, 1) == "step 1/1 | tok/s 10"
    assert sparkline([], 8) == "" and sparkline([1.0], 8) == "▁" and sparkline([0, 1, 2], 2) == "▁█"


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_report(make_run(tmp_path, LINES))
    old = path.read_text()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(make_run(tmp_path, LINES[:1]))
    assert path.read_text() == old


@pytest.mark.parametrize(("z", "words"), [(0.5, "as it is when tokens are drawn"), (-9.0, "too far from 0")])
def test_the_report_says_whether_tokens_came_from_the_policys_law(z, words):
    lines = [line | {"surprise_gap": 0.002 * z, "surprise_gap_z": z} for line in LINES]
    assert words in report_text.surprise(lines)
    assert f"z = {z * len(lines) ** 0.5:+.1f}" in report_text.surprise(lines)


def test_nothing_is_said_of_a_law_that_no_step_tells_of():
    assert report_text.surprise([{"logp_diff_max": 1.0}]) == ""


def test_the_draft_loss_is_named_and_stands_beside_the_rules_own_acceptance():
    assert report_text.draft_loss(LINES).startswith("Draft loss (lk) went from")
    said = report_text.draft_acceptance(LINES)
    assert "50% of the draft's first tokens" in said and "tokens 2, 40% and 55%" in said
    assert "not recorded" in report_text.draft_acceptance([{"step": 0}])
