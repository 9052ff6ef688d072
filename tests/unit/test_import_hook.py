"""Callbacks after an import, with real modules on a real path."""

import functools
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from elastic_run.runtime.interceptions import import_hook
from elastic_run.runtime.interceptions.import_hook import when_imported

NAMES = ("hooked_one", "hooked_two", "hooked_package", "hooked_package.inner")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in NAMES:
        sys.modules.pop(name, None)
        import_hook._finder.callbacks.pop(name, None)
    finder: Any = import_hook._finder
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)


def write(folder: Path, name: str, code: str) -> None:
    (folder / f"{name}.py").write_text(code)
    importlib.invalidate_caches()


def test_callback_runs_once_after_the_code_of_the_module(folder: Path) -> None:
    write(folder, "hooked_one", "value = 1")
    seen: list[int] = []
    when_imported("hooked_one", lambda module: seen.append(module.value))
    assert "hooked_one" not in sys.modules
    importlib.import_module("hooked_one")
    importlib.import_module("hooked_one")
    assert seen == [1]


def test_module_imported_already_is_reported_at_once(folder: Path) -> None:
    write(folder, "hooked_one", "value = 2")
    importlib.import_module("hooked_one")
    seen: list[int] = []
    when_imported("hooked_one", lambda module: seen.append(module.value))
    assert seen == [2]


def test_reload_calls_back_again_with_the_new_code(folder: Path) -> None:
    write(folder, "hooked_one", "value = 3")
    seen: list[int] = []
    when_imported("hooked_one", lambda module: seen.append(module.value))
    module = importlib.import_module("hooked_one")
    write(folder, "hooked_one", "value = 'three, and of another size'")
    importlib.reload(module)
    assert seen == [3, "three, and of another size"]


def test_callbacks_run_in_the_order_of_their_registration(folder: Path) -> None:
    write(folder, "hooked_one", "")
    seen: list[str] = []

    def note(word: str, _module: ModuleType) -> None:
        seen.append(word)

    for word in ("first", "second"):
        when_imported("hooked_one", functools.partial(note, word))
    importlib.import_module("hooked_one")
    assert seen == ["first", "second"]


def test_module_and_its_code_see_the_real_loader(folder: Path) -> None:
    write(folder, "hooked_one", "during = (type(__loader__), type(__spec__.loader))")
    when_imported("hooked_one", lambda module: None)
    module = importlib.import_module("hooked_one")
    assert module.during == (SourceFileLoader, SourceFileLoader)
    assert type(module.__loader__) is SourceFileLoader
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__


def test_spec_of_a_module_not_yet_imported_answers_as_its_loader_does(folder: Path) -> None:
    write(folder, "hooked_one", "value = 4")
    when_imported("hooked_one", lambda module: None)
    spec = importlib.util.find_spec("hooked_one")
    assert spec is not None
    assert spec.origin == str(folder / "hooked_one.py")
    assert spec.loader is not None
    assert spec.loader.get_source("hooked_one") == "value = 4"  # type: ignore[attr-defined]


def test_submodule_of_a_package_is_reported(folder: Path) -> None:
    (folder / "hooked_package").mkdir()
    write(folder / "hooked_package", "__init__", "from . import inner")
    write(folder / "hooked_package", "inner", "value = 5")
    seen: list[str] = []
    when_imported("hooked_package.inner", lambda module: seen.append(module.__name__))
    importlib.import_module("hooked_package")
    assert seen == ["hooked_package.inner"]


def test_module_that_fails_is_not_reported_and_can_be_imported_later(folder: Path) -> None:
    write(folder, "hooked_one", "raise ValueError('at import')")
    seen: list[ModuleType] = []
    when_imported("hooked_one", seen.append)
    with pytest.raises(ValueError, match="at import"):
        importlib.import_module("hooked_one")
    assert seen == []
    write(folder, "hooked_one", "value = 'it works now'")
    importlib.import_module("hooked_one")
    assert len(seen) == 1


def test_missing_module_stays_missing() -> None:
    when_imported("hooked_two", lambda module: None)
    assert importlib.util.find_spec("hooked_two") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hooked_two")


def test_two_threads_importing_at_once_are_one_call(folder: Path) -> None:
    write(folder, "hooked_one", "")
    seen: list[ModuleType] = []
    when_imported("hooked_one", seen.append)
    together = threading.Barrier(4)

    def load() -> None:
        together.wait(timeout=10)
        importlib.import_module("hooked_one")

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(seen) == 1


def test_registration_waits_for_an_import_in_another_thread(folder: Path) -> None:
    code = "import sys\nsys.hooked_gate[0].set()\nsys.hooked_gate[1].wait(10)\nvalue = 'whole'"
    write(folder, "hooked_one", code)
    begun, release = threading.Event(), threading.Event()
    sys.hooked_gate = (begun, release)  # type: ignore[attr-defined]
    try:
        importing = threading.Thread(target=importlib.import_module, args=("hooked_one",))
        importing.start()
        assert begun.wait(10)
        seen: list[str] = []
        registering = threading.Thread(
            target=when_imported, args=("hooked_one", lambda module: seen.append(module.value))
        )
        registering.start()
        release.set()
        importing.join(timeout=10)
        registering.join(timeout=10)
        assert seen == ["whole"]
    finally:
        del sys.hooked_gate  # type: ignore[attr-defined]
