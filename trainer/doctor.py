"""`slipstream doctor`: what this machine can run, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True, slots=True)
class Finding:
    part: str
    found: str  # a version, or '' when it is missing
    use: str  # what it is needed for
    mend: str  # the command that installs it


_SGLANG_MEND = "pip install '.[sglang]'"

# (import name, distribution, use, command that installs it)
_PACKAGES = (
    ("transformers", "transformers", "tokenizers and configs", "pip install transformers==5.12.1"),
    ("megatron.core", "megatron-core", "the policy's training", "pip install megatron-core==0.16.1 psutil"),
    ("safetensors", "safetensors", "weights", "pip install safetensors"),
    ("math_verify", "math-verify", "data.reward = 'math'", "pip install math-verify==0.9.0"),
    ("matplotlib", "matplotlib", "report.html", "pip install matplotlib"),
    ("tensorboard", "tensorboard", "event files", "pip install tensorboard"),
    ("flashinfer", "flashinfer-python", "SGLang's attention and sampling on CUDA (else Triton)", _SGLANG_MEND),
    ("torch_memory_saver", "torch-memory-saver", "rollout.offload = true", _SGLANG_MEND),
    ("ray", "ray", "several machines (not available yet)", "pip install ray==2.60.0"),
)


def examine() -> list[Finding]:
    """One finding for each part. Imports nothing heavier than torch."""
    return [_python(), *_torch(), _sglang(), *(_package(*row) for row in _PACKAGES), _compiler()]


def _python() -> Finding:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    found = platform.python_version() if supported else ""
    return Finding(
        "Python", found, "everything (3.11 or 3.12)", "install Python 3.11, then make setup PYTHON=python3.11"
    )


def _torch() -> list[Finding]:
    mend = "pip install torch==2.13.0"
    if importlib.util.find_spec("torch") is None:
        return [Finding("torch", "", "everything", mend)]
    import torch

    cuda = ""
    if torch.cuda.is_available():
        cuda = f"{torch.version.cuda} on " + ", ".join(_gpu(i) for i in range(torch.cuda.device_count()))
    threads = f"{torch.__version__}, {torch.get_num_threads()} CPU threads"
    needs = "a GPU with its driver, and a CUDA build of torch"
    return [
        Finding("torch", threads, "everything", mend),
        Finding("CUDA", cuda, "GPU (the CPU works too)", needs),
        Finding("attention", _attention(), "the policy's training (as named: in bfloat16)", mend),
    ]


def _attention() -> str:
    """The kernel that a bfloat16 policy would train with here."""
    import torch

    from trainer.policy_attention import attention_name

    return attention_name(torch.bfloat16, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _gpu(index: int) -> str:
    """Its name and memory: an SGLang engine beside a policy in training needs room for both."""
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    return f"{name} ({free_bytes / 2**30:.0f} of {total_bytes / 2**30:.0f} GiB free)"


def _sglang() -> Finding:
    """The version of this interpreter's SGLang, when the engine knows how to speak to it."""
    from rollout_engine.sglang_install import find_sglang
    from rollout_engine.types import EngineConfigError

    use = "rollout.engine = 'sglang' (or rollout.sglang_python names another environment's)"
    try:
        return Finding("sglang", f"{find_sglang('').version}, supported", use, _SGLANG_MEND)
    except EngineConfigError as error:
        return Finding("sglang", "", use, str(error))


def _package(module: str, distribution: str, use: str, mend: str) -> Finding:
    try:
        found = version(distribution) if _has(module) else ""
    except PackageNotFoundError:
        found = "version unknown"
    return Finding(distribution, found, use, mend)


def _has(module: str) -> bool:
    """Whether the module could be imported. Its parent package is looked for first: find_spec would import it."""
    parent = module.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None


def _compiler() -> Finding:
    path = shutil.which("g++") or shutil.which("c++")
    found = ""
    if path:
        shown = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip()
        found = f"{path} {shown}".strip()
    return Finding("C++ compiler", found, "torch.compile on the CPU (optional)", "apt-get install g++")


def print_doctor() -> None:
    """The findings as a table, then a command for each part that is missing."""
    from rich.console import Console
    from rich.table import Table

    findings = examine()
    table = Table(title="What this machine can run", title_justify="left")
    for column in ("part", "found", "needed for"):
        table.add_column(column)
    for finding in findings:
        table.add_row(finding.part, finding.found or "[yellow]missing[/]", finding.use)
    console = Console()
    console.print(table)
    for finding in findings:
        if not finding.found:
            console.print(f"{finding.part} is missing: {finding.mend}", soft_wrap=True, markup=False)
