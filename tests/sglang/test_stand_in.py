"""The stand-in kernels themselves."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.sglang import helpers

pytestmark = pytest.mark.sglang

_CALL_EVERY_OP = """
import torch, sgl_kernel
from sgl_kernel import speculative
ops = [getattr(sgl_kernel, name) for name in dir(sgl_kernel) if name.endswith("_cpu")]
ops += [speculative.reconstruct_indices_from_tree_mask]
ops += [torch.ops.sgl_kernel.extend_attention_cpu, torch.ops.sgl_kernel.decode_attention_cpu]
for op in ops:
    try:
        op()
    except RuntimeError as error:
        print(error)
"""


def run_python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [str(helpers.SGLANG_PYTHON), *arguments],
        env=dict(os.environ) | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_forbidden_stand_ins_raise() -> None:
    """Plain servers of these tests run so: whatever they did, they did without a stand-in."""
    said = run_python("-c", _CALL_EVERY_OP).splitlines()
    assert len(said) == 13
    assert all("a stand-in kernel was called where none may be" in line for line in said)


def test_index_and_tree_ops_equal_triton_kernels_of_sglang(stand_ins_allowed: None) -> None:
    script = helpers.ROOT / "tests" / "sglang" / "compare_with_triton.py"
    said = run_python(str(script), TRITON_INTERPRET="1", SGLANG_USE_CPU_ENGINE="1").splitlines()
    assert len([line for line in said if line.endswith("cases equal")]) == 8
