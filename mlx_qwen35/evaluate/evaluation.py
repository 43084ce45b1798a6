"""`evaluate`: from models, tasks and a folder to a summary."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.fingerprint import fingerprint
from mlx_qwen35.distributed.loading import runs_alone
from mlx_qwen35.distributed.options import RankOptions
from mlx_qwen35.errors import InputError
from mlx_qwen35.evaluate.asking import OF_IMAGES, shows_media
from mlx_qwen35.evaluate.compare import paired
from mlx_qwen35.evaluate.harness import HarnessTask
from mlx_qwen35.evaluate.items import Line, RunFolder
from mlx_qwen35.evaluate.kl import KL, Sequences, check_tokenizers, figures, measure, sequences
from mlx_qwen35.evaluate.labels import labels
from mlx_qwen35.evaluate.names import Wanted, find
from mlx_qwen35.evaluate.options import OF_ANSWERS, EvalOptions
from mlx_qwen35.evaluate.report import write_report
from mlx_qwen35.evaluate.subject import ALONE, Subject, Watch, unwatched
from mlx_qwen35.evaluate.summary import entry
from mlx_qwen35.evaluate.task import Task
from mlx_qwen35.load import LoadOptions
from mlx_qwen35.machine.chip import brand
from mlx_qwen35.machine.process import check_folder, refuse_fork
from mlx_qwen35.machine.versions import versions
from mlx_qwen35.measure.layerwise import Layerwise
from mlx_qwen35.options import check_keywords, listed, options_of, spelled

AGAINST = "against"  # the folder within DIR with the other model's answers, and its entry in a summary
PARTS = 100  # of a measurement


def evaluate(
    model: str | Path,
    tasks: str | Sequence[str],
    out: str | Path,
    *,
    watch: Watch = unwatched,
    **options: Any,
) -> dict[str, Any]:
    """Ask a model the questions of tasks, and write the answers and a summary into the folder `out`.

    Args:
        model: a local folder, a Hugging Face id, or "nano".
        tasks: names and files: "kl", "nano", "FILE.yaml"; see docs/evaluation.md.
        out: a folder that is absent or empty, or holds this very run, which goes on: what was answered is not asked
            again. Killed at any moment and gone on with, a run ends with the same files of answers as one that was not.
        watch: called as watch(what, done, total, unit) while weights are read and questions are asked.
        options: of `EvalOptions`, of `load`, hosts and split of `load_distributed`, and how a model answers: preset,
            max_tokens, enable_thinking, thinking_budget, loop_guard, mtp, mtp_depth and the options of sampling.

    Returns what `out`/summary.json holds. "tasks": name -> n, score (0 to 1), standard_error, cut_at_limit (answers
    that the most tokens ended), too_long (questions that the context has no room for), tokens, seconds, versions,
    settings, published (a figure and its source, or None); of kl "kl" in nats and "top1" as a share, with "kl_error"
    and "top1_error". With against: "against", the same of the other model, and "paired", the difference question by
    question. "loaded": what each model is called in the report, its weights, and how it was loaded.

    Raises InputError: whatever `load` and `generate` can be refused for; task_unknown, task_invalid, package_missing;
    target_refused, target_busy, disk_full where the folder cannot be written; resume_differs where it holds another
    run, run_invalid a damaged one; models_differ where kl is asked of two models that are not forms of one.
    """
    refuse_fork()
    check_folder()
    load, own, machines, answers = split({"model": model, "tasks": tasks, "out": out, **options})
    return prepared(load, own, answers, watch, ranks=machines).run()


def split(given: Mapping[str, Any]) -> tuple[LoadOptions, EvalOptions, RankOptions, dict[str, Any]]:
    """Options by name -> those of load, of the evaluation, of machines, and of answers, checked."""
    parts: list[dict[str, Any]] = [{}, {}, {}, {}]
    groups = [options_of(EvalOptions), options_of(LoadOptions), options_of(RankOptions), OF_ANSWERS]
    for name, value in given.items():
        place = next((number for number, group in enumerate(groups) if name in group), None)
        if place is None:
            check_keywords({name: value}, ())  # refuses it
        elif value is not None:
            parts[int(place or 0)][name] = value
    own, load, machines, answers = parts
    checked = {name: OF_ANSWERS[name].checked(spelled(name), value) for name, value in answers.items()}
    return LoadOptions(**load), EvalOptions(**own), RankOptions(**machines), checked


def prepared(
    load: LoadOptions,
    options: EvalOptions,
    answers: Mapping[str, Any],
    watch: Watch = unwatched,
    found: tuple[Path | None, Path | None] = (None, None),
    ranks: RankOptions = ALONE,
) -> "Evaluation":
    """Read headers, tokenizers and questions, no weights. found: the folders of the two models, where they are known.
    ranks: the machines that both are split over, one after the other.

    Raises InputError for whatever of them cannot be used, and for options without effect.
    """
    if not options.tasks:
        raise InputError("option_missing", f"{spelled('tasks')} must be given: kl, nano or FILE.yaml, with commas")
    if isinstance(load.adapter, Mapping) or len(load.adapter if isinstance(load.adapter, list) else ()) > 1:
        raise InputError("option_conflict", f"{spelled('adapter')} must be one folder: one adapter is evaluated")
    wanted = find(options.tasks, options.items)
    asked = [own for own in wanted if own.task]
    kl = len(asked) < len(wanted)
    if kl:
        _check_kl(options, ranks)
    elif options.text:
        raise InputError("option_no_effect", f"{spelled('text')} has no effect without the task kl; leave it out")
    if answers and not asked:
        raise InputError("option_no_effect", f"{listed(answers)} has no effect on kl, which asks nothing; leave it out")
    out = Path(options.out or "").expanduser()
    if options.out:
        RunFolder(out).check()
    subject = Subject(load, answers, options.batch_size, options.seed, out, watch, found[0], ranks)
    against = None
    if options.against is not None:
        plain = replace(
            load, model=options.against, revision=None, adapter=None, adapter_scale=1.0, kv_bits=None, kv_rotate=False
        )
        against = Subject(plain, answers, options.batch_size, options.seed, out / AGAINST, watch, found[1], ranks)
    told = [subject.settings(own.task, own.items) for own in asked if own.task]  # what is wrong is told now
    _check_effects(answers, [own.task for own in asked if own.task], told)
    read = None
    if kl:
        assert against is not None, "it was asked for above"
        read = sequences(subject.checkpoint, options.text, options.items)
        check_tokenizers(read, against.checkpoint, options.text, options.items)
    return Evaluation(options, subject, against, wanted, read)


def _check_kl(options: EvalOptions, ranks: RankOptions) -> None:
    if not runs_alone(ranks):
        raise InputError(
            "ranks_unsupported",
            "kl must run on one machine: it reads one layer after the other, and needs no room for a whole model. "
            f"Leave it out, or run it by itself, without {spelled('hosts')} and mlx.launch",
        )
    if options.against is None:
        raise InputError(
            "option_missing",
            f"{spelled('against')} must be given for kl: the model that this one is compared with, as the source of a "
            "quantized one",
        )


def _check_effects(answers: Mapping[str, Any], tasks: Sequence[Task], told: Iterable[Mapping[str, Any]]) -> None:
    """InputError for options of answers that change none. told: the settings of the tasks."""
    of_images = [name for name in answers if name in OF_IMAGES]
    others = [name for name in answers if name not in OF_IMAGES]
    if others and tasks and not any("max_tokens" in own for own in told):
        raise InputError(
            "option_no_effect",
            f"{listed(others)} has no effect on likelihoods, which are read without reasoning; leave it out",
        )
    if of_images and tasks and not any(shows_media(task.ask(item)) for task in tasks for item in task.items()):
        raise InputError(
            "option_no_effect", f"{listed(of_images)} has no effect: no question shows an image. Leave it out"
        )


@dataclass(frozen=True)
class Evaluation:
    """What is asked, of which models, checked, before any weights are read.

    against: the other model, None for none. read: what kl is measured on, None without kl.
    """

    options: EvalOptions
    subject: Subject
    against: Subject | None
    wanted: Sequence[Wanted]
    read: Sequences | None

    def run(self) -> dict[str, Any]:
        """Ask, and write DIR/summary.json, which is returned. Whatever was asked before is not asked again."""
        if not self.options.out:
            raise InputError("option_missing", f"{spelled('out')} must be given: the folder to write")
        asked = [own for own in self.wanted if own.task]
        other = self.against if asked else None
        with ExitStack() as stack:
            for own in filter(None, (self.subject, other)):
                stack.enter_context(own.folder.held())
                own.folder.claim(own.identity(), self.versions_of(asked if own is other else self.wanted))
            entries, lines = self._asked(self.subject)
            theirs: Mapping[str, Sequence[Line]] = {}
            if other:
                others, theirs = self._asked(other, asked)
                for name, told in others.items():
                    entries[name] |= {AGAINST: told, "paired": asdict(
                        paired(lines[name], theirs[name], "unit" in told)
                    )}
            summary: dict[str, Any] = {
                "model": self.subject.name, "against": self.against and self.against.name, "loaded": self._loaded(),
                "machine": brand(), "versions": versions(), "tasks": entries,
            }  # fmt: skip
            if spread := self.subject.spread:
                summary |= {"split": spread.split, "rank_weight_bytes": list(spread.weight_bytes)}
            self.subject.folder.write_summary(summary)
            write_report(self.subject.folder.folder, summary, lines, theirs)
        return summary

    def _loaded(self) -> dict[str, Any]:
        """What tells each model from others, and from the other: "name" is what a report calls it."""
        own = {"model": self.subject, AGAINST: self.against}
        told = [(one.name, one.loaded()) for one in own.values() if one]
        found = [{"name": name, **loaded} for name, (_, loaded) in zip(labels(told), told, strict=True)]
        return dict(zip(own, [*found, None], strict=False))

    def _asked(
        self, own: Subject, wanted: Sequence[Wanted] | None = None
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Sequence[Line]]]:
        """A model's entries and lines, by task. wanted: of which tasks; None: all."""
        entries: dict[str, dict[str, Any]] = {}
        lines: dict[str, Sequence[Line]] = {}
        for one in self.wanted if wanted is None else wanted:
            if one.task is None:
                entries[one.name] = self._kl()
            else:
                if isinstance(one.task, HarnessTask):
                    lines[one.name], outcome = one.task.run(own, one.items)
                else:
                    lines[one.name], outcome = own.run(one.task, one.items)
                entries[one.name] = entry(outcome)
        own.let_go()
        return entries, lines

    def versions_of(self, wanted: Iterable[Wanted]) -> dict[str, str]:
        """What must be the same of each task for a run to go on."""
        return {own.name: own.task.version if own.task else self._kl_version for own in wanted}

    @property
    def _kl_version(self) -> str:
        assert self.read is not None and self.against is not None, "prepared has them for kl"
        return f"{self.read.version}, against {fingerprint(self.against.checkpoint)[:12]}"

    def _kl(self) -> dict[str, Any]:
        """The entry of kl, measured now or before."""
        own, other, read = self.subject, self.against, self.read
        assert read is not None and other is not None, "prepared has them for kl"
        model = Layerwise(own.checkpoint, own.dtype, kv=own.kv, adapter=next(iter(own.adapters.listed), None))
        found = figures(measure(
            model, Layerwise(other.checkpoint, other.dtype), read, own.folder.log(KL),
            lambda done, total: own.watch(f"{KL}: measuring {own.name}", PARTS * done // total, PARTS, "%"),
        ))  # fmt: skip
        seconds = round(own.folder.log(KL).seconds, 3)
        return {
            **found, "n": found["sequences"], "tokens": read.count, "seconds": seconds,
            "text": read.name, "versions": versions() | {"task": self._kl_version},
            "settings": own.loaded(), "published": None,
        }  # fmt: skip
