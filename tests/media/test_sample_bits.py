"""Pictures of every number of bits: grey TIFFs whose zero is black or white, PNGs and what they mark as transparent;
PNGs with much text; what is stored in ways that are not read."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin
from refusing import refused

from mlx_qwen35.media.image import read_image

WIDTH, HEIGHT = 61, 3  # rows of 12 bits a sample end within a byte
DEFLATE = 8


def ramp(bits: int) -> np.ndarray:
    """From black to white, (HEIGHT, WIDTH)."""
    row = np.rint(np.linspace(0, 2**bits - 1, WIDTH)).astype(np.int64)
    return np.stack([row, row[::-1], row])


def grey(values: np.ndarray, bits: int) -> np.ndarray:
    return np.rint(values * 255 / (2**bits - 1)).astype(int)


def packed(values: np.ndarray, bits: int, order: str) -> bytes:
    """Samples as TIFF stores them: rows begin at a byte, whole bytes have an order."""
    if bits in (8, 16, 32):
        return values.astype(f"{order}u{bits // 8}").tobytes()
    places = np.arange(bits)[::-1]
    return np.packbits((values[..., None] >> places & 1).reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def tiff(values: np.ndarray, bits: int, order: str = "<", white: int = 1, form: int = 1, packing: int = 1) -> bytes:
    """A grey TIFF of one strip. white: PhotometricInterpretation, 0 where zero is white."""
    data = packed(values, bits, order)
    data = zlib.compress(data) if packing == DEFLATE else data
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: packing, 262: white, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags |= {339: form} if form != 1 else {}
    directory = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + directory + bytes(4)


@pytest.mark.parametrize("packing", [1, DEFLATE])
@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_a_grey_tiff_reaches_from_black_to_white(bits, order, white, packing):
    got = read_image(tiff(ramp(bits), bits, order, white, packing=packing))
    wanted = grey(ramp(bits), bits)
    assert np.array_equal(got[..., 0], wanted if white else 255 - wanted)


def test_32_bits_of_grey_are_scaled():
    got = read_image(tiff(ramp(32), 32))
    assert np.array_equal(got[..., 0], grey(ramp(32), 32))


def test_a_grey_tiff_given_as_a_pil_image_is_read_as_its_file():
    body = tiff(ramp(16), 16, white=0)
    assert np.array_equal(read_image(Image.open(BytesIO(body))), read_image(body))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_signed_samples_are_refused(bits):
    with refused("image_unsupported", "signed"):
        read_image(tiff(ramp(bits) // 4, bits, form=2))


@pytest.mark.parametrize(("bits", "order"), [(6, "<"), (10, "<"), (14, ">"), (24, "<"), (32, ">")])
def test_a_tiff_that_pillow_cannot_unpack_is_named(bits, order):
    values = ramp(bits) if bits != 24 else np.zeros((HEIGHT, WIDTH), int)
    with refused("image_unsupported", "TIFF", f"BitsPerSample {bits}"):
        read_image(tiff(values, bits, order))


def test_a_tiff_in_a_compression_that_pillow_does_not_know_is_named():
    with refused("image_unsupported", "Compression 34712"):
        read_image(tiff(ramp(8), 8, packing=34712))


def test_a_tiff_without_its_directory_is_damaged_and_not_unknown():
    with refused("media_not_opened", "TIFF"):
        read_image(tiff(ramp(10), 10)[:-110])


def test_what_pillow_knows_of_tiff_is_left_as_it_was():
    before = dict(TiffImagePlugin.OPEN_INFO)
    read_image(tiff(ramp(12), 12))
    assert before == TiffImagePlugin.OPEN_INFO


def test_a_jpeg_of_12_bits_is_named():
    file = BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    body = bytearray(file.getvalue())
    body[body.index(b"\xff\xc0") + 4] = 12
    with refused("image_unsupported", "JPEG of 12 bits"):
        read_image(bytes(body))


# --- PNG ---


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: list[bytes], bits: int, colour: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """colour: 0 grey, 2 RGB. before, after: chunks around the pixels."""
    width = len(rows[0]) * 8 // bits // (3 if colour == 2 else 1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + before + data + after + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_grey_value_that_a_png_marks_turns_white(bits):
    values = np.array([[0, 1] * 8])
    body = png([packed(values, bits, ">")], bits, 0, chunk(b"tRNS", struct.pack(">H", 0)))
    assert read_image(body)[0, :2, 0].tolist() == [255, grey(np.array(1), bits)]
    body = png([packed(values, bits, ">")], bits, 0, chunk(b"tRNS", struct.pack(">H", 1)))
    assert read_image(body)[0, :2, 0].tolist() == [0, 255]


def test_the_colour_that_a_png_of_16_bits_marks_turns_white():
    row = np.array([[1000, 2000, 3000], [40000, 2000, 3000]], ">u2").tobytes()
    body = png([row], 16, 2, chunk(b"tRNS", struct.pack(">HHH", 1000, 2000, 3000)))
    assert read_image(body).tolist() == [[[255, 255, 255], [156, 7, 11]]]


PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 12)
MUCH = b"a" * 3_000_000
NOTES = {
    "iTXt packed": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(MUCH)),
    "iTXt": chunk(b"iTXt", b"workflow\0\0\0\0\0" + MUCH),
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(MUCH)),
    "zTXt packed in an unknown way": chunk(b"zTXt", b"workflow\0\7abc"),
    "tEXt": chunk(b"tEXt", b"workflow\0" + MUCH),
    "iCCP": chunk(b"iCCP", b"profile\0\0" + zlib.compress(MUCH)),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("note", NOTES)
def test_notes_of_any_size_do_not_hide_the_pixels(note, place, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2_000_000)  # it is 64 MB
    body = png([row.tobytes() for row in PIXELS], 8, 2, **{place: NOTES[note]})
    assert np.array_equal(read_image(body), PIXELS.reshape(4, 4, 3))


def test_a_large_note_does_not_take_the_orientation_along():
    note = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf tiff:Orientation='3'/></x:xmpmeta>".replace(b"'", b'"')
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + note)
    body = png([row.tobytes() for row in PIXELS], 8, 2, NOTES["zTXt"] + xmp)
    assert np.array_equal(read_image(body), PIXELS.reshape(4, 4, 3)[::-1, ::-1])


def test_a_damaged_checksum_is_noticed_beside_a_large_note():
    body = bytearray(png([row.tobytes() for row in PIXELS], 8, 2, NOTES["zTXt"]))
    body[body.index(b"IDAT") + 6] ^= 1
    with refused("media_not_opened", "PNG"):
        read_image(bytes(body))
