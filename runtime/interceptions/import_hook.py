"""Calls back when a named module has been imported, without importing it: torch is touched only when the script loads
it.

Changes: one finder at the head of sys.meta_path; it finds nothing itself, asks the others, and sees to it that
callbacks run right after the module's code. While that code runs, and ever after, the module carries its own loader.
Invariants (tests/unit/test_import_hook.py):
1. Each import and reload of the module calls each callback once, after its code and before anyone else gets the module.
2. Modules nobody waits for are found exactly as before.
Not here: what is done to a module (step_counter.py).
"""

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

Callback = Callable[[ModuleType], None]


class _Finder:
    """Stands at the head of sys.meta_path."""

    def __init__(self) -> None:
        self.callbacks: dict[str, tuple[Callback, ...]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.callbacks:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec: ModuleSpec | None = find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = cast(Any, _Loader(spec.loader))
                return spec
        return None


class _Loader:
    """Stands in for a module's loader until its code runs; answers everything else as that loader does."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for callback in _finder.callbacks.get(module.__name__, ()):
            callback(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


_finder = _Finder()
_lock = threading.Lock()


def when_imported(name: str, callback: Callback) -> None:
    """Call `callback(module)` after each import of module `name`; also now, when it is imported already.

    What the callback raises, the import raises. Not to be called from the code of that module itself.
    """
    with _lock:
        imported = name in sys.modules
        if not imported:
            _register(name, callback)
    if imported:
        module = importlib.import_module(name)  # another thread may be in the middle of it: waits for its end
        with _lock:
            _register(name, callback)
        callback(module)


def _register(name: str, callback: Callback) -> None:
    _finder.callbacks[name] = (*_finder.callbacks.get(name, ()), callback)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, cast(Any, _finder))
