"""`slipstream bench draft`: its figures against the plain computations that training and verification use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import common, draft, draft_scores, draft_texts
from draft_models.forecast import AcceptForecast, forecast_acceptance
from draft_models.randomness import gumbel
from draft_models.training import accept_posteriors, draft_loss, make_batch
from draft_models.types import VerifyRule
from rollout_engine.types import FinishReason, RolloutRequest, Sample, SamplingParams
from tests.draft_helpers import random_sample, small_draft
from trainer.make_model import MakeModelConfig, make_model

DEPTH = 3
ASKED = [(rule, k) for rule in draft_scores.RULES for k in (2, DEPTH)]


@pytest.mark.parametrize("draft_vocab_size", [0, 24])
def test_scores_are_what_training_and_forecast_compute(draft_vocab_size: int, monkeypatch: pytest.MonkeyPatch):
    model = small_draft(seed=1, draft_vocab_size=draft_vocab_size)
    samples = [random_sample(length, 4, seed, temperature=0.7) for seed, length in enumerate((9, 20, 14))]
    monkeypatch.setattr(draft_scores, "_TOKENS_AT_ONCE", 24)  # several batches
    monkeypatch.setitem(draft_scores._PIECE_ELEMENTS, "cpu", 5 * 40)  # several pieces
    found = draft_scores.score(model, samples, ASKED)
    batch = make_batch(samples)
    loss = draft_loss(model, batch, DEPTH, 1.0)
    assert found.steps.overlap == pytest.approx((loss.overlap_K / torch.tensor(loss.counts)).tolist(), rel=1e-5)
    assert found.steps.top1 == pytest.approx((loss.top1_K / torch.tensor(loss.counts)).tolist(), rel=1e-5)
    if draft_vocab_size:
        assert found.steps.kl == ()
    else:
        assert found.steps.kl == pytest.approx((loss.kl_K / torch.tensor(loss.counts)).tolist(), rel=1e-4)
    for rule in (VerifyRule.TARGET_ONLY, VerifyRule.REJECTION):
        posterior_QK = accept_posteriors(model, batch, DEPTH, rule)
        for k in (2, DEPTH):
            expected = forecast_acceptance(posterior_QK, batch.num_chains, k)
            assert found.forecasts[rule, k].histogram == pytest.approx(expected.histogram, rel=1e-5)
            assert found.forecasts[rule, k].accepted_by_position == pytest.approx(
                expected.accepted_by_position, rel=1e-5
            )


def test_at_temperature_0_the_greedy_rule_counts_the_argmax():
    model = small_draft(seed=1)
    samples = [random_sample(60, 4, seed, temperature=0.0) for seed in range(4)]
    batch = make_batch(samples)
    expected = forecast_acceptance(accept_posteriors(model, batch, 2, VerifyRule.GREEDY), batch.num_chains, 2)
    found = draft_scores.score(model, samples, [(VerifyRule.GREEDY, 2)])
    assert expected.accepted_by_position[0] > 0  # some random tokens are the draft's argmax
    assert found.forecasts[VerifyRule.GREEDY, 2] == expected


def test_the_coupled_posterior_is_the_mean_over_the_noise():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(6, generator=generator).square().softmax(0) for _ in range(2))
    q[3] = 0.0
    noise_NV = gumbel(torch.arange(40_000), torch.zeros(40_000, 1, dtype=torch.int64), 6)[:, 0]
    target_N, draft_N = (p.log() + noise_NV).argmax(-1), (q.log() + noise_NV).argmax(-1)
    for token in range(6):
        is_token_N = target_N == token
        observed = (draft_N[is_token_N] == token).double().mean().item()
        expected = draft_scores.coupled_posterior(p[None], q[None], torch.tensor([token])).item()
        assert observed == pytest.approx(expected, abs=4 * (0.25 / is_token_N.sum().item()) ** 0.5)
    assert draft_scores.coupled_posterior(p[None], q[None], torch.tensor([3])).item() == 0


def test_a_token_that_the_draft_all_but_never_says_is_no_nan_under_the_coupled_rule():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1e-42, 0.0, 1.0]])
    assert draft_scores.coupled_posterior(p, q, torch.tensor([0])).item() == 0.0


def test_rates_by_position():
    forecast = AcceptForecast((2.0, 1.0, 1.0), (4.0, 4.0), (2.0, 1.0))
    assert draft_scores.accept_rates(forecast) == [0.5, 0.25]
    assert draft_scores.chain_rates(forecast) == [0.5, 0.5]
    assert draft_scores.chain_rates(AcceptForecast((4.0, 0.0, 0.0), (4.0, 4.0), (0.0, 0.0))) == [0.0]


def test_statistics_of_the_law():
    sample = random_sample(9, 4, 0, temperature=0.5)
    p_RV = (sample.target_logits[3:-1] / 0.5).softmax(-1)
    found = draft_scores.law_statistics([sample])
    assert found["target_max_prob"] == pytest.approx(p_RV.amax(-1).mean().item())
    assert found["target_sum_p2"] == pytest.approx(p_RV.square().sum(-1).mean().item())
    assert found["target_entropy"] == pytest.approx(torch.distributions.Categorical(p_RV).entropy().mean().item())


def test_a_text_is_cut_by_place_in_the_response(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(draft_scores, "RANK_EDGES", (2, 4))
    posterior_QK = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.5, 1.0], [0.0, 1.0]])
    assert draft_scores._by_rank(posterior_QK, torch.arange(4)) == (2.5, 1.5, None)


def sample_of(token_ids: tuple[int, ...], key: tuple[int, int] = (0, 0)) -> Sample:
    return Sample(RolloutRequest(*key, (1, 2)), token_ids, (0.0,) * len(token_ids), (), FinishReason.STOP)


def test_ngram_statistics_replay_the_drafter():
    # Nothing is known of the first text. The second is the first again: 3, and then 4, 5, 6 behind the pair (2, 3).
    found = draft_texts.ngram_statistics([sample_of((3, 4, 5, 6)), sample_of((3, 4, 5, 6), (0, 1))], k=2)
    # First text: three steps without a proposal. Second: one that accepts 4, 5 and emits 6.
    assert found["ngram_proposes"] == 1 / 4 and found["ngram_accept_rate_1"] == 1.0
    assert found["ngram_tokens_per_verify"] == 3.0 and found["ngram_tokens_per_forward"] == 1.5
    alone = draft_texts.ngram_statistics([sample_of((3, 4, 5, 6)), sample_of((3, 4, 5, 6), (1, 0))], k=2)
    assert alone["ngram_proposes"] == 0.0 and alone["ngram_tokens_per_verify"] == 1.0  # no sibling


def test_requests_of_two_temperatures_share_prompts_and_nothing_else():
    prompts = draft_texts.draw_prompts([(1,), (2,), (3,)], 5, seed=3)
    assert sorted(prompts[:3]) == [(1,), (2,), (3,)] and prompts[3:] == prompts[:2]
    first, second = (
        draft_texts.group_requests(prompts, 2, 3, SamplingParams(), first_prompt_id=number) for number in (0, 5)
    )
    assert [r.prompt_ids for r in first] == [r.prompt_ids for r in second]
    assert len({r.key for r in first + second}) == len({r.sampling.seed for r in first + second}) == 20


def test_heavy_prompts_come_sooner():
    prompts = [(row,) for row in range(100)]
    weights = [100.0 if row < 10 else 1.0 for row in range(100)]
    drawn = draft_texts.draw_prompts(prompts, 10, 0, weights)
    assert sum(row < 10 for (row,) in drawn) >= 7


# ---- the command ----


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "target"
    return make_model(MakeModelConfig(out=out, eps_residual=0.2, num_train_prompts=16, num_eval_prompts=4))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_rule_temperature_and_depth_is_scored(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = tmp_path / "draft.jsonl"
    arguments = f"--target {target} --results {results} --samples 16 --max-new-tokens 24 --temperatures 0,0.5,1 --k 1,3"
    draft.main(arguments.split())
    found = [row for row in rows(results) if row["kind"] == "acceptance"]
    sampled = [(t, rule.value, k) for t in (0.5, 1.0) for rule in draft_scores.RULES for k in (1, 3)]
    assert [(row["temperature"], row["rule"], row["k"]) for row in found] == [
        *((0.0, "greedy", k) for k in (1, 3)),
        *sampled,
    ]
    for row in found:
        assert 1.0 <= row["accept_length"] <= 1 + row["k"] == 1 + len(row["accept_rate_by_position"])
        assert row["draft"] == "random" and row["ngram_tokens_per_verify"] >= 1.0 and row["response_tokens"] > 50
    target_only, rejection, coupled = (row["accept_rate_by_position"][0] for row in found[-5::2])
    assert target_only < coupled < rejection
    slopes = [row for row in rows(results) if row["kind"] == "slope"]
    assert len(slopes) == 6 and all(row["temperatures"] == [0.5, 1.0] for row in slopes)
    lengths = {row["temperature"]: row["accept_length"] for row in found if (row["rule"], row["k"]) == ("rejection", 3)}
    entropy = {row["temperature"]: row["target_entropy"] for row in found}
    (line,) = (row for row in slopes if (row["rule"], row["k"]) == ("rejection", 3))
    assert line["accept_length_per_nat"] == pytest.approx((lengths[1] - lengths[0.5]) / (entropy[1] - entropy[0.5]))
    assert "give other --temperatures" in capsys.readouterr().out


def test_wrong_rules_and_temperatures_are_one_line(capsys: pytest.CaptureFixture[str]):
    for wrong, said in (
        ("--rules=lenient", "unknown rule 'lenient'"),
        ("--temperatures=-1", "must not be negative"),
        ("--rules=greedy --temperatures=1", "nothing is left"),
    ):
        with pytest.raises(SystemExit):
            draft.parse(["--target", "x", *wrong.split()])
        assert said in capsys.readouterr().err


def test_finished_rollouts_are_scored_as_they_are(target: Path, tmp_path: Path):
    data, results = tmp_path / "rollouts.jsonl", tmp_path / "draft.jsonl"
    said = [{"prompt": [5, 6, 7], "response": [8, 9, 10, 8, 9, 10, 1]}, {"prompt": [5, 6, 7], "response": [8, 9, 10]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in said))
    arguments = f"--target {target} --results {results} --data {data} --temperatures 1 --k 2 --rules target_only"
    draft.main(arguments.split())
    (row,) = rows(results)
    assert row["response_tokens"] == 10 and row["temperature"] == 1.0 and row["rule"] == "target_only"
    assert row["ngram_tokens_per_verify"] > 2.0  # the second repeats the first, which repeats itself


def test_finished_rollouts_have_one_temperature(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "rollouts.jsonl"
    data.write_text('{"prompt": [5, 6, 7], "response": [8, 9]}\n')
    with pytest.raises(SystemExit) as exit_:
        common.run(lambda: draft.main(["--target", str(target), "--data", str(data)]))
    said = capsys.readouterr().err
    assert (
        exit_.value.code == 2 and "finished rollouts" in said and "--temperatures T" in said and said.count("\n") == 1
    )


def test_prompts_of_a_file_are_answered_first(target: Path, tmp_path: Path):
    data, results = tmp_path / "prompts.jsonl", tmp_path / "draft.jsonl"
    data.write_text('{"prompt": [5, 6, 7]}\n{"prompt": [9, 6, 7]}\n')
    arguments = f"--target {target} --results {results} --data {data} --temperatures 1 --k 2 --samples 8"
    draft.main([*arguments.split(), "--max-new-tokens", "8"])
    assert {row["samples"] for row in rows(results)} == {8}


def test_a_bad_row_of_the_data_is_one_line(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "rollouts.jsonl"
    data.write_text('{"prompt": [5, 6, 7], "response": [8, 9]}\n{"prompt": [5]}\n')
    with pytest.raises(SystemExit) as exit_:
        common.run(lambda: draft.main(["--target", str(target), "--data", str(data)]))
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and f"{data} line 2:" in said and said.count("\n") == 1
