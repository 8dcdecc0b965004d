"""Which backend runs and why not another; what flags do; inputs that do not fit are named."""

import warnings

import pytest
import torch

from nsa import NSAConfig, compressed_attention, routing, select_blocks, selected_attention, sliding_window_attention
from nsa.testing import fixed_selection, inputs, oracle, shapes

CFG = shapes.PATTERNS["small"]


@pytest.fixture
def flags(monkeypatch):
    """flags(NSA_USE_FA2="0", ...) sets exactly these variables for one test."""

    def set_flags(**values):
        for name in routing.Flags.__dataclass_fields__:
            monkeypatch.delenv(f"NSA_{name.upper()}", raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(routing, "_overrides", {})
        routing.flags.cache_clear()

    set_flags()
    yield set_flags
    monkeypatch.undo()
    routing.flags.cache_clear()


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("0", False), ("", None), ("on", True), ("FALSE", False), (" 1 ", True)]
)
def test_a_flag_is_on_off_or_unset(flags, text, value):
    flags(NSA_USE_TRITON_SEL=text)
    assert routing.flags().use_triton_sel is value
    assert routing.flags().use_fa2 is None


def test_a_flag_that_is_neither_is_named(flags):
    flags(NSA_USE_FA2="maybe")
    with pytest.raises(ValueError, match=r"NSA_USE_FA2='maybe'.*1 or 0"):
        routing.flags()


def test_a_command_line_wins_over_the_environment(flags):
    flags(NSA_USE_FA2="1")
    routing.override(use_fa2=False)
    assert routing.flags().use_fa2 is False
    with pytest.raises(ValueError, match="no such flag: use_fa3"):
        routing.override(use_fa3=True)


@pytest.mark.parametrize("op", list(routing.PREFERENCES))
def test_the_reference_stands_last_and_is_always_able(flags, op):
    assert routing.PREFERENCES[op][-1] == "reference"
    assert routing.choose(op, torch.zeros(1, 1, 1, 8), backend="reference").backend == "reference"


@pytest.mark.parametrize("op", ["selected", "selection"])
def test_reasons_name_policy_before_environment(flags, op):
    flags(NSA_USE_TRITON_SEL="0")
    x = torch.zeros(1, 1, 1, 8)
    route = routing.choose(op, x, x, x)
    assert route.backend != "triton"
    assert route.rejected["triton"][:2] == ["NSA_USE_TRITON_SEL=0", "needs CUDA"]


@pytest.mark.parametrize("op", ["window", "compressed"])
def test_fa2_forbidden_by_its_flag_is_not_taken(flags, op):
    flags(NSA_USE_FA2="0")
    x = torch.zeros(1, 1, 1, 8)
    assert routing.choose(op, x, x, x).rejected["flash"][0] == "NSA_USE_FA2=0"


def test_a_flag_that_asks_for_the_impossible_warns_once(flags):
    flags(NSA_USE_TRITON_SEL="1")
    routing._warn_once.cache_clear()
    x = torch.zeros(1, 1, 1, 8)
    with pytest.warns(UserWarning, match="triton was asked for but needs CUDA"):
        routing.choose("selected", x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routing.choose("selected", x, x, x)


def test_a_backend_asked_for_by_name_runs_or_says_why_not(flags):
    q, k, v = inputs(1, 20, 20)
    chosen = fixed_selection(1, 20, 2, 20, CFG)
    with pytest.raises(routing.Unsupported, match="needs CUDA"):
        selected_attention(q, k, v, chosen, CFG, backend="triton")
    with pytest.raises(routing.Unsupported, match="needs CUDA"):
        sliding_window_attention(q, k, v, CFG, backend="flash")
    with pytest.raises(routing.Unsupported, match=r"'fast'.*triton, torch, reference"):
        selected_attention(q, k, v, chosen, CFG, backend="fast")


def test_launches_tell_which_backend_ran(flags):
    q, k, v = inputs(1, 20, 20)
    chosen = fixed_selection(1, 20, 2, 20, CFG)
    before = routing.launches.copy()
    selected_attention(q, k, v, chosen, CFG, backend="torch")
    assert routing.launches - before == {("selected", "torch"): 1}


def test_the_snapshot_names_each_route_and_its_reasons(flags):
    flags(NSA_USE_TRITON_SEL="0", NSA_USE_FA2="0")
    routes = routing.snapshot()["routes"]
    assert set(routes) == {"compressed", "selection", "selected", "window", "combine"}
    for row in routes.values():
        for mode in ("forward", "training"):
            assert row[mode]["backend"] in routing.BACKENDS
            assert all(reasons for reasons in row[mode]["rejected"].values())
    assert "NSA_USE_TRITON_SEL=0" in routes["selected"]["training"]["rejected"]["triton"]
    assert "NSA_USE_FA2=0" in routes["window"]["forward"]["rejected"]["flash"]


def test_every_triton_kernel_has_its_proof_on_each_card_and_the_snapshot_shows_it(flags):
    proof = routing.snapshot()["triton_proof"]
    assert set(proof) == {op for op, backends in routing.PREFERENCES.items() if "triton" in backends}
    for cards in proof.values():
        assert set(cards) >= {"sm_80", "sm_89", "sm_90"}
        assert set(cards.values()) <= {"measured", "compiled"}


# Inputs that do not fit


def _call(op, q, k, v, **more):
    if op == "compressed":
        C = len(oracle.compressed_spans(40, CFG))
        return compressed_attention(q, k[:, :C], v[:, :C], CFG, **{"seq_len": 40} | more)
    if op == "window":
        return sliding_window_attention(q, k, v, CFG, **more)
    return selected_attention(q, k, v, fixed_selection(2, 20, 2, 40, CFG), CFG, **more)


@pytest.mark.parametrize("op", ["compressed", "selected", "window"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, v: (q[0], k, v), "q has shape"),
        (lambda q, k, v: (q, k.float(), v), "k is torch.float32"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "q is torch.int64"),
        (lambda q, k, v: (q, k[:1], v[:1]), "batch 1"),
        (lambda q, k, v: (q, k[..., :8], v), "head dim 16 but k has 8"),
        (lambda q, k, v: (q, k, v[:, :3]), "differ before the head dim"),
        (lambda q, k, v: (q[:, :, :3], k, v), "3 query heads .* 2 groups"),
    ],
)
def test_tensors_that_do_not_fit_are_named(op, change, said):
    with pytest.raises(ValueError, match=said):
        _call(op, *change(*inputs(2, 20, 40)))


@pytest.mark.parametrize("op", ["compressed", "selected", "window"])
@pytest.mark.parametrize(
    ("seq_len", "said"),
    [
        (19, "19 .* 20 queries"),
        (torch.tensor(40), "seq_len is torch.int64"),
        (torch.tensor([40.0, 40.0]), "seq_len is torch.float32"),
        (torch.tensor([40]), r"\(1,\); expected int32 \[2\]"),
        (torch.tensor([40, -3]), "seq_len = -3 in row 1"),
    ],
)
def test_a_sequence_length_that_does_not_fit_is_named(op, seq_len, said):
    with pytest.raises(ValueError, match=said):
        _call(op, *inputs(2, 20, 40), seq_len=seq_len)


def test_too_few_keys_are_counted():
    q, k, v = inputs(1, 4, 9)
    with pytest.raises(ValueError, match=r"9 compressed keys.*seq_len = 80 need 19"):
        compressed_attention(q, k, v, CFG, seq_len=80)
    with pytest.raises(ValueError, match=r"9 keys.*seq_len = 80 need 23"):
        sliding_window_attention(q, k, v, CFG, seq_len=80)
    with pytest.raises(ValueError, match=r"9 keys.*seq_len = 80 need 80"):
        selected_attention(q, k, v, fixed_selection(1, 4, 2, 9, CFG), CFG, seq_len=80)


@pytest.mark.parametrize("bad", [-2, 3, 99])
def test_a_block_outside_the_sequence_is_named(bad):
    q, k, v = inputs(1, 20, 40)
    chosen = fixed_selection(1, 20, 2, 40, CFG)
    chosen[0, 7, 1, 0] = bad
    with pytest.raises(ValueError, match=rf"block {bad} is outside -1 \.\. 2"):
        selected_attention(q, k, v, chosen, CFG, backend="torch")


def test_a_block_list_of_another_shape_or_type_is_named():
    q, k, v = inputs(1, 20, 40)
    chosen = fixed_selection(1, 20, 2, 40, CFG)
    with pytest.raises(ValueError, match=r"torch.int64 .*expected int32 \[1, 20, 2, N\]"):
        selected_attention(q, k, v, chosen.long(), CFG)
    with pytest.raises(ValueError, match=r"expected int32 \[1, 20, 2, N\]"):
        selected_attention(q, k, v, chosen[:, :5], CFG)


def test_rows_longer_than_the_keys_are_refused():
    q, k, v = inputs(2, 20, 9)
    rows = torch.tensor([9, 80], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"9 compressed keys.*seq_len = 80 need 19"):
        compressed_attention(q, k, v, CFG, seq_len=rows)
    with pytest.raises(ValueError, match=r"9 compressed keys.*seq_len = 80 need 19"):
        select_blocks(q, k, torch.zeros(2, 20, 4, dtype=torch.float64), CFG, seq_len=rows)
    with pytest.raises(ValueError, match=r"9 keys.*seq_len = 80 need 39"):
        sliding_window_attention(q, k, v, CFG, seq_len=rows)
    with pytest.raises(ValueError, match=r"9 keys.*seq_len = 80 need 80"):
        selected_attention(q, k, v, fixed_selection(2, 20, 2, 20, CFG), CFG, seq_len=rows)


@pytest.mark.parametrize(("B", "T"), [(0, 20), (2, 0)])
@pytest.mark.parametrize("op", ["compressed", "selected", "window"])
def test_inputs_without_a_query_are_named(op, B, T):
    q, k, v = inputs(2, 20, 40)
    with pytest.raises(ValueError, match="no query"):
        _call(op, q[:B, :T], k[:B], v[:B])


def test_an_lse_of_other_queries_is_refused():
    q, k, _ = inputs(1, 20, 9)
    with pytest.raises(ValueError, match="lse has shape"):
        select_blocks(q, k, torch.zeros(1, 19, 4, dtype=torch.float64), CFG, seq_len=40)


def test_a_pattern_is_refused_before_any_tensor_is_made():
    with pytest.raises(ValueError, match=r"nsa.l = 32 .* nsa.d = 12"):
        NSAConfig(l=32, d=12)


@pytest.mark.parametrize("op", ["selection", "selected"])
def test_a_triton_kernel_runs_unasked_only_on_a_card_where_it_was_measured(flags, monkeypatch, op):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(routing, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(routing, "TRITON_PROOF", {op: {80: "measured", 90: "compiled"}})
    unasked = routing.choose(op)
    assert unasked.backend == "torch"
    assert unasked.rejected["triton"] == [
        "not measured on sm_90 yet, compiled for it: NSA_USE_TRITON_SEL=1 asks for it"
    ]
    assert routing.choose(op, backend="triton").backend == "triton"
    flags(NSA_USE_TRITON_SEL="1")
    assert routing.choose(op).backend == "triton"
    flags()
    monkeypatch.setattr(routing, "TRITON_PROOF", {op: {90: "measured"}})
    assert routing.choose(op).backend == "triton"


@pytest.mark.parametrize(("proof", "backend"), [("measured", "triton"), ("compiled", "flash")])
def test_the_window_in_triton_is_asked_for_with_the_others_and_heeds_fa2_asked_for(flags, monkeypatch, proof, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(routing, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(routing, "TRITON_PROOF", {"window": {90: proof}})
    flags(NSA_USE_TRITON_SEL="0")  # says something of the selection's kernels alone
    assert routing.choose("window").backend == backend
    flags(NSA_USE_TRITON_SEL="1")
    assert routing.choose("window").backend == "triton"
    flags(NSA_USE_FA2="1")
    assert routing.choose("window").backend == "flash"


@pytest.mark.parametrize(
    ("card", "line"),
    [((8, 0), "export NSA_USE_TRITON_SEL=1"), ((8, 9), "export NSA_USE_TRITON_SEL=1 NSA_TRITON_SEL_FORCE=1")],
)
def test_the_owner_of_a_card_that_was_not_measured_is_told_one_line(flags, monkeypatch, card, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(routing, "triton_version", lambda: "3.7.1")
    assert routing.snapshot()["to_use_every_kernel"] == line
    flags(**dict(word.split("=") for word in line.split()[1:]))
    assert routing.snapshot()["to_use_every_kernel"] is None
    assert {op: routing.choose(op).backend for op in ("selection", "selected", "window", "combine")} == dict.fromkeys(
        ("selection", "selected", "window", "combine"), "triton"
    )


def test_a_plan_is_made_once_a_shape_and_none_for_a_length_that_grows(monkeypatch):
    from nsa import plan

    made = []
    monkeypatch.setattr(plan, "_make", lambda *args, stock=plan._make: made.append(1) or stock(*args))
    plan._plans.clear()
    q, k, v = inputs(1, 1, 9, dtype=torch.float32)
    logits = torch.zeros(1, 1, 4, 3)
    plans = {id(plan.Plan.of(q, k, v, logits, CFG.pattern, S, training=False)) for S in range(64, 80)}
    assert len(made) == len(plans) <= 3
    made.clear()
    plan.Plan.of(*inputs(2, 1, 9, dtype=torch.float32), logits, CFG.pattern, 64, training=False)
    assert len(made) == 1
    for B in range(1, 600):
        plan.Plan.of(q.expand(B, -1, -1, -1), k, v, logits, CFG.pattern, 64, training=False)
    assert len(plan._plans) <= 256


def test_the_compressed_branch_goes_to_cudnn_where_that_was_measured_ahead(flags, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(routing, "_environment", lambda *_: [])
    monkeypatch.setattr(routing, "_inputs", lambda *_: [])
    one = torch.zeros((), dtype=torch.bfloat16)

    def backend(T, D, **more):
        q, k = one.expand(1, T, 4, D), one.expand(1, T // 16, 2, D)
        return routing.choose("compressed", q, k, k, seq_len=T, **more).backend

    assert (backend(8192, 128), backend(65536, 64), backend(65536, 128)) == ("triton", "triton", "cudnn")
    assert backend(65536, 128, backend="triton") == "triton"
    flags(NSA_USE_TRITON_SEL="1")
    assert backend(65536, 128) == "triton"
