"""Lets Megatron-core 0.16.1 run where torch has no CUDA. Megatron itself is not patched.

Megatron asks for CUDA in a handful of idioms. On a machine without it, `cuda_as_cpu()` answers each of them
with the CPU, for the code inside the `with` block only; where CUDA is available it changes nothing.

* `torch.cuda.current_device()`: the device of every buffer that Megatron allocates -> the CPU device.
* `torch.cuda.synchronize()`: around checkpoint writes -> nothing to wait for.
* `torch.cuda.random.get_rng_state()`: activation recompute saves the CUDA generator -> an empty state.
* `torch.cuda._lazy_call(...)`: Megatron restores that state through it, and torch would queue the callback for a
  CUDA start-up that never comes. Megatron binds the name at import, so import it inside the block.
* `device="cuda"`, `.cuda()`, `.to("cuda")`, `pin_memory=True` and `tensor.type() == "torch.cuda.FloatTensor"`:
  rewritten by a `TorchFunctionMode`.

Function modes are thread-local, and off inside `Tensor.backward()`. There is no CUDA random tracker: dropout must be 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and str(device).startswith("cuda")


class _CudaAsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device) and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            # Megatron sorts parameters into precision groups by this string
            return result.replace("torch.", "torch.cuda.", 1)
        return result


@contextlib.contextmanager
def cuda_as_cpu() -> Iterator[None]:
    """Inside the block CUDA requests are served by the CPU; does nothing where CUDA is available."""
    if torch.cuda.is_available():
        yield
        return
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(torch.cuda, "synchronize", lambda device=None: None),
        mock.patch.object(torch.cuda.random, "get_rng_state", lambda device="cuda": torch.empty(0, dtype=torch.uint8)),
        mock.patch.object(torch.cuda, "_lazy_call", lambda *args, **kwargs: None),
        _CudaAsCpu(),
    ):
        yield
