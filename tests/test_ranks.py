"""Two and four gloo ranks take the step that one rank takes. One spawn per world size, since starting ranks is slow."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.policy_helpers import assert_same_gradients, rollout, run_ranks, save_checkpoint
from trainer.config import AlgorithmConfig, PolicyConfig
from trainer.policy_capture import CaptureSpec

CONFIG = PolicyConfig(lr=1e-2, clip_grad=0.0, max_tokens_per_gpu=48)
# with the entropy bonus the loss depends on the weights; the surrogate alone has the value -mean(A) whatever they are
ALGORITHM = AlgorithmConfig(entropy_coef=0.1, use_kl_loss=True, kl_loss_coef=0.1)
CAPTURE = CaptureSpec((0, 1, 3), max_bytes=1 << 30)
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}


def one_step(folder, layout=None, algorithm=ALGORITHM):
    """(policy, update, gradients) after one update."""
    from trainer.megatron_policy import MegatronPolicy

    policy = MegatronPolicy(replace(CONFIG, **(layout or {})), algorithm, folder, train_iters=10)
    update = policy.update(rollout(), CAPTURE)
    return policy, update, policy.export_gradients()


def save_reference(folder: Path) -> None:
    _, update, gradients = one_step(folder)
    torch.save((update.metrics, update.draft_samples, gradients), folder / "reference.pt")


def check_same_step(folder: Path, layout: dict) -> None:
    policy, update, gradients = one_step(folder, layout)
    metrics, draft_samples, expected = torch.load(folder / "reference.pt", weights_only=False)
    assert update.metrics == pytest.approx(metrics, rel=1e-5), layout
    if torch.distributed.get_rank() == 0:
        assert_same_gradients(gradients, expected)
    else:
        assert not gradients
    check_draft_samples(policy, update.draft_samples, {(d.prompt_id, d.sample_id): d for d in draft_samples})


def check_draft_samples(policy, samples, expected) -> None:
    """Last-stage ranks hold their data-parallel share, together all samples; other ranks hold none."""
    keys = {(d.prompt_id, d.sample_id) for d in samples}
    if not policy.is_draft_rank:
        assert not keys
        return
    shares = [None] * policy.draft_group.size()
    torch.distributed.all_gather_object(shares, keys, group=policy.draft_group)
    assert sum(len(share) for share in shares) == len(expected) and set().union(*shares) == expected.keys()
    for sample in samples:
        other = expected[sample.prompt_id, sample.sample_id]
        assert torch.equal(sample.token_ids, other.token_ids) and torch.equal(sample.embeds, other.embeds)
        torch.testing.assert_close(sample.aux_hidden, other.aux_hidden, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sample.target_logits, other.target_logits, atol=1e-5, rtol=1e-5)


def check_round_trip(folder: Path, layout: dict) -> None:
    from safetensors.torch import load_file

    from trainer.megatron_policy import MegatronPolicy

    exported = MegatronPolicy(replace(CONFIG, **layout), AlgorithmConfig(), folder).export_weights()
    if torch.distributed.get_rank() > 0:
        assert not exported
        return
    original = load_file(folder / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


def check_comparison_sees_a_missing_all_reduce(folder: Path) -> None:
    """Without Megatron's all-reduce of q and k norms over tensor-parallel ranks the loss is still exact."""
    from trainer.megatron_policy import MegatronPolicy

    policy = MegatronPolicy(replace(CONFIG, **TP2), ALGORITHM, folder, train_iters=10)

    def only_divide(model, num_tokens, **_):
        for chunk in model:
            chunk.finish_grad_sync()
            chunk.scale_gradients(1.0 / num_tokens)

    policy.megatron_config.finalize_model_grads_func = only_divide
    update, gradients = policy.update(rollout()), policy.export_gradients()
    metrics, _, expected = torch.load(folder / "reference.pt", weights_only=False)
    assert update.metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    if torch.distributed.get_rank() == 0:
        with pytest.raises(AssertionError, match="norm"):
            assert_same_gradients(gradients, expected, tolerance=0.1)


def check_resume(folder: Path, scratch: Path, layout: dict) -> None:
    """The unbroken run and the resumed one agree bit for bit; `scratch` is the same on all ranks."""
    from trainer.megatron_policy import MegatronPolicy

    config = replace(CONFIG, clip_grad=1.0, **layout)
    policy = MegatronPolicy(config, ALGORITHM, folder, train_iters=10)
    policy.update(rollout(seed=1))
    policy.save(scratch)
    unbroken = policy.update(rollout(seed=2)).metrics
    expected = {name: tensor.clone() for name, tensor in policy.export_weights().items()}
    resumed = MegatronPolicy(config, ALGORITHM, folder, train_iters=10)
    resumed.load(scratch)
    assert resumed.update(rollout(seed=2)).metrics == unbroken
    weights = resumed.export_weights()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def check_distributed_optimizer(folder: Path) -> None:
    """Optimizer state cut over the data-parallel ranks takes the step of the whole one."""
    from trainer.megatron_policy import MegatronPolicy

    results = []
    for use_distributed_optimizer in (False, True):
        config = replace(CONFIG, use_distributed_optimizer=use_distributed_optimizer, clip_grad=1.0)
        policy = MegatronPolicy(config, ALGORITHM, folder, train_iters=10)
        metrics = [policy.update(rollout(seed=seed)).metrics for seed in range(2)]
        results.append((metrics, {name: tensor.clone() for name, tensor in policy.export_weights().items()}))
    (whole_metrics, whole), (cut_metrics, cut) = results
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in zip(cut_metrics, whole_metrics, strict=True))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, atol=1e-5, rtol=1e-5)


def check_refusal_on_all_ranks(folder: Path) -> None:
    """One bad sample is on one data-parallel rank; both refuse, naming it, and both go on."""
    from trainer.megatron_policy import MegatronPolicy, PolicyUpdateError

    policy = MegatronPolicy(CONFIG, ALGORITHM, folder, train_iters=10)
    bad = [replace(s, advantage=float("nan")) if s.request.key == (2, 1) else s for s in rollout()]
    with pytest.raises(PolicyUpdateError, match="2/1"):
        policy.update(bad)
    policy.update(rollout())


def check_fewer_samples_than_ranks(folder: Path) -> None:
    """A rank without samples runs an empty micro-batch and takes part."""
    from trainer.megatron_policy import MegatronPolicy

    update = MegatronPolicy(CONFIG, ALGORITHM, folder, train_iters=10).update(rollout(1, 1), CAPTURE)
    assert update.metrics["num_tokens"] == len(rollout(1, 1)[0].token_ids)


def two_ranks(untied: Path, tied: Path, scratch: Path) -> None:
    for layout in (TP2, {}, PP2, TP2 | SP):
        check_same_step(untied, layout)
    check_same_step(tied, PP2)
    for layout in (TP2, PP2):
        check_round_trip(untied, layout)
        check_round_trip(tied, layout)
    check_comparison_sees_a_missing_all_reduce(untied)
    check_distributed_optimizer(untied)
    check_resume(untied, scratch, {"use_distributed_optimizer": True})
    check_refusal_on_all_ranks(untied)
    check_fewer_samples_than_ranks(untied)


def four_ranks(untied: Path) -> None:
    check_same_step(untied, TP2)
    check_same_step(untied, TP2 | PP2 | SP)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(untied, tied), each with the one-rank step beside it."""
    folders = [save_checkpoint(tmp_path_factory.mktemp(f"tied{tied}"), tied=tied) for tied in (False, True)]
    run_ranks(1, _save_references, *folders)
    return folders


def _save_references(*folders: Path) -> None:
    for folder in folders:
        save_reference(folder)


def test_two_ranks(checkpoints, tmp_path):
    run_ranks(2, two_ranks, *checkpoints, tmp_path / "state")


def test_four_ranks(checkpoints):
    run_ranks(4, four_ranks, checkpoints[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_on_two_ranks(checkpoints, tmp_path, dtype):
    run_ranks(2, resume_everywhere, checkpoints[0], tmp_path, dtype)


def resume_everywhere(folder: Path, scratch: Path, dtype: str) -> None:
    layouts = ({}, TP2, PP2, TP2 | SP, TP2 | {"recompute": True})
    optimizers = ({}, {"use_distributed_optimizer": True})
    for number, (layout, optimizer) in enumerate(itertools.product(layouts, optimizers)):
        check_resume(folder, scratch / str(number), layout | optimizer | {"dtype": dtype})


def save_on_two_ranks(folder: Path, scratch: Path) -> None:
    from trainer.megatron_policy import MegatronPolicy

    policy = MegatronPolicy(replace(CONFIG, **TP2), ALGORITHM, folder, train_iters=10)
    policy.update(rollout(seed=1))
    policy.save(scratch / "state")
    weights = {name: tensor.clone() for name, tensor in policy.export_weights().items()}
    policy.update(rollout(seed=2))
    if torch.distributed.get_rank() == 0:
        torch.save((weights, policy.export_weights()), scratch / "weights.pt")
    else:
        policy.export_weights()


def resume_cut_otherwise(folder: Path, scratch: Path, layout: dict) -> None:
    """The weights are the same bit for bit; the next step is to rounding."""
    from trainer.megatron_policy import MegatronPolicy

    policy = MegatronPolicy(replace(CONFIG, **layout), ALGORITHM, folder, train_iters=10)
    policy.load(scratch / "state")
    loaded = {name: tensor.clone() for name, tensor in policy.export_weights().items()}
    policy.update(rollout(seed=2))
    stepped = policy.export_weights()
    if torch.distributed.get_rank() == 0:
        saved, expected = torch.load(scratch / "weights.pt")
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
        for name, tensor in expected.items():
            # where a gradient is near 0, Adam's first steps turn its rounding into a visible difference
            assert (stepped[name] - tensor).norm() <= 1e-3 * (tensor - saved[name]).norm(), name


@pytest.mark.slow
def test_resume_under_another_layout(checkpoints, tmp_path):
    run_ranks(2, save_on_two_ranks, checkpoints[0], tmp_path)
    run_ranks(1, resume_cut_otherwise, checkpoints[0], tmp_path, {})
    run_ranks(2, resume_cut_otherwise, checkpoints[0], tmp_path, PP2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [PP2, PP2 | TP2, TP2 | SP])
def test_several_steps_on_four_ranks(checkpoints, tmp_path, layout):
    """Old log-probs, reference log-probs and truncated importance sampling over a cut model."""
    algorithm = replace(ALGORITHM, num_steps_per_rollout=2, use_tis=True)
    run_ranks(1, _save_metrics, checkpoints[0], tmp_path / "metrics.pt", {}, algorithm)
    run_ranks(4, _save_metrics, checkpoints[0], tmp_path / "cut.pt", layout, algorithm)
    cut = torch.load(tmp_path / "cut.pt")
    assert cut == pytest.approx(torch.load(tmp_path / "metrics.pt"), rel=1e-3)


def _save_metrics(folder: Path, path: Path, layout: dict, algorithm: AlgorithmConfig) -> None:
    _, update, _ = one_step(folder, layout, algorithm)
    if torch.distributed.get_rank() == 0:
        torch.save(update.metrics, path)
