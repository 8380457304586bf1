"""The policy: a Megatron-core GPTModel with Megatron's DDP, optimizer, scheduler and pipeline schedule.

The one file that imports Megatron. Every rank runs the same calls with the same samples (SPMD). Layers are Megatron's
local ones; its Transformer Engine layers are not supported, and not used where that package is installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from draft_models.types import DraftSample
from rollout_engine.types import Sample
from trainer import distributed, losses, megatron_names, megatron_settings, optimizer_resume, packing
from trainer.config import AlgorithmConfig, ConfigError, PolicyConfig
from trainer.hf_files import read_config, write_checkpoint
from trainer.megatron_cpu import cuda_as_cpu
from trainer.megatron_layers import PackedCausalAttention, RMSNorm
from trainer.policy_attention import PackedLayout, attention_name
from trainer.policy_batch import (
    MicroBatch,
    Report,
    empty_report,
    make_micro_batch,
    policy_loss,
    reduce_reports,
    sequence_length,
)
from trainer.policy_capture import (
    CaptureSpec,
    StageRecorder,
    captured_modules,
    choose_captured,
    copy_of_head,
    draft_bytes_per_token,
)
from trainer.policy_layout import Axis, RankLayout, can_share_groups
from trainer.policy_weights import WeightMap, collect, load_weights
from trainer.vocab_parallel import log_probs_and_entropy

with cuda_as_cpu(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # each missing CUDA extension is announced; none is used
    import megatron.core.jit

    megatron.core.jit.disable_jit_fuser()  # before the rest: compiling the fusions costs seconds and a compiler
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset


@dataclasses.dataclass
class PackedBatchParams(PackedSeqParams):
    """What Megatron hands from the model to every layer's core attention."""

    layout: PackedLayout | None = None


class PolicyUpdateError(RuntimeError):
    """A step was refused (loss or gradient not finite); parameters and optimizer state are those before it."""


@dataclasses.dataclass(frozen=True, slots=True)
class PolicyUpdate:
    """Result of one update. `draft_samples` exist on last-stage ranks only: this data-parallel rank's samples."""

    metrics: dict[str, float]  # the same on every rank
    draft_samples: list[DraftSample]


def _megatron_runs(method: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a method that runs Megatron code; see `megatron_cpu`."""

    @wraps(method)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with cuda_as_cpu():
            return method(*args, **kwargs)

    return inside


def _init_model_parallel(config: PolicyConfig, device: torch.device) -> RankLayout:
    can_share = can_share_groups(config.tensor_model_parallel_size, config.pipeline_model_parallel_size)
    if not (can_share and mpu.is_initialized()):
        mpu.destroy_model_parallel()
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        )
    # Megatron's layers ask for this tracker; without dropout nothing is drawn from it
    model_parallel_cuda_manual_seed(0, inference_rng_tracker=True, force_reset_rng=True)
    groups = (
        mpu.get_tensor_model_parallel_group(),
        mpu.get_data_parallel_group(),
        mpu.get_pipeline_model_parallel_group(),
    )
    tp, dp, pp = (Axis(group.rank(), group.size(), group) for group in groups)
    return RankLayout(tp, dp, pp, device)


def _transformer_config(config: PolicyConfig, hf_config: Mapping[str, Any]) -> TransformerConfig:
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    fields = megatron_settings.config_fields(config, hf_config, known)
    try:
        return TransformerConfig(**fields, finalize_model_grads_func=finalize_model_grads)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"[policy] and [policy.megatron] do not fit together: {error}") from error


def _build_model(config: TransformerConfig, hf_config: Mapping[str, Any], layout: RankLayout) -> GPTModel:
    """This rank's stage and slice; the weights are yet to be loaded."""
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedCausalAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm),
        vocab_size=hf_config["vocab_size"],
        max_sequence_length=hf_config["max_position_embeddings"],
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        position_embedding_type="none",  # PackedCausalAttention rotates
        share_embeddings_and_output_weights=hf_config.get("tie_word_embeddings", False),
    )
    return model.to(layout.device)


class MegatronPolicy:
    """A policy on this rank's part of the ranks. All methods are collective."""

    @_megatron_runs
    def __init__(
        self,
        config: PolicyConfig,
        algorithm: AlgorithmConfig,
        hf_checkpoint: str | Path,
        *,
        train_iters: int = 1,
    ):
        """Loads `hf_checkpoint` (a Hugging Face folder) onto the ranks.

        `train_iters` is the number of optimizer steps of the run; the learning-rate schedule uses it where
        `config.lr_decay_iters` is 0. Raises ConfigError for settings or weights that do not fit.
        """
        losses.check_kl_loss_type(algorithm.kl_loss_type)
        self.config, self.algorithm = config, algorithm
        self._hf_folder = Path(hf_checkpoint)
        self.hf_config = read_config(self._hf_folder)
        device = distributed.init_distributed()
        megatron_settings.check_layout(config, self.hf_config["vocab_size"], distributed.world_size())
        self.layout = _init_model_parallel(config, device)
        self.megatron_config = _transformer_config(config, self.hf_config)
        self._weight_map = WeightMap(
            megatron_names.Heads(self.megatron_config.num_query_groups, self.megatron_config.kv_channels),
            get_transformer_layer_offset(self.megatron_config),
            self.hf_config.get("tie_word_embeddings", False),
            self.layout,
        )
        self._num_updates = 0
        heads = self.megatron_config.kv_channels
        self._rope = megatron_settings.rope_of(self.hf_config, heads, self.megatron_config.params_dtype, device)
        self._model = self._load_model(self._hf_folder)
        self._reference: GPTModel | None = None
        if algorithm.use_kl_loss:
            self._reference = self._load_model(Path(config.ref_load) if config.ref_load else self._hf_folder)
            self._reference.requires_grad_(False)
        self._build_optimizer(train_iters)

    def _load_model(self, folder: Path) -> GPTModel:
        model = _build_model(self.megatron_config, self.hf_config, self.layout)
        load_weights(model, folder, self._weight_map)
        return model

    def _build_optimizer(self, train_iters: int) -> None:
        """After the weights are in: the fp32 master copies of a bf16 policy are taken here."""
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=self.config.use_distributed_optimizer
        )
        self._ddp = DistributedDataParallel(self.megatron_config, ddp_config, self._model)
        optimizer_config = OptimizerConfig(**megatron_settings.optimizer_fields(self.config))
        self._optimizer = get_megatron_optimizer(
            optimizer_config, [self._ddp], config_overrides=get_standard_config_overrides(optimizer_config)
        )
        self.megatron_config.grad_scale_func = self._optimizer.scale_loss
        schedule = megatron_settings.scheduler_fields(self.config, train_iters)
        self._scheduler = OptimizerParamScheduler(self._optimizer, **schedule)

    @property
    def is_draft_rank(self) -> bool:
        """Whether this rank gets draft samples: it is on the last pipeline stage."""
        return self.layout.is_last_stage

    @property
    def draft_group(self) -> dist.ProcessGroup:
        """The ranks whose draft samples differ: this rank's data-parallel group."""
        return self.layout.dp.group

    @property
    def attention(self) -> str:
        """The kernel that computes attention, for logs."""
        config = self.megatron_config
        return attention_name(config.params_dtype, self.layout.device, config.kv_channels)

    @property
    def hidden_size(self) -> int:
        return self.megatron_config.hidden_size

    # ---- the update ----

    @_megatron_runs
    def update(self, samples: Sequence[Sample], capture: CaptureSpec | None = None) -> PolicyUpdate:
        """One rollout's optimizer steps (`num_steps_per_rollout`) on `samples`, the same full list on every rank.

        Every sample carries an advantage. With `capture`, draft samples come from the forward under the weights that
        served the rollout. Raises PolicyUpdateError on every rank when a loss or gradient is not finite; that
        step is not taken.
        """
        ordered = sorted((s for s in samples if s.token_ids), key=lambda s: s.request.key)
        if not ordered:
            raise PolicyUpdateError(f"no response token to learn from in {len(samples)} samples")
        steps = self._plan(ordered)
        batches = [batch for step in steps for batch in step]
        recorder = self._recorder(ordered, batches, capture) if capture else None
        ref_logp = self._log_probs(self._reference, batches) if self._reference else None
        old_logp = self._log_probs(self._model, batches, recorder) if len(steps) > 1 else None

        reports, grad_norms, lr = [], [], 0.0
        for number, step in enumerate(steps):
            lr = self._optimizer.param_groups[0]["lr"]
            objective = partial(self._loss, old_logp=old_logp, ref_logp=ref_logp)
            step_reports = self._run(self._ddp, step, objective, recorder if old_logp is None else None)
            where = f"step {number + 1} of {len(steps)}"
            grad_norms.append(self._take_step(ordered, step_reports, where))
            reports += step_reports
        self._num_updates += 1

        metrics = reduce_reports(reports, self.layout) | {"grad_norm": sum(grad_norms) / len(grad_norms), "lr": lr}
        if recorder is None or capture is None:
            return PolicyUpdate(metrics, [])
        if self.layout.pp.size > 1:
            recorder.bring_to_last_stage()
        metrics |= recorder.counts(sum(len(batch.sample_indices) for batch in batches))
        return PolicyUpdate(metrics, recorder.draft_samples(ordered, capture) if self.is_draft_rank else [])

    def _plan(self, samples: Sequence[Sample]) -> list[list[MicroBatch]]:
        """This rank's micro-batches of each optimizer step."""
        parts = packing.split_evenly(len(samples), min(self.algorithm.num_steps_per_rollout, len(samples)))
        # sequence parallelism cuts the packed tokens over the tensor-parallel ranks
        multiple = self.layout.tp.size if self.megatron_config.sequence_parallel else 1
        steps = []
        for part in parts:
            lengths = [sequence_length(samples[i]) for i in part]
            mine = packing.pack(lengths, self.config.max_tokens_per_gpu, self.layout.dp.size)[self.layout.dp.rank]
            indices = [[part[j] for j in micro_batch] for micro_batch in mine]
            steps.append([make_micro_batch(samples, i, multiple, self.layout.device) for i in indices])
        return steps

    def _run(
        self,
        model: torch.nn.Module,
        batches: Sequence[MicroBatch],
        objective: Callable[..., tuple[torch.Tensor, Report]],
        recorder: StageRecorder | None = None,
        *,
        forward_only: bool = False,
    ) -> list[Report]:
        """Megatron's pipeline schedule over the micro-batches; reports exist on the last stage only."""
        if not forward_only:
            self._ddp.zero_grad_buffer()
            self._optimizer.zero_grad()
        with recorder.attached() if recorder else contextlib.nullcontext():
            return get_forward_backward_func()(
                forward_step_func=partial(self._forward, objective=objective, recorder=recorder),
                data_iterator=iter(batches),
                model=[model],
                num_microbatches=len(batches),
                seq_length=max(sum(batch.lengths) for batch in batches),  # read only where lengths do not vary
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _forward(
        self,
        batches: Iterator[MicroBatch],
        model: torch.nn.Module,
        *,
        objective: Callable[..., tuple[torch.Tensor, Report]],
        recorder: StageRecorder | None,
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, Report]]]:
        batch = next(batches)
        packed = PackedBatchParams(qkv_format="thd", layout=self._packed_layout(batch))
        with recorder.recording(batch) if recorder else contextlib.nullcontext():
            output = model(batch.tokens_T[None], batch.positions_T[None], None, packed_seq_params=packed)

        def reduce_output(logits_1TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Report]:
            loss, report = self._batch_loss(logits_1TV[0], batch, objective)
            # `full` and not `tensor`: a copy from the CPU would wait for the forward
            num_tokens = torch.full((), report.num_tokens, dtype=torch.int, device=self.layout.device)
            return loss, num_tokens, report

        return output, reduce_output

    def _packed_layout(self, batch: MicroBatch) -> PackedLayout:
        cos_1T1D, sin_1T1D = self._rope.at(batch.positions_T[None])
        return PackedLayout(batch.lengths, batch.ends, cos_1T1D[0], sin_1T1D[0])

    def _batch_loss(
        self, logits_TV: torch.Tensor, batch: MicroBatch, objective: Callable[..., tuple[torch.Tensor, Report]]
    ) -> tuple[torch.Tensor, Report]:
        if not len(batch.targets_R):
            return logits_TV.sum() * 0.0, empty_report(self.layout.device)  # keeps the backward's collectives in step
        logp_R, entropy_R = log_probs_and_entropy(
            logits_TV, batch.rows_R, batch.targets_R, batch.temperature_R, self.layout.vocab_group
        )
        return objective(batch, logp_R, entropy_R)

    def _loss(
        self,
        batch: MicroBatch,
        logp_R: torch.Tensor,
        entropy_R: torch.Tensor,
        *,
        old_logp: Mapping[int, torch.Tensor] | None,
        ref_logp: Mapping[int, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, Report]:
        old_logp_R = None if old_logp is None else batch.per_token(old_logp)
        ref_logp_R = None if ref_logp is None else batch.per_token(ref_logp)
        return policy_loss(batch, logp_R, entropy_R, old_logp_R, ref_logp_R, self.algorithm)

    @torch.no_grad()
    def _log_probs(
        self, model: GPTModel, batches: Sequence[MicroBatch], recorder: StageRecorder | None = None
    ) -> dict[int, torch.Tensor]:
        """Log-probabilities of every response token, by sample; on the last stage (empty elsewhere)."""
        objective = partial(self._loss, old_logp=None, ref_logp=None)
        reports = self._run(model, batches, objective, recorder, forward_only=True)
        return {i: logp_R for report in reports for i, logp_R in report.log_probs.items()}

    def _take_step(self, samples: Sequence[Sample], reports: Sequence[Report], where: str) -> float:
        """Clips and steps; the gradient norm before clipping. Raises PolicyUpdateError where it is not finite."""
        bad = next((r for r in reports if not r.loss.isfinite()), None)
        message = None
        if bad is not None:
            keys = ", ".join("{}/{}".format(*samples[i].request.key) for i in bad.sample_indices)
            message = f"{where} refused: loss is {float(bad.loss)} in the micro-batch of prompt/sample {keys}"
        if message := distributed.first_message(message):
            raise PolicyUpdateError(message)
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):  # summed over all ranks: the same verdict everywhere
            first, last = samples[0].request.key, samples[-1].request.key
            raise PolicyUpdateError(
                f"{where} refused: the gradient norm is {grad_norm} over {len(samples)} samples, "
                f"prompt/sample {first[0]}/{first[1]} to {last[0]}/{last[1]}"
            )
        params = self._optimizer.get_parameters()
        if self.config.clip_grad > 0 and params:
            clip_grad_by_total_norm_fp32(params, max_norm=self.config.clip_grad, total_norm=grad_norm)
        self._optimizer.step_with_ready_grads()
        self._scheduler.step(increment=1)
        return grad_norm

    # ---- capture ----

    def _recorder(
        self, samples: Sequence[Sample], batches: Sequence[MicroBatch], capture: CaptureSpec
    ) -> StageRecorder:
        num_layers = self.megatron_config.num_layers
        if max(capture.aux_layer_ids) >= num_layers:
            raise ConfigError(f"draft.aux_layer_ids {capture.aux_layer_ids}: the policy has {num_layers} layers")
        bytes_per_token = draft_bytes_per_token(self.hidden_size, self.megatron_config.params_dtype.itemsize)
        indices = [i for batch in batches for i in batch.sample_indices]
        num_bytes = {i: bytes_per_token * sequence_length(samples[i]) for i in indices}
        return StageRecorder(
            modules=captured_modules(self._model, self._weight_map.layer_offset, capture.aux_layer_ids),
            hidden_size=self.hidden_size,
            chosen=choose_captured(num_bytes, capture.max_bytes, self._num_updates),
            layout=self.layout,
            sequence_parallel=self.megatron_config.sequence_parallel,
            head_VH=copy_of_head(self._model, self.layout) if self._model.post_process else None,
        )

    # ---- weights and state ----

    @_megatron_runs
    def export_weights(self) -> dict[str, torch.Tensor]:
        """Full tensors under Hugging Face names, detached, on global rank 0; empty elsewhere.

        They may share memory with the parameters: copy what is to outlive the next update.
        """
        return collect(self._model, self._weight_map, torch.Tensor.detach)

    @_megatron_runs
    def export_gradients(self) -> dict[str, torch.Tensor]:
        """The last step's gradients, clipped, as `export_weights` gives the weights.

        Not with the distributed optimizer, where a rank holds the sums of its own share only.
        """
        return collect(self._model, self._weight_map, lambda param: param.main_grad)

    @_megatron_runs
    def save_hf(self, directory: str | Path) -> None:
        """Writes a folder that `AutoModelForCausalLM` and the tokenizer load; an existing one is replaced."""
        weights = collect(self._model, self._weight_map, torch.Tensor.detach)
        message = None
        if distributed.rank() == 0:
            try:
                write_checkpoint(Path(directory), weights, self._hf_folder, self.config.dtype)
            except OSError as error:
                message = str(error)
        if message := distributed.first_message(message):
            raise OSError(message)

    def _sharded_state(self, *, is_loading: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
        }
        dp_cp_group = mpu.get_data_parallel_group(with_context_parallel=True)
        sharding = metadata | {"dp_cp_group": dp_cp_group}
        model = self._model.sharded_state_dict(metadata=sharding)
        state = {
            "model": model,
            "optimizer": self._optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=sharding),
            "scheduler": self._scheduler.state_dict(),
            "num_updates": self._num_updates,
        }
        return state, metadata

    @_megatron_runs
    def save(self, directory: str | Path) -> None:
        """Model, optimizer and scheduler into `directory` (made when missing), loadable under another layout.

        Raises OSError when it cannot be written.
        """
        if distributed.rank() == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        state, metadata = self._sharded_state(is_loading=False)
        # this save is synchronous: results need no queue between processes, and Megatron's own is a manager process
        # that would outlive a killed run
        filesystem_async._results_queue = queue.Queue()
        try:
            dist_checkpointing.save(state, str(directory), content_metadata=metadata)
        except CheckpointException as error:  # holds (exception, traceback) by rank
            cause = next(iter(error.failures.values()))[0]
            raise OSError(f"{directory}: the policy's state cannot be saved ({cause})") from error
        except RuntimeError as error:  # how torch.save reports a write that failed
            raise OSError(f"{directory}: the policy's state cannot be saved ({error})") from error

    @_megatron_runs
    def load(self, directory: str | Path) -> None:
        """Continues from `save`: bit for bit under the same layout and optimizer kind."""
        if self.config.use_distributed_optimizer:
            for optimizer in self._optimizer.chained_optimizers:
                optimizer_resume.create_adamw_state(optimizer)
        wanted, _ = self._sharded_state(is_loading=True)
        state = dist_checkpointing.load(wanted, str(directory))
        self._model.load_state_dict(state["model"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._num_updates = state["num_updates"]
        if self.config.use_distributed_optimizer:
            (optimizer,) = self._optimizer.chained_optimizers
            optimizer_resume.load_adamw_state(optimizer, state["optimizer"])
        else:
            self._optimizer.load_state_dict(state["optimizer"])
