"""Write tests/adapters/golden: adapters made by PEFT and by mlx-lm's own tuner, and the logits that those give.

    python tests/adapters/make_adapters.py [NAME ...]

Needs torch, transformers 5.23, peft 0.21 and mlx-lm 0.32. The format is told in golden_adapters.py.
"""

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlx.core as mx
import numpy as np
import torch
from adapters import golden_adapters as goldens
from mlx.utils import tree_flatten
from parity import cases, vision_cases
from safetensors.torch import load_file

from mlx_qwen35.checkpoint.folder import safetensors_files

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_DELTA = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
_MLP = ["gate_proj", "up_proj", "down_proj"]
_SETTINGS: dict[str, dict[str, Any]] = {
    "peft-plain": {"r": 2, "lora_alpha": 3, "target_modules": [*_ATTENTION, *_DELTA, *_MLP]},
    "peft-causal": {"r": 3, "lora_alpha": 6, "target_modules": [*_ATTENTION, *_DELTA], "lora_dropout": 0.1},
    "peft-rslora-vision": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
    "peft-patterns": {
        "r": 2, "lora_alpha": 4, "target_modules": [*_ATTENTION, *_MLP],
        "rank_pattern": {r"layers\.1\.mlp\.\w+_proj": 4, "up_proj": 3, "^nothing": 7},
        "alpha_pattern": {"model.language_model.layers.2.mlp.up_proj": 9, r"self_attn\.[qk]_proj": 1.5, "k_proj": 50},
    },
    "peft-norm": {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "peft-embedding": {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "peft-embedding-tied": {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "peft-table": {"r": 1, "lora_alpha": 1, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "peft-dora": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "in_proj_a", "down_proj"], "use_dora": True},
}  # fmt: skip
# Type, number of layers, lora_parameters. Of rank 6, the number of value heads, lora_b of in_proj_a is square.
_TUNED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mlx-lora": ("lora", 2, {"rank": 6, "scale": 1.5, "dropout": 0.0}),
    "mlx-dora": ("dora", 4, {
        "rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "linear_attn.in_proj_a", "mlp.down_proj"],
    }),
    "mlx-full": ("full", 2, {"rank": 8, "scale": 20.0, "dropout": 0.0}),
    "mlx-embedding": ("lora", 1, {
        "rank": 2, "scale": 3.0, "dropout": 0.0, "keys": ["mlp.up_proj", "language_model.model.embed_tokens"],
    }),
}  # fmt: skip


def main() -> None:
    wanted = sys.argv[1:] or [*_SETTINGS, *_TUNED]
    with tempfile.TemporaryDirectory() as scratch:
        model = cases.write(goldens.MODEL, Path(scratch) / "model")
        for name in wanted:
            make(name, model, Path(scratch) / name)
            size = sum(file.stat().st_size for file in goldens.GOLDEN.glob(f"{name}.*"))
            print(f"{name}: {size:,} bytes")


def make(name: str, model: Path, folder: Path) -> None:
    """Write the golden files of one adapter."""
    config, file, shapes, found = (of_peft if name in _SETTINGS else of_mlx)(name, model, folder)
    goldens.save(name, config, file, shapes, found)


Made = tuple[dict[str, Any], str, dict[str, tuple[int, ...]], dict[str, np.ndarray]]


# --- PEFT ------------------------------------------------------------------------------------------------------------


def transformers_model(model: Path, causal: bool = False) -> Any:
    """transformers' model of a folder, in float32."""
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration

    values = json.loads((model / "config.json").read_text())
    config = Qwen3_5Config(**values, attn_implementation="eager")
    state = {}
    for file in safetensors_files(model):
        state |= {key: value.float() for key, value in load_file(file).items()}
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    if not causal:
        made = Qwen3_5ForConditionalGeneration(config).float().eval()
    else:
        config.text_config._attn_implementation = "eager"
        made = Qwen3_5ForCausalLM(config.text_config).float().eval()
        state = {key: value for key, value in state.items() if ".visual." not in key}
        state = {re.sub(r"^model\.language_model\.", "model.", key): value for key, value in state.items()}
    made.load_state_dict(state)
    made.tie_weights()
    return made


def of_peft(name: str, model: Path, folder: Path) -> Made:
    """An adapter of PEFT, its numbers set by `goldens.numbers`, saved, and loaded again for its answers."""
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

    causal = name == "peft-causal"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(task_type="CAUSAL_LM", **_SETTINGS[name])
        adapted = get_peft_model(transformers_model(model, causal), config)
        with torch.no_grad():
            for key, tensor in get_peft_model_state_dict(adapted).items():
                if not key.endswith(".base_layer.weight") and key not in goldens.OF_TABLE:  # those are views
                    tensor.copy_(torch.from_numpy(goldens.numbers(key, tuple(tensor.shape))))
        adapted.save_pretrained(folder)
        adapted = PeftModel.from_pretrained(transformers_model(model, causal), folder).eval()
    told = json.loads((folder / "adapter_config.json").read_text())
    told |= {"base_model_name_or_path": "tiny", "target_modules": _sorted(told["target_modules"])}
    shapes = {key: tuple(value.shape) for key, value in load_file(folder / "adapter_model.safetensors").items()}
    return told, "adapter_model.safetensors", shapes, torch_answers(adapted, name in goldens.OF_VISION)


def _sorted(names: Any) -> Any:
    return sorted(names) if isinstance(names, list) else names


@torch.no_grad()
def torch_answers(adapted: Any, vision: bool) -> dict[str, np.ndarray]:
    ids = torch.from_numpy(goldens.TOKENS.astype(np.int64))[None]
    found = {"logits": adapted(input_ids=ids, use_cache=False).logits[0]}
    if vision:
        noise = vision_cases.media(goldens.MODEL, "adapted", goldens.GRID)
        patches = torch.from_numpy(vision_cases.plain_patches(noise))
        tower = adapted.get_base_model().model.visual
        found["tower"] = tower(patches, grid_thw=torch.tensor([goldens.GRID])).pooler_output
        (media,) = goldens.SCENE.media(False)
        found["image logits"] = adapted(
            input_ids=torch.tensor([goldens.SCENE.prompt.tokens]),
            mm_token_type_ids=torch.from_numpy(goldens.SCENE.types)[None],
            pixel_values=torch.from_numpy(vision_cases.plain_patches(media)),
            image_grid_thw=torch.tensor([media.grid]),
            use_cache=False,
        ).logits[0]
    return {key: value.float().numpy() for key, value in found.items()}


# --- mlx-lm ----------------------------------------------------------------------------------------------------------


def mlx_model(model: Path) -> Any:
    """mlx-lm's model of a folder, in float32."""
    from mlx_lm.models.qwen3_5 import Model, ModelArgs

    made = Model(ModelArgs.from_dict(json.loads((model / "config.json").read_text())))
    weights: dict[str, mx.array] = {}
    for file in safetensors_files(model):
        weights |= {key: array.astype(mx.float32) for key, array in mx.load(str(file)).items()}
    made.load_weights(list(made.sanitize(weights).items()))
    return made.eval()


def of_mlx(name: str, model: Path, folder: Path) -> Made:
    """An adapter of mlx-lm, saved as `mlx_lm.lora` does, and loaded by mlx-lm again for its answers."""
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import save_config

    kind, layers, parameters = _TUNED[name]
    tuned = mlx_model(model)
    tuned.freeze()
    if kind == "full":
        for layer in tuned.layers[-layers:]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(tuned, layers, dict(parameters), use_dora=kind == "dora")
    weights = dict(tree_flatten(tuned.trainable_parameters()))
    weights = {key: mx.array(goldens.numbers(key, array.shape)) for key, array in weights.items()}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {
        "model": "tiny", "fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters,
        "adapter_path": "adapters", "learning_rate": 1e-5, "optimizer": "adam", "train": True,
    }  # fmt: skip
    save_config(config, folder / "adapter_config.json")
    tuned = load_adapters(mlx_model(model), str(folder))
    logits = np.array(tuned(mx.array(goldens.TOKENS)[None])[0])
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, "adapters.safetensors", {key: array.shape for key, array in weights.items()}, {"logits": logits}


LIVE: dict[str, Callable[[str, Path, Path], Made]] = dict.fromkeys(_SETTINGS, of_peft) | dict.fromkeys(_TUNED, of_mlx)


if __name__ == "__main__":
    main()
