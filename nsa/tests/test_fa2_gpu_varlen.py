"""FA-2, variable length, against fp64: the window and the compressed branch of ragged and full batches."""

import pytest
import torch

from nsa import NSAConfig, compressed_attention, routing, sliding_window_attention
from nsa.testing import allowed_mask, assert_within_budget, eager, inputs, oracle, within_budget

CFG = NSAConfig(n_sel=4, w=64)
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((1, 111, 111, 1, 1, 64), (2, 65, 1000, 2, 6, 64), (2, 1, 999, 2, 3, 64), (1, 300, 300, 1, 4, 128))


@pytest.fixture
def fa2(needs):
    """Skips unless FA-2 runs `op` here and NSA_TEST_FA2 does not forbid it."""

    def check(op, dtype=torch.bfloat16):
        if routing.flags().test_fa2 is False:
            pytest.skip("FA-2 tests are off: NSA_TEST_FA2=0")
        needs(op, "flash", dtype)

    return check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_fa2_gpu_varlen_window_is_within_the_budget(fa2, launched, shape, dtype):
    fa2("window", dtype)
    B, T, S, G, R, D = shape
    q, k, v = inputs(B, T, S, G=G, R=R, Dk=D, Dv=D, dtype=dtype, device="cuda")
    mask = allowed_mask(oracle.seen_window(T, B, G, CFG, S), S, R, "cuda")
    with launched("window", "flash"), launched("window_backward", "flash"):
        assert_within_budget(lambda q, k, v: sliding_window_attention(q, k, v, CFG, backend="flash"), q, k, v, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_fa2_gpu_varlen_compressed_is_within_the_budget(fa2, launched, shape, dtype):
    fa2("compressed", dtype)
    B, T, S, G, R, D = shape
    C = len(oracle.compressed_spans(S, CFG))
    q, k, v = inputs(B, T, C, G=G, R=R, Dk=D, Dv=D, dtype=dtype, device="cuda")
    mask = allowed_mask(oracle.seen_compressed(T, B, G, CFG, S), C, R, "cuda")

    def run(q, k, v):
        return compressed_attention(q, k, v, CFG, seq_len=S, backend="flash")[0]

    with launched("compressed", "flash"), launched("compressed_backward", "flash"):
        assert_within_budget(run, q, k, v, mask)


@pytest.mark.parametrize("op", ["window", "compressed"])
def test_fa2_gpu_varlen_rows_have_their_own_lengths(fa2, launched, op):
    fa2(op)
    lengths, T, G, R = [500, 33, 133], 9, 2, 6
    C = len(oracle.compressed_spans(max(lengths), CFG)) if op == "compressed" else max(lengths)
    q, k, v = inputs(3, T, C, G=G, R=R, Dk=64, Dv=64, dtype=torch.bfloat16, device="cuda")
    seq_len = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    with launched(op, "flash"):
        if op == "window":
            seen = oracle.seen_window(T, 3, G, CFG, lengths)
            got = sliding_window_attention(q, k, v, CFG, seq_len=seq_len, backend="flash")
        else:
            seen = oracle.seen_compressed(T, 3, G, CFG, lengths)
            got = compressed_attention(q, k, v, CFG, seq_len=seq_len, backend="flash")[0]
    mask = allowed_mask(seen, C, R, "cuda")
    exact = eager(q.double(), k.double(), v.double(), mask)
    assert within_budget(got, eager(q, k, v, mask), exact, "out") == []


@pytest.mark.parametrize("op", ["window", "compressed"])
def test_fa2_gpu_varlen_rows_have_their_own_gradients(fa2, launched, op):
    fa2(op)
    lengths, T, G, R = [500, 33, 133], 9, 2, 6
    C = len(oracle.compressed_spans(max(lengths), CFG)) if op == "compressed" else max(lengths)
    q, k, v = inputs(3, T, C, G=G, R=R, Dk=64, Dv=64, dtype=torch.bfloat16, device="cuda")
    seq_len = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    seen = oracle.seen_window if op == "window" else oracle.seen_compressed
    mask = allowed_mask(seen(T, 3, G, CFG, lengths), C, R, "cuda")

    def run(q, k, v):
        if op == "window":
            return sliding_window_attention(q, k, v, CFG, seq_len=seq_len, backend="flash")
        return compressed_attention(q, k, v, CFG, seq_len=seq_len, backend="flash")[0]

    with launched(op, "flash"), launched(f"{op}_backward", "flash"):
        assert_within_budget(run, q, k, v, mask)


@pytest.mark.parametrize("T", [300, 1])
@pytest.mark.parametrize("op", ["window", "compressed"])
def test_fa2_gpu_varlen_runs_unasked_for_by_name(fa2, launched, op, T):
    fa2(op)
    if routing.flags().use_fa2 is False:
        pytest.skip("FA-2 is forbidden: NSA_USE_FA2=0")
    C = len(oracle.compressed_spans(300, CFG)) if op == "compressed" else 300
    q, k, v = inputs(1, T, C, G=2, R=3, Dk=64, Dv=64, dtype=torch.bfloat16, device="cuda")
    with launched(op, "flash"):
        if op == "window":
            sliding_window_attention(q, k, v, CFG)
        else:
            compressed_attention(q, k, v, CFG, seq_len=300)
