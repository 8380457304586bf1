"""Two processes on one GPU: buckets are mapped once by CUDA IPC, read in place, and judged before they are taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sync import checksum as checksum_module
from sync.checksum import ROW_BYTES, checksum, checksums
from sync.plan import SyncError
from sync.publish import publish
from sync.remote import connect
from tests.sync_engine_helpers import (
    EngineProcess,
    Models,
    assert_engine_holds,
    checkpoint,
    engine_process,
    flip_a_bit_after,
    make_draft,
    make_policy,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
ROLES = ("policy", "draft")


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with engine_process(device="cuda") as running:
        yield running


@pytest.fixture
def models() -> Models:
    policy = make_policy()
    return policy, make_draft(policy)


def publish_from_gpu(transport: object, models: Models, seed: int, version: int) -> None:
    """From float32 on the GPU, as a trainer holds them; the engine computes in bfloat16."""
    policy, draft = (
        {name: tensor.cuda().float() if tensor.is_floating_point() else tensor.cuda() for name, tensor in made.items()}
        for made in (checkpoint(models[0], seed), checkpoint(models[1], seed + 1000))
    )
    publish(policy, draft, transport, version)


def test_versions_arrive_bitwise_and_are_mapped_once(engine: EngineProcess, models: Models, tmp_path: Path) -> None:
    transport = connect("ipc", engine.deliver, ROLES, tmp_path)
    mapped = set()
    for version in (1, 2, 5, 6):
        publish_from_gpu(transport, models, seed=version, version=version)
        assert_engine_holds(engine, models, version)
        mapped.add(engine.mapped())
    assert len(mapped) == 1, "what was mapped for the first version serves the next"
    assert transport._carrier.buckets[0].is_cuda
    transport.close()


def test_a_second_attach_maps_anew(engine: EngineProcess, models: Models, tmp_path: Path) -> None:
    for seed in (7, 8):
        transport = connect("ipc", engine.deliver, ROLES, tmp_path)
        publish_from_gpu(transport, models, seed=seed, version=1)
        assert_engine_holds(engine, models, seed)
        transport.close()


def test_a_corrupted_bucket_is_refused_by_name(engine: EngineProcess, models: Models, tmp_path: Path) -> None:
    transport = connect("ipc", engine.deliver, ROLES, tmp_path)
    publish_from_gpu(transport, models, seed=3, version=3)
    put = transport._carrier.put
    transport._carrier.put = flip_a_bit_after(put, lambda: transport._carrier.buckets[0])
    first = transport.plan.tensors[0].full_name
    with pytest.raises(SyncError, match=f"{first} was changed on the way .*; version 3 serves on"):
        publish_from_gpu(transport, models, seed=4, version=4)
    assert_engine_holds(engine, models, 3)
    transport._carrier.put = put
    publish_from_gpu(transport, models, seed=5, version=5)
    assert_engine_holds(engine, models, 5)
    transport.close()


def test_weights_on_the_cpu_reach_an_engine_on_the_gpu(engine: EngineProcess, models: Models, tmp_path: Path) -> None:
    transport = connect("ipc", engine.deliver, ROLES, tmp_path)
    publish(checkpoint(models[0], 9), checkpoint(models[1], 1009), transport, 1)
    assert_engine_holds(engine, models, 9)
    transport.close()


@pytest.mark.parametrize("with_kernel", [True, False])
def test_checksums_on_the_gpu_are_those_of_the_cpu(with_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if with_kernel:
        pytest.importorskip("triton")
    monkeypatch.setattr(checksum_module, "_has_kernel", lambda device: with_kernel and device.type == "cuda")
    generator = torch.Generator().manual_seed(0)
    sizes = (0, 1, 7, 8, 9, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 1, 20005, 40_000_001)
    tensors = {str(n): torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for n in sizes}
    tensors["large"] = torch.randn(5000, 3001, generator=generator).bfloat16()
    on_gpu = {name: tensor.cuda() for name, tensor in tensors.items()}
    tensors["odd start"], on_gpu["odd start"] = (group["large"].view(-1)[1:90000] for group in (tensors, on_gpu))
    expected = {name: checksum(tensor) for name, tensor in tensors.items()}
    assert checksums(on_gpu) == checksums(tensors) == expected
    assert {name: checksum(tensor) for name, tensor in on_gpu.items()} == expected
