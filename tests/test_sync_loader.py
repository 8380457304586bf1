"""The loader inside SGLang: the right rows of the right model, all or nothing, and never an exception."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sync import loader, receiver
from sync.ipc import IpcCarrier
from sync.plan import SyncError, make_plan
from sync.publish import publish
from sync.receiver import Bundle
from sync.remote import RemoteTransport, connect
from sync.views import POLICIES
from sync.wire import Message, Verdict, verdict_path
from tests.sync_engine_helpers import (
    HIDDEN,
    VOCAB,
    Weights,
    assert_holds,
    checkpoint,
    config,
    hand_over,
    make_draft,
    make_model,
    make_policy,
)

ROLES = ("policy", "draft")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_state", loader._State())


class Engine:
    """Draft and policy in this process; `tamper` changes what the loader is shown."""

    def __init__(self, policy: nn.Module, draft: nn.Module) -> None:
        self.policy, self.draft = policy, draft
        self.models: Sequence[nn.Module] = (draft, policy)
        self.tamper: Callable[[Message], Message] = lambda message: message
        self.transport: RemoteTransport

    def deliver(self, payload: bytes) -> None:
        hand_over(self.models, self.tamper(Message.decode(payload)).encode())

    def weights(self, seed: int) -> tuple[Weights, Weights]:
        return checkpoint(self.policy, seed), checkpoint(self.draft, 1000 + seed)

    def publish(self, seed: int, version: int) -> None:
        publish(*self.weights(seed), self.transport, version)

    def assert_holds(self, seed: int) -> None:
        policy, draft = self.weights(seed)
        assert_holds(self.policy, policy)
        assert_holds(self.draft, draft)


def attached(
    tmp_path: Path, architecture: str = "Qwen3ForCausalLM", tied: bool = False, reduced: bool = True
) -> Engine:
    policy = make_policy(architecture, tied)
    engine = Engine(policy, make_draft(policy, reduced))
    engine.transport = connect("ipc", engine.deliver, ROLES, tmp_path)
    return engine


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """At version 3."""
    made = attached(tmp_path)
    made.publish(seed=3, version=3)
    return made


# --- names and layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", POLICIES)
def test_every_parameter_of_every_architecture_is_written(
    architecture: str, tied: bool, reduced: bool, tmp_path: Path
) -> None:
    engine = attached(tmp_path, architecture, tied, reduced)
    padding = engine.policy.model.embed_tokens.weight[VOCAB:].clone()
    engine.publish(seed=1, version=1)
    engine.assert_holds(1)
    names = engine.transport.plan.by_name.keys()
    assert ("policy.lm_head.weight" in names) is not tied
    assert ("draft.d2t" in names) is reduced
    assert torch.equal(engine.policy.model.embed_tokens.weight[VOCAB:], padding)


def test_names_that_both_models_have_land_in_their_own(engine: Engine) -> None:
    policy, draft = engine.weights(4)
    publish(policy, draft, engine.transport, 4)
    heads = [model.lm_head.weight for model in (engine.policy, engine.draft)]
    assert torch.equal(heads[0][:VOCAB], policy["lm_head.weight"])
    assert torch.equal(heads[1], draft["lm_head.weight"])
    norms = [model.model.norm.weight for model in (engine.policy, engine.draft)]
    assert torch.equal(norms[0], policy["model.norm.weight"]) and torch.equal(norms[1], draft["norm.weight"])


def _error_of(models: Sequence[nn.Module], tmp_path: Path, roles: Sequence[str] = ROLES) -> str:
    with pytest.raises(SyncError) as caught:
        connect("ipc", lambda payload: hand_over(models, payload), roles, tmp_path)
    return str(caught.value)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    stranger = make_model("Qwen3MoeForCausalLM", config(), {"model.norm.weight": [HIDDEN]})
    assert "Qwen3MoeForCausalLM is no model that can be updated" in _error_of([stranger], tmp_path)
    policy = make_policy()
    assert "Qwen3MoeForCausalLM" in _error_of([stranger, policy], tmp_path), "nor is half of the pair enough"


def test_a_split_model_is_refused(tmp_path: Path) -> None:
    policy = make_policy()
    policy.model.layers.get_submodule("1").self_attn.qkv_proj.tp_size = 2
    error = _error_of([policy], tmp_path, ["policy"])
    assert "model.layers.1.self_attn.qkv_proj is split over 2 GPUs" in error and "\n" not in error


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight_scale", "model.rotary.weight"])
def test_a_parameter_that_is_not_understood_is_never_left_behind(name: str, tmp_path: Path) -> None:
    policy = make_model("Qwen3ForCausalLM", config(), {"model.norm.weight": [HIDDEN], name: [4]})
    assert f"{name} is not understood" in _error_of([policy], tmp_path, ["policy"])


def test_sizes_must_add_up(tmp_path: Path) -> None:
    policy = make_policy()
    policy.config.num_key_value_heads = 1
    assert "qkv_proj.weight has 64 rows, its config.json says 32 + 8 + 8" in _error_of([policy], tmp_path, ["policy"])


def test_a_draft_with_the_policys_head_is_refused(tmp_path: Path) -> None:
    policy = make_policy()
    draft = make_draft(policy, reduced=False)
    draft.lm_head.weight = policy.lm_head.weight
    assert "the draft's lm_head.weight is the policy's" in _error_of([draft, policy], tmp_path)


def test_a_draft_with_its_own_embedding_is_refused(tmp_path: Path) -> None:
    policy = make_policy()
    draft = make_draft(make_policy())
    assert "the draft has an embedding of its own" in _error_of([draft, policy], tmp_path)


def test_a_frozen_draft_is_left_alone(tmp_path: Path) -> None:
    policy = make_policy()
    draft = make_draft(policy)
    before = {name: values.clone() for name, values in draft.named_parameters() if "embed" not in name}
    for models in ([draft, policy], [policy, draft], [nn.Linear(1, 1), policy], [policy, nn.Linear(1, 1)]):
        transport = connect("ipc", lambda payload, m=models: hand_over(m, payload), ["policy"], tmp_path)
        publish(checkpoint(policy, 5), None, transport, 5)
        assert_holds(policy, checkpoint(policy, 5))
        transport.close()
    assert all(torch.equal(before[name], dict(draft.named_parameters())[name]) for name in before)


# --- refused, broken off, healed ------------------------------------------------------------------------------------


def _refused(engine: Engine, seed: int = 4, version: int = 4) -> str:
    with pytest.raises(SyncError) as caught:
        engine.publish(seed, version)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _still_serves_3_and_goes_on(engine: Engine) -> None:
    engine.assert_holds(3)
    assert (engine.transport.version, engine.transport.dirty) == (3, False)
    engine.tamper = lambda message: message
    engine.publish(seed=9, version=9)
    engine.assert_holds(9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda policy, draft: policy.pop("model.norm.weight"), "policy.model.norm.weight is missing"),
        (
            lambda policy, draft: draft.pop("midlayer.hidden_norm.weight"),
            "draft.midlayer.hidden_norm.weight is missing",
        ),
        (lambda policy, draft: policy.update(odd=torch.ones(2)), "policy.odd is not a tensor of this engine"),
        (lambda policy, draft: draft.update({"fc.weight": torch.ones(2, 2)}), r"draft.fc.weight has shape [2, 2]"),
        (lambda policy, draft: draft.update(d2t=draft["d2t"] + 1), "draft.d2t is not the engine's"),
    ],
    ids=["missing", "missing draft", "extra", "shape", "d2t"],
)
def test_what_does_not_fit_leaves_the_old_version_serving(
    engine: Engine, change: Callable[[Weights, Weights], object], said: str
) -> None:
    policy, draft = engine.weights(4)
    change(policy, draft)
    with pytest.raises(SyncError) as caught:
        publish(policy, draft, engine.transport, 4)
    assert said in str(caught.value) and "version 3 serves on" in str(caught.value)
    _still_serves_3_and_goes_on(engine)


def test_a_bucket_that_was_changed_on_the_way_is_refused(engine: Engine) -> None:
    carrier = engine.transport._carrier
    assert isinstance(carrier, IpcCarrier)

    def flip(message: Message) -> Message:
        carrier.buckets[0][100] ^= 1
        return message

    engine.tamper = flip
    error = _refused(engine)
    first = engine.transport.plan.tensors[0].full_name
    assert f"{first} was changed on the way" in error and "version 3 serves on" in error
    _still_serves_3_and_goes_on(engine)


def _changed(**changes: object) -> Callable[[Message], Message]:
    return lambda message: replace(message, **changes)


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (_changed(plan_digest="0" * 64), "the sender's plan 000000000000 is not this engine's plan"),
        (_changed(checksums={}), "came without a checksum"),
        (_changed(source={"kind": "pigeon"}), "sources of kind 'pigeon' are not known here"),
        (_changed(source={"kind": "file", "key": "/dev/shm/none", "sizes_bytes": [1]}), "is not the sender's shared"),
        (_changed(source={"kind": "disk", "folder": "/nowhere"}), "is not a readable manifest"),
        (_changed(source={"kind": "file"}), "the loader failed: KeyError: 'key'; version 3 serves on"),
    ],
)
def test_a_message_that_does_not_fit_is_refused(
    engine: Engine, tamper: Callable[[Message], Message], said: str
) -> None:
    engine.tamper = tamper
    error = _refused(engine)
    assert said in error and error.endswith("version 3 serves on")
    _still_serves_3_and_goes_on(engine)


def test_an_older_version_is_refused(engine: Engine) -> None:
    assert "version 3 is not newer than version 3" in _refused(engine, seed=4, version=3)
    _still_serves_3_and_goes_on(engine)


def test_with_one_model_missing_nothing_is_applied(engine: Engine) -> None:
    engine.models = (engine.policy,)
    error = _refused(engine)
    assert "gave no verdict" in error and "draft" in error
    engine.assert_holds(3)
    assert engine.transport.dirty, "what an engine without a verdict holds is not known"
    engine.models = (engine.draft, engine.policy)
    _goes_on(engine)


def _goes_on(engine: Engine) -> None:
    engine.publish(seed=9, version=9)
    engine.assert_holds(9)
    assert not engine.transport.dirty


def test_the_order_of_the_models_does_not_matter(engine: Engine) -> None:
    engine.models = (engine.policy, engine.draft)
    _goes_on(engine)


@pytest.mark.parametrize("failing", [RuntimeError("device lost"), MemoryError("no room")])
def test_a_copy_that_fails_half_way_is_dirty_until_a_whole_sync(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, failing: Exception
) -> None:
    copies = 0
    copy = receiver.WeightReceiver._copy

    def fail_at_the_fifth(self: receiver.WeightReceiver, name: str, *rest: object) -> None:
        nonlocal copies
        copies += 1
        if copies == 5:
            raise failing
        copy(self, name, *rest)

    def fail_together(*_: object) -> None:
        raise RuntimeError("then one by one, to find which")

    with monkeypatch.context() as patched:
        patched.setattr(receiver, "pack", fail_together)
        patched.setattr(receiver.WeightReceiver, "_copy", fail_at_the_fifth)
        error = _refused(engine)
    assert str(failing) in error and "dirty" in error and "last whole version 3" in error
    assert (engine.transport.version, engine.transport.dirty) == (3, True)
    with pytest.raises(AssertionError):
        engine.assert_holds(3)  # it is a mixture
    _goes_on(engine)


def test_after_an_attach_nothing_is_servable_until_a_whole_version(engine: Engine) -> None:
    engine.transport.attach()
    assert (engine.transport.version, engine.transport.dirty) == (-1, True)
    engine.tamper = _changed(plan_digest="")
    assert "the engine is dirty and serves nothing until a complete sync" in _refused(engine)
    assert engine.transport.dirty
    engine.tamper = lambda message: message
    _goes_on(engine)


def test_an_engine_that_was_not_attached_refuses(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_state", loader._State())  # as after a restart
    assert "was not attached, or has restarted since" in _refused(engine)
    assert engine.transport.dirty
    engine.transport.attach()
    _goes_on(engine)


# --- the verdict ----------------------------------------------------------------------------------------------------


def _answering(make: Callable[[Message], Verdict | bytes]) -> Callable[[bytes], None]:
    def deliver(payload: bytes) -> None:
        message = Message.decode(payload)
        made = make(message)
        verdict_path(message).write_bytes(made if isinstance(made, bytes) else made.encode())

    return deliver


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda message: Verdict("other", 4, False), "the verdict is on message other"),
        (lambda message: Verdict(message.id, 4, True), "not taken over by the engine; the engine is dirty"),
        (lambda message: Verdict(message.id, 3, False), "not taken over by the engine; version 3 serves on"),
        (lambda message: Verdict(message.id, 4, False), "reads back other bytes than were sent: policy.model.embed"),
        (lambda message: b"{}", "is no verdict"),
        (lambda message: b"", "is no verdict"),
    ],
)
def test_only_a_verdict_that_says_so_makes_a_version(
    engine: Engine, make: Callable[[Message], Verdict | bytes], said: str
) -> None:
    engine.transport._deliver = _answering(make)
    assert said in _refused(engine)
    assert engine.transport.dirty or engine.transport.version == 3
    assert list(engine.transport._exchange_dir.iterdir()) == [], "verdicts are read once"
    engine.transport._deliver = engine.deliver
    _goes_on(engine)


def test_a_dead_engine_is_an_error_and_dirty(engine: Engine) -> None:
    def dead(payload: bytes) -> None:
        raise SyncError("the engine is dead")

    engine.transport._deliver = dead
    assert _refused(engine) == "the engine is dead"
    assert engine.transport.dirty


def test_what_is_no_message_changes_nothing(engine: Engine) -> None:
    hand_over([engine.draft, engine.policy], b"not json")
    loader.load(engine.policy, [])
    _still_serves_3_and_goes_on(engine)


def test_a_verdict_that_cannot_be_written_is_missed_not_raised(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.tamper = _changed(reply_dir=str(tmp_path / "nowhere"))
    assert "gave no verdict" in _refused(engine)
    assert "cannot be written" in capsys.readouterr().out


# --- what is left behind, and what is needed -------------------------------------------------------------------------


def test_shared_memory_is_nameless_once_it_is_mapped_and_full_memory_is_an_error(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shm"
    shared.mkdir()
    engine.transport._make_carrier = lambda plan: IpcCarrier(plan, shared)
    engine.transport.attach()
    engine.tamper = _changed(plan_digest="")
    _refused(engine, version=1)
    assert len(list(shared.iterdir())) == 1, "an engine that refused may not have mapped it"
    engine.tamper = lambda message: message
    engine.publish(seed=4, version=4)
    assert list(shared.iterdir()) == []
    engine.publish(seed=5, version=5)
    engine.assert_holds(5)
    engine.transport.attach()

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    error = _refused(engine, version=6)
    assert "no room for the" in error and "sync_transport = disk" in error and "the engine was not told" in error
    assert list(shared.iterdir()) == []


def test_a_carrier_that_is_forgotten_takes_its_file_along(tmp_path: Path) -> None:
    weights = {"policy.norm.weight": torch.ones(4)}
    carrier = IpcCarrier(make_plan(weights), tmp_path)
    carrier.put(Bundle(1, "", weights, {}))
    assert len(list(tmp_path.iterdir())) == 1
    del carrier
    assert list(tmp_path.iterdir()) == []


def test_the_loader_needs_torch_and_sync_alone() -> None:
    code = (
        "import sys; import sync.loader; "
        "print([m for m in ('rollout_engine', 'draft_models', 'trainer', 'megatron', 'sglang') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}; {code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_folder_of_exchange_is_found_from_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine started here does not run here: neither weights nor verdict may be named relative to it."""
    (tmp_path / "exchange").mkdir()
    (tmp_path / "engine").mkdir()
    policy = make_policy("Qwen3ForCausalLM")
    engine = Engine(policy, make_draft(policy))

    def deliver(payload: bytes) -> None:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / "engine")
            engine.deliver(payload)

    monkeypatch.chdir(tmp_path)
    engine.transport = connect("disk", deliver, ROLES, Path("exchange"))
    engine.publish(seed=1, version=1)
    engine.assert_holds(seed=1)
