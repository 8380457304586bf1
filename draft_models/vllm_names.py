"""Where vLLM's EAGLE-3 loader would put a draft's tensors: names and shapes as data, so that a misfit is found here.

Checked against the source, never run: `Eagle3LlamaForCausalLM` and `LlamaModel.load_weights` of vLLM's
vllm/model_executor/models/llama_eagle3.py as of commit 00bd1493b3e82d6c13c68ee8a0e1c5a96707e190.
"""

from __future__ import annotations

from collections.abc import Mapping

from draft_models.eagle3 import DraftError, Eagle3Config

Shape = tuple[int, ...]

# Parts of one fused parameter, in the order in which they lie in it.
_FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_RENAMED = (("midlayer.", "layers.0."), ("d2t", "draft_id_to_target_id"))
_ALIASED = frozenset({"model.embed_tokens.weight"})  # the target's, where the checkpoint has none
_IGNORED = "t2d"


def vllm_parameters(config: Eagle3Config) -> dict[str, Shape]:
    """Name and shape of every parameter of vLLM's module on one GPU. Vocabularies are not padded here."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size = config.num_attention_heads * head_dim
    qkv_size = q_size + 2 * config.num_key_value_heads * head_dim
    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.fc.weight": (hidden, 3 * hidden),
        f"{layer}hidden_norm.weight": (hidden,),
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        f"{layer}self_attn.qkv_proj.weight": (qkv_size, 2 * hidden),
        f"{layer}self_attn.o_proj.weight": (hidden, q_size),
        f"{layer}mlp.gate_up_proj.weight": (2 * inner, hidden),
        f"{layer}mlp.down_proj.weight": (hidden, inner),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        "draft_id_to_target_id": (config.draft_vocab_size,),
    }


def check_vllm(config: Eagle3Config, shapes: Mapping[str, Shape]) -> None:
    """`shapes`: those of a checkpoint's tensors by name, in SGLang's or speculators' spelling.

    Raises DraftError naming the first tensor for which vLLM has no place or another shape, and the first parameter of
    vLLM's that would stay uninitialised.
    """
    parameters, rows = vllm_parameters(config), dict[str, int]()
    for name, shape in shapes.items():
        if _IGNORED in name:
            continue
        place = _parameter(name)
        if place not in parameters:
            raise DraftError(f"tensor {name} has no place in vLLM's EAGLE-3 model, which would look for {place}")
        if shape[1:] != parameters[place][1:]:
            raise DraftError(f"tensor {name} has shape {shape}, vLLM's {place} is {parameters[place]}")
        rows[place] = rows.get(place, 0) + shape[0]
    optional = _ALIASED if config.is_reduced else _ALIASED | {"draft_id_to_target_id"}
    for place, shape in parameters.items():
        if rows.get(place, 0 if place not in optional else shape[0]) != shape[0]:
            raise DraftError(f"vLLM's {place} has {shape[0]} rows, this draft fills {rows.get(place, 0)} of them")


def _parameter(name: str) -> str:
    for before, after in _RENAMED:
        name = name.replace(before, after)
    if "lm_head" not in name and "draft_id_to_target_id" not in name:
        name = f"model.{name}"
    for fused, parts in _FUSED.items():
        for part in parts:
            name = name.replace(f".{part}", f".{fused}")
    return name
