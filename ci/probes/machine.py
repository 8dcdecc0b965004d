"""What torch sees here, as one JSON object on stdout. Run by the interpreter under test; the harness reads the JSON."""

from __future__ import annotations

import json


def facts() -> dict[str, object]:
    """torch's version, its CUDA build, and each visible device; `error` where torch cannot be imported or asked."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    seen: dict[str, object] = {
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cuda": False,
        "devices": [],
    }
    try:
        seen["cuda"] = torch.cuda.is_available()
        if seen["cuda"]:
            seen["devices"] = [_device(index) for index in range(torch.cuda.device_count())]
            seen["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
            seen["cudnn"] = torch.backends.cudnn.version()
    except (RuntimeError, AssertionError) as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    return seen


def _device(index: int) -> dict[str, object]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "total_mb": total >> 20,
        "free_mb": free >> 20,
        "uuid": str(getattr(properties, "uuid", "")),
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
