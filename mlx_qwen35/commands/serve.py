"""The command mlx_qwen35.serve: a model behind OpenAI's and Anthropic's APIs."""

import argparse
import sys
from pathlib import Path

from mlx_qwen35.commands.options import add_model_options, add_options, given_options
from mlx_qwen35.commands.parser import Parser
from mlx_qwen35.commands.run import as_command, load_model, require_model
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import options_of
from mlx_qwen35.server.options import ServerOptions

COMMAND = "mlx_qwen35.serve"


def parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s --model MODEL [options]",
        description="Serve a model: OpenAI's and Anthropic's APIs, and a page to talk to, on http://127.0.0.1:8080.",
    )
    add_model_options(parser)
    add_options(parser.add_argument_group("server"), options_of(ServerOptions).values())
    return parser


def run(args: argparse.Namespace) -> int:
    name = require_model(args)
    options = ServerOptions(**given_options(args, [ServerOptions]))
    try:
        import uvicorn

        from mlx_qwen35.server.app import make_app
        from mlx_qwen35.server.service import Service
    except ImportError as error:
        raise InputError(
            "package_missing", f"serving needs starlette and uvicorn: {error}. Install mlx-qwen35[server]"
        ) from error
    model, processor = load_model(args)
    service = Service(model, processor, options, Path(str(name)).name)
    service.start()
    try:
        uvicorn.run(make_app(service), host=options.host, port=options.port, log_level="info", access_log=False)
    finally:
        service.close()
    return 0


def main() -> None:
    with as_command(COMMAND):
        sys.exit(run(parser().parse()))


if __name__ == "__main__":
    main()
