"""The embeddings of the images and videos in rows, made once by the frozen vision encoder and kept on disk.

A file is named by the pixels, by the encoder, by the adapter's part of it and by the dtype, so that none is ever taken
for another. It holds a checksum and the embeddings; one that is damaged is made anew.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.model.lora import NONE
from mlx_qwen35.model.model import Model
from mlx_qwen35.train.rows import Row, RowFile

_SUM = hashlib.sha256().digest_size  # bytes of the checksum, which stands before the embeddings


class Embeddings:
    """What the vision encoder makes of the images and videos of rows.

    Args:
        model: with its vision encoder, which is in memory only while something is encoded.
        folder: of the files, made at the first one. An image takes its tokens x D x 2 bytes at 16 bit.
        adapter: the name of a loaded adapter whose part beside the encoder counts, "" for none.
    """

    def __init__(self, model: Model, folder: Path, adapter: str = NONE):
        self.model, self.folder, self._adapter = model, folder, adapter
        self._dtype = model.dtype
        beside = model.adapters[adapter].fingerprint if adapter else ""
        self._identity = f"{model.vision and model.vision.fingerprint()} {beside} {self._dtype} {model.config.hidden_size}"

    def fill(self, files: Iterable[RowFile], progress: Callable[[int, int], None] = lambda done, rows: None) -> int:
        """Encode now what no file holds yet; how many images and videos that was. The encoder is unloaded then.

        progress: called with the rows that are done, and all.
        """
        files, made, done = list(files), 0, 0
        total = sum(map(len, files))
        try:
            for file in files:
                for row in file.shown():
                    made += sum(self._made(placed.media) for placed in row.media)
                    done += 1
                    progress(done, total)
        finally:
            self._unload()
        return made

    def of(self, row: Row) -> mx.array | None:
        """(tokens, D) of all that a row shows, in the order of its placeholders, in the model's dtype; None: nothing."""
        if not row.media:
            return None
        try:
            found = [self._read(media) if (media := placed.media) else None for placed in row.media]
            return mx.concatenate(found)
        finally:
            self._unload()

    def path(self, media: Media) -> Path:
        """The file of an image or a video."""
        key = hashlib.sha256(f"{self._identity} {media.digest}".encode()).hexdigest()
        return self.folder / f"{key}.embedding"
