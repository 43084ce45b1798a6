"""Declared options (mlx_qwen35/options.py) on a command line."""

import argparse
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from mlx_qwen35.distributed.options import RankOptions
from mlx_qwen35.engine.options import GROUPS, GenerationOptions
from mlx_qwen35.engine.presets import Sampling
from mlx_qwen35.errors import InputError
from mlx_qwen35.load import LoadOptions
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.options import Option, note_spelling, options_of, spelled


class _Accepts(Protocol):
    """A parser, or a group of its options."""

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action: ...


class DeclaredAction(argparse.Action):
    """Checks the value of a declared option, names the option in errors as it was typed, and keeps the value."""

    def __init__(self, option_strings: list[str], dest: str, declared: Option, **settings: Any):
        super().__init__(option_strings, dest, **settings)
        self.declared = declared

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert option_string is not None
        if self.declared.kind is not bool:  # of a switch the last word counts
            note_spelling(self.declared.name, option_string)
        setattr(
            namespace, self.dest, self.declared.checked(option_string, self.value(namespace, values, option_string))
        )

    def value(self, namespace: argparse.Namespace, text: Any, typed: str) -> Any:
        """The value that is checked and kept. text: what follows the option, which was typed as `typed`."""
        if self.declared.kind is bool:
            return not typed.startswith("--no-")
        if self.declared.read:
            return self.declared.read(typed, text)
        if self.declared.each:
            return [*(getattr(namespace, self.dest) or ()), text]
        try:
            return self.declared.kind(text) if self.declared.kind in (int, float, Path) else text
        except ValueError:  # its check says what it must be
            return text


def add_options(accepts: _Accepts, declared: Iterable[Option]) -> None:
    """Options that are absent from the command line have the value None."""
    for option in declared:
        if not option.python_only:
            accepts.add_argument(
                *option.flags,
                dest=option.name,
                action=DeclaredAction,
                declared=option,
                nargs=0 if option.kind is bool else None if option.bare is None else "?",
                const=option.bare,
                metavar=f"{{{','.join(option.choices)}}}" if option.choices else option.metavar,
                help=option.help.replace("%", "%%"),
            )


def add_model_options(parser: argparse.ArgumentParser, adapters: str = "") -> None:
    """adapters: how several of them are used, where the command takes more than one, for --help."""
    options = dict(options_of(LoadOptions))
    if adapters:
        meaning = f"{options['adapter'].help}, by the folder's name or another; may be repeated: {adapters}"
        options["adapter"] = replace(options["adapter"], help=meaning, metavar="[NAME=]PATH")
    add_options(
        parser.add_argument_group("model"), [option for name, option in options.items() if name != "keep_vision"]
    )


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    add_options(parser.add_argument_group("several machines"), options_of(RankOptions).values())


def check_one_adapter(args: argparse.Namespace) -> None:
    """InputError where several adapters are given to a command that uses one."""
    if len(args.adapter or ()) > 1:
        raise InputError(
            "option_conflict",
            f"{spelled('adapter')} must be given once: this command uses one adapter; it was given {len(args.adapter)}",
        )


def add_answer_options(
    parser: argparse.ArgumentParser, prompt: _Accepts, of_prompt: Iterable[Option], without: Collection[str] = ()
) -> None:
    """What generate and chat share; `of_prompt` are put into the group `prompt`. without: names of generation options
    that the command does not have.
    """
    keep_vision = options_of(LoadOptions)["keep_vision"]
    add_options(prompt, of_prompt)
    generation = [option for name, option in options_of(GenerationOptions).items() if name not in without]
    add_options(parser.add_argument_group("generation"), generation)
    add_options(parser.add_argument_group("sampling"), options_of(Sampling).values())
    vision = [*options_of(VisionOptions).values(), keep_vision]
    add_options(parser.add_argument_group("images and video"), vision)


def given_options(args: argparse.Namespace, groups: Iterable[type] = GROUPS) -> dict[str, Any]:
    """The options of these groups that the command line holds."""
    values: Mapping[str, Any] = vars(args)
    names = [name for group in groups for name, own in options_of(group).items() if not own.python_only]
    return {name: values[name] for name in names if values.get(name) is not None}
