"""The ablation of drafts: what its arms differ in, that it goes on where it stopped, that its tables tell the truth."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import draft_ablation, draft_ablation_arms, draft_ablation_report, draft_ablation_train
from benchmarks.draft_ablation_arms import BASE, PLANS, REHEARSAL, Plan, arms_of, jobs_of
from benchmarks.draft_ablation_report import Ablation, cell, fill, updates_to_plateau
from benchmarks.draft_ablation_texts import HELD_OUT, TRAIN, Recorded, Texts, fingerprint
from draft_models.losses import LossKind
from rollout_engine.types import FinishReason, RolloutRequest, Sample
from tests.draft_helpers import TARGET_CONFIG, random_sample
from trainer import make_model as make_model_module
from trainer.config import ConfigError
from trainer.make_model import Shape

# ---- arms ----


def test_an_arm_differs_from_the_base_in_what_it_is_named_for():
    arms = arms_of(Plan())
    base = asdict(arms[0])
    assert len({arm.name for arm in arms}) == len(arms)
    for arm in arms[1:]:
        differs = {key for key, value in asdict(arm).items() if value != base[key]} - {"name", "axis"}
        allowed = {
            "loss": {"loss"},
            "learning": {"lr", "batch_tokens", "updates", "ema"},
            "unroll": {"unroll", "step_decay"},
            "window": {"window", "first_tokens"},
            "temperature": {"temperature", "loss"},
            "vocabulary": {"draft_vocab", "loss"},
            "length": {"updates", "unroll", "loss"},
        }
        assert differs and differs <= allowed[arm.axis], arm.name
        if arm.axis != "length":
            assert arm.updates * arm.batch_tokens == base["updates"] * base["batch_tokens"], arm.name
    asked = {(arm.axis, arm.loss) for arm in arms}
    assert {loss for axis, loss in asked if axis == "loss"} == set(LossKind) - {LossKind.CROSS_ENTROPY}
    assert {arm.unroll for arm in arms} == {1, 3, 7} and {arm.window for arm in arms} == {0, 512}
    assert [arm.axis for arm in arms] == sorted((arm.axis for arm in arms), key=draft_ablation_arms.AXES.index)


def test_all_seeds_of_an_arm_come_before_the_next_arm():
    arms = arms_of(REHEARSAL)[:2]
    assert [(arm.name, seed) for arm, seed in jobs_of(arms, (0, 1))] == [
        (arm.name, seed) for arm in arms for seed in (0, 1)
    ]


def test_the_plans_can_be_trained_on_what_they_record():
    for plan in PLANS.values():
        assert set(plan.train_temperatures) <= set(plan.temperatures) and max(plan.curve_at) < 16 * plan.updates
        assert plan.max_response_len < plan.context_length and max(plan.depths) == 7


# ---- data order ----


def test_batches_are_the_seeds_alone_and_meet_every_text_equally_often():
    lengths = [3, 9, 4, 4, 8, 2]
    first = list(itertools.islice(draft_ablation_train.batches(lengths, 10, 1), 40))
    assert first == list(itertools.islice(draft_ablation_train.batches(lengths, 10, 1), 40))
    assert first != list(itertools.islice(draft_ablation_train.batches(lengths, 10, 2), 40))
    assert all(sum(lengths[i] for i in batch) <= 10 for batch in first)
    counts = [sum(batch.count(i) for batch in first) for i in range(len(lengths))]
    assert max(counts) - min(counts) <= 1
    assert next(draft_ablation_train.batches([50], 10, 0)) == [0]  # at least one, however long


def test_a_text_is_cut_after_its_first_tokens():
    sample = random_sample(12, 4, 0)
    cut = draft_ablation_train.first_tokens(sample, 8)
    assert cut.token_ids.tolist() == sample.token_ids[:8].tolist() and cut.prompt_len == 4
    assert len(cut.embeds) == len(cut.aux_hidden) == len(cut.target_hidden) == 8
    assert cut.target_head is sample.target_head
    assert draft_ablation_train.first_tokens(sample, 12) is sample is draft_ablation_train.first_tokens(sample, 0)


def test_the_curves_text_is_bounded():
    samples = [random_sample(10, 4, seed) for seed in range(5)]
    assert draft_ablation_train.beginning(samples, 13) == samples[:2]
    assert draft_ablation_train.beginning(samples, 1) == samples[:1]


# ---- one arm ----


def texts_of(*samples) -> Texts:
    return Texts(TARGET_CONFIG, {1.0: list(samples)}, {1.0: list(samples)}, {})


SMALL = replace(REHEARSAL, temperatures=(1.0,), train_temperatures=(1.0,), updates=30, curve_at=(10, 20), lr=3e-3)


def test_an_arm_learns_and_is_the_same_again():
    texts = texts_of(*(random_sample(20, 4, seed) for seed in range(3)))
    arm = arms_of(SMALL)[0]
    record = draft_ablation_train.train_arm(arm, 0, texts, SMALL, "cpu")
    again = draft_ablation_train.train_arm(arm, 0, texts, SMALL, "cpu")
    assert record["curve"] == again["curve"] and record["acceptance"] == again["acceptance"]
    alone = texts_of(random_sample(20, 4, 0))  # so that seeds cannot differ in the order of the data
    first, other = (draft_ablation_train.train_arm(arm, seed, alone, SMALL, "cpu") for seed in (0, 1))
    assert other["curve"] != first["curve"]
    assert [point["update"] for point in record["curve"]] == [10, 20, 30]
    assert record["curve"][-1]["overlap_1"] > record["curve"][0]["overlap_1"]
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]
    deepest = {(row["rule"], row["k"]): row["accept_length"] for row in record["acceptance"]}
    assert set(deepest) == {(rule, k) for rule in ("target_only", "rejection", "coupled") for k in (3, 5, 7)}
    assert deepest["rejection", 7] == record["curve"][-1]["accept_length"]  # the same text here
    json.dumps(record, allow_nan=False)


def test_a_draft_that_keeps_an_average_is_scored_by_it():
    texts = texts_of(random_sample(20, 4, 0))
    base = arms_of(SMALL)[0]
    plain, still = (
        draft_ablation_train.train_arm(replace(base, ema=ema), 0, texts, SMALL, "cpu") for ema in (0.0, 1.0)
    )
    overlaps = [point["overlap_1"] for point in still["curve"]]
    assert len(set(overlaps)) == 1 and overlaps[0] < plain["curve"][-1]["overlap_1"]  # the average never moves


def test_a_draft_over_the_frequent_tokens():
    samples = [random_sample(20, 4, seed) for seed in range(3)]
    arm = replace(arms_of(SMALL)[0], draft_vocab=10)
    record = draft_ablation_train.train_arm(arm, 0, texts_of(*samples), SMALL, "cpu")
    assert record["steps"][0]["kl"] == ()  # infinite: some tokens are out of reach
    assert record["steps"][0]["overlap"][0] < 1.0


def test_a_loss_that_is_not_finite_ends_the_arm_and_is_told():
    sample = random_sample(20, 4, 0)
    sample.aux_hidden[5] = math.nan
    record = draft_ablation_train.train_arm(arms_of(SMALL)[0], 0, texts_of(sample), SMALL, "cpu")
    assert record["failed"] == "loss not finite within 10 updates" and "acceptance" not in record


# ---- the command ----


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make_model_module.PRESETS, "3m", Shape(32, 7, 2, 1, 16, 48))
    plan = replace(REHEARSAL, warm_start_steps=2, warm_start_tokens=256, updates=2, curve_at=(1,), max_response_len=16)
    monkeypatch.setitem(PLANS, "rehearsal", plan)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def test_the_command_goes_on_where_it_was_cut_off(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    command = ["--plan", "rehearsal", "--work", str(tmp_path / "work"), "--out", str(out), "--seeds", "0,1"]
    train_arm, left = draft_ablation.train_arm, iter(range(3))

    def cut_off_in_the_fourth(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return train_arm(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(draft_ablation, "train_arm", cut_off_in_the_fourth)
        draft_ablation.main([*command, "--axes", "loss"])
    before = lines(out)
    assert len(before) == 3
    assert "* forward_kl, seed 1: the call ended before it." in draft_ablation_report.section(Ablation.read(out))

    draft_ablation.main([*command, "--axes", "loss"])
    after = lines(out)
    assert after[:3] == before and len(after) == 2 * 5
    assert all({"command", "hardware", "commit", "date", "plan", "fingerprint"} <= set(record) for record in after)
    text = draft_ablation_report.section(Ablation.read(out))
    assert "* unroll 7: not asked for." in text and "* forward_kl: " not in text.split("Empty cells")[1]

    with pytest.raises(ConfigError, match="holds runs on other texts or of other sizes"):
        draft_ablation.main([*command, "--updates", "5"])


def test_calls_side_by_side_share_their_folder(tmp_path: Path):
    """Each was opened before the other had finished anything."""

    def opened(*seeds: int) -> draft_ablation.Results:
        asked = {"arms": [BASE], "seeds": list(seeds)}
        about = {"fingerprint": "f", "plan": {}, "origin": {"command": "c"}, "asked": asked}
        return draft_ablation.Results.open(tmp_path, about)

    first, second = opened(1), opened(0)
    base = arms_of(REHEARSAL)[0]
    first.write_about({"base, seed 1": "no time"})
    for results, seed in ((first, 1), (second, 0)):
        results.add({"arm": asdict(base), "seed": seed})
    second.write_about({"base, seed 0": "no time"})
    first.write_about({})
    assert {record["seed"] for record in lines(tmp_path)} == {0, 1}
    about = draft_ablation.read_about(tmp_path)
    assert about["asked"]["seeds"] == [0, 1] and about["left_out"] == {"base, seed 0": "no time"}
    third = opened(0, 1)
    assert third.has(base, 0) and third.has(base, 1)


def test_without_time_nothing_begins_and_the_tables_say_so(
    tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    where = ["--work", str(tmp_path / "work"), "--out", str(out)]
    draft_ablation.main(["--plan", "rehearsal", *where, "--budget-s", "0", "--seeds", "0"])
    assert "no time for" in capsys.readouterr().out and not (out / "runs.jsonl").exists()
    draft_ablation_report.main([str(out), "--print"])
    said = capsys.readouterr().out
    assert f"| loss | {BASE}: lk |  |  |" in said and f"* {BASE}, seed 0: no time: 20 s needed, 0 s left." in said


def test_an_arm_begins_only_when_it_will_be_over_in_time():
    base, *others = arms_of(REHEARSAL)
    assert draft_ablation.expected_s(base, []) == draft_ablation.FIRST_GUESS_S

    def record(train_s: float) -> dict:
        return {"arm": asdict(base), "train_s": train_s, "score_s": 1.0}

    margin = draft_ablation._MARGIN
    assert draft_ablation.expected_s(base, [record(50.0), record(2.0)]) == pytest.approx(margin * 3.0)  # not the first
    deep = next(arm for arm in others if arm.unroll == 7)
    assert draft_ablation.expected_s(deep, [record(2.0)]) == pytest.approx(margin * (2.0 * 8 / 4 + 1.0))


def test_wrong_axes_are_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        draft_ablation.parse(["--work", "w", "--out", "o", "--axes", "los"])
    assert "unknown axis 'los'" in capsys.readouterr().err


def test_other_tokens_have_another_fingerprint():
    def recorded(*token_ids: int) -> list[Recorded]:
        sample = Sample(RolloutRequest(0, 0, (1,)), token_ids, (), (), FinishReason.STOP)
        return [Recorded(TRAIN, 1.0, (sample,)), Recorded(HELD_OUT, 1.0, (sample,))]

    assert fingerprint(recorded(1, 2)) == fingerprint(recorded(1, 2)) != fingerprint(recorded(1, 3))


# ---- tables ----


def test_updates_to_the_plateau_lie_between_scored_updates():
    def record(*points: tuple[int, float]) -> dict:
        return {"curve": [{"update": update, "accept_length": length} for update, length in points]}

    # From 1 at no update to 5: 90 % of the accepted drafts is an accept length of 4.6.
    assert updates_to_plateau(record((10, 3.0), (20, 5.0), (30, 5.0))) == pytest.approx(18.0)
    assert updates_to_plateau(record((10, 5.0))) == pytest.approx(9.0)
    assert updates_to_plateau(record((10, 1.0), (20, 1.0))) == 0.0  # it never left the start


def test_a_cell_is_the_mean_and_half_its_interval():
    assert cell([]) == "" and cell([1.234]) == "1.23"
    half = 4.303 * statistics.stdev([1.0, 2.0, 3.0]) / math.sqrt(3)
    assert cell([1.0, 2.0, 3.0]) == f"2.00 ± {half:.2f}"


def test_tables_come_from_the_records_paired_by_seed(tmp_path: Path):
    plan = replace(REHEARSAL, temperatures=(0.6, 1.0), depths=(7,))
    arms = arms_of(plan)[:2]
    about = {
        "plan": asdict(plan),
        "origin": {"command": "c", "commit": "abc", "date": "2026-01-01T00:00", "hardware": HARDWARE},
        "target": {"num_parameters": 3_000_000},
        "texts": [text_of(0.6, 1.0), text_of(1.0, 2.0), text_of(1.0, 2.0) | {"split": TRAIN}],
        "asked": {"arms": [arm.name for arm in arms], "seeds": [0, 1, 2]},
        "left_out": {f"{arms[1].name}, seed 0": "no time: 2 s needed, 1 s left"},
    }
    records = [record_of(arms[0], 0, 4.0), record_of(arms[0], 1, 5.0), record_of(arms[1], 1, 4.5)]
    records.append({"arm": asdict(arms[0]), "seed": 2, "failed": "loss not finite within 8 updates"})
    (tmp_path / "about.json").write_text(json.dumps(about))
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = draft_ablation_report.section(Ablation.read(tmp_path))
    half = f"{12.706 * statistics.stdev([4.0, 5.0]) / math.sqrt(2):.2f}"
    assert f"| loss | base: lk | 4.50 ± {half} |  |" in text
    assert "| loss | forward_kl | 4.50 | -0.50 |" in text  # against seed 1 of the base alone
    # Accept length grows by 1 from the colder text to the warmer, and the entropy by 1.
    assert "| forward_kl | 1 | 3.50 | 4.50 | 1.00 | 1.00 | 1.00 |" in text
    assert "* forward_kl, seed 0: no time: 2 s needed, 1 s left." in text
    assert "* base, seed 2: loss not finite within 8 updates." in text
    assert "* forward_kl, seed 2: the call ended before it." in text and "* unroll 1: not asked for." in text
    ablation = Ablation.read(tmp_path)
    head, _, row = draft_ablation_report.growth_table(ablation, arms_of(ablation.plan)[:1]).splitlines()
    by_update = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=False))
    assert by_update.pop("4") == f"4.50 ± {half}" and by_update.pop("arm") == "base: lk"
    assert not any(by_update.values()), "nothing was scored elsewhere"


HARDWARE = {"gpu": None, "cpu": "a processor", "threads": 1, "torch": "2"}


def text_of(temperature: float, entropy: float) -> dict:
    counts = dict.fromkeys(("samples", "response_tokens", "length_p50", "length_max", "cut_off"), 5)
    law = {"target_entropy": entropy, "target_max_prob": 0.5, "target_sum_p2": 0.4}
    ngram = {"ngram_accept_rate_1": 0.1, "ngram_tokens_per_verify": 1.1}
    return {"split": HELD_OUT, "temperature": temperature, **counts, **law, **ngram}


def record_of(arm, seed: int, length: float) -> dict:
    acceptance = [
        {
            "temperature": temperature,
            "rule": rule,
            "k": 7,
            "accept_length": length - (temperature < 1),
            "chain_rate_by_position": [0.5] * 7,
            "accept_length_by_rank": [length, None, None, None],
        }
        for temperature in (0.6, 1.0)
        for rule in ("target_only", "rejection", "coupled")
    ]
    steps = [{"temperature": temperature, "overlap": [0.8]} for temperature in (0.6, 1.0)]
    curve = [{"update": 4, "accept_length": length}]
    return {"arm": asdict(arm), "seed": seed, "curve": curve, "acceptance": acceptance, "steps": steps, "train_s": 1.0}


def test_tables_are_put_between_the_marks_and_nowhere_else():
    document = f"before\n{draft_ablation_report.BEGIN}\nold\n{draft_ablation_report.END}\nafter\n"
    filled = fill(document, "new")
    assert filled.startswith("before\n") and filled.endswith("\nafter\n") and "new" in filled and "old" not in filled
    assert fill(filled, "new") == filled
    with pytest.raises(ConfigError, match="are missing"):
        fill("no marks", "new")


def test_the_document_holds_what_the_records_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    document = draft_ablation_report.DOCUMENT
    copy = tmp_path / "drafters.md"
    copy.write_text(document.read_text())
    monkeypatch.setattr(draft_ablation_report, "DOCUMENT", copy)
    draft_ablation_report.main([])
    assert copy.read_text() == document.read_text(), f"run python -m {draft_ablation_report.MODULE}"


def test_training_on_a_fixed_target_leaves_the_recorded_states_alone():
    sample = random_sample(20, 4, 0)
    before = sample.aux_hidden.clone()
    draft_ablation_train.train_arm(arms_of(SMALL)[0], 0, texts_of(sample), SMALL, "cpu")
    assert torch.equal(sample.aux_hidden, before) and sample.aux_hidden.grad is None
