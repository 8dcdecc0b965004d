"""The selected branch on dense products, block-major: for every KV block the queries that chose it are gathered, one
dense product serves them all, and a query's slots are merged by logsumexp; no key is copied once a query. The Triton
kernels have the same shape."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from nsa.blocks import Pattern
from nsa.kernels.plain import dense

# Query rows (pairs x heads) of a tile against one KV block: enough for a good product, few enough to waste little.
_TILE_ROWS = 192
# Elements of one gathered operand of a chunk of queries (64 MB in fp32): bounds the workspace at any length.
_CHUNK = 1 << 24
# Up to this many queries gathering tokens is cheaper than sorting lists; decode always is.
_FEW = 4


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, p: Pattern, S: int, count: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [B,T,H,Dv], lse [B,T,H], tokens read [B,G] or []; q [B,T,H,Dk], k [B,>=S,G,Dk], v [B,>=S,G,Dv]."""
    B, T, H, D = q.shape
    G, l_sel = blocks.shape[2], p.l_sel
    R, scale = H // G, D**-0.5
    _check_values(blocks, -(-S // l_sel))
    if 0 < T <= _FEW:
        out, lse, reads = _by_query(q, k, v, blocks, l_sel, S)
        return out, lse, reads if count else reads.new_empty(0)
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
    return out, lse, reads if count else reads.new_empty(0)


def _merge(
    past: _Past, tile_out: torch.Tensor, slot_lse: torch.Tensor, own_out: torch.Tensor, own_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh the results of a query's slots by lse: tiles [tiles,1,P*R,D] and [Q,N,R], own block [Q,R,D] and [Q,R]."""
    lse = torch.cat([slot_lse, own_lse.unsqueeze(1)], dim=1).logsumexp(1)
    finite = lse.masked_fill(lse.isneginf(), 0.0)
    out = past.summed(tile_out, torch.exp(slot_lse - finite.unsqueeze(1)))
    return out.addcmul_(own_out.to(out.dtype), torch.exp(own_lse - finite).unsqueeze(-1)), lse


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, p: Pattern, S: int, backend: str, gate: torch.Tensor | None, delta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv of `forward`'s out."""
    B, _, H, D = q.shape
    G, l_sel, dout = blocks.shape[2], p.l_sel, dense.gated(dout, gate)
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


def _by_query(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, l_sel: int, S: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A few queries: their tokens are gathered, and a group's heads are the rows of one dense problem over them."""
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
