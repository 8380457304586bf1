"""Models with the parameter names and layout of SGLang's, and an engine that calls the loader as SGLang does."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sync import loader
from sync.plan import SyncError
from sync.publish import Transport, publish
from sync.receiver import Bundle

VOCAB, PADDED_VOCAB, DRAFT_VOCAB = 70, 128, 64
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS = 16, 4, 2, 8, 24, 2
HOT_IDS = torch.arange(DRAFT_VOCAB) + (torch.arange(DRAFT_VOCAB) > 30) * 5

Weights = dict[str, torch.Tensor]
Models = tuple[nn.Module, nn.Module]  # policy and draft


def config(**changes: Any) -> SimpleNamespace:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
    }
    return SimpleNamespace(**(values | changes))


def make_model(class_name: str, model_config: SimpleNamespace, shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """A module of that class name whose `named_parameters` are `shapes`, filled with random bfloat16."""
    model: nn.Module = type(class_name, (nn.Module,), {})()
    model.config = model_config
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, nn.Parameter(torch.randn(*shape).bfloat16(), requires_grad=False))
    return model


def layer_shapes(prefix: str, qkv_in: int = HIDDEN, qk_norms: bool = True, bias: bool = False) -> dict[str, list[int]]:
    qkv_rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    shapes = {
        f"{prefix}self_attn.qkv_proj.weight": [qkv_rows, qkv_in],
        f"{prefix}self_attn.o_proj.weight": [HIDDEN, HEADS * HEAD_DIM],
        f"{prefix}mlp.gate_up_proj.weight": [2 * INTERMEDIATE, HIDDEN],
        f"{prefix}mlp.down_proj.weight": [HIDDEN, INTERMEDIATE],
        f"{prefix}input_layernorm.weight": [HIDDEN],
        f"{prefix}post_attention_layernorm.weight": [HIDDEN],
    }
    if qk_norms:
        shapes |= {f"{prefix}self_attn.{norm}.weight": [HEAD_DIM] for norm in ("q_norm", "k_norm")}
    return shapes | ({f"{prefix}self_attn.qkv_proj.bias": [qkv_rows]} if bias else {})


def make_policy(architecture: str = "Qwen3ForCausalLM", tied: bool = False) -> nn.Module:
    shapes: dict[str, Sequence[int]] = {"model.embed_tokens.weight": [PADDED_VOCAB, HIDDEN]}
    for layer in range(LAYERS):
        shapes |= layer_shapes(
            f"model.layers.{layer}.", qk_norms=architecture.startswith("Qwen3"), bias=architecture.startswith("Qwen2")
        )
    shapes["model.norm.weight"] = [HIDDEN]
    if not tied:
        shapes["lm_head.weight"] = [PADDED_VOCAB, HIDDEN]
    model = make_model(architecture, config(), shapes)
    if tied:
        model.lm_head = model.model.embed_tokens
    return model


def make_draft(policy: nn.Module, reduced: bool = True) -> nn.Module:
    """Its embedding is the policy's parameter, as SGLang's `set_embed` leaves it; with a reduced vocabulary it has
    the target ids that SGLang makes of d2t."""
    draft_vocab = DRAFT_VOCAB if reduced else VOCAB
    shapes: dict[str, Sequence[int]] = {
        "model.fc.weight": [HIDDEN, 3 * HIDDEN],
        **layer_shapes("model.layers.0.", 2 * HIDDEN, qk_norms=False),
        "model.layers.0.hidden_norm.weight": [HIDDEN],
        "model.norm.weight": [HIDDEN],
        "lm_head.weight": [DRAFT_VOCAB if reduced else PADDED_VOCAB, HIDDEN],
    }
    draft = make_model("LlamaForCausalLMEagle3", config(draft_vocab_size=draft_vocab), shapes)
    draft.model.embed_tokens = nn.Module()
    draft.model.embed_tokens.weight = policy.model.embed_tokens.weight
    draft.hot_token_id = HOT_IDS.clone() if reduced else None
    return draft


def checkpoint_shapes(model_shapes: Mapping[str, Sequence[int]], vocab: int) -> dict[str, list[int]]:
    """The tensors of a Hugging Face checkpoint for a model of SGLang's, by what its load_weights documents."""
    rows = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    shapes: dict[str, list[int]] = {}
    for name, shape in model_shapes.items():
        if "qkv_proj" in name:
            shapes |= {name.replace("qkv_proj", part): [count, *shape[1:]] for part, count in rows.items()}
        elif "gate_up_proj" in name:
            parts = ("gate_proj", "up_proj")
            shapes |= {name.replace("gate_up_proj", part): [INTERMEDIATE, *shape[1:]] for part in parts}
        elif "embed_tokens" in name or "lm_head" in name:
            shapes[name] = [vocab, *shape[1:]]
        else:
            shapes[name] = list(shape)
    return shapes


def checkpoint(model: nn.Module, seed: int) -> Weights:
    """Random weights for `model`, as a trainer names them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    is_draft = type(model).__name__ == "LlamaForCausalLMEagle3"
    if is_draft:
        del shapes["model.embed_tokens.weight"]
    vocab = model.config.draft_vocab_size if is_draft else VOCAB
    named = checkpoint_shapes(shapes, int(vocab))
    if is_draft:
        named = {name.removeprefix("model.").replace("layers.0.", "midlayer."): s for name, s in named.items()}
    weights = {name: torch.randn(*shape, generator=generator).bfloat16() for name, shape in named.items()}
    if is_draft and model.hot_token_id is not None:
        mask = torch.zeros(VOCAB, dtype=torch.bool)
        mask[HOT_IDS] = True
        weights |= {"d2t": HOT_IDS - torch.arange(DRAFT_VOCAB), "t2d": mask}
    return weights


def fused(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Weights:
    """What the model's own parameters hold once `weights` are loaded, padding cut off."""
    expected: Weights = {}
    for name in dict(model.named_parameters()):
        if type(model).__name__ == "LlamaForCausalLMEagle3":
            if "embed_tokens" in name:
                continue
            source = name.removeprefix("model.").replace("layers.0.", "midlayer.")
        else:
            source = name
        if "qkv_proj" in source:
            expected[name] = torch.cat([weights[source.replace("qkv_proj", f"{part}_proj")] for part in "qkv"])
        elif "gate_up_proj" in source:
            expected[name] = torch.cat([weights[source.replace("gate_up_proj", f"{p}_proj")] for p in ("gate", "up")])
        else:
            expected[name] = weights[source]
    return expected


def assert_holds(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Every parameter is bitwise what `weights` say."""
    expected, found = fused(model, weights), dict(model.named_parameters())
    for name, values in expected.items():
        assert torch.equal(found[name][: len(values)], values), name


def assert_engine_holds(engine: EngineProcess, models: Models, seed: int) -> None:
    policy, draft = models
    draft_state, policy_state = engine.weights()
    policy.load_state_dict(policy_state)
    draft.load_state_dict(draft_state)
    assert_holds(policy, checkpoint(policy, seed))
    assert_holds(draft, checkpoint(draft, seed + 1000))


def publish_seed(transport: Transport, models: Models, seed: int, version: int) -> None:
    policy, draft = models
    publish(checkpoint(policy, seed), checkpoint(draft, seed + 1000), transport, version)


def flip_a_bit_after(put: Callable[[Bundle], Any], bucket: Callable[[], torch.Tensor]) -> Callable[[Bundle], Any]:
    """A carrier's `put` after which one bit of a bucket is another."""

    def put_and_flip(bundle: Bundle) -> Any:
        source = put(bundle)
        bucket()[100] ^= 1
        return source

    return put_and_flip


def hand_over(models: Sequence[nn.Module], payload: bytes, device: str = "cpu") -> None:
    """One update request of SGLang's: the loader is called for each model with the same list, on its device."""
    named_tensors = [("slipstream", torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device))]
    for model in models:
        loader.load(model, named_tensors)


def _serve(connection: Any, architecture: str, device: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    policy = make_policy(architecture)
    draft = make_draft(policy)
    models = [draft.to(device), policy.to(device)]
    while (payload := connection.recv()) is not None:
        answer = b""
        if payload == b"weights":
            buffer = io.BytesIO()
            torch.save([{name: t.cpu() for name, t in model.state_dict().items()} for model in models], buffer)
            answer = buffer.getvalue()
        elif payload == b"mapped":
            answer = repr([bucket.data_ptr() for bucket in loader._state.mappings._buckets]).encode()
        else:
            hand_over(models, payload, device)
        connection.send(answer)


class EngineProcess:
    """Draft and policy in a process of their own."""

    def __init__(self, connection: Any, process: Any) -> None:
        self._connection, self._process = connection, process

    def deliver(self, payload: bytes) -> None:
        self._request(payload)

    def weights(self) -> list[Weights]:
        """State dicts of draft and policy, on the CPU."""
        dumped: list[Weights] = torch.load(io.BytesIO(self._request(b"weights")))
        return dumped

    def mapped(self) -> str:
        """Where the trainer's buckets lie in the engine's address space."""
        return self._request(b"mapped").decode()

    def _request(self, payload: bytes) -> bytes:
        try:
            self._connection.send(payload)
            answer: bytes = self._connection.recv()
        except (EOFError, OSError) as error:
            raise SyncError("the engine is dead") from error
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        if self._process.is_alive():
            self._connection.send(None)
            self._process.join(20)
            self._process.kill()


@contextmanager
def engine_process(architecture: str = "Qwen3ForCausalLM", device: str = "cpu") -> Iterator[EngineProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, architecture, device), daemon=True)
    process.start()
    theirs.close()
    engine = EngineProcess(ours, process)
    try:
        yield engine
    finally:
        engine.stop()
