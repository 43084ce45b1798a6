"""What packing a group costs is what the model's logits say, and a proposal keeps to its cap."""

import mlx.core as mx
import numpy as np
import pytest
from geometries import changed
from refusing import refused

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.random import geometry, write_random_checkpoint
from mlx_qwen35.checkpoint.shapes import is_matrix, text_shapes
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.__main__ import main
from mlx_qwen35.convert.sensitivity import GroupCost, groups, propose, quantized_nbytes, sensitivity, table
from mlx_qwen35.convert.sensitivity_plot import draw
from mlx_qwen35.load import load_model
from mlx_qwen35.quantization import Quantization

TOKENS = [np.random.default_rng(i).integers(0, 1000, 12).tolist() for i in range(2)]
FOUR, NVFP4 = Quantization(64, 4, "affine"), Quantization(16, 4, "nvfp4")


@pytest.fixture(scope="module")
def rows(raw) -> list[GroupCost]:
    return sensitivity(open_checkpoint(raw), TOKENS, (FOUR,))


def row_of(rows: list[GroupCost], group: str, how: Quantization | None = FOUR) -> GroupCost:
    return next(row for row in rows if (row.group, row.quantization) == (group, how))


def rounded(array: mx.array, how: Quantization) -> mx.array:
    """A bfloat16 matrix as it comes back from being packed, in float32 arithmetic."""
    form = {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}
    parts = mx.quantize(array.astype(mx.bfloat16), **form)
    parts = [part.astype(mx.float32) if part.dtype == mx.bfloat16 else part for part in parts]
    return mx.dequantize(*parts, **form).astype(mx.float32)


def divergence(checkpoint, alter) -> float:
    """Mean KL from the model to the one that `alter` changes, over the positions that predict a token."""
    models = [load_model(checkpoint, mx.float32, "model") for _ in range(2)]
    alter(models[1])
    logits = [np.array(model(mx.array(TOKENS)))[:, :-1].astype(np.float64) for model in models]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    return (np.exp(p) * (p - q)).sum(-1).mean()


def test_every_matrix_of_the_text_is_in_one_group(raw):
    checkpoint = open_checkpoint(raw)
    matrices = [name for name, shape in text_shapes(checkpoint.config.text).items() if is_matrix(name, shape)]
    assert sorted(name for names in groups(checkpoint).values() for name in names) == sorted(matrices)


@pytest.mark.full
def test_divergence_of_a_group_is_that_of_its_matrices_alone(raw, rows):
    def alter(model):
        for layer in model.layers:
            layer.mlp.down_proj.weight = rounded(layer.mlp.down_proj.weight, FOUR)

    assert row_of(rows, "MLP down").kl == pytest.approx(divergence(open_checkpoint(raw), alter), abs=2e-6)


@pytest.mark.full
def test_a_tied_embedding_is_packed_on_the_way_in_and_out(raw, rows):
    def alter(model):
        model.embed_tokens.weight = rounded(model.embed_tokens.weight, FOUR)

    assert row_of(rows, "embedding, head").kl == pytest.approx(divergence(open_checkpoint(raw), alter), abs=2e-6)


@pytest.mark.full
def test_a_group_that_begins_in_a_later_layer_leaves_the_others_alone(raw):
    def alter(model):
        attention = model.layers[3].self_attn
        attention.o_proj.weight = rounded(attention.o_proj.weight, NVFP4)

    found = sensitivity(open_checkpoint(raw), TOKENS, (NVFP4,))
    expected = divergence(open_checkpoint(raw), alter)
    assert row_of(found, "attention o", NVFP4).kl == pytest.approx(expected, abs=2e-6)


@pytest.mark.full
def test_an_untied_head_is_of_the_embeddings_group(tmp_path):
    source = write_random_checkpoint(tmp_path, changed(geometry("tiny"), tie_word_embeddings=False))
    found = sensitivity(open_checkpoint(source), TOKENS, (FOUR,))
    row = row_of(found, "embedding, head")
    assert len(row.names) == 2 and row.kl > 0


@pytest.mark.full
def test_rows_tell_the_bytes_of_the_folder_written(raw, rows, tmp_path):
    out = open_checkpoint(convert(raw, tmp_path / "out", quantize=True))
    for row in rows:
        checkpoint = out if row.quantization else open_checkpoint(raw)
        stems = tuple(name.removesuffix("weight") for name in row.names)
        assert row.nbytes == sum(e.nbytes for name, e in checkpoint.entries.items() if name.startswith(stems))


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_bytes_of_a_packed_matrix_are_those_of_its_parts(mode):
    how = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    parts = mx.quantize(mx.ones((6, 64)), group_size=how[0], bits=how[1], mode=mode)
    assert quantized_nbytes((6, 64), Quantization(*how, mode), "BF16") == sum(part.nbytes for part in parts)


def test_the_source_comes_first_in_each_group_with_no_divergence(rows):
    assert [row.quantization for row in rows] == [None, FOUR] * (len(rows) // 2)
    assert all(row.kl == 0 and row.kl_error is None for row in rows[::2])
    assert all(row.kl > 0 and row.kl_error > 0 for row in rows[1::2])


def test_a_quantized_checkpoint_is_refused(raw, tmp_path):
    out = convert(raw, tmp_path / "out", quantize=True)
    with refused("source_quantized"):
        sensitivity(open_checkpoint(out), TOKENS)


def test_a_group_size_that_does_not_divide_is_refused(raw):
    with refused("quantization_unfit", "128", "448"):
        sensitivity(open_checkpoint(raw), TOKENS, (Quantization(128, 4, "affine"),))


# --- the recipe ------------------------------------------------------------------------------------------------------

EIGHT = Quantization(64, 8, "affine")


def forms(group: str, *of: tuple[Quantization | None, float, int]) -> list[GroupCost]:
    return [GroupCost(group, (f"{group}.weight",), how, nbytes, kl) for how, kl, nbytes in of]


ROWS = [
    *forms("a", (None, 0.0, 160), (FOUR, 0.9, 40), (EIGHT, 0.1, 80)),
    *forms("b", (None, 0.0, 320), (FOUR, 0.4, 80), (EIGHT, 0.1, 160)),
]


@pytest.mark.parametrize(
    ("cap", "chosen", "nbytes"),
    [
        (120, {"a": FOUR, "b": FOUR}, 120),
        (159, {"a": FOUR, "b": FOUR}, 120),
        (160, {"a": EIGHT, "b": FOUR}, 160),  # 0.8 for 40 bytes, before 0.3 for 80
        (240, {"a": EIGHT, "b": EIGHT}, 240),
        (319, {"a": EIGHT, "b": EIGHT}, 240),
        (320, {"a": None, "b": EIGHT}, 320),
        (1000, {"a": None, "b": None}, 480),
    ],
)
def test_a_proposal_takes_the_most_divergence_saved_for_a_byte(cap, chosen, nbytes):
    proposal = propose(ROWS, cap)
    assert proposal.matrices == {f"{group}.weight": how for group, how in chosen.items()}
    assert proposal.nbytes == nbytes
    assert proposal.kl == pytest.approx(sum(r.kl for r in ROWS if chosen[r.group] == r.quantization))


def test_other_bytes_count_against_the_cap():
    proposal = propose(ROWS, 200, other_bytes=40)
    assert proposal.nbytes == 200 and proposal.matrices["a.weight"] == EIGHT


def test_a_form_that_costs_more_and_gains_nothing_is_not_taken():
    assert propose(forms("a", (FOUR, 0.1, 40), (EIGHT, 0.2, 80)), 1000).nbytes == 40


def test_a_cap_below_the_smallest_forms_is_refused():
    with refused("option_invalid", "2", "1.9"):
        propose(forms("a", (FOUR, 0.1, 2_000_000_000)), 1_900_000_000)


def test_a_table_has_a_line_for_each_row_and_marks_what_is_taken():
    lines = table(ROWS, propose(ROWS, 160)).splitlines()
    assert lines[2:8][2] == "| a | 8 bit, groups of 64 | 0.00 | 100.000 |  | yes |"
    assert [line.endswith("yes |") for line in lines[2:8]] == [False, False, True, False, True, False]
    assert lines[-1] == "proposed: 0.000 GB, the groups' KL adds up to 5.00e-01 nats"
    assert len(table(ROWS).splitlines()) == 8


# --- the picture -----------------------------------------------------------------------------------------------------


def test_bars_are_the_divergence_of_each_group_the_most_expensive_on_top(tmp_path):
    pytest.importorskip("matplotlib")
    costs = [*forms("a", (None, 0, 400), (FOUR, 0.001, 100), (EIGHT, 0.0001, 200))]
    costs += forms("b", (None, 0, 4_000_000), (FOUR, 0.003, 100), (EIGHT, 0.0002, 200))
    figure = draw(tmp_path / "bars.png", "a model", "a note", costs)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["b, 4.00 MB", "a, 0.00 MB"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([3, 1, 0.2, 0.1])  # 10^-3 nats
    assert figure.get_suptitle() == "a model: 4 bit costs most in b (3), 8 bit at most 0.2"


def test_a_picture_of_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--hf-path", "nano", "--mlx-path", str(tmp_path / "out"), "--plot", str(tmp_path / "bars.png")])
    assert "[option_no_effect]" in capsys.readouterr().err
