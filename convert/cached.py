"""Conversions of repositories that are kept and found again: what one would take, making one, finding the right one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.converted import Converted, converted, folder_of, hidden
from mlx_qwen35.checkpoint.hub import is_local, look
from mlx_qwen35.convert.conversion import Conversion, with_default
from mlx_qwen35.convert.plan import ConversionPlan, make_plan
from mlx_qwen35.convert.progress import Told
from mlx_qwen35.convert.recipes import DEFAULT, RECIPES, StorageOptions
from mlx_qwen35.convert.supply import files_of, most_bytes
from mlx_qwen35.convert.target import telling
from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled
from mlx_qwen35.values import choice

KEPT = tuple(name for name, recipe in RECIPES.items() if recipe.bulk)  # recipes that make a model smaller


def ignore(done: int, total: int, left: float | None) -> None:
    """Nothing is told."""


def convert_cached(
    name: str, recipe: str = DEFAULT, revision: str | None = None, progress: Told = ignore
) -> Path:
    """Convert a repository of the Hugging Face hub while it is downloaded, and keep the result; return its folder.

    A conversion that is there is used, without the network, whatever has been published since. One that was broken off
    goes on: nothing that was downloaded or converted is downloaded again. The disk needs room for the result and the
    largest file of the source. A source that is whole in huggingface_hub's cache is read there.

    name: an id, such as Qwen/Qwen3.5-4B. recipe: "4bit", "5bit", "6bit", "8bit", "mxfp4" or "nvfp4". revision: a
    branch, tag or commit; each has a conversion of its own. progress: called with the bytes that are done, all bytes,
    and the seconds that are left, None where they are not known yet.
    Raises InputError when a rule is broken; before anything is downloaded wherever the headers show it.
    """
    choice(spelled("recipe"), recipe, KEPT)
    if is_local(name, revision):
        raise InputError(
            "option_no_effect",
            f"{spelled('recipe')} converts what is on the Hugging Face hub; {name} is local. Leave it out, or convert "
            f"it to a folder: mlx_qwen35.convert --hf-path {name} --mlx-path FOLDER --recipe {recipe}",
        )
    if found := kept(name, recipe, revision):
        return found.folder
    folder = folder_of(name, recipe, revision)
    with telling(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)

    def conversion(resume: bool) -> Conversion:
        return Conversion(
            name, folder, StorageOptions(recipe), progress, resume=resume, revision=revision,
            judge=lambda plan: refuse_quantized(plan, name),
        )  # fmt: skip

    try:
        conversion(resume=hidden(folder)[0].is_dir()).run()
    except InputError as error:
        if error.code not in ("resume_differs", "journal_damaged"):
            raise
        conversion(resume=False).run()
    return folder


def kept(name: str, recipe: str, revision: str | None = None) -> Converted | None:
    """The finished conversion by a recipe; a revision may also be the commit of another one's source."""
    found = [one for one in converted(name) if one.recipe == recipe]
    same = [one for one in found if one.revision == revision]
    return next(iter(same or [one for one in found if revision and one.commit == revision]), None)


def refuse_quantized(plan: ConversionPlan, name: str) -> None:
    """InputError where the source is quantized already, which another conversion would do on top. FP8 is accepted."""
    sources = {str(job.source.quantization) for job in plan.jobs if job.source.quantization}
    if sources:
        raise InputError(
            "source_quantized",
            f"{spelled('recipe')} needs a repository of unquantized weights; {name} is quantized already "
            f"({', '.join(sorted(sources))}). Leave it out, or give the original's id",
        )


# --- before it is made -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prospect:
    """What a conversion would take. checkpoint: the result's headers, in a folder that is gone after the block.

    download, disk: bytes of the source, and of the result; most: of the disk while it is made.
    """

    checkpoint: Checkpoint
    download: int
    disk: int
    most: int


@contextmanager
def prospect(name: str, recipe: str, revision: str | None = None) -> Iterator[Prospect]:
    """What a conversion would take, by the headers of the source."""
    with (
        look(name, revision) as headers,
        warnings.catch_warnings(action="ignore"),  # they come with the plan that is carried out
        TemporaryDirectory(prefix="mlx_qwen35-planned-") as place,
    ):
        plan = make_plan(headers, with_default(headers, StorageOptions(recipe)))
        refuse_quantized(plan, name)
        files = {part.file for job in plan.jobs for part in job.source.parts}
        folder = plan.write_headers(Path(place))
        cached = headers.parent.name == "snapshots"  # whole in huggingface_hub's cache, where it is read
        download = 0 if cached else sum(file.stat().st_size for file in files)
        most = plan.nbytes + (0 if cached else most_bytes(map(files_of, plan.jobs)))
        yield Prospect(open_checkpoint(folder), download, plan.nbytes, most)
