"""`@operation`: a Python function over vectors becomes a few LLVM instructions inside the kernel that calls it.

    @operation
    def load_bf16(array: Array, index: Index) -> Vector:
        return (array[index].load(I16).zero_extended(I32) << 16).bits(F32)

The function runs once, while Numba compiles a call of it. Its arguments are not numbers but LLVM values: `Lanes`, a
vector or a single number, whose operators append an instruction each and return its result; and `Pointer`, the address
of an element of an array. Loops over Python's `range` are therefore unrolled, and conditions are settled while
compiling. Annotations give the Numba types of the parameters and of the result (`TYPES`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partialmethod
from inspect import Parameter, signature
from typing import Any, ClassVar, TypeAlias

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from .cpu import LANES, ROWS

F32, F16 = ir.FloatType(), ir.HalfType()
I8, I16, I32, I64, VOID = (*map(ir.IntType, (8, 16, 32, 64)), ir.VoidType())


class LanesType(types.Type):
    """The Numba type of a vector, or of `count` vectors that stay in registers."""

    dtype = None  # of a part: no type of its own

    def __init__(self, name: str, element: ir.Type, lanes: int, count: int = 0) -> None:
        super().__init__(name=name)
        vector = ir.VectorType(element, lanes)
        self.llvm, self.count = ir.ArrayType(vector, count) if count else vector, count


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: LanesType) -> None:
        super().__init__(manager, kind, kind.llvm)


VECTOR = LanesType(f"f32x{LANES}", F32, LANES)
TYPES: dict[str, Any] = {  # what an annotation means to Numba
    "Array": None,  # any array of one axis without gaps
    "Index": types.intp,
    "Float": types.float32,
    "Word": types.uint16,
    "None": types.void,
    "Vector": VECTOR,  # LANES float32
    "TwoVectors": types.UniTuple(VECTOR, 2),
    "EightSums": types.UniTuple(VECTOR, 8),
    "Tile": LanesType(f"f32x{LANES}x{ROWS}x2", F32, LANES, ROWS * 2),  # ROWS x (2 · LANES) float32
    "IntTile": LanesType(f"i32x{LANES}x{ROWS}x2", I32, LANES, ROWS * 2),  # the same of int32
}


class Lanes:
    """An LLVM value: a vector, or a single number, whose `lanes` are 0.

    Operators work lane by lane on two values of one type, or on a value and a Python number. `>>` fills with zeros.
    """

    builder: ClassVar[Any]  # of the kernel that is being compiled; Numba compiles one at a time

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def element(self) -> ir.Type:
        """The type of a lane."""
        return self.value.type.element if self.lanes else self.value.type

    @property
    def lanes(self) -> int:
        """How many numbers a vector has; 0 for a single number."""
        return self.value.type.count if isinstance(self.value.type, ir.VectorType) else 0

    def filled(self, number: float) -> Lanes:
        """A constant of the same type with `number` in each lane."""
        return constant(number, self.element, self.lanes)

    def _apply(self, instruction: str, other: Lanes | float, swap: bool = False) -> Lanes:
        """self `instruction` other; the name of the one for floats is that of the one for integers after an f."""
        pair = self.value, (other if isinstance(other, Lanes) else self.filled(other)).value
        name = ("f" if self.element in (F32, F16) else "") + instruction
        return Lanes(getattr(self.builder, name)(*(pair[::-1] if swap else pair)))

    __add__, __radd__ = partialmethod(_apply, "add"), partialmethod(_apply, "add", swap=True)
    __mul__, __rmul__ = partialmethod(_apply, "mul"), partialmethod(_apply, "mul", swap=True)
    __sub__, __truediv__ = partialmethod(_apply, "sub"), partialmethod(_apply, "div")
    __and__, __or__, __xor__ = partialmethod(_apply, "and_"), partialmethod(_apply, "or_"), partialmethod(_apply, "xor")
    __lshift__, __rshift__ = partialmethod(_apply, "shl"), partialmethod(_apply, "lshr")
    shift_signed = partialmethod(_apply, "ashr")  # to the right; repeats the sign

    def _compare(self, symbol: str, other: Lanes | float) -> Lanes:
        compare = self.builder.fcmp_ordered if self.element in (F32, F16) else self.builder.icmp_signed
        return Lanes(compare(symbol, self.value, (other if isinstance(other, Lanes) else self.filled(other)).value))

    __lt__, __gt__ = partialmethod(_compare, "<"), partialmethod(_compare, ">")

    def _like(self, element: ir.Type) -> ir.Type:
        return ir.VectorType(element, self.lanes) if self.lanes else element

    def sign_extended(self, element: ir.Type) -> Lanes:
        """Each lane as a wider signed integer."""
        return Lanes(self.builder.sext(self.value, self._like(element)))

    def zero_extended(self, element: ir.Type) -> Lanes:
        """Each lane as a wider unsigned integer."""
        return Lanes(self.builder.zext(self.value, self._like(element)))

    def truncated(self, element: ir.Type) -> Lanes:
        """The low bits of each lane."""
        return Lanes(self.builder.trunc(self.value, self._like(element)))

    def to_float(self) -> Lanes:
        """Each lane, a float16 or a signed integer, as float32."""
        convert = self.builder.fpext if self.element == F16 else self.builder.sitofp
        return Lanes(convert(self.value, self._like(F32)))

    def to_int(self) -> Lanes:
        """Each lane, a float32 within range, as int32, rounded towards zero."""
        return Lanes(self.builder.fptosi(self.value, self._like(I32)))

    def bits(self, element: ir.Type) -> Lanes:
        """The same bits read as lanes of another type, of which there may be more or fewer."""
        lanes = self.lanes * _width(self.element) // _width(element)
        return Lanes(self.builder.bitcast(self.value, ir.VectorType(element, lanes) if self.lanes else element))

    def splat(self, lanes: int = LANES) -> Lanes:
        """A single number in every lane."""
        empty = ir.Constant(ir.VectorType(self.value.type, lanes), ir.Undefined)
        return Lanes(self.builder.insert_element(empty, self.value, I32(0))).shuffle([0] * lanes)

    def shuffle(self, places: Iterable[int], other: Lanes | None = None) -> Lanes:
        """Lane i of the result is lane places[i] of this vector and, counted on from its last lane, of the other."""
        chosen = list(places)
        second = other.value if other is not None else ir.Constant(self.value.type, ir.Undefined)
        return Lanes(
            self.builder.shuffle_vector(self.value, second, ir.Constant(ir.VectorType(I32, len(chosen)), chosen))
        )


Vector: TypeAlias = Lanes
Float: TypeAlias = Lanes
Index: TypeAlias = Lanes
Word: TypeAlias = Lanes
TwoVectors: TypeAlias = list[Lanes]
EightSums: TypeAlias = list[Lanes]
Tile: TypeAlias = list[Lanes]
IntTile: TypeAlias = list[Lanes]


def _width(element: ir.Type) -> int:
    return {F32: 32, F16: 16}.get(element) or element.width


def constant(number: float, element: ir.Type = F32, lanes: int = LANES) -> Lanes:
    """`number` in every lane."""
    one = element(number)
    return Lanes(ir.Constant(ir.VectorType(element, lanes), [one] * lanes) if lanes else one)


def select(condition: Lanes, value: Lanes, otherwise: Lanes) -> Lanes:
    """`value` in lanes where the condition holds, else `otherwise`."""
    return Lanes(Lanes.builder.select(condition.value, value.value, otherwise.value))


def call(name: str, result: ir.Type, *arguments: Lanes | Pointer, fastmath: tuple[str, ...] = ()) -> Lanes:
    """What the LLVM function `name` returns, declared once a module."""
    module, values = Lanes.builder.module, [argument.value for argument in arguments]
    form = ir.FunctionType(result, [value.type for value in values])
    function = module.globals.get(name) or ir.Function(module, form, name)
    return Lanes(Lanes.builder.call(function, values, fastmath=fastmath))


def assembly(template: str, constraints: str, *arguments: Lanes) -> Lanes:
    """A line of assembly, whose result has the type of its first argument."""
    values = [argument.value for argument in arguments]
    form = ir.FunctionType(values[0].type, [value.type for value in values])
    return Lanes(Lanes.builder.asm(form, template, constraints, values, False))


def multiply_add(x: Lanes, y: Lanes, z: Lanes) -> Lanes:
    """x · y + z, rounded once."""
    return call(f"llvm.fma.v{x.lanes}f32", x.value.type, x, y, z)


class Pointer:
    """The address of an element of an array, whose Numba type is `dtype`."""

    def __init__(self, value: Any, dtype: types.Type) -> None:
        self.value, self.dtype = value, dtype

    def __add__(self, count: Lanes | int) -> Pointer:
        """The address `count` elements further on."""
        step = count.value if isinstance(count, Lanes) else I32(count)
        return Pointer(Lanes.builder.gep(self.value, [step]), self.dtype)

    def load(self, element: ir.Type, lanes: int = LANES) -> Lanes:
        """A vector from here on, or with 0 `lanes` a single number. Nothing is assumed of the alignment."""
        kind = ir.VectorType(element, lanes) if lanes else element
        value = Lanes.builder.load(Lanes.builder.bitcast(self.value, kind.as_pointer()))
        value.align = 1  # a memory-mapped file guarantees no more
        return Lanes(value)

    def load_element(self) -> Lanes:
        """The element itself."""
        return Lanes(Lanes.builder.load(self.value))

    def store(self, lanes: Lanes) -> None:
        """Write a vector or a number from here on."""
        place = Lanes.builder.bitcast(self.value, lanes.value.type.as_pointer())
        Lanes.builder.store(lanes.value, place).align = 1

    def bytes(self) -> Pointer:
        """The same address, counted in bytes."""
        return Pointer(Lanes.builder.bitcast(self.value, I8.as_pointer()), types.int8)


class Array:
    """An array that a kernel passes to an operation: array[index] is the address of an element."""

    READABLE = (types.float32, types.int32, types.uint32, types.uint16, types.int16, types.int8, types.uint8)

    def __init__(self, context: Any, kind: types.Array, value: Any) -> None:
        if kind.ndim != 1 or kind.layout != "C" or kind.dtype not in self.READABLE:
            raise TypeError(f"vectors need an array of one axis without gaps, of at most 32 bits a number, not {kind}")
        self.dtype, self._data = kind.dtype, context.make_array(kind)(context, Lanes.builder, value).data

    def __getitem__(self, index: Lanes | int) -> Pointer:
        return Pointer(self._data, self.dtype) + index


def _wrapped(context: Any, kind: Any, value: Any) -> Any:
    """An argument as an operation takes it: tuples and types of several vectors as lists."""
    if isinstance(kind, types.Array):
        return Array(context, kind, value)
    if not (count := getattr(kind, "count", 0)):
        return Lanes(value)
    return [_wrapped(context, kind.dtype, Lanes.builder.extract_value(value, i)) for i in range(count)]


def _unwrapped(context: Any, kind: Any, made: Any) -> Any:
    """What an operation returns, as Numba takes it."""
    if not isinstance(made, list):
        return context.get_dummy_value() if made is None else made.value
    value = ir.Constant(context.get_value_type(kind), ir.Undefined)
    for i, part in enumerate(made):
        value = Lanes.builder.insert_value(value, _unwrapped(context, kind.dtype, part), i)
    return value


def operation(function: Callable) -> Any:
    """Decorator: what the function does to LLVM values, as a function that kernels call. See the module's docstring."""
    *parameters, result = (TYPES[name] for name in function.__annotations__.values())

    def typed(typingctx: Any, *arguments: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            Lanes.builder = builder
            wrapped = map(_wrapped, [context] * len(values), signature.args, values)
            return _unwrapped(context, signature.return_type, function(*wrapped))

        kinds = [kind or given for kind, given in zip(parameters, arguments, strict=False)]
        return result(*kinds), codegen

    form = signature(function)
    first = Parameter("typingctx", Parameter.POSITIONAL_OR_KEYWORD)
    typed.__name__, typed.__doc__ = function.__name__, function.__doc__
    typed.__signature__ = form.replace(parameters=[first, *form.parameters.values()])  # type: ignore[attr-defined]
    return intrinsic(typed)
