# This file is licensed under the Volatility Software License 1.0, which is available at
# https://www.volatilityfoundation.org/license/vsl-v1.0
"""Volatility 3 on a guest of vmishim: ``vol -f vmishim://DOMAIN linux.pslist.PsList``.

Volatility finds this file by itself in ``volatility3/plugins``, or with ``-p`` and its folder.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

from volatility3.framework import exceptions, interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.layers import intel, linear, resources

from vmishim.errors import FaultError, LibvmiError
from vmishim.volatility.guest import SCHEME, Guest, guest, opened

vollog = logging.getLogger(__name__)

STEP = 1 << 20
"""Bytes that are read at a time to find out what is there."""


def _lost(name: str, error: Exception) -> Exception:
    """Not an InvalidAddressException: plugins pass over these, and a broken connection is not unreadable memory."""
    return exceptions.LayerException(name, f"vmishim: {error}")


class VmishimHandler(resources.VolatilityHandler):
    """Opens ``vmishim://DOMAIN`` as a file of the guest's physical memory."""

    @classmethod
    def non_cached_schemes(cls) -> list[str]:
        return [SCHEME]

    @staticmethod
    def default_open(request: urllib.request.Request) -> Any:
        if request.type != SCHEME:
            return None
        try:
            return PhysicalFile(guest(request.full_url))
        except LibvmiError as error:
            # Volatility itself says only that a requirement is not met.
            sys.stderr.write(f"\nvmishim: {error}\n")
            sys.stderr.flush()
            raise urllib.error.URLError(f"vmishim: {error}") from error


class PhysicalFile(io.RawIOBase):
    """A guest's physical memory. Reading where there is none is an error, never zeroes."""

    def __init__(self, of: Guest) -> None:
        super().__init__()
        self._guest, self._at = of, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._guest.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        count = max(self._guest.size - self._at, 0) if count < 0 else count
        try:
            data = self._guest.read_physical(self._at, count)
        except FaultError as fault:
            text = f"physical memory at {fault.address:#x} is not there, or cannot be read"
            raise exceptions.InvalidAddressException("vmishim", fault.address, text) from fault
        except LibvmiError as error:
            raise _lost("vmishim", error) from error
        self._at += len(data)
        return data


class _Readable(linear.LinearlyMappedLayer):
    """Whose mapping is itself, without what cannot be read: finding that out fetches it."""

    def _read(self, offset: int, length: int) -> bytes:
        """:raises FaultError: some of it is not there"""
        raise NotImplementedError

    def read(self, offset: int, length: int, pad: bool = False) -> bytes:
        parts: list[bytes] = []
        at, end = offset, offset + length
        while at < end:
            try:
                parts.append(self._read(at, end - at))
                at = end
            except FaultError as fault:
                good = fault.data
                if not pad:
                    raise self._fault(at + len(good)) from None
                # What a plugin asks to be padded: it says itself that it wants zeros for what is missing.
                hole = min(-(at + len(good)) % 4096 or 4096, end - at - len(good))
                parts += [good, bytes(hole)]
                at += len(good) + hole
            except LibvmiError as error:
                raise _lost(self.name, error) from error
        return b"".join(parts)

    def _fault(self, address: int) -> Exception:
        text = f"vmishim: {address:#x} is not mapped, or cannot be read"
        return exceptions.PagedInvalidAddressException(self.name, address, 12, 0, text)

    def is_valid(self, offset: int, length: int = 1) -> bool:
        try:
            self._read(offset, length)
        except FaultError:
            return False
        except LibvmiError as error:
            raise _lost(self.name, error) from error
        return True

    def mapping(
        self, offset: int, length: int, ignore_errors: bool = False
    ) -> Iterable[tuple[int, int, int, int, str]]:
        at, end = offset, offset + length
        if not length:
            if self.is_valid(offset) or not ignore_errors:
                self.read(offset, 1)
                yield offset, 0, offset, 0, self.name
            return
        while at < end:
            count = min(STEP - at % STEP, end - at)
            try:
                self._read(at, count)
            except FaultError as fault:
                count = len(fault.data)
                if not ignore_errors:
                    raise self._fault(at + count) from None
                if not count:
                    at = self._next(at)
                    continue
            except LibvmiError as error:
                raise _lost(self.name, error) from error
            yield at, count, at, count, self.name
            at += count

    def _next(self, address: int) -> int:
        """Where to go on behind what cannot be read."""
        return (address // 4096 + 1) * 4096


class VmishimPhysical(_Readable):
    """The guest's RAM by physical address, as far as its kernel says that it is RAM."""

    def __init__(self, context: Any, config_path: str, name: str, metadata: dict[str, Any] | None = None) -> None:
        super().__init__(context=context, config_path=config_path, name=name, metadata=metadata)
        self._base = self.config["base_layer"]
        self._guest = guest(context.layers[self._base].location)
        self._said: list[tuple[int, int]] | None = None

    @property
    def dependencies(self) -> list[str]:
        return [self._base]

    @property
    def _ranges(self) -> list[tuple[int, int]]:
        """Asked for when it is needed: most plugins read no physical memory."""
        if self._said is None:
            try:
                self._said = self._guest.ranges()
            except LibvmiError as error:
                raise _lost(self.name, error) from error
        return self._said

    @property
    def minimum_address(self) -> int:
        return 0

    @property
    def maximum_address(self) -> int:
        return max((end for _, end in self._ranges), default=1) - 1

    def _read(self, offset: int, length: int) -> bytes:
        for start, end in self._ranges:
            if start <= offset < end:
                there = min(length, end - offset)
                data = self._guest.read_physical(offset, there)
                if there < length:
                    raise FaultError(end, data)
                return data
        raise FaultError(offset)

    def _next(self, address: int) -> int:
        if any(start <= address < end for start, end in self._ranges):
            return super()._next(address)
        return min((start for start, _ in self._ranges if start > address), default=1 << 64)

    @classmethod
    def get_requirements(cls) -> list[Any]:
        return [requirements.TranslationLayerRequirement(name="base_layer", optional=False)]


class VmishimIntel32e(_Readable, intel.LinuxIntel32e):
    """Virtual memory of the guest's kernel or of one of its processes, read by its agent."""

    def __init__(self, context: Any, config_path: str, name: str, metadata: dict[str, Any] | None = None) -> None:
        super().__init__(context=context, config_path=config_path, name=name, metadata=metadata)
        memory = context.layers[self.config["memory_layer"]]
        self._guest = guest(context.layers[memory.dependencies[0]].location)

    def _read(self, offset: int, length: int) -> bytes:
        return self._guest.read(offset, length, self._page_map_offset)

    def translate(self, offset: int, ignore_errors: bool = False) -> tuple[int | None, str | None]:
        try:
            physical, _, layer = self._translate(offset)
        except exceptions.InvalidAddressException:
            if not ignore_errors:
                raise
            return None, None
        return physical, layer

    def _translate(self, offset: int) -> tuple[int, int, str]:
        physical, size, _ = self._walk(offset)
        return physical + offset % 4096, size, self._base_layer

    def _translate_entry(self, page_address: int) -> tuple[int, int]:
        _, size, entry = self._walk(page_address)
        return entry, size.bit_length() - 2

    def _walk(self, offset: int) -> tuple[int, int, int]:
        try:
            return self._guest.translate(offset & -4096, self._page_map_offset)
        except FaultError:
            raise self._fault(offset) from None
        except LibvmiError as error:
            raise _lost(self.name, error) from error


class VmishimIntel57(VmishimIntel32e):
    """The same with five levels of page tables."""

    _maxvirtaddr = 57


class VmishimStacker(interfaces.automagic.StackerLayerInterface):
    """Puts the guest's memory on its file."""

    stack_order = 1
    exclusion_list = ["mac", "windows"]

    @classmethod
    def stack(cls, context: Any, layer_name: str, progress_callback: Any = None) -> Any:
        layer = context.layers[layer_name]
        location = getattr(layer, "location", "")
        if not isinstance(location, str) or not location.startswith(f"{SCHEME}:"):
            return None
        of = guest(location)
        join = interfaces.configuration.path_join
        physical = context.layers.free_layer_name("VmishimPhysical")
        path = join("VmishimHelper", physical)
        context.config[join(path, "base_layer")] = layer_name
        context.layers.add_layer(VmishimPhysical(context, path, physical))
        name = context.layers.free_layer_name("VmishimKernel")
        path = join("VmishimHelper", name)
        context.config[join(path, "memory_layer")] = physical
        context.config[join(path, "page_map_offset")] = of.root
        context.config[join(path, "kernel_banner")] = str(of.banner, "latin-1")
        kind = VmishimIntel57 if of.levels == 5 else VmishimIntel32e
        made = kind(context, config_path=path, name=name, metadata={"os": "Linux"})
        made.config["kernel_virtual_offset"] = of.kernel.moved
        return made


class VmishimSymbols(interfaces.automagic.AutomagicInterface):
    """Names the symbols of the guest's own kernel, instead of searching files for its banner."""

    priority = 39
    exclusion_list = ["mac", "windows"]

    def __call__(self, context: Any, config_path: str, requirement: Any, progress_callback: Any = None) -> None:
        join, parent_of = interfaces.configuration.path_join, interfaces.configuration.parent_path
        kinds = (requirements.TranslationLayerRequirement, requirements.SymbolTableRequirement)
        found = self.find_requirements(context, config_path, requirement, kinds, shortcut=False)
        layers = {parent_of(path): path for path, one in found if isinstance(one, kinds[0])}
        for path, one in found:
            parent = parent_of(path)
            if not isinstance(one, kinds[1]) or parent not in layers or not one.unsatisfied(context, parent):
                continue
            layer = context.layers.get(context.config.get(layers[parent], ""), None)
            if not isinstance(layer, VmishimIntel32e):
                continue
            where = join(parent, one.name)
            context.config[join(where, "class")] = "volatility3.framework.symbols.linux.LinuxKernelIntermedSymbols"
            context.config[join(where, "isf_url")] = layer._guest.symbols().as_uri()
            context.config[join(where, "symbol_mask")] = layer.address_mask
            one.construct(context, parent)


def _end() -> None:
    """Volatility passes over errors in scans; a run that lost its guest must not end as if it had seen all of it."""
    lost = [each.lost for each in opened() if each.lost is not None]
    if lost:
        sys.stdout.flush()
        sys.stderr.write(f"\nvmishim: the guest was lost during the run, so rows are missing: {lost[0]}\n")
        sys.stderr.flush()
        os._exit(1)


atexit.register(_end)
