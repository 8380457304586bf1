"""The Megatron policy on one rank, against Transformers and plain autograd."""

import resource
import signal
from dataclasses import replace

import psutil
import pytest
import torch
import torch.distributed as dist

from sync.atomic import ASIDE
from tests.policy_helpers import (
    assert_same_gradients,
    hf_model,
    plain_gradients,
    response_log_probs,
    rollout,
    save_checkpoint,
)
from trainer.config import AlgorithmConfig, ConfigError, PolicyConfig
from trainer.megatron_policy import MegatronPolicy, PolicyUpdateError
from trainer.policy_capture import CaptureSpec, choose_captured

CONFIG = PolicyConfig(lr=1e-2, clip_grad=0.0, max_tokens_per_gpu=48)
CAPTURE = CaptureSpec((0, 1, 3), max_bytes=1 << 30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("qwen3"))


def make_policy(checkpoint, config=CONFIG, algorithm=None, **kwargs):
    return MegatronPolicy(config, algorithm or AlgorithmConfig(), checkpoint, train_iters=10, **kwargs)


def weights(policy):
    return {name: tensor.clone() for name, tensor in policy.export_weights().items()}


def on_cpu(draft):
    """The tests also run where the policy is on a GPU; Transformers stays on the CPU."""
    names = ("token_ids", "embeds", "aux_hidden", "target_hidden", "target_head")
    return replace(draft, **{name: getattr(draft, name).cpu() for name in names})


def assert_bitwise(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name].cpu(), expected[name].cpu())]
    assert not different, different


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_weights_and_forward_equal_transformers(tmp_path, model_type, tied):
    """Bitwise back to Hugging Face; logits, embeddings and hidden states of the training forward are Transformers'."""
    policy = make_policy(save_checkpoint(tmp_path, model_type, tied=tied))
    model = hf_model(model_type, tied=tied)
    expected = model.state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert_bitwise(policy.export_weights(), expected)

    samples = rollout()
    update = policy.update(samples, CAPTURE)
    assert len(update.draft_samples) == len(samples)
    for sample, draft in zip(samples, [on_cpu(d) for d in update.draft_samples], strict=True):
        assert (draft.prompt_id, draft.sample_id) == sample.request.key
        assert draft.token_ids.tolist() == [*sample.request.prompt_ids, *sample.token_ids]
        assert draft.prompt_len == len(sample.request.prompt_ids) and draft.policy_version == 7
        with torch.no_grad():
            output = model(draft.token_ids[None], output_hidden_states=True)
        aux = torch.cat([output.hidden_states[k + 1][0] for k in CAPTURE.aux_layer_ids], dim=-1)
        torch.testing.assert_close(draft.target_logits, output.logits[0], atol=1e-5, rtol=0)
        # hidden_states[-1] of Transformers has the final norm on it, so the last layer is compared before it
        torch.testing.assert_close(draft.aux_hidden[:, :64], aux[:, :64], atol=1e-5, rtol=1e-5)
        normed = model.model.norm(draft.aux_hidden[:, 64:])
        torch.testing.assert_close(normed.detach(), aux[:, 64:], atol=1e-5, rtol=1e-5)
        assert torch.equal(draft.embeds, model.model.embed_tokens.weight[draft.token_ids])


def test_gradient_equals_autograd_on_transformers(checkpoint, tmp_path):
    """Every term at once: advantage, entropy bonus, KL to another reference, truncated importance sampling."""
    model, reference = hf_model(), hf_model()
    with torch.no_grad():
        for param in reference.parameters():
            param.mul_(1.1)
    reference.save_pretrained(tmp_path)
    algorithm = AlgorithmConfig(use_kl_loss=True, kl_loss_coef=0.3, entropy_coef=0.05, use_tis=True, tis_clip=1.5)
    samples = rollout()
    policy = make_policy(checkpoint, replace(CONFIG, ref_load=str(tmp_path)), algorithm)
    metrics = policy.update(samples).metrics
    kl_sum = 0.0

    def token_loss(sample, logp, entropy):
        nonlocal kl_sum
        weight = (logp.detach() - torch.tensor(sample.logprobs)).exp().clamp(max=1.5)
        with torch.no_grad():
            diff = response_log_probs(reference, sample)[0] - logp.detach()
        # k3 and its derivative in logp, d/dlogp (exp(r - l) - 1 + l - r) = 1 - exp(r - l)
        kl_sum += (diff.exp() - 1 - diff).sum().item()
        return -sample.advantage * logp * weight + 0.3 * (1 - diff.exp()) * logp - 0.05 * entropy

    _, expected = plain_gradients(model, samples, token_loss)
    assert_same_gradients(policy.export_gradients(), expected)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)

    tokens = sum(len(s.token_ids) for s in samples)
    with torch.no_grad():
        pairs = [(s, *response_log_probs(model, s)) for s in samples]
    diffs = torch.cat([(logp - torch.tensor(s.logprobs)).abs() for s, logp, _ in pairs])
    assert metrics["num_tokens"] == tokens
    assert metrics["kl"] == pytest.approx(kl_sum / tokens, rel=1e-4)
    assert metrics["entropy"] == pytest.approx(sum(e.sum().item() for _, _, e in pairs) / tokens, rel=1e-5)
    assert metrics["logp_diff_mean"] == pytest.approx(diffs.mean().item(), rel=1e-4)
    assert metrics["logp_diff_max"] == pytest.approx(diffs.max().item(), rel=1e-4)


def test_gradient_comparison_sees_a_wrong_temperature(checkpoint):
    policy = make_policy(checkpoint)
    policy.update(
        [
            replace(s, request=replace(s.request, sampling=replace(s.request.sampling, temperature=1.0)))
            for s in rollout()
        ]
    )
    _, expected = plain_gradients(hf_model(), rollout(), lambda s, logp, _: -s.advantage * logp)
    with pytest.raises(AssertionError):
        assert_same_gradients(policy.export_gradients(), expected)


def test_several_steps_clip_against_the_log_probs_that_served(checkpoint):
    """The second step's gradient uses ratios to the weights before the first, clipped."""
    samples = rollout(2, 4)
    policy = make_policy(checkpoint, algorithm=AlgorithmConfig(num_steps_per_rollout=2))
    metrics = policy.update(samples).metrics

    first_step = make_policy(checkpoint)
    first_step.update(samples[:4])
    served, moved = hf_model(), hf_model()
    moved.load_state_dict(first_step.export_weights())

    def token_loss(sample, logp, entropy):
        with torch.no_grad():
            old, _ = response_log_probs(served, sample)
        ratio = (logp - old).exp()
        return torch.maximum(-sample.advantage * ratio, -sample.advantage * ratio.clamp(0.8, 1.28))

    _, expected = plain_gradients(moved, samples[4:], token_loss)
    # weights that moved differ by Adam's rounding: looser than one step's gradient
    assert_same_gradients(policy.export_gradients(), expected, tolerance=1e-3)
    assert metrics["clip_frac"] > 0 and metrics["ratio_max"] > 1.28


@pytest.mark.parametrize("steps", [1, 2])
def test_capture_changes_no_bit_of_the_policy(checkpoint, steps):
    algorithm = AlgorithmConfig(num_steps_per_rollout=steps, entropy_coef=0.01)
    with_capture, without = make_policy(checkpoint, algorithm=algorithm), make_policy(checkpoint, algorithm=algorithm)
    for seed in range(2):
        with_capture.update(rollout(seed=seed), CAPTURE)
        without.update(rollout(seed=seed))
    assert_bitwise(with_capture.export_gradients(), without.export_gradients())
    assert_bitwise(with_capture.export_weights(), without.export_weights())


def test_capture_comes_from_the_weights_that_served(checkpoint):
    """Also with several steps, where the training forwards see moved weights."""
    one = make_policy(checkpoint).update(rollout(), CAPTURE)
    two = make_policy(checkpoint, algorithm=AlgorithmConfig(num_steps_per_rollout=2)).update(rollout(), CAPTURE)
    for a, b in zip(one.draft_samples, two.draft_samples, strict=True):
        torch.testing.assert_close(a.target_logits, b.target_logits, atol=1e-5, rtol=0)


def test_capture_is_bounded_and_counts_what_it_drops(checkpoint):
    samples = rollout()
    policy = make_policy(checkpoint)
    full = policy.update(samples, CAPTURE)
    limit = sum(d.num_bytes for d in full.draft_samples) // 2
    first = policy.update(samples, CaptureSpec((0, 1, 3), limit))
    second = policy.update(samples, CaptureSpec((0, 1, 3), limit))
    for update in (first, second):
        assert 0 < sum(d.num_bytes for d in update.draft_samples) <= limit
        assert update.metrics["draft_samples_dropped"] == len(samples) - len(update.draft_samples)
    keys = [{(d.prompt_id, d.sample_id) for d in update.draft_samples} for update in (first, second)]
    assert keys[0] != keys[1]


def test_chosen_samples_lie_evenly():
    chosen = choose_captured(dict.fromkeys(range(100), 1), 10, turn=3)
    assert all(any(i in chosen for i in range(start, start + 20)) for start in range(0, 100, 20))


def test_the_end_of_the_budget_is_not_filled_with_short_samples():
    num_bytes = {i: 9 if i % 2 else 1 for i in range(200)}
    chosen = [i for turn in range(40) for i in choose_captured(num_bytes, 40, turn)]
    assert 0.35 < sum(i % 2 for i in chosen) / len(chosen) < 0.6
    assert choose_captured({0: 5, 1: 3}, 4, turn=0) == {1}  # one that alone is too large does not keep out all others


def test_recompute_takes_the_same_step(checkpoint):
    plain, recomputed = make_policy(checkpoint), make_policy(checkpoint, replace(CONFIG, recompute=True))
    a, b = plain.update(rollout(), CAPTURE), recomputed.update(rollout(), CAPTURE)
    assert_same_gradients(recomputed.export_gradients(), plain.export_gradients(), tolerance=1e-6)
    assert all(torch.equal(x.aux_hidden, y.aux_hidden) for x, y in zip(a.draft_samples, b.draft_samples, strict=True))


@pytest.mark.parametrize(
    ("bad_advantage", "message"),
    [(float("nan"), "loss is nan in the micro-batch of prompt/sample .*1/2"), (3e38, "gradient norm is (inf|nan)")],
)
def test_step_that_is_not_finite_is_refused_and_leaves_no_trace(checkpoint, bad_advantage, message):
    policy, untouched = make_policy(checkpoint), make_policy(checkpoint)
    for each in (policy, untouched):
        each.update(rollout(seed=1))
    before = weights(policy)
    bad = [replace(s, advantage=bad_advantage) if s.request.key == (1, 2) else s for s in rollout()]
    with pytest.raises(PolicyUpdateError, match=message):
        policy.update(bad)
    assert_bitwise(policy.export_weights(), before)
    for each in (policy, untouched):  # the optimizer's state is as if the bad batch had never been
        each.update(rollout(seed=2))
    assert_bitwise(policy.export_weights(), untouched.export_weights())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_distributed_optimizer", [False, True])
def test_resume_equals_an_unbroken_run_bitwise(checkpoint, tmp_path, dtype, use_distributed_optimizer):
    config = replace(CONFIG, dtype=dtype, clip_grad=1.0, lr_warmup_iters=2, lr_decay_style="cosine")
    # the production combination is with recompute
    config = replace(config, use_distributed_optimizer=use_distributed_optimizer, recompute=use_distributed_optimizer)
    config = replace(config, weight_decay=0.1)
    policy = make_policy(checkpoint, config)
    for seed in range(2):
        policy.update(rollout(seed=seed))
    policy.save(tmp_path / "state")
    saved = weights(policy)
    unbroken = [policy.update(rollout(seed=seed)).metrics for seed in (2, 3)]

    resumed = make_policy(checkpoint, config)
    resumed.load(tmp_path / "state")
    assert_bitwise(resumed.export_weights(), saved)
    assert [resumed.update(rollout(seed=seed)).metrics for seed in (2, 3)] == unbroken
    assert_bitwise(resumed.export_weights(), policy.export_weights())


def test_learning_rate_schedule(checkpoint):
    config = replace(CONFIG, lr=1e-3, lr_warmup_iters=2, lr_decay_iters=4, lr_decay_style="linear")
    policy = make_policy(checkpoint, config)
    rates = [policy.update(rollout(1, 2)).metrics["lr"] for _ in range(4)]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])


def test_saved_folder_loads_in_transformers(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    (checkpoint / "tokenizer.json").write_text("{}")
    policy = make_policy(checkpoint)
    policy.update(rollout())
    (tmp_path / f"{ASIDE}policy").mkdir()  # what a killed writer left
    for _ in range(2):  # the second replaces the first
        policy.save_hf(tmp_path / "policy")
    assert (tmp_path / "policy" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert_bitwise(model.state_dict(), policy.export_weights())


@pytest.mark.parametrize("limit_bytes", [1_000, 100_000])
@pytest.mark.parametrize("method", ["save", "save_hf"])
def test_writes_that_fail_are_one_line_errors(checkpoint, tmp_path, method, limit_bytes):
    """A file-size limit stands for a full disk: in the first file, or in the middle of the weights."""
    policy = make_policy(checkpoint)
    policy.update(rollout(1, 2))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the limit kills the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, unlimited[1]))
    try:
        with pytest.raises(OSError, match="cannot be saved") as caught:
            getattr(policy, method)(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, signal_before)
    assert "\n" not in str(caught.value)
    if method == "save_hf":
        assert not list(tmp_path.iterdir())


def test_bfloat16_is_near_float32(checkpoint):
    samples = rollout()
    exact = make_policy(checkpoint).update(samples).metrics
    rough = make_policy(checkpoint, replace(CONFIG, dtype="bfloat16")).update(samples).metrics
    assert rough["entropy"] == pytest.approx(exact["entropy"], rel=1e-2)
    assert rough["grad_norm"] == pytest.approx(exact["grad_norm"], rel=5e-2)


def test_cuda_is_itself_again_outside_of_the_policy(checkpoint):
    before = torch.cuda.current_device, torch.cuda.synchronize, torch.cuda._lazy_call
    make_policy(checkpoint)
    assert (torch.cuda.current_device, torch.cuda.synchronize, torch.cuda._lazy_call) == before
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_weights_that_do_not_fit_are_named(tmp_path):
    folder = save_checkpoint(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    odd = tensors.pop("model.layers.2.mlp.down_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers\.2\.mlp\.down_proj\.weight is missing"):
        make_policy(folder)
    save_file(tensors | {"model.layers.2.mlp.down_proj.weight": odd[:, 1:].clone()}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers\.2\.mlp\.down_proj\.weight has shape \[32, 47\]"):
        make_policy(folder)
    bias = "model.layers.2.self_attn.q_proj.bias"
    save_file(
        tensors | {"model.layers.2.mlp.down_proj.weight": odd, bias: torch.ones(32)}, folder / "model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"model\.safetensors: tensor .*q_proj\.bias does not belong"):
        make_policy(folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        make_policy(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        make_policy(folder)


def test_sharded_checkpoint(tmp_path):
    hf_model().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert_bitwise(make_policy(tmp_path).export_weights(), hf_model().state_dict())
    shards[1].unlink()
    with pytest.raises(ConfigError, match=shards[1].name):
        make_policy(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"index\.json: not JSON"):
        make_policy(tmp_path)


def test_unknown_megatron_key_names_the_nearest(checkpoint):
    with pytest.raises(ConfigError, match="did you mean attention_softmax_in_fp32"):
        make_policy(checkpoint, replace(CONFIG, megatron={"attention_softmax_in_fp3": True}))


def test_capture_of_a_layer_that_is_not_there_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="4 layers"):
        make_policy(checkpoint).update(rollout(), CaptureSpec((0, 1, 4), 1 << 30))


def test_policies_of_one_process_share_their_groups(checkpoint):
    """Each would else leave tens of groups and their threads behind."""
    first = make_policy(checkpoint).layout
    num_threads = threads()
    second = make_policy(checkpoint).layout
    assert all(getattr(first, axis).group is getattr(second, axis).group for axis in ("tp", "dp", "pp"))
    assert threads() == num_threads


def test_groups_end_with_their_world(checkpoint):
    first = make_policy(checkpoint).layout.dp.group
    dist.destroy_process_group()
    second = make_policy(checkpoint).layout.dp.group
    assert second is not first and second.size() == 1
    dist.all_reduce(torch.ones(1), group=second)


def threads() -> int:
    return psutil.Process().num_threads()
