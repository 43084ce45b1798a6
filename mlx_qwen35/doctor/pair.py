"""mlx_qwen35.doctor --pair HOST: whether several machines can run a model together, before any weights are read."""

import argparse
import platform
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.budget.plan import in_gb
from mlx_qwen35.checkpoint.adapter_choice import Chosen, choose
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.checkpoint.hub import is_local, look
from mlx_qwen35.checkpoint.names import TEXT
from mlx_qwen35.checkpoint.random import geometry, write_headers
from mlx_qwen35.console.options import given_options
from mlx_qwen35.console.progress import Step
from mlx_qwen35.convert.planned import planned
from mlx_qwen35.convert.recipes import StorageOptions
from mlx_qwen35.distributed.hosts import HERE
from mlx_qwen35.distributed.opening import described
from mlx_qwen35.distributed.ranks import join, leave
from mlx_qwen35.distributed.survey import Question, Surveyed, survey
from mlx_qwen35.doctor.pair_ways import Found, Way, advised, ways
from mlx_qwen35.load import LoadOptions, choose_dtype
from mlx_qwen35.machine.memory import limit_of

SAMPLE = "the 4B in 4 bit"  # in the place of a model that is not given
SLOW = 2e-3  # seconds of a round trip, from which on the link is not a cable's
_MATRIX = f"{TEXT}layers.0.mlp.gate_proj.weight"


@dataclass(frozen=True)
class Paired:
    """All that was found. hosts: of every rank, rank 0's first. words: as --pair named the others. backend: that joined
    them. width: of a hidden state, in `dtype`. given: options of `load`.

    model: its name, or None for SAMPLE. folder: where rank 0 has it, None for an id. reasons: why the machines cannot
    run a model together; empty: they can.
    """

    hosts: Sequence[str]
    words: Sequence[str]
    backend: str
    surveyed: Surveyed
    model: str | None
    folder: Path | None
    dtype: str
    width: int
    ways: Sequence[Way]
    given: Mapping[str, object]

    @property
    def advised(self) -> Way | None:
        return advised(self.ways, self.backend)

    @property
    def reasons(self) -> list[str]:
        found = [*_different_versions(self), *self._missing()]
        if self.advised is None:
            found += [f"no way fits: {way.fault}" for way in self.ways[1:]]
        return found

    def _missing(self) -> Iterator[str]:
        """Machines that have another model, or none, and how they get it."""
        own = self.surveyed.facts[0]
        for rank, (host, facts) in enumerate(zip(self.hosts, self.surveyed.facts, strict=True)):
            if self.model is None:
                return
            if facts.fingerprint is None:
                yield f"{host} does not have the model: {facts.fault}. Get it by: {self.copying(rank)}"
            elif own.fingerprint and facts.fingerprint != own.fingerprint:
                yield (
                    f"{host} has another model under this name, with fingerprint {facts.fingerprint[:12]} and not "
                    f"{own.fingerprint[:12]}. Copy it: {self.copying(rank)}"
                )

    def copying(self, rank: int) -> str:
        """The command that brings the model to a rank's machine."""
        host = self.hosts[rank]
        if self.folder is None:
            revision = self.given.get("revision")
            download = ["hf", "download", str(self.model), *(["--revision", str(revision)] if revision else [])]
            return shlex.join([*(["ssh", host] if rank else []), *download])
        return shlex.join(["rsync", "-aL", f"{self.folder}/", f"{host}:{self.folder}/"])

    @property
    def warnings(self) -> list[str]:
        """What makes a pair slow."""
        return [*_of_link(self), *_of_memory(self)]


def _different_versions(paired: Paired) -> Iterator[str]:
    own, *others = paired.surveyed.facts
    for host, facts in zip(paired.hosts[1:], others, strict=True):
        for name in ("mlx-qwen35", "mlx"):
            if facts.versions[name] != own.versions[name]:
                yield (
                    f"{name} must be the same everywhere: {own.versions[name]} here, {facts.versions[name]} on {host}. "
                    f"Install {name} {own.versions[name]} there"
                )
        if facts.device != own.device:
            yield f"MLX must compute on one kind of processor: {own.device} here, {facts.device} on {host}"


def _of_link(paired: Paired) -> Iterator[str]:
    trip, hosts = paired.surveyed.round_trip.median, paired.hosts
    if trip > SLOW:
        yield (
            f"a round trip takes {1000 * trip:.1f} ms, as over Wi-Fi. Join the machines by a Thunderbolt or Ethernet "
            "cable, and name them by the address of that"
        )
    if len(set(hosts)) < len(hosts):
        yield "ranks on one machine share its memory and its speed: this is a trial, and gains nothing"
    if paired.backend == "ring" and not any(own.backends["jaccl"] for own in paired.surveyed.facts):
        yield (
            "the machines were joined by the ring, and could be by jaccl (RDMA), whose sums are faster. "
            "mlx.distributed_config writes the file of hosts that it needs; --pair and --with take that"
        )


def _of_memory(paired: Paired) -> Iterator[str]:
    plans = paired.advised.split.plans if paired.advised and paired.advised.split else ()
    for host in dict.fromkeys(paired.hosts):
        facts = paired.surveyed.facts[paired.hosts.index(host)]
        need = sum(plan.weights for plan in plans if plan.machine.name.startswith(host))
        if facts.short:
            yield f"memory is short on {host} now: close other programs there, or it will swap"
        elif facts.available is not None and need > facts.available:
            yield (
                f"{host} would swap: weights take {in_gb(need)} there, and {in_gb(facts.available)} are free now. "
                "Close other programs"
            )


# --- asking ----------------------------------------------------------------------------------------------------------


def pair(args: argparse.Namespace) -> Paired:
    """Start a process on each of the machines, ask and measure, and end them.

    Raises InputError peer_unreachable, which names a machine that cannot take part, and what `load` raises of headers.
    """
    given = given_options(args, [LoadOptions])
    options = LoadOptions(**given)
    checkpoint, adapters = _checkpoint(args, options)
    text, dtype = checkpoint.config.text, choose_dtype(checkpoint, options.dtype)
    places, revision = [], None
    if args.model:
        told = described(options, checkpoint, adapters)
        places, revision = told["model"], told["revision"]
    how = checkpoint.quantization(_MATRIX)
    question = Question(
        tuple(places), revision, dtype_name(dtype), text.head_dim, text.hidden_size,
        (how.group_size, how.bits, how.mode) if how else None,
    )  # fmt: skip
    with Step(f"starting {', '.join(args.pair)}"):
        ranks = join(args.pair)
    try:
        with Step("asking and measuring"):
            surveyed = survey(ranks.group, ranks.leader, question)
    except BaseException as error:
        leave(error)
        raise
    leave()
    names = _names(ranks.hosts)
    limit, kv = limit_of(options.memory_limit), options.kv_format(text.head_dim)
    found = ways(Found(checkpoint, surveyed, names, dtype, kv, limit, args.model or SAMPLE, adapters.listed))
    folder = checkpoint.folder.absolute() if args.model and is_local(args.model, args.revision) else None
    return Paired(
        names, args.pair, ranks.place.backend, surveyed, args.model, folder, dtype_name(dtype), text.hidden_size,
        found, given,
    )  # fmt: skip


def _names(hosts: Sequence[str]) -> list[str]:
    """Of each rank's machine; the same for ranks on this one."""
    here = {HERE, hosts[0], platform.node()}
    return ["this machine" if host in here else host for host in hosts]


def _checkpoint(args: argparse.Namespace, options: LoadOptions) -> tuple[Checkpoint, Chosen]:
    """The headers of --model with its adapters, or of SAMPLE."""
    if not args.model:
        with tempfile.TemporaryDirectory(prefix="mlx_qwen35-pair-") as name:
            source = write_headers(Path(name) / "4b", geometry("4b"))
            return planned(source, StorageOptions("4bit")), Chosen()
    with Step(f"reading the headers of {args.model}"), look(args.model, args.revision) as folder:
        checkpoint = open_checkpoint(folder, rope_scaling=args.rope_scaling)
        adapters = choose(options.adapter, options.adapter_scale, checkpoint, is_local(args.model, args.revision))
        return checkpoint.replacing(adapters.whole), adapters
