"""Messages of OpenAI's form -> those of the library, with their images and videos read. For `off_loop`."""

from typing import Any

from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.media.preprocess import Media
from mlx_qwen35.server.fields import Fields
from mlx_qwen35.server.media import read_media, read_pages
from mlx_qwen35.server.service import Service

ROLES = ("system", "developer", "user", "assistant", "tool")
PARTS = ("text", "image_url", "video_url", "file")
REASONING = ("reasoning_content", "reasoning", "thinking")  # clients' names for it
DETAILS = ("auto", "low", "high", "original")  # of an image; the others are what memory allows
LOW = 512 * 512  # most pixels of an image whose detail is "low"
_OPTIONS = {
    "image": {"min_pixels": "min_pixels", "max_pixels": "max_pixels"},
    "video": {"fps": "fps", "num_frames": "video_num_frames"},
}
Message = dict[str, Any]


def read_message(given: Fields, service: Service) -> Message:
    role = given.choice("role", ROLES)
    message: Message = {"role": role, "content": _content(given, role, service)}
    if role == "assistant":
        message |= _turn(given)
    if role == "tool" and (call := given.text("tool_call_id", None)):
        message["tool_call_id"] = call
    given.ignore("name", "annotations", "refusal")
    given.done()
    return message


def _turn(given: Fields) -> Message:
    """What an assistant's message has beside its content."""
    given.refuse("function_call", "it is outdated. Use tool_calls")
    given.refuse("audio", "this model does not speak")
    found: Message = {}
    if reasoning := [text for name in REASONING if (text := given.text(name, None))]:
        found["reasoning_content"] = reasoning[0]
    if calls := [_call(call) for call in given.objects("tool_calls", [])]:
        found["tool_calls"] = calls
    return found


def _call(given: Fields) -> Message:
    given.choice("type", ("function",), "function")
    function = given.object("function")
    name, arguments = function.text("name"), function.any("arguments", "")
    if not isinstance(arguments, str | dict):
        raise function.error("arguments", "must be JSON text, or an object", arguments)
    call = given.text("id", None)
    given.ignore("index")
    given.done()
    function.done()
    return {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}


def _content(given: Fields, role: str, service: Service) -> Any:
    content = given.any("content", None)
    if content is None and role == "assistant":
        return given.text("refusal", None) or ""
    if content is None or isinstance(content, str):
        return given.text("content")
    if not isinstance(content, list):
        raise given.error("content", "must be text or a list of parts", content)
    return [read for part in given.objects("content") for read in _part(part, service)]


def _part(given: Fields, service: Service) -> list[Message]:
    kind = given.text("type")
    if kind == "refusal":
        return [{"type": "text", "text": given.text("refusal")}]
    if kind not in PARTS:
        heard = kind in ("input_audio", "audio_url")
        rule = "is not supported: this model does not hear" if heard else f"must be one of {', '.join(PARTS)}"
        raise given.error("type", rule, kind, "unsupported_part")
    if kind == "text":
        parts = [{"type": "text", "text": given.text("text")}]
        given.ignore("cache_control")
    elif kind == "file":
        file = given.object("file")
        parts = read_file(file, service)
        file.done()
    else:
        parts = [_medium(given, kind, service)]
    given.done()
    return parts


def read_file(file: Fields, service: Service) -> list[Message]:
    """The pages of a PDF in `file_data`."""
    file.refuse("file_id", "this server stores no files. Send a data: URI as file_data")
    data = file.text("file_data")
    file.ignore("filename")
    return read_pages(service.processor, data, file.place("file_data"), service.options)


def _medium(given: Fields, field: str, service: Service) -> Message:
    """image_url or video_url: an object with the url, or the url."""
    kind, url, detail = field.removesuffix("_url"), given.any(field), "auto"
    vision: dict[str, Any] = {}
    for name, own in _OPTIONS[kind].items():
        if name.endswith("_pixels") and service.processor.sees:  # one image of more would keep all others waiting
            given.whole(name, None, least=1, most=service.processor.most_pixels)
        vision |= given.option(name, VisionOptions, own)
    if isinstance(url, dict):
        source = given.object(field)
        url = source.text("url")
        detail = source.choice("detail", DETAILS, "auto") if kind == "image" else "auto"
        source.done()
    return {"type": kind, kind: read_detail(service, kind, url, given.place(field), detail, **vision)}


def read_detail(service: Service, kind: str, url: Any, place: str, detail: str, **vision: Any) -> Media:
    """What `read_media` reads; where the detail is "low", an image of few pixels."""
    if detail == "low" and service.processor.sees:
        vision["max_pixels"] = min(LOW, vision.get("max_pixels") or service.processor.most_pixels)
    return read_media(service.processor, kind, url, place, service.options, **vision)
