"""Compressed attention: each query attends to the compressed blocks that end at or before it (Eqs. 5 and 7).

Query t sees block j iff j*d + l - 1 <= t. With u = t - (l-1) = d*a + r that is j <= a for every residue r, so long
inputs are d independent causal problems of S/d rows against the same compressed keys: no mask as large as T x C.
"""

import torch
import torch.nn.functional as F

from nsa import routing
from nsa.blocks import n_compressed
from nsa.config import NSAConfig
from nsa.ops import dense
from nsa.ops.checks import check_blocks, check_qkv, check_seq_len, each_row, longest, pad_front
from nsa.ops.combine import apply_gate

# Below this many rows a residue, one small mask is cheaper than d problems.
_MIN_ROWS = 32


def visible_blocks(T: int, S: int, cfg: NSAConfig, device: torch.device) -> torch.Tensor:
    """[T, C] bool: which compressed blocks each of the last T of S positions sees."""
    t = torch.arange(S - T, S, device=device)
    j = torch.arange(n_compressed(S, cfg), device=device)
    return j * cfg.d + cfg.l - 1 <= t[:, None]


def compressed_attention_reference(
    q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, cfg: NSAConfig, *, seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in plain differentiable torch. Shapes as `compressed_attention`; seq_len an int."""
    T, H, D = q.shape[1:]
    G, C = k_cmp.shape[2], n_compressed(seq_len, cfg)
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).unflatten(2, (G, H // G))  # [B,T,G,R,D]
    visible = visible_blocks(T, seq_len, cfg, q.device)[None, :, None, None]  # [1,T,1,1,C]
    scores = torch.einsum("btgrd,bcgd->btgrc", grouped, k_cmp[:, :C].to(dtype)) * D**-0.5
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    # Where nothing is visible lse is -inf; 0 there keeps exp(-inf - 0) = 0 and its gradient finite.
    p = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1))
    p = p / p.sum(-1, keepdim=True).clamp(min=0.5)  # takes back the rounding of lse; a blind row stays 0
    out = torch.einsum("btgrc,bcgd->btgrd", p, v_cmp[:, :C].to(dtype))
    return out.flatten(2, 3).to(q.dtype), lse.flatten(2, 3).detach()


def _reference(
    q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, cfg: NSAConfig, S: int, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference's output and lse, and the blocks read; ragged rows one by one."""
    T = q.shape[1]
    if rows is None:
        out, lse = compressed_attention_reference(q, k_cmp, v_cmp, cfg, seq_len=S)
        return out, lse, visible_blocks(T, S, cfg, q.device).sum().expand(q.shape[0], k_cmp.shape[2])

    def one(b: int, S: int, t: int) -> tuple[torch.Tensor, ...]:
        row = slice(b, b + 1)
        out, lse, count = _reference(q[row, T - t :], k_cmp[row], v_cmp[row], cfg, S, None)
        return pad_front(out, T, 0.0), pad_front(lse, T, float("-inf")), count

    out, lse, count = each_row(one, T, rows)
    return out, lse, count


def compressed_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    cfg: NSAConfig,
    *,
    seq_len: int | torch.Tensor,
    gate: torch.Tensor | None = None,
    reads: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the visible compressed blocks.

    q [B,T,H,Dk], the last T of `seq_len` positions (an int, or int32 [B] for ragged rows); k_cmp [B,>=C,G,Dk],
    v_cmp [B,>=C,G,Dv] with C = n_compressed(seq_len). gate [B,T,H] scales the output; reads, int64 [B,G], gains the
    number of blocks read. Returns out [B,T,H,Dv] in q.dtype and lse [B,T,H], the natural logsumexp of the scaled
    scores (fp32; fp64 for fp64), which carries no gradient. A query that sees no block gets out 0 and lse -inf.
    Differentiable in q, k_cmp, v_cmp, gate. Raises ValueError for inputs that do not fit, Unsupported for a named
    backend that cannot run.
    """
    check_qkv("compressed_attention", q, k_cmp, v_cmp)
    S, rows = check_seq_len("compressed_attention", q, seq_len)
    check_blocks("compressed_attention", k_cmp, longest(S, rows), cfg)
    if backend == "reference":
        out, lse, count = _reference(q, k_cmp, v_cmp, cfg, S, rows)
    else:
        out, lse, count = _attend(q, k_cmp, v_cmp, cfg.l, cfg.d, S, rows, reads is not None, backend)
    if reads is not None:
        reads += count
    return apply_gate(out, gate), lse


@torch.library.custom_op("nsa::compressed_attention", mutates_args=())
def _attend(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    l: int,  # noqa: E741
    d: int,
    seq_len: int,
    rows: torch.Tensor | None,
    count: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    route = routing.choose("compressed", q, k_cmp, v_cmp, backend=backend, seq_len=seq_len)
    routing.launches["compressed", route.backend] += 1
    if rows is None:
        return _forward(route.backend, q, k_cmp, v_cmp, l, d, seq_len, count)
    T = q.shape[1]

    def one(b: int, S: int, t: int) -> tuple[torch.Tensor, ...]:
        row = slice(b, b + 1)
        out, lse, n = _forward(route.backend, q[row, T - t :], k_cmp[row], v_cmp[row], l, d, S, count)
        return pad_front(out, T, 0.0), pad_front(lse, T, float("-inf")), n

    out, lse, n = each_row(one, T, rows)
    return out, lse, n


@_attend.register_fake
def _(q, k_cmp, v_cmp, l, d, seq_len, rows, count, backend):  # noqa: E741
    B, T, H, _ = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty(B, T, H, v_cmp.shape[3]),
        q.new_empty(B, T, H, dtype=lse_dtype),
        q.new_empty(B, k_cmp.shape[2], dtype=torch.int64),
    )


@torch.library.custom_op("nsa::compressed_attention_backward", mutates_args=())
def _attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    l: int,  # noqa: E741
    d: int,
    seq_len: int,
    rows: torch.Tensor | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    route = routing.choose("compressed", q, k_cmp, v_cmp, backend=backend, training=True, seq_len=seq_len)
    routing.launches["compressed_backward", route.backend] += 1
    if rows is None:
        return _backward(route.backend, dout, q, k_cmp, v_cmp, out, lse, l, d, seq_len)
    T = q.shape[1]

    def one(b: int, S: int, t: int) -> tuple[torch.Tensor, ...]:
        row, last = slice(b, b + 1), slice(T - t, T)
        past = (q[row, last], k_cmp[row], v_cmp[row], out[row, last], lse[row, last])
        dq, dk, dv = _backward(route.backend, dout[row, last], *past, l, d, S)
        return pad_front(dq, T, 0.0), dk, dv

    dq, dk, dv = each_row(one, T, rows)
    return dq, dk, dv


@_attend_backward.register_fake
def _(dout, q, k_cmp, v_cmp, out, lse, l, d, seq_len, rows, backend):  # noqa: E741
    return q.new_empty(q.shape), k_cmp.new_empty(k_cmp.shape), v_cmp.new_empty(v_cmp.shape)


def _setup(ctx, inputs, output):
    q, k_cmp, v_cmp, ctx.l, ctx.d, ctx.seq_len, rows, _, ctx.backend = inputs
    out, lse, count = output
    ctx.mark_non_differentiable(lse, count)
    ctx.save_for_backward(q, k_cmp, v_cmp, out, lse, rows)


def _autograd(ctx, dout, _dlse, _dcount):
    q, k_cmp, v_cmp, out, lse, rows = ctx.saved_tensors
    grads = _attend_backward(dout, q, k_cmp, v_cmp, out, lse, ctx.l, ctx.d, ctx.seq_len, rows, ctx.backend)
    return *grads, None, None, None, None, None, None


_attend.register_autograd(_autograd, setup_context=_setup)


class _Layout:
    """How the T queries that see a block are laid out as dense problems, and back again.

    Either one problem a batch row with a [T, C] mask, or d problems of A rows (row a, residue r) against C blocks.
    """

    def __init__(self, T: int, S: int, l: int, d: int, device: torch.device) -> None:  # noqa: E741
        self.C = 0 if l > S else (S - l) // d + 1
        self.blind = min(max(l - 1 - (S - T), 0), T) if self.C else T
        self.T, self.n = T, T - self.blind
        u_first, u_last = S - self.n - (l - 1), S - l
        a_first, a_last = u_first // d, u_last // d
        self.d = d if self.n and a_last - a_first + 1 >= _MIN_ROWS else 1
        if self.d == 1:
            self.before = self.after = 0
            a = (torch.arange(u_first, u_last + 1, device=device) // d)[:, None]
        else:
            self.before, self.after = u_first - a_first * d, (a_last + 1) * d - 1 - u_last
            a = torch.arange(a_first, a_last + 1, device=device)[:, None]
        self.visible = torch.arange(self.C, device=device) <= a  # [A, C]
        # The whole prefix from block 0 on is a square causal problem, which needs no mask.
        self.causal = self.d > 1 and a_first == 0

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[B,T,H,D] -> [B*d,H,A,D]."""
        x = F.pad(x[:, self.blind :], (0, 0, 0, 0, self.before, self.after))
        return x.unflatten(1, (-1, self.d)).permute(0, 2, 3, 1, 4).flatten(0, 1)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """[B,C,G,D] -> [B*d,G,C,D], every residue the same keys."""
        x = x[:, : self.C].transpose(1, 2).unsqueeze(1)
        return x.expand(-1, self.d, -1, -1, -1).flatten(0, 1)

    def queries_back(self, x: torch.Tensor, blind: float) -> torch.Tensor:
        """[B*d,H,A,D] -> [B,T,H,D], `blind` where nothing was visible."""
        x = x.unflatten(0, (-1, self.d)).permute(0, 3, 1, 2, 4).flatten(1, 2)
        return pad_front(x[:, self.before : self.before + self.n], self.T, blind)

    def keys_back(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[B*d,G,C,D] -> [B,>=C,G,D], the residues summed."""
        x = x.unflatten(0, (-1, self.d))
        total = x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)).to(like.dtype).transpose(1, 2)
        return F.pad(total, (0, 0, 0, 0, 0, like.shape[1] - self.C)).contiguous()

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.causal else dense.additive(self.visible, dtype)

    def count(self) -> int:
        """Blocks handed to the real queries."""
        per_query = self.visible.sum(-1).repeat_interleave(self.d)
        return int(per_query[self.before : self.before + self.n].sum())


def _forward(
    backend: str,
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    l: int,  # noqa: E741
    d: int,
    S: int,
    count: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, T, H, D = q.shape
    if dense.fused(backend, q):
        from nsa.kernels import compressed as kernel

        out, lse, read = kernel.forward(backend, q, k_cmp, v_cmp, l, d, S)
        return out, lse, q.new_full((B, k_cmp.shape[2]), read if count else 0, dtype=torch.int64)
    C = 0 if l > S else (S - l) // d + 1
    if T == 1 and C:  # it sees every block
        k, v = (x[:, :C].transpose(1, 2) for x in (k_cmp, v_cmp))
        out, lse = dense.forward(q.transpose(1, 2), k, v, D**-0.5)
        n = q.new_full((B, k_cmp.shape[2]), C if count else 0, dtype=torch.int64)
        return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous(), n
    n = q.new_zeros(B, k_cmp.shape[2], dtype=torch.int64)
    lay = _Layout(T, S, l, d, q.device)
    if not lay.n:
        lse = q.new_full((B, T, H), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
        return q.new_zeros(B, T, H, v_cmp.shape[3]), lse, n
    out, lse = dense.forward(
        lay.queries(q), lay.keys(k_cmp), lay.keys(v_cmp), D**-0.5, causal=lay.causal, mask=lay.mask(q.dtype)
    )
    if count:
        n += lay.count()
    out = lay.queries_back(out, 0.0).contiguous()
    lse = lay.queries_back(lse.unsqueeze(-1), float("-inf")).squeeze(-1).contiguous()
    return out, lse, n


def _backward(
    backend: str,
    dout: torch.Tensor,
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    l: int,  # noqa: E741
    d: int,
    S: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if dense.fused(backend, q):
        from nsa.kernels import compressed as kernel

        return kernel.backward(backend, dout, q, k_cmp, v_cmp, out, lse, l, d, S)
    lay = _Layout(q.shape[1], S, l, d, q.device)
    if not lay.n:
        return q.new_zeros(q.shape), k_cmp.new_zeros(k_cmp.shape), v_cmp.new_zeros(v_cmp.shape)
    dq, dk, dv = dense.backward(
        lay.queries(dout),
        lay.queries(q),
        lay.keys(k_cmp),
        lay.keys(v_cmp),
        lay.queries(out),
        lay.queries(lse.unsqueeze(-1)).squeeze(-1),
        q.shape[-1] ** -0.5,
        causal=lay.causal,
        mask=lay.mask(q.dtype),
    )
    return lay.queries_back(dq, 0.0).contiguous(), lay.keys_back(dk, k_cmp), lay.keys_back(dv, v_cmp)
