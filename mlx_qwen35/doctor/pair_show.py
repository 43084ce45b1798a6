"""What --pair has found, as sections of text and as JSON. The keys of the JSON are stable (docs/two_macs.md); sizes are
in bytes, times in seconds.
"""

from dataclasses import asdict
from typing import Any

from mlx_qwen35.budget.split_speed import rate_of
from mlx_qwen35.budget.splitting import PIPELINE, split_of
from mlx_qwen35.console.table import size
from mlx_qwen35.distributed.survey import Facts as Asked
from mlx_qwen35.distributed.survey import Times
from mlx_qwen35.doctor.advice import LOADING, command, speed
from mlx_qwen35.doctor.facts import Facts
from mlx_qwen35.doctor.pair import SAMPLE, Paired
from mlx_qwen35.doctor.pair_ways import CONTEXT, ONE, Way, chip_of, milliseconds, reason


def sections(paired: Paired) -> dict[str, Facts]:
    """Section -> facts, the verdict first."""
    found = {"verdict": _verdict(paired)}
    for rank, (host, facts) in enumerate(zip(paired.hosts, paired.surveyed.facts, strict=True)):
        found[f"rank {rank}, {host}"] = _machine(facts, paired)
    return found | {
        f"link, over {paired.backend}": _link(paired),
        f"computed for {paired.model or SAMPLE}, a token at {CONTEXT:,} tokens of context": {
            way.name: _way(way) for way in paired.ways
        },
    }


def _verdict(paired: Paired) -> Facts:
    reasons, way = paired.reasons, paired.advised
    count = len(paired.hosts)
    if reasons:
        found = {"state": f"These {count} machines cannot run {paired.model or SAMPLE} together:"}
        found |= {f"reason {number}": f"{text}." for number, text in enumerate(reasons, 1)}
    else:
        assert way
        found = {
            "state": f"All is well: {count} ranks are joined by {paired.backend}.",
            "advice": reason(way, paired.ways),
        }
        found |= {"command": text} if (text := advised_command(paired)) else {}
    return found | {f"warning {number}": f"{text}." for number, text in enumerate(paired.warnings, 1)}


def advised_command(paired: Paired) -> str:
    """The command that runs the model as is advised; "" without a model."""
    way = paired.advised
    if paired.model is None or way is None:
        return ""
    split = {} if way.name == ONE else {"with": ",".join(paired.words)}
    if way.name not in (ONE, split_of(paired.backend)):
        split["split"] = way.name
    return command(paired.given, ("chat", "--model", paired.model), LOADING, **split)


def _machine(facts: Asked, paired: Paired) -> Facts:
    lacks = [f"not {name}: {why}" for name, why in facts.backends.items() if why]
    can = [name for name, why in facts.backends.items() if not why]
    chip = chip_of(facts)
    rate = f"{rate_of(chip) / 1e9:.0f} GB/s, computed" if chip else f"{(facts.rate or 0) / 1e9:.1f} GB/s, measured"
    found = {
        "chip": facts.chip,
        "memory": f"{size(facts.memory)}, of which a model may use {size(facts.limit)}"
        + ("" if facts.available is None else f"; {size(facts.available)} are free now"),
        "system": facts.system,
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        "can be joined by": "; ".join([", ".join(can) or "nothing", *lacks]),
        "reads weights at": rate,
    }
    if paired.model:
        found["model"] = facts.fault if facts.fingerprint is None else f"fingerprint {facts.fingerprint[:12]}"
    return found


def _link(paired: Paired) -> Facts:
    found, count = paired.surveyed, len(paired.hosts)
    each = [f"{rate / 1e6:,.0f} MB/s from rank {n} to rank {(n + 1) % count}" for n, rate in enumerate(found.bandwidth)]
    return {
        "round trip of an order": _times(found.round_trip),
        f"sum of a row of {paired.width:,} {paired.dtype}": _times(found.all_sum),
        "bandwidth": ", ".join(each),
    }


def _times(times: Times) -> str:
    median, best, late = map(milliseconds, (times.median, times.best, times.late))
    return f"{median} at the median, {best} at best, {late} at the 95th percentile"


def _way(way: Way) -> str:
    if way.split is None:
        return f"no: {way.fault}"
    layers = " + ".join(str(len(own)) for own in way.split.layers)
    held = " and ".join(f"{size(plan.image)} of {size(plan.machine.limit)}" for plan in way.split.plans)
    split = f" {layers} layers," if way.name == PIPELINE else ""
    split = f" on {way.split.plans[0].machine.name}," if way.name == ONE else split
    longest = f"up to {way.split.context:,} tokens, which take {held}"
    return f"{milliseconds(way.seconds)} ({speed(1 / way.seconds)} tokens/s),{split} {longest}"


def as_json(paired: Paired) -> dict[str, Any]:
    way, reasons = paired.advised, paired.reasons
    return {
        "ready": not reasons,
        "reasons": reasons,
        "warnings": paired.warnings,
        "advised": None if way is None else {
            "way": way.name, "text": reason(way, paired.ways), "command": advised_command(paired) or None,
        },
        "model": paired.model,
        "backend": paired.backend,
        "machines": [
            {"host": host, **asdict(facts)} for host, facts in zip(paired.hosts, paired.surveyed.facts, strict=True)
        ],
        "round_trip": asdict(paired.surveyed.round_trip),
        "all_sum": {**asdict(paired.surveyed.all_sum), "width": paired.width, "dtype": paired.dtype},
        "bandwidth": list(paired.surveyed.bandwidth),
        "context": CONTEXT,
        "ways": [_way_as_json(way) for way in paired.ways],
    }  # fmt: skip


def _way_as_json(way: Way) -> dict[str, Any]:
    split = way.split
    return {
        "way": way.name, "fits": split is not None, "why_not": way.fault or None,
        "seconds": way.seconds if split else None,
        "machines": [plan.machine.name for plan in split.plans] if split else None,
        "layers": [[own.start, own.stop] for own in split.layers] if split else None,
        "longest_context": split.context if split else 0,
        "bytes": [plan.image for plan in split.plans] if split else None,
        "weights": [plan.weights for plan in split.plans] if split else None,
    }  # fmt: skip
