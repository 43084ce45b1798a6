"""One conversion: what is asked for, and the steps from the source to the folder."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint, repeats_embedding
from mlx_qwen35.checkpoint.converted import owned
from mlx_qwen35.checkpoint.hub import is_local, published, resolve
from mlx_qwen35.checkpoint.names import MTP
from mlx_qwen35.console.streams import read_file
from mlx_qwen35.convert.apart import Reads
from mlx_qwen35.convert.calibrate import statistics
from mlx_qwen35.convert.card import Facts, write_card
from mlx_qwen35.convert.evaluate import evaluate
from mlx_qwen35.convert.files import find_license
from mlx_qwen35.convert.float16 import takes_float16
from mlx_qwen35.convert.fusion import NO_ADAPTER, AdapterOptions
from mlx_qwen35.convert.journal import replaces
from mlx_qwen35.convert.plan import ConversionPlan, make_plan
from mlx_qwen35.convert.progress import Told
from mlx_qwen35.convert.recipes import DEFAULT, NO_OPTIONS, StorageOptions, find_recipe, names_file
from mlx_qwen35.convert.source import check_readable, reading
from mlx_qwen35.convert.space import check_space
from mlx_qwen35.convert.stream import write
from mlx_qwen35.convert.supply import Downloads, Supply
from mlx_qwen35.convert.target import appearing_whole, check_target, prepare, telling
from mlx_qwen35.errors import InputError
from mlx_qwen35.measure.text import windows


def accept(plan: ConversionPlan) -> None:
    """Every plan is carried out."""


@dataclass(frozen=True)
class Conversion:
    """What is asked for, as `convert` takes it.

    tell: see `Downloads`. judge: called with the plan before any weights are downloaded; raises InputError to prevent
    that.
    """

    name: str | Path
    target: Path
    options: StorageOptions
    tell: Told
    calibration: str | Path | None = None
    evaluation: str | Path | None = None
    verify: bool = True
    resume: bool = False
    revision: str | None = None
    overwrite: bool = False
    judge: Callable[[ConversionPlan], None] = accept
    adapter: AdapterOptions = NO_ADAPTER

    def run(self) -> None:
        if replaces(self.target) is None:  # else an earlier conversion must be brought to its end first
            check_target(self.target, self.overwrite)
        with self._source() as (source, supply):
            self._convert(source, supply)

    # --- the source --------------------------------------------------------------------------------------------------

    @contextmanager
    def _source(self) -> Iterator[tuple[Path, Supply]]:
        """The source's folder and where its weights come from.

        What is not in huggingface_hub's cache is downloaded a file at a time, but whole where it is read twice.
        """
        twice = self.calibration is not None or self.evaluation is not None
        found = None if twice or is_local(self.name, self.revision) else published(str(self.name), self.revision)
        if found is not None and not isinstance(found, Path):
            with telling(self.target), owned(self.target) as place:
                supply = Downloads(found, place, self.tell)
                source = supply.prepare(lambda headers: self._judge(headers, supply))
                if not self._reads_twice(source):
                    yield source, supply
                    shutil.rmtree(place)
                    return
                shutil.rmtree(place)
        source = found if isinstance(found, Path) else resolve(self.name, self.revision, self._judge)
        yield source, Supply("" if is_local(self.name, self.revision) else source.name)

    def _judge(self, headers: Path, supply: Downloads | None = None) -> None:
        """InputError where the headers show that a conversion could not be written."""
        plan = self._foreseen(headers)
        self.judge(plan)
        check_space(plan.nbytes, self.target, supply.most_bytes(plan) if supply else 0)

    def _reads_twice(self, headers: Path) -> bool:
        """Whether weights are compared, or looked at, before they are converted."""
        jobs = self._foreseen(headers).jobs
        return repeats_embedding(headers) or any(takes_float16(job) or job.source.is_table_of_adapter for job in jobs)

    def _foreseen(self, headers: Path) -> ConversionPlan:
        """The plan by the headers, to which a table that an adapter repeats looks like another; without a scale."""
        unscaled = replace(self.adapter, adapter_scale=1.0)
        with warnings.catch_warnings(action="ignore"):  # they come with the plan that is carried out
            return make_plan(headers, with_default(headers, self.options), unscaled)

    # --- the steps ---------------------------------------------------------------------------------------------------

    def _convert(self, source: Path, supply: Supply) -> None:
        named = [self.calibration, self.evaluation, self.options.recipe if names_file(self.options.recipe) else None]
        files = tuple(Path(os.path.expanduser(file)) for file in named if file is not None)
        reads = Reads((source, *self.adapter.folders), files)
        prepare(self.target, self.overwrite, reads)
        with reading(source):
            options = with_default(source, self.options)
            plan = make_plan(source, options, self.adapter)
            check_readable(plan.sources)
            license = find_license(source)
        self.judge(plan)
        if self.calibration is not None:
            plan = replace(plan, statistics=self._statistics(source, plan))
        if self.evaluation is not None:
            original = open_checkpoint(source, rope_scaling=options.rope_scaling)
            adapter = self.adapter.read(original)
            text = windows(original, read_file("--eval", Path(self.evaluation)))
        with appearing_whole(self.target, self.overwrite, self.resume, reads, keeps=not supply.stays) as folder:
            check_space(plan.nbytes, self.target, supply.most_bytes(plan))
            report = write(plan, folder, verify=self.verify, supply=supply)
            facts = Facts(
                name=self.target.name,
                source=str(self.name).encode(errors="replace").decode(),
                commit=supply.commit,
                recipe=_recipe_name(options),
                reasons=find_recipe(options.recipe).reasons if options.recipe else (),
                rounding=options.rounding,
                errors=report.errors,
                license=license,
                adapter=plan.adapter,
            )
            if self.evaluation is not None:
                found = evaluate(original, open_checkpoint(folder), text, adapter=adapter)
                facts = replace(facts, evaluation=found, text=Path(self.evaluation).name)
            write_card(folder, facts)

    def _statistics(self, source: Path, plan: ConversionPlan) -> Mapping[str, np.ndarray]:
        """The importance of the input columns on the text of --calibration, see ConversionPlan."""
        assert self.calibration is not None
        if self.options.rounding != "search" or not any(job.quantization for job in plan.jobs):
            raise InputError(
                "option_no_effect",
                "--calibration weighs the errors of a search: it has no effect where nothing is quantized, or with "
                "--rounding nearest. Leave it out",
            )
        checkpoint = open_checkpoint(source, rope_scaling=self.options.rope_scaling)
        text = windows(checkpoint, read_file("--calibration", Path(self.calibration)))
        return statistics(checkpoint, text, self.adapter.read(checkpoint))


def with_default(source: Path, options: StorageOptions) -> StorageOptions:
    """The options with the default recipe, where they choose no quantization and the source is not quantized.

    A text model in FP8, or a quantized draft head alone, makes no quantized source.
    """
    if replace(options, q_vision_bits=None, dtype=None, rope_scaling=None, rounding=NO_OPTIONS.rounding) != NO_OPTIONS:
        return options
    checkpoint = open_checkpoint(source, fp8=True, rope_scaling=options.rope_scaling)
    quantized = any(checkpoint.quantization(name) for name in checkpoint.entries if not name.startswith(MTP))
    return options if quantized else replace(options, recipe=DEFAULT)


def _recipe_name(options: StorageOptions) -> str:
    """The recipe in the card's words."""
    if options.recipe:
        return Path(options.recipe).name
    if not options.quantize:
        return "as in the source"
    given = {"bits": options.q_bits, "group size": options.q_group_size, "mode": options.q_mode}
    return ", ".join(["quantized alike by hand", *(f"{name} {value}" for name, value in given.items() if value)])
