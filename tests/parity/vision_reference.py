"""The answers of transformers about images and clips, in float32 on the CPU. Needs torch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity import vision_cases
from parity.cases import Case
from parity.vision_cases import Scene
from safetensors.torch import load_file
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForConditionalGeneration, Qwen3_5VisionModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from mlx_qwen35.checkpoint.folder import safetensors_files
from mlx_qwen35.checkpoint.names import VISION

MARGIN = 3e-4  # between the best and the second logit of each greedy token: a tie would prove nothing


def _load(case: Case, folder: Path) -> tuple[Qwen3_5VisionModel, Qwen3_5ForConditionalGeneration | None]:
    """The tower, and the whole model where prompts are compared."""
    config = Qwen3_5Config(**case.config, attn_implementation="eager")
    state = {}
    for file in safetensors_files(folder):
        state |= {name: value.float() for name, value in load_file(file).items()}
    if not vision_cases.COMPARED[case.name]:
        tower = Qwen3_5VisionModel._from_config(config.vision_config, attn_implementation="eager").float().eval()
        tower.load_state_dict({k.removeprefix(VISION): v for k, v in state.items() if k.startswith(VISION)})
        return tower, None
    model = Qwen3_5ForConditionalGeneration(config).float().eval()
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.model.visual, model


def answers(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Name -> (rows, width) float32; token ids and positions too, which float32 holds exactly.

    Computed by one thread: with operations as small as these more of them wait for each other, for seconds on a machine
    that has other things to do.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return _answers(case, folder)
    finally:
        torch.set_num_threads(threads)


def _answers(case: Case, folder: Path) -> dict[str, np.ndarray]:
    tower, model = _load(case, folder)
    out = {}
    for number, grid in enumerate(vision_cases.GRIDS[case.name]):
        stages = _stages(case, tower, grid) if number == 0 or grid[0] > 1 else {}
        out |= {f"{grid} {name}": value for name, value in (stages | _tower(case, tower, grid)).items()}
    for scene in vision_cases.scenes(case):
        out |= {f"{scene.name} {name}": value for name, value in _scene(scene, model).items()}
    return {name: value.float().numpy() for name, value in out.items()}


def _tower(case: Case, tower: Qwen3_5VisionModel, grid: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    patches = torch.from_numpy(vision_cases.plain_patches(vision_cases.media(case, str(grid), grid)))
    return {"tower": tower(patches, grid_thw=torch.tensor([grid])).pooler_output}


def _stages(case: Case, tower: Qwen3_5VisionModel, grid: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Each stage of the tower alone, fed with noise, and the patches' embedding with and without the position table."""
    thw = torch.tensor([grid])
    indices, weights = get_vision_interpolation_indices_and_weights(
        thw,
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=2,
    )
    places = (tower.pos_embed(indices) * weights[:, :, None]).sum(1)
    patches = torch.from_numpy(vision_cases.plain_patches(vision_cases.media(case, str(grid), grid)))
    x = torch.from_numpy(vision_cases.tower_input(case, grid))
    tables = tower.rotary_pos_emb(x, get_vision_position_ids(thw, 2))
    frames = torch.arange(grid[0] + 1, dtype=torch.int32) * (grid[1] * grid[2])
    out = {"patch_embed": tower.patch_embed(patches), "position": places, "cos": tables[0], "sin": tables[1]}
    for i, block in enumerate(tower.blocks):
        out[f"blocks.{i}"] = block(x, cu_seqlens=frames, position_embeddings=tables)
        out[f"blocks.{i}.attn"] = block.attn(x, cu_seqlens=frames, position_embeddings=tables)
        out[f"blocks.{i}.mlp"] = block.mlp(x)
    return out | {"norm": tower.blocks[0].norm1(x), "merger": tower.merger(x)}


def _inputs(scene: Scene) -> dict[str, Any]:
    """A scene as transformers' model takes it."""
    out: dict[str, Any] = {
        "input_ids": torch.tensor([scene.prompt.tokens]),
        "mm_token_type_ids": torch.from_numpy(scene.types)[None],
    }
    for clips, pixels, grids in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        if media := scene.media(clips):
            out[pixels] = torch.from_numpy(np.concatenate([vision_cases.plain_patches(item) for item in media]))
            out[grids] = torch.tensor([item.grid for item in media])
    return out


def _scene(scene: Scene, model: Qwen3_5ForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Positions, rope delta, merged embeddings, 16 greedy tokens, and the logits of the prompt and of those."""
    inputs = _inputs(scene)
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    positions, delta = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)
    length = len(scene.prompt.tokens)
    written = model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=vision_cases.GREEDY,
        min_new_tokens=vision_cases.GREEDY,
        do_sample=False,
    )
    inputs["input_ids"] = written
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, vision_cases.GREEDY))
    merged = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: merged.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model.model.rope_deltas = None  # of the generation
    logits = model(**inputs, use_cache=False).logits[0]
    hook.remove()
    best = logits[length - 1 : -1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > MARGIN, f"greedy tokens of {scene.name} are nearly ties: change its seed"
    greedy = written[:, length:]
    assert torch.equal(greedy[0], logits[length - 1 : -1].argmax(-1)), "transformers' cache and whole prompt disagree"
    return {
        "positions": positions[:, 0], "delta": delta, "embeddings": merged[0][0], "logits": logits, "greedy": greedy,
    }  # fmt: skip
