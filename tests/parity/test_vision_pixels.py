"""Pictures and clips on their way to the tower against transformers 5.23: sizes, patches, frames, times, prompt text.

Pictures are compared with Qwen2VLImageProcessorPil itself, which needs no torch. Clips are compared with what
Qwen3VLVideoProcessor and Qwen3VLProcessor answered when the golden files were made. To make them again, or to compare
them with what transformers answers now:

    pip install --target FOLDER --no-deps torchvision==0.28.0
    TORCHVISION=FOLDER python tests/parity/make_golden.py
    TORCHVISION=FOLDER python -m pytest tests/parity/test_vision_pixels.py
"""

import json

import numpy as np
import pytest
from parity import video_reference, vision_cases
from parity.vision_cases import FILMS, SHOWN, SIZES
from PIL import Image
from refusing import refused

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.media.preprocess import image_size, video_size
from mlx_qwen35.media.preprocessor_files import read_preprocessor
from mlx_qwen35.prompt.processor import Processor

pillow_processor = pytest.importorskip(
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl", reason="needs transformers 5.23"
)

# (height, width) -> (height, width), tokens: section 7.1 of the notes on the model, from transformers.
TABLE = {
    (64, 64): (256, 256, 64), (720, 1280): (704, 1280, 880), (224, 224): (256, 256, 64),
    (1080, 1920): (1088, 1920, 2040), (336, 336): (320, 320, 100), (2160, 3840): (2176, 3840, 8160),
    (480, 640): (480, 640, 300), (4000, 6000): (3328, 4992, 16224), (48, 5000): (64, 4992, 312),
    (8000, 8000): (4096, 4096, 16384), (33, 6000): (32, 6016, 188),
}  # fmt: skip
LEAST, MOST = vision_cases.IMAGE_SETTINGS["size"].values()
PICTURES = [
    (1, 1), (31, 33), (33, 1999), (33, 6000), (7, 1400), (1400, 7), (336, 336), (720, 1280), (257, 255), (600, 401),
    (256, 256),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published settings for images and clips."""
    path = tmp_path_factory.mktemp("settings")
    for name, settings in (("", vision_cases.IMAGE_SETTINGS), ("video_", vision_cases.VIDEO_SETTINGS)):
        (path / f"{name}preprocessor_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def preprocessors(folder):
    config = vision_cases.vision_config(vision_cases.TINY)
    return read_preprocessor(folder, "image", config), read_preprocessor(folder, "video", config)


def published(**options) -> VisionOptions:
    return VisionOptions(published_limits=not {"max_pixels", "video_total_pixels"} & set(options), **options)


# --- pictures --------------------------------------------------------------------------------------------------------


def assert_equal_patches(preprocessor, picture, most: int = MOST) -> None:
    """Bit for bit, and the grid. transformers gets a PIL image: of arrays it must guess where the channels are."""
    theirs = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    settings = {**vision_cases.IMAGE_SETTINGS, "size": {"shortest_edge": LEAST, "longest_edge": most}}
    expected = pillow_processor.Qwen2VLImageProcessorPil(**settings)(images=[theirs], return_tensors="np")
    item = preprocessor.image(picture, published(**({} if most == MOST else {"max_pixels": most})))
    patches = item.patches()[0]
    assert item.grid == tuple(expected["image_grid_thw"][0])
    assert patches.dtype == expected["pixel_values"].dtype
    np.testing.assert_array_equal(patches, expected["pixel_values"])


@pytest.mark.parametrize(("height", "width"), PICTURES)
def test_patches_and_grid_of_a_picture_equal_transformers(preprocessors, height, width):
    assert_equal_patches(preprocessors[0], vision_cases.pixels(1, "picture", (height, width, 3)))


def test_patches_of_a_picture_of_20_megapixels_equal_transformers(preprocessors):
    tile = vision_cases.pixels(2, "tile", (250, 400, 3))
    assert_equal_patches(preprocessors[0], np.tile(tile, (20, 10, 1)), most=1 << 18)


@pytest.mark.parametrize("alpha", ["noise", "opaque", "none"])
def test_patches_of_a_transparent_picture_equal_transformers(preprocessors, alpha):
    rgba = vision_cases.pixels(3, "rgba", (270, 301, 4))
    rgba[..., 3] = {"noise": rgba[..., 3], "opaque": 255, "none": 0}[alpha]
    assert_equal_patches(preprocessors[0], Image.fromarray(rgba, "RGBA"))


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_patches_of_palette_and_grey_pictures_equal_transformers(preprocessors, mode):
    rgb = Image.fromarray(vision_cases.pixels(4, "modes", (280, 290, 3)))
    assert_equal_patches(preprocessors[0], rgb.convert(mode))


@pytest.mark.parametrize("size", TABLE, ids=str)
def test_sizes_and_tokens_are_those_of_the_published_table(size):
    height, width, tokens = TABLE[size]
    assert image_size(*size, 32, LEAST, MOST) == (height, width)
    assert height * width // 1024 == tokens


def test_sizes_of_many_pictures_equal_transformers():
    sides = np.exp(vision_cases.cases.uniform(5, "sides", (3000, 2)) * np.log(9000)).astype(int).tolist()
    sides = [(h, w) for h, w in sides if max(h, w) <= 200 * min(h, w)]
    assert len(sides) > 2000
    for least, most in ((LEAST, MOST), (1, 1 << 20), (5000, 70000)):
        ours = [image_size(h, w, 32, least, most) for h, w in sides]
        assert ours == [pillow_processor.smart_resize(h, w, 32, least, most) for h, w in sides]


def test_a_ratio_above_200_is_refused_here_and_in_transformers():
    with pytest.raises(ValueError, match="aspect ratio"):
        pillow_processor.smart_resize(7, 1401, 32, LEAST, MOST)
    with refused("aspect_ratio_exceeded", "200"):
        image_size(7, 1401, 32, LEAST, MOST)


@pytest.mark.parametrize("grid", [(1, 6, 10), (3, 4, 2)], ids=str)
def test_patches_of_images_and_clips_are_laid_out_as_written_down_plainly(grid):
    item = vision_cases.media(vision_cases.TINY, "layout", grid)
    np.testing.assert_array_equal(item.patches().reshape(-1, 1536), vision_cases.plain_patches(item))


@pytest.mark.parametrize("rows", [(0, 4), (0, 20), (16, 36), (40, 60), (20, 21), (58, 99)], ids=str)
def test_some_of_the_patches_are_those_of_the_whole(rows):
    item = vision_cases.media(vision_cases.TINY, "layout", (3, 6, 10))
    for frames in (slice(0, 1), slice(1, 3), slice(2, 9)):
        np.testing.assert_array_equal(item.patches(frames, slice(*rows)), item.patches()[frames, slice(*rows)])


# --- clips -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    """The stored answers for clips."""
    return video_reference.read()


@pytest.mark.skipif(not video_reference.available(), reason="needs TORCHVISION, a folder with torchvision")
def test_the_stored_answers_for_clips_are_those_of_transformers_now(golden, tmp_path):
    video_reference.run(tmp_path)
    now, shown = video_reference.read(tmp_path)
    assert golden[0] == now, f"{video_reference.JSON} is out of date: {vision_cases.cases.REMEDY}"
    assert set(golden[1]) == set(shown)
    for name in shown:
        np.testing.assert_allclose(golden[1][name], shown[name], 0, 1, err_msg=video_reference.PIXELS)


@pytest.fixture(scope="module")
def processor(folder):
    """nano's tokenizer with the published settings."""
    nano = resolve("nano")
    config = open_checkpoint(nano).config
    return Processor(Processor.from_folder(nano, config).tokenizer, config, folder)


def film_options(film: vision_cases.Film, **more) -> VisionOptions:
    return published(source_fps=film.rate, fps=film.fps, video_num_frames=film.num_frames, **more)


def test_the_golden_file_holds_each_film_and_size(golden):
    assert set(golden[0]["films"]) == {film.key for film in FILMS}
    assert set(golden[0]["sizes"]) == {str(shape) for shape in SIZES}


@pytest.mark.parametrize("frames", sorted({film.frames for film in FILMS}))
def test_sampled_frames_of_films_equal_transformers(golden, preprocessors, frames):
    for film in (film for film in FILMS if film.frames == frames):
        numbered = film.array
        for channel, digit in enumerate(np.divmod(np.arange(frames), 256)):
            numbered[..., channel] = digit[:, None, None]
        high, low, _ = preprocessors[1].video(numbered, film_options(film)).pixels[:, 0, 0].T.astype(int)
        shown = 256 * high + low
        expected = golden[0]["films"][film.key]["indices"]
        expected = expected + expected[-1:] * (len(expected) % 2)
        assert shown.tolist() == expected, film.key


@pytest.mark.parametrize("frames", sorted({film.frames for film in FILMS}))
def test_times_and_grids_of_films_equal_transformers(golden, preprocessors, frames):
    for film in (film for film in FILMS if film.frames == frames):
        item, expected = preprocessors[1].video(film.array, film_options(film)), golden[0]["films"][film.key]
        assert list(item.times) == expected["times"], film.key
        assert list(item.grid) == expected["grid"], film.key


@pytest.mark.parametrize("frames", sorted({film.frames for film in FILMS}))
def test_prompts_with_outer_tags_equal_transformers(golden, processor, frames):
    for film in (film for film in FILMS if film.frames == frames):
        options = film_options(film, outer_vision_tags=True)
        prompt = processor.encode_text(vision_cases.PLACES, videos=[film.array], vision=options)
        text = vision_cases.shortened(processor.decode(prompt.tokens))
        assert text == golden[0]["films"][film.key]["text"], film.key
        pad = processor.config.token_ids["video"]
        places = [place for p in prompt.placeholders for place in range(p.start, p.stop)]
        assert places == [place for place, token in enumerate(prompt.tokens) if token == pad]


def test_a_prompt_with_a_picture_and_a_clip_equals_transformers(golden, processor):
    film, picture = vision_cases.BOTH_FILM, np.zeros((*vision_cases.IMAGE, 3), np.uint8)
    prompt = processor.encode_text(
        vision_cases.BOTH, [picture], [film.array], film_options(film, outer_vision_tags=True)
    )
    assert vision_cases.shortened(processor.decode(prompt.tokens)) == golden[0]["both"]


def test_by_default_a_clip_has_no_outer_tags(processor):
    """The form of the release, written by hand: 30 frames at 29.97 are read as 4, the frames 0, 10, 19 and 29."""
    film = vision_cases.BOTH_FILM
    prompt = processor.encode_text(vision_cases.PLACES, videos=[film.array], vision=film_options(film))
    assert processor.decode(prompt.tokens) == (
        "Look: <0.2 seconds><|vision_start|><|video_pad|><|vision_end|>"
        "<0.8 seconds><|vision_start|><|video_pad|><|vision_end|> What is it?"
    )


def test_sizes_of_clips_equal_transformers(golden):
    least, most = vision_cases.VIDEO_SETTINGS["size"].values()
    for shape in SIZES:
        assert list(video_size(*shape, 32, least, most)) == golden[0]["sizes"][str(shape)], shape


@pytest.mark.parametrize("shape", SHOWN, ids=str)
def test_patches_of_clips_equal_transformers(golden, preprocessors, shape):
    """Bit for bit where nothing is resized; else within one step, as torch's bicubic rounds otherwise than Pillow's."""
    frames = vision_cases.shown_frames(shape)
    item = preprocessors[1].video(frames, published(source_fps=4.0, video_num_frames=len(frames)))
    ours = np.rint((item.patches().reshape(-1, 1536) + 1) * 127.5).astype(int)
    assert item.grid == tuple(golden[1][f"{shape} grid"])
    assert np.abs(ours - golden[1][str(shape)]).max() <= (item.pixels.shape[1:3] != shape[1:])
