"""An adapter's tensors against the model that it is for: names, shapes, dtypes, and nothing in halves."""

import math

from mlx_qwen35.checkpoint.adapter_parts import BASE, MAGNITUDE, WHOLE, A, B, Parts, invalid
from mlx_qwen35.checkpoint.adapter_peft import DRAFT_HEAD
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.folder import shorten, trained_on
from mlx_qwen35.checkpoint.names import HEAD, MTP, TABLE, VISION
from mlx_qwen35.checkpoint.shapes import Shapes, is_matrix, mtp_shapes, text_shapes, vision_shapes
from mlx_qwen35.checkpoint.tensors import FLOATS, same_numbers
from mlx_qwen35.errors import InputError


def _expected(parts: Parts, checkpoint: Checkpoint) -> Shapes:
    """The shapes of every tensor that an adapter may be for. InputError where a part of the model is absent."""
    config = checkpoint.config
    shapes = text_shapes(config.text)
    shapes[HEAD] = shapes[TABLE]  # also of a tied head
    names = [name for name, _ in parts.tensors]
    if config.vision and checkpoint.has(VISION):
        shapes |= vision_shapes(config.vision)
    elif of_vision := [name for name in names if name.startswith(VISION)]:
        raise InputError(
            "vision_missing",
            f"the adapter {parts.folder} is for a model that reads images ({shorten(of_vision, 2)}), and "
            f"{checkpoint.folder} has no vision encoder. Load it with a checkpoint that has one",
        )
    if config.text.mtp_num_hidden_layers and checkpoint.has(MTP):
        shapes |= mtp_shapes(config.text)
    elif of_head := [name for name in names if name.startswith(MTP)]:
        fault = checkpoint.mtp_head_fault or f"{checkpoint.folder} has no draft head"
        raise InputError(
            "draft_head_missing",
            f"the adapter {parts.folder} is for a draft head too ({shorten(of_head, 2)}), and {fault}. Load it with a "
            f"checkpoint that has one, or take {DRAFT_HEAD} out of its folder",
        )
    return shapes


def check_names(parts: Parts, checkpoint: Checkpoint) -> None:
    """InputError for tensors that the checkpoint does not have, and for what cannot have a low-rank part."""
    shapes, tensors = _expected(parts, checkpoint), parts.tensors
    if unknown := [stored.entry.stored_name for (name, _), stored in tensors.items() if name not in shapes]:
        raise _mismatch(parts, checkpoint, f"{len(unknown)} of its tensors are of no known name: {shorten(unknown, 4)}")
    if odd := [name for (name, kind) in tensors if kind != WHOLE and not _is_map(name, shapes[name])]:
        raise InputError(
            "adapter_unsupported",
            f"low-rank parts must be of linear layers, the patch embedding or the table of tokens; the adapter "
            f"{parts.folder} has some of {shorten(odd, 4)}. Merge it with the program that made it",
        )
    if (TABLE, MAGNITUDE) in tensors and not parts.mlx:
        raise InputError(
            "adapter_unsupported",
            f"the adapter {parts.folder} scales the columns of the table of tokens (DoRA as PEFT has it), which is not "
            "run. Merge it with PEFT",
        )
    for (name, kind), stored in tensors.items():
        entry = stored.entry
        if entry.dtype not in FLOATS:
            raise InputError(
                "dtype_unsupported",
                f"an adapter must be of floating point numbers; {entry.stored_name} of {parts.folder} is {entry.dtype}",
            )
        wanted, shape = _stored_shape(parts, name, kind, shapes[name]), entry.shape
        if shape == wanted:
            continue
        told = f"{entry.stored_name} is {list(shape)} and would have to be {list(wanted)}"
        axis = (kind == B) != stored.transposed  # of the rank
        if kind in (A, B) and (*shape[:axis], *shape[axis + 1 :]) == (*wanted[:axis], *wanted[axis + 1 :]):
            raise invalid(parts.folder, f"{told}, for its configuration says rank {parts.declared[name].rank}")
        raise _mismatch(parts, checkpoint, told)


def _is_map(name: str, shape: tuple[int, ...]) -> bool:
    return is_matrix(name, shape) or name.endswith("patch_embed.proj.weight")


def _stored_shape(parts: Parts, name: str, kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of the adapter has to have in its file, where the weight is of `shape`."""
    stored = parts.tensors[name, kind]
    if kind in (WHOLE, BASE):
        if not parts.mlx or len(shape) < 3:
            return shape
        return (shape[0], *shape[2:], shape[1])  # convolutions
    if kind == MAGNITUDE:
        return shape[:1]
    rank = parts.declared[name].rank
    if len(shape) > 2 and not parts.mlx:  # of a convolution, a convolution too
        return (rank, *shape[1:]) if kind == A else (shape[0], rank, *(1,) * (len(shape) - 2))
    wanted = (rank, math.prod(shape[1:])) if kind == A else (shape[0], rank)
    return wanted[::-1] if stored.transposed else wanted


def _mismatch(parts: Parts, checkpoint: Checkpoint, fault: str) -> InputError:
    return InputError(
        "adapter_mismatch",
        f"the adapter {parts.folder} does not fit {checkpoint.folder}: {fault}",
        f"Load it with the model that it was trained on{trained_on(parts.folder)}",
    )


def check_complete(parts: Parts) -> None:
    """InputError for halves: A without B, B without A, magnitudes without both, or a whole tensor beside them."""
    for name, kind in parts.tensors:
        partner = {A: B, B: A, MAGNITUDE: A}.get(kind)
        if partner and (name, partner) not in parts.tensors:
            raise invalid(parts.folder, f"it has {kind} and no {partner} of {name}")
        if kind == WHOLE and any((name, other) in parts.tensors for other in (A, BASE)):
            raise invalid(parts.folder, f"it has {name} whole and a low-rank part of it")
        if kind == A and not name.startswith(MTP) and parts.dora != ((name, MAGNITUDE) in parts.tensors):
            has = "no magnitude" if parts.dora else "a magnitude"
            raise invalid(parts.folder, f"it has {has} of {name}, and its configuration says otherwise (DoRA)")


def leaves_head(parts: Parts, checkpoint: Checkpoint) -> bool:
    """Whether the table of tokens was trained whole, and the head that was tied to it stayed: as PEFT trains it."""
    tied = checkpoint.config.text.tie_word_embeddings and not parts.mlx
    if not tied or (TABLE, WHOLE) not in parts.tensors or (HEAD, WHOLE) in parts.tensors:
        return False
    if checkpoint.quantization(TABLE):
        raise InputError(
            "adapter_unsupported",
            f"the adapter {parts.folder} has a table of tokens of its own, beside a head that is tied to the model's "
            f"table, which is quantized in {checkpoint.folder}",
            "Load it with the unquantized model, or fuse it with that: mlx_qwen35.convert --adapter",
        )
    return True


def drop_bases(parts: Parts, checkpoint: Checkpoint) -> None:
    """Take out the tables that are the checkpoint's own, and a tied head that repeats a whole table. Tables that differ
    take the checkpoint's place.
    """
    tied = checkpoint.config.text.tie_word_embeddings
    for name in [name for name, kind in parts.tensors if kind == BASE]:
        stored = parts.tensors.pop((name, BASE))
        name = TABLE if tied else name
        if same_numbers(stored.entry, checkpoint.entries[name]):
            continue
        other = parts.tensors.setdefault((name, WHOLE), stored)
        if other is not stored and not same_numbers(stored.entry, other.entry):
            raise invalid(parts.folder, "its tables of tokens differ, and the model has one for table and head")
    both = [parts.tensors.get((name, WHOLE)) for name in (TABLE, HEAD)]
    if tied and both[0] and both[1] and same_numbers(both[0].entry, both[1].entry):
        del parts.tensors[HEAD, WHOLE]
