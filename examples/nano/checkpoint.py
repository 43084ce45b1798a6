"""The nano checkpoint on disk: sizes, the MTP head, and weights in the layout of the published Qwen3.5 files."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from encoding import FOLDER
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

STATIC_FILES = (
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
FULL_ATTENTION = 3  # any index of a full-attention layer: the kind the MTP head is made of

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 1003,
    "model_type": "qwen3_5",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 991,
        "full_attention_interval": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 32768,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 1024,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
            "rope_type": "default",
            "rope_theta": 10000,
            "partial_rotary_factor": 0.25,
        },
    },
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
    "video_token_id": 1004,
    "vision_config": {
        "deepstack_visual_indexes": [],
        "depth": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 96,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 192,
        "model_type": "qwen3_5",
        "num_heads": 3,
        "num_position_embeddings": 64,
        "out_hidden_size": 128,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 1001,
    "vision_start_token_id": 1000,
}


class DraftHead(nn.Module):
    """The multi-token-prediction head: (hidden of token i, embedding of token i+1) -> hidden that predicts token i+2.

    transformers has no such head, so it is put together from its parts under the names of the published checkpoint.
    """

    def __init__(self, config: Any):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(size, eps=eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(size, eps=eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([Qwen3_5DecoderLayer(config, FULL_ATTENTION)])
        self.norm = Qwen3_5RMSNorm(size, eps=eps)

    def forward(self, hidden: Tensor, embedding: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """`hidden`, `embedding`: (B, T, D); `rotary`: cos and sin (B, T, R) of the positions of `hidden`."""
        x = torch.cat((self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)), dim=-1)
        return self.norm(self.layers[0](self.fc(x), position_embeddings=rotary))


class Nano(nn.Module):
    """transformers' model and the draft head beside it."""

    def __init__(self) -> None:
        super().__init__()
        config = Qwen3_5Config(**CONFIG)
        config._attn_implementation = "sdpa"
        self.main = Qwen3_5ForConditionalGeneration(config)
        self.mtp = DraftHead(self.main.model.language_model.config)
        self.float()  # the config asks for bfloat16; training and checks run in float32


def initialise(nano: Nano, seed: int) -> None:
    """Starting weights: 1/sqrt(fan in), quieter residual outputs, slow forgetting in the delta rule."""
    generator = torch.Generator().manual_seed(seed)
    depth = {"main.model.visual": 3, "main.model.language_model": 8, "mtp": 1}
    with torch.no_grad():
        for name, p in nano.named_parameters():
            part = next(key for key in depth if name.startswith(key))
            if name.endswith("A_log"):
                p.copy_(torch.empty_like(p).uniform_(math.log(0.05), math.log(4), generator=generator))
            elif name.endswith("dt_bias"):
                p.uniform_(-4, -1, generator=generator)
            elif name.endswith(("embed_tokens.weight", "pos_embed.weight")):
                p.normal_(0, 0.05, generator=generator)
            elif name.endswith("conv1d.weight"):
                p.normal_(0, 0.3, generator=generator)
                p[:, 0, -1] += 0.7
            elif p.ndim >= 2:
                std = (p[0].numel()) ** -0.5
                if any(end in name for end in ("o_proj", "out_proj", "down_proj", "attn.proj", "mlp.linear_fc2")):
                    std /= math.sqrt(2 * depth[part])
                p.normal_(0, std, generator=generator)
            elif name.endswith("bias"):
                p.zero_()


def published_names(nano: Nano) -> dict[str, Tensor]:
    """All tensors under their published names; the tied output matrix is not stored twice."""
    tensors = {name: p for name, p in nano.main.state_dict().items() if not name.startswith("lm_head")}
    tensors |= {f"mtp.{name}": p for name, p in nano.mtp.state_dict().items()}
    return tensors


def stored_dtype(name: str) -> torch.dtype:
    """float32 for the decay and the gated norm of the delta rule, bfloat16 for all else."""
    return torch.float32 if name.endswith(("A_log", "linear_attn.norm.weight")) else torch.bfloat16


def save(nano: Nano, folder: Path) -> None:
    """Writes a complete, loadable checkpoint; the weights file is replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in STATIC_FILES:
        if folder.resolve() != FOLDER:
            shutil.copyfile(FOLDER / name, folder / name)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tensors = {name: p.detach().to(stored_dtype(name)).contiguous() for name, p in published_names(nano).items()}
    part = folder / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)
    os.replace(part, folder / "model.safetensors")


def load(folder: Path) -> Nano:
    """Reads a checkpoint into float32 modules."""
    nano = Nano()
    tensors = {name: p.float() for name, p in load_file(folder / "model.safetensors").items()}
    draft = {name.removeprefix("mtp."): p for name, p in tensors.items() if name.startswith("mtp.")}
    nano.mtp.load_state_dict(draft)
    main = {name: p for name, p in tensors.items() if not name.startswith("mtp.")}
    missing, unexpected = nano.main.load_state_dict(main, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    nano.main.tie_weights()
    return nano
