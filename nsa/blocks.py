"""Block arithmetic on plain integers: which blocks exist, which are visible, how many tokens a step reads.

S is the number of positions so far; t a position (0-based); j a compressed block, m a selection block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nsa.config import NSAConfig


class Pattern(NamedTuple):
    """The numbers of a sparse pattern, as the operators and kernels take them; what they mean: `NSAConfig`."""

    l: int  # noqa: E741 - the paper's symbol
    d: int
    l_sel: int
    n_sel: int
    w: int
    init_blocks: int
    local_blocks: int


class Reads(NamedTuple):
    """Tokens (or compressed blocks) read, per batch row and KV group."""

    cmp: int
    sel: int
    win: int

    @property
    def total(self) -> int:
        return self.cmp + self.sel + self.win


def n_compressed(S: int, cfg: NSAConfig | Pattern) -> int:
    """C(S): compressed blocks that are whole within S positions. Block j covers tokens [j*d, j*d + l)."""
    return 0 if cfg.l > S else (S - cfg.l) // cfg.d + 1


def n_selection(S: int, cfg: NSAConfig | Pattern) -> int:
    """M(S): selection blocks that hold at least one of S positions. Block m covers tokens [m*l', (m+1)*l')."""
    return -(-S // cfg.l_sel)


def overlap_taps(cfg: NSAConfig | Pattern) -> list[tuple[int, int]]:
    """Eq. 9 as (offset, weight): p_slc[m] = sum of weight * p_cmp[m*l'/d + offset], offsets ascending.

    The weight is the number of tokens that the two blocks share, in strides of d. 32/16/64 gives
    [(-1, 1), (0, 2), (1, 2), (2, 2), (3, 1)].
    """
    taps = []
    for offset in range(-(cfg.l // cfg.d - 1), cfg.l_sel // cfg.d):
        start, end = offset * cfg.d, offset * cfg.d + cfg.l
        taps.append((offset, (min(end, cfg.l_sel) - max(start, 0)) // cfg.d))
    return taps


def reads(S: int, cfg: NSAConfig) -> Reads:
    """Tokens that one decode step at context S reads (this token included), per batch row and KV group."""
    return Reads(
        cmp=n_compressed(S, cfg),
        sel=min(S, (cfg.n_sel - 1) * cfg.l_sel + (S - 1) % cfg.l_sel + 1),
        win=min(cfg.w, S),
    )


def reads_range(start: int, stop: int, cfg: NSAConfig) -> Reads:
    """Sum of `reads(S)` for S in (start, stop]: what a prefill of positions start .. stop-1 reads in all."""
    per_step = [reads(S, cfg) for S in range(start + 1, stop + 1)]
    return Reads(*(sum(column) for column in zip(*per_step, strict=True))) if per_step else Reads(0, 0, 0)
