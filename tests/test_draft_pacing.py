"""The account of what a draft saves and costs; and runs whose decisions are recorded, replayed and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_engine.speculation import CostTable, DepthController
from rollout_engine.types import FinishReason, RolloutRequest, Sample, SpecStats
from sync.publish import SyncReport
from tests import loop_helpers as helpers
from trainer import draft_ledger as ledger
from trainer import draft_schedule
from trainer.config import ConfigError, RunConfig
from trainer.config_check import validate
from trainer.draft_ledger import Ledger
from trainer.draft_pacing import DraftPacer
from trainer.draft_schedule import Decision, Reason
from trainer.metrics import read_metrics
from trainer.rollouts import Generated, Rollout
from trainer.schedule_record import append_decision, cut_schedule, read_schedule

Config = Callable[..., RunConfig]
TRAINED, SCORED = Decision(1.0, Reason.RISING), Decision(0.0, Reason.REST)


def generated(seconds: float, num_tokens: int, spec: SpecStats) -> Generated:
    sample = Sample(RolloutRequest(0, 0, (1,)), (1,) * num_tokens, (-1.0,) * num_tokens, (), FinishReason.STOP, spec)
    return Generated((sample,), seconds, ((0.0, 4), (seconds / 2, 2)))


def test_the_cost_of_verifying_gives_the_plain_time_back() -> None:
    """100 forwards, 60 of which verify at 1.5 times the cost of a plain one, and emit 190 tokens."""
    spec = SpecStats(100, 60, (10, 10, 40), (60, 60), (50, 40))
    fast = generated(40 * 0.1 + 60 * 0.15, 190, spec)
    plain = generated(38 * 0.1, 38, SpecStats(38))  # the same text law at another length
    cost = ledger.probed_cost(Rollout(fast, plain))
    assert cost == pytest.approx(1.5)
    assert ledger.plain_seconds(fast, cost) == pytest.approx(19.0)
    assert ledger.probed_cost(Rollout(fast, None)) is None
    hardly = SpecStats(100, 5, (0, 0, 5), (5, 5), (5, 5))
    assert ledger.probed_cost(Rollout(generated(10.0, 110, hardly), plain)) is None


def test_without_a_probe_the_engines_table_tells_the_cost_at_the_batch_and_depth_of_the_rollout() -> None:
    table = CostTable((1, 3, 8), ((1.0, 1.1, 1.2), (1.0, 1.5, 1.8), (1.0, 3.0, 6.0)))
    controller = DepthController(2, None)
    assert controller.step_costs() is None
    controller.load_state(controller.state() | {"table": asdict(table), "factors": [1.0, 1.0, 2.0]})
    spec = SpecStats(100, 60, (10, 10, 40), (60, 60), (50, 40))
    assert ledger.table_cost(controller.step_costs(), generated(1.0, 190, spec)) == pytest.approx(
        3.6
    )  # batch 3, depth 2
    assert ledger.table_cost(controller.step_costs(), generated(1.0, 100, SpecStats(100))) is None
    assert ledger.table_cost(None, generated(1.0, 190, spec)) is None


def test_training_is_timed_against_scoring_and_a_slow_first_step_is_forgotten() -> None:
    book = Ledger()
    assert book.train_s == 0.0
    for seconds, decision in (
        (9.0, TRAINED),
        (1.0, TRAINED),
        (4.7, Decision(8.0, Reason.RISING)),
        (0.3, SCORED),
        (0.6, Decision(0.5, Reason.KEEP)),
    ):
        book = ledger.with_draft_time(book, seconds, decision, at_hand=4.0)
    assert book.train_s == pytest.approx(1.1)  # the median of 8.7, 0.7 and 4.4 / 4, which were all the tokens
    assert ledger.with_draft_time(Ledger(), 1.0, TRAINED, at_hand=0.0) == Ledger()
    assert ledger.from_dict(json.loads(json.dumps(asdict(book)))) == book


def test_a_record_is_read_back_cut_and_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "schedule.jsonl"
    decisions = [TRAINED, Decision(1 / 3, Reason.KEEP), SCORED]
    for step, decision in enumerate(decisions):
        append_decision(path, step, decision)
    assert list(read_schedule(path, 3).values()) == decisions
    with pytest.raises(ConfigError, match="has no step 3, but num_rollout = 4"):
        read_schedule(path, 4)
    with path.open("a") as file:
        file.write('{"step": 3, "sha')  # a kill
    with pytest.raises(ConfigError, match="line 4 is not a decision"):
        read_schedule(path, 3)
    assert cut_schedule(path, 1) == {1: decisions[1], 2: decisions[2]}
    assert read_schedule(path, 1) == {0: TRAINED} and len(path.read_text().splitlines()) == 1
    path.write_text('{"step": 0, "share": -1.5, "reason": "rest"}\n')
    with pytest.raises(ConfigError, match=r"share = -1.5"):
        read_schedule(path, 1)
    assert cut_schedule(tmp_path / "none", 0) == {}


SPEC = SpecStats(200, 100, (40, 20, 40), (100, 100), (60, 40))  # half of the forwards verify; 2 tokens each
TABLE = CostTable((1,), ((1.0, 1.2, 1.6),))


def pacer(folder: Path, **changes: Any) -> DraftPacer:
    settings = {"draft__train_when": "pays", "rollout__speculative_num_steps": 2, "num_rollout": 50, **changes}
    return DraftPacer(helpers.tiny_config(folder, folder, "x", **settings), {}, folder / "record.jsonl")


def engine(*, has_draft: bool = True, table: CostTable | None = None) -> Any:
    plan = SimpleNamespace(has_draft=has_draft)
    return SimpleNamespace(step_costs=lambda: table, transport=SimpleNamespace(plan=plan))


def settle(pacer: DraftPacer, decision: Decision, seconds: float, forecast: float | None) -> dict[str, Any]:
    tensors = [SimpleNamespace(model="policy", num_bytes=300), SimpleNamespace(model="draft", num_bytes=100)]
    plan = SimpleNamespace(tensors=tensors, num_bytes=400)
    return pacer.settle(decision, seconds, SyncReport(1, 2, 400, 8.0), plan, forecast)


def test_what_is_saved_is_a_bound_until_a_cost_is_given_or_the_engine_has_a_table(tmp_path: Path) -> None:
    rollout = Rollout(generated(10.0, 300, SPEC), None)
    _, found = pacer(tmp_path).decide(0, rollout, 1.0, engine())
    assert (found["draft_saved_time_s"], found["draft_saved_time_basis"]) == (pytest.approx(5.0), "bound")
    _, found = pacer(tmp_path, draft__verify_cost=2.0).decide(0, rollout, 1.0, engine())
    assert (found["draft_saved_time_s"], found["draft_saved_time_basis"]) == (pytest.approx(0.0), "given")
    _, found = pacer(tmp_path, draft__verify_cost=2.0).decide(0, rollout, 1.0, engine(table=TABLE))
    assert found["draft_saved_time_basis"] == "table"
    assert found["draft_saved_time_s"] == pytest.approx(10.0 * 1.5 / 1.3 - 10.0)


def test_the_account_has_the_drafts_share_of_the_sync(tmp_path: Path) -> None:
    book = pacer(tmp_path)
    book.decide(0, Rollout(generated(10.0, 300, SPEC), None), 1.0, engine())
    assert settle(book, TRAINED, 1.5, None) == {
        "draft_spent_time_s": pytest.approx(1.5 + 8.0 / 4),
        "draft_balance_time_s": pytest.approx(5.0 - 3.5),
    }


@pytest.mark.parametrize("when", ["always", "pays"])
def test_an_engine_that_serves_no_draft_any_more_trains_none(tmp_path: Path, when: str) -> None:
    rollout = Rollout(generated(10.0, 300, SpecStats(300)), None)
    book = pacer(tmp_path, draft__train_when=when)
    decision, _ = book.decide(0, rollout, 1.0, engine(has_draft=False))
    assert decision == Decision(0.0, Reason.STOPPED)
    settle(book, decision, 0.0, None)
    assert book.state()["ledger"]["scored_s"] == ()  # it was not even scored


@pytest.mark.parametrize(("history", "spec"), [(False, SpecStats(300)), (True, SPEC)])
def test_where_the_engine_says_nothing_of_the_draft_its_forecast_does(tmp_path: Path, history, spec) -> None:
    watched = pacer(tmp_path, speculation__history=history)
    rollout = Rollout(generated(10.0, 300, spec), None)
    for step in range(3):
        decision, _ = watched.decide(step, rollout, 1.0 + step, engine())
        settle(watched, decision, 1.0, 1.5 + step / 8)
    told = [tuple(point[:2]) for point in watched.state()["schedule"]["climb"]]
    assert told == [(1.0, 1.5), (2.0, 1.625)]  # each with the entropy of its own rollout
    resumed = pacer(tmp_path, speculation__history=history)
    resumed.resume(json.loads(json.dumps(watched.state())), 3)
    assert resumed.state() == watched.state()


def test_a_draft_that_costs_more_than_it_brings_is_called_losing_once_it_no_longer_rises(tmp_path: Path) -> None:
    dear = TABLE.scaled((1.0, 1.0, 2.0))  # a verification of two drafts costs 3.2 plain steps
    watched = pacer(tmp_path, rollout__speculative_draft_model_path="given")
    reasons = []
    for step in range(8):
        decision, _ = watched.decide(step, Rollout(generated(10.0, 300, SPEC), None), 1.0, engine(table=dear))
        settle(watched, decision, 1.0, None)
        reasons.append(decision.reason)
    assert reasons[:4] == [Reason.START] * 4 and reasons[-1] is Reason.LOSING


# ---- whole runs ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Iterator[Config]:
    yield lambda name, **changes: helpers.tiny_config(model, tmp_path, name, **{"draft__train_when": "pays", **changes})


def decided_by(shares: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions that follow the call, as timings would."""
    left = iter(shares)

    def decide(*_: object) -> Decision:
        share = next(left)
        return Decision(share, Reason.RISING if share == 1.0 else Reason.KEEP if share else Reason.REST)

    monkeypatch.setattr(draft_schedule, "decide", decide)


def decisions(folder: Path) -> list[float]:
    return [json.loads(line)["share"] for line in (folder / "draft_schedule.jsonl").read_text().splitlines()]


def test_a_run_replayed_from_its_record_is_the_same_though_it_would_decide_otherwise(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [1.0, 0.0, 0.4, 0.0]
    decided_by(shares, monkeypatch)
    first = helpers.run(config("first", num_rollout=4))
    assert decisions(first) == shares
    trained = [line["draft_token_share"] for line in helpers.metrics(first)]
    assert trained[0] == 1.0 and 0.2 < trained[2] < 0.6 and trained[1] == trained[3] == 0.0
    decided_by([1.0] * 2, monkeypatch)
    again = helpers.run(config("again", num_rollout=4, draft__schedule=str(first / "draft_schedule.jsonl")))
    helpers.assert_same_run(first, again)
    other = helpers.run(config("other", num_rollout=2))
    assert helpers.metrics(other)[1] != helpers.metrics(first)[1], "without the record it decides otherwise"


def test_a_replayed_run_goes_on_beyond_its_record_by_deciding_itself(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided_by([1.0, 0.0], monkeypatch)
    record = helpers.run(config("recorded", num_rollout=2)) / "draft_schedule.jsonl"
    settings = config("replayed", num_rollout=2, draft__schedule=str(record))
    helpers.run(settings)
    with pytest.raises(ConfigError, match=r"has no step 2.*--resume without draft\.schedule") as caught:
        helpers.run(replace(settings, num_rollout=3, resume=True))
    assert "\n" not in str(caught.value)
    decided_by([0.5], monkeypatch)
    assert decisions(helpers.run(config("replayed", num_rollout=3, resume=True))) == [1.0, 0.0, 0.5]


def test_a_run_killed_after_its_checkpoint_decides_again_as_it_had_decided(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided_by([1.0, 0.5, 0.0, 1.0], monkeypatch)
    unbroken = helpers.run(config("unbroken", num_rollout=4))
    settings = replace(config("unbroken", num_rollout=4), name="killed", resume=True)
    killed = Path(settings.run_dir) / "killed"
    shutil.copytree(unbroken, killed)
    decided_by([0.0] * 4, monkeypatch)
    for lost in (4, 3):  # as if the kill had come before this checkpoint; without the second there is none
        for step in range(lost, 5):
            shutil.rmtree(killed / "checkpoints" / f"step_{step:06d}", ignore_errors=True)
        helpers.assert_same_run(unbroken, helpers.run(settings))
        assert decisions(killed) == decisions(unbroken)


def test_a_resumed_run_goes_on_with_what_it_had_seen(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the run, then the rest: residuals, decisions and account as of the unbroken one."""
    monkeypatch.setattr(draft_schedule, "MIN_VERIFIES", 8)
    monkeypatch.setattr(draft_schedule, "MIN_REFERENCE", 1)
    shares = [1.0, 1.0, 0.0, 0.0, 0.0]
    decided_by(shares, monkeypatch)
    unbroken = helpers.run(config("unbroken", num_rollout=5))
    assert "draft_accept_residual_z" in helpers.metrics(unbroken)[-1]
    decided_by(shares, monkeypatch)
    half = config("half", num_rollout=3)
    helpers.run(half)
    folder = helpers.run(replace(half, num_rollout=5, resume=True))
    helpers.assert_same_run(unbroken, folder)
    lines = read_metrics(folder / "metrics.jsonl")
    balances = [line["draft_saved_time_s"] - line["draft_spent_time_s"] for line in lines]
    assert lines[-1]["draft_balance_time_s"] == pytest.approx(sum(balances))


def test_a_draft_that_ends_as_losing_is_not_published(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step that trains it, then, resumed, one that gives it up, and one that takes it up again."""
    decided_by([1.0], monkeypatch)
    folder = helpers.run(config("given_up", num_rollout=1))
    published, aside = folder / "draft" / "model.safetensors", folder / "draft.not-published" / "model.safetensors"
    assert published.exists() and not aside.exists() and "not published" not in capsys.readouterr().out
    monkeypatch.setattr(draft_schedule, "decide", lambda *_: Decision(0.0, Reason.LOSING))
    helpers.run(config("given_up", num_rollout=2, resume=True))
    assert aside.exists() and not published.exists(), "draft/ would be the one of an older policy"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not published" in line)
    assert "cost more than it saved (draft_decision = losing)" in line and str(aside.parent) in line
    decided_by([1.0], monkeypatch)
    helpers.run(config("given_up", num_rollout=3, resume=True))
    assert published.exists() and not aside.exists()


def test_never_is_draft_training_off_and_is_timed_as_scoring(config: Config) -> None:
    off = helpers.run(config("off", num_rollout=1, draft__train=False, draft__train_when="always"))
    never = helpers.run(config("never", num_rollout=1, draft__train_when="never"))
    helpers.assert_same_run(off, never)
    (line,) = read_metrics(never / "metrics.jsonl")
    assert line["draft_token_share"] == 0.0 and line["draft_saved_time_basis"] == "bound"
    assert "draft_decision" not in line and not (never / "draft_schedule.jsonl").exists()


def test_a_probe_is_the_basis_of_what_is_saved(config: Config) -> None:
    folder = helpers.run(config("probed", num_rollout=2, plain_probe_interval=2))
    probed, after = read_metrics(folder / "metrics.jsonl")
    assert probed["draft_saved_time_basis"] == after["draft_saved_time_basis"] == "probe"
    tokens_s = probed["response_tokens"] / probed["tokens_per_s"]
    saved_s = probed["response_tokens"] / probed["plain_tokens_per_s"] - tokens_s
    assert probed["draft_saved_time_s"] == pytest.approx(saved_s)
    assert after["draft_decision"] == "start"


def test_a_step_without_samples_teaches_nothing_and_is_recorded(config: Config) -> None:
    folder = helpers.run(
        config(
            "nothing", num_rollout=1, algorithm__dynamic_sampling=True, data__reward="tests.test_loop:constant_reward"
        )
    )
    assert json.loads((folder / "draft_schedule.jsonl").read_text())["reason"] == "no_samples"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft__train": False}, "contradict each other"),
        ({"draft__train_when": "never", "draft__schedule": "x"}, "has no effect"),
        ({"draft__schedule": "none.jsonl"}, "no such file"),
        ({"draft__train_when": "sometimes"}, "use one of always, never, pays"),
    ],
)
def test_settings_that_contradict_themselves_are_one_line(model: Path, changes: dict, message: str) -> None:
    settings = helpers.tiny_config(model, model, "x", **{"draft__train_when": "pays", **changes})
    with pytest.raises(ConfigError, match=message) as caught:
        validate(settings)
    assert "\n" not in str(caught.value)


def test_a_deterministic_run_that_decides_by_the_clock_says_so(model: Path) -> None:
    settings = helpers.tiny_config(model, model, "x", draft__train_when="pays")
    assert any("draft_schedule.jsonl" in warning for warning in validate(settings))
    assert not any("draft_schedule" in w for w in validate(replace(settings, deterministic=False)))


@pytest.mark.parametrize("algorithm", ["NONE", "NGRAM"])
def test_without_a_draft_that_learns_pays_says_that_it_has_no_effect(model: Path, algorithm: str) -> None:
    settings = helpers.tiny_config(
        model, model, "x", draft__train_when="pays", rollout__speculative_algorithm=algorithm
    )
    (warning,) = (w for w in validate(settings) if "'pays'" in w)
    assert "has no effect" in warning and algorithm in warning


def test_a_schedule_too_short_is_refused_before_anything_is_made(config: Config, tmp_path: Path) -> None:
    append_decision(tmp_path / "short.jsonl", 0, TRAINED)
    with pytest.raises(ConfigError, match="has no step 1"):
        helpers.run(config("short", draft__schedule=str(tmp_path / "short.jsonl")))
    assert not (tmp_path / "short").exists()
