"""The lane vocabulary in numba: values are sixteen-lane LLVM vectors, every operator is one vector instruction.

Numba's own loop vectoriser gives up on these kernels (many arrays, ordered sums), so the vectors are explicit. LLVM
splits them to what the processor has: one AVX-512, two AVX2, four NEON registers. No fast-math flag is ever set, so
nothing is contracted to fused multiply-add or reordered. Imported only when a numba kernel is.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import impl_ret_borrowed
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from adapterkit.gguf.kernels import lanes

LANES = 16


class VectorType(types.Type):  # type: ignore[misc]
    """Numba's name for a vector of sixteen elements of one LLVM type."""

    def __init__(self, name: str, element: Any) -> None:
        self.llvm = ir.VectorType(element, LANES)
        super().__init__(name=name)


FLOATS = VectorType("f32x16", ir.FloatType())
INTS = VectorType("i32x16", ir.IntType(32))
MASK = VectorType("i1x16", ir.IntType(1))


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: VectorType) -> None:
        super().__init__(manager, numba_type, numba_type.llvm)


def _splat(builder: Any, value: Any) -> Any:
    vector = ir.VectorType(value.type, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _widen(context: Any, builder: Any, value: Any, numba_type: Any, vector: Any) -> Any:
    """A scalar operand in every lane; a float is rounded to float32 first, as a C constant ``0.5f`` is."""
    if isinstance(numba_type, VectorType):
        return value
    scalar = types.float32 if vector is FLOATS else types.int32
    return _splat(builder, context.cast(builder, value, numba_type, scalar))


def _operand_type(args: Any) -> Any:
    """The vector type of ``a op b`` where a scalar may stand for a vector, or None when the pair is not ours."""
    vectors = [a for a in args if isinstance(a, VectorType)]
    if not vectors or any(v is not vectors[0] for v in vectors):
        return None
    scalar = types.Float if vectors[0] is FLOATS else types.Integer
    return vectors[0] if all(isinstance(a, (VectorType, scalar, types.Integer)) for a in args) else None


def _operation(op: Any, result: Any, build: Any) -> None:
    """Register ``op``: ``result(vector type)`` is its type or None, ``build(builder, type, *operands)`` its code."""

    def generic(self: Any, args: Any, kws: Any) -> Any:
        vector = _operand_type(args)
        given = None if vector is None else result(vector)
        return None if given is None else signature(given, *args)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = _operand_type(sig.args)
        widened = [_widen(context, builder, v, t, vector) for v, t in zip(args, sig.args, strict=True)]
        return build(builder, vector, *widened)

    infer_global(op)(type(f"Lanes_{op.__name__}", (AbstractTemplate,), {"key": op, "generic": generic}))
    for pair in ((VectorType, VectorType), (VectorType, types.Number), (types.Number, VectorType), (VectorType,)):
        lower_builtin(op, *pair)(lower)


_ARITHMETIC = {  # operator: (instruction for floats, for integers and masks)
    operator.add: ("fadd", "add"),
    operator.sub: ("fsub", "sub"),
    operator.mul: ("fmul", "mul"),
    operator.truediv: ("fdiv", ""),
    operator.and_: ("", "and_"),
    operator.or_: ("", "or_"),
    operator.lshift: ("", "shl"),
    operator.rshift: ("", "ashr"),
    operator.neg: ("fneg", "neg"),
    operator.invert: ("", "not_"),
}
_INPLACE = {operator.iadd: operator.add}
_COMPARISONS = {
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
}


def _register_operators() -> None:
    def arithmetic(op: Any, names: tuple[str, str]) -> None:
        def name(vector: Any) -> str:
            return names[0] if vector is FLOATS else names[1]

        def build(builder: Any, vector: Any, *operands: Any) -> Any:
            return getattr(builder, name(vector))(*operands)

        _operation(op, lambda vector: vector if name(vector) else None, build)

    def comparison(op: Any, text: str) -> None:
        def build(builder: Any, vector: Any, a: Any, b: Any) -> Any:
            if vector is not FLOATS:
                return builder.icmp_signed(text, a, b)
            return (builder.fcmp_unordered if text == "!=" else builder.fcmp_ordered)(text, a, b)

        _operation(op, lambda vector: MASK, build)

    for op, names in _ARITHMETIC.items():
        arithmetic(op, names)
    for op, plain in _INPLACE.items():
        arithmetic(op, _ARITHMETIC[plain])
    for op, text in _COMPARISONS.items():
        comparison(op, text)


_register_operators()


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    """Pointer to sixteen elements from ``index`` of a contiguous one-dimensional array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _alignment(vector: Any) -> int:
    """Of a vector in memory: its element's, because blocks start anywhere."""
    return {ir.IntType(8): 1, ir.IntType(16): 2}.get(vector.element, 4)


def _row(context: Any, builder: Any, sig: Any, args: Any, vector: Any) -> Any:
    """Pointer to row ``sub * n + i`` for arguments (rows, sub, n, i), or row ``i`` for (rows, i)."""
    index = [context.cast(builder, v, t, types.intp) for v, t in zip(args[1:], sig.args[1:], strict=True)]
    row = index[0] if len(index) == 1 else builder.add(builder.mul(index[0], index[1]), index[2])
    start = builder.mul(row, ir.Constant(row.type, LANES))
    return _pointer(context, builder, sig.args[0], args[0], start, vector)


def _load(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.load(_row(context, builder, sig, args, sig.return_type.llvm), align=4)


def _store(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """Store ``args[-1]``; integers narrow to the array's type."""
    vector = ir.VectorType(context.get_value_type(sig.args[0].dtype), LANES)
    place = signature(types.void, *sig.args[:-1])
    target = _row(context, builder, place, args[:-1], vector)
    narrow = args[-1] if args[-1].type == vector else builder.trunc(args[-1], vector)
    builder.store(narrow, target, align=_alignment(vector))
    return context.get_dummy_value()


def _load_type(rows: Any, *index: Any) -> Any:
    return signature(FLOATS if rows.dtype == types.float32 else INTS, rows, *index)


def _select_type(mask: Any, yes: Any, no: Any) -> Any:
    return signature(_operand_type((yes, no)), mask, yes, no)


def _lower_select(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    widened = [_widen(context, builder, v, t, sig.return_type) for v, t in zip(args[1:], sig.args[1:], strict=True)]
    return builder.select(args[0], *widened)


def _lower_splat(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return _widen(context, builder, args[1], sig.args[1], FLOATS)


def _lower_div(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fdiv(*(_widen(context, builder, v, t, FLOATS) for v, t in zip(args, sig.args, strict=True)))


def _lower_all(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    packed = builder.bitcast(args[0], ir.IntType(LANES))
    return builder.icmp_unsigned("==", packed, ir.Constant(ir.IntType(LANES), -1))


def _lower_largest(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    kind = ir.FunctionType(ir.IntType(32), [INTS.llvm])
    name = f"llvm.vector.reduce.smax.v{LANES}i32"
    found = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)
    return builder.sext(found, ir.IntType(64))


def _lower_same(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return impl_ret_borrowed(context, builder, sig.return_type, args[0])


def _cast(instruction: str) -> Any:
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(args[0], sig.return_type.llvm)

    return lower


def _call(name: str) -> Any:
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(FLOATS.llvm, [FLOATS.llvm])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), args)

    return lower


def _gives(result: Any) -> Any:
    return lambda *args: signature(result, *args)


_WORDS: dict[Any, tuple[Any, Any]] = {  # word: (its signature for argument types, its code)
    lanes.at: (_load_type, _load),
    lanes.put: (_gives(types.void), _store),
    lanes.put_byte: (_gives(types.void), _store),
    lanes.as_block: (lambda rows: signature(rows, rows), _lower_same),
    lanes.splat: (_gives(FLOATS), _lower_splat),
    lanes.select: (_select_type, _lower_select),
    lanes.div: (_gives(FLOATS), _lower_div),
    lanes.largest_lane: (_gives(types.int64), _lower_largest),
    lanes.all_lanes: (_gives(types.boolean), _lower_all),
    lanes.bits: (_gives(INTS), _cast("bitcast")),
    lanes.from_bits: (_gives(FLOATS), _cast("bitcast")),
    lanes.to_int: (_gives(INTS), _cast("fptosi")),
    lanes.to_float: (_gives(FLOATS), _cast("sitofp")),
    lanes.sqrt: (_gives(FLOATS), _call("sqrt")),
    lanes.fabs: (_gives(FLOATS), _call("fabs")),
}


def _register_words() -> None:
    """Type and lower each word in place: as overloads they would be dozens of functions to compile per kernel."""
    for word, (typing, lower) in _WORDS.items():

        def generic(self: Any, args: Any, kws: Any, typing: Any = typing) -> Any:
            return typing(*args)

        infer_global(word)(type(f"Word_{word.__name__}", (AbstractTemplate,), {"key": word, "generic": generic}))
        lower_builtin(word, types.VarArg(types.Any))(lower)


_register_words()


def _transpose(typing_context: Any, source: Any, start: Any, step: Any, target: Any, begin: Any, stride: Any) -> Any:
    """Transpose 16 x 16 elements: row k is at ``source[start + k * step]``, column k at ``target[begin + k * stride]``.

    Four rounds that interleave vector k with vector k + 8, as a perfect shuffle of the index bits.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(context.get_value_type(sig.args[0].dtype), LANES)

        def pointer(side: int, k: int) -> Any:
            array, offset, stride = args[side : side + 3]
            index = builder.add(offset, builder.mul(stride, ir.Constant(stride.type, k)))
            return _pointer(context, builder, sig.args[side], array, index, vector)

        index_type = ir.VectorType(ir.IntType(32), LANES)
        halves = [[i // 2 + half + LANES * (i % 2) for i in range(LANES)] for half in (0, LANES // 2)]
        masks = [ir.Constant(index_type, half) for half in halves]
        rows = [builder.load(pointer(0, k), align=_alignment(vector)) for k in range(LANES)]
        for _ in range(4):
            pairs = [(rows[k], rows[k + LANES // 2]) for k in range(LANES // 2)]
            rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
        for k, row in enumerate(rows):
            builder.store(row, pointer(3, k), align=_alignment(vector))
        return context.get_dummy_value()

    size = types.intp
    return types.void(source, size, size, target, size, size), codegen


transpose = intrinsic(_transpose)


def _from_halves(typing_context: Any, source: Any, start: Any, target: Any) -> Any:
    """Sixteen float16 values as float32: ``target[start + k]`` from the 16 bits ``source[start + k]``.

    Exponent and fraction move up by 13 bits, and the exponent's bias grows by 112. An exponent of all ones stays one, and
    one of zero is that of 2^-14 without the leading 1, which a subtraction takes away: no number is subnormal on the way.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        shorts = ir.VectorType(ir.IntType(16), LANES)

        def all_lanes(value: int) -> Any:
            return ir.Constant(INTS.llvm, [value] * LANES)

        read = builder.load(_pointer(context, builder, sig.args[0], args[0], args[1], shorts), align=_alignment(shorts))
        half = builder.zext(read, INTS.llvm)
        sign = builder.shl(builder.and_(half, all_lanes(0x8000)), all_lanes(16))
        moved = builder.shl(builder.and_(half, all_lanes(0x7FFF)), all_lanes(13))
        exponent = builder.and_(moved, all_lanes(0x0F800000))
        normal = builder.add(moved, all_lanes(112 << 23))
        endless = builder.add(normal, all_lanes(112 << 23))
        raised = builder.bitcast(builder.add(normal, all_lanes(1 << 23)), FLOATS.llvm)
        least = builder.bitcast(all_lanes(113 << 23), FLOATS.llvm)
        tiny = builder.bitcast(builder.fsub(raised, least), INTS.llvm)
        found = builder.select(builder.icmp_unsigned("==", exponent, all_lanes(0x0F800000)), endless, normal)
        found = builder.select(builder.icmp_unsigned("==", exponent, all_lanes(0)), tiny, found)
        out = _pointer(context, builder, sig.args[2], args[2], args[1], FLOATS.llvm)
        builder.store(builder.bitcast(builder.or_(found, sign), FLOATS.llvm), out, align=_alignment(FLOATS.llvm))
        return context.get_dummy_value()

    return types.void(source, types.intp, target), codegen


from_halves = intrinsic(_from_halves)
