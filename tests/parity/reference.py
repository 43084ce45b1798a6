"""The answers of transformers, in float32 on the CPU. Needs torch; nothing else in the tests' parity part does."""

import re
from pathlib import Path

import numpy as np
import torch
from parity import cases
from parity.cases import Case
from safetensors.torch import load_file
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

from mlx_qwen35.checkpoint.folder import safetensors_files


def load_text_model(case: Case, folder: Path) -> Qwen3_5ForCausalLM:
    config = Qwen3_5TextConfig(**case.config["text_config"])
    config._attn_implementation = "eager"
    model = Qwen3_5ForCausalLM(config).float().eval()
    state = {}
    for file in safetensors_files(folder):
        state |= {re.sub(r"^model\.language_model\.", "model.", k): v.float() for k, v in load_file(file).items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


@torch.no_grad()
def answers(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Name -> (tokens, width) float32. The logits of a shorter prompt are the first rows of `logits`: it is causal."""
    model = load_text_model(case, folder)
    out = {}
    if case.prompt:
        ids = torch.from_numpy(cases.tokens(case, case.prompt + cases.DECODED).astype(np.int64))[None]
        out["logits"] = model(ids, use_cache=False).logits[0]
        out["logprobs"] = torch.log_softmax(out["logits"][:-1], -1).gather(1, ids[0, 1:, None])  # of each next token
    for name, places in cases.places(case).items():
        ids = torch.from_numpy(cases.tokens(case, places.shape[1]).astype(np.int64))[None]
        positions = torch.from_numpy(places.astype(np.int64))[:, None]
        out[f"hidden, {name}"] = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state[0]
    x = torch.from_numpy(cases.layer_input(case))[None]
    T = x.shape[1]
    rotary = model.model.rotary_emb
    tables = rotary(x, torch.arange(T)[None, None].expand(3, 1, T))
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    for i, layer in enumerate(model.model.layers):
        full = hasattr(layer, "self_attn")
        whole = layer(x, position_embeddings=tables, attention_mask=mask if full else None)
        mixed = layer.self_attn(x, tables, mask)[0] if full else layer.linear_attn(x)
        out |= {f"layers.{i}": whole[0], f"layers.{i}.mixer": mixed[0]}
        if i == 0:
            out |= {"mlp": layer.mlp(x)[0], "norm": layer.input_layernorm(x)[0]}
    cos, sin = rotary(x, torch.from_numpy(cases.positions(case).astype(np.int64)))
    out |= {"cos": cos.flatten(0, 1), "sin": sin.flatten(0, 1)}
    return {name: value.float().numpy() for name, value in out.items()}
