"""From checkpoint folders to a running engine: what `train`, `generate` and `serve` share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draft_models.checkpoint import load_draft, save_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import DraftError, Eagle3, Eagle3Config
from rollout_engine.config import RolloutConfig, SpeculationConfig
from rollout_engine.decoder import Decoder
from rollout_engine.hf_checkpoint import CheckpointError
from rollout_engine.memory import TrainerNeed, count_parameters, trainer_needed
from rollout_engine.sglang_preflight import NoGpu, check_folder, check_start
from rollout_engine.torch_engine import TorchEngine
from rollout_engine.types import RolloutEngine
from sync.atomic import whole_folder
from trainer.config import ConfigError, RunConfig
from trainer.distributed import world_size
from trainer.hf_files import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollout_engine.sglang_engine import SGLangEngine

_EAGLE3_ALONE = SpeculationConfig()
_NOTHING_MORE = TrainerNeed()
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises ConfigError naming the folder when there is none or it is corrupt."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give a Hugging Face checkpoint folder")
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise ConfigError(f"{folder}: no tokenizer (tokenizer.json); save the policy's tokenizer beside its weights")
    if (folder / "config.json").exists():
        read_config(folder)  # Transformers reads it too, and says less when it is corrupt
    logging.set_verbosity_error()  # a prompt that is too long is told in this project's own words
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: the tokenizer cannot be read ({str(error).splitlines()[0]})") from error


def eos_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response: generation_config.json, else config.json, else the tokenizer's.

    Raises ConfigError naming the file when one of them is corrupt, or when none names an id.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = _read_object(path).get("eos_token_id") if path.exists() else None
        ids = found if isinstance(found, list) else [found]
        if found is not None and not all(isinstance(token_id, int) for token_id in ids):
            raise ConfigError(f"{path}: eos_token_id = {found!r} is neither an id nor a list of ids")
        if found is not None:
            return tuple(ids)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{folder}: neither config nor tokenizer names an eos token; set eos_token_id in config.json")
    return (int(tokenizer.eos_token_id),)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def context_length(folder: Path, rollout: RolloutConfig) -> int:
    """Positions of one sequence: the setting, or what the checkpoint was made for. ConfigError when it does not say."""
    limit = size_of(folder, "max_position_embeddings", "the positions that the model was trained for")
    if rollout.context_length > limit:
        raise ConfigError(
            f"rollout.context_length = {rollout.context_length} is above the {limit} positions of {folder}"
        )
    return rollout.context_length or limit


def size_of(folder: Path, key: str, what: str) -> int:
    """A number in the checkpoint's config.json; ConfigError, saying that it is `what`, when it is not there."""
    found = read_config(folder).get(key)
    if not isinstance(found, int):
        raise ConfigError(f"{folder / 'config.json'}: key {key} is missing or not a number; add {what}")
    return found


def device_of(rollout: RolloutConfig) -> torch.device:
    """Where the engine computes; "auto" takes CUDA when there is one. ConfigError for what this machine has not."""
    name = rollout.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"rollout.device = {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    device, num_gpus = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ConfigError(f"rollout.device = {name!r}: this machine has {num_gpus} CUDA devices; use auto or cpu")
    return device


def read_draft(folder: Path, target: Path) -> Eagle3:
    """A draft checkpoint that fits the policy in `target`; ConfigError says which file or size does not."""
    try:
        return load_draft(folder, read_config(target))
    except (DraftError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error


def check_asked(asked: DraftConfig, draft: Eagle3, folder: Path) -> None:
    """ConfigError for a setting of `[draft]` that says another size than the draft in `folder` has."""
    sizes = draft.config
    for key, wanted, has in (
        ("aux_layer_ids", asked.aux_layer_ids, sizes.aux_layer_ids),
        ("draft_vocab_size", asked.draft_vocab_size, sizes.draft_vocab_size),
        ("intermediate_size", asked.intermediate_size, sizes.intermediate_size),
    ):
        if wanted and wanted != has:
            raise ConfigError(f"draft.{key} = {wanted}, but the draft in {folder} has {has}: leave the setting out")


def check_engine(rollout: RolloutConfig) -> None:
    """What shows without loading anything. ConfigError or EngineConfigError for a device that is not there or cannot do
    what is asked, an SGLang that is not installed or not known, server flags that it does not take, and a folder for
    weights that cannot be written to."""
    if rollout.engine == "torch":
        device_of(rollout)
        return
    if rollout.sync_dir:
        check_folder("rollout.sync_dir", Path(rollout.sync_dir))
    if not rollout.sglang_address:
        check_start(rollout)


def check_engine_for(config: RunConfig, folder: Path, hf_config: Mapping[str, Any]) -> None:
    """`check_engine`; of a GPU that is not there, also what it would have to hold."""
    try:
        check_engine(config.rollout)
    except NoGpu as error:
        from rollout_engine.sglang_launch import engine_need

        rollout, draft = config.rollout, None
        if rollout.speculative_algorithm == "EAGLE3":
            path = rollout.speculative_draft_model_path
            draft = Path(path) if path else Eagle3Config.from_target(hf_config, config.draft)
        need = engine_need(rollout, folder, draft, context_length(folder, rollout))
        raise NoGpu(f"{error}; the engine needs {need}") from error


def check_server(policy: Path, config: RunConfig, draft: Eagle3 | None, num_ranks: int) -> float | None:
    """All that a run on `num_ranks` would refuse in starting its SGLang server, or in attaching to the one at an
    address, which is only asked what it is. Nothing is started or written.

    Returns the share of the GPU's free memory that the server would take; None where that is not ours to say.
    EngineConfigError as SGLangEngine has it.
    """
    from rollout_engine.sglang_launch import attach, check_launch

    rollout = config.rollout
    positions = context_length(policy, rollout)
    if rollout.sglang_address:
        attach(rollout, policy, positions).client.close()
        return None
    folder = rollout.speculative_draft_model_path
    return check_launch(
        rollout,
        policy,
        None if draft is None else Path(folder) if folder else draft.config,
        positions,
        trainer=trainer_need(policy, config, draft, num_ranks),
        held_bytes=_held_at_start(policy, config, draft, num_ranks),
    )


def _num_parts(config: RunConfig) -> int:
    """Over how many ranks the policy is cut."""
    return config.policy.tensor_model_parallel_size * config.policy.pipeline_model_parallel_size


def _held_at_start(policy: Path, config: RunConfig, draft: Eagle3 | None, num_ranks: int) -> int:
    """Bytes that a trainer holds on rank 0's GPU when the engine starts; none of an engine that is on another one.

    Weights and float32 gradients of the policy, in bfloat16 float32 master copies too, and weights of the draft.
    """
    if config.rollout.device not in ("auto", "cuda", "cuda:0"):
        return 0
    num_params, num_parts = count_parameters(policy), _num_parts(config)
    masters = num_params // (num_ranks if config.policy.use_distributed_optimizer else num_parts)
    itemsize = DTYPES[config.policy.dtype].itemsize
    draft_is_here = draft is not None and config.policy.pipeline_model_parallel_size == 1
    return (
        (itemsize + 4) * (num_params // num_parts)
        + (4 * masters if itemsize < 4 else 0)
        + (sum(weight.nbytes for weight in draft.parameters()) if draft_is_here else 0)
    )


def trainer_need(policy: Path, config: RunConfig, draft: Eagle3 | None, num_ranks: int = 0) -> TrainerNeed:
    """What training is yet to take of the engine's GPU, which is rank 0's. `draft` None: none that is trained.

    `num_ranks` 0: as many as have come together.
    """
    num_parts = _num_parts(config)
    shares = (num_ranks or world_size()) if config.policy.use_distributed_optimizer else num_parts
    num_params = count_parameters(policy)
    head_size = size_of(policy, "vocab_size", "its size") * size_of(policy, "hidden_size", "its size")
    draft_is_here = config.policy.pipeline_model_parallel_size == 1  # else it and its data are on the last stage
    head_bytes = head_size * DTYPES[config.policy.dtype].itemsize
    return trainer_needed(
        policy_params=num_params,
        adam_params=num_params // shares,
        draft_params=sum(weight.numel() for weight in draft.parameters()) if draft is not None else 0,
        trains_draft=config.draft.when != "never" and draft_is_here,
        itemsize=DTYPES[config.rollout.dtype].itemsize,
        gathers=num_parts > 1,
        capture_bytes=config.draft.capture_max_bytes + head_bytes if draft is not None and draft_is_here else 0,
    )


def build_engine(
    policy: Path,
    rollout: RolloutConfig,
    draft: Eagle3 | None,
    tokenizer: PreTrainedTokenizerBase,
    work_dir: Path,
    *,
    speculation: SpeculationConfig = _EAGLE3_ALONE,
    serves_files: bool = False,
    trainer: TrainerNeed = _NOTHING_MORE,
) -> RolloutEngine:
    """An engine for `policy` (and `draft`, which it takes over); the caller closes it.

    A server serves nothing before the first sync, except with `serves_files`: the weights in the folders. `work_dir`
    is for what it leaves (log, drafts); the embedded engine writes nothing. `trainer` is what a run beside it is yet to
    take of the GPU's memory, which a server leaves free. ConfigError, EngineConfigError or
    EngineError for what cannot be loaded or started.
    """
    if rollout.engine == "sglang":
        return start_sglang(policy, rollout, draft, tokenizer, work_dir, serves_files=serves_files, trainer=trainer)
    return _embedded_engine(policy, rollout, draft, tokenizer, speculation)


def _embedded_engine(
    policy: Path,
    rollout: RolloutConfig,
    draft: Eagle3 | None,
    tokenizer: PreTrainedTokenizerBase,
    speculation: SpeculationConfig,
) -> TorchEngine:
    dtype, device = DTYPES[rollout.dtype], device_of(rollout)
    try:
        decoder = Decoder.from_hf(policy, dtype, device)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    return TorchEngine(
        decoder,
        rollout,
        draft=None if draft is None else draft.to(device=device, dtype=dtype),
        eos_token_ids=eos_token_ids(policy, tokenizer),
        # with special tokens, since stop strings such as <|im_end|> are some
        detokenize=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False),
        version=-1,  # nothing is served before the first sync, which is version 0 or the resumed step
        speculation=speculation,
    )


def start_sglang(
    policy: Path,
    rollout: RolloutConfig,
    draft: Eagle3 | None,
    tokenizer: PreTrainedTokenizerBase,
    work_dir: Path,
    *,
    serves_files: bool,
    trainer: TrainerNeed = _NOTHING_MORE,
) -> SGLangEngine:
    """A server of the two models, or the one at `rollout.sglang_address`: the one way of trainer and serve."""
    from rollout_engine.sglang_engine import SGLangEngine

    return SGLangEngine(
        policy,
        rollout,
        draft=None if draft is None else draft_folder(rollout, draft, work_dir),
        eos_token_ids=eos_token_ids(policy, tokenizer),
        work_dir=work_dir,
        serves_files=serves_files,
        trainer=trainer,
        detokenize=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False),
    )


def draft_folder(rollout: RolloutConfig, draft: Eagle3, work_dir: Path) -> Path:
    """Where a server finds the draft: its own folder, or for a random one `work_dir/draft`, written now."""
    if rollout.speculative_draft_model_path:
        return Path(rollout.speculative_draft_model_path)
    with whole_folder(work_dir / "draft") as folder:
        save_draft(draft, folder)
    return work_dir / "draft"
