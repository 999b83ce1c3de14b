"""The constructor: who is asked for, what configuration is given, and guests that are opened by and by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.genuine import Genuine
from tests.contract.scene import Scene
from vmishim.errors import LibvmiError
from vmishim.libvmi import AccessContext, Libvmi
from vmishim.libvmi.constants import (
    INIT_DOMAINNAME,
    INIT_EVENTS,
    VMIOS,
    LibvmiInitError,
    PageMode,
    TranslateMechanism,
    VMIConfig,
    VMIMode,
)

Make = Callable[..., Any]


@pytest.fixture
def make(
    request: pytest.FixtureRequest, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Make]:
    """Makes a ``Libvmi`` with the arguments it gets: ours, or one of the genuine bindings."""
    made: list[Any] = []
    names = tmp_path / "domains.toml"
    names.write_text(f'["{scene.vm.ram}"]\nramfile = "{scene.vm.ram}"\n')
    monkeypatch.setenv("VMISHIM_CONFIG", str(names))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def make(*args: Any, **kwargs: Any) -> Any:
        if request.param == "genuine":
            made.append(Genuine(scene.python, scene.folder / "genuine.log", *args, **kwargs))
        else:
            made.append(Libvmi(*args, **kwargs))
        return made[-1]

    make.backend = request.param  # type: ignore[attr-defined]
    yield make
    for vmi in made:
        vmi.close() if isinstance(vmi, Genuine) else vmi.destroy()


def test_with_a_dictionary(make: Make, scene: Scene) -> None:
    vmi = make(str(scene.vm.ram), INIT_DOMAINNAME, None, VMIConfig.DICT, scene.config)
    assert vmi.read_ksym("linux_banner", 5)[0] == b"Linux"
    assert vmi.get_name() == str(scene.vm.ram)


def _entry(scene: Scene) -> str:
    values = "".join(
        f'{key} = "{value}"; ' if isinstance(value, str) else f"{key} = {value:#x}; "
        for key, value in scene.config.items()
    )
    return f"ram {{ {values}}}\n"


@pytest.mark.parametrize("where", ["libvmi.conf", "etc/libvmi.conf"])
def test_with_a_file_in_its_place(make: Make, scene: Scene, tmp_path: Path, where: str) -> None:
    place = tmp_path / where
    place.parent.mkdir(exist_ok=True)
    place.write_text('# ours\nother { ostype = "Windows"; }\n' + _entry(scene))
    vmi = make(str(scene.vm.ram))
    assert vmi.get_ostype() is VMIOS.LINUX
    assert vmi.get_offset("linux_pid") == scene.config["linux_pid"]


def test_with_a_named_file_or_text(make: Make, scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "given").write_text(_entry(scene))
    for mode, config in ((VMIConfig.FILE_PATH, str(tmp_path / "given")), (VMIConfig.STRING, _entry(scene)[4:])):
        vmi = make(str(scene.vm.ram), config_mode=mode, config=config)
        assert vmi.read_ksym("linux_banner", 5)[0] == b"Linux"


def test_nobody(make: Make, scene: Scene) -> None:
    with pytest.raises(LibvmiError) as error:
        make("no-such-guest", config_mode=VMIConfig.DICT, config=scene.config)
    name = str(error.value).split(":")[0]
    # LibVMI sees that no driver knows the guest before it can say that it was not found.
    assert name == ("DRIVER_NOT_DETECTED" if make.backend == "genuine" else "VM_NOT_FOUND")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({"ostype": "Windows"}, "OS"),
        ({"sysmap": "/no/such/file"}, "OS"),
        ({"linux_tasks": 1.5}, RuntimeError),
    ],
)
def test_wrong_configuration(make: Make, scene: Scene, change: dict[str, Any], failure: Any) -> None:
    expected = LibvmiError if isinstance(failure, str) else failure
    with pytest.raises(expected) as error:
        make(str(scene.vm.ram), config_mode=VMIConfig.DICT, config={**scene.config, **change})
    if isinstance(failure, str):
        assert str(error.value).split(":")[0] == failure


@pytest.mark.parametrize(
    ("mode", "config", "failure"),
    [
        (VMIConfig.STRING, "{ linux_taks = 5; }", "NO_CONFIG"),
        (VMIConfig.FILE_PATH, "empty", "NO_CONFIG_ENTRY"),
    ],
)
def test_wrong_text(make: Make, scene: Scene, tmp_path: Path, mode: VMIConfig, config: str, failure: str) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(LibvmiError) as error:
        make(str(scene.vm.ram), config_mode=mode, config=config)
    assert str(error.value).split(":")[0] == failure


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((5,), {}, AttributeError),
        (("x", 0), {}, TypeError),
        (("x", 0), {"partial": True}, RuntimeError),
        (("x",), {"partial": True, "mode": 5}, RuntimeError),
        (("x",), {"init_data": {1: 5}}, AttributeError),
    ],
)
def test_wrong_arguments(make: Make, args: tuple[Any, ...], kwargs: dict[str, Any], expected: type) -> None:
    with pytest.raises(expected):
        make(*args, **kwargs)


def test_events_are_not_to_be_had(make: Make, scene: Scene) -> None:
    with pytest.raises(LibvmiError) as error:
        make(str(scene.vm.ram), INIT_DOMAINNAME | INIT_EVENTS, None, VMIConfig.DICT, scene.config)
    assert str(error.value).split(":")[0] == "EVENTS"


def test_opened_by_and_by(make: Make, scene: Scene) -> None:
    places = scene.places
    vmi = make(str(scene.vm.ram), mode=VMIMode.FILE, partial=True)
    assert vmi.get_ostype() is VMIOS.UNKNOWN
    assert vmi.get_page_mode(0) is PageMode.UNKNOWN
    assert vmi.get_address_width() == 0
    assert vmi.read_pa(places.banner_pa, 5) == (b"Linux", 5)
    assert vmi.get_memsize() == 1 << 30
    by_dtb = AccessContext(TranslateMechanism.PROCESS_DTB, addr=places.banner, dtb=places.kpgd)
    refused: tuple[Callable[[], Any], ...] = (
        lambda: vmi.read_va(places.banner, 0, 5),
        lambda: vmi.read_va(places.image, places.pid, 5),
        lambda: vmi.read(by_dtb, 5),
        lambda: vmi.read_ksym("linux_banner", 5),
        lambda: vmi.translate_ksym2v("linux_banner"),
        lambda: vmi.translate_kv2p(places.banner),
        lambda: vmi.pid_to_dtb(places.pid),
        lambda: vmi.get_offset("linux_pid"),
    )
    for call in refused:
        with pytest.raises(LibvmiError) as caught:
            call()
        assert str(caught.value) == "VMI_FAILURE"
    assert vmi.init_os(VMIConfig.DICT, scene.config) == (VMIOS.LINUX, LibvmiInitError.NONE.value)
    assert vmi.get_page_mode(0) is PageMode.IA32E
    assert vmi.read_va(places.banner, 0, 5) == (b"Linux", 5)
    assert vmi.get_offset("linux_pid") == scene.config["linux_pid"]


@pytest.mark.filterwarnings("ignore:NO_CONFIG")
def test_init_os_tells_what_is_wrong(make: Make, scene: Scene) -> None:
    vmi = make(str(scene.vm.ram), mode=VMIMode.FILE, partial=True)
    assert vmi.init_os(VMIConfig.STRING, "") == (VMIOS.UNKNOWN, LibvmiInitError.NO_CONFIG.value)
    assert vmi.get_ostype() is VMIOS.UNKNOWN
