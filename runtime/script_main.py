"""Runs a script, module, directory or zip file as `__main__`, so that it cannot tell this from `python script.py`.

The script gets a `__main__` module of its own in sys.modules, python's sys.argv, sys.path[0] and sys.orig_argv; exit
codes, KeyboardInterrupt, atexit and flushing stay Python's own doing, because every exception passes through unchanged.
Modules run by `runpy._run_module_as_main`, the function that `python -m` itself calls by that name.
Invariants (tests/integration/test_bootstrap.py): 1. output and exit code equal plain python's; 2. no traceback shows
our frames. Known differences: inspect.stack() ends in our frames, which also count towards the recursion limit.
Not here: what surrounds the script (bootstrap.py, worker_session.py).
"""

import builtins
import contextlib
import io
import os
import sys
import zipimport
from collections.abc import Callable
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from types import CodeType, TracebackType
from typing import Any, cast

OnEnd = Callable[[BaseException | None], None]

EXIT_CANNOT_OPEN = 2


def run_script(path: str, args: list[str], on_end: OnEnd, *, safe_path: bool) -> None:
    """Do what `python PATH ARGS...` does (with `safe_path`: `python -P`).

    `on_end` gets the exception the script ended by, or None, before anyone else sees it.
    """
    sys.argv = [path, *args]
    full = (
        os.getcwd() if path == "." else os.path.join(os.getcwd(), path)
    )  # not made plainer than that: __file__ shows it
    if _holds_main(full):
        _insert_path(full, safe_path)
        _fresh_main()
        _run(lambda: _run_module_as_main("__main__", False), on_end)
        return
    # Like Python: where the script really lies, behind symbolic links.
    _insert_path(os.path.dirname(os.path.realpath(full)), safe_path)
    loader: SourceFileLoader | SourcelessFileLoader
    loader = (SourcelessFileLoader if path.endswith(".pyc") else SourceFileLoader)("__main__", full)
    names = _fresh_main()
    names.update(__loader__=loader, __file__=full, __cached__=None)

    def run() -> None:
        exec(_code(path, full, loader), names)

    _run(run, on_end)


def run_module(name: str, args: list[str], on_end: OnEnd, *, safe_path: bool) -> None:
    """Do what `python -m NAME ARGS...` does; see run_script."""
    sys.argv = ["-m", *args]
    with contextlib.suppress(FileNotFoundError):  # the working directory was removed: Python too goes on without
        _insert_path(os.getcwd(), safe_path)
    _fresh_main()
    _run(lambda: _run_module_as_main(name, True), on_end)


def _run(run: Callable[[], None], on_end: OnEnd) -> None:
    try:
        run()
    except BaseException as error:
        if not isinstance(error, SystemExit):
            error.__traceback__ = below_own_frames(error.__traceback__)
            show_without_own_frames()
        on_end(error)
        raise
    on_end(None)


def _run_module_as_main(name: str, alter_argv: bool) -> None:
    import runpy

    runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]


def _insert_path(entry: str, safe_path: bool) -> None:
    if not safe_path:
        sys.path.insert(0, entry)


def _fresh_main() -> dict[str, Any]:
    """Put a new `__main__` in the place of the bootstrap's; return its namespace, as Python begins one."""
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    names = vars(main)
    names.update(__annotations__={}, __builtins__=builtins)
    return names


def _holds_main(full: str) -> bool:
    """True for directories and zip files, which Python runs by their `__main__.py`."""
    if os.path.isdir(full):
        return True
    try:
        zipimport.zipimporter(full)
    except ImportError:
        return False
    return True


def _code(path: str, full: str, loader: SourceFileLoader | SourcelessFileLoader) -> CodeType:
    if isinstance(loader, SourcelessFileLoader):
        return cast(CodeType, loader.get_code("__main__"))  # it raises, and never returns None
    try:
        with io.open_code(full) as file:
            source = file.read()
    except OSError as error:
        sys.stderr.write(f"{sys.executable}: can't open file {full!r}: [Errno {error.errno}] {error.strerror}\n")
        sys.exit(EXIT_CANNOT_OPEN)
    return compile(source, full, "exec", dont_inherit=True)


def below_own_frames(trace: TracebackType | None) -> TracebackType | None:
    """Return what of a traceback is the script's: what follows the first run of our frames."""
    rest = trace
    while rest is not None and rest.tb_frame.f_code.co_filename != __file__:
        rest = rest.tb_next
    if rest is None:  # cut already
        return trace
    while rest is not None and rest.tb_frame.f_code.co_filename == __file__:
        rest = rest.tb_next
    return rest


def show_without_own_frames() -> None:
    """Let the script's excepthook, called once Python is about to exit, see the traceback without our frames."""
    original = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook = original
        trace = below_own_frames(trace)
        error.__traceback__ = sys.last_traceback = trace
        original(kind, error, trace)

    sys.excepthook = show
