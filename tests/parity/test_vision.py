"""The vision tower against transformers, in float32: each stage alone, and the whole, in one piece and in many."""

from collections.abc import Callable

import mlx.core as mx
import pytest
from parity import vision_cases
from parity.cases import Case
from parity.vision_cases import CASES, GRIDS, ODD, TINY, WIDE

from mlx_qwen35.budget import encoding
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.load import load_vision_encoder
from mlx_qwen35.model.vision import VisionEncoder, squares_order, table_taps

# The tower's answers have a standard deviation of 3, its stages of 0.6 to 1.8. MLX on the CPU sums the 4096 products of
# the 4B's width in a row: it is 4e-5 from the exact answer there, where values go up to 13, and torch 1e-5.
STAGE, STAGE_4B = 1e-5, 2e-5
TOWER, TOWER_4B = 3e-5, 6e-5

every_grid = pytest.mark.parametrize(
    ("case", "grid"), [(case, grid) for case in CASES for grid in GRIDS[case.name]], ids=lambda x: getattr(x, "name", x)
)
staged = [(case, grid) for case in CASES for i, grid in enumerate(GRIDS[case.name]) if i == 0 or grid[0] > 1]
every_stage = pytest.mark.parametrize(("case", "grid"), staged, ids=lambda x: getattr(x, "name", x))


@pytest.fixture(scope="module")
def tower(parity_folder) -> Callable[[Case], VisionEncoder]:
    loaded: dict[str, VisionEncoder] = {}

    def load(case: Case) -> VisionEncoder:
        if case.name not in loaded:
            loaded[case.name] = load_vision_encoder(open_checkpoint(parity_folder(case)), mx.float32)
        return loaded[case.name]

    return load


def rows_of(x: mx.array) -> mx.array:
    """(F, n, D) -> (F n, D)"""
    return x.reshape(-1, x.shape[-1])


def stage_input(case: Case, grid: tuple[int, int, int]) -> mx.array:
    """(F, n, D): the same activations that the reference feeds to each stage."""
    return mx.array(vision_cases.tower_input(case, grid)).reshape(grid[0], grid[1] * grid[2], -1)


def rotary_table(tower: VisionEncoder, grid: tuple[int, int, int]) -> tuple[mx.array, mx.array]:
    return tower._rotary(mx.array(squares_order(*grid[1:], 2)))


def test_the_cases_are_those_that_were_asked_for():
    towers = {case.name: vision_cases.vision_config(case) for case in CASES if GRIDS[case.name]}
    assert [c.hidden_size // c.num_heads for c in towers.values()] == [64, 72, 64]
    assert [c.num_position_embeddings**0.5 for c in towers.values()] == [8, 7, 48]
    wide = towers[WIDE.name]
    assert (wide.hidden_size, wide.num_heads, wide.intermediate_size, wide.out_hidden_size) == (1024, 16, 4096, 2560)


@pytest.mark.core(2)
@every_stage
def test_patch_embedding_equals_transformers(case, grid, tower, reference):
    patches = mx.array(vision_cases.media(case, str(grid), grid).patches())
    assert reference(case).error(f"{grid} patch_embed", rows_of(tower(case).patch_embed(patches))) < STAGE


@pytest.mark.core(2)
@every_stage
def test_interpolated_position_table_equals_transformers(case, grid, tower, reference):
    """What is added to the patches, alone: the embedding of no light at all, less its bias."""
    places = squares_order(*grid[1:], 2)
    taps = table_taps(places, grid[1:], round(vision_cases.vision_config(case).num_position_embeddings ** 0.5))
    nothing = mx.zeros((grid[0], len(places), 1536))
    added = tower(case)._embed(nothing, *map(mx.array, taps)) - tower(case).patch_embed.bias
    if grid[0] > 1:
        assert mx.array_equal(added[0], added[-1])
    assert reference(case).error(f"{grid} position", rows_of(added)) < STAGE


@every_stage
def test_rotary_table_of_rows_and_columns_equals_transformers(case, grid, tower, reference):
    for name, table in zip(("cos", "sin"), rotary_table(tower(case), grid), strict=True):
        both = mx.concatenate([table[0, 0]] * 2, axis=-1)  # transformers turns dim j with j + half: a table for each
        assert reference(case).error(f"{grid} {name}", mx.concatenate([both] * grid[0])) < STAGE


@every_stage
def test_attention_is_within_each_frame_and_equals_transformers(case, grid, tower, reference):
    x, table = stage_input(case, grid), rotary_table(tower(case), grid)
    for i, block in enumerate(tower(case).blocks):
        out = block.attn(*block.attn.project(x, table))
        assert reference(case).error(f"{grid} blocks.{i}.attn", rows_of(out)) < STAGE


@every_stage
def test_mlp_and_layer_norm_of_blocks_equal_transformers(case, grid, tower, reference):
    x = stage_input(case, grid)
    assert reference(case).error(f"{grid} norm", rows_of(tower(case).blocks[0].norm1(x))) < STAGE
    for i, block in enumerate(tower(case).blocks):
        assert reference(case).error(f"{grid} blocks.{i}.mlp", rows_of(block.mlp(x))) < STAGE


@every_stage
def test_each_block_equals_transformers(case, grid, tower, reference):
    x, table = stage_input(case, grid), rotary_table(tower(case), grid)
    for i, block in enumerate(tower(case).blocks):
        error = reference(case).error(f"{grid} blocks.{i}", rows_of(block([x], [table])[0]))
        assert error < (STAGE_4B if case is WIDE else STAGE)


@every_stage
def test_merger_equals_transformers(case, grid, tower, reference):
    assert reference(case).error(f"{grid} merger", rows_of(tower(case).merger(stage_input(case, grid)))) < TOWER


@every_grid
def test_tower_equals_transformers(case, grid, tower, reference):
    item = vision_cases.media(case, str(grid), grid)
    out = tower(case).encode(item)
    assert out.shape == (item.tokens, vision_cases.vision_config(case).out_hidden_size)
    assert reference(case).error(f"{grid} tower", out) < (TOWER_4B if case is WIDE else TOWER)


@pytest.mark.core(4)
@pytest.mark.parametrize("most", [4, 36, 68, 136])
@pytest.mark.parametrize(("case", "grid"), [(TINY, (1, 10, 14)), (TINY, (3, 4, 6)), (ODD, (1, 16, 8))], ids=str)
def test_tower_in_slices_and_tiles_equals_transformers(case, grid, most, tower, reference, monkeypatch):
    """Slices that hold some of the frames; tiles that end within a line of squares, the last one shorter."""
    monkeypatch.setattr(encoding, "SLICE", most)
    item = vision_cases.media(case, str(grid), grid)
    out = tower(case).encode(item)
    assert len(out) == item.tokens
    assert reference(case).error(f"{grid} tower", out) < TOWER


def test_slices_of_a_clip_hold_as_many_whole_frames_as_fit(tower, monkeypatch):
    item = vision_cases.media(TINY, "frames", (5, 4, 6))
    whole = tower(TINY).encode(item)
    for most, expected in ((4, [1] * 5), (24, [1] * 5), (71, [2, 2, 1]), (72, [3, 2]), (4096, [5])):
        monkeypatch.setattr(encoding, "SLICE", most)
        seen = []
        call = VisionEncoder.__call__
        monkeypatch.setattr(VisionEncoder, "__call__", lambda *a, f=call, seen=seen: seen.append(f(*a)) or seen[-1])
        assert mx.abs(tower(TINY).encode(item) - whole).max().item() < TOWER
        monkeypatch.setattr(VisionEncoder, "__call__", call)
        assert [len(out) for out in seen] == expected
