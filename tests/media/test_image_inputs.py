"""Pictures of every format, mode and way in -> upright RGB pixels; and what is refused, each with its message."""

import base64
import os
import socket
import struct
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import refusing
from PIL import Image, ImageFile, ImageOps

from mlx_qwen35.errors import InputError
from mlx_qwen35.media import fetch, image
from mlx_qwen35.media.image import read_image

ORIENTATION = 0x0112
EXACT = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}}  # formats that keep every pixel
CLOSE = {"JPEG": {"quality": 95}, "AVIF": {"quality": 95}}


def picture(width: int = 61, height: int = 37) -> Image.Image:
    """A smooth RGB picture, different at each corner and in each channel."""
    y, x = np.mgrid[:height, :width]
    channels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 64], axis=-1)
    return Image.fromarray(channels.astype(np.uint8))


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def saved(picture: Image.Image, form: str, **options) -> bytes:
    file = BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def heic(picture: Image.Image, **options) -> bytes:
    file = BytesIO()
    pillow_heif.from_pillow(picture).save(file, quality=95, **options)
    return file.getvalue()


def close(pixels: np.ndarray, wanted: Image.Image) -> bool:
    """Whether the picture came through a lossy format: the mean difference is small, as no wrong turn's would be."""
    wanted = np.array(wanted)
    return pixels.shape == wanted.shape and np.abs(pixels.astype(int) - wanted).mean() < 8


def refused(source, code: str, *facts: object) -> None:
    with refusing.refused(code, *facts) as caught:
        read_image(source, allow_private_urls=True)
    assert len(str(caught.value)) < 1000


# --- formats ---


@pytest.mark.parametrize("form", EXACT)
def test_a_lossless_file_gives_its_pixels(form, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(saved(picture(), form, **EXACT[form]))
    pixels = read_image(path)
    assert pixels.dtype == np.uint8 and pixels.shape == (37, 61, 3) and pixels.flags.c_contiguous
    assert np.array_equal(pixels, np.array(picture()))


@pytest.mark.parametrize("form", CLOSE)
def test_a_lossy_file_gives_its_pixels_nearly(form):
    assert close(read_image(saved(picture(), form, **CLOSE[form])), picture())


def test_heic_is_read():
    assert close(read_image(heic(picture())), picture())


def test_heic_of_the_general_brand_is_read():
    body = heic(picture())
    assert body[8:12] == b"heic"
    assert close(read_image(body[:8] + b"mif1" + body[12:]), picture())


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_compressed_tiff_is_read(compression):
    assert np.array_equal(read_image(saved(picture(), "TIFF", compression=compression)), np.array(picture()))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_several_is_taken(form):
    red, blue = (Image.new("RGB", (20, 10), colour) for colour in ("#ff0000", "#0000ff"))
    frames = saved(red, form, save_all=True, append_images=[blue])
    assert np.abs(read_image(frames).astype(int) - (255, 0, 0)).max() <= 3


def test_the_first_picture_of_an_mpo_is_taken():
    body = saved(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (61, 37))])
    assert close(read_image(body), picture())


# --- modes: equal to transformers ---


def with_info(image: Image.Image, **info) -> Image.Image:
    image.info.update(info)
    return image


def palette() -> Image.Image:
    return Image.fromarray(noise(9, 14, 3)).quantize(16)


def modes() -> dict[str, Image.Image]:
    rgb, grey, rgba = Image.fromarray(noise(9, 14, 3)), Image.fromarray(noise(9, 14)), Image.fromarray(noise(9, 14, 4))
    return {
        "1": grey.convert("1"),
        "L": grey,
        "LA": rgba.convert("LA"),
        "P": palette(),
        "P with one transparent colour": with_info(palette(), transparency=3),
        "P with alphas": with_info(palette(), transparency=bytes(range(0, 256, 16))),
        "PA": palette().convert("PA"),
        "L with a transparent value": with_info(grey.copy(), transparency=int(np.array(grey)[2, 3])),
        "1 with a transparent value": with_info(grey.convert("1"), transparency=255),
        "RGB": rgb,
        "RGB with a transparent colour": with_info(rgb.copy(), transparency=rgb.getpixel((2, 3))),
        "RGBA": rgba,
        "RGBa": rgba.convert("RGBa"),
        "RGBX": rgb.convert("RGBX"),
        "CMYK": rgb.convert("CMYK"),
        "YCbCr": rgb.convert("YCbCr"),
        "HSV": rgb.convert("HSV"),
        "LAB": Image.frombytes("LAB", (14, 9), noise(9, 14, 3).tobytes()),
    }


@pytest.mark.parametrize("mode", modes())
def test_every_8_bit_mode_equals_transformers(mode):
    reference = pytest.importorskip("transformers.image_transforms").convert_to_rgb
    source = modes()[mode]
    assert np.array_equal(read_image(source), reference(source.copy(), return_numpy=True))


FILES = {
    "palette PNG": ("P", "PNG"),
    "palette PNG with a transparent colour": ("P with one transparent colour", "PNG"),
    "palette PNG with alphas": ("P with alphas", "PNG"),
    "GIF with a transparent colour": ("P with one transparent colour", "GIF"),
    "grey PNG": ("L", "PNG"),
    "grey PNG with a transparent value": ("L with a transparent value", "PNG"),
    "PNG with a transparent colour": ("RGB with a transparent colour", "PNG"),
    "grey and alpha PNG": ("LA", "PNG"),
    "1-bit PNG": ("1", "PNG"),
    "1-bit TIFF": ("1", "TIFF"),
    "1-bit BMP": ("1", "BMP"),
    "palette BMP": ("P", "BMP"),
    "alpha BMP": ("RGBA", "BMP"),
    "alpha PNG": ("RGBA", "PNG"),
    "alpha TIFF": ("RGBA", "TIFF"),
    "alpha WebP": ("RGBA", "WEBP"),
    "alpha AVIF": ("RGBA", "AVIF"),
    "CMYK JPEG": ("CMYK", "JPEG"),
    "CMYK TIFF": ("CMYK", "TIFF"),
    "grey JPEG": ("L", "JPEG"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_mode_equal_transformers(name):
    reference = pytest.importorskip("transformers.image_transforms").convert_to_rgb
    mode, form = FILES[name]
    source, options = modes()[mode], {"lossless": True} if form == "WEBP" else {}
    if "transparency" in source.info:
        options["transparency"] = source.info["transparency"]
    body = saved(source, form, **options)
    assert np.array_equal(read_image(body), reference(Image.open(BytesIO(body)), return_numpy=True))


def test_alpha_of_heic_is_put_on_white():
    clear = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    assert (read_image(heic(clear)) >= 253).all()


def test_transparency_is_put_on_white():
    half = Image.new("RGBA", (1, 1), (0, 100, 255, 128))
    assert read_image(half).tolist() == [[[127, 177, 255]]]


# --- 16 bits ---


def gradient() -> np.ndarray:
    """Every 16-bit value once, (256, 256) uint16."""
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


def scaled(values: np.ndarray) -> np.ndarray:
    return np.round(values / 257).astype(np.uint8)[..., None].repeat(3, axis=-1)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_of_grey_are_scaled_and_not_clipped(form):
    assert np.array_equal(read_image(saved(Image.fromarray(gradient()), form)), scaled(gradient()))


def test_16_bits_of_grey_in_the_other_byte_order_are_scaled():
    big = Image.frombytes("I;16B", (256, 256), gradient().astype(">u2").tobytes())
    assert np.array_equal(read_image(big), scaled(gradient()))
    assert np.array_equal(read_image(saved(big, "TIFF")), scaled(gradient()))


def test_16_bits_in_32_are_scaled():
    assert np.array_equal(read_image(Image.fromarray(gradient().astype(np.int32))), scaled(gradient()))


def test_the_transparent_value_of_a_16_bit_png_turns_white():
    pixels = read_image(saved(Image.fromarray(gradient()), "PNG", transparency=300))
    assert (pixels[1, 44] == 255).all() and (pixels[1, 45] == 1).all()


def test_16_bits_of_colour_keep_their_scale():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in np.repeat(gradient()[..., None], 3, axis=-1).astype(">u2"))
    header = struct.pack(">IIBBBBB", 256, 256, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    # Pillow hands such files over as 8 bits, with the upper byte of each value: at most one step from the rounded one
    assert np.abs(read_image(png).astype(int) - scaled(gradient())).max() <= 1


@pytest.mark.parametrize("values", [[0, 65536], [-1, 5]])
def test_more_than_16_bits_are_refused(values):
    wide = Image.fromarray(np.array([values], dtype=np.int32))
    refused(wide, "image_unsupported", "16", values[0], values[1])


def test_floating_point_pictures_are_refused():
    body = saved(Image.fromarray(np.zeros((3, 4), np.float32)), "TIFF")
    refused(body, "image_unsupported", "8", "16")


# --- orientation ---

TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p),
}


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_the_picture_stands_upright(form, orientation):
    body = saved(picture(), form, exif=exif(orientation), **EXACT[form])
    assert np.array_equal(read_image(body), TURNS[orientation](np.array(picture())))


@pytest.mark.parametrize("form", CLOSE)
@pytest.mark.parametrize("orientation", TURNS)
def test_a_photo_stands_upright(form, orientation):
    body = saved(picture(), form, exif=exif(orientation), **CLOSE[form])
    assert close(read_image(body), TURNS[orientation](np.array(picture())))


@pytest.mark.parametrize("orientation", TURNS)
def test_heic_is_turned_once(orientation):
    body = heic(picture(), exif=exif(orientation).tobytes())
    assert close(read_image(body), TURNS[orientation](np.array(picture())))


@pytest.mark.parametrize("orientation", TURNS)
def test_heic_given_as_a_pil_image_is_turned_once(orientation):
    body = heic(picture(), exif=exif(orientation).tobytes())
    read_image(body)  # registers the format
    assert np.array_equal(read_image(Image.open(BytesIO(body))), read_image(body))


def test_a_pil_image_is_turned_as_its_file_is():
    body = saved(picture(), "PNG", exif=exif(6))
    opened = Image.open(BytesIO(body))
    assert np.array_equal(read_image(opened), read_image(body))
    assert opened.size == (61, 37)  # the caller's image is left as it is
    assert np.array_equal(read_image(ImageOps.exif_transpose(opened)), read_image(body))


def test_the_orientation_of_xmp_counts_where_exif_has_none():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="3"/></x:xmpmeta>'
    assert close(read_image(saved(picture(), "JPEG", xmp=xmp)), TURNS[3](np.array(picture())))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("bad", [b"Exif\0\0nothing", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
def test_damaged_exif_does_not_hide_the_picture(form, bad):
    assert close(read_image(saved(picture(), form, exif=bad)), picture())


def test_an_unknown_orientation_turns_nothing():
    assert np.array_equal(read_image(saved(picture(), "PNG", exif=exif(9))), np.array(picture()))


def test_16_bits_and_palettes_are_turned_too():
    deep, few = Image.fromarray(gradient()), picture().quantize(8)
    assert np.array_equal(read_image(saved(deep, "PNG", exif=exif(6))), np.rot90(scaled(gradient()), -1))
    assert np.array_equal(read_image(saved(few, "PNG", exif=exif(8))), np.rot90(read_image(few)))


# --- arrays ---


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_a_grey_array_is_repeated(shape):
    grey = noise(*shape)
    assert np.array_equal(read_image(grey), grey.reshape(5, 7, 1).repeat(3, axis=-1))


def test_an_rgb_array_is_copied():
    source = noise(5, 7, 3)
    pixels = read_image(source)
    assert np.array_equal(pixels, source) and not np.shares_memory(pixels, source)


def test_a_strided_array_becomes_contiguous():
    source = noise(10, 14, 6)[::2, ::-1, ::2]
    pixels = read_image(source)
    assert pixels.flags.c_contiguous and np.array_equal(pixels, source)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_a_16_bit_array_is_scaled(channels, order):
    source = noise(20, 30, channels, dtype=np.uint16)
    eight = np.round(source / 257).astype(np.uint8)
    assert np.array_equal(read_image(source.astype(order)), read_image(eight))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_floating_array_is_scaled_and_rounded(dtype):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(read_image((eight / 255).astype(dtype)), read_image(eight))
    assert read_image(np.full((1, 1), 0.499, dtype)).tolist() == [[[127, 127, 127]]]


@pytest.mark.parametrize("value", [1.01, -0.01, 255.0, np.nan, np.inf, -np.inf])
def test_a_floating_array_outside_0_to_1_is_refused(value):
    source = np.zeros((3, 4, 3), np.float32)
    source[1, 2, 0] = value
    refused(source, "array_invalid", "0", "1", "3", "4", "float32")


@pytest.mark.parametrize("shape", [(3, 20, 30), (1, 20, 30), (20,), (20, 30, 2), (1, 20, 30, 3), (20, 30, 0), ()])
def test_an_array_of_another_shape_is_refused(shape):
    refused(np.zeros(shape, np.uint8), "array_invalid", shape)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint32, bool, complex, object, "U1"])
def test_an_array_of_another_type_is_refused(dtype):
    refused(np.zeros((4, 5, 3), dtype), "array_invalid", "uint8", "uint16")


# --- the same pixels, whichever way ---


@pytest.fixture
def folder_url(tmp_path, monkeypatch):
    """The URL of a local server that serves tmp_path."""
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_the_same_pixels_give_the_same_bytes_whichever_way_they_come(mode, tmp_path, folder_url, monkeypatch):
    source = modes()[mode]
    body = saved(source, "PNG")
    (tmp_path / "a.png").write_bytes(body)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        "~/a.png",
        Path("~/a.png"),
        f"{folder_url}/a.png",
        "data:image/png;base64," + base64.b64encode(body).decode(),
        body,
        bytearray(body),
        memoryview(body),
        source,
        Image.open(BytesIO(body)),
        np.array(source),
    ]
    results = [read_image(way, allow_private_urls=True) for way in ways]
    assert len({(pixels.shape, pixels.tobytes()) for pixels in results}) == 1
    assert all(pixels.flags.c_contiguous and pixels.dtype == np.uint8 for pixels in results)


# --- refused: not there, not a picture ---


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "none.png", "media_not_found", "none.png")


def test_a_folder_is_refused(tmp_path):
    refused(str(tmp_path), "media_source_invalid", tmp_path)


@pytest.mark.parametrize("path", ["a\0b.png", "a" * 100_000])
def test_a_path_that_cannot_be_is_refused(path):
    refused(path, "media_not_found")


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "media_not_found")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(saved(picture(), "PNG"))

    plain = open

    def deny(file, *given, **options):
        if str(file).endswith("a.png"):
            raise PermissionError(13, "Permission denied")
        return plain(file, *given, **options)

    monkeypatch.setattr("builtins.open", deny)
    refused(tmp_path / "a.png", "media_unreadable", "a.png")


@pytest.mark.parametrize("source", [None, 3, ["a.png"], {"url": "a"}, object()])
def test_another_kind_of_source_is_refused(source):
    refused(source, "media_source_invalid", type(source).__name__)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "media_empty", "empty.png")


def test_empty_bytes_and_data_are_refused():
    refused(b"", "media_empty", "0")
    refused("data:image/png;base64,", "media_empty")


NOT_PICTURES = {
    "a video (MP4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(40),
    "a video (WebM": b"\x1aE\xdf\xa3\x01\0\0\0" + bytes(40),
    "a video (AVI": b"RIFF\xff\0\0\0AVI LIST" + bytes(40),
    "a video (FLV": b"FLV\1\5\0\0\0\x09" + bytes(40),
    "an image sequence": b"\0\0\0\x18ftypmsf1\0\0\0\0msf1hevc" + bytes(40),
    "text": b"Nothing to see here.\n" * 3,
    "a web page": b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html></html>",
    "an SVG drawing": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a PDF document": b"%PDF-1.7\n%\xe2\xe3",
    "a Photoshop file": b"8BPS\0\1" + bytes(40),
    "a JPEG XL image": b"\xff\x0a" + bytes(40),
    "of no known kind": bytes(range(1, 60)),
    "of no known kind.": b"\xc3\x28 broken UTF-8",
}


@pytest.mark.parametrize("what", NOT_PICTURES)
def test_what_is_not_a_picture_is_named(what, tmp_path):
    (tmp_path / "file").write_bytes(NOT_PICTURES[what])
    hints = {"video": "Give it as a video", "PDF": "Give it as a PDF"}
    hint = next((hint for kind, hint in hints.items() if kind in what), "save it as PNG or JPEG")
    refused(tmp_path / "file", "media_not_opened", str(tmp_path / "file"), what, hint)


def test_formats_that_run_other_programs_are_not_opened():
    refused(saved(picture(), "EPS"), "media_not_opened")


def test_text_that_is_cut_within_a_letter_is_text():
    refused(b"x" + "ü".encode() * 400, "media_not_opened")


# --- refused: cut short, damaged, too large ---


@pytest.fixture(params=[False, True], ids=["strict", "LOAD_TRUNCATED_IMAGES"])
def lenient(request, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)
    return request.param


WHOLE = {
    **{form: partial(saved, form=form, **options) for form, options in {**EXACT, **CLOSE}.items()},
    "GIF": partial(saved, form="GIF"),
    "compressed TIFF": partial(saved, form="TIFF", compression="tiff_lzw"),
    "progressive JPEG": partial(saved, form="JPEG", progressive=True),
    "HEIC": heic,
}


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_file_cut_short_is_refused(form, part, lenient, tmp_path):
    body = WHOLE[form](picture(150, 130))
    (tmp_path / "cut").write_bytes(body[: int(len(body) * part)])
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / "cut")
    assert caught.value.code in ("media_damaged", "media_not_opened") and str(tmp_path / "cut") in str(caught.value)
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES  # as it was


@pytest.mark.parametrize("form", WHOLE)
def test_a_file_cut_anywhere_is_refused_or_whole(form, lenient):
    body = WHOLE[form](picture(70, 50))
    whole = read_image(body)
    for length in {*range(16, len(body), 97), *range(len(body) - 16, len(body))}:
        try:
            pixels = read_image(body[:length])
        except InputError:
            continue
        assert np.array_equal(pixels, whole), f"{form} of {length} bytes of {len(body)}"


def test_a_pil_image_of_a_file_cut_short_is_refused_each_time(lenient):
    body = saved(picture(150, 130), "JPEG")
    opened = Image.open(BytesIO(body[: len(body) // 2]))
    for _ in range(2):
        refused(opened, "media_damaged", "150", "130")


def test_a_closed_pil_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(picture(), "PNG"))
    with Image.open(tmp_path / "a.png") as opened:
        pass
    refused(opened, "media_damaged")


def test_a_damaged_png_is_refused():
    body = bytearray(saved(picture(150, 130), "PNG"))
    body[len(body) // 2] ^= 0xFF
    refused(bytes(body), "media_not_opened")


def bomb(width: int, height: int) -> bytes:
    """A BMP that says its size and holds no pixels."""
    size = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + size


def test_a_decompression_bomb_is_refused_from_its_header(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *args: pytest.fail("it was decoded"))
    refused(bomb(20_000, 10_000), "media_too_large", "178,956,970", "54", "200000000")


def test_a_bomb_is_refused_where_pillow_has_no_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    refused(bomb(20_000, 10_000), "media_too_large", "178,956,970", "20000", "10000")


def test_the_limit_is_pillows_own():
    assert image.MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_between_pillows_limits_there_is_no_warning(monkeypatch):
    body = saved(picture(), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 61 * 37 - 1)  # warnings are errors in these tests
    assert np.array_equal(read_image(body), np.array(picture()))


def test_arrays_and_pil_images_have_the_same_limit():
    refused(np.broadcast_to(np.uint8(0), (20_000, 10_000)), "media_too_large", "178,956,970", "10000", "20000")
    lazy = Image.new("L", (1, 1))
    lazy._size = (20_000, 10_000)
    refused(lazy, "media_too_large", "178,956,970")


@pytest.mark.parametrize("source", [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0)), Image.new("RGB", (0, 5))])
def test_a_picture_without_pixels_is_refused(source):
    refused(source, "media_empty")


def test_colours_that_do_not_turn_into_rgb_are_refused():
    refused(modes()["LA"].convert("La"), "image_unsupported")


# --- URLs, and what is left of it all ---


def test_a_url_that_leads_to_a_video_is_refused(folder_url, tmp_path):
    (tmp_path / "a.mp4").write_bytes(NOT_PICTURES["a video (MP4"])
    refused(f"{folder_url}/a.mp4", "media_type_wrong", folder_url, "/a.mp4")


def test_an_unreachable_url_is_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.png"
    refused(url, "fetch_failed")


def test_a_long_data_uri_is_named_shortly():
    refused("data:image/png;base64," + "QUFB" * 100_000, "media_not_opened", "400,022")


def test_reading_leaves_pillows_settings_alone(monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", {"image": 10**6, "video": 10**6})
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    read_image(heic(picture()))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert Image.ID.count("HEIF") == 1
