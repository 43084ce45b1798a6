"""What transformers and PEFT find as gradients of the low-rank parts of every map of a random checkpoint.

    python tests/gradient_cases.py

writes gradient_cases.npz; it needs torch, transformers 5.23 and peft 0.21. Of each gradient it holds the largest
magnitude, SAMPLES of its elements, and its products with PROJECTIONS arrays of noise, which hang on every element.
"""

import functools
import itertools
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import mlx.core as mx
import numpy as np
from parity import cases

from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.checkpoint.config import FULL, LINEAR, parse_config
from mlx_qwen35.checkpoint.names import HEAD, TEXT
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.checkpoint.shapes import is_matrix, text_shapes
from mlx_qwen35.prompt.positions import Placeholder, positions
from mlx_qwen35.prompt.prompt import Placed
from mlx_qwen35.train.rows import Row

CASE = cases.Case("gradients", 23, {"tie_word_embeddings": False})
SMALL = cases.Case("small-gradients", 24, {  # one layer of each kind, and a head that is tied
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "layer_types": [LINEAR, FULL],
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 16, "vocab_size": 256,
    "rope_parameters": geometry("tiny")["text_config"]["rope_parameters"] | {
        "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2],
    },
})  # fmt: skip
GOLDEN = Path(__file__).with_suffix(".npz")
RANK, SCALE = 3, 1.5
SAMPLES, PROJECTIONS = 12, 3
TABLE = f"{TEXT}embed_tokens.weight"
IMAGES = (Placeholder(3, 2, 3), Placeholder(12, 3, 2))  # of the second row
Gradients = Mapping[str, tuple[np.ndarray, np.ndarray]]  # of A and of B, by the weight's name


def parameters(case: cases.Case = CASE) -> dict[str, Pair]:
    """A low-rank part for each map of the text model, the table of tokens and the LM head."""
    text = parse_config(case.config).text
    maps = {n: shape for n, shape in text_shapes(text).items() if is_matrix(n, shape)}
    maps[HEAD] = (text.vocab_size, text.hidden_size)
    made = {}
    for name, (out, width) in maps.items():
        a = cases.normal(case.seed, f"{name} A", (RANK, width)) / np.float32(width**0.5)
        b = cases.normal(case.seed, f"{name} B", (out, RANK)) * np.float32(0.05)
        made[name] = Pair(mx.array(a), mx.array(b), SCALE)
    return made


def rows(case: cases.Case = CASE) -> list[Row]:
    """A row of text, and a shorter one that shows two images. Some of the tokens are targets."""
    made = []
    for i, (count, shown) in enumerate(((36, ()), (24, IMAGES))):
        tokens, drawn = cases.tokens(case, count, f"row {i}"), cases.uniform(case.seed, f"row {i}", (count,)) < 0.6
        pads = {at for own in shown for at in range(own.start, own.stop)}
        targets = tuple(bool(drawn[at]) and at > 0 and at not in pads for at in range(count))
        media: Any = None
        made.append(Row(tuple(tokens.tolist()), targets, tuple(Placed(media, (own,)) for own in shown)))
    return made


def embeddings(case: cases.Case = CASE) -> list[np.ndarray]:
    """Of what each row shows, (n, D)."""
    width = case.config["text_config"]["hidden_size"]
    counts = [sum(p.stop - p.start for own in row.media for p in own.placeholders) for row in rows(case)]
    return [cases.normal(case.seed, f"embeddings {i}", (n, width)) for i, n in enumerate(counts)]


def summary(name: str, gradient: np.ndarray) -> np.ndarray:
    """(1 + SAMPLES + PROJECTIONS,) float32, of a gradient."""
    flat = gradient.astype(np.float64).reshape(-1)
    picked = flat[(cases.uniform(0, f"{name} places", (SAMPLES,)) * flat.size).astype(int)]
    noise = (cases.normal(i, f"{name} noise", flat.shape) for i in range(PROJECTIONS))
    products = [own.astype(np.float64) @ flat / flat.size**0.5 for own in noise]
    return np.array([np.abs(flat).max(), *picked, *products], np.float32)


def names(found: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Of each gradient: its name, the weight's, and 0 for A or 1 for B."""
    return [(f"{name} {'AB'[i]}", name, i) for name, i in itertools.product(found, (0, 1))]


@functools.cache
def golden() -> dict[str, np.ndarray]:
    """Summaries by name, and "loss": the sum over the targets."""
    with np.load(GOLDEN) as file:
        return dict(file)


def of_peft(folder: Path) -> tuple[float, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Loss and gradients by transformers and PEFT, each row by itself. folder: the checkpoint of CASE."""
    import torch
    from parity.reference import load_text_model
    from peft import LoraConfig, get_peft_model

    given = parameters()
    targets = sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in given})
    config = LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_text_model(CASE, folder), config)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, pair in given.items():
            for key, array in zip(_keys(name), _turned(name, np.array(pair.a), np.array(pair.b)), strict=True):
                own[key].copy_(torch.from_numpy(array.copy()))
    loss = sum((_loss(model, row, shown) for row, shown in zip(rows(), embeddings(), strict=True)), torch.zeros(()))
    loss.backward()
    found = {}
    for name in given:
        a, b = (own[key].grad.numpy() for key in _keys(name))
        found[name] = _turned(name, a, b)
    return float(loss.detach()), found


def _loss(model: Any, row: Row, shown: np.ndarray) -> Any:
    import torch

    ids = torch.tensor([row.tokens])
    x = model.get_input_embeddings()(ids)
    places = [p for placed in row.media for p in placed.placeholders]
    at = [column for p in places for column in range(p.start, p.stop)]
    if at:
        x = x.clone()
        x[0, at] = torch.from_numpy(shown)
    table = torch.from_numpy(positions(len(row.tokens), places).astype(np.int64))[:, None]
    logits = model(inputs_embeds=x, position_ids=table, use_cache=False).logits[0].double()
    wanted = [i for i, target in enumerate(row.targets) if target]
    return -torch.log_softmax(logits, -1)[[i - 1 for i in wanted], [row.tokens[i] for i in wanted]].sum()


def _keys(name: str) -> tuple[str, str]:
    path = f"base_model.model.{name}".replace(TEXT, "model.").removesuffix(".weight")
    kind = "embedding_" if name == TABLE else ""
    last = "" if name == TABLE else ".weight"
    return f"{path}.lora_{kind}A.default{last}", f"{path}.lora_{kind}B.default{last}"


def _turned(name: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A (r, V) and B (D, r) of the table of tokens are ours B and A, turned, and back."""
    return (b.T, a.T) if name == TABLE else (a, b)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        loss, found = of_peft(cases.write(CASE, Path(scratch) / "model"))
    summaries = {own: summary(own, found[name][i]) for own, name, i in names(found)}
    np.savez_compressed(GOLDEN, loss=np.array(loss), **summaries)
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size:,} bytes, loss {loss:.4f}")


if __name__ == "__main__":
    main()
