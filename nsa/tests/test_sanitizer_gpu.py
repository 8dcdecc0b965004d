"""Every Triton kernel on a GPU in its smallest odd forms, so few that compute-sanitizer can watch each access:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python -m pytest -q -m sanitizer nsa/tests/test_sanitizer_gpu.py

Without the variable torch cuts tensors out of large allocations, and an access past one of them lies inside another.
"""

import itertools

import pytest
import torch

from nsa import NSAConfig, compressed_attention, selected_attention
from nsa.blocks import n_compressed
from nsa.ops.selected import selected_attention_reference
from nsa.ops.selection import block_scores_reference, select_blocks_reference
from nsa.testing import check_blocks, fixed_selection, inputs, regrets
from nsa.tests import compressed_cases
from nsa.tests import selected_cases as cases

pytestmark = pytest.mark.sanitizer

PAPER = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 4, "w": 64}
BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Budgets are stage 2's: here an error beyond all rounding says that something foreign was read.
PATIENCE = 4.0


@pytest.fixture(autouse=True)
def _triton(needs):
    needs("selected", "triton")
    needs("selection", "triton")


def _agrees(shape, pattern=PAPER, dtype=BF16, slots=None, **more):
    found = cases.errors(shape, pattern, dtype, slots, device="cuda", **more)
    assert cases.excess(found, dtype, PATIENCE) == {}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *itertools.product([(2, 63, 64, 2, 2, 32, 32), (1, 65, 301, 2, 3, 64, 64)], DTYPES),
        ((1, 70, 70, 1, 16, 128, 128), BF16),
        ((1, 35, 200, 1, 1, 24, 16), BF16),
        ((1, 35, 200, 1, 6, 192, 128), BF16),
        ((1, 35, 200, 1, 2, 256, 256), FP16),
        ((1, 35, 200, 1, 6, 128, 128), FP32),
    ],
)
def test_blocks_walking_their_queries(shape, dtype):
    """One block of a single tile; lengths off the tile and off the word; every width of a tile."""
    _agrees(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1, 999, 2, 6, 64, 64), BF16),
        ((2, 1, 999, 2, 6, 64, 64), FP32),
        ((1, 2, 2, 1, 1, 16, 16), FP16),
        ((1, 16, 129, 1, 1, 64, 32), BF16),
        ((1, 2, 77, 1, 70, 128, 128), BF16),
    ],
)
def test_queries_walking_their_blocks(shape, dtype):
    _agrees(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *itertools.product([(2, 63, 64, 2, 2, 32, 32), (1, 65, 301, 2, 3, 64, 64)], DTYPES),
        ((1, 35, 5000, 1, 16, 128, 128), BF16),
        ((1, 35, 200, 1, 6, 24, 16), BF16),
    ],
)
def test_neighbours_walking_the_union_of_their_blocks(shape, dtype):
    """Rows off the tile, keys off the block, and more blocks than a word has bits."""
    _agrees(shape, dtype=dtype, _UNION=1 << 20)


@pytest.mark.parametrize("union", [0, 1 << 20])
@pytest.mark.parametrize("T", [40, 4])
def test_the_gated_sum_and_the_gradients_behind_a_gate(T, union):
    found = cases.summed((2, T, 200, 2, 3, 32, 16), PAPER, BF16, device="cuda", longer=77, _UNION=union)
    assert cases.excess(found, BF16, PATIENCE) == {}


@pytest.mark.parametrize("union", [0, 1 << 20])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_strided_inputs(dtype, union):
    _agrees((2, 33, 130, 2, 3, 32, 16), dtype=dtype, contiguous=False, _UNION=union)


@pytest.mark.parametrize("T", [40, 4])
@pytest.mark.parametrize(
    "slots",
    [cases.without(0), cases.without(3), cases.blind, cases.out_of_range(200, 64)],
    ids=["first", "last", "blind", "out of range"],
)
def test_slots_that_name_no_block(slots, T):
    _agrees((2, T, 200, 2, 3, 32, 32), slots=slots)


@pytest.mark.parametrize("l_sel", [3, 192])
def test_blocks_that_are_no_tile(l_sel):
    _agrees((1, 40, 400, 1, 2, 32, 32), {"l": l_sel // 3, "d": l_sel // 3, "l_sel": l_sel, "n_sel": 4, "w": 64})


def test_all_queries_choosing_one_block_in_pieces():
    pieces = {"forward": 64, "backward": 64}
    _agrees((1, 70, 70, 1, 6, 32, 32), slots=cases.one_block, _PIECE_ROWS=pieces)


def test_a_workspace_walked_in_chunks_and_stretches():
    small = {"_PARTIAL_BYTES": 25_000, "_WORDS_BYTES": 170, "_PIECE_ROWS": {"forward": 24, "backward": 24}}
    _agrees((2, 68, 80, 1, 2, 16, 16), cases.SMALL, **small)


def test_ragged_rows():
    cfg, lengths = NSAConfig(**PAPER), [130, 9, 65]
    q, k, v = inputs(3, 9, 130, G=2, R=3, Dk=32, Dv=32, dtype=BF16)
    blocks = torch.cat([fixed_selection(1, 9, 2, S, cfg) for S in lengths])
    seq_len = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    on_gpu = [x.cuda() for x in (q, k, v, blocks)]
    got = selected_attention(*on_gpu, cfg, seq_len=seq_len, backend="triton").cpu().double()
    for b, S in enumerate(lengths):
        row = slice(b, b + 1)
        want = selected_attention_reference(*(x[row].double() for x in (q, k, v)), blocks[row], cfg, seq_len=S)
        error = float((got[row] - want).norm() / want.norm())
        assert error <= PATIENCE * cases.TOLERANCE[BF16], (b, error)


@pytest.mark.parametrize(
    ("shape", "dtype", "workspace"),
    [
        ((2, 63, 64, 2, 2, 32), BF16, None),
        ((1, 4, 1100, 2, 6, 64), FP32, None),
        ((2, 1, 999, 2, 16, 128), BF16, None),
        ((1, 1, 1, 1, 1, 16), FP16, None),
        ((1, 3, 400, 1, 24, 192), FP16, None),
        ((1, 40, 300, 1, 3, 32), FP32, 1024),
    ],
)
def test_the_choice_of_blocks(shape, dtype, workspace):
    from nsa.kernels import selection

    B, T, S, G, R, D = shape
    cfg = NSAConfig(**PAPER)
    q, k, _ = inputs(B, T, n_compressed(S, cfg), G=G, R=R, Dk=D, dtype=dtype, contiguous=False)
    lse = compressed_attention(q, k, k, cfg, seq_len=S)[1]
    with cases.bounds(selection, {"_WORKSPACE": workspace} if workspace else {}):
        got = selection.select(*(x.cuda() for x in (q, k, lse)), cfg.pattern, S).cpu()
    assert check_blocks(got, S, T, cfg) == []
    exact = [x.double() for x in (q, k, lse)]
    scores = block_scores_reference(*exact, cfg, seq_len=S)
    _, worst = regrets(got, scores, select_blocks_reference(*exact, cfg, seq_len=S))
    assert worst <= 1e-3


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 63, 64, 2, 2, 32, 32), FP32),
        ((1, 65, 1301, 2, 3, 64, 64), BF16),
        ((1, 300, 1400, 1, 16, 128, 128), FP16),
        ((2, 1, 999, 2, 6, 64, 64), BF16),
        ((1, 35, 600, 1, 70, 24, 16), BF16),
        ((1, 9, 9, 1, 1, 16, 16), BF16),
    ],
)
def test_the_compressed_branch(needs, shape, dtype):
    """Tiles of keys cut off by the last block and by the rows; one program a tile of keys, and several pieces."""
    needs("compressed", "triton")
    more = {"device": "cuda", "contiguous": dtype != BF16}
    cfg = compressed_cases.PAPER
    assert compressed_cases.excess(shape, cfg, dtype, PATIENCE, gated=True, **more) == {}
    with compressed_cases.settings(_LEAST_ROWS=64):
        assert compressed_cases.excess(shape, cfg, dtype, PATIENCE, **more) == {}


@pytest.mark.parametrize("gated", [False, True])
def test_the_compressed_branch_of_ragged_rows(needs, gated):
    needs("compressed", "triton")
    shape, lengths = (4, 40, 700, 2, 3, 32, 32), [700, 0, 31, 77]
    with compressed_cases.settings(_LEAST_ROWS=64):
        found = compressed_cases.excess(
            shape, compressed_cases.PAPER, BF16, PATIENCE, gated=gated, lengths=lengths, device="cuda"
        )
    assert found == {}
