"""`slipstream finetune-draft`: a draft for a policy that stands still, from prompts or finished rollouts.

    prompts -> answers of the target -> [target forward -> draft update] each step -> judged on held-out text -> --out

The target's hidden states live for one optimizer step: its forward runs just before the draft's, on that step's texts.
Ranks are data-parallel: each runs both models on its share of every step. Beside `--out DIR` lies `DIR.finetune`, with
answers, metrics and checkpoints; a killed run goes on from there with `--resume`, and takes the steps that it would
have taken. A draft that is not worth serving goes to `DIR.not-published` instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from draft_models.eagle3 import Eagle3
from draft_models.spellings import Spelling, Target
from rollout_engine.decoder import Decoder
from rollout_engine.speculation import CostTable, load_cost_table
from rollout_engine.types import Sample
from sync.atomic import whole_folder
from trainer.collective import from_rank_zero
from trainer.convert_draft import read_any_draft, save_draft_as, vllm_verdict
from trainer.distributed import init_distributed, rank, world_size
from trainer.finetune_answers import as_samples, generate_answers, make_requests, read_answers
from trainer.finetune_config import FinetuneConfig
from trainer.finetune_data import MIN_RESPONSE, check_answers, split_held_out
from trainer.finetune_inputs import Inputs, new_draft, read_inputs, read_target
from trainer.finetune_progress import FinetuneProgress
from trainer.finetune_score import Measured, ReadCost, why_worthless
from trainer.finetune_steps import Tuning, judged_line
from trainer.finetune_work import WorkDir, refuse_taken, taken
from trainer.metrics import MetricsWriter, read_metrics
from trainer.run_dir import cut_metrics
from trainer.serving import DTYPES, build_engine, device_of


class FinetuneError(RuntimeError):
    """A draft that was trained and is not worth publishing: why, and where it lies."""


def finetune(config: FinetuneConfig) -> int:
    """Fine-tune, or only convert, and return the exit status.

    ConfigError before anything is written; FinetuneError for a draft that is worth no more than the one it started
    from; DraftUpdateError for a loss that is not finite.
    """
    out = Path(config.out)
    refuse_taken(out)
    if not config.data:
        return _convert(config, out)
    device = _start(config)
    inputs, table = read_inputs(config), _measured_costs(config)
    with taken(config, inputs.fingerprint) as work, _progress(config) as progress:
        samples = _samples(config, inputs, work, progress)
        decoder = Decoder.from_hf(config.target, DTYPES[config.run.rollout.dtype], device)
        train, held_out = _split(config, samples)
        draft = inputs.source or new_draft(config, inputs, train)
        tuning = Tuning(config, draft.to(device), decoder, train, held_out)
        _run(tuning, work, progress)
        why = _why_worthless(tuning, ReadCost.of(draft, decoder), table)
        _publish(tuning, inputs.target, why, work, progress)
        if progress is not None:
            progress.print(_what_it_wins(tuning, table))
    return 0


def _measured_costs(config: FinetuneConfig) -> CostTable | None:
    """EngineConfigError for a file that is none, or was measured for fewer drafts than the engine will make."""
    rollout = config.run.rollout
    return load_cost_table(Path(rollout.cost_table), rollout.speculative_num_steps) if rollout.cost_table else None


def _start(config: FinetuneConfig) -> torch.device:
    """The process group, and where this rank computes."""
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first use
        torch.use_deterministic_algorithms(True)
    of_rank, asked = init_distributed(), device_of(config.run.rollout)
    return of_rank if asked.type == of_rank.type and world_size() > 1 else asked


@contextmanager
def _progress(config: FinetuneConfig) -> Iterator[FinetuneProgress | None]:
    """On the first rank alone."""
    if rank() > 0:
        yield None
        return
    with FinetuneProgress(config.out) as progress:
        yield progress


# ---------------------------------------------------------------- texts


def _samples(config: FinetuneConfig, inputs: Inputs, work: WorkDir, progress: FinetuneProgress | None) -> list[Sample]:
    """Prompts with responses, those of the file or the target's own, without responses too short to draft from."""
    rows, run = inputs.texts.rows, config.run
    if inputs.texts.are_prompts:
        requests = make_requests(rows, run.rollout, run.data.n_samples_per_prompt, run.seed)
        responses = from_rank_zero(lambda: _answers(config, inputs, requests, work, progress))
        check_answers(responses, "the target's answers")
    else:
        requests = make_requests(rows, run.rollout, 1, run.seed)
        responses = [row.response_ids or () for row in rows]
    samples = [s for s in as_samples(requests, responses) if len(s.token_ids) >= MIN_RESPONSE]
    if progress is not None:
        left_out = {"bad rows": inputs.texts.num_skipped, "short responses": len(requests) - len(samples)}
        notes = "".join(f", {count} {what} left out" for what, count in left_out.items() if count)
        progress.print(f"{len(samples)} texts, {sum(len(s.token_ids) for s in samples)} response tokens{notes}")
    return samples


def _answers(
    config: FinetuneConfig, inputs: Inputs, requests: list[Any], work: WorkDir, progress: FinetuneProgress | None
) -> list[tuple[int, ...]]:
    engine = build_engine(
        Path(config.target), config.run.rollout, None, inputs.tokenizer, work.engine, serves_files=True
    )
    try:
        assert progress is not None
        generate_answers(engine, requests, work.answers_file, progress.answered)
    finally:
        engine.close()
    return read_answers(work.answers_file)


def _split(config: FinetuneConfig, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    prompts = [sample.request.prompt_ids for sample in samples]
    lengths = [len(sample.request.prompt_ids) + len(sample.token_ids) for sample in samples]
    train, held_out = split_held_out(prompts, lengths, config.held_out, config.held_out_tokens, config.run.seed)
    return [samples[i] for i in train], [samples[i] for i in held_out]


# ---------------------------------------------------------------- steps


def _run(tuning: Tuning, work: WorkDir, progress: FinetuneProgress | None) -> None:
    tuning.begin(work.checkpoints)
    writers: list[MetricsWriter] = []  # of the first rank alone

    def open_metrics() -> None:
        cut_metrics(work.metrics_file, tuning.next_step - 1)
        lines = read_metrics(work.metrics_file) if tuning.next_step else []
        writers.append(MetricsWriter(work.path, resumed_at=tuning.next_step if tuning.config.resume else None))
        if progress is not None:
            progress.judged(judged_line(tuning.before), tuning.total_steps, lines)

    def write(line: dict[str, Any]) -> None:
        writers[0].write(line)
        if progress is not None:
            progress.step(line, tuning.total_steps)

    from_rank_zero(open_metrics)
    try:
        tuning.run(work.checkpoints, lambda line: from_rank_zero(lambda: write(line)))
    finally:
        for writer in writers:
            writer.close()


# ---------------------------------------------------------------- the result


def _why_worthless(tuning: Tuning, cost: ReadCost, table: CostTable | None) -> str | None:
    source = tuning.config.source
    started_from = f"the draft in {source}" if source else "an untrained draft"
    return why_worthless(tuning.best.forecast, tuning.before, cost, table, started_from)


def _what_it_wins(tuning: Tuning, table: CostTable | None) -> str:
    """Of a draft that was published."""
    if table is None:
        return (
            "not shown to pay: no measured costs were given (--rollout.cost-table FILE), only what its weights take to "
            "read was reckoned"
        )
    return f"by the measured costs up to {Measured.best(table, tuning.best.forecast)}"


def _publish(tuning: Tuning, target: Target, why: str | None, work: WorkDir, progress: FinetuneProgress | None) -> None:
    """The best draft becomes `out`; a worthless one, for `why`, is put aside, and every rank raises FinetuneError."""
    config = tuning.config
    folder = Path(config.out if why is None else f"{config.out}.not-published")
    spelling = Spelling(config.export)
    draft = tuning.best_draft()
    from_rank_zero(lambda: write_draft(draft, folder, spelling, target))
    if progress is not None:
        progress.print_summary(judged_line(tuning.before), judged_line(tuning.best.forecast))
    if why is not None:
        raise FinetuneError(f"not published to {config.out}: {why}; the draft lies in {folder}")
    if progress is not None:
        progress.print(f"{folder}: a draft in the spelling of {spelling}; {vllm_verdict(draft, spelling)}")
        shutil.rmtree(work.checkpoints, ignore_errors=True)  # optimizer states, of no use any more


def write_draft(draft: Eagle3, folder: Path, spelling: Spelling, target: Target) -> None:
    """The folder, whole or not at all, after it was read back. Raises OSError that names it: a full disk; RuntimeError
    when it reads otherwise."""
    with whole_folder(folder) as aside:
        try:
            save_draft_as(draft, aside, spelling, target)
        except OSError as error:
            raise OSError(str(error).replace(str(aside), str(folder))) from error
        back = read_any_draft(aside, target).named_tensors()
        for name, tensor in draft.named_tensors().items():
            if not torch.equal(back[name], tensor.cpu()):
                raise FinetuneError(f"{folder}: tensor {name} was written and reads otherwise; check the disk")


def _convert(config: FinetuneConfig, out: Path) -> int:
    """--import without --data: the same draft in another spelling."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    target = read_target(config)
    draft = read_any_draft(Path(config.import_), target)
    spelling = Spelling(config.export)
    write_draft(draft, out, spelling, target)
    print(f"{out}: a draft in the spelling of {spelling}; {vllm_verdict(draft, spelling)}")
    return 0
