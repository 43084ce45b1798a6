"""How tokens are sampled: the settings, checked, and the published presets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.options import check_fields, option, spelled
from mlx_qwen35.values import is_number, is_whole, number, plain, shown, whole

MOST_FLOAT = float(np.finfo(np.float32).max)  # logits are float32: beyond it a number is infinite
MOST_SEED = 2**32 - 1


def _temperature(name: str, value: float) -> float:
    rule = "0 (greedy) or more, at least 0.001 and finite"
    found = number(name, value, rule, 0.0, MOST_FLOAT)
    return number(name, found, rule, 1e-3, MOST_FLOAT) if found else found


def _biases(name: str, given: Mapping[int, float]) -> dict[int, float]:
    """A bias of minus infinity forbids a token; one of infinity would leave no distribution."""
    rule = f"{name} must map token ids to numbers below infinity, got"
    if not isinstance(given, Mapping):
        raise InputError("option_invalid", f"{rule} {shown(given)}")
    biases = {plain(token): plain(bias) for token, bias in given.items()}
    for token, bias in biases.items():
        if not (is_whole(token) and 0 <= token < 2**31 and is_number(bias) and bias <= MOST_FLOAT):
            raise InputError("option_invalid", f"{rule} {shown(token)}: {shown(bias)}")
    return {int(token): float(bias) for token, bias in biases.items()}


def _tokens(name: str, given: Sequence[int]) -> tuple[int, ...]:
    tokens = tuple(plain(token) for token in given) if isinstance(given, list | tuple) else (None,)
    if not all(is_whole(token) and 0 <= token < 2**31 for token in tokens):
        raise InputError("option_invalid", f"{name} must be a list of token ids, got {shown(given)}")
    return tokens


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled. Penalties count every generated token, and no prompt token."""

    temp: float = option(
        1.0, help="temperature; 0 is greedy", least=0, most=MOST_FLOAT, metavar="X",
        check=_temperature, aliases=("temperature",),
    )  # fmt: skip
    top_k: int = option(0, help="sample from the K most probable tokens; 0 is all", least=0, metavar="K")
    top_p: float = option(
        1.0, help="sample from the smallest set of tokens with this probability; 1 is all",
        least=0, above=True, most=1, metavar="P",
    )  # fmt: skip
    min_p: float = option(
        0.0, help="drop tokens below this fraction of the best token's probability; 0 is off", least=0, most=1,
        metavar="P",
    )  # fmt: skip
    presence_penalty: float = option(
        0.0, help="subtracted from the logit of each token that was generated before", least=-2, most=2, metavar="X"
    )
    frequency_penalty: float = option(
        0.0, help="subtracted from the logit of a token for each time it was generated before", least=-2, most=2,
        metavar="X",
    )  # fmt: skip
    repetition_penalty: float = option(
        1.0, help="divides a positive logit of a token that was generated before, multiplies a negative one; 1 is off",
        least=1e-3, most=MOST_FLOAT, metavar="X",
    )  # fmt: skip
    logit_bias: Mapping[int, float] = option(
        default_factory=dict, help="token id -> number that is added to its logit; minus infinity forbids the token",
        check=_biases, python_only=True,
    )  # fmt: skip
    min_tokens_to_keep: int = option(1, help="tokens that min-p keeps at the least", least=1, metavar="N")
    xtc_probability: float = option(
        0.0, help="how often XTC applies: then tokens above the threshold are excluded, except the least probable of "
        "them; 0 is off", least=0, most=1, metavar="P",
    )  # fmt: skip
    xtc_threshold: float = option(
        0.1, help="probability above which XTC excludes a token", least=0, most=0.5, metavar="P"
    )
    xtc_special_tokens: Sequence[int] | None = option(
        help="token ids that XTC never excludes (default: the end tokens, </think> and the line end)", check=_tokens,
        python_only=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        if self.temp == 0 and self.xtc_probability:
            raise InputError(
                "option_conflict",
                f"{spelled('xtc_probability')} must not be given with {spelled('temp', 0)}, which always takes the "
                "most probable token",
            )

    @property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


@dataclass(frozen=True)
class Preset:
    """Published settings of one way to use the model (model card of Qwen3.5-4B)."""

    sampling: Sampling
    max_tokens: int  # published output length
    thinking: bool  # whether they are for answers with reasoning
    use: str


PRESETS = {
    "thinking": Preset(Sampling(1.0, 20, 0.95, presence_penalty=1.5), 32768, True, "general, with thinking"),
    "coding": Preset(Sampling(0.6, 20, 0.95), 81920, True, "precise code, with thinking"),
    "instruct": Preset(Sampling(0.7, 20, 0.8, presence_penalty=1.5), 32768, False, "general, without thinking"),
    "reasoning": Preset(Sampling(1.0, 40, 1.0, presence_penalty=2.0), 32768, False, "hard tasks, without thinking"),
}


def check_seed(seed: int) -> int:
    return whole("seed", seed, 0, MOST_SEED)
