"""Ask a question, show a picture and offer tools in the three APIs of mlx_qwen35.serve: the fields, side by side."""

import base64
import json
from pathlib import Path
from typing import Any

PICTURE = base64.b64encode((Path(__file__).parent / "pictures/shapes.png").read_bytes()).decode()
TOOLS = json.loads((Path(__file__).parent / "tools.json").read_text())


class Chat:
    path = "/v1/chat/completions"

    @staticmethod
    def body(text: str, picture: bool = False, tools: bool = False, tokens: int = 40) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if picture:
            parts.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}})
        message = {"role": "user", "content": parts}
        return {"messages": [message], "max_tokens": tokens} | ({"tools": TOOLS} if tools else {})

    @staticmethod
    def text(answer: Any) -> str:
        return answer["choices"][0]["message"]["content"] or ""

    @staticmethod
    def said(event: Any) -> str:
        return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))

    @staticmethod
    def ends(event: Any) -> bool:
        return "error" in event or any(choice["finish_reason"] for choice in event.get("choices", ()))


class Messages:
    path = "/v1/messages"

    @staticmethod
    def body(text: str, picture: bool = False, tools: bool = False, tokens: int = 40) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if picture:
            source = {"type": "base64", "media_type": "image/png", "data": PICTURE}
            parts.insert(0, {"type": "image", "source": source})
        listed = [
            {"name": it["function"]["name"], "description": it["function"]["description"],
             "input_schema": it["function"]["parameters"]} for it in TOOLS
        ]  # fmt: skip
        body = {"model": "nano", "messages": [{"role": "user", "content": parts}], "max_tokens": tokens}
        return body | ({"tools": listed} if tools else {})

    @staticmethod
    def text(answer: Any) -> str:
        return "".join(block.get("text", "") for block in answer["content"] if block["type"] == "text")

    @staticmethod
    def said(event: Any) -> str:
        return event["delta"].get("text", "") if event["type"] == "content_block_delta" else ""

    @staticmethod
    def ends(event: Any) -> bool:
        return event["type"] in ("message_stop", "error")


class Responses:
    path = "/v1/responses"

    @staticmethod
    def body(text: str, picture: bool = False, tools: bool = False, tokens: int = 40) -> dict[str, Any]:
        parts = [{"type": "input_text", "text": text}]
        if picture:
            parts.insert(0, {"type": "input_image", "image_url": f"data:image/png;base64,{PICTURE}"})
        listed = [{"type": "function", **it["function"]} for it in TOOLS]
        body = {"model": "nano", "input": [{"role": "user", "content": parts}], "max_output_tokens": tokens}
        return body | {"store": False} | ({"tools": listed} if tools else {})

    @staticmethod
    def text(answer: Any) -> str:
        items = [part for item in answer["output"] if item["type"] == "message" for part in item["content"]]
        return "".join(part["text"] for part in items)

    @staticmethod
    def said(event: Any) -> str:
        return event["delta"] if event["type"] == "response.output_text.delta" else ""

    @staticmethod
    def ends(event: Any) -> bool:
        return event["type"] in ("response.completed", "response.incomplete", "response.failed", "error")


Api = type[Chat] | type[Messages] | type[Responses]
APIS: tuple[Api, ...] = (Chat, Messages, Responses)


def main() -> None:
    from serve import ask, served

    with served("--model", "nano") as server:
        for api in APIS:
            for body in (api.body("What is 34 + 58?"), api.body("What do you see?", picture=True)):
                answer = ask(server.url + api.path, **body, temperature=0)
                print(f"{api.path:22}{api.text(answer).strip()}")


if __name__ == "__main__":
    main()
