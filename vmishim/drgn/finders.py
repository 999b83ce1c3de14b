"""Types, objects and symbols of a guest's kernel for drgn, out of its BTF and its symbol table.

Each type is made when it is first asked for, and the members of a structure when one is looked at: a kernel has 100,000
types, and a helper needs a few dozen.

Source: drgn's documentation of ``Program.register_type_finder`` and its neighbours.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import drgn
from drgn import FindObjectFlags, Object, Program, Qualifiers, Symbol, SymbolBinding, SymbolKind, Type, TypeKind

from vmishim.guests.description import IMAGE, Description
from vmishim.kernel.types import Kind, Types
from vmishim.kernel.variables import Array, Declared, Pointer

DEEPEST = 64
"""Types within types, none of them a structure; more count as a loop."""

_KINDS = {
    TypeKind.INT: Kind.INT,
    TypeKind.BOOL: Kind.INT,
    TypeKind.FLOAT: Kind.FLOAT,
    TypeKind.STRUCT: Kind.STRUCT,
    TypeKind.UNION: Kind.UNION,
    TypeKind.ENUM: Kind.ENUM,
    TypeKind.TYPEDEF: Kind.TYPEDEF,
}
_QUALIFIERS = {
    Kind.CONST: Qualifiers.CONST,
    Kind.VOLATILE: Qualifiers.VOLATILE,
    Kind.RESTRICT: Qualifiers.RESTRICT,
}
_COMPATIBLE = {
    (1, False): "unsigned char",
    (1, True): "signed char",
    (2, False): "short unsigned int",
    (2, True): "short int",
    (4, False): "unsigned int",
    (4, True): "int",
    (8, False): "long unsigned int",
    (8, True): "long int",
}
"""The integer that stores an enumeration, by bytes and sign, which BTF does not name."""


class Finders:
    """What drgn asks for names and addresses.

    :param prog: the program to make types in
    :param kernel: what is known of the guest's kernel
    :param modules: the symbols of its modules, as of now
    """

    def __init__(self, prog: Program, kernel: Description, modules: Callable[[], drgn.SymbolIndex]) -> None:
        self._prog = prog
        self._kernel = kernel
        self._modules = modules
        self._made: dict[int, Type] = {}

    def register(self) -> None:
        """Put them first among the program's finders."""
        self._prog.register_type_finder("vmishim", self.find_type, enable_index=0)
        self._prog.register_object_finder("vmishim", self.find_object, enable_index=-1)
        self._prog.register_symbol_finder("vmishim", self.find_symbols, enable_index=0)

    # ---- types -------------------------------------------------------------------------------------------------------

    @property
    def _types(self) -> Types:
        return self._kernel.types

    def find_type(self, prog: Program, kinds: drgn.TypeKindSet, name: str, filename: str | None) -> Type | None:
        """The type of a name; the guest does not say in which file one is defined, so none is found by that."""
        if filename:
            return None
        for kind, in_btf in _KINDS.items():
            if kind not in kinds:
                continue
            candidates = [in_btf, Kind.ENUM64] if in_btf == Kind.ENUM else [in_btf]
            for each in candidates:
                number = self._types.named.get((each, name))
                if number is not None:
                    found = self.type(number)
                    if found.kind == kind:
                        return found
            if kind in (TypeKind.STRUCT, TypeKind.UNION):
                number = self._types.named.get((Kind.FORWARD, name))
                if number is not None and (found := self.type(number)).kind == kind:
                    return found
        return None

    def type(self, number: int, depth: int = 0) -> Type:
        """A type by its number in BTF. :raises LookupError: the guest's BTF contradicts itself"""
        made = self._made.get(number)
        if made is None:
            if depth > DEEPEST:
                raise LookupError(f"BTF type {number} refers to itself")
            try:
                made = self._made[number] = self._make(number, depth + 1)
            except (KeyError, ValueError, OverflowError) as error:
                raise LookupError(f"the guest's BTF has a malformed type {number}: {error.args[0]}") from None
        return made

    def _make(self, number: int, depth: int) -> Type:
        prog, types = self._prog, self._types
        found = types.type(number)
        name = found.name or None
        match found.kind:
            case Kind.VOID:
                return prog.void_type()
            case Kind.INT:
                stored = types.integer(number)
                if stored.is_bool:
                    return prog.bool_type(found.name, stored.size)
                # Compilers leave it out that x86's char is signed.
                return prog.int_type(found.name, stored.size, stored.signed or found.name == "char")
            case Kind.FLOAT:
                return prog.float_type(found.name, found.size)
            case Kind.POINTER:
                return prog.pointer_type(self.type(found.target, depth))
            case Kind.ARRAY:
                array = types.array(number)
                return prog.array_type(self.type(array.element, depth), array.length or None)
            case Kind.STRUCT:
                return prog.struct_type(name, found.size, list(self._members(number)))
            case Kind.UNION:
                return prog.union_type(name, found.size, list(self._members(number)))
            case Kind.FORWARD:
                return prog.union_type(name) if found.flag else prog.struct_type(name)
            case Kind.ENUM | Kind.ENUM64:
                values = types.values(number)
                if not values:
                    return prog.enum_type(name)
                stored_as = _COMPATIBLE[found.size, found.flag]
                compatible = prog.int_type(stored_as, found.size, found.flag)
                return prog.enum_type(name, compatible, [drgn.TypeEnumerator(*each) for each in values.items()])
            case Kind.TYPEDEF:
                return prog.typedef_type(found.name, self.type(found.target, depth))
            case Kind.CONST | Kind.VOLATILE | Kind.RESTRICT:
                inner = self.type(found.target, depth)
                return inner.qualified(inner.qualifiers | _QUALIFIERS[found.kind])
            case Kind.TYPE_TAG | Kind.FUNCTION:
                return self.type(found.target, depth)
            case Kind.PROTOTYPE:
                return self._prototype(number, found.target, depth)
        raise ValueError(f"{found.kind.name} is not a type")

    def _members(self, number: int) -> Iterator[drgn.TypeMember]:
        for field in self._types.fields(number):
            of_type: Callable[[], Type | Object] = partial(self.type, field.type)
            if field.width:
                of_type = partial(self._bit_field, field.type, field.width)
            yield drgn.TypeMember(of_type, field.name or None, field.bit)

    def _bit_field(self, number: int, width: int) -> Object:
        return Object(self._prog, self.type(number), bit_field_size=width)

    def _prototype(self, number: int, returned: int, depth: int) -> Type:
        parameters = self._types.parameters(number)
        variadic = bool(parameters) and not parameters[-1].name and not parameters[-1].type
        if variadic:
            parameters.pop()
        made = [drgn.TypeParameter(partial(self.type, each.type), each.name or None) for each in parameters]
        return self._prog.function_type(self.type(returned, depth), made, variadic)

    def _declared(self, declared: Declared) -> Type:
        match declared:
            case Pointer():
                return self._prog.pointer_type(self._declared(declared.to))
            case Array():
                return self._prog.array_type(self._declared(declared.of), declared.count or None)
            case _:
                return self.type(declared)

    # ---- objects -----------------------------------------------------------------------------------------------------

    def find_object(self, prog: Program, name: str, flags: FindObjectFlags, filename: str | None) -> Object | None:
        """A value of an enumeration, a function, or a variable. One whose type is unknown is ``void``, at its address:
        BTF has the types of per-CPU variables only, `vmishim.kernel.variables` those of some more."""
        if filename:
            return None
        if flags & FindObjectFlags.CONSTANT:
            value = self._types.enumerators.get(name)
            if value is not None:
                of_type = self.type(value[0])
                return Object(prog, of_type, value[1])
        address = self._kernel.addresses.get(name)
        if address is None:
            return None
        if flags & FindObjectFlags.FUNCTION:
            number = self._functions.get(name)
            if number is not None:
                return Object(prog, self.type(number), address=address)
        if flags & FindObjectFlags.VARIABLE and name not in self._functions:
            declared = self._kernel.declared(name)
            made = prog.void_type() if declared is None else self._declared(declared)
            if isinstance(declared, Array) and declared.of == Pointer(self._types.named.get((Kind.INT, "char"), 0)):
                made = self._strings(made, address)
            return Object(prog, made, address=address)
        return None

    def _strings(self, made: Type, address: int) -> Type:
        """The type of an array of strings, without what fills the space up to the next symbol. :raises FaultError: it
        cannot be read"""
        words = self._prog.read(address, 8 * (made.length or 0))
        count = next((at // 8 for at in range(0, len(words), 8) if not any(words[at : at + 8])), made.length)
        return self._prog.array_type(made.type, count or None)

    @cached_property
    def _functions(self) -> dict[str, int]:
        """The prototypes of functions, by name."""
        found: dict[str, int] = {}
        for number in self._types.of_kinds(Kind.FUNCTION):
            function = self._types.type(number)
            found.setdefault(function.name, function.target)
        return found

    # ---- symbols -----------------------------------------------------------------------------------------------------

    def find_symbols(self, prog: Program, name: str | None, address: int | None, one: bool) -> Sequence[Symbol]:
        """Symbols of the kernel, and those of its modules where the kernel has none."""
        if name is None and address is None:
            return [*map(self._symbol, range(len(self._starts))), *self._modules()(prog, None, None, False)]
        found = [self._symbol(place) for place in self._places(name, address)]
        if not found and (address is None or not self._starts[0] <= address < self._end):
            found = list(self._modules()(prog, name, address, one))
        return found[:1] if one else found

    @cached_property
    def _ordered(self) -> list[tuple[int, str]]:
        """Those at addresses, not in each CPU's own memory."""
        return [each for each in self._kernel.symbols if each[0] >= IMAGE] or self._kernel.symbols

    @cached_property
    def _starts(self) -> list[int]:
        return [address for address, _ in self._ordered]

    @cached_property
    def _end(self) -> int:
        return self._kernel.addresses.get("_end", self._starts[-1])

    @cached_property
    def _by_name(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for place, (_, name) in enumerate(self._ordered):
            found.setdefault(name, []).append(place)
        return found

    def _places(self, name: str | None, address: int | None) -> list[int]:
        if name is not None:
            places = self._by_name.get(name, [])
            return [each for each in places if address is None or self._holds(each, address)]
        assert address is not None
        last = bisect_right(self._starts, address) - 1
        if last < 0 or not self._holds(last, address):
            return []
        first = last
        while first and self._starts[first - 1] == self._starts[last]:
            first -= 1
        return list(range(first, last + 1))

    def _holds(self, place: int, address: int) -> bool:
        return self._starts[place] <= address < self._starts[place] + max(self._size(place), 1)

    def _size(self, place: int) -> int:
        """Bytes up to the next symbol: the kernel's table has no sizes."""
        after = bisect_right(self._starts, self._starts[place])
        end = self._starts[after] if after < len(self._starts) else self._end
        return max(end - self._starts[place], 0)

    def _symbol(self, place: int) -> Symbol:
        address, name = self._ordered[place]
        start, end = (self._kernel.addresses.get(each, 0) for each in ("_stext", "_etext"))
        kind = SymbolKind.FUNC if start <= address < end else SymbolKind.OBJECT
        return Symbol(name, address, self._size(place), SymbolBinding.GLOBAL, kind)
