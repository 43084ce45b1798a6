"""Embeddings of images: encoded once, from disk afterwards, and never those of other pixels or another encoder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from refusing import refused

from mlx_qwen35 import Model, Processor, load
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.fingerprint import vision_fingerprint
from mlx_qwen35.engine.media import encode_media
from mlx_qwen35.load import load_model
from mlx_qwen35.train.gradients import batch_loss
from mlx_qwen35.train.images import Embeddings
from mlx_qwen35.train.rows import Row, RowFile, rows_of


def pixels(shade: int) -> np.ndarray:
    return np.random.RandomState(shade).randint(0, 256, (96, 64, 3)).astype(np.uint8)


def asked(*shades: int) -> dict:
    return {"prompt": "what?", "completion": "it", "images": [pixels(shade) for shade in shades]}


@pytest.fixture(scope="module")
def seeing() -> tuple[Model, Processor]:
    return load("nano")


@pytest.fixture
def rows(seeing: tuple[Model, Processor]) -> RowFile:
    """One image, two of which one is the same, none, one in another row."""
    return rows_of([asked(1), asked(2, 1), asked()], seeing[1], 500)


@pytest.fixture
def encoded(seeing: tuple[Model, Processor], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests of what the vision encoder is given."""
    encode, given = type(seeing[0].vision.part).encode, []

    def spy(self, media, adapters=None):
        given.append(media.digest)
        return encode(self, media, adapters)

    monkeypatch.setattr("mlx_qwen35.model.vision.VisionEncoder.encode", spy)
    seeing[0].vision.unload()
    return given


def equal(found: mx.array, expected: mx.array) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and bool((found == expected).all())


def test_embeddings_are_those_of_a_prompt(seeing, rows: RowFile, tmp_path: Path):
    model, processor = seeing
    found = Embeddings(model, tmp_path)(list(rows))
    assert found is not None and found[2].shape == (0, model.config.hidden_size)
    shown = [{"type": "image", "image": pixels(shade)} for shade in (2, 1)]
    prompt = processor.encode_messages([{"role": "user", "content": [*shown, {"type": "text", "text": "what?"}]}])
    assert equal(found[1], encode_media(model, prompt).embeddings)


def test_each_image_is_encoded_once_and_read_afterwards(seeing, rows: RowFile, encoded: list[str], tmp_path: Path):
    model, _ = seeing
    embed, seen = Embeddings(model, tmp_path / "new" / "folder"), []
    assert embed.fill([rows, rows], progress=lambda done, total: seen.append((done, total))) == 2
    assert len(encoded) == len(set(encoded)) == 2 and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not model.vision.loaded
    first, again = embed(list(rows)), Embeddings(model, tmp_path / "new" / "folder")(list(rows))
    assert all(map(equal, first, again)) and len(encoded) == 2 and not model.vision.loaded


def test_rows_without_images_need_no_embeddings(seeing, rows: RowFile, tmp_path: Path):
    assert Embeddings(seeing[0], tmp_path)([rows[2]]) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_made_anew(seeing, rows: RowFile, encoded: list[str], tmp_path: Path, damage: bytes | None):
    embed = Embeddings(seeing[0], tmp_path)
    (before,) = embed([rows[0]])
    path = embed.path(rows[0].media[0].media)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    (after,) = embed([rows[0]])
    assert equal(before, after) and len(encoded) == 2 and path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_refused(seeing, rows: RowFile, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with refused("output_unwritable", tmp_path / "file"):
        Embeddings(seeing[0], tmp_path / "file").fill([rows])


@pytest.mark.full
def test_a_model_without_an_encoder_is_refused(checkpoint_folder: Callable, rows: RowFile, tmp_path: Path):
    model = load_model(open_checkpoint(checkpoint_folder(vision=False)), mx.float32, "")
    with refused("vision_missing"):
        Embeddings(model, tmp_path)([rows[0]])


@pytest.mark.full
def test_other_encoders_have_other_files(checkpoint_folder: Callable, seeing, rows: RowFile, tmp_path: Path):
    folders = [checkpoint_folder(seed=0, vision=True), checkpoint_folder(seed=1, vision=True)]
    prints = [vision_fingerprint(open_checkpoint(folder)) for folder in folders]
    assert len(set(prints)) == 2
    copied = shutil.copytree(folders[0], tmp_path / "copy")
    assert vision_fingerprint(open_checkpoint(copied)) == prints[0]
    models = (seeing[0], load("nano", dtype="bfloat16")[0])
    assert len({Embeddings(model, tmp_path).path(rows[0].media[0].media) for model in models}) == 2


def test_the_loss_depends_on_the_pixels(seeing, rows: RowFile, tmp_path: Path):
    model, processor = seeing
    embed = Embeddings(model, tmp_path)

    def loss(*batch: Row) -> float:
        return batch_loss(model, {}, batch, embeddings=embed(batch), backward=False).loss

    (other,) = rows_of([asked(7)], processor, 500)
    assert rows[0].tokens == other.tokens and abs(loss(rows[0]) - loss(other)) > 1e-3
    assert loss(rows[0], rows[2]) == pytest.approx(loss(rows[0]) + loss(rows[2]), abs=1e-4)
