"""`slipstream`: the command line. Heavy imports stay inside the commands, so that help and errors are instant."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from trainer.config import ConfigError, RunConfig
from trainer.suggest import nearest

_BENCHMARKS = (
    *(
        "rollout",
        "sync",
        "draft",
        "draft_ablation",
        "draft_schedule",
        "sentinel",
        "history",
        "step",
        "policy_update",
        "draft_update",
    ),
    *("rl_on_gpu", "sglang_kernels", "step_profile", "gpu_session"),
)
_MODEL_SIZES = "3m, 10m, 30m, 100m, 100m-deep or 300m"  # make_model.PRESETS, which loads torch
_OWN_PACKAGES = ("trainer", "rollout_engine", "draft_models", "sync")
_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are the program's own: one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or with one line on stderr 2 for bad input and 1 for a run that
    failed (an engine that died, a full disk); 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except (ValueError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for every command
            return _tell_out_of_memory(error, argv)
        # This project's own exceptions are messages to the user; anything else is a fault and keeps its traceback.
        if type(error).__module__.partition(".")[0] not in _OWN_PACKAGES:
            raise
        return _fail(str(error), _BAD_INPUT if isinstance(error, ValueError) else _FAILED)
    except OSError as error:
        if error.strerror is None:  # this project's own: a whole line
            return _fail(str(error), _FAILED)
        return _fail(f"{error.filename or 'input or output'}: {error.strerror}", _FAILED)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _fail(message: str, status: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # ranks agree on errors: one line is enough
        print(f"slipstream: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _tell_out_of_memory(error: BaseException, argv: Sequence[str]) -> int:
    """Of this process's GPU memory, on whatever rank it is: the others wait or have enough."""
    root = Path(__file__).parents[1]
    inside = [f.filename for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(root)]
    own = [name for name in (str(Path(f).relative_to(root)) for f in inside) if name.startswith(_OWN_PACKAGES)]
    advice = "take a smaller model, batch or context"
    if argv[:1] == ["train"]:
        advice = (
            "lower policy.max_tokens_per_gpu (or draft.max_tokens_per_forward), set policy.recompute = true, "
            "leave SGLang less (rollout.offload = true, or a lower rollout.sglang.mem_fraction_static), "
            "lower rollout.max_running_requests of the embedded engine, or take more GPUs; "
            "--resume goes on from the last checkpoint"
        )
    rank, what = os.environ.get("RANK", "0"), str(error).split(". ")[0]
    where = f", in {own[-1]}" if own else ""
    print(f"slipstream: error: rank {rank} ran out of GPU memory ({what}{where}): {advice}", file=sys.stderr)
    return _FAILED


def _dispatch(argv: list[str]) -> int:
    parser = _make_parser()
    if not argv:
        parser.print_help()
        return 0
    names = [name for name, _ in _COMMANDS]
    if argv[0] not in (*names, "-h", "--help"):
        raise ConfigError(f"unknown command {argv[0]!r}{nearest(argv[0], names)}; commands: {', '.join(names)}")
    namespace, rest = parser.parse_known_args(argv)
    return namespace.run(namespace, rest)


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="slipstream",
        description="RL rollouts of language models with speculative decoding and a draft trained beside the policy.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    for name, add in _COMMANDS:
        add(commands, name)
    return parser


def _command(commands, name: str, summary: str, run, **options) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=options.pop("description", summary),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.set_defaults(run=run)
    return parser


def _no_more(rest: Sequence[str], known: Sequence[str]) -> None:
    if rest:
        raise ConfigError(f"unknown argument {rest[0]}{nearest(rest[0], known)}")


# ---------------------------------------------------------------- train and demo


def _add_train(commands, name: str) -> None:
    from trainer.help import flags_help

    parser = _command(
        commands,
        name,
        "train a policy and its draft from a recipe",
        _train,
        usage="slipstream train [RECIPE.toml] [--dry-run] [--KEY VALUE ...]",
        description="Train a policy, and its draft beside it, from a TOML recipe; flags go over the recipe.",
        epilog=flags_help(),
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check what can be checked without starting anything, print settings and plan, write nothing",
    )


def _train(namespace: argparse.Namespace, rest: list[str]) -> int:
    from trainer.config_load import load_config, parse_flags

    recipes, overrides = parse_flags(rest)
    if len(recipes) > 1:
        raise ConfigError(f"one recipe at a time, got {', '.join(recipes)}")
    config = load_config(Path(recipes[0]) if recipes else None, overrides)
    return _start(config, dry_run=namespace.dry_run)


def _start(config: RunConfig, *, dry_run: bool) -> int:
    from trainer.config_check import validate

    is_first = os.environ.get("RANK", "0") == "0"
    for warning in validate(config, world_size=int(os.environ.get("WORLD_SIZE", "1"))):
        if is_first:
            print(f"slipstream: warning: {warning}", file=sys.stderr)
    if dry_run:
        return import_module("trainer.dry_run").dry_run(config)
    distributed = import_module("torch.distributed")
    was_there = distributed.is_initialized()
    status = import_module("trainer.run").train(config)
    if distributed.is_initialized() and not was_there:
        distributed.destroy_process_group()  # here and not in `train`, which one process may call for several runs
    return status


def _add_demo(commands, name: str) -> None:
    parser = _command(
        commands,
        name,
        "make a small policy and train it, on any machine",
        _demo,
        usage="slipstream demo [--dry-run] [--KEY VALUE ...]",
        description="Make a small policy by a warm start, then train recipes/demo.toml; takes the flags of train.",
    )
    parser.add_argument("--dry-run", action="store_true", help="make the policy, then only check and print the plan")


def _demo(namespace: argparse.Namespace, rest: list[str]) -> int:
    from trainer.config_load import parse_flags
    from trainer.demo import demo_config

    positional, overrides = parse_flags(rest)
    _no_more(positional, ())
    return _start(demo_config(overrides), dry_run=namespace.dry_run)


# ---------------------------------------------------------------- finetune-draft


def _add_finetune_draft(commands, name: str) -> None:
    from trainer.finetune_config import flag_of, own_fields
    from trainer.help import finetune_help

    parser = _command(
        commands,
        name,
        "train a draft for a policy that stands still, or convert one between published spellings",
        _finetune_draft,
        usage="slipstream finetune-draft --target HF_DIR --data FILE [--init DIR | --import DIR] --out DIR [--KEY V]\n"
        "       slipstream finetune-draft --target HF_DIR --import DIR [--export SPELLING] --out DIR",
        description="Train an EAGLE-3 draft on what the target says: prompts are answered by the target first, finished"
        "\nrollouts are taken as they are. Judged on held-out prompts under the engine's rule; training ends when\n"
        "the accept length no longer grows. A killed run goes on with --resume; several ranks:\n"
        "torchrun --nproc-per-node N -m trainer.cli finetune-draft ...",
        epilog=finetune_help(),
    )
    for item in own_fields():
        default = item.default
        options: dict = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        if item.metadata["metavar"]:
            options["metavar"] = item.metadata["metavar"]
        shown = "" if default is False or default == "" else f" (default {default})"
        parser.add_argument(flag_of(item.name), dest=item.name, help=item.metadata["help"] + shown, **options)


def _finetune_draft(namespace: argparse.Namespace, rest: list[str]) -> int:
    from trainer.config_load import parse_flags
    from trainer.finetune_config import flags, make_config, own_fields, warnings_of

    positional, overrides = parse_flags(rest, "finetune-draft", flags())
    _no_more(positional, ())
    config = make_config({item.name: getattr(namespace, item.name) for item in own_fields()}, overrides)
    if os.environ.get("RANK", "0") == "0":
        for warning in warnings_of(config):
            print(f"slipstream: warning: {warning}", file=sys.stderr)
    distributed = import_module("torch.distributed")
    was_there = distributed.is_initialized()
    status = import_module("trainer.finetune").finetune(config)
    if distributed.is_initialized() and not was_there:
        distributed.destroy_process_group()
    return status


# ---------------------------------------------------------------- generate


def _add_generate(commands, name: str) -> None:
    parser = _command(
        commands,
        name,
        "generate text with a policy, speculatively when there is a draft",
        _generate,
        usage="slipstream generate --policy DIR [--draft DIR] (--prompt TEXT | --prompt-data FILE) [--KEY VALUE ...]",
        epilog="Sampling and speculation: the rollout flags of slipstream train, such as --rollout-temperature 0.7, "
        "--rollout-max-response-len 64, --speculative-algorithm NGRAM or --n-samples-per-prompt 4.",
    )
    parser.add_argument("--policy", type=Path, required=True, help="Hugging Face folder of the policy")
    parser.add_argument("--draft", type=Path, help="folder of its EAGLE-3 draft")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="one prompt")
    prompt.add_argument("--prompt-data", type=Path, help="JSONL file of prompts")


def _generate(namespace: argparse.Namespace, rest: list[str]) -> int:
    from trainer.config_load import parse_flags
    from trainer.generate import generate

    positional, overrides = parse_flags(rest)
    _no_more(positional, ())
    return generate(namespace.policy, namespace.draft, namespace.prompt, namespace.prompt_data, overrides)


# ---------------------------------------------------------------- serve


def _add_serve(commands, name: str) -> None:
    parser = _command(
        commands,
        name,
        "start the SGLang server that a run would start, OpenAI endpoints included",
        _serve,
        usage="slipstream serve --policy DIR [--draft DIR] [--work-dir DIR] [--KEY VALUE ...]",
        description="Start the SGLang server that a run would start and keep it until Ctrl-C or SIGTERM. It serves the "
        "weights in the folders; agents and benchmarks speak to its OpenAI endpoints.",
        epilog="Engine and speculation: the rollout flags of slipstream train, such as --speculative-num-steps 3 or "
        "--dtype bfloat16. Any other flag of SGLang's server passes as --sglang-NAME: --sglang-port 30000.",
    )
    parser.add_argument("--policy", type=Path, required=True, help="Hugging Face folder of the policy")
    parser.add_argument("--draft", type=Path, help="folder of its EAGLE-3 draft")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/serve"), help="for the log (default runs/serve)")


def _serve(namespace: argparse.Namespace, rest: list[str]) -> int:
    from trainer.config_load import parse_flags
    from trainer.serve import serve

    positional, overrides = parse_flags(rest)
    _no_more(positional, ())
    return serve(namespace.policy, namespace.draft, namespace.work_dir, overrides)


# ---------------------------------------------------------------- bench, report, doctor


def _add_bench(commands, name: str) -> None:
    parser = _command(
        commands,
        name,
        "measure rollouts, sync, updates of policy and draft, a whole step, or RL with and without speculation",
        _bench,
        usage="slipstream bench NAME [arguments of that benchmark]",
        description="Run one benchmark: it prints a table and appends JSON lines. `slipstream bench NAME --help` lists "
        "its arguments.",
        add_help=False,
    )
    parser.add_argument("benchmark", nargs="?", metavar="NAME", help=", ".join(_BENCHMARKS))
    parser.set_defaults(parser=parser)


def _bench(namespace: argparse.Namespace, rest: list[str]) -> int:
    name = namespace.benchmark
    if name is None:
        namespace.parser.print_help()
        return 0
    if name not in _BENCHMARKS:
        raise ConfigError(f"unknown benchmark {name!r}{nearest(name, _BENCHMARKS)}; known: {', '.join(_BENCHMARKS)}")
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *rest], check=False).returncode


def _add_report(commands, name: str) -> None:
    parser = _command(commands, name, "write report.html of a run", _report)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's folder, such as runs/demo")


def _report(namespace: argparse.Namespace, rest: list[str]) -> int:
    _no_more(rest, ())
    from trainer.report import write_report

    print(write_report(namespace.run_dir))
    return 0


def _add_doctor(commands, name: str) -> None:
    _command(commands, name, "what this machine can run, and how to mend what is missing", _doctor)


def _doctor(namespace: argparse.Namespace, rest: list[str]) -> int:
    _no_more(rest, ())
    from trainer.doctor import print_doctor

    print_doctor()
    return 0


# ---------------------------------------------------------------- make-model


def _add_make_model(commands, name: str) -> None:
    from trainer.tasks import TASKS

    parser = _command(
        commands,
        name,
        "make a small seeded policy with a tokenizer and prompts",
        _make_model,
        description="Make a small policy: a Hugging Face folder with weights, a tokenizer, train.jsonl and eval.jsonl.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")
    add("--size", default="3m", help=f"{_MODEL_SIZES} (default 3m)")
    add("--task", default="sort", help=f"{', '.join(TASKS)} (default sort)")
    add("--seed", type=int, default=0, help="of weights, prompts and warm start (default 0)")
    add("--model-type", default="qwen3", help="qwen3, qwen2 or llama (default qwen3)")
    add("--tie-word-embeddings", action="store_true", help="one matrix for embedding and output")
    add("--context-length", type=int, default=256, help="max_position_embeddings (default 256)")
    add("--warm-start-steps", type=int, default=0, metavar="N", help="supervised steps; 0 = random weights")
    add("--warm-start-seconds", type=float, default=0.0, metavar="S", help="the same, bounded in time instead")
    add("--eps-residual", type=float, default=1.0, metavar="E", help="scale of the output projections from layer 2 on")
    add("--embed-scale", type=float, default=1.0, metavar="S", help="scale of the embedding against the layers")
    add("--logit-scale", type=float, default=1.0, metavar="S", help="scale of the last norm: sharpens random weights")
    parser.set_defaults(known=[action.option_strings[-1] for action in parser._actions])


def _make_model(namespace: argparse.Namespace, rest: list[str]) -> int:
    _no_more(rest, namespace.known)
    from trainer.make_model import MakeModelConfig
    from trainer.make_model_progress import make_model_with_progress

    names = ("out", "size", "task", "seed", "model_type", "tie_word_embeddings", "context_length", "warm_start_steps")
    values = {name: getattr(namespace, name) for name in (*names, "eps_residual", "embed_scale", "logit_scale")}
    make_model_with_progress(MakeModelConfig(**values, warm_start_s=namespace.warm_start_seconds))
    return 0


_COMMANDS = (
    ("train", _add_train),
    ("demo", _add_demo),
    ("finetune-draft", _add_finetune_draft),
    ("generate", _add_generate),
    ("serve", _add_serve),
    ("bench", _add_bench),
    ("report", _add_report),
    ("doctor", _add_doctor),
    ("make-model", _add_make_model),
)

if __name__ == "__main__":
    sys.exit(main())
