"""The Triton kernel of the checksums, in Triton's interpreter, which SGLang's environment has; on a GPU: tests/gpu."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.sglang.helpers import ROOT, SGLANG_PYTHON

pytestmark = pytest.mark.sglang

_COMPARE = """
import contextlib
import torch
from sync import checksum as module
from sync.checksum import ROW_BYTES, checksum, checksums

torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
generator = torch.Generator().manual_seed(0)
sizes = (0, 1, 7, 8, 9, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 1, 2 * ROW_BYTES, 20005)
tensors = {str(n): torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for n in sizes}
tensors["odd start"] = torch.randn(9000, generator=generator).bfloat16()[1:8000]
tensors["strided"] = torch.randn(80, 90, generator=generator)[:, 3:70].t()
expected = {name: checksum(tensor) for name, tensor in tensors.items()}
module._has_kernel = lambda device: True
assert checksums(tensors) == expected
assert checksums({}) == {}
print(len(expected), "equal")
"""


def test_the_kernel_gives_the_checksum_of_each_tensor() -> None:
    done = subprocess.run(
        [str(SGLANG_PYTHON), "-c", _COMPARE],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and done.stdout.strip() == "12 equal", done.stderr
