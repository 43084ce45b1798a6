"""How tokens are sampled: the settings, checked, and the published presets."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import is_number, is_whole, number, plain, shown, whole

MOST_FLOAT = float(np.finfo(np.float32).max)  # logits are float32: beyond it a number is infinite
_TEMPERATURE = ("0 (greedy) or more, at least 0.001 and finite", 1e-3, MOST_FLOAT)
# Option -> its rule in words, the least and the most; whether it must be above the least.
_NUMBERS = {
    "temp": (_TEMPERATURE[0], 0.0, MOST_FLOAT),
    "top_p": ("above 0 and at most 1 (off)", 0.0, 1.0, True),
    "min_p": ("0 (off) to 1", 0.0, 1.0),
    "presence_penalty": ("-2 to 2", -2.0, 2.0),
    "frequency_penalty": ("-2 to 2", -2.0, 2.0),
    "repetition_penalty": ("above 0, at least 0.001 and finite; 1 is off", 1e-3, MOST_FLOAT),
}


@dataclass(frozen=True)
class Sampling:
    """How to sample a token. Penalties count every generated token, and no prompt token."""

    temp: float = 1.0  # 0: greedy, the most probable token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    presence_penalty: float = 0.0  # taken off the logit of each token that was generated
    frequency_penalty: float = 0.0  # taken off as often as it was
    repetition_penalty: float = 1.0  # divides its positive logit, multiplies a negative one; 1: off
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logit of a token id

    def __post_init__(self) -> None:
        for name, rule in _NUMBERS.items():
            object.__setattr__(self, name, number(name, getattr(self, name), *rule))
        if self.temp:
            number("temp", self.temp, *_TEMPERATURE)
        object.__setattr__(self, "top_k", whole("top_k", self.top_k, 0))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


def _biases(given: Mapping[int, float]) -> dict[int, float]:
    """A bias of minus infinity forbids a token; one of infinity would leave no distribution."""
    rule = "logit_bias must map token ids to numbers below infinity, got"
    if not isinstance(given, Mapping):
        raise InputError("option_invalid", f"{rule} {shown(given)}")
    biases = {plain(token): plain(bias) for token, bias in given.items()}
    for token, bias in biases.items():
        if not (is_whole(token) and 0 <= token < 2**31 and is_number(bias) and bias <= MOST_FLOAT):
            raise InputError("option_invalid", f"{rule} {shown(token)}: {shown(bias)}")
    return {int(token): float(bias) for token, bias in biases.items()}


@dataclass(frozen=True)
class Preset:
    """Published settings of one way to use the model (model card of Qwen3.5-4B)."""

    sampling: Sampling
    max_tokens: int  # published output length
    thinking: bool  # whether they are for answers with reasoning
    use: str


PRESETS = {
    "thinking": Preset(Sampling(1.0, 20, 0.95, presence_penalty=1.5), 32768, True, "thinking, general"),
    "coding": Preset(Sampling(0.6, 20, 0.95), 81920, True, "thinking, precise coding"),
    "instruct": Preset(Sampling(0.7, 20, 0.8, presence_penalty=1.5), 32768, False, "no thinking, general"),
    "reasoning": Preset(Sampling(1.0, 40, 1.0, presence_penalty=2.0), 32768, False, "no thinking, reasoning tasks"),
}


def check_seed(seed: int) -> int:
    return whole("seed", seed, 0, 2**32 - 1)
