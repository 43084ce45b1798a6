"""The options of the server, each declared once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.load import LoadOptions
from mlx_qwen35.options import check_fields, option, options_of, spell_as_flags

MOST_ROWS = 64


@dataclass(frozen=True)
class ServerOptions:
    """How a model is served."""

    host: str = option(
        "127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone); any other one needs a key",
        metavar="ADDRESS",
    )  # fmt: skip
    port: int = option(
        8080, help="port to listen on; 0 takes a free one (default: 8080)", least=0, most=65535, metavar="N"
    )
    api_key_file: Path | None = option(
        help="a file with the key that every request must bring; MLX_QWEN35_API_KEY in the environment does the same",
        metavar="FILE",
    )
    rows: int | None = option(
        help="answers that are generated at the same time (default: 2 with 8 GB of memory, 4 with 16, 8 with more)",
        least=1, most=MOST_ROWS, metavar="N",
    )  # fmt: skip
    context: int | None = option(
        help="most tokens of a prompt and its answer together (default: as many as model and memory allow)", least=1,
        metavar="N",
    )  # fmt: skip
    fetch_media: bool = option(
        False, help="load images and videos from http(s) URLs of public addresses; otherwise only data: URIs are taken"
    )
    allowed_host: Sequence[str] | None = option(
        help="a name or an address of this server for its clients, beside the one it listens on; may be repeated",
        each=True, metavar="NAME",
    )  # fmt: skip
    log_text: bool = option(False, help="write prompts and answers into the log too")
    session_dir: Path | None = option(
        help="a folder that keeps what was read of prompts, so that a restarted server need not read it again",
        metavar="FOLDER",
    )
    strict_model: bool = option(
        False, help="refuse requests that name another model; otherwise any name is answered by this model"
    )
    timeout: float | None = option(
        help="most seconds of a request, waiting and reading included (default: none)", least=0, above=True, most=1e9,
        metavar="SECONDS",
    )  # fmt: skip
    idle_unload: float | None = option(
        help="give the model's memory back after so many minutes without a request; the next one loads it again",
        least=0, above=True, most=1e9, metavar="MIN",
    )  # fmt: skip
    grammar: bool = option(False, help="make structured output ready at the start, not at the first request for it")

    def __post_init__(self) -> None:
        check_fields(self)


def spell_model_options() -> None:
    """In this thread messages name options of the model as they were given to the server, and all others as fields."""
    spell_as_flags(options_of(LoadOptions))
