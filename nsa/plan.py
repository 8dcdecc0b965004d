"""What runs the core of a layer for inputs of one shape, decided once: a route for each of its operations.

`Plan.of` looks at the tensors of the first call of a shape and remembers; a growing length adds no plan a token, since
lengths count only where a route depends on them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from nsa import routing
from nsa.blocks import Pattern, n_compressed

_MOST_PLANS = 256


@dataclass(frozen=True)
class Plan:
    """The routes of one shape, by operation, forward and backward alike.

    summed: the selected branch's last kernel also applies the gates and adds the other two branches, and its backward
    adds their dQ. everything: so few positions that each query attends to all of its past, and no block is chosen.
    """

    routes: dict[str, routing.Route]
    summed: bool
    everything: bool

    def form(self, op: str, q: torch.Tensor) -> Any:
        """The module that runs `op`; what its functions take: `nsa.ops.branch`."""
        return routing.form(op, self.routes[op].backend, q)

    def backend(self, op: str) -> str:
        return self.routes[op].backend

    def as_dict(self) -> dict[str, Any]:
        """What runs each operation, and the reasons against what would be preferred, thresholds included."""
        return {op: {"backend": route.backend, "rejected": route.rejected} for op, route in self.routes.items()}

    @staticmethod
    def of(
        q: torch.Tensor,
        k_cmp: torch.Tensor,
        v_cmp: torch.Tensor,
        logits: torch.Tensor,
        p: Pattern,
        S: int | None,
        *,
        training: bool,
        backend: str | None = None,
    ) -> Plan:
        """The plan for q [B,T,H,Dk], k_cmp [B,>=C,G,Dk], v_cmp [B,>=C,G,Dv] and gate logits; S None for ragged rows.

        Raises Unsupported if `backend` is given and one of the operations cannot run by it.
        """
        seen = k_cmp.shape[1] if S is None else n_compressed(S, p)
        whole = S == q.shape[1]
        # How many blocks are seen matters to the limit of a kernel alone: its magnitude will do.
        key = (
            q.shape, q.dtype, q.device, k_cmp.shape[2], v_cmp.shape[3], logits.dtype, whole, S is None,
            seen.bit_length(), S is not None and S <= p.n_sel * p.l_sel, p, training, backend, routing.flags(),
        )  # fmt: skip
        return _cached(key, lambda: _make(q, k_cmp, v_cmp, logits, p, S, seen, training, backend))


def _make(
    q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, logits: torch.Tensor, p: Pattern, S: int | None,
    seen: int, training: bool, backend: str | None,
) -> Plan:  # fmt: skip
    facts: dict[str, Any] = {} if S is None else {"seq_len": S}
    three = (q, k_cmp, v_cmp)
    asked: dict[str, Any] = {"backend": backend, "training": training}
    routes = {
        "compressed": routing.choose("compressed", *three, **asked, **facts),
        "selection": routing.choose("selection", q, k_cmp, **asked, blocks=seen),
        "selected": routing.choose("selected", *three, **asked, **facts),
        "window": routing.choose("window", *three, **asked, **facts),
        "combine": routing.choose("combine", q, q, q, logits, **asked),
    }
    summed = S is not None and routes["selected"].backend == "triton" and routes["combine"].backend == "triton"
    everything = summed and S is not None and routing.form("selected", "triton", q).takes_all("triton", *three, p, S)
    return Plan(routes, summed, everything)


_plans: OrderedDict[Hashable, Plan] = OrderedDict()
_lock = Lock()


def _cached(key: Hashable, make: Any) -> Plan:
    with _lock:
        if (plan := _plans.get(key)) is not None:
            _plans.move_to_end(key)
            return plan
    plan = make()
    with _lock:
        _plans[key] = plan
        while len(_plans) > _MOST_PLANS:
            _plans.popitem(last=False)
    return plan
