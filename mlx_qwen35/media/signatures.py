"""What a file is, by its first bytes."""

import codecs
import re

HEAD = 512  # bytes that tell
IMAGES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")  # by Pillow's names
UNKNOWN = "of no known kind"

_SIGNATURES = tuple(
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"RIFF.{4}WEBP", "WEBP"),
        (rb"GIF8", "GIF"),
        (rb"BM.{4}\x00{4}", "BMP"),
        (rb"II[*+]\x00|MM\x00[*+]", "TIFF"),
        (rb".{4}ftypavif", "AVIF"),
        (rb".{4}ftyp(hei[cxms]|mif1)", "HEIF"),
        (rb".{4}ftyp(avis|hev[cxms]|msf1)", "an image sequence (AVIF or HEIF)"),
        (rb".{4}ftypM4A", "a sound file"),
        (rb".{4}ftypcrx", "a camera's raw file"),
        (rb".{4}(ftyp|moov|mdat|wide|free|skip)", "a video (MP4 or QuickTime)"),
        (rb"\x1aE\xdf\xa3", "a video (WebM or Matroska)"),
        (rb"RIFF.{4}AVI ", "a video (AVI)"),
        (rb"FLV", "a video (FLV)"),
        (rb"\x00\x00\x01\xba", "a video (MPEG)"),
        (rb"OggS", "a video or a sound file (Ogg)"),
        (rb".{8}WAVE|ID3", "a sound file"),
        (rb"%PDF", "a PDF document"),
        (rb"PK\x03\x04", "a zip archive, or a document packed as one"),
        (rb"\x1f\x8b", "compressed with gzip"),
        (rb"\xff\x0a|.{4}JXL ", "a JPEG XL image"),
        (rb".{4}jP  ", "a JPEG 2000 image"),
        (rb"8BPS", "a Photoshop file"),
        (rb"\x00\x00\x01\x00", "an icon"),
    )
)
_TEXTS = (
    (r".*<svg", "an SVG drawing"),
    (r"<!doctype html|<html", "a web page"),
    (r"version https://git-lfs", "a Git LFS pointer"),
    (r"", "text"),
)


def identify(head: bytes) -> str:
    """The kind of a file that begins with these HEAD bytes: one of IMAGES, or words such as "a video (AVI)"."""
    kind = next((kind for pattern, kind in _SIGNATURES if pattern.match(head)), None)
    return kind or _identify_text(head)


def _identify_text(head: bytes) -> str:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # a letter may be cut off at the end
    except UnicodeDecodeError:
        return UNKNOWN
    if not text or any(character < " " and not character.isspace() for character in text):
        return UNKNOWN if text else "empty"
    text = text.strip().lower()
    return next(kind for pattern, kind in _TEXTS if re.match(pattern, text, re.DOTALL))
