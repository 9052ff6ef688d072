"""Scripts of many shapes: under the bootstrap and tied to an agent they do what they do under plain Python."""

import asyncio
import json
import os
import signal
import stat
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attached_worker
import pytest
from attached_worker import BOOTSTRAP, VIEW, WORKER, Ended, Seat

from elastic_run.runtime import error_file
from elastic_run.runtime.edge.telemetry_layout import Phase
from elastic_run.runtime.edge.worker_server import WorkerGone, WorkerHello, WorkerRefused
from elastic_run.runtime.protocol.ids import PROTOCOL_VERSION

OWN = ("AGENT_SOCKET", "WORKER", "TELEMETRY", "VIEW", "AGENT_PID")
SHOW_MAIN = """
import os, sys, threading
here = globals()
print({k: v for k, v in here.items() if k not in ("__loader__", "__spec__", "here")})
print(type(__loader__), __loader__.name, __spec__ and (__spec__.name, __spec__.origin, type(__spec__.loader)))
print(sys.argv, sys.path, sys.orig_argv[-len(sys.argv):], sys.flags)
print(sys.modules["__main__"].__dict__ is here, here["__builtins__"], __name__)
print(sorted(k for k in os.environ if k.startswith("ELASTIC_RUN_")), os.getcwd(), threading.active_count())
"""
PICKLES = """
import pickle, multiprocessing, sys
class Point:
    def __init__(self, x): self.x = x
def double(point): return Point(point.x * 2)
if __name__ == "__main__":
    print(pickle.loads(pickle.dumps(Point(3))).x, pickle.dumps(Point)[:30])
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        print([p.x for p in pool.map(double, [Point(1), Point(2)])])
"""
CHAINED = """
def fail():
    try:
        {}["key"]
    except KeyError as error:
        raise ValueError("outer") from error
def main():
    try:
        fail()
    except ValueError:
        1 / 0
main()
"""
HOOKED = """
import sys, traceback
def hook(kind, error, trace):
    print("hook", kind.__name__, error, traceback.extract_tb(trace), error.__traceback__ is trace, file=sys.stderr)
    print(sys.last_type, sys.last_traceback is trace)
sys.excepthook = hook
raise RuntimeError("mine")
"""
ATEXIT = """
import atexit, sys, threading
atexit.register(print, "registered first")
atexit.register(print, "registered last")
threading.Thread(target=lambda: (threading.main_thread().join(), print("thread after main"))).start()
class Late:
    def __del__(self): print("collected")
late = Late()
sys.stdout.write("no newline, no flush; ")
"""
RERUNS = """
import os, sys
if len(sys.argv) < 3:
    os.execv(sys.orig_argv[0], [*sys.orig_argv, "again"])
print(sys.argv)
"""
THREADS = """
import threading
def fail(): raise OSError("in a thread")
thread = threading.Thread(target=fail, name="t")
thread.start()
thread.join()
"""
SCRIPTS = {
    "main": SHOW_MAIN,
    "pickles": PICKLES,
    "chained": CHAINED,
    "hooked": HOOKED,
    "atexit": ATEXIT,
    "zero": "import sys; sys.exit(0)",
    "three": "import sys; sys.exit(3)",
    "nothing": "import sys; sys.exit()",
    "big": "import sys; sys.exit(256 + 7)",
    "words": "import sys; sys.exit('words on stderr')",
    "exit_object": "raise SystemExit([1, 2])",
    "os_exit": "import os; print('flushed?'); os._exit(9)",
    "interrupt": "raise KeyboardInterrupt",
    "group": "raise ExceptionGroup('several', [ValueError(1), TypeError(2)])",
    "noted": "error = ValueError('x')\nerror.add_note('a note')\nraise error",
    "recursive": "def f(n):\n    return n and f(n - 1)\nprint(f(900))",
    "syntax": "x = 1\ndef f(:\n    pass\n",
    "indent": "if True:\nprint(1)\n",
    "coding": "# coding: latin-1\nprint('\u00e4')",
    "bom": "\ufeffprint('after a byte order mark')",
    "future": "print(1 + 1)\ndef f(x: undefined_name): pass\n",
    "empty": "",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(20)",
    "warns": "import warnings; warnings.warn('from the script'); warnings.warn('deeper', DeprecationWarning)",
    "closes": "import sys\nprint('before')\nsys.stdout.close()\nprint('after', file=sys.stderr)",
    "closes_fd": "import os\nprint('before')\nos.close(1)",
    "shadows": "import agent, runtime, controller\nprint(agent.MINE, runtime.MINE, controller.MINE)",
    "descriptors": "import os; f = os.open('/dev/null', 0); print(sorted(map(int, os.listdir('/proc/self/fd')))[:3])",
    "linked": "import sys; print(sys.path[0], __file__)",
    "reruns": RERUNS,
    "imports_main": "import __main__, sys\nprint(__main__.__file__, __main__ is sys.modules['__main__'])",
    "threads": THREADS,
}

CASES = [
    *(["main.py", "--flag", "a b", ""], ["./main.py"], ["sub/../main.py"], ["sub/inner.py"], ["linked_elsewhere.py"]),
    *(["-m", "main", "-x"], ["-m", "package", "y"], ["-m", "package.relative"]),
    *(["package"], ["./package"], ["code.zip", "z"]),
    *(["pickles.py", "spawn"], ["pickles.py", "fork"], ["pickles.py", "forkserver"], ["-m", "pickles", "spawn"]),
    *([f"{name}.py"] for name in SCRIPTS if name not in ("main", "pickles")),
    *(["-m", name] for name in ("chained", "three", "words", "interrupt", "syntax", "hooked", "atexit")),
    *(["missing.py"], ["-m", "missing"], ["-m", "missing.inner"], ["-m", "package.missing"], ["sub"], ["."], ["main"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("scripts")
    for name, code in SCRIPTS.items():
        (made / f"{name}.py").write_text(code, encoding="latin-1" if name == "coding" else "utf-8")
    for name in ("agent", "runtime", "controller"):
        (made / f"{name}.py").write_text("MINE = 'mine'")
    (made / "package").mkdir()
    (made / "package" / "__init__.py").write_text("import sys; print('init', sys.argv)")
    (made / "package" / "__main__.py").write_text(SHOW_MAIN)
    (made / "package" / "relative.py").write_text("from . import sibling\nprint(sibling.VALUE, __package__)")
    (made / "package" / "sibling.py").write_text("VALUE = 5")
    (made / "sub").mkdir()
    (made / "sub" / "inner.py").write_text(SHOW_MAIN)
    (made / "linked_elsewhere.py").symlink_to(made / "sub" / "inner.py")
    with zipfile.ZipFile(made / "code.zip", "w") as archive:
        archive.writestr("__main__.py", SHOW_MAIN)
    return str(made)


@pytest.fixture
async def seat() -> AsyncIterator[Seat]:
    async with attached_worker.seat() as made:
        yield made


async def attached(seat: Seat, words: list[str], folder: str, **environment: str) -> Ended:
    return await attached_worker.run([BOOTSTRAP, *words], folder, {**seat.environment, **environment})


@pytest.mark.parametrize("words", CASES, ids=" ".join)
async def test_script_does_what_it_does_under_plain_python(seat: Seat, folder: str, words: list[str]) -> None:
    plain = await attached_worker.run(words, folder)
    ours = await attached(seat, words, folder)
    assert (ours.code, ours.out, ours.err) == (plain.code, plain.out, plain.err)
    assert await seat.heard(WorkerHello) is not None
    assert await seat.heard(WorkerGone) is not None
    if words[0] not in ("os_exit.py", "terminated.py", "reruns.py"):  # no code of ours runs at these ends
        assert seat.telemetry.read().phase is (Phase.FAILED if plain.code not in (0, 120) else Phase.FINISHED)


@pytest.mark.parametrize("words", [["main.py", "x"], ["-m", "package", "x"], ["chained.py"], ["pickles.py", "spawn"]])
async def test_bootstrap_started_as_a_module_is_the_same(seat: Seat, folder: str, words: list[str]) -> None:
    plain = await attached_worker.run(words, folder)
    ours = await attached_worker.run(["-m", "elastic_run.runtime.bootstrap", *words], folder, seat.environment)
    assert (ours.code, ours.out, ours.err) == (plain.code, plain.out, plain.err)


@pytest.mark.parametrize("words", [["main.py", "x"], ["-m", "main", "x"]])
@pytest.mark.parametrize("given", ["-P", "PYTHONSAFEPATH"])
async def test_safe_path_the_user_asked_for_is_kept(seat: Seat, folder: str, words: list[str], given: str) -> None:
    options = ("-u", "-P") if given == "-P" else ("-u",)
    environment = {} if given == "-P" else {"PYTHONSAFEPATH": "1", "PYTHONPATH": folder}
    plain = await attached_worker.run(words, folder, environment, options)
    ours = await attached_worker.run([BOOTSTRAP, *words], folder, {**environment, **seat.environment}, options)
    assert (ours.code, ours.out, ours.err) == (plain.code, plain.out, plain.err)


@pytest.mark.parametrize("words", [["main.py", "x"], ["-m", "main"], ["chained.py"], ["three.py"], ["shadows.py"]])
async def test_without_an_agent_only_the_script_runs(folder: str, tmp_path: Path, words: list[str]) -> None:
    recorded = tmp_path / "error.json"
    environment = {"TORCHELASTIC_ERROR_FILE": str(recorded)}
    plain = await attached_worker.run(words, folder, environment)
    ours = await attached_worker.run([BOOTSTRAP, *words], folder, environment)
    assert (ours.code, ours.out, ours.err) == (plain.code, plain.out, plain.err)
    assert not recorded.exists()


async def test_nothing_to_run_is_a_usage_error(folder: str) -> None:
    for words in ([], ["-m"]):
        ended = await attached_worker.run([BOOTSTRAP, *words], folder)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("elastic-run: bootstrap: give a script")


SEES = """
import os, sys
print(sorted(m for m in ("torch", "numpy", "grpc", "google.protobuf", "asyncio", "dataclasses", "json", "traceback")
             if m in sys.modules))
print([k for k in os.environ if k.startswith("ELASTIC_RUN_") and k != "ELASTIC_RUN_DIR"], os.environ["ELASTIC_RUN_DIR"])
"""


async def test_bootstrap_imports_little_and_takes_its_variables_away(seat: Seat, tmp_path: Path) -> None:
    (tmp_path / "sees.py").write_text(SEES)
    ended = await attached(seat, ["sees.py"], str(tmp_path), ELASTIC_RUN_DIR="/kept")
    assert (ended.out, ended.err) == ("[]\n[] /kept\n", "")


async def test_worker_introduces_itself_and_learns_its_view(seat: Seat, folder: str) -> None:
    process = await attached_worker.start([BOOTSTRAP, "zero.py"], folder, seat.environment)
    assert await seat.heard(WorkerHello) == WorkerHello(worker=WORKER, pid=process.pid)
    assert (await attached_worker.finish(process)).code == 0
    found = seat.telemetry.read()
    assert (found.pid, found.view, found.phase, found.step) == (process.pid, VIEW, Phase.FINISHED, 0)


async def test_segmentation_fault_ends_by_its_signal_and_shows_the_python_stack(seat: Seat, tmp_path: Path) -> None:
    (tmp_path / "crash.py").write_text("import ctypes\ndef crash():\n    ctypes.string_at(0)\ncrash()\n")
    ended = await attached(seat, ["crash.py"], str(tmp_path))
    assert ended.code == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in ended.err
    assert 'crash.py", line 3 in crash' in ended.err
    silent = await attached(seat, ["crash.py"], str(tmp_path), PYTHONFAULTHANDLER="")
    assert (silent.code, silent.err) == (-signal.SIGSEGV, "")


def error_text(seat: Seat) -> str:
    return Path(seat.error_file).read_text()


def recorded(seat: Seat) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(error_text(seat))["message"]
    return found


async def test_uncaught_exception_is_recorded_as_torch_elastic_does(seat: Seat, folder: str) -> None:
    ended = await attached(seat, ["chained.py"], folder)
    found = recorded(seat)
    assert found["message"] == "ZeroDivisionError: division by zero"
    assert found["extraInfo"].keys() == {"py_callstack", "timestamp"}
    assert found["extraInfo"]["py_callstack"] == ended.err
    assert isinstance(stamp := found["extraInfo"]["timestamp"], str) and stamp.isdecimal()
    assert stat.S_IMODE(os.stat(seat.error_file).st_mode) == 0o600
    assert not [name for name in os.listdir(seat.folder) if name.startswith("error.json.")]


@pytest.mark.parametrize("name", ["three.py", "words.py", "interrupt.py", "zero.py", "empty.py"])
async def test_ends_that_are_no_exceptions_are_not_recorded(seat: Seat, folder: str, name: str) -> None:
    await attached(seat, [name], folder)
    assert "error.json" not in os.listdir(seat.folder)


async def test_what_the_script_recorded_itself_is_left_alone(seat: Seat, tmp_path: Path) -> None:
    (tmp_path / "records.py").write_text(
        "import os\nopen(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write('own words')\nraise ValueError(1)"
    )
    ended = await attached(seat, ["records.py"], str(tmp_path))
    assert ended.code == 1
    assert error_text(seat) == "own words"


UNPRINTABLE = """
class Odd(Exception):
    def __str__(self): raise RuntimeError("no text")
raise Odd()
"""


async def test_exception_without_text_is_recorded_too(seat: Seat, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(UNPRINTABLE)
    plain = await attached_worker.run(["odd.py"], str(tmp_path))
    ended = await attached(seat, ["odd.py"], str(tmp_path))
    assert (ended.code, ended.err) == (plain.code, plain.err)
    assert recorded(seat)["message"] == "Odd: <no text: its __str__ failed>"


async def test_huge_message_is_cut_in_the_file_only(seat: Seat, tmp_path: Path) -> None:
    (tmp_path / "huge.py").write_text("raise ValueError('a' * 10**6 + 'end')")
    ended = await attached(seat, ["huge.py"], str(tmp_path))
    assert len(ended.err) > 10**6
    message = recorded(seat)["message"]
    assert isinstance(message, str)
    assert len(message) <= error_file.MESSAGE_CHARS_MAX
    assert message.startswith("ValueError: aaa") and message.endswith("end")


async def test_error_file_without_a_folder_changes_nothing_else(seat: Seat, folder: str) -> None:
    plain = await attached_worker.run(["chained.py"], folder)
    path = f"{seat.folder}/missing/error.json"
    ended = await attached(seat, ["chained.py"], folder, TORCHELASTIC_ERROR_FILE=path)
    first, _, rest = ended.err.partition("\n")
    assert (ended.code, rest) == (plain.code, plain.err)
    assert first.startswith(f"elastic-run: could not write the error file {path}: ")


async def test_full_disk_leaves_no_half_error_file(seat: Seat, tmp_path: Path) -> None:
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))\nraise ValueError('mine')"
    (tmp_path / "full.py").write_text(code)
    plain = await attached_worker.run(["full.py"], str(tmp_path))
    ended = await attached(seat, ["full.py"], str(tmp_path))
    first, _, rest = ended.err.partition("\n")
    assert (ended.code, rest) == (plain.code, plain.err)
    assert "could not write the error file" in first and "File too large" in first
    assert not [name for name in os.listdir(seat.folder) if name.startswith("error.json")]


async def test_pipe_in_the_place_of_the_error_file_is_not_replaced(seat: Seat, folder: str) -> None:
    """As root the same rename would replace a device such as /dev/null."""
    os.mkfifo(seat.error_file)
    ended = await attached(seat, ["chained.py"], folder)
    assert ended.code == 1
    assert "it is no plain file" in ended.err
    assert stat.S_ISFIFO(os.stat(seat.error_file).st_mode)


async def test_worker_of_an_agent_that_is_gone_does_not_start(seat: Seat, folder: str) -> None:
    gone = await attached_worker.start(["-c", ""], folder)
    await attached_worker.finish(gone)
    ended = await attached(seat, ["main.py"], folder, ELASTIC_RUN_AGENT_PID=str(gone.pid))
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == f"elastic-run: this worker cannot start: the agent (pid {gone.pid}) is gone\n"
    assert recorded(seat)["message"] == f"PeerError: the agent (pid {gone.pid}) is gone"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ELASTIC_RUN_AGENT_SOCKET", "/nowhere/agent.sock", "cannot connect to the agent"),
        ("ELASTIC_RUN_TELEMETRY", "/nowhere/telemetry", "cannot open the telemetry file"),
        ("ELASTIC_RUN_TELEMETRY", "/dev/null", "is no size of a telemetry file"),
        ("ELASTIC_RUN_WORKER", "", "ELASTIC_RUN_WORKER is not set"),
        ("ELASTIC_RUN_VIEW", "x", "must be numbers"),
    ],
)
async def test_unusable_variables_end_the_worker_in_one_line(
    seat: Seat, folder: str, name: str, value: str, said: str
) -> None:
    ended = await attached(seat, ["main.py"], folder, **{name: value})
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("elastic-run: this worker cannot start: ") and said in ended.err
    assert ended.err.count("\n") == 1


async def test_worker_of_another_version_is_refused_in_one_line_that_names_both(
    seat: Seat, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_run.runtime.edge.worker_server.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    ended = await attached(seat, ["main.py"], folder)
    assert (ended.code, ended.out) == (1, "")
    assert f"speaks protocol version {PROTOCOL_VERSION}, its agent speaks {PROTOCOL_VERSION + 1}" in ended.err
    assert isinstance(await seat.heard(WorkerRefused), WorkerRefused)
    assert "error.json" in os.listdir(seat.folder)


WRAPPER = """
import os, subprocess, sys
os.environ["ELASTIC_RUN_AGENT_PID"] = str(os.getpid())
worker = subprocess.Popen([sys.executable, sys.argv[1], "waits.py"], stdout=subprocess.PIPE)
print(worker.pid, worker.stdout.readline().decode(), flush=True)
worker.wait()
"""


async def test_worker_dies_with_its_agent(seat: Seat, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(600)")
    (tmp_path / "parent.py").write_text(WRAPPER)
    parent = await attached_worker.start(["parent.py", BOOTSTRAP], str(tmp_path), seat.environment)
    assert parent.stdout is not None
    worker_pid = int((await parent.stdout.readline()).split()[0])
    ended = os.pidfd_open(worker_pid)
    try:
        parent.kill()
        done = asyncio.Event()
        asyncio.get_running_loop().add_reader(ended, done.set)
        async with asyncio.timeout(attached_worker.BOUND_S):
            await done.wait()
        asyncio.get_running_loop().remove_reader(ended)
    finally:
        os.close(ended)
    await attached_worker.finish(parent)


async def test_wrapper_between_agent_and_worker_is_allowed(seat: Seat, folder: str) -> None:
    code = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
    ended = await attached_worker.run(["-c", code, BOOTSTRAP, "three.py"], folder, seat.environment)
    assert (ended.code, ended.err) == (3, "")


async def test_python_options_stay_with_the_script(seat: Seat, folder: str) -> None:
    options = ("-u", "-O", "-X", "utf8", "-W", "ignore")
    plain = await attached_worker.run(["main.py"], folder, None, options)
    ours = await attached_worker.run([BOOTSTRAP, "main.py"], folder, seat.environment, options)
    assert (ours.code, ours.out, ours.err) == (plain.code, plain.out, plain.err)
