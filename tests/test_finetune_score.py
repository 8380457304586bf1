"""Whether a fine-tuned draft is worth serving: better than before, and, where costs were measured, faster."""

from __future__ import annotations

from pathlib import Path

import pytest

from draft_models.forecast import AcceptForecast
from rollout_engine.speculation import CostTable
from tests import finetune_helpers as helpers
from trainer.finetune import FinetuneError
from trainer.finetune_score import Measured, ReadCost, why_worthless


def forecast(*accepted: float, steps: float = 10.0) -> AcceptForecast:
    depth = len(accepted)
    return AcceptForecast((steps, *(0.0,) * depth), (steps,) * depth, accepted)


def test_a_draft_is_worth_serving_when_it_wins_more_than_its_weights_cost() -> None:
    bad, good = forecast(1.0, 0.0, 0.0), forecast(8.0, 6.0, 4.0)
    assert why_worthless(good, bad, ReadCost(1, 10), None, "x") is None
    assert "accept length on held-out text is 1.100, that of x 2.800" in str(
        why_worthless(bad, good, ReadCost(1, 10), None, "x")
    )
    assert why_worthless(good, good, ReadCost(1, 10), None, "x") is not None
    assert "cannot pay" in str(why_worthless(good, bad, ReadCost(9, 10), None, "x"))
    assert ReadCost(1, 10).best_speedup(good) == pytest.approx(2.8 / 1.3)
    assert ReadCost(5, 10).best_speedup(good) == pytest.approx(1.8 / 1.5)  # one draft token is best there


def test_measured_costs_decide_where_they_are_given() -> None:
    bad, good = forecast(1.0, 0.0, 0.0), forecast(8.0, 6.0, 4.0)  # 1.8, 2.4 and 2.8 tokens a step
    dear = CostTable((1, 8), ((1.0, 1.9, 2.5, 2.9), (2.0, 8.0, 9.0, 9.0)))
    why = str(why_worthless(good, bad, ReadCost(1, 100), dear, "x"))
    assert "does not pay" in why and "at best 0.97 times as fast as plain decoding (batch 1, 3 drafts a step)" in why
    cheap = CostTable((1, 8), ((1.0, 1.9, 2.5, 2.9), (2.0, 2.4, 4.0, 5.0)))
    assert why_worthless(good, bad, ReadCost(9, 10), cheap, "x") is None, "though its weights are many"
    assert Measured.best(cheap, good) == Measured(pytest.approx(1.8 * 2.0 / 2.4), 8, 1)
    assert why_worthless(bad, good, ReadCost(1, 100), cheap, "x") is not None, "worse than what it started from"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_fine_tuning_goes_by_the_costs_that_it_is_given(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def finetuned(name: str, *flags: str) -> Path:
        return helpers.run(helpers.config_for(model, tmp_path / name, *flags, epochs=1))

    CostTable((1,), ((1.0, 9.0, 9.0, 9.0),)).save(tmp_path / "dear.json")
    with pytest.raises(FinetuneError, match=r"does not pay: at accept length .* by rollout\.cost_table, at best 0"):
        finetuned("put_aside", f"--rollout.cost-table={tmp_path / 'dear.json'}")
    assert not (tmp_path / "put_aside").exists() and (tmp_path / "put_aside.not-published").exists()
    CostTable((1,), ((1.0, 1.0, 1.0, 1.0),)).save(tmp_path / "cheap.json")
    finetuned("paid", f"--rollout.cost-table={tmp_path / 'cheap.json'}")
    assert "by the measured costs up to " in "".join(capsys.readouterr())
    finetuned("unknown")
    assert "not shown to pay: no measured costs were given (--rollout.cost-table FILE)" in "".join(capsys.readouterr())
