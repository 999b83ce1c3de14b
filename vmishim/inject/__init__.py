"""Programs of your own, run in the guest by its agent: compile here, load there, get kernel memory back.

``docs/injection.md`` is the contract, with an example. Nothing is compiled in the guest.
"""

from vmishim.inject.clang import compile_core
from vmishim.inject.errors import CompileError, InjectError
from vmishim.inject.program import Extents, InjectedProgram, Listed, inject, injected

__all__ = [
    "CompileError",
    "Extents",
    "InjectError",
    "InjectedProgram",
    "Listed",
    "compile_core",
    "inject",
    "injected",
]
