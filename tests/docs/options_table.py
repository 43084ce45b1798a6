"""The tables of docs/options.md and docs/server.md, from the declared options.

`python tests/docs/options_table.py` renews both pages.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from mlx_qwen35.commands.generate import CommandOptions
from mlx_qwen35.commands.obtain import RecipeOptions
from mlx_qwen35.distributed.options import RankOptions
from mlx_qwen35.engine.options import GenerationOptions, PromptOptions
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.evaluate.options import OF_ANSWERS, EvalOptions
from mlx_qwen35.load import LoadOptions
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.options import Option, options_of
from mlx_qwen35.server.options import ServerOptions
from mlx_qwen35.train.command import GROUPS, OF_MODEL
from mlx_qwen35.train.options import RunOptions, TrainOptions

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- options: generated, see tests/docs -->\n", "<!-- end -->"
TITLES: dict[str, tuple[type, ...]] = {
    "model": (LoadOptions, RecipeOptions),
    "several machines": (RankOptions,),
    "prompt and output": (CommandOptions, PromptOptions),
    "generation": (GenerationOptions,),
    "sampling": (Sampling,),
    "images and video": (VisionOptions,),
}
PAGES = (DOCS / "options.md", DOCS / "server.md")
_KINDS = {int: "integer", float: "number", bool: "switch", str: "text"}


def page(path: Path) -> str:
    """The whole page, with the table as it must be."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    lines = _server_lines() if path.stem == "server" else chain(_lines(), _training_lines(), _evaluation_lines())
    return f"{before}{BEGIN}{chr(10).join(lines)}\n{END}{rest.partition(END)[2]}"


def _lines() -> Iterator[str]:
    yield "| command line | Python | value | meaning |"
    yield "|---|---|---|---|"
    for title, groups in TITLES.items():
        yield f"| **{title}** | | | |"
        for group in groups:
            for option in options_of(group).values():
                yield _row(option, in_python=group is not CommandOptions or option.name == "prompt")


def _server_lines() -> Iterator[str]:
    yield "| option | value | meaning |"
    yield "|---|---|---|"
    for option in options_of(ServerOptions).values():
        yield f"| {_code(option.flags)} | {_value(option)} | {option.help} |"


def _training_lines() -> Iterator[str]:
    load, own = options_of(LoadOptions), options_of(TrainOptions)
    parts = {"the run": list(options_of(RunOptions).values()), "model": [load[name] for name in OF_MODEL]}
    parts |= {title: [own[name] for name in names] for title, names in GROUPS.items()}
    yield from ("", "## Options of train", "")
    yield "In Python those of the first two parts are arguments of `train`, the others of `TrainOptions`."
    yield ""
    yield "| command line | Python | value | meaning |"
    yield "|---|---|---|---|"
    for title, options in parts.items():
        yield f"| **{title}** | | | |"
        for option in options:
            yield _row(option, in_python=option.name != "dry_run")


def _evaluation_lines() -> Iterator[str]:
    yield from ("", "## Options of eval", "")
    yield "Further ones are those of `load`, above, and of sampling. In Python all are arguments of `evaluate`."
    yield ""
    yield "| command line | Python | value | meaning |"
    yield "|---|---|---|---|"
    answers = [option for name, option in OF_ANSWERS.items() if name not in options_of(Sampling)]
    for title, options in {"the run": options_of(EvalOptions).values(), "answers": answers}.items():
        yield f"| **{title}** | | | |"
        for option in options:
            yield _row(option, in_python=option.name != "dry_run")


def _row(option: Option, in_python: bool) -> str:
    flags = () if option.python_only else option.flags
    meaning = option.help + (f". Only for {option.media}" if option.media and option.media not in option.help else "")
    if option.prompts and option.name != "ignore_chat_template":
        meaning += f". For a prompt of {' or '.join(option.prompts)}"
    cells = (_code(flags), _code(option.keywords) if in_python else "", _value(option), meaning)
    return f"| {' | '.join(cells)} |"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _value(option: Option) -> str:
    if option.choices:
        return _code(option.choices)
    kind = _KINDS.get(option.kind, (option.metavar or "").lower().replace("|", " or "))
    return f"{kind}, {option.rule.removesuffix(' and finite')}" if option.kind in (int, float) else kind


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path), encoding="utf-8")
