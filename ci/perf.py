"""Is head slower than base? A judgement that noise does not make, from interleaved rounds; pure, and re-derivable.

Rounds come in blocks of four, base head head base, each a fresh process: what drifts linearly within a block cancels.
A length's slowdown is the median over blocks of head's mean over base's, less one. Its noise floor is what the same
median shows between the two base rounds of each block, which differ by nothing but chance (one standard deviation,
under all exchanges of the two). A regression is a slowdown whose lower confidence bound (bootstrap over blocks, shared
out over the lengths) exceeds both 5 % and three times the noise, and 20 us. Blocks with a throttled round are dropped;
too few of them, or a noise that would hide a fifth, is INCONCLUSIVE: a guard that could not see says so.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

from ci.outcome import INFRASTRUCTURE, PERFORMANCE, READY

Verdict = Literal["OK", "REGRESSION", "INCONCLUSIVE"]

ORDER = ("base", "head", "head", "base")
RELATIVE = 0.05
NOISES = 3.0
ABSOLUTE_US = 20.0
MIN_BLOCKS = 6  # below six, even blocks that all agree leave the bound at the smallest of them
BLIND = 0.20
CONFIDENCE = 0.975
RESAMPLES = 1000
EXHAUSTIVE = 8  # blocks up to which every exchange is tried; beyond that many are drawn


class Block(NamedTuple):
    """Milliseconds of a block's four rounds, in the order they ran: base, head, head, base."""

    before: float
    first: float
    second: float
    after: float

    @property
    def base(self) -> float:
        return (self.before + self.after) / 2

    @property
    def head(self) -> float:
        return (self.first + self.second) / 2


@dataclass(frozen=True)
class Finding:
    """One length: medians in ms; slowdown, its lower bound, noise and threshold as fractions; bound in us; why."""

    S: int
    blocks: int
    base_ms: float
    head_ms: float
    slowdown: float
    lower: float
    lower_us: float
    noise: float
    threshold: float
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Comparison:
    """All lengths. `gating`: a regression fails the run; elsewhere it is only reported."""

    verdict: Verdict
    exit_code: int
    gating: bool
    dropped: int
    findings: list[Finding]


def compare(rounds: Sequence[dict[str, Any]], *, gating: bool) -> Comparison:
    """Judges rounds {"tree": base|head, "throttled": bool, "ms": {S: ms}}, in the order they ran, four a block.

    ValueError for rounds that are not whole blocks in that order, or not of the same lengths.
    """
    trees = [each["tree"] for each in rounds]
    if len(rounds) % 4 or trees != list(ORDER) * (len(rounds) // 4):
        raise ValueError("the rounds are not whole blocks of base, head, head, base")
    groups = [rounds[start : start + 4] for start in range(0, len(rounds), 4)]
    kept = [group for group in groups if not any(each["throttled"] for each in group)]
    lengths = sorted({int(S) for each in rounds for S in each["ms"]})
    if any({int(S) for S in each["ms"]} != set(lengths) for each in rounds) or not lengths:
        raise ValueError("the rounds are not of the same lengths")
    if not all(math.isfinite(ms) and ms > 0 for each in rounds for ms in map(float, each["ms"].values())):
        raise ValueError("a time is no positive number")
    findings = [
        judge(S, [Block(*(float(each["ms"][str(S)]) for each in group)) for group in kept], share=len(lengths))
        for S in lengths
    ]
    verdict = _overall([each.verdict for each in findings])
    code = {"OK": READY, "INCONCLUSIVE": INFRASTRUCTURE, "REGRESSION": PERFORMANCE if gating else READY}[verdict]
    return Comparison(verdict, code, gating, len(groups) - len(kept), findings)


def judge(S: int, blocks: Sequence[Block], *, share: int = 1) -> Finding:
    """One length's finding; `share`: how many lengths are judged together."""
    if len(blocks) < MIN_BLOCKS:
        reason = f"{len(blocks)} blocks left, {MIN_BLOCKS} are needed"
        return Finding(S, len(blocks), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, "INCONCLUSIVE", reason)
    ratios = [block.head / block.base - 1 for block in blocks]
    lower = _lower_bound(ratios, share)
    lower_us = _lower_bound([1e3 * (block.head - block.base) for block in blocks], share)
    noise = noise_floor([block.after / block.before - 1 for block in blocks])
    threshold = max(RELATIVE, NOISES * noise)
    verdict: Verdict = "OK"
    reason = "within the threshold"
    if lower > threshold and lower_us > ABSOLUTE_US:
        verdict, reason = "REGRESSION", f"at least {lower:.1%} and {lower_us:.0f} us slower"
    elif NOISES * noise > BLIND:
        verdict, reason = "INCONCLUSIVE", f"too noisy: {noise:.1%} between two runs of the same commit"
    elif lower > threshold:
        reason = f"slower by less than {ABSOLUTE_US:.0f} us for certain"
    base, head = (statistics.median(getattr(block, tree) for block in blocks) for tree in ("base", "head"))
    slowdown = statistics.median(ratios)
    return Finding(S, len(blocks), base, head, slowdown, lower, lower_us, noise, threshold, verdict, reason)


def noise_floor(differences: Sequence[float]) -> float:
    """One standard deviation of the median, were the two sides of every difference exchanged by chance."""
    if len(differences) <= EXHAUSTIVE:
        flips: Sequence[Sequence[int]] = list(product((1, -1), repeat=len(differences)))
    else:
        chance = random.Random(1)
        flips = [[chance.choice((1, -1)) for _ in differences] for _ in range(2**EXHAUSTIVE)]
    medians = (statistics.median(sign * d for sign, d in zip(signs, differences, strict=True)) for signs in flips)
    return statistics.fmean(median**2 for median in medians) ** 0.5


def _lower_bound(values: Sequence[float], share: int) -> float:
    """The value that the true median exceeds with the confidence asked for, by resampling the blocks."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[int((1 - CONFIDENCE) / share * RESAMPLES)]


def _overall(verdicts: Sequence[Verdict]) -> Verdict:
    worst: tuple[Verdict, ...] = ("REGRESSION", "INCONCLUSIVE")
    return next((verdict for verdict in worst if verdict in verdicts), "OK")


def render(found: Comparison, about: dict[str, Any]) -> str:
    """perf.md: the verdict in the first line, then what was compared and a row a length."""
    only = "" if found.gating or found.verdict != "REGRESSION" else " (report only on this machine)"
    lines = [f"# {found.verdict}{only}: {about['head']} against {about['base']}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if name not in ("base", "head")]
    lines += [f"- blocks dropped for throttling: {found.dropped}", ""]
    columns: dict[str, Callable[[Finding], str]] = {
        "S": lambda f: str(f.S),
        "base ms": lambda f: f"{f.base_ms:.4f}",
        "head ms": lambda f: f"{f.head_ms:.4f}",
        "slowdown": lambda f: f"{f.slowdown:+.1%}",
        "at least": lambda f: f"{f.lower:+.1%}, {f.lower_us:+.0f} us",
        "noise": lambda f: f"{f.noise:.1%}",
        "threshold": lambda f: f"{f.threshold:.1%}",
        "verdict": lambda f: f"{f.verdict}: {f.reason}",
    }
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(show(each) for show in columns.values()) + " |" for each in found.findings]
    return "\n".join(lines) + "\n"
