"""Policy and draft arrive as one version or not at all, and every refusal names the tensor."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

from sync import disk
from sync.buckets import bucket_sizes_bytes, bucket_views, pack
from sync.checksum import ROW_BYTES, ROW_WORDS, checksum, checksums
from sync.plan import SyncError, make_plan
from sync.publish import make_bundle, publish
from sync.receiver import Bundle, WeightReceiver, find_faults
from tests.crash_helpers import KILLED, die_at, exit_code
from tests.sync_helpers import (
    TRANSPORTS,
    MakeTransport,
    draft_weights,
    engine_at,
    in_process,
    named,
    on_disk,
    policy_weights,
    same_bits,
    weights_at,
)

MLP = "policy.model.layers.0.mlp.weight"
each_transport = pytest.mark.parametrize("connect", TRANSPORTS.values(), ids=TRANSPORTS.keys())


def flip_byte(tensor: torch.Tensor, byte: int) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1).view(torch.uint8)[byte] ^= 1
    return changed


class FailingTensor(torch.Tensor):
    """A destination that cannot be copied to, alone or with others, as on a device that runs out of memory."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.copy_, torch._foreach_copy_):
            raise RuntimeError("device lost")
        return super().__torch_function__(func, types, args, kwargs or {})


# --- checksum -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (700, 811)])
def test_checksum_sees_every_flipped_byte_it_is_shown(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
    num_bytes = tensor.numel() * tensor.element_size()
    for byte in {0, num_bytes // 2, num_bytes - 1} if num_bytes else ():
        assert checksum(flip_byte(tensor, byte)) != checksum(tensor)
    assert checksum(tensor) == checksum(tensor.clone())


def test_checksum_sees_shape_dtype_order_and_signed_zero() -> None:
    small = torch.arange(12, dtype=torch.int32)
    large = torch.randn(4 * ROW_WORDS, 8)
    assert checksum(small) != checksum(small.view(3, 4))
    assert checksum(small) != checksum(small.view(torch.float32))
    assert checksum(torch.tensor(0.0)) != checksum(torch.tensor(-0.0))
    assert checksum(large) != checksum(large.flip(0)), "rows reversed"
    assert checksum(large) != checksum(large.view(2, -1).flip(0).view_as(large)), "halves swapped"
    assert checksum(large) != checksum(large[:, [1, 0, *range(2, 8)]]), "neighbours swapped"


def test_checksum_is_of_the_values_not_of_the_memory_layout() -> None:
    large = torch.randn(501, 600)
    assert checksum(large.t().contiguous().t()) == checksum(large)
    buffer = torch.empty(large.numel() + 1)
    buffer[1:] = large.view(-1)  # begins in the middle of an 8-byte word
    assert checksum(buffer[1:].view_as(large)) == checksum(large)


def awkward_tensors() -> dict[str, torch.Tensor]:
    """Every kind of tail, alignment, layout and size that the batched checksum treats apart."""
    generator = torch.Generator().manual_seed(1)
    sizes = (0, 1, 7, 8, 9, 1023, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 1, 2 * ROW_BYTES, 20005)
    tensors = {
        f"bytes_{size}": torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8) for size in sizes
    }
    return tensors | {
        "scalar": torch.tensor(3.0),
        "bool": torch.rand(100, generator=generator) > 0.5,
        "odd start": torch.randn(9000, generator=generator).bfloat16()[1:8000],
        "strided": torch.randn(80, 90, generator=generator)[:, 3:70].t(),
        "parameter": torch.nn.Parameter(torch.randn(300, 300, generator=generator)),
    }


def test_batched_checksums_are_those_of_each_tensor() -> None:
    tensors = awkward_tensors()
    assert checksums(tensors) == {name: checksum(tensor) for name, tensor in tensors.items()}
    assert checksums({}) == {}


def test_batched_checksums_see_every_flipped_bit_of_a_tail() -> None:
    tensors = {"a": torch.randn(5000), "b": torch.zeros(3, dtype=torch.uint8), "c": torch.randn(2048)}
    before = checksums(tensors)
    for byte in range(3):
        after = checksums(tensors | {"b": flip_byte(tensors["b"], byte)})
        assert after["b"] != before["b"] and after == before | {"b": after["b"]}


# --- plan -----------------------------------------------------------------------------------------------------------


def test_plan_does_not_depend_on_the_order_of_the_names() -> None:
    weights = weights_at(0)
    backwards = dict(reversed(weights.items()))
    assert make_plan(weights) == make_plan(backwards)
    assert make_plan(weights).digest == make_plan(backwards).digest
    assert make_plan(weights).digest != make_plan({**weights, MLP: weights[MLP].double()}).digest


def test_buckets_hold_every_tensor_once_within_their_size() -> None:
    plan = make_plan(weights_at(0), bucket_bytes=5000)
    buckets = {number: tuple(specs) for number, specs in groupby(plan.tensors, key=lambda spec: spec.bucket)}
    assert list(buckets) == list(range(len(buckets))) and len(buckets) > 2
    assert tuple(spec for specs in buckets.values() for spec in specs) == plan.tensors
    assert all(len(specs) == 1 or sum(s.num_bytes for s in specs) <= 5000 for specs in buckets.values())


def test_flat_buckets_give_every_tensor_back() -> None:
    weights = weights_at(0)
    plan = make_plan(weights, bucket_bytes=5000)
    sizes = bucket_sizes_bytes(plan)
    assert len(sizes) > 2
    buckets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    views = bucket_views(plan, buckets)
    pack(views, {**weights, MLP: weights[MLP].t().contiguous().t()})  # not contiguous
    assert same_bits(views, weights)
    assert same_bits(bucket_views(plan, [bucket.clone() for bucket in buckets]), weights)


def test_a_name_without_its_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        make_plan({"lm_head.weight": torch.zeros(1)})


# --- arriving -------------------------------------------------------------------------------------------------------


@each_transport
def test_every_dtype_arrives_bitwise(connect: MakeTransport, tmp_path: Path) -> None:
    receiver = engine_at(0)
    report = publish(policy_weights(1), draft_weights(1), connect(receiver, tmp_path), version=1)
    assert same_bits(receiver.destinations, weights_at(1))
    assert (report.version, receiver.version, receiver.dirty) == (1, 1, False)
    assert report.num_tensors == len(weights_at(1))
    assert report.num_bytes == sum(t.numel() * t.element_size() for t in weights_at(1).values())


@each_transport
def test_the_two_heads_of_one_name_land_in_their_own_models(connect: MakeTransport, tmp_path: Path) -> None:
    receiver = engine_at(0)
    publish(policy_weights(1), draft_weights(1), connect(receiver, tmp_path), version=1)
    assert torch.equal(receiver.destinations["policy.lm_head.weight"], policy_weights(1)["lm_head.weight"])
    assert torch.equal(receiver.destinations["draft.lm_head.weight"], draft_weights(1)["lm_head.weight"])
    assert not torch.equal(policy_weights(1)["lm_head.weight"], draft_weights(1)["lm_head.weight"])


@each_transport
def test_tied_embeddings_stay_tied(connect: MakeTransport, tmp_path: Path) -> None:
    embed = torch.nn.Parameter(torch.zeros(8, 4))
    head = embed  # the engine's head is the same memory
    receiver = WeightReceiver({"policy.model.embed_tokens.weight": embed, "policy.lm_head.weight": head})
    new = torch.randn(8, 4)
    tied = {"model.embed_tokens.weight": new, "lm_head.weight": new}
    publish(tied, None, connect(receiver, tmp_path), version=1)
    assert head.data_ptr() == embed.data_ptr() and torch.equal(head, new)
    untied = {"model.embed_tokens.weight": new, "lm_head.weight": new + 1}
    with pytest.raises(SyncError, match=r"policy\.(model\.embed_tokens|lm_head)\.weight reads back other bytes"):
        publish(untied, None, connect(receiver, tmp_path), version=2)
    assert receiver.dirty


def test_the_sender_casts_to_what_the_engine_computes_in() -> None:
    new = torch.randn(4, 4)
    receiver = WeightReceiver({"policy.w": torch.zeros(4, 4, dtype=torch.bfloat16)})
    publish({"w": new}, None, in_process(receiver, Path()), version=1)
    assert torch.equal(receiver.destinations["policy.w"], new.bfloat16())


def test_strided_destinations_are_written_in_place() -> None:
    fused = torch.zeros(4, 6)
    receiver = WeightReceiver({"policy.q": fused[:, :3], "policy.k": fused[:, 3:]})
    new = torch.randn(4, 6)
    publish({"q": new[:, :3], "k": new[:, 3:]}, None, in_process(receiver, Path()), version=1)
    assert torch.equal(fused, new)


@each_transport
def test_an_engine_without_a_draft_has_a_plan_without_one(connect: MakeTransport, tmp_path: Path) -> None:
    receiver = WeightReceiver(named(policy_weights(0), {}))
    transport = connect(receiver, tmp_path)
    assert not transport.plan.has_draft and engine_at(0).plan.has_draft
    publish(policy_weights(1), None, transport, version=1)
    assert same_bits(receiver.destinations, named(policy_weights(1), {}))
    with pytest.raises(SyncError, match=r"draft\.d2t is not a tensor of this engine"):
        publish(policy_weights(2), draft_weights(2), transport, version=2)


# --- faults found before the first copy -----------------------------------------------------------------------------


def _with(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Bundle], Bundle]:
    """Replace one tensor by an honest (rightly checksummed) other."""

    def apply(bundle: Bundle) -> Bundle:
        changed = change(bundle.tensors[name])
        return replace(
            bundle,
            tensors={**bundle.tensors, name: changed},
            checksums={**bundle.checksums, name: checksum(changed)},
        )

    return apply


def _flipped(name: str) -> Callable[[Bundle], Bundle]:
    return lambda b: replace(b, tensors={**b.tensors, name: flip_byte(b.tensors[name], 17)})


def _without(name: str) -> Callable[[Bundle], Bundle]:
    return lambda b: replace(b, tensors={k: v for k, v in b.tensors.items() if k != name})


def _extra(bundle: Bundle) -> Bundle:
    new = torch.ones(3)
    return replace(
        bundle,
        tensors={**bundle.tensors, "draft.embed_tokens.weight": new},
        checksums={**bundle.checksums, "draft.embed_tokens.weight": checksum(new)},
    )


FAULTS: dict[str, tuple[Callable[[Bundle], Bundle], str]] = {
    "flipped byte, large": (_flipped(MLP), r"policy\.model\.layers\.0\.mlp\.weight was changed on the way"),
    "flipped byte, small": (_flipped("draft.d2t"), r"draft\.d2t was changed on the way"),
    "missing": (_without("draft.lm_head.weight"), r"draft\.lm_head\.weight is missing"),
    "extra": (_extra, r"draft\.embed_tokens\.weight is not a tensor of this engine"),
    "shape": (_with(MLP, lambda t: t[1:].clone()), r"mlp\.weight has shape \[299, 300\], expected \[300, 300\]"),
    "transposed": (_with("draft.fc.weight", torch.t), r"draft\.fc\.weight has shape \[48, 16\], expected \[16, 48\]"),
    "dtype": (_with("draft.d2t", lambda t: t.int()), r"draft\.d2t is torch\.int32, expected torch\.int64"),
    "same version": (lambda b: replace(b, version=5), r"version 5 is not newer than version 5"),
    "older version": (lambda b: replace(b, version=3), r"version 3 is not newer than version 5"),
    "other plan": (lambda b: replace(b, plan_digest="0" * 64), r"the sender's plan 000000000000 is not"),
}


@each_transport
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_the_old_version_serving(connect: MakeTransport, tmp_path: Path, fault: str) -> None:
    tamper, message = FAULTS[fault]
    receiver = engine_at(5)
    transport = connect(receiver, tmp_path)
    good = make_bundle(receiver.plan, policy_weights(6), draft_weights(6), version=6)
    with pytest.raises(SyncError, match=message) as error:
        transport.send(tamper(good))
    assert "version 5 serves on" in str(error.value) and "\n" not in str(error.value)
    assert same_bits(receiver.destinations, weights_at(5))
    assert (receiver.version, receiver.dirty) == (5, False)
    receiver.require_clean()
    assert transport.send(good) == 6, "the next good bundle is taken"
    assert same_bits(receiver.destinations, weights_at(6))


def test_many_faults_are_counted() -> None:
    receiver = engine_at(0)
    with pytest.raises(SyncError, match=r"draft\.d2t is missing; .*; and 5 more; version 0 serves on"):
        receiver.receive(Bundle(1, receiver.plan.digest, {}, {}))


def test_publish_does_not_believe_an_engine_that_answers_another_version() -> None:
    class Forgetful:
        plan = engine_at(0).plan

        def send(self, bundle: Bundle) -> int:
            return bundle.version - 1

    with pytest.raises(SyncError, match="it serves version 6"):
        publish(policy_weights(7), draft_weights(7), Forgetful(), version=7)


def test_an_engine_that_computes_with_the_learners_memory_is_refused() -> None:
    draft = draft_weights(0)
    receiver = WeightReceiver(named(policy_weights(0), draft))
    with pytest.raises(SyncError, match=r"draft\.fc\.weight is the engine's own tensor"):
        publish(policy_weights(1), draft, in_process(receiver, Path()), version=1)


# --- failures after the first copy ----------------------------------------------------------------------------------


def _engine_that_fails_at(name: str, version: int) -> WeightReceiver:
    receiver = engine_at(version)
    receiver.destinations[name] = receiver.destinations[name].as_subclass(FailingTensor)
    return receiver


@each_transport
def test_a_failure_half_way_is_dirty_until_caught_up(connect: MakeTransport, tmp_path: Path) -> None:
    receiver = _engine_that_fails_at(MLP, version=5)
    transport = connect(receiver, tmp_path)
    with pytest.raises(SyncError, match=r"broke off while writing policy\.model\.layers\.0\.mlp\.weight: device lost"):
        publish(policy_weights(6), draft_weights(6), transport, version=6)
    assert receiver.dirty and receiver.version == 5
    assert torch.equal(receiver.destinations["draft.fc.weight"], draft_weights(6)["fc.weight"]), "it is a mixture"
    with pytest.raises(SyncError, match=r"mixture of versions: .* serves nothing .* \(last whole version 5\)"):
        receiver.require_clean()
    receiver.destinations[MLP] = receiver.destinations[MLP].as_subclass(torch.Tensor)
    with pytest.raises(SyncError, match="the engine is dirty"):  # a refused bundle does not clean
        publish(policy_weights(6), None, transport, version=6)
    assert receiver.dirty
    publish(policy_weights(6), draft_weights(6), transport, version=6)
    receiver.require_clean()
    assert receiver.version == 6 and same_bits(receiver.destinations, weights_at(6))


def test_an_interrupted_copy_is_dirty_too(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = engine_at(5)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(receiver, "_verify_written", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(policy_weights(6), draft_weights(6), in_process(receiver, Path()), version=6)
    assert receiver.dirty and receiver.version == 5


def test_without_the_check_a_mixture_would_be_served() -> None:
    """Negative control: apply tensors as they come, as a loader that trusts its input does."""
    receiver = engine_at(5)
    good = make_bundle(receiver.plan, policy_weights(6), draft_weights(6), version=6)
    bad = _without("draft.lm_head.weight")(good)
    assert list(find_faults(receiver.plan, bad, serving_version=5)) == ["draft.lm_head.weight is missing"]
    for name, tensor in bad.tensors.items():
        receiver.destinations[name].copy_(tensor)
    assert not same_bits(receiver.destinations, weights_at(5)) and not same_bits(receiver.destinations, weights_at(6))
    assert torch.equal(receiver.destinations["draft.lm_head.weight"], weights_at(5)["draft.lm_head.weight"])


# --- disk only ------------------------------------------------------------------------------------------------------


def _written(tmp_path: Path, receiver: WeightReceiver, version: int) -> Path:
    folder = disk.version_folder(tmp_path, version)
    bundle = make_bundle(receiver.plan, policy_weights(version), draft_weights(version), version)
    disk.write_version(folder, receiver.plan, bundle)
    return folder


def test_buckets_become_files_and_only_the_last_versions_stay(tmp_path: Path) -> None:
    receiver = engine_at(0)
    transport = on_disk(receiver, tmp_path)
    for version in (1, 2, 3, 10):
        publish(policy_weights(version), draft_weights(version), transport, version)
    assert [folder.name for folder in disk.list_versions(tmp_path)] == ["version_000003", "version_000010"]
    files = {path.name for path in disk.version_folder(tmp_path, 10).iterdir()}
    buckets = {f"bucket_{spec.bucket:05d}.safetensors" for spec in receiver.plan.tensors}
    assert files == buckets | {"manifest.json"} and len(buckets) > 1


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip_last_byte, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize(("bucket", "named_in_error"), [(0, r"embed_tokens\.weight|draft\.t2d"), (1, r"mlp\.weight")])
def test_a_damaged_file_is_refused_by_tensor(
    tmp_path: Path, damage: Callable[[Path], object], bucket: int, named_in_error: str
) -> None:
    receiver = engine_at(5)
    folder = _written(tmp_path, receiver, 6)
    damage(folder / f"bucket_{bucket:05d}.safetensors")
    with pytest.raises(SyncError, match=named_in_error):
        disk.receive_folder(receiver, folder)
    assert same_bits(receiver.destinations, weights_at(5)) and not receiver.dirty


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": 6, "plan_digest": "x", "tensors": {"policy.w": {}}}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    receiver = engine_at(5)
    folder = _written(tmp_path, receiver, 6)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(SyncError, match=r"manifest\.json is not a readable manifest"):
        disk.receive_folder(receiver, folder)
    assert same_bits(receiver.destinations, weights_at(5)) and not receiver.dirty


def _write_version_7_and_die(directory: Path, call: int) -> None:
    die_at(call)
    _written(directory, engine_at(5), 7)


def test_a_crash_in_the_middle_of_writing_is_never_seen(tmp_path: Path) -> None:
    """The writer dies (no cleaning up) at its n-th fsync, rename, ..., until it lives to the end."""
    receiver = engine_at(5)
    transport = on_disk(receiver, tmp_path)
    publish(policy_weights(6), draft_weights(6), transport, version=6)
    deaths = 0
    while exit_code(_write_version_7_and_die, tmp_path, deaths) == KILLED:
        deaths += 1
        newest = disk.list_versions(tmp_path)[-1]
        restarted = engine_at(5)
        version = disk.receive_folder(restarted, newest)
        assert version in (6, 7) and same_bits(restarted.destinations, weights_at(version))
        if newest.name == "version_000007":
            disk.remove_folder(newest)
    assert deaths > 5
    disk.remove_folder(disk.version_folder(tmp_path, 7))
    publish(policy_weights(7), draft_weights(7), transport, version=7)
    assert receiver.version == 7 and not list(tmp_path.glob(".aside-*")), "the next writer cleans up"


def test_a_full_disk_keeps_the_old_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = engine_at(5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "save_file", full)
    with pytest.raises(SyncError, match=r"version_000006 not written: .*No space left on device.* serves on"):
        publish(policy_weights(6), draft_weights(6), on_disk(receiver, tmp_path), version=6)
    assert list(tmp_path.iterdir()) == []
    assert same_bits(receiver.destinations, weights_at(5)) and not receiver.dirty
