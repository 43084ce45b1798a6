"""The answers of transformers' Qwen3VLVideoProcessor and Qwen3VLProcessor. Needs torch, and torchvision in a folder:

    pip install --target FOLDER --no-deps torchvision==0.28.0
    TORCHVISION=FOLDER python tests/parity/make_golden.py

torchvision's wheel refuses a CPU torch: it registers functions for operators that only its own build of torch declares.
Declared here first, it imports, and what transformers uses of it (resizing and normalising) works. All that happens in
a process of its own, which is this file: beside torch, torchvision would be imported by whatever imports transformers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from parity import cases, vision_cases
from parity.vision_cases import Film

JSON, PIXELS = "vision-clips.json", "vision-clips.npz"
# What torchvision/_meta_registrations.py names, in 0.28.0.
_OPERATORS = """
    nms qnms roi_align _roi_align_backward ps_roi_align _ps_roi_align_backward roi_pool _roi_pool_backward
    ps_roi_pool _ps_roi_pool_backward qroi_align deform_conv2d _deform_conv2d_backward
""".split()


def available() -> bool:
    return "TORCHVISION" in os.environ


def run(folder: Path) -> None:
    """Ask transformers, in another process, and write the two files of answers into a folder."""
    subprocess.run([sys.executable, __file__, str(folder)], check=True)


def read(folder: Path = cases.GOLDEN) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What is in JSON, and in PIXELS: the bytes that the patches of the clips of SHOWN stand for."""
    with np.load(folder / PIXELS) as file:
        return json.loads((folder / JSON).read_text()), dict(file)


def _import_torchvision() -> Any:
    sys.path.insert(0, os.environ["TORCHVISION"])
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(f"{name}() -> Tensor")
    import torchvision  # noqa: F401

    return library  # to be kept: the operators live as long as it does


def _processor(tokenizer: Path) -> Any:
    """Qwen3VLProcessor with the published settings and the tokenizer of a folder."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    return Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**vision_cases.IMAGE_SETTINGS),
        AutoTokenizer.from_pretrained(tokenizer),
        Qwen3VLVideoProcessor(**vision_cases.VIDEO_SETTINGS, cap_pixels_per_frame=False),
    )


def _answers(whole: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    size = vision_cases.VIDEO_SETTINGS["size"]
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    stored = {
        "films": {film.key: _film(whole, film) for film in vision_cases.FILMS},
        "sizes": {str(shape): smart_resize(*shape, factor=32, **limits) for shape in vision_cases.SIZES},
    }
    image = np.zeros((*vision_cases.IMAGE, 3), np.uint8)
    stored["both"] = _film(whole, vision_cases.BOTH_FILM, vision_cases.BOTH, images=[image])["text"]
    shown = {}
    for shape in vision_cases.SHOWN:
        frames = vision_cases.shown_frames(shape)
        out = whole.video_processor(videos=[frames], do_sample_frames=False, return_tensors="np")
        shown[str(shape)] = np.rint((out["pixel_values_videos"] + 1) * 127.5).astype(np.uint8)
        shown[f"{shape} grid"] = out["video_grid_thw"][0]
    return stored, shown


def _film(whole: Any, film: Film, text: str = vision_cases.PLACES, **media: Any) -> dict[str, Any]:
    """Frames, times of pairs and grid of a film, and its prompt as token ids; with the outer tags, as 5.23 has them."""
    out = whole(
        text=[text],
        videos=[film.array],
        video_metadata=[{"total_num_frames": film.frames, "fps": film.rate}],
        return_metadata=True,
        **film.options,
        **media,
    )
    indices = out["video_metadata"][0].frames_indices.tolist()
    return {
        "indices": indices,
        "times": whole._calculate_timestamps(list(indices), film.rate, 2),
        "grid": out["video_grid_thw"][0].tolist(),
        "text": vision_cases.shortened(whole.tokenizer.decode(out["input_ids"][0])),
    }


def _write(folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    library = _import_torchvision()
    from mlx_qwen35.checkpoint.hub import resolve

    stored, shown = _answers(_processor(resolve("nano")))
    del library
    films = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in stored.pop("films").items())
    (folder / JSON).write_text(f'{{"films": {{\n{films}\n}},\n{json.dumps(stored)[1:]}\n')
    np.savez_compressed(folder / PIXELS, **shown)


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
