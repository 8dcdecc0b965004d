"""Which implementation of an op runs, and why not another: the one reader of NSA_* variables.

A backend is chosen by preference among those with no reason against them. Reasons are data, in this order: policy
(flags), environment (CUDA, Triton, flash-attn), inputs. `reference` stands last in every list and is always able.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch

PREFERENCES: dict[str, tuple[str, ...]] = {
    "compressed": ("triton", "cudnn", "flash", "sdpa", "reference"),
    "selection": ("triton", "torch", "reference"),
    "selected": ("triton", "torch", "reference"),
    "window": ("triton", "flash", "sdpa", "reference"),
    "combine": ("triton", "reference"),
}
BACKENDS = ("reference", "torch", "sdpa", "flash", "cudnn", "triton")

# What is known of an op's Triton kernels on a card (90 for sm_90), unlisted: nothing.
# measured: stage 2 passed there with these kernels, and docs/kernels.md has their times. They run unasked.
# compiled: each launch fits the card (`python -m nsa.kernels.report`) and the arithmetic holds in the interpreter, on
#           every CPU run. They run when asked for, by name or by their flag.
TRITON_PROOF: dict[str, dict[int, str]] = {
    "compressed": {80: "compiled", 89: "compiled", 90: "measured"},
    "selection": {80: "compiled", 89: "compiled", 90: "measured"},
    "selected": {80: "compiled", 89: "compiled", 90: "measured"},
    "combine": {80: "compiled", 89: "compiled", 90: "measured"},
    "window": {80: "compiled", 89: "compiled", 90: "measured"},
}
# The ops that NSA_USE_TRITON_SEL=0 takes Triton from; NSA_USE_TRITON_SEL=1 asks for the kernels of all of them.
_TRITON_SEL = ("selection", "selected")

# FA-2 is built for sm_80 on. cuDNN's attention was measured, and found ahead of FA-2, on sm_90 with torch 2.11.
_OLDEST_SM = {"flash": (8, 0), "cudnn": (9, 0)}
_CUDNN_TORCH = (2, 11)
# The compressed branch in Triton and by cuDNN take as long at 8,192 positions and head dim 128, and at 65,536 and 64.
CUDNN_POSITIONS = 16_384

# (op, backend) -> times its kernel really ran; bumped inside the opaque op, so a fallback cannot pass as a launch.
launches: Counter[tuple[str, str]] = Counter()


class Unsupported(ValueError):
    """A backend was asked for by name and cannot run; the message gives every reason."""


@dataclass(frozen=True)
class Flags:
    """The NSA_* variables: True, False, or None where unset."""

    use_triton_sel: bool | None = None
    triton_sel_force: bool | None = None
    sel_triton_allow_grad: bool | None = None
    use_fa2: bool | None = None
    test_fa2: bool | None = None


@dataclass(frozen=True)
class Route:
    """The backend that runs an op, and the reasons against each one preferred to it."""

    op: str
    backend: str
    rejected: dict[str, list[str]] = field(default_factory=dict)


def _tri_state(name: str) -> bool | None:
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{name}={value!r}: use 1 or 0, or leave it unset")


_overrides: dict[str, bool | None] = {}


@lru_cache(maxsize=1)
def flags() -> Flags:
    """The flags, parsed once a process. Raises ValueError naming a variable that is neither 1 nor 0."""
    values = {name: _tri_state(f"NSA_{name.upper()}") for name in Flags.__dataclass_fields__}
    return Flags(**{**values, **_overrides})


def override(**values: bool | None) -> None:
    """Set flags from a command line: `override(use_fa2=False)` wins over NSA_USE_FA2."""
    unknown = set(values) - set(Flags.__dataclass_fields__)
    if unknown:
        raise ValueError(f"no such flag: {', '.join(sorted(unknown))}")
    _overrides.update(values)
    flags.cache_clear()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def is_sm89(device: torch.device | None = None) -> bool:
    """Ada (RTX 4090), the current card unless one is named: Triton selection is off by policy there unless forced."""
    return torch.cuda.is_available() and _capability(device) == (8, 9)


def _capability(device: torch.device | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device if device is not None and device.type == "cuda" else None)


def _policy(op: str, backend: str, device: torch.device, training: bool) -> list[str]:
    f = flags()
    if backend == "triton" and op in _TRITON_SEL:
        if f.use_triton_sel is False:
            return ["NSA_USE_TRITON_SEL=0"]
        if is_sm89(device) and not (f.use_triton_sel and f.triton_sel_force):
            return ["sm_89 needs NSA_USE_TRITON_SEL=1 and NSA_TRITON_SEL_FORCE=1"]
        if training and op == "selected" and f.sel_triton_allow_grad is False:
            return ["NSA_SEL_TRITON_ALLOW_GRAD=0 and a gradient is needed"]
    if backend == "flash" and f.use_fa2 is False:
        return ["NSA_USE_FA2=0"]
    return []


def _unproven(op: str, backend: str, device: torch.device) -> list[str]:
    """The reason not to take a Triton kernel unasked on this card."""
    if backend != "triton" or flags().use_triton_sel or not torch.cuda.is_available():
        return []
    major, minor = _capability(device)
    proof = TRITON_PROOF[op].get(major * 10 + minor, "not even compiled")
    if proof == "measured":
        return []
    return [f"not measured on sm_{major}{minor} yet, {proof} for it: {asking((major, minor))} asks for it"]


def asking(capability: tuple[int, int]) -> str:
    """What to put before a command so that every kernel runs, measured or not, on a card of this capability."""
    return "NSA_USE_TRITON_SEL=1" + (" NSA_TRITON_SEL_FORCE=1" if capability == (8, 9) else "")


# The package that holds a backend's forms, one module an op. `reference` is the op's own file. To add a backend: a
# module here with the op's forms and `unsupported`, a name in PREFERENCES.
_PACKAGES = {
    "torch": "nsa.kernels.plain",
    "sdpa": "nsa.kernels.plain",
    "flash": "nsa.kernels.flash",
    "cudnn": "nsa.kernels.flash",
    "triton": "nsa.kernels",
}


@cache
def has_kernel(op: str, backend: str = "triton") -> bool:
    """Whether this build carries a module of a backend's forms for an op."""
    return importlib.util.find_spec(f"{_PACKAGES[backend]}.{op}") is not None


@cache
def _module(op: str, backend: str) -> Any:
    return importlib.import_module(f"{_PACKAGES[backend]}.{op}")


def form(op: str, backend: str, q: torch.Tensor) -> Any:
    """The module whose functions run `op` by `backend` on inputs like q; what they take: `nsa.ops.branch`."""
    # torch's memory-efficient operator is one of the fused ones; where it cannot run, `sdpa` is plain products.
    if backend == "sdpa" and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and 0 < q.numel() < 1 << 31:
        backend = "flash"
    return _module(op, backend if q.numel() or backend == "triton" else "sdpa")


@cache  # looked up on every call of an op, and a search of sys.path costs as much as a decode step
def triton_version() -> str:
    """Installed Triton, or "<none>"."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "<none>"


@cache
def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def _environment(op: str, backend: str, device: torch.device) -> list[str]:
    if backend not in ("triton", "flash", "cudnn"):
        return []
    reasons = []
    if device.type != "cuda":
        reasons.append("needs CUDA")
    elif (oldest := _OLDEST_SM.get(backend)) and torch.cuda.get_device_capability(device) < oldest:
        reasons.append("{} needs sm_{}{} or newer".format(backend, *oldest))
    if backend == "triton" and triton_version() == "<none>":
        reasons.append("needs Triton")
    if backend == "cudnn" and _torch_version() < _CUDNN_TORCH:
        reasons.append("cudnn needs torch {}.{} or newer".format(*_CUDNN_TORCH))
    if not has_kernel(op, backend):
        reasons.append(f"no {backend} kernel for {op} in this build")
    return reasons


def _inputs(op: str, backend: str, tensors: tuple[torch.Tensor, ...], facts: dict[str, int]) -> list[str]:
    if backend not in ("triton", "flash", "cudnn"):
        return []
    return list(_module(op, backend).unsupported(backend, *tensors, **facts))


def _outrun(
    op: str, backend: str, device: torch.device, tensors: tuple[torch.Tensor, ...], facts: dict[str, Any]
) -> list[str]:
    """The reason not to take the first preference unasked where a later one was measured ahead of it."""
    if (op, backend) != ("compressed", "triton") or flags().use_triton_sel:
        return []
    T, width = tensors[0].shape[1], max(tensors[0].shape[-1], tensors[2].shape[-1])
    if width <= 64 or T < CUDNN_POSITIONS or _environment(op, "cudnn", device):
        return []
    if _inputs(op, "cudnn", tensors, facts):
        return []
    return [f"cudnn is ahead from {CUDNN_POSITIONS} positions on at head dims above 64"]


def choose(op: str, *tensors: torch.Tensor, backend: str | None = None, training: bool = False, **facts: int) -> Route:
    """Route an op for these inputs. A named backend runs or raises Unsupported with its reasons; None picks one.

    facts are what an op's kernels must know beside its tensors, such as seq_len.
    """
    device = tensors[0].device if tensors else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preferences = PREFERENCES[op]
    if backend is not None and backend not in preferences:
        raise Unsupported(f"{op} has no backend {backend!r}; it has {', '.join(preferences)}")
    rejected: dict[str, list[str]] = {}
    if flags().use_fa2:
        preferences = tuple(sorted(preferences, key=lambda name: name != "flash"))  # asked for, so it goes first
    for candidate in preferences if backend is None else (backend,):
        reasons = _policy(op, candidate, device, training) + ([] if backend else _unproven(op, candidate, device))
        reasons += _environment(op, candidate, device)
        if not reasons and tensors:
            reasons = _inputs(op, candidate, tensors, facts)
            if not reasons and backend is None:
                reasons = _outrun(op, candidate, device, tensors, facts)
        if not reasons:
            _warn_if_asked_in_vain(op, candidate, rejected)
            return Route(op, candidate, rejected)
        rejected[candidate] = reasons
    raise Unsupported(f"{op}: backend {backend!r} cannot run: {'; '.join(rejected[str(backend)])}")


def _warn_if_asked_in_vain(op: str, backend: str, rejected: dict[str, list[str]]) -> None:
    f = flags()
    for name, asked in (("triton", f.use_triton_sel), ("flash", f.use_fa2)):
        if asked and name in rejected:
            _warn_once(f"{op}: {name} was asked for but {'; '.join(rejected[name])}; running {backend}")


def snapshot() -> dict[str, Any]:
    """What would run on this machine, and why: flags, versions, device, and each op's route forward and in training."""
    from nsa.kernels import flash_wrappers

    cuda = torch.cuda.is_available()
    f = flags()
    required = _triton_required()
    return {
        "cuda": cuda,
        "sm89": is_sm89(),
        "torch": torch.__version__,
        "triton": triton_version(),
        **{f"NSA_{name.upper()}": value for name, value in asdict(f).items()},
        "triton_required": required,
        "triton_aligned": None if required is None or triton_version() == "<none>" else triton_version() == required,
        "python": platform.python_version(),
        "cuda_version": torch.version.cuda,
        "device": _device(cuda),
        "to_use_every_kernel": _unmeasured_here(cuda),
        "triton_proof": {op: {f"sm_{sm}": proof for sm, proof in cards.items()} for op, cards in TRITON_PROOF.items()},
        "flash": {
            "attn": flash_wrappers.flash_attn_version(),
            "dense": flash_wrappers.is_flash_available(),
            "varlen": flash_wrappers.is_flash_varlen_available(),
            "varlen_provider": flash_wrappers.varlen_provider(),
        },
        "routes": {
            op: {mode: _route_row(op, training) for mode, training in (("forward", False), ("training", True))}
            for op in PREFERENCES
        },
    }


def _route_row(op: str, training: bool) -> dict[str, Any]:
    route = choose(op, training=training)
    return {"backend": route.backend, "rejected": route.rejected}


def _unmeasured_here(cuda: bool) -> str | None:
    """The one line for the owner of a card whose kernels are compiled and not measured; None for any other."""
    if not cuda or flags().use_triton_sel:
        return None
    capability = _capability(None)
    number = capability[0] * 10 + capability[1]
    measured = all(cards.get(number) == "measured" for cards in TRITON_PROOF.values())
    return None if measured else f"export {asking(capability)}"


def _device(cuda: bool) -> dict[str, Any]:
    if not cuda:
        return {"type": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    major, minor = torch.cuda.get_device_capability()
    return {"type": "cuda", "name": torch.cuda.get_device_name(), "sm": major * 10 + minor}


def _triton_required() -> str | None:
    """The Triton version that the installed torch declares, or None where it declares none (CPU builds)."""
    for requirement in importlib.metadata.requires("torch") or []:
        name, _, rest = requirement.partition("==")
        if name.strip() == "triton":
            return rest.partition(";")[0].strip()
    return None
