"""What a request is refused with. Endpoints raise ApiError; every API writes it in its own shape."""

from dataclasses import dataclass, field
from typing import Any

from mlx_qwen35.errors import InputError

# InputError.code -> HTTP status; every other code is 400.
STATUS = {"logits_not_finite": 500, "fetch_failed": 400, "package_missing": 501, "disk_full": 507}


RETRY = {"Retry-After": "5"}  # seconds


@dataclass
class ApiError(Exception):
    """A refusal: HTTP status, stable code, message, and the field it is about ("messages.0.content.1.image_url")."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: Exception, param: str | None = None) -> "ApiError":
        """Any exception as a refusal. What is no fault of the request is 500, without its text."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, InputError):
            return cls(STATUS.get(error.code, 400), error.code, str(error), param)
        return cls(500, "internal_error", "the server failed; its log tells more")

    @property
    def type(self) -> str:
        """OpenAI's and Anthropic's class of the error."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
                 429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")

    def openai(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic(self, request_id: str = "") -> dict[str, Any]:
        """Anthropic's shape has no place for the field, so the message names it."""
        named = f"{self.param}: " if self.param and self.param not in self.message else ""
        told = {"type": self.type, "message": named + self.message, "details": {"error_code": self.code}}
        return {"type": "error", "error": told, "request_id": request_id}


def closing() -> ApiError:
    """What a request is told that the server's end meets, wherever it is."""
    return ApiError(503, "closing", "the server ends; ask again once it is back", headers=RETRY)
