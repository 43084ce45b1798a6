"""A model that is evaluated: its checkpoint, how it is loaded and asked, and the folder of its answers."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter_choice import Chosen, choose
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.checkpoint.fingerprint import fingerprint, vision_fingerprint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.distributed.loading import loader, runs_alone
from mlx_qwen35.distributed.options import RankOptions
from mlx_qwen35.engine.prepared import Prepared, prepare
from mlx_qwen35.engine.presets import PRESETS, Sampling
from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.asking import NO_ROOM, THINKING, Asker, about, merged
from mlx_qwen35.evaluate.choosing import check_choices
from mlx_qwen35.evaluate.items import Line, RunFolder
from mlx_qwen35.evaluate.published import published_of
from mlx_qwen35.evaluate.run import Judge, ask, brief, chosen, keyed
from mlx_qwen35.evaluate.summary import Outcome, outcome
from mlx_qwen35.evaluate.task import Asked, Task
from mlx_qwen35.load import LoadOptions, choose_dtype, has_vision, load_model
from mlx_qwen35.machine.memory import limit_of
from mlx_qwen35.machine.versions import versions
from mlx_qwen35.model.model import Spread
from mlx_qwen35.options import options_of, spelled
from mlx_qwen35.prompt.processor import Processor

ALONE = RankOptions()  # on one machine, or the ranks of mlx.launch
Watch = Callable[[str, int, int, str], object]  # what is done, how much of it, of how much, in which unit
KEPT = (  # told as they are
    "preset", "thinking_budget", "reasoning_effort", "loop_guard", "stop", "system_prompt", "min_pixels", "max_pixels",
)  # fmt: skip
FREE = ("mtp", "mtp_depth")  # what may change when a run goes on: drafts change no answer
USUAL = {"adapter_scale": 1.0, "kv_bits": "16"}  # of what tells how a model is loaded; of the others None
SAMPLE = 32  # questions, evenly spread, that settings are told of


def unwatched(what: str, done: int, total: int, unit: str) -> None:
    """Show nothing."""


class Subject:
    """A model, whose weights are read when the first question is asked.

    load: how it is loaded. given: options of `generate` that the user gave. rows: most questions at a time. seed: of
    the run. found: its folder, where that is known; a Hugging Face id is downloaded otherwise. ranks: the machines that
    it is split over.
    """

    def __init__(
        self,
        load: LoadOptions,
        given: Mapping[str, Any],
        rows: int,
        seed: int,
        out: Path,
        watch: Watch = unwatched,
        found: Path | None = None,
        ranks: RankOptions = ALONE,
    ):
        assert load.model is not None
        self.load, self.given, self.rows, self.seed, self.watch = load, dict(given), rows, seed, watch
        self.name, self.ranks = str(load.model), ranks
        self.folder = RunFolder(out)
        self.spread: Spread | None = None  # over machines, once it is loaded
        place = found or resolve(load.model, load.revision)
        self.checkpoint: Checkpoint = open_checkpoint(place, rope_scaling=load.rope_scaling)
        if load.keep_vision and not has_vision(self.checkpoint):
            raise InputError(
                "vision_missing",
                f"{spelled('keep_vision')} must not be given: {self.name} has no vision encoder to keep",
            )
        self.adapters = choose(load.adapter, load.adapter_scale, self.checkpoint)
        self.limit = limit_of(load.memory_limit)  # bytes that the model may take
        self.kv = load.kv_format(self.checkpoint.config.text.head_dim)
        self.dtype: mx.Dtype = choose_dtype(self.checkpoint, load.dtype)

    @cached_property
    def asker(self) -> Asker:
        """The loaded model, ready to be asked."""
        beside = Chosen(dict(self.adapters.adapters), self.adapters.default)  # loading takes tensors out of it
        loads = loader(self.load, self.ranks) or load_model
        model = loads(self.checkpoint, self.dtype, self.name, self._reads, self.limit, self.kv, beside)
        self.spread = model.spread
        if model.vision:
            model.vision.keep = self.load.keep_vision
        return Asker(model, self.processor, self.given, self.rows)

    def _reads(self, done: int, total: int) -> None:
        self.watch(f"loading {self.name}", done, total, "B")

    def let_go(self) -> None:
        """Free the model's memory."""
        self.__dict__.pop("asker", None)
        mx.clear_cache()

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on, as JSON has it."""
        own, seen = self.checkpoint, has_vision(self.checkpoint)
        settings = {name: value for name, value in self.given.items() if name not in FREE}
        return {
            "model": {"weights": fingerprint(own)[:16], "text": self.processor.tokenizer.fingerprint,
                      "vision": vision_fingerprint(own)[:16] if seen else None,
                      "dtype": dtype_name(self.dtype), "kv_bits": self.kv.name},
            "adapters": {name: adapter.fingerprint for name, adapter in self.adapters.adapters.items()},
            "settings": {**settings, "seed": self.seed, "adapter_scale": self.load.adapter_scale,
                         "rope_scaling": self.load.rope_scaling, **self._split()},
            "versions": versions(),
        }  # fmt: skip

    def loaded(self) -> dict[str, Any]:
        """Which weights these are, and how they are loaded where that is not the default; as JSON has it."""
        given = self.load
        told: dict[str, Any] = {"weights": fingerprint(self.checkpoint)[:16], "dtype": dtype_name(self.dtype)}
        for name, own in self.adapters.adapters.items():  # one, if any
            told |= {"adapter": name, "adapter_fingerprint": own.fingerprint[:16], "adapter_scale": given.adapter_scale}
        told |= {"kv_bits": self.kv.name, "rope_scaling": given.rope_scaling, "revision": given.revision}
        return {name: value for name, value in told.items() if value != USUAL.get(name)}

    def ask(self, task: str, questions: Mapping[str, Callable[[], Asked]], judge: Judge) -> list[Line]:
        """The lines of a task's questions, of which those are asked that the folder does not have; see `run.ask`."""
        return ask(
            lambda: self.asker, self.folder.log(task), questions, judge, self.seed,
            lambda done, total: self.watch(f"{task}: asking {self.name}", done, total, "questions"),
        )  # fmt: skip

    def run(self, task: Task, items: int | None = None) -> tuple[list[Line], Outcome]:
        """Ask a task's questions. items: how many; None: all."""
        some = {item.key: item for item in chosen(keyed(task), items)}
        asked = {key: lambda item=item: task.ask(item) for key, item in some.items()}
        lines = self.ask(task.name, asked, lambda key, answer: {
            "score": float(task.judge(some[key], answer)), "expected": brief(task.expected(some[key])),
        })  # fmt: skip
        seconds = self.folder.log(task.name).seconds
        published = published_of(task.published, self.checkpoint.config.text)
        return lines, outcome(lines, seconds, task.version, self.settings(task, items), published)

    def settings(self, task: Task, items: int | None = None) -> dict[str, Any]:
        """What questions are answered with, every default filled in; a list where it is not the same for all.

        InputError for options that contradict each other, for a question that cannot be asked, and where the context
        has room for none.
        """
        asked = {item.key: task.ask(item) for item in chosen(chosen(keyed(task), items), SAMPLE)}
        kinds: dict[str, dict[str, Any]] = {}
        for key, own in asked.items():
            kind = repr([bool(own.choices), merged(own, self.given)])
            if kind not in kinds and (made := self.fitting(key, own)):
                kinds[kind] = self._settings(own, made)
        if not kinds:
            self.prepared(*next(iter(asked.items())))  # says how long it is
        found, told = [*kinds.values()], dict[str, Any]()
        for name in dict.fromkeys(name for own in found for name in own):
            values = [own[name] for own in found if name in own]
            told[name] = values[0] if all(value == values[0] for value in values) else distinct(values)
        return told | {"seed": self.seed} | self._split()

    def _split(self) -> dict[str, str]:
        """How the model is split over machines; nothing for one."""
        return {} if runs_alone(self.ranks) else {"split": self.ranks.split}

    def _settings(self, asked: Asked, own: Prepared) -> dict[str, Any]:
        if asked.choices:
            return {"likelihood": True, "enable_thinking": False}
        names = [name for name, declared in options_of(Sampling).items() if not declared.python_only]
        sampling = {name: getattr(own.plans[0].sampling, name) for name in names}
        kept = {name: value for name, value in own.options.items() if name in KEPT}
        preset = PRESETS[own.options.get("preset", "thinking" if own.prompt.thinking else "instruct")]
        most = own.options.get("max_tokens", preset.max_tokens)  # where the context has room for them
        return {"enable_thinking": own.prompt.thinking, "max_tokens": most, **sampling, **kept}

    def fitting(self, key: str, asked: Asked) -> Prepared | None:
        """The same as `prepared`; None where the context has no room for the question."""
        try:
            return self.prepared(key, asked)
        except InputError as error:
            if error.code != NO_ROOM:
                raise
        return None

    def prepared(self, key: str, asked: Asked) -> Prepared:
        """A question as the engine gets it; no weights are read. InputError where it cannot be asked."""
        prompt: Any = asked.prompt
        options: Any = merged(asked, self.given)
        if asked.choices:  # they are read without reasoning, whatever is given
            options = {name: value for name, value in options.items() if name not in THINKING}
        with about(key):
            found = prepare(self.checkpoint.config.text, self.processor, prompt, 1, None, **options)
            if asked.choices:
                check_choices(found.prompt)
        return found

    @cached_property
    def processor(self) -> Processor:
        """Between messages and tokens; it is there before the weights are."""
        own = self.checkpoint
        return Processor.from_folder(own.folder, own.config, has_vision(own), self.limit)


def distinct(values: Sequence[Any]) -> list[Any]:
    """Each value once, in order."""
    return [value for place, value in enumerate(values) if value not in values[:place]]
