"""The whole data flow: roll out, update the policy, update the draft, sync.

    prompts -> engine.generate -> rewards -> advantages -> policy.update (captures hidden states on the way)
                  ^                                              |
                  +---- publish(version, policy + draft) <---- draft.update

Every rank runs this text with the same samples. The engine, in this process or in a server's, lives on rank 0 and is
known here by the RolloutEngine protocol alone; the draft's learner lives on the last stage.
Strictly on-policy: version v of policy and draft, and nothing else, generates step v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from rollout_engine.types import Sample
from sync.publish import SyncReport, publish
from trainer import metrics
from trainer.advantages import drop_groups_without_signal, with_advantages
from trainer.collective import from_last_rank, from_rank_zero, tensors_to_rank_zero
from trainer.distributed import first_message
from trainer.draft_learner import DraftUpdateError, Key, plan_updates, planned_share
from trainer.draft_schedule import Decision, Reason
from trainer.draft_weights import weighed
from trainer.rollouts import Rollout, evaluate, generate, make_requests, score

if TYPE_CHECKING:
    from trainer.run import Run


def train(run: Run) -> None:
    """Run every step from `run.next_step` on; leaves checkpoints, metrics, and at the end policy and draft."""
    sync_weights(run, run.next_step)
    with run.clock("warm_up"):
        from_rank_zero(lambda: run.engine.warm_up())
    for step in range(run.next_step, run.config.num_rollout):
        rollout = from_rank_zero(lambda step=step: roll_out(run, step))
        with engine_memory_given_back(run):
            samples, policy_metrics, captured = update_policy(run, rollout)
            decision, pacing = decide_draft(run, step, rollout, policy_metrics)
            draft_metrics = update_draft(run, step, samples, captured, decision)
            del captured  # gigabytes that would outlive the next rollout, and lie beside the next step's
        watched = watch_engine(run, step)
        report = sync_weights(run, step + 1)
        spending = settle_draft(run, decision, report, draft_metrics)
        run.next_step = step + 1
        after = from_rank_zero(lambda step=step: after_step(run, step))
        run.record(step, rollout, report, policy_metrics, draft_metrics, watched, pacing, spending, after)
        if run.should_save(step + 1):
            run.save_checkpoint()
    run.export()


def roll_out(run: Run, step: int) -> Rollout:
    """The step's scored samples, and the same requests once more without speculation when the probe is due (rank 0)."""
    config = run.config
    prompts, run.position = run.prompts.take(run.position, config.data.rollout_batch_size)
    requests = make_requests(prompts, run.sampling, config.data.n_samples_per_prompt, config.seed, step)
    with run.clock("rollout"):
        generated = generate(run.engine, requests, config.rollout.max_running_requests)
    with run.clock("reward"):
        scored = score(generated, prompts, run.reward)
    plain = None
    if config.plain_probe_interval and step % config.plain_probe_interval == 0 and not run.watch.stopped:
        with run.clock("probe"):
            twin = run.engine.without_speculation()
            plain = generate(twin, requests, config.rollout.max_running_requests)
            twin.close()
    return Rollout(scored, plain)


def update_policy(run: Run, rollout: Rollout) -> tuple[list[Sample], dict[str, Any], list[Any]]:
    """Advantages and the policy's optimizer steps; returns the samples learned from, metrics, and the draft's data."""
    algorithm = run.config.algorithm
    samples = with_advantages(rollout.samples, normalize_std=algorithm.normalize_std)
    if algorithm.dynamic_sampling:
        samples = drop_groups_without_signal(samples)
    if not samples:
        return [], {"policy_skipped": 1}, []
    with run.clock("policy"):
        update = run.policy.update(samples, None if run.watch.stopped else run.capture)
    captured = update.draft_samples
    if run.config.draft.token_weighting == "tail":
        captured = weighed(captured, rollout.samples, run.config.rollout.max_running_requests)
    return samples, update.metrics, captured


def decide_draft(
    run: Run, step: int, rollout: Rollout, policy_metrics: dict[str, Any]
) -> tuple[Decision, dict[str, Any]]:
    """Whether the draft learns from this rollout, and from how much: rank 0's decision on every rank."""
    if run.capture is None:
        return Decision(0.0, Reason.NEVER), {}
    return from_rank_zero(lambda: run.pacer.decide(step, rollout, policy_metrics.get("entropy"), run.engine))


def settle_draft(run: Run, decision: Decision, report: SyncReport, draft_metrics: dict[str, Any]) -> dict[str, Any]:
    """What the draft's part of the step cost, entered in the account (rank 0); nothing without a draft."""
    if run.pacer is None:
        return {}
    forecast = draft_metrics.get("predicted_accept_length")
    return run.pacer.settle(decision, run.clock.seconds("draft"), report, run.engine.transport.plan, forecast)


def update_draft(
    run: Run, step: int, samples: Sequence[Sample], captured: list[Any], decision: Decision
) -> dict[str, Any]:
    """The draft's optimizer steps on what the policy's forward captured; metrics are the same on every rank.

    While the engine decodes plainly there are none: a draft that nobody runs learns again once a resumed run does.
    Raises DraftUpdateError on every rank when one refuses its step.
    """
    if run.capture is None:
        return {}
    draft_metrics: dict[str, Any] = {}
    with run.clock("draft"):
        if samples and not run.watch.stopped:
            plan = plan_updates(samples, run.config.draft, run.config.seed, step, decision.share or 1.0)
            also = run.watch.choose(samples, plan, step)
            if run.learner is not None and run.watch.is_watching:
                run.learner.forecast.watch(samples)
            draft_metrics = _learn_or_raise_together(run, plan, captured, also, trains=decision.share > 0)
            draft_metrics["draft_token_share"] = planned_share(samples, plan) if decision.share else 0.0
        if run.learner is not None and step + 1 == run.config.frozen_draft_step:
            run.learner.freeze_copy()
    return draft_metrics


def _learn_or_raise_together(
    run: Run, plan: Sequence[frozenset[Key]], captured: list[Any], also: frozenset[Key], *, trains: bool
) -> dict[str, Any]:
    """`also`: samples to forecast beside those of the first update."""
    found: dict[str, Any] = {}
    refused: DraftUpdateError | None = None
    if run.learner is not None:
        try:
            learner = run.learner
            found = learner.update(captured, plan, also) if trains else learner.score(captured, plan, also)
        except DraftUpdateError as error:
            refused = error
    message = first_message(None if refused is None else str(refused))
    if message is not None:  # ranks without a learner would wait for metrics that never come
        raise DraftUpdateError(message) from refused
    return from_last_rank(lambda: found)


def watch_engine(run: Run, step: int) -> dict[str, Any]:
    """Whether the engine that served this rollout drafted and accepted as it should. After an alarm it is replaced by
    one that decodes plainly, which the next sync fills."""
    if not run.watch.is_watching:
        return {"speculation_stopped": 1} if run.watch.stopped else {}
    look = from_last_rank(lambda: run.learner.forecast.take_look())
    found, alarm = run.watch.take(look, step)
    if alarm:
        run.tell(alarm)
    if run.watch.stopped:
        with run.clock("restart"):
            from_rank_zero(lambda: run.decode_plainly())
    return found


@contextmanager
def engine_memory_given_back(run: Run) -> Iterator[None]:
    """With `rollout.offload`: inside, the engine's GPU memory is the trainer's. What it held is lost, weights too, so
    that the engine serves again only after the next sync, which brings both models."""
    if not run.config.rollout.offload:
        yield
        return
    with run.clock("offload"):
        from_rank_zero(lambda: run.engine.offload())
    yield
    with run.clock("offload"):
        torch.cuda.empty_cache()  # what the updates held and no longer need is the engine's now
        from_rank_zero(lambda: run.engine.onload())


def sync_weights(run: Run, version: int) -> SyncReport:
    """Policy and draft become version `version` of the engine together, or the run stops with the tensor's name."""
    with run.clock("sync"):
        policy = run.policy.export_weights()
        draft = None
        if run.capture is not None and not run.watch.stopped:
            mine = run.learner.tensors() if run.learner is not None else {}
            draft = tensors_to_rank_zero(mine, run.policy.layout.device)
        return from_rank_zero(lambda: publish(policy, draft, run.engine.transport, version))


def after_step(run: Run, step: int) -> dict[str, Any]:
    """Greedy evaluation with the new weights, when due (rank 0). The engine forgets it."""
    interval = run.config.eval_interval
    if not (interval and run.eval_prompts and (step + 1) % interval == 0):
        return {}
    with run.clock("eval"), run.engine.leaving_no_trace():
        slots = run.config.rollout.max_running_requests
        return evaluate(run.engine, run.eval_prompts, run.sampling, slots, run.reward)


def metrics_line(step: int, rollout: Rollout, *parts: dict[str, Any]) -> dict[str, Any]:
    """One step's line from its parts; see `trainer.metrics` for what each figure means."""
    fast, plain = rollout.speculative, rollout.plain
    probe = {} if plain is None else metrics.plain_probe_metrics(fast.samples, fast.time_s, plain.samples, plain.time_s)
    return metrics.step_line(step, metrics.rollout_metrics(fast.samples, fast.time_s, fast.running), probe, *parts)
