"""The command as a user meets it: bad input gives exit status 2, one line and nothing written."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draft_models.checkpoint import save_draft
from draft_models.config import DraftConfig
from draft_models.eagle3 import Eagle3, Eagle3Config
from rollout_engine.types import EngineError
from trainer import demo
from trainer.cli import main
from trainer.config import ConfigError
from trainer.config_load import load_config
from trainer.doctor import examine
from trainer.hf_files import read_config
from trainer.make_model import PRESETS, MakeModelConfig, Shape, make_model
from trainer.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
SIZES = tuple(PRESETS)  # as they are: tests add their own


def run(*arguments, cwd):
    command = [sys.executable, "-m", "trainer.cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["--dry-run"], "unknown command '--dry-run'"),
        (["train", "--rollout.temprature", "1"], "did you mean '--rollout.temperature'"),
        (["train", "absent.toml"], "absent.toml: No such file"),
        (["train", "--hf-checkpoint", "absent", "--prompt-data", "p", "--speculative-num-steps=0"], "with EAGLE3"),
        (["train", "--hf-checkpoint", "absent", "--prompt-data", "p", "--dry-run"], "absent: no such folder"),
        (["generate", "--policy", "absent", "--prompt", "x"], "absent"),
        (["generate", "--policy", "p", "--prompt", "x", "--lr", "1"], "--lr is a setting of training"),
        (["generate", "--policy", "p", "--prompt", "x", "--eps-clip", "1"], "--eps-clip is a setting of training"),
        (["generate", "--policy", "p", "--prompt", "x", "--draft.unroll=2"], "--draft.unroll is a setting of training"),
        (["serve", "--policy", "absent", "--lr", "1"], "--lr is a setting of training"),
        (["serve", "--policy", "absent", "--num-rollout", "3"], "--num-rollout is a setting of a run"),
        (["serve", "--policy", "absent", "--prompt-data", "p"], "--prompt-data is a setting of a run"),
        (["serve", "--policy", "absent"], "absent: no such folder"),
        (["serve", "--policy", "absent", "--engine", "torch"], "serve starts an SGLang server; leave --engine out"),
        (["serve", "--policy", "absent", "--speculative-algorithm", "EAGLE3"], "give --draft DIR"),
        (["serve", "--policy", "absent", "--speculative-draft-model-path", "d"], "give serve its draft as --draft DIR"),
        (["serve", "--policy", "absent", "--rollout-external-engine-addrs", "h:1"], "http://h:1 is served already"),
        (["serve", "--policy", "absent", "--sglang-tp-size", "2"], "over several GPUs is not built yet"),
        (["serve", "--policy", "absent", "--prot", "1"], "unknown flag --prot"),
        (["serve"], "--policy"),
        (["make-model", "--out", "m", "--size", "5m"], "did you mean '3m'"),
        (["make-model"], "--out"),
        (["bench", "rolout"], "did you mean 'rollout'"),
        (["report", "absent"], "absent"),
        (["doctor", "--fix"], "unknown argument --fix"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("slipstream: error: ")
    assert message in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_help_is_everywhere_and_starts_without_torch(capsys):
    for command in ("train", "demo", "finetune-draft", "generate", "serve", "report", "doctor", "make-model"):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0 and "usage: slipstream" in capsys.readouterr().out
    assert main([]) == main(["bench"]) == 0
    quick = "import sys, trainer.cli; sys.exit(trainer.cli.main([]) or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", quick], cwd=ROOT, capture_output=True).returncode == 0


def test_make_models_help_names_every_size_and_task(capsys):
    with pytest.raises(SystemExit):
        main(["make-model", "--help"])
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert {*SIZES, *TASKS} <= words


def test_a_run_is_imported_without_what_only_its_report_needs():
    quick = "import sys, trainer.run; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", quick], cwd=ROOT, capture_output=True).returncode == 0


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("trainer.cli._dispatch", lambda argv: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        main([])


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full(argv):
        raise OSError(28, "No space left on device", "runs/demo/policy")

    monkeypatch.setattr("trainer.cli._dispatch", full)
    assert main([]) == 1
    assert capsys.readouterr().err == "slipstream: error: runs/demo/policy: No space left on device\n"


def test_a_full_gpu_is_one_line_that_says_what_to_do(monkeypatch, capsys):
    def full(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")

    monkeypatch.setattr("trainer.cli._dispatch", full)
    monkeypatch.setenv("RANK", "3")  # whose fault no other rank shares
    for command, is_advised in (("train", True), ("serve", False)):
        assert main([command]) == 1
        said = capsys.readouterr().err
        assert said.startswith(
            "slipstream: error: rank 3 ran out of GPU memory (CUDA out of memory, in trainer/cli.py)"
        )
        assert said.count("\n") == 1 and ("policy.max_tokens_per_gpu" in said) == is_advised


def test_a_run_that_failed_is_one_line_and_status_1(monkeypatch, capsys):
    def died(argv):
        raise EngineError("the SGLang server ended:\nno GPU")

    monkeypatch.setattr("trainer.cli._dispatch", died)
    assert main([]) == 1
    assert capsys.readouterr().err == "slipstream: error: the SGLang server ended: no GPU\n"


@pytest.mark.parametrize("there_before", [False, True])
def test_train_ends_the_process_group_that_it_started(monkeypatch, there_before):
    state = {"on": there_before}
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: state["on"])
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: state.update(on=False))
    monkeypatch.setattr("trainer.run.train", lambda config: state.update(on=True) or 0)
    assert main(["train", "--hf-checkpoint=m", "--prompt-data=p"]) == 0
    assert state["on"] is there_before


@pytest.fixture
def tiny_model(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "3m", Shape(32, 7, 2, 1, 16, 48))
    return make_model(MakeModelConfig(out=tmp_path / "model", num_train_prompts=6, num_eval_prompts=2))


def test_dry_run_checks_prints_and_writes_nothing(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--dry-run", "--hf-checkpoint=model", "--prompt-data=model/train.jsonl", "--num-rollout=3"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "num_rollout = 3" in out and "6 rows of model/train.jsonl" in out and "nothing written" in out
    assert "# policy      float32, attention by torch scaled-dot-product attention, padded" in out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert "history beside it" not in out and main([*arguments, "--speculation.history"]) == 0
    assert "adaptive depth, history beside it" in capsys.readouterr().out
    (tmp_path / "model" / "train.jsonl").write_text('{"prompt": "a", "label": "b"}\nnope\n')
    assert main(arguments) == 2
    assert "train.jsonl line 2: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--rollout.device=foo", "rollout.device = 'foo'"),
        ("--rollout-max-response-len=256", "leaves no room for a prompt in the 256 positions of "),
        ("--rollout.cost_table=absent.json", "no such file"),
        pytest.param(
            "--engine=sglang",
            "SGLang is not installed for ",
            marks=pytest.mark.skipif(find_spec("sglang") is not None, reason="SGLang is installed here"),
        ),
    ],
)
def test_dry_run_sees_what_the_engine_would_refuse(tiny_model, capsys, argument, message):
    arguments = ["train", "--dry-run", f"--hf-checkpoint={tiny_model}", f"--prompt-data={tiny_model}/train.jsonl"]
    assert main([*arguments, argument]) == 2
    assert message in capsys.readouterr().err


def test_dry_run_opens_the_weights(tiny_model, capsys):
    arguments = ["train", "--dry-run", f"--hf-checkpoint={tiny_model}", f"--prompt-data={tiny_model}/train.jsonl"]
    weights = load_file(tiny_model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tiny_model / "model.safetensors")
    assert main(arguments) == 2
    assert "model.norm.weight" in capsys.readouterr().err


def test_generate_prints_a_text_for_every_sample(tiny_model, capsys):
    arguments = ["generate", f"--policy={tiny_model}", "--rollout-max-response-len=5", "--n-samples-per-prompt=2"]
    assert main([*arguments, f"--prompt-data={tiny_model / 'eval.jsonl'}"]) == 0
    first = capsys.readouterr()
    assert "4 samples" in first.err and "tokens/s" in first.err
    assert main([*arguments, "--prompt=sort b a", "--speculative-algorithm=NGRAM", "--rollout.controller=fixed"]) == 0
    assert "NGRAM:" in capsys.readouterr().err


def test_generate_tells_what_history_drafted(tiny_model, tmp_path, capsys):
    """Greedy siblings write the same; with one slot each finds the one before it whole."""
    save_draft(Eagle3(Eagle3Config.from_target(read_config(tiny_model), DraftConfig())), tmp_path / "draft")
    arguments = f"generate --policy={tiny_model} --draft={tmp_path / 'draft'} --rollout-temperature=0 --prompt=sort"
    arguments += " --n-samples-per-prompt=4 --max-running-requests=1 --rollout.controller=fixed"
    assert main([*arguments.split(), "--speculation.history"]) == 0
    assert re.search(r"; history drafted [1-9]\d*% of the verify steps, \d\.\d\d tokens each", capsys.readouterr().err)
    assert main(arguments.split()) == 0
    assert "EAGLE3:" in (said := capsys.readouterr().err) and "history" not in said
    assert main([*arguments.split(), "--speculation.history", "--speculative-algorithm=NONE"]) == 2
    assert "history drafts stand beside EAGLE3's" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*.toml")), ids=lambda path: path.name)
def test_every_recipe_loads(recipe):
    assert load_config(recipe).name == recipe.stem


def test_the_demo_makes_its_model_once_and_takes_a_free_name(tmp_path, monkeypatch):
    from trainer.config_load import Override

    monkeypatch.setitem(PRESETS, "3m", Shape(32, 7, 2, 1, 16, 48))
    monkeypatch.setattr(demo, "WARM_START_STEPS", 1)
    model = tmp_path / "model"
    overrides = [
        Override("", "policy.hf_checkpoint", str(model)),
        Override("", "run_dir", str(tmp_path / "runs")),
    ]
    assert demo.demo_config(overrides).name == "demo"
    made = (model / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert demo.demo_config(overrides).name == "demo-2"
    assert (model / "model.safetensors").stat().st_mtime_ns == made
    monkeypatch.setattr(demo, "WARM_START_STEPS", 2)
    with pytest.raises(ConfigError, match="holds another model"):
        demo.demo_config(overrides)


def test_the_doctor_finds_torch_and_says_how_to_mend_the_rest():
    findings = {finding.part: finding for finding in examine()}
    assert findings["torch"].found and findings["megatron-core"].found
    assert all(finding.mend for finding in findings.values())
