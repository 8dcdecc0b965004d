"""Triton's interpreter (TRITON_INTERPRET=1), mended so that kernels run on a CPU with the numbers of a GPU.

As shipped, from 3.0 to 3.9, it keeps bfloat16 as bit patterns in uint16 and computes on those, silently. Here such
values are widened to fp32 before every operation and rounded to nearest even after it, as the hardware does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def install() -> None:
    """Mend the interpreter of this process, once. RuntimeError for a pair of versions that cannot be mended."""
    import numpy as np
    import triton
    from triton.runtime import interpreter

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 2) and int(np.__version__.split(".")[0]) >= 2:
        # Its compiled half reads NumPy 1's array layout: loads and stores of garbage, without an error.
        raise RuntimeError(f"Triton {triton.__version__} interprets wrongly with NumPy {np.__version__}; use numpy<2")
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "widens_bf16", False):
        return
    builder.widens_bf16 = True
    for name in ("create_dot", "binary_op", "unary_op", "ternary_op"):
        setattr(builder, name, _widened(getattr(builder, name), interpreter.TensorHandle))
    builder.cast_impl = _cast(builder.cast_impl, interpreter.TensorHandle, interpreter._get_np_dtype)
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: _narrow(
            interpreter.TensorHandle(np.array([value], np.float32), _types().float32), interpreter.TensorHandle
        )
    _keep_width(interpreter)
    _heed_false_masks()
    _index_by_one_element(interpreter)
    _read_postponed_annotations(interpreter.GridExecutor)


def _types() -> Any:
    import triton.language as tl

    return tl


def _is_bf16(x: Any) -> bool:
    return getattr(x, "dtype", None) is not None and x.dtype.scalar == _types().bfloat16


def _widen(x: Any, handle: Any) -> Any:
    """A bfloat16 operand as fp32; anything else as it is."""
    import numpy as np

    if not _is_bf16(x):
        return x
    return handle((np.ascontiguousarray(x.data).astype(np.uint32) << 16).view(np.float32), _types().float32)


def _narrow(x: Any, handle: Any) -> Any:
    """fp32 to bfloat16, to nearest even; NaN stays NaN."""
    import numpy as np

    bits = np.ascontiguousarray(x.data, dtype=np.float32).view(np.uint32)
    up = 0x7FFF + ((bits >> 16) & 1)
    rounded = ((bits.astype(np.uint64) + up) >> 16).astype(np.uint16)
    data = np.where(np.isnan(x.data), np.uint16(0x7FC0), rounded).reshape(np.shape(x.data))
    return handle(data, _types().bfloat16)


def _widened(stock: Callable[..., Any], handle: Any) -> Callable[..., Any]:
    """`stock` on fp32 where an operand is bfloat16; its result is rounded back unless an operand was wider."""
    import numpy as np

    def operation(self: Any, *operands: Any) -> Any:
        floats = [x for x in operands if isinstance(x, handle) and x.dtype.scalar.is_floating()]
        if stock.__name__ == "create_dot":
            operands = tuple(_exact_product(_widen(x, handle), operands[2], handle) for x in operands)
            return stock(self, *operands)
        if not any(map(_is_bf16, floats)):
            return stock(self, *operands)
        out = stock(self, *(_widen(x, handle) for x in operands))
        if out.data.dtype == np.bool_:
            return handle(out.data, _types().int1)
        return _narrow(out, handle) if all(map(_is_bf16, floats)) else out

    return operation


def _exact_product(x: Any, accumulator: Any, handle: Any) -> Any:
    """fp16 operands of a dot in the accumulator's type: tensor cores multiply exactly and add in fp32."""
    import numpy as np

    if isinstance(x, handle) and x.data.dtype == np.float16 and accumulator.data.dtype == np.float32:
        return handle(x.data.astype(np.float32), _types().float32)
    return x


def _cast(stock: Callable[..., Any], handle: Any, np_dtype: Callable[[Any], Any]) -> Callable[..., Any]:
    def cast(self: Any, src: Any, to: Any) -> Any:
        tl = _types()
        target = to.scalar
        if src.dtype.scalar == target or tl.bfloat16 not in (src.dtype.scalar, target):
            return stock(self, src, to)
        wide = _widen(src, handle)
        if target == tl.bfloat16:
            return _narrow(handle(wide.data.astype("float32"), tl.float32), handle)
        return handle(wide.data.astype(np_dtype(to)), target)

    return cast


def _keep_width(interpreter: Any) -> None:
    """int32 sums and scans: NumPy widens them to int64, and Triton 3.0 stores them so, over what lies behind."""
    for reduction in (interpreter.ReduceOps, interpreter.ScanOps):
        reduction.to_tensor = _narrowed(reduction.to_tensor, interpreter._get_np_dtype)


def _narrowed(stock: Callable[..., Any], np_dtype: Callable[[Any], Any]) -> Callable[..., Any]:
    def to_tensor(self: Any, result: Any, dtype: Any) -> Any:
        return stock(self, result.astype(np_dtype(dtype)) if hasattr(result, "astype") else result, dtype)

    return to_tensor


def _heed_false_masks() -> None:
    """Triton 3.0 takes a mask for absent if `not mask`, which is a scalar one's value here: it wrote regardless."""
    from triton.language import core, semantic

    present: Any = type("Present", (core.tensor,), {"__bool__": lambda self: True})

    def heeding(stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
            given = mask if mask is None else present(mask.handle, mask.type)
            return stock(ptr, value, given, *rest)

        return call

    for name in ("_store_legacy", "atom_red_typechecking_impl"):
        if hasattr(semantic, name):  # later versions ask `mask is None`, in methods
            setattr(semantic, name, heeding(getattr(semantic, name)))


def _index_by_one_element(interpreter: Any) -> None:
    """Loop bounds known at run time: NumPy >= 2.4 refuses int() of a one-element array of one dimension."""
    stock = getattr(interpreter, "_patch_lang_tensor", None)
    if stock is None:
        return

    def patch(tensor: Any, *rest: Any) -> Any:
        result = stock(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])
        return result

    interpreter._patch_lang_tensor = patch


def _read_postponed_annotations(executor: Any) -> None:
    """Triton 3.0 takes a parameter for constexpr by its annotation's name, which `from __future__` turns into text."""
    stock = executor.__init__

    def initialise(self: Any, fn: Any, *rest: Any, **options: Any) -> None:
        stock(self, fn, *rest, **options)
        self.constexprs = [n for n in self.arg_names if "constexpr" in str(fn.__annotations__.get(n))]

    executor.__init__ = initialise
