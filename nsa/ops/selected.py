"""Selected attention: one softmax over the tokens of the chosen blocks that are not in the query's future (Eqs. 11-12).

Two forms of the same mathematics. `selected_attention_reference` gathers each query's tokens and is the
specification. `_forward`/`_backward` are block-major: for every KV block they gather the queries that chose it, do
one dense product, and merge the slots of a query by logsumexp; no key is copied once a query. The GPU kernel has
the same shape.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from nsa import routing
from nsa.config import NSAConfig
from nsa.ops import dense
from nsa.ops.checks import check_qkv, check_seq_len, each_row, longest, pad_front
from nsa.ops.combine import apply_gate

# Query rows (pairs x heads) of a tile against one KV block: enough for a good product, few enough to waste little.
_TILE_ROWS = 192
# Elements of one gathered operand of a chunk of queries (64 MB in fp32): bounds the workspace at any length.
_CHUNK = 1 << 24
# Up to this many queries gathering tokens is cheaper than sorting lists; decode always is.
_FEW = 4


def _gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, l_sel: int, S: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B,T,H,Dv], lse [B,T,H], tokens read [B,G]; plain differentiable torch."""
    B, T, H, D = q.shape
    G, N = blocks.shape[2:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    t = torch.arange(S - T, S, device=q.device)[None, :, None, None]
    inside = torch.arange(l_sel, device=q.device)
    tokens = (blocks.long().unsqueeze(-1) * l_sel + inside).flatten(3)  # [B,T,G,N*l']
    valid = (blocks >= 0).unsqueeze(-1).expand(-1, -1, -1, -1, l_sel).flatten(3) & (tokens <= t)

    index = tokens.clamp(0, S - 1) * G + torch.arange(G, device=q.device)[:, None]

    def take(x: torch.Tensor) -> torch.Tensor:
        """[B,S,G,D] -> [B,T,G,N*l',D]; index_select's backward is repeatable, and by batch row it copies no cache."""
        x = x.to(dtype) if x.requires_grad else x  # so that the rows of a token's gradient are summed in fp32
        flat = (one[:S].reshape(S * G, x.shape[3]) for one in x)
        rows = [one.index_select(0, i.flatten()) for one, i in zip(flat, index, strict=True)]
        return torch.stack(rows).view(B, T, G, N * l_sel, x.shape[3])

    scores = torch.einsum("btgrd,btgsd->btgrs", q.to(dtype).unflatten(2, (G, H // G)), take(k).to(dtype)) * D**-0.5
    scores = scores.masked_fill(~valid.unsqueeze(3), float("-inf"))
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1))
    p = p / p.sum(-1, keepdim=True).clamp(min=0.5)  # takes back the rounding of lse; a blind row stays 0
    out = torch.einsum("btgrs,btgsd->btgrd", p, take(v).to(dtype))
    return out.flatten(2, 3).to(q.dtype), lse.flatten(2, 3), valid.sum((1, 3))


def _by_query(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, l_sel: int, S: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_gathered` for a few queries on a CPU: a group's heads are the rows of one dense problem over its tokens."""
    B, T, H, D = q.shape
    G, N = blocks.shape[2:]
    inside = torch.arange(l_sel, device=q.device)
    tokens = (blocks.unsqueeze(-1) * l_sel + inside).view(B, T, G, N * l_sel)
    valid = (tokens >= 0) & (tokens <= torch.arange(S - T, S, device=q.device)[:, None, None])
    read = valid.sum(-1)
    rows = tokens.clamp_(0, S - 1).mul_(G).add_(torch.arange(G, device=q.device)[:, None])

    def take(x: torch.Tensor) -> torch.Tensor:
        """[B,S,G,D] -> [B*T*G,1,N*l',D]; by batch row it copies no cache."""
        flat = [one[:S].reshape(S * G, x.shape[3]) for one in x]
        found = [one.index_select(0, i.flatten()) for one, i in zip(flat, rows, strict=True)]
        return (found[0] if B == 1 else torch.cat(found)).view(B * T * G, 1, N * l_sel, x.shape[3])

    mask = dense.additive(valid.view(B * T * G, 1, 1, -1), q.dtype).expand(-1, -1, H // G, -1)
    out, lse = dense.forward(q.reshape(B * T * G, 1, H // G, D), take(k), take(v), D**-0.5, mask=mask)
    lse = lse.view(B, T, G, H // G).masked_fill((read == 0).unsqueeze(-1), float("-inf"))
    return out.reshape(B, T, H, -1), lse.flatten(2), read.sum(1)


def selected_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, cfg: NSAConfig, *, seq_len: int
) -> torch.Tensor:
    """The specification, in plain differentiable torch. Shapes as `selected_attention`; seq_len an int."""
    return _gathered(q, k, v, blocks, cfg.l_sel, seq_len)[0]


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    l_sel: int,
    S: int,
    rows: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's output and the tokens read; ragged rows one by one."""
    if rows is None:
        out, _, count = _gathered(q, k, v, blocks, l_sel, S)
        return out, count
    T = q.shape[1]

    def one(b: int, S: int, t: int) -> tuple[torch.Tensor, ...]:
        row, last = slice(b, b + 1), slice(T - t, T)
        out, _, count = _gathered(q[row, last], k[row], v[row], blocks[row, last], l_sel, S)
        return pad_front(out, T, 0.0), count

    out, count = each_row(one, T, rows)
    return out, count


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    cfg: NSAConfig,
    *,
    seq_len: int | torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    reads: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attend to the tokens of each query's chosen blocks that are not in its future.

    q [B,T,H,Dk], the last T of `seq_len` positions (an int, int32 [B] for ragged rows, or k's length);
    k [B,>=S,G,Dk], v [B,>=S,G,Dv], row s at position s; blocks [B,T,G,N] int32 from `select_blocks`: unique in a row,
    -1 in any slot that is empty. gate [B,T,H] scales the output; reads, int64 [B,G], gains the tokens read.
    Returns [B,T,H,Dv] in q.dtype; a query with no block gets 0. Differentiable in q, k, v, gate. Raises ValueError
    for inputs that do not fit (on a CPU also for a block outside [-1, M)), Unsupported for a named backend that
    cannot run.
    """
    check_qkv("selected_attention", q, k, v)
    S, rows = check_seq_len("selected_attention", q, k.shape[1] if seq_len is None else seq_len)
    if blocks.dtype != torch.int32 or blocks.shape[:3] != (*q.shape[:2], k.shape[2]):
        raise ValueError(
            f"selected_attention: blocks are {blocks.dtype} {tuple(blocks.shape)}; "
            f"expected int32 [{q.shape[0]}, {q.shape[1]}, {k.shape[2]}, N]"
        )
    if k.shape[1] < longest(S, rows):
        raise ValueError(f"selected_attention: seq_len = {longest(S, rows)} but k holds {k.shape[1]} positions")
    if backend == "reference":
        out, count = _reference(q, k, v, blocks, cfg.l_sel, S, rows)
    else:
        out, _, count = _attend(q, k, v, blocks, cfg.l_sel, S, rows, reads is not None, backend)
    if reads is not None:
        reads += count
    return apply_gate(out, gate)


_Three = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _forms(backend: str) -> tuple[_Three, _Three]:
    """The forward and backward that a backend names; they take and return the same."""
    if backend == "triton":
        from nsa.kernels import selected

        return selected.forward, selected.backward
    return _forward, _backward


@torch.library.custom_op("nsa::selected_attention", mutates_args=())
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    l_sel: int,
    seq_len: int,
    rows: torch.Tensor | None,
    count: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    route = routing.choose("selected", q, k, v, backend=backend)
    run = _forms(route.backend)[0]
    if rows is None:
        result = run(q, k, v, blocks, l_sel, seq_len, count)
        routing.launches["selected", route.backend] += 1
        return result
    T = q.shape[1]

    def one(b: int, S: int, t: int) -> tuple[torch.Tensor, ...]:
        row, last = slice(b, b + 1), slice(T - t, T)
        out, lse, n = run(q[row, last], k[row], v[row], blocks[row, last], l_sel, S, count)
        return pad_front(out, T, 0.0), pad_front(lse, T, float("-inf")), n

    out, lse, n = each_row(one, T, rows)
    routing.launches["selected", route.backend] += 1
    return out, lse, n


@_attend.register_fake
def _(q, k, v, blocks, l_sel, seq_len, rows, count, backend):
    B, T, H, _ = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(B, T, H, v.shape[3]),
        q.new_empty(B, T, H, dtype=lse_dtype),
        q.new_empty(B, k.shape[2], dtype=torch.int64),
    )


@torch.library.custom_op("nsa::selected_attention_backward", mutates_args=())
def _attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    l_sel: int,
    seq_len: int,
    rows: torch.Tensor | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    route = routing.choose("selected", q, k, v, backend=backend, training=True)
    run = _forms(route.backend)[1]
    if rows is None:
        result = run(dout, q, k, v, blocks, out, lse, l_sel, seq_len)
        routing.launches["selected_backward", route.backend] += 1
        return result
    T = q.shape[1]

    def one(b: int, S: int, t: int) -> tuple[torch.Tensor, ...]:
        row, last = slice(b, b + 1), slice(T - t, T)
        dq, dk, dv = run(
            dout[row, last], q[row, last], k[row], v[row], blocks[row, last], out[row, last], lse[row, last], l_sel, S
        )
        return pad_front(dq, T, 0.0), dk, dv

    dq, dk, dv = each_row(one, T, rows)
    routing.launches["selected_backward", route.backend] += 1
    return dq, dk, dv


@_attend_backward.register_fake
def _(dout, q, k, v, blocks, out, lse, l_sel, seq_len, rows, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, blocks, ctx.l_sel, ctx.seq_len, rows, _, ctx.backend = inputs
    out, lse, count = output
    ctx.mark_non_differentiable(lse, count)
    ctx.save_for_backward(q, k, v, blocks, out, lse, rows)


def _autograd(ctx, dout, _dlse, _dcount):
    q, k, v, blocks, out, lse, rows = ctx.saved_tensors
    grads = _attend_backward(dout, q, k, v, blocks, out, lse, ctx.l_sel, ctx.seq_len, rows, ctx.backend)
    return *grads, None, None, None, None, None, None


_attend.register_autograd(_autograd, setup_context=_setup)


def _check_values(blocks: torch.Tensor, M: int) -> None:
    """Blocks outside [-1, M) are a caller's mistake; looked at on a CPU, where looking stalls nothing."""
    if blocks.device.type != "cpu" or not blocks.numel():
        return
    low, high = (int(x) for x in blocks.aminmax())
    if low < -1 or high >= M:
        raise ValueError(f"selected_attention: block {low if low < -1 else high} is outside -1 .. {M - 1}")


class _Past:
    """Inverse lists of one chunk of queries: (query, slot) pairs sorted by the past KV block that they chose.

    Each block's pairs are padded to whole tiles of P. Rows are indices into [B*Tc*G] queries, with one more row for
    padding. A pair whose block is the query's own is not here: that part is causal, see `_own`.
    """

    def __init__(self, blocks: torch.Tensor, own: torch.Tensor, n_blocks: int, P: int) -> None:
        B, Tc, G, N = blocks.shape
        device, queries = blocks.device, B * Tc * G
        past = (blocks >= 0) & (blocks < own)  # own [Tc,1,1]: the query's own block
        group = torch.arange(B, device=device)[:, None, None] * G + torch.arange(G, device=device)
        key = blocks.long() + group.unsqueeze(-1) * n_blocks
        pairs = past.flatten().nonzero().squeeze(1)  # flat (query, slot) of every pair
        key, order = key.flatten().index_select(0, pairs).sort(stable=True)
        pairs = pairs.index_select(0, order)
        count = torch.bincount(key, minlength=B * G * n_blocks)
        tiles = (count + P - 1) // P
        first_tile, first_pair = tiles.cumsum(0) - tiles, count.cumsum(0) - count
        self.block = torch.repeat_interleave(torch.arange(len(count), device=device), tiles)  # [tiles]
        place = first_tile[key] * P + torch.arange(len(pairs), device=device) - first_pair[key]
        n_places = len(self.block) * P
        self.query = place.new_full((n_places,), queries).index_copy(0, place, pairs // N)  # [tiles*P]
        # Where each slot's result lies; empty slots point one past the last place.
        self.place = place.new_full((queries * N,), n_places).index_copy(0, pairs, place)
        self.pairs = torch.bincount(pairs // (Tc * G * N) * G + pairs // N % G, minlength=B * G).view(B, G)
        self.P, self.N = P, N

    def tiles(self, x: torch.Tensor) -> torch.Tensor:
        """Query rows [B*Tc*G, R, D] -> [tiles, 1, P*R, D]; padded pairs read 0."""
        R, D = x.shape[1:]
        rows = F.pad(x.reshape(len(x), -1), (0, 0, 0, 1))
        return rows.index_select(0, self.query).view(-1, 1, self.P * R, D)

    def slots(self, lse: torch.Tensor, R: int) -> torch.Tensor:
        """Tiles' lse [tiles, 1, P*R] -> slots' [B*Tc*G, N, R], -inf in an empty one."""
        rows = F.pad(lse.reshape(-1, R), (0, 0, 0, 1), value=float("-inf"))
        return rows.index_select(0, self.place).view(-1, self.N, R)

    def summed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Tile results [tiles, 1, P*R, D] summed over a query's slots by weight [B*Tc*G, N, R] -> [B*Tc*G, R, D].

        An empty slot weighs 0. embedding_bag adds the rows where they lie; a gather would first copy them.
        """
        Q, N, R = weight.shape
        if not len(self.query):
            return x.new_zeros(Q, R, x.shape[-1], dtype=weight.dtype)
        place = self.place.clamp(max=len(self.query) - 1).view(Q, 1, N)
        rows = place * R + torch.arange(R, device=x.device)[:, None]  # [Q,R,N]
        weight = weight.transpose(1, 2).reshape(Q * R, N)
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        return F.embedding_bag(rows.view(Q * R, N), flat, per_sample_weights=weight, mode="sum").view(Q, R, -1)


class _Own:
    """The queries' own blocks of one chunk: causal within a block, so dense and without a gather."""

    def __init__(self, t0: int, Tc: int, l_sel: int) -> None:
        self.l_sel, self.Tc = l_sel, Tc
        self.first = t0 // l_sel
        self.before = t0 - self.first * l_sel
        self.count = -(-(self.before + Tc) // l_sel)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[B,Tc,G,R,D] -> [B*G*m, R, l', D]."""
        after = self.count * self.l_sel - self.before - self.Tc
        x = F.pad(x, (0, 0, 0, 0, 0, 0, self.before, after)).unflatten(1, (self.count, self.l_sel))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(0, 2)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Blocks [B,G,M,l',D] -> [B*G*m, 1, l', D]."""
        return x[:, :, self.first : self.first + self.count].flatten(0, 2).unsqueeze(1)

    def queries_back(self, x: torch.Tensor, B: int) -> torch.Tensor:
        """[B*G*m, R, l', D] -> [B*Tc*G, R, D]."""
        x = x.unflatten(0, (B, -1, self.count)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        return x[:, self.before : self.before + self.Tc].flatten(0, 2)


def _by_block(x: torch.Tensor, S: int, l_sel: int) -> torch.Tensor:
    """[B,>=S,G,D] -> [B,G,M,l',D], the last block padded with zeros."""
    M = -(-S // l_sel)
    x = F.pad(x[:, :S], (0, 0, 0, 0, 0, M * l_sel - S))
    return x.unflatten(1, (M, l_sel)).permute(0, 3, 1, 2, 4).contiguous()


def _chunks(
    q: torch.Tensor, blocks: torch.Tensor, l_sel: int, S: int
) -> Iterator[tuple[slice, _Past, _Own, torch.Tensor]]:
    """Walk the queries in chunks: (slice, past pairs, own blocks, whether each [B*Tc*G] row chose its own block)."""
    B, T, H, D = q.shape
    G, N = blocks.shape[2:]
    step = max(l_sel, _CHUNK // (B * H * N * D) // l_sel * l_sel)
    start = 0
    while start < T:
        # End on a block boundary, so that no own block is padded twice.
        stop = min(T, start + step - (S - T + start) % l_sel)
        t0 = S - T + start
        own = torch.arange(t0, t0 + stop - start, device=q.device).div(l_sel, rounding_mode="floor")[:, None, None]
        part = blocks[:, start:stop]
        past = _Past(part, own, -(-S // l_sel), max(1, _TILE_ROWS // (H // G)))
        yield slice(start, stop), past, _Own(t0, stop - start, l_sel), (part == own).any(-1).flatten()
        start = stop


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, l_sel: int, S: int, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T, H, D = q.shape
    G = blocks.shape[2]
    R, scale = H // G, D**-0.5
    _check_values(blocks, -(-S // l_sel))
    if T <= _FEW:
        return (_by_query if q.device.type == "cpu" and T else _gathered)(q, k, v, blocks, l_sel, S)
    k_blocks, v_blocks = _by_block(k, S, l_sel), _by_block(v, S, l_sel)
    k_tiles, v_tiles = k_blocks.flatten(0, 2).unsqueeze(1), v_blocks.flatten(0, 2).unsqueeze(1)
    out = q.new_empty(B, T, H, v.shape[3])
    lse = q.new_empty(B, T, H, dtype=torch.promote_types(q.dtype, torch.float32))
    reads = q.new_zeros(B, G, dtype=torch.int64)
    for rows, past, own, has_own in _chunks(q, blocks, l_sel, S):
        part = q[:, rows].unflatten(2, (G, R))
        o, e = dense.forward(
            past.tiles(part.flatten(0, 2)),
            k_tiles.index_select(0, past.block),
            v_tiles.index_select(0, past.block),
            scale,
        )
        slot_lse = past.slots(e, R)
        own_o, own_e = dense.forward(own.queries(part), own.keys(k_blocks), own.keys(v_blocks), scale, causal=True)
        own_lse = own.queries_back(own_e.unsqueeze(-1), B).squeeze(-1).masked_fill(~has_own[:, None], float("-inf"))
        merged, total = _merge(past, o, slot_lse, own.queries_back(own_o, B), own_lse)
        out[:, rows] = merged.view(B, -1, H, v.shape[3])
        lse[:, rows] = total.view(B, -1, H)
        if count:
            inside = torch.arange(own.before, own.before + own.Tc, device=q.device) % l_sel + 1
            chosen = has_own.view(B, -1, G) * inside[:, None]
            reads += past.pairs * l_sel + chosen.sum(1)
    return out, lse, reads


def _merge(
    past: _Past, tile_out: torch.Tensor, slot_lse: torch.Tensor, own_out: torch.Tensor, own_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh the results of a query's slots by lse: tiles [tiles,1,P*R,D] and [Q,N,R], own block [Q,R,D] and [Q,R]."""
    lse = torch.cat([slot_lse, own_lse.unsqueeze(1)], dim=1).logsumexp(1)
    finite = lse.masked_fill(lse.isneginf(), 0.0)
    out = past.summed(tile_out, torch.exp(slot_lse - finite.unsqueeze(1)))
    return out.addcmul_(own_out.to(out.dtype), torch.exp(own_lse - finite).unsqueeze(-1)), lse


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    l_sel: int,
    S: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, _, H, D = q.shape
    G = blocks.shape[2]
    R, scale = H // G, D**-0.5
    accumulator = torch.promote_types(q.dtype, torch.float32)
    k_blocks, v_blocks = _by_block(k, S, l_sel), _by_block(v, S, l_sel)
    k_tiles, v_tiles = k_blocks.flatten(0, 2).unsqueeze(1), v_blocks.flatten(0, 2).unsqueeze(1)
    dq = q.new_empty(q.shape)
    dk, dv = torch.zeros_like(k_blocks, dtype=accumulator), torch.zeros_like(v_blocks, dtype=accumulator)
    for rows, past, own, has_own in _chunks(q, blocks, l_sel, S):
        chosen = has_own.view(B, -1, G, 1, 1)
        do, x, o = (y[:, rows].unflatten(2, (G, R)) for y in (dout, q, out))
        e = lse[:, rows].unflatten(2, (G, R)).unsqueeze(-1)
        e = e.masked_fill(e.isneginf(), 0.0)  # a query without blocks: its dout row below is zero
        do = do.masked_fill(lse[:, rows].unflatten(2, (G, R)).unsqueeze(-1).isneginf(), 0.0)
        slot_dq, slot_dk, slot_dv = dense.backward(
            past.tiles(do.flatten(0, 2)),
            past.tiles(x.flatten(0, 2)),
            k_tiles.index_select(0, past.block),
            v_tiles.index_select(0, past.block),
            past.tiles(o.flatten(0, 2)),
            past.tiles(e.flatten(0, 2)).squeeze(-1),
            scale,
        )
        own_dq, own_dk, own_dv = dense.backward(
            own.queries(do * chosen),
            own.queries(x),
            own.keys(k_blocks),
            own.keys(v_blocks),
            own.queries(o),
            # An unchosen own block was not part of the softmax: its scores may exceed lse, and inf * 0 is no zero.
            own.queries(e.masked_fill(~chosen, torch.finfo(e.dtype).max)).squeeze(-1),
            scale,
            causal=True,
        )
        filled = (past.place < len(past.query)).view(-1, past.N, 1).expand(-1, -1, R)
        total = own.queries_back(own_dq, B).to(accumulator) + past.summed(slot_dq, filled.to(accumulator))
        dq[:, rows] = total.reshape(B, -1, H, D).to(q.dtype)
        for whole, tiles, own_part in ((dk, slot_dk, own_dk), (dv, slot_dv, own_dv)):
            whole.view(-1, l_sel, whole.shape[-1]).index_add_(0, past.block, tiles.squeeze(1).to(accumulator))
            blocks_of_chunk = whole[:, :, own.first : own.first + own.count]
            blocks_of_chunk += own_part.view(blocks_of_chunk.shape).to(accumulator)
    return dq, _by_token(dk, k), _by_token(dv, v)


def _by_token(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B,G,M,l',D] -> [B,>=S,G,D] of like's shape and dtype, zero past the last block."""
    flat = x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : like.shape[1]]
    return F.pad(flat, (0, 0, 0, 0, 0, like.shape[1] - flat.shape[1])).to(like.dtype).contiguous()
