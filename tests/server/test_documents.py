"""PDFs in requests: each API's own part for a file, whose pages become texts and images."""

import base64
from typing import Any

import pytest
from pdfs import draws, filled, page, pdf
from serving import Running

from mlx_qwen35.media.pdf import Document
from mlx_qwen35.server import responses_request
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.server.fields import Fields
from mlx_qwen35.server.history import read_message
from mlx_qwen35.server.messages_request import conversation

DATA = base64.b64encode(pdf(page(filled("1 0 0")), page(filled("0 0 1")))).decode()
URI = f"data:application/pdf;base64,{DATA}"
LABELS = ["Page 1 of 2:", "Page 2 of 2:"]
pytestmark = draws


def told(parts: list[dict[str, Any]]) -> list[str]:
    return [part["text"] if part["type"] == "text" else part["type"] for part in parts]


def file(**fields: str) -> Fields:
    return Fields({"role": "user", "content": [{"type": "file", "file": fields}]})


@pytest.mark.parametrize("data", [URI, DATA], ids=["data URI", "base64"])
def test_a_file_of_a_chat_is_shown_page_by_page(nano_server: Running, data: str) -> None:
    message = read_message(file(file_data=data, filename="a.pdf"), nano_server.service)
    assert told(message["content"]) == [LABELS[0], "image", LABELS[1], "image"]


def test_the_engine_draws_no_page(nano_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    message = read_message(file(file_data=URI), nano_server.service)
    monkeypatch.delattr(Document, "drawn")
    assert [part["image"].pixels[0, 0, 0].tolist() for part in message["content"] if part["type"] == "image"] == [
        [255, 0, 0], [0, 0, 255],
    ]  # fmt: skip


def test_a_document_of_anthropic_s_api_is_shown_behind_its_title_also_in_a_result(nano_server: Running) -> None:
    source = {"type": "base64", "media_type": "application/pdf", "data": DATA}
    document = {"type": "document", "title": "T", "source": source}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [document]}
    body = Fields({"messages": [{"role": "user", "content": [document, result]}]})
    pages = ["T\n\n", LABELS[0], "image", LABELS[1], "image"]
    assert [told(message["content"]) for message in conversation(body, nano_server.service)] == [pages, pages]


def test_a_file_of_the_responses_api_is_shown_page_by_page(nano_server: Running) -> None:
    part = {"type": "input_file", "filename": "a.pdf", "file_data": URI}
    body = Fields({"input": [{"role": "user", "content": [part, {"type": "input_text", "text": "?"}]}]})
    (message,) = responses_request.conversation(body, nano_server.service)
    assert told(message["content"]) == [LABELS[0], "image", LABELS[1], "image", "?"]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"file_id": "f"}, "unsupported_field"),
        ({"file_data": "/etc/passwd"}, "media_not_opened"),
        ({"file_data": "http://127.0.0.1/a.pdf"}, "url_refused"),
        ({"file_data": "data:image/png;base64,aGk="}, "media_type_wrong"),
    ],
)
def test_what_is_no_pdf_in_the_request_is_refused_at_its_place(
    nano_server: Running, fields: dict[str, str], code: str
) -> None:
    with pytest.raises(ApiError) as caught:
        read_message(file(**fields), nano_server.service)
    assert (caught.value.code, str(caught.value.param)) == (code, f"content.0.file.{next(iter(fields))}")


@pytest.mark.parametrize(
    ("source", "field"),
    [
        ({"type": "base64", "media_type": "application/pdf"}, "data"),
        ({"type": "base64", "media_type": "application/pdf", "data": 3}, "data"),
        ({"type": "base64", "media_type": "text/html", "data": "aGk="}, "media_type"),
        ({"type": "text"}, "data"),
    ],
)
def test_a_result_s_malformed_document_is_refused_at_its_field(
    nano_server: Running, source: dict[str, Any], field: str
) -> None:
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "document", "source": source}]}
    with pytest.raises(ApiError) as caught:
        conversation(Fields({"messages": [{"role": "user", "content": [result]}]}), nano_server.service)
    assert (caught.value.status, caught.value.param) == (400, f"messages.0.content.0.content.0.source.{field}")
