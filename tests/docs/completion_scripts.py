"""The completion scripts of zsh, bash and fish, from the commands' parsers, by shtab.

`python tests/docs/completion_scripts.py` renews mlx_qwen35/commands/completions/.
"""

import argparse
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import shtab

from mlx_qwen35.commands import completion, models
from mlx_qwen35.commands.umbrella import COMMANDS
from mlx_qwen35.console.options import DeclaredAction

FOLDER = Path(completion.__file__).parent / "completions"
FILES, FOLDERS, MODELS = ("FILE", "FILE|TEXT"), ("FOLDER", "PATH", "[NAME=]PATH"), ("MODEL",)

# What may follow --model: nano, what Hugging Face's cache and the conversions hold, LM Studio's folders, any folder.
BASH = """\
_mlx_qwen35_model_dirs() {  # a name with "dir", by which shtab lets bash quote what it inserts
  local place name found=(nano)
  for place in "${HF_HUB_CACHE:-${HF_HOME:-$HOME/.cache/huggingface}/hub}"/models--*Qwen3.5* \\
      "${MLX_QWEN35_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/mlx_qwen35}"/models/*--*; do
    [ -d "$place" ] || continue
    name="${place##*/}" name="${name#models--}" found+=("${name/--//}")
  done
  for place in "$HOME"/.lmstudio/models/*/* "$HOME"/.cache/lm-studio/models/*/*; do
    [ -d "$place" ] && found+=("$place")
  done
  for name in "${found[@]}"; do
    [[ $name == "$1"* ]] && printf '%s\\n' "$name"  # never compgen -W, which runs what a name holds
  done
  compgen -d -- "$1"
}"""
ZSH = """\
_mlx_qwen35_models() {
  local -a places found
  places=("${HF_HUB_CACHE:-${HF_HOME:-$HOME/.cache/huggingface}/hub}"/models--*Qwen3.5*(N/:t)
    "${MLX_QWEN35_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/mlx_qwen35}"/models/*--*(N/:t))
  found=(nano ${${places#models--}/--//} "$HOME"/.lmstudio/models/*/*(N/) "$HOME"/.cache/lm-studio/models/*/*(N/))
  compadd -a found
  _files -/
}"""
FISH = """\
function __mlx_qwen35_models
  echo nano
  set -l cache $HOME/.cache
  set -q XDG_CACHE_HOME; and set -l ours $XDG_CACHE_HOME; or set -l ours $cache
  set -q MLX_QWEN35_HOME; and set ours $MLX_QWEN35_HOME; or set ours $ours/mlx_qwen35
  set -q HF_HOME; and set -l hub $HF_HOME/hub; or set -l hub $cache/huggingface/hub
  set -q HF_HUB_CACHE; and set hub $HF_HUB_CACHE
  for place in $hub/models--*Qwen3.5* $ours/models/*--*
    string replace -- -- / (string replace models-- '' (basename $place))
  end
  for place in $HOME/.lmstudio/models/*/* $cache/lm-studio/models/*/*
    echo $place
  end
  __fish_complete_directories
end"""
OF_MODELS = {
    "bash": "_mlx_qwen35_model_dirs",
    "zsh": "_mlx_qwen35_models",
    "fish": "__mlx_qwen35_models",
    "preamble": {"bash": BASH, "zsh": ZSH, "fish": FISH},
}


def scripts() -> Mapping[str, str]:
    """Shell -> its script."""
    return {shell: shtab.complete(_root(), shell=shell) for shell in completion.SHELLS}


def _root() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="mlx_qwen35")
    root.add_argument("--version", action="version")
    commands = root.add_subparsers()
    for name, (module, what) in COMMANDS.items():
        found = importlib.import_module(module).parser()
        _add(commands, name, found, what)
        if name == "models":
            actions = found.add_subparsers()
            for action, (make, _) in models.ACTIONS.items():
                _add(actions, action, make())
    return root


def _add(commands: "argparse._SubParsersAction", name: str, found: argparse.ArgumentParser, what: str = "") -> None:
    for action in _completed(found):
        if isinstance(action, DeclaredAction) and action.declared.choices:
            action.choices = action.declared.choices
        elif action.metavar in FILES and action.nargs == "?":
            action.nargs = 0  # what follows --json is most often another option
        elif action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar in MODELS or action.dest == "names":
            action.complete = OF_MODELS  # type: ignore[attr-defined]
    found.description = what or found.description
    commands.add_parser(name, help=what or None)
    commands._name_parser_map[name] = found


def _completed(found: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (action for action in found._actions if action.nargs != 0)


if __name__ == "__main__":
    for shell, text in scripts().items():
        (FOLDER / f"mlx_qwen35.{shell}").write_text(text, encoding="utf-8")
