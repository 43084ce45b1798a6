"""The command mlx_qwen35.serve: a model behind OpenAI's and Anthropic's APIs."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_qwen35.commands.obtain import add_recipe_option, settle
from mlx_qwen35.commands.output import spread_json
from mlx_qwen35.commands.session import NO_SESSION
from mlx_qwen35.console.json_output import add_json, check_json, write_json
from mlx_qwen35.console.notices import tell
from mlx_qwen35.console.options import add_model_options, add_options, add_rank_options, given_options
from mlx_qwen35.console.parser import Parser
from mlx_qwen35.console.progress import Step
from mlx_qwen35.console.run import as_command, load_model, refuse_with_ranks, require_model
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import options_of, spelled
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.values import whole

if TYPE_CHECKING:
    from mlx_qwen35.server.service import Service

COMMAND = "mlx_qwen35.serve"


def parser() -> Parser:
    parser = Parser(
        prog=COMMAND,
        usage="%(prog)s --model MODEL [options]",
        description="Serve a model: OpenAI's and Anthropic's APIs, and a page to talk to, on http://127.0.0.1:8080.",
        examples=("--model nano", "--model Qwen/Qwen3.5-4B --recipe 4bit --port 9000", "--model nano --port 0 --json"),
    )
    add_model_options(parser, adapters="each is served as MODEL:NAME beside MODEL, which has none")
    add_json(parser, "address, model and limits of a server that is ready")
    add_recipe_option(parser)
    add_rank_options(parser)
    add_options(parser.add_argument_group("server"), options_of(ServerOptions).values())
    return parser


def run(args: argparse.Namespace) -> int:
    require_model(args)
    options = ServerOptions(**given_options(args, [ServerOptions]))
    if args.quiet and options.log_text:
        raise InputError("option_conflict", "--log-text and --quiet must not be given together. Leave one out")
    refuse_with_ranks(args, "session_dir", NO_SESSION)
    refuse_with_ranks(args, "idle_unload", "the other machines' memory would not be given back")
    check_json(args.json)
    try:
        from mlx_qwen35.server.app import make_app
        from mlx_qwen35.server.guard import read_key
        from mlx_qwen35.server.listen import bind, serve
        from mlx_qwen35.server.log import LOG, to_stderr
    except ImportError as error:
        raise InputError(
            "package_missing", f"serving needs starlette and uvicorn: {error}. Install mlx-qwen35[server]"
        ) from error
    folder = settle(args, COMMAND)
    app = make_app(options)
    sockets = bind(options.host, options.port)
    url = _url(options.host, sockets[0].getsockname()[1])
    to_stderr(options.log_text)
    if args.quiet:
        LOG.setLevel(logging.ERROR)

    def ready() -> None:
        service: Service = app.state.service
        write_json(args.json, found_of(service, url), in_a_line=True)
        told = f"{service.default} is served on {url}/v1, with a page on {url}/"
        tell(told, terms(service, is_open=not read_key(options)))

    serve(app, sockets, lambda: load_service(args, options, folder), ready)
    return 0


def load_service(args: argparse.Namespace, options: ServerOptions, folder: Path | None) -> "Service":
    """The model that the options name, or its conversion in a folder, ready to be asked."""
    from mlx_qwen35.server.service import Service

    model, processor = load_model(args, folder)
    if options.context is not None:
        whole(spelled("context"), options.context, 1, model.config.max_position_embeddings)
    if options.grammar:
        from mlx_qwen35.engine.constraints.compiler import compiler_of

        with Step("making structured output ready"):
            compiler_of(processor).grammar('start: "a"', "a first grammar")
    service = Service(model, processor, options, name_of(args.model), load=lambda: load_model(args, folder))
    service.start()
    return service


def found_of(service: "Service", url: str) -> dict[str, object]:
    """What --json tells of a server that is ready."""
    memory = service.model.memory_limit if service.model else None
    limits = {"context": service.context, "answers_at_a_time": service.rows, "memory_bytes": memory}
    adapters = {"adapters": [name for name in service.models.values() if name]}
    spread = spread_json(service.model) if service.model else {}
    return {"url": f"{url}/v1", "page": f"{url}/", "model": service.default, **adapters, **limits, **spread}


def terms(service: "Service", is_open: bool) -> str:
    """What a server gives, in a line."""
    from mlx_qwen35.server.guard import is_loopback

    memory = service.model.memory_limit / 1e9 if service.model else 0
    key = "none" if is_open else "asked for"
    size = f"context: {service.context:,} tokens; answers at a time: {service.rows}; memory: {memory:.1f} GB"
    models = f"; models: {', '.join(service.models)}" if len(service.models) > 1 else ""
    spread = f"; {service.model.spread}" if service.model and service.model.spread else ""
    found = f"{size}; key: {key}{models}{spread}"
    if is_loopback(service.options.host):
        return found
    return f"{found}; other machines reach it by its address, or an --allowed-host"


def name_of(model: str) -> str:
    """What the API calls a model: the name of its folder, or its id."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def main() -> None:
    with as_command(COMMAND, spreads=True):
        sys.exit(run(parser().parse()))


if __name__ == "__main__":
    main()
