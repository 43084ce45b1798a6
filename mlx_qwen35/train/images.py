"""The embeddings of the images and videos in rows, made once by the frozen vision encoder and kept on disk.

A file is named by the pixels, by the encoder, by the adapter beside it and by the dtype, so that none is taken for
another. It holds a checksum and the embeddings. One that is damaged is made anew.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.model.lora import NONE
from mlx_qwen35.model.model import Model
from mlx_qwen35.train.rows import Row, RowFile

_SUM = hashlib.sha256().digest_size  # bytes of the checksum, which stands before the embeddings


class Embeddings:
    """What the vision encoder makes of what rows show. Calling it gives the embeddings of the rows of a batch.

    Args:
        model: the encoder is in memory only while something is encoded.
        folder: of the files. An image takes tokens x D values of the model's dtype: 5 MB for 1,000 tokens of the 4B.
        adapter: the name of a loaded adapter, whose part beside the encoder counts; "" for none.
    """

    def __init__(self, model: Model, folder: Path, adapter: str = NONE):
        self.model, self.folder = model, folder
        self._beside = model.adapters.active([adapter])
        encoder = model.vision.fingerprint() if model.vision else ""
        fingerprint = model.adapters[adapter].fingerprint if adapter else ""
        self._identity = f"{encoder} {fingerprint} {model.dtype} {model.config.hidden_size}"

    def __call__(self, rows: Sequence[Row]) -> list[mx.array] | None:
        """(n, D) for each row, in the order of its placeholders, in the model's dtype; None: no row shows anything.

        Raises InputError vision_missing, output_unwritable.
        """
        if not any(row.media for row in rows):
            return None
        none = mx.zeros((0, self.model.config.hidden_size), self.model.dtype)
        try:
            return [mx.concatenate([none, *(self._of(placed.media) for placed in row.media)]) for row in rows]
        finally:
            self._unload()

    def fill(self, files: Iterable[RowFile], progress: Callable[[int, int], None] = lambda done, rows: None) -> int:
        """Encode what the rows of these files show and no file holds yet; how many images and videos that was.

        progress: called with the rows that are done, and all that show something. The encoder is unloaded at the end.
        """
        shown = [(file, index) for file in files for index in file.shown()]
        made = 0
        try:
            for done, (file, index) in enumerate(shown, start=1):
                for media in {placed.media.digest: placed.media for placed in file[index].media}.values():
                    if self._stored(media) is None:
                        self._encoded(media)
                        made += 1
                progress(done, len(shown))
        finally:
            self._unload()
        return made

    def path(self, media: Media) -> Path:
        """The file of an image or a video."""
        key = hashlib.sha256(f"{self._identity} {media.digest}".encode()).hexdigest()
        return self.folder / f"{key}.embeddings"

    def _of(self, media: Media) -> mx.array:
        stored = self._stored(media)
        return self._encoded(media) if stored is None else stored

    def _stored(self, media: Media) -> mx.array | None:
        """(tokens, D) from its file; None where that is absent or damaged."""
        try:
            data = self.path(media).read_bytes()
        except OSError:
            return None
        shape, dtype = (media.tokens, self.model.config.hidden_size), self.model.dtype
        if data[:_SUM] != hashlib.sha256(data[_SUM:]).digest():
            return None
        return mx.array(np.frombuffer(data, np.uint8, offset=_SUM)).view(dtype).reshape(shape)

    def _encoded(self, media: Media) -> mx.array:
        """(tokens, D), made now and stored."""
        if self.model.vision is None:
            raise InputError("vision_missing", "this model has no vision encoder: its rows must be text")
        found = self.model.vision.part.encode(media, self._beside)
        data = np.array(found.reshape(-1).view(mx.uint8)).tobytes()
        path = self.path(media)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_bytes(hashlib.sha256(data).digest() + data)
            os.replace(unfinished, path)
        except OSError as error:
            raise InputError("output_unwritable", f"{path} must be writable: {error.strerror}") from error
        return found

    def _unload(self) -> None:
        if self.model.vision:
            self.model.vision.unload()
