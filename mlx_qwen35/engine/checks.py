"""What the options of a generation must be, whatever the prompt."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mlx_qwen35.cache.cache import Cache
from mlx_qwen35.engine.drafts.speculate import MODES, MOST_DEPTH
from mlx_qwen35.engine.options import SAMPLING, Options, thinking_switch, vision_options
from mlx_qwen35.engine.sampling import PRESETS, Sampling, check_seed
from mlx_qwen35.errors import InputError
from mlx_qwen35.prompt.stream import check_stop
from mlx_qwen35.values import choice, flag, shown, text, whole


def _a_list(name: str, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise InputError(
            "option_invalid",
            f"{name} must be a list, got {type(value).__name__}; for one write {name}=[{name[:-1]}]",
        )
    return value


def _a_cache(name: str, value: Any) -> Cache:
    if not isinstance(value, Cache):
        raise InputError("option_invalid", f"{name} must come from model.make_cache(), got {shown(value)}")
    return value


def _a_function(name: str, value: Any) -> Callable[..., Any]:
    if not callable(value):
        raise InputError(
            "option_invalid", f"{name} must be a function of tokens read and tokens in all, got {shown(value)}"
        )
    return value


# Option -> its value checked, numbers of numpy made Python's. Those of sampling, images and clips have their own.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": partial(whole, least=1), "prefill_step_size": partial(whole, least=1),
    "mtp": partial(choice, known=MODES), "mtp_depth": partial(whole, least=1, most=MOST_DEPTH),
    "preset": partial(choice, known=PRESETS), "seed": lambda _, value: check_seed(value),
    "stop": lambda _, value: check_stop(value), "system_prompt": text, "images": _a_list, "videos": _a_list,
    "enable_thinking": flag, "ignore_chat_template": flag, "cache": _a_cache, "progress": _a_function,
}  # fmt: skip


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, those that are None left out.

    TypeError for a name that is none, InputError for a value that breaks its rule, whatever the prompt will be.
    """
    if unknown := sorted(set(options) - set(Options.__annotations__)):
        raise TypeError(f"options must be among {', '.join(Options.__annotations__)}; got {', '.join(unknown)}")
    given = {name: value for name, value in options.items() if value is not None}
    given = {name: _CHECKS[name](name, value) if name in _CHECKS else value for name, value in given.items()}
    Sampling(**{name: value for name, value in given.items() if name in SAMPLING})
    vision_options(given)
    thinking_switch(given)
    return given
