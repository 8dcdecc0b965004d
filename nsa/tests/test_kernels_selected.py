"""The Triton kernels of the selected branch, interpreted on a CPU: output and gradients against the specification.

Every case runs with uninitialised memory poisoned and every address of a load, store or atomic checked against the
kernel's own tensors, so a result that holds here neither reads what nobody wrote nor touches what is not its own.
"""

from contextlib import contextmanager

import pytest
import torch

from nsa.tests import selected_cases as cases
from nsa.tests.selected_cases import SMALL


@contextmanager
def _bounds_checked():
    """Fails a launch at the first address outside the tensors that it was given; the interpreter itself looks not."""
    import numpy as np
    from triton.runtime import interpreter

    spans: list[tuple[int, int]] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    places = {
        "create_masked_load": (0, 1),
        "create_masked_store": (0, 2),
        "create_load": (0, None),
        "create_store": (0, None),
        "create_atomic_rmw": (1, 3),
    }
    stock = {name: getattr(builder, name) for name in places} | {"__call__": executor.__call__}

    def check(name, pointers, mask):
        at = np.asarray(pointers.data).ravel().astype(np.int64)
        if mask is not None:
            at = at[np.broadcast_to(np.asarray(mask.data).ravel().astype(bool), at.shape)]
        inside = np.zeros(at.shape, bool)
        for low, high in spans:
            inside |= (at >= low) & (at < high)
        if not inside.all():
            raise IndexError(f"{name}: {int((~inside).sum())} of {inside.size} addresses are in none of the tensors")

    def checked(name, pointer, mask):
        def call(self, *args):
            check(name, args[pointer], None if mask is None else args[mask])
            return stock[name](self, *args)

        return call

    def launch(self, *args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        held = [x.untyped_storage() for x in tensors]
        spans[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in held]
        return stock["__call__"](self, *args, **kwargs)

    for name, (pointer, mask) in places.items():
        setattr(builder, name, checked(name, pointer, mask))
    executor.__call__ = launch
    try:
        yield
    finally:
        for name in places:
            setattr(builder, name, stock[name])
        executor.__call__ = stock["__call__"]


def _run(*case, **more):
    return cases.run(*case, guard=_bounds_checked, **more)


def _errors(*case, **more):
    return cases.errors(*case, guard=_bounds_checked, **more)


def _agrees(errors, dtype=torch.float32):
    assert cases.excess(errors, dtype) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("R", [1, 3, 6, 16])
def test_every_group_size_and_type(interpreted, R, dtype):
    _agrees(interpreted(_errors, (1, 21, 37, 1, R, 32, 16), SMALL, dtype), dtype)


@pytest.mark.parametrize("shape", [(2, 31, 32, 1, 2, 32, 32), (1, 33, 33, 1, 2, 16, 32), (1, 17, 79, 2, 3, 24, 16)])
def test_lengths_off_the_block_and_more_keys_than_queries(interpreted, shape):
    _agrees(interpreted(_errors, shape, SMALL))


def _strided(shape, pattern):
    return _errors(shape, pattern, contiguous=False)


def test_strided_inputs(interpreted):
    _agrees(interpreted(_strided, (2, 20, 37, 2, 3, 32, 16), SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "R"), [(1, 6), (5, 1), (1, 16), (3, 3)])
def test_few_queries(interpreted, T, R, dtype):
    _agrees(interpreted(_errors, (2, T, 61, 2, R, 16, 16), SMALL, dtype), dtype)


def test_more_heads_than_one_tile_holds(interpreted):
    _agrees(interpreted(_errors, (1, 2, 61, 1, 70, 16, 16), SMALL))


def _without(slot):
    return [_errors((1, T, 90, 2, 3, 16, 16), SMALL, slots=cases.without(slot)) for T in (24, 4)]


@pytest.mark.parametrize("slot", range(4))
def test_an_empty_slot_is_skipped_wherever_it_stands(interpreted, slot):
    for errors in interpreted(_without, slot):
        _agrees(errors)


def _one_block():
    pieces = {"forward": 64, "backward": 64}
    return _errors((1, 70, 70, 1, 6, 16, 16), SMALL, slots=cases.one_block, _PIECE_ROWS=pieces)


def test_all_queries_choosing_one_block_add_up_in_pieces(interpreted):
    _agrees(interpreted(_one_block))


def _out_of_range():
    return [_errors((1, T, 90, 2, 3, 16, 16), SMALL, slots=cases.out_of_range(90, 16)) for T in (40, 4)]


def test_an_index_out_of_range_or_of_the_future_is_no_block(interpreted):
    for errors in interpreted(_out_of_range):
        _agrees(errors)


def _blind():
    _, (out, dq, _, _), _, _ = _run((1, 24, 24, 1, 2, 16, 16), SMALL, torch.float32, cases.blind)
    errors = _errors((1, 24, 24, 1, 2, 16, 16), SMALL, slots=cases.blind)
    return errors, float(out[:, 3:9].norm() + dq[:, 3:9].norm())


def test_a_query_without_blocks_gives_zero_and_takes_no_gradient(interpreted):
    errors, left = interpreted(_blind)
    _agrees(errors)
    assert left == 0.0


SMALL_BOUNDS = {"_PARTIAL_BYTES": 12_500, "_WORDS_BYTES": 85, "_PIECE_ROWS": {"forward": 24, "backward": 24}}


def _cut():
    """The same inputs uncut, and cut into stretches, chunks and pieces."""
    shape = (1, 68, 80, 1, 2, 16, 16)
    whole, parts = (_run(shape, SMALL, torch.float32, **bounds)[1] for bounds in ({}, SMALL_BOUNDS))
    apart = [float((a - b).abs().max()) for a, b in zip(whole, parts, strict=True)]
    return apart, _errors(shape, SMALL, **SMALL_BOUNDS)


def test_a_bounded_workspace_changes_nothing_beyond_rounding(interpreted):
    """On a GPU not a bit of output and dq; here a row's product depends on its place in NumPy's tile."""
    apart, errors = interpreted(_cut)
    assert max(apart) <= 2e-6
    _agrees(errors)


def _summed(*case, **more):
    return cases.summed(*case, guard=_bounds_checked, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "softmax"),
    [((2, 21, 37, 2, 3, 32, 16), False), ((1, 20, 33, 1, 6, 16, 32), True), ((2, 3, 37, 2, 3, 16, 32), True)],
)
@pytest.mark.parametrize("union", [0, 4096])
def test_the_gated_sum_and_the_gradients_behind_a_gate(interpreted, shape, softmax, union, dtype):
    _agrees(interpreted(_gated, shape, dtype, softmax, union), dtype)


def _gated(shape, dtype, softmax, union):
    return _summed(shape, SMALL, dtype, softmax=softmax, contiguous=softmax, longer=21, _UNION=union)


def _gated_in_pieces():
    return _summed((2, 68, 70, 1, 2, 16, 16), SMALL, longer=5, **SMALL_BOUNDS)


def test_gated_sums_over_chunks_and_pieces(interpreted):
    _agrees(interpreted(_gated_in_pieces))


def _all_blocks():
    """What the forms give for blocks None, and for every block named."""
    from nsa import NSAConfig
    from nsa.kernels import selected
    from nsa.testing import fixed_selection, inputs

    cfg, found = NSAConfig(**SMALL), []
    q, k, v = inputs(2, 20, 50, G=1, R=2, Dk=16, Dv=32, dtype=torch.float32)
    dout, cmp, win = (torch.randn(2, 20, 2, 32) for _ in range(3))
    logits, gate, plus = torch.randn(2, 20, 2, 3), torch.rand(2, 20, 2), (torch.randn_like(q), torch.randn_like(q))
    assert selected.takes_all("triton", q, k, v, cfg.pattern, 50)
    assert not selected.takes_all("triton", q, k, v, cfg.pattern, 65)
    for blocks in (None, fixed_selection(2, 20, 1, 50, cfg)):
        ahead = selected.forward_summed(q, k, v, blocks, cfg.pattern, 50, True, "triton", cmp, win, logits, False)
        delta = gate * (dout * ahead[1]).sum(-1)
        back = selected.backward(
            dout, q, k, v, blocks, *ahead[1:3], cfg.pattern, 50, "triton", gate, delta, lists=ahead[4], plus=plus
        )
        found.append((*ahead[:4], *back))
    return [float((a - b).abs().max()) for a, b in zip(*found, strict=True)]


def test_every_block_chosen_is_the_window_of_the_whole_past(interpreted):
    assert max(interpreted(_all_blocks)) <= 1e-5


def _launches(union):
    """Kernels launched by the gated sum and by its backward, in one chunk, with lists and without."""
    from triton.runtime import interpreter

    from nsa import NSAConfig
    from nsa.kernels import selected
    from nsa.testing import fixed_selection, inputs

    cfg, count, stock = NSAConfig(**SMALL), [], interpreter.GridExecutor.__call__
    q, k, v = (x.to(torch.bfloat16) for x in inputs(1, 40, 90, G=1, R=2, Dk=16, Dv=16, dtype=torch.float32))
    blocks, logits, delta = fixed_selection(1, 40, 1, 90, cfg), torch.zeros(1, 40, 2, 3), torch.ones(1, 40, 2)
    interpreter.GridExecutor.__call__ = lambda self, *a, **b: (count.append(self.fn.__name__), stock(self, *a, **b))[1]
    try:
        with cases.bounds(selected, {"_UNION": union}):
            _, out, lse, _, lists = selected.forward_summed(
                q, k, v, blocks, cfg.pattern, 90, False, "triton", q, q, logits, False, keep=True
            )
            found = [count[:]]
            for given in (lists, None):
                past = (q, q, k, v, blocks, out, lse, cfg.pattern, 90, "triton", None, delta)
                count.clear()
                selected.backward(*past, lists=given, plus=(q, q))
                found.append(count[:])
    finally:
        interpreter.GridExecutor.__call__ = stock
    return found


@pytest.mark.parametrize(
    ("union", "kernels"), [(0, ["block_forward", "near_forward", "merge"]), (4096, ["union_forward"])]
)
def test_the_lists_are_made_once_and_few_kernels_do_the_rest(interpreted, union, kernels):
    made, grads = ["_mark", "_scan", "_cut", "_place"], ["block_backward", "gather_spill", "sum_slots"]
    assert interpreted(_launches, union) == [[*made, *kernels], grads, [*made, *grads]]


def _unions(shape, pattern, dtype=torch.float32, slots=None, **more):
    return _errors(shape, pattern, dtype, slots, _UNION=1 << 20, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(2, 21, 37, 1, 1, 32, 16), (1, 33, 79, 2, 3, 24, 32), (1, 40, 40, 1, 6, 16, 16), (1, 17, 33, 1, 16, 16, 16)],
)
def test_neighbours_walking_the_union_of_their_blocks(interpreted, shape, dtype):
    _agrees(interpreted(_unions, shape, SMALL, dtype), dtype)


def _unions_apart():
    many = {"l": 2, "d": 1, "l_sel": 4, "n_sel": 6, "w": 8}
    odd = {"l": 3, "d": 3, "l_sel": 3, "n_sel": 5, "w": 8}
    spoils = [cases.without(0), cases.without(3), cases.blind, cases.one_block, cases.out_of_range(90, 16)]
    return [
        _unions((1, 24, 600, 1, 3, 16, 16), many),
        _unions((1, 24, 200, 1, 2, 16, 16), odd),
        _unions((2, 24, 90, 1, 2, 16, 16), SMALL, contiguous=False),
        *(_unions((1, 40, 90, 1, 2, 16, 16), SMALL, slots=spoil) for spoil in spoils),
    ]


def test_unions_of_many_words_of_odd_blocks_and_of_spoilt_lists(interpreted):
    for errors in interpreted(_unions_apart):
        _agrees(errors)


@pytest.mark.parametrize(
    "pattern",
    [
        {"l": 2, "d": 1, "l_sel": 3, "n_sel": 7, "w": 11, "local_blocks": 1},
        {"l": 32, "d": 16, "l_sel": 192, "n_sel": 3, "w": 64},
    ],
    ids=["3", "192"],
)
def test_blocks_that_are_no_tile(interpreted, pattern):
    _agrees(interpreted(_errors, (1, 20, 400 if pattern["l_sel"] > 64 else 50, 1, 2, 16, 16), pattern))


def _listed(bounds):
    """Pairs of every piece of the forward's and the backward's tables, chunk by chunk, beside those of the blocks."""
    from nsa.kernels import lists

    (B, T, G, N), S, L = (2, 70, 2, 4), 150, 4
    chunk, words, piece = bounds
    generator = torch.Generator().manual_seed(3)
    draws = torch.rand(B, T, G, -(-S // L), generator=generator)
    blocks = draws.topk(N).indices.to(torch.int32)  # of the future, too
    blocks[:, ::3, :, 1] = -1
    blocks[:, :, 1, 0] = torch.where((blocks[:, :, 1] == 0).any(-1), blocks[:, :, 1, 0], 0)  # block 0, chosen by all
    own = (torch.arange(S - T, S) // L).view(1, T, 1, 1)
    plan = lists.layout(B * G, T, N, L, S, chunk, words, piece)
    made = lists.build(blocks, plan)
    found = []
    for chunk in plan.chunks:
        for back in (0, 1):
            room = chunk.rooms[back]
            table = made[chunk.tables[back] :][: B * G * room * 4].view(B * G, room, 4)
            assert (table[:, chunk.pieces[back] :, 0] == -1).all()
            assert ((table[..., 0] >= 0).int().diff(dim=1) <= 0).all()  # those in use come first
            got: dict[int, list[int]] = {}
            spills = []
            for key, begin, end, spill in table.view(-1, 4).tolist():
                if key >= 0:
                    assert 0 < end - begin <= plan.piece[back]
                    got.setdefault(key, []).append((spill, made[begin:end].tolist()))
            for key, pieces in got.items() if back else ():
                assert all((spill >= 0) == (len(pieces) > 1) for spill, _ in pieces)
                spills += [spill for spill, _ in pieces if spill >= 0]
                known = made[chunk.known :][: 2 * B * G * plan.n_blocks]
                assert known[key] == len(pieces)
                assert len(pieces) == 1 or known[B * G * plan.n_blocks + key] == pieces[0][0]
            assert len(set(spills)) == len(spills)
            assert max(spills, default=0) < B * G * plan.spill_rows
            part = slice(chunk.start, chunk.stop)
            listed = (blocks >= 0) & (blocks <= own)
            if not back:
                listed &= (blocks > 0) & (blocks < own - 1)
            want: dict[int, list[int]] = {}
            for b, i, g, n in listed[:, part].nonzero().tolist():
                block = int(blocks[b, chunk.start + i, g, n])
                want.setdefault((b * G + g) * plan.n_blocks + block, []).append((chunk.start + i) * N + n)
            flat = {key: [pair for _, pairs in pieces for pair in pairs] for key, pieces in got.items()}
            found.append(flat == want)
    return found


@pytest.mark.parametrize(
    "bounds", [(96, 1 << 20, (1000, 1000)), (32, 1 << 20, (3, 5)), (32, 1, (7, 1)), (64, 1, (1, 4))], ids=str
)
def test_lists_hold_each_chunk_s_pairs_by_block_and_query_and_the_forward_s_leave_the_near_out(interpreted, bounds):
    assert all(interpreted(_listed, bounds))


def _huge(form):
    """q and dout of [B,H,T,D] strides, a group's last head 2^31 elements or more behind its first; k and v as far."""
    from nsa import NSAConfig
    from nsa.kernels import selected
    from nsa.testing import fixed_selection, inputs

    cfg = NSAConfig(**SMALL)
    T = 4 if form == "query" else 20
    q, k, v = inputs(1, T, 100, G=2, R=6, Dk=16, Dv=16, dtype=torch.float16)
    blocks, dout = fixed_selection(1, T, 2, 100, cfg), torch.randn(1, T, 12, 16).half()
    with cases.bounds(selected, {"_UNION": 4096 if form == "union" else 0}):
        found = []
        for far in (False, True):
            a = [_apart(x) if far else x for x in (q, k, v, dout)]
            out, lse, reads = selected.forward(*a[:3], blocks, cfg.pattern, 100, True, "triton")
            past = (a[3], *a[:3], blocks, out, lse, cfg.pattern, 100, "triton")
            grads = [selected.backward(*past, None, delta) for delta in (None, torch.ones_like(lse))]
            found.append((out, lse, reads, *grads[0], *grads[1]))
    return [torch.equal(a, b) for a, b in zip(*found, strict=True)]


def _apart(x):
    """x [1,T,H,D] over addresses of which only the touched pages take memory."""
    stride = 2**29 if x.shape[2] > 2 else 2**31 + 16
    wide = torch.empty((x.shape[2] - 1) * stride + x.shape[1] * x.shape[3], dtype=x.dtype)
    return wide.as_strided(x.shape, (0, x.shape[3], stride, 1)).copy_(x)


@pytest.mark.parametrize("form", ["block", "union", "query"])
def test_heads_more_than_two_to_the_31_elements_apart(interpreted, form):
    assert all(interpreted(_huge, form))


def _reasons():
    from nsa.kernels import selected

    def of(dtype, dim):
        return selected.unsupported("triton", *[torch.zeros(1, 1, 1, dim, dtype=dtype)] * 3)

    many = [torch.zeros(1, 1, 1, 16, dtype=torch.float16).expand(40_000, 1, 2, 16)] * 3
    return (
        *(of(torch.bfloat16, 96), of(torch.float64, 64), of(torch.float16, 512)),
        selected.unsupported("triton", *many),
    )


def test_what_cannot_run_is_refused_with_its_reason(interpreted):
    fine, double, wide, many = interpreted(_reasons)
    assert fine == []
    assert len(double) == 1
    assert "float64" in double[0]
    assert len(wide) == 1
    assert "512" in wide[0]
    assert len(many) == 1
    assert "80000" in many[0]
