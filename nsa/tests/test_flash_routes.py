"""The fused routes of the compressed and the window branch, as far as no GPU is needed: geometry, reasons, shapes."""

import threading

import pytest
import torch

from nsa import NSAConfig, routing
from nsa.kernels.flash import compressed, operators, window
from nsa.testing import oracle, shapes

PATTERNS = ((32, 16), (8, 4), (4, 4), (6, 1), (8, 2))
LENGTHS = ((1, 1), (1, 40), (3, 40), (31, 31), (111, 111), (65, 200), (17, 33), (200, 200), (16, 64), (5, 31))
BACKENDS = ("flash", "cudnn", "sdpa")


@pytest.fixture
def flag():
    """flag(use_fa2=False) sets a flag for the test."""
    yield routing.override
    routing.override(use_fa2=None)
    routing._overrides.clear()
    routing.flags.cache_clear()


def _meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def _runs_on_meta(backend):
    op = {
        "flash": "_flash_attention_forward",
        "cudnn": "_scaled_dot_product_cudnn_attention",
        "sdpa": "_efficient_attention_forward",
    }[backend]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", "Meta"):
        pytest.skip(f"torch {torch.__version__} has no shape function for aten::{op}")


@pytest.mark.parametrize(("length", "stride"), PATTERNS)
@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_every_query_is_in_one_run_and_is_handed_exactly_the_blocks_it_sees(length, stride, T, S):
    cfg = NSAConfig(l=length, d=stride, l_sel=2 * length, w=8)
    spans = oracle.compressed_spans(S, cfg)
    wanted = {t: sum(span.stop <= t + 1 for span in spans) for t in range(S - T, S)}
    positions = torch.arange(S - T, S)[None]
    handed, reads = {}, 0
    for run in compressed.runs(T, S, length, stride):
        for problem in run.queries(positions).tolist():
            for i, t in enumerate(problem):
                assert t not in handed, f"position {t} twice"
                handed[t] = run.keys - len(problem) + 1 + i if run.causal else run.keys
        reads += run.reads()
    assert handed == {t: n for t, n in wanted.items() if n}
    assert compressed.blind_queries(T, S, length) == sum(n == 0 for n in wanted.values())
    assert reads == sum(wanted.values())


def test_long_contexts_take_three_runs_at_most():
    for T, S in ((65536, 65536), (4096, 65536), (4097, 65531), (1, 65536), (33, 70001)):
        assert 1 <= len(compressed.runs(T, S, 32, 16)) <= 3


def test_one_batch_row_is_laid_out_without_a_copy():
    q, k = torch.zeros(1, 500, 4, 8), torch.zeros(1, 31, 2, 8)
    for T in (500, 200, 7, 1):
        part = q[:, -T:]
        for run in compressed.runs(T, 500, 32, 16):
            assert run.queries(part).untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
            shared = run.shared_keys(k)
            assert shared.shape[0] == 1
            assert shared.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


@pytest.mark.parametrize("limit", [1, 50, 1000])
def test_calls_are_bounded_and_still_cover_every_query_once(monkeypatch, limit):
    monkeypatch.setattr(operators, "CALL_ELEMENTS", limit * 4 * 8)
    q = torch.zeros(1, 300, 4, 8)
    seen = []
    for run in compressed._calls(q, 400, 32, 16):
        rows = run.queries(torch.arange(300)[None])
        assert rows.numel() <= max(limit, rows.shape[1])
        seen += rows.flatten().tolist()
    assert sorted(seen) == list(range(300))


WINDOWS = (
    (1, 1, 5, 9),
    (40, 40, 7, 9),
    (40, 90, 7, 40),
    (33, 90, 20, 20),
    (9, 9, 1, 4),
    (50, 52, 5, 5),
    (30, 30, 9, 10),
)


@pytest.mark.parametrize("most", [1, 2, 99])
@pytest.mark.parametrize(("T", "K", "w", "rows"), WINDOWS)
def test_window_problems_hold_every_query_once_and_exactly_the_keys_it_sees(T, K, w, rows, most):
    queries, keys = torch.arange(K - T, K)[None], torch.arange(K).view(1, K, 1, 1)
    covered = []
    for stretch in window.stretches(T, K, w, rows, most):
        assert stretch.count <= most
        asked, held = stretch.queries(queries).flatten(0, 1), stretch.shared_keys(keys).flatten(0, 1).flatten(1)
        for t, s in zip(asked.tolist(), held.tolist(), strict=True):
            # Bottom-right: the last query sits at the last key, and the first one's window begins at the first.
            assert s == list(range(max(0, t[0] - w + 1), t[-1] + 1))
            covered += t
    assert covered == list(range(K - T, K))


@pytest.mark.parametrize(("T", "K", "w", "rows"), WINDOWS)
def test_window_gradients_go_back_to_the_keys_they_came_from(T, K, w, rows):
    total, expected = torch.zeros(2, K, 2, 3), torch.zeros(2, K, 2, 3)
    for stretch in window.stretches(T, K, w, rows, 3):
        part = torch.rand(2, stretch.count, stretch.keys, 2, 3)
        stretch.add(total, part)
        for i in range(stretch.count):
            first = stretch.first_key + i * stretch.rows
            expected[:, first : first + stretch.keys] += part[:, i]
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(("T", "K", "w", "rows"), WINDOWS)
def test_window_reads_are_the_oracles(T, K, w, rows):
    counted = sum(min(w, t + 1) for t in range(K - T, K))
    assert window.reads(T, K, w) == counted


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", shapes.KERNEL_SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_shapes_and_dtypes_forward_and_backward_fit_the_ops_own(backend, shape):
    _runs_on_meta(backend)
    B, T, S, G, R, Dk, Dv = shape
    T = S if backend == "cudnn" else T
    q = _meta(B, T, G * R, Dk)
    C = len(oracle.compressed_spans(S, NSAConfig()))
    cases, p = [(compressed, C + 3), (window, S)], NSAConfig(w=64).pattern
    for module, keys in cases if backend != "cudnn" else cases[:1]:
        k, v = _meta(B, keys, G, Dk), _meta(B, keys, G, Dv)
        out, lse, _ = module.forward(q, k, v, None, p, S, False, backend)
        assert (out.shape, out.dtype) == ((B, T, G * R, Dv), q.dtype)
        assert (lse.shape, lse.dtype) == ((B, T, G * R), torch.float32)
        if backend == "sdpa":
            continue  # torch's shape function of its backward does not take that operator's own arguments
        grads = module.backward(torch.empty_like(out), q, k, v, None, out, lse, p, S, backend, None, None)
        assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_a_backward_pass_leaves_the_deterministic_mode_as_it_was(monkeypatch, backend):
    _runs_on_meta(backend)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    q, k = _meta(1, 64, 4, 64), _meta(1, 64, 2, 64)
    lse = _meta(1, 4, 64, dtype=torch.float32)
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    operators.backward(backend, q, q, k, k, q, lse, 0.1, causal=True)
    assert (torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory) == before


@pytest.fixture
def mode():
    """mode() is torch's deterministic mode and filling, mode("warn") sets it; the test leaves the default."""
    fill = torch.utils.deterministic.fill_uninitialized_memory

    def mode(name=None, filling=True):
        if name is not None:
            torch.set_deterministic_debug_mode(name)
            torch.utils.deterministic.fill_uninitialized_memory = filling
        return (
            ("default", "warn", "error")[torch.get_deterministic_debug_mode()],
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    yield mode
    mode("default", fill)


@pytest.mark.parametrize("users", ["default", "warn", "error"])
def test_overlapping_backward_passes_of_two_threads_leave_the_users_mode(mode, users):
    """The first in is the first out: the second must not lose the mode, nor take the first one's for the user's."""
    mode(users)
    in_first, in_second, out_first = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with operators._repeatable():
            in_first.set()
            in_second.wait(10)
        out_first.set()

    def second():
        in_first.wait(10)
        with operators._repeatable():
            in_second.set()
            out_first.wait(10)
            seen["second"] = mode()[0]

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == {"second": "error"}
    assert mode() == (users, True)


def test_a_mode_that_is_set_during_a_backward_pass_stays(mode):
    mode("default")
    with operators._repeatable():
        assert mode() == ("error", False)
        mode("warn")
    assert mode() == ("warn", True)


def test_a_backward_pass_that_fails_leaves_the_users_mode(mode):
    mode("warn")
    with pytest.raises(ZeroDivisionError), operators._repeatable(), operators._repeatable():
        raise ZeroDivisionError
    assert mode() == ("warn", True)


def test_the_memory_efficient_operator_needs_no_mode(mode, monkeypatch):
    """One split of its keys is asked for by argument."""
    mode("default")
    asked = []

    def backward(dout, q, k, v, *rest, num_splits_key, **more):
        asked.append((num_splits_key, mode()[0]))
        return q, k, v, None

    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward", backward)
    q, lse = _meta(1, 64, 4, 64), _meta(1, 4, 64, dtype=torch.float32)
    operators.backward("sdpa", q, q, q, q, q, lse, 0.1, causal=True)
    assert asked == [(1, "default")]


def test_operands_are_copied_only_where_the_operators_could_not_load_them():
    x = torch.zeros(2, 9, 3, 64, dtype=torch.bfloat16)
    for fine in (x, x[:, 3:], x.transpose(1, 2), x[:1].expand(5, -1, -1, -1), x[:, ::2]):
        assert operators._operand(fine, 64) is fine
    odd = torch.zeros(2, 9, 3, 65, dtype=torch.bfloat16)
    for unfit in (odd[..., :64], odd[..., 1:], x.movedim(1, -1), x.flatten()[4:-60].view(-1, 1, 1, 64)):
        copy = operators._operand(unfit, unfit.shape[-1])
        assert copy is not unfit
        assert copy.stride(-1) == 1
        assert torch.equal(copy, unfit)
    assert operators._operand(x, 72).shape == (2, 9, 3, 72)


@pytest.mark.parametrize(
    ("op", "backend", "shape", "dtype", "words"),
    [
        ("window", "flash", (1, 8, 2, 64), torch.float32, "flash has no kernel for float32"),
        ("compressed", "flash", (1, 8, 2, 320), torch.bfloat16, "head dim 320 is over flash's 256"),
        ("compressed", "cudnn", (1, 5000, 2, 192), torch.bfloat16, "head dim 192 is over cudnn's 128"),
        ("compressed", "cudnn", (1, 100, 2, 64), torch.bfloat16, "not at 12800"),
    ],
)
def test_what_does_not_fit_has_a_reason(op, backend, shape, dtype, words):
    x = _meta(*shape, dtype=dtype)
    module = {"compressed": compressed, "window": window}[op]
    assert any(words in reason for reason in module.unsupported(backend, x, x, x))


def test_cudnn_takes_whole_sequences_only():
    q, k = _meta(1, 8192, 64, 64), _meta(1, 511, 4, 64)
    assert compressed.unsupported("cudnn", q, k, k) == compressed.unsupported("cudnn", q, k, k, seq_len=8192) == []
    assert "whole sequences" in compressed.unsupported("cudnn", q, k, k, seq_len=9000)[0]
    assert compressed.unsupported("flash", q, k, k, seq_len=9000) == []


@pytest.mark.parametrize("op", ["compressed", "window"])
def test_a_cpu_is_told_what_is_missing_and_runs_without_it(op):
    x = torch.zeros(1, 64, 2, 64)
    with pytest.raises(routing.Unsupported, match="needs CUDA"):
        routing.choose(op, x, x, x, backend="flash")
    route = routing.choose(op, x, x, x)
    assert route.backend == "sdpa"
    assert route.rejected["flash"] == ["needs CUDA"]


@pytest.mark.parametrize("op", ["compressed", "window"])
def test_forbidding_fa2_forbids_flash_alone_and_the_snapshot_says_so(op, flag):
    flag(use_fa2=False)
    x = torch.zeros(1, 64, 2, 64)
    with pytest.raises(routing.Unsupported, match="NSA_USE_FA2=0"):
        routing.choose(op, x, x, x, backend="flash")
    seen = routing.snapshot()
    assert seen["NSA_USE_FA2"] is False
    for row in seen["routes"][op].values():
        assert row["backend"] != "flash"
        # Where one of those before it runs, nobody asks about flash.
        assert row["backend"] in ("triton", "cudnn") or "NSA_USE_FA2=0" in row["rejected"]["flash"]
        assert "NSA_USE_FA2=0" not in row["rejected"].get("cudnn", [])


def test_fa2_goes_first_where_it_is_asked_for_and_cudnn_where_it_is_not(flag):
    x = torch.zeros(1, 64, 2, 64)
    assert list(routing.choose("compressed", x, x, x).rejected) == ["triton", "cudnn", "flash"]
    flag(use_fa2=True)
    routing._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="flash was asked for"):
        route = routing.choose("compressed", x, x, x)
    assert list(route.rejected) == ["flash", "triton", "cudnn"]
