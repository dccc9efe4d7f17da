"""Programs that nobody has read may do no harm."""

import os
import resource
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from engine import sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are only run on Linux")


def test_programs_come_to_their_end_or_not():
    uses = "import math, collections, typing, tempfile\nopen('a', 'w').write('b')\nassert open('a').read() == 'b'\n"
    assert sandbox.run_program(uses + "tempfile.TemporaryFile(); collections.namedtuple('P', 'x y')(1, 2)", seconds=20)
    assert sandbox.run_program("open('mem', 'w').write('b')\nassert open('mem').read() == 'b'", seconds=20)
    assert sandbox.run_program("import numpy\nassert (numpy.ones((3, 3)) @ numpy.ones(3) == 3).all()", seconds=20)
    assert not sandbox.run_program("import numpy\nassert (numpy.ones((3, 3)) @ numpy.ones(3) == 2).all()", seconds=20)


TRY = """
    if isinstance(y, str): y = y.encode()
    if isinstance(y, bytes) and len(y) == 32:
      for pipe in range(24):
        try: os.write(pipe, y)
        except OSError: pass
os._exit(0)
"""
TOKEN_IN_A_FRAME = f"""
import os, sys
def inside(x, depth=0):  # all that a value holds
    yield x
    if depth < 3:
        parts = [*x, *(x.values() if isinstance(x, dict) else ())] if isinstance(x, (dict, list, tuple)) else []
        for cell in getattr(x, "__closure__", None) or ():
            try: parts.append(cell.cell_contents)
            except ValueError: pass
        for part in parts: yield from inside(part, depth + 1)
frame = sys._getframe()
while frame := frame.f_back:
  for y in inside(dict(frame.f_locals)):
{TRY}"""
HOSTILE = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "fork": "import os; os.fork()",
    "fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "start a program": "import subprocess; subprocess.Popen(['touch', '{outside}/new'])",
    "start a shell": "import os; os.system('touch {outside}/new')",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "large file": "open('file', 'wb').write(bytes(1 << 26))",
    "write": "open('{outside}/new', 'w')",
    "write quietly": "try: open('{outside}/new', 'w')\nexcept BaseException: pass",
    "write through a link": "import os; os.symlink('{outside}', 'link'); open('link/new', 'w')",
    "remove": "import os\ntry: os.remove('{outside}/old')\nexcept OSError: pass",
    "rename": "import os\ntry: os.rename('{outside}/old', '{outside}/new')\nexcept OSError: pass",
    "change rights": "import os\ntry: os.chmod('{outside}/old', 0)\nexcept OSError: pass",
    "make a pipe": "import os; os.mkfifo('{outside}/new')",
    "database": "import sqlite3; sqlite3.connect('{outside}/new').execute('create table t (x)')",
    "database quietly": "import sqlite3\ntry: sqlite3.connect('{outside}/new')\nexcept sqlite3.Error: pass",
    "socket": "import socket\ntry: socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError: pass",
    "call C": "import ctypes; ctypes.CDLL(None).creat(b'{outside}/new', 511)",
    "signal": "import os\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass",
    "signal all": "import os\ntry: os.kill(-1, 9)\nexcept OSError: pass",
    "limit the parent": "import os, resource; resource.prlimit(os.getppid() or 1, resource.RLIMIT_NOFILE, (20, 20))",
    "exit": "exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit",
    "exception": "raise ValueError",
    "syntax": "def (",
    "forged text": "print('passed', flush=True)\nexit(0)",
    "forged proof": "import os\nfor fd in range(20):\n  try: os.write(fd, b'0' * 32)\n  except OSError: pass",
    "flood": "import os\nwhile True:\n  try: os.write(3, bytes(1 << 16))\n  except OSError: pass",
    "forged end": "import sys; sys.audit('sandbox.end'); exit(0)",
    "forged end at exit": "import atexit, sys; atexit.register(sys.audit, 'sandbox.end'); exit(0)",
    "token in a frame": TOKEN_IN_A_FRAME,
    "token among objects": "import gc, os\nfor x in gc.get_objects():\n  for y in gc.get_referents(x):\n" + TRY,
    "token in memory": "file = open('/proc/self/mem', 'rb')",
    "token in memory, by bytes": "file = open(b'/proc/self/mem', 'rb')",
    "crash": "import os; os.abort()",
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
}
SLOW = {"loop", "sleep", "fork bomb"}  # they may take all their time
LAYERS = {  # what the system may lack: the change of the runner that takes it away
    "nothing": ("", ""),
    "namespaces": ("libc.unshare(", "(lambda flags: -1)("),
    "Landlock": ("libc.syscall(444, None, 0, 1)", "0"),
    "hook": ("sys.addaudithook(hook)", "pass"),
}


@pytest.fixture
def outside():
    """A folder in which everybody may write, with a file."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        with open(f"{folder}/old", "w") as file:
            file.write("old")
        os.chmod(f"{folder}/old", 0o666)
        yield folder


OURS = f"  # for the tests of process {os.getpid()}"  # others may run programs on this machine too


def processes():
    """The command lines of all processes that run a program of ours."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                found += [line for line in [file.read()] if OURS.encode() in line]
        except OSError:
            pass
    return found


def limits():
    return [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]


@pytest.mark.parametrize("lacking", LAYERS)
def test_hostile_programs_fail_and_leave_nothing_behind(lacking, outside, tmp_path, monkeypatch):
    old, new = LAYERS[lacking]
    source = sandbox._runner()
    assert old in source
    monkeypatch.setattr(sandbox, "_runner", lambda: source.replace(old, new) + OURS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # nobody else's files come and go there
    before = limits(), os.getcwd()
    for name, program in HOSTILE.items():
        if lacking == "hook" and name.startswith("signal"):
            continue  # what stands before signals, if not the hook, not every kernel has
        if lacking != "nothing" and name in SLOW:
            continue  # what stands before them is never lacking
        start = time.perf_counter()
        seconds = 0.7 if name in SLOW else 5.0
        passed = sandbox.run_program(program.replace("{outside}", outside), seconds, unconfined=True)
        if lacking != "hook":  # the kernel refuses, and a program may go on; the hook does not let it
            assert not passed, name
        assert time.perf_counter() - start < 8, name
        with open(f"{outside}/old") as file:
            assert os.listdir(outside) == ["old"] and file.read() == "old", name
        if lacking != "hook" or os.getuid() == 0:
            assert os.stat(f"{outside}/old").st_mode & 0o777 == 0o666, name
    assert not processes()
    assert before == (limits(), os.getcwd()) and not os.listdir(tmp_path)


ESCAPE = """
import ctypes, os, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # does not die with its parent
os.setsid()  # does not die with its group
open("escaped", "w")
time.sleep(60)
"""


@pytest.mark.parametrize("namespaces", [True, False])
def test_no_process_outlives_its_run(namespaces, monkeypatch):
    """Nor does one that gets past the hook, clears its death signal and leaves its session."""
    source = sandbox._runner().replace(*LAYERS["hook"])
    source = source if namespaces else source.replace(*LAYERS["namespaces"])
    monkeypatch.setattr(sandbox, "_runner", lambda: source + OURS)
    assert sandbox.run_program(ESCAPE.replace("60", "0"), seconds=20, unconfined=True)
    assert not sandbox.run_program(ESCAPE, seconds=1.5, unconfined=True)
    assert not processes()


def test_a_program_ends_with_the_process_that_asked_for_it():
    code = f"from engine import sandbox\nsource = sandbox._runner() + {OURS!r}\nsandbox._runner = lambda: source\n"
    code += "sandbox.run_program('import time; time.sleep(60)', seconds=60, unconfined=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=os.path.dirname(os.path.dirname(sandbox.__file__))
    ) as process:
        until(lambda: len(processes()) == 3)  # this one, the one that keeps watch and the program
        process.kill()
    until(lambda: not processes())


def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_where_the_kernel_does_not_confine_programs_run_only_if_told_to(monkeypatch):
    source, mounts = sandbox._runner(), ("libc.syscall(442,", "(lambda *args: -1)(442,")
    assert mounts[0] in source
    for lacks, missing in {
        (LAYERS["namespaces"],): "namespaces",
        (LAYERS["namespaces"], LAYERS["Landlock"]): "namespaces and read-only mounts and Landlock",
        (mounts, LAYERS["Landlock"]): "read-only mounts and Landlock",
    }.items():
        text = source
        for old, new in lacks:
            text = text.replace(old, new)
        monkeypatch.setattr(sandbox, "_runner", lambda text=text: text)
        for program in "", "1 / 0":  # it is not even begun
            with pytest.raises(ValueError, match=f"without {missing}; --unconfined"):
                sandbox.run_program(program, seconds=20)
        assert sandbox.run_program("", seconds=20, unconfined=True)


def test_no_program_reaches_a_server_beside_it(monkeypatch):
    source = sandbox._runner()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        for old, new in LAYERS.values():
            monkeypatch.setattr(sandbox, "_runner", lambda old=old, new=new: source.replace(old, new))
            assert not sandbox.run_program(program, seconds=5.0, unconfined=True)
            with pytest.raises(TimeoutError):
                server.accept()


def test_a_program_cannot_name_the_process_that_runs_it():
    """With namespaces; the slower and the fewer cores of the evaluator are what no audit hook tells."""
    before = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    for attack in "os.setpriority(os.PRIO_PROCESS, os.getppid(), 5)", "os.sched_setaffinity(os.getppid(), {0})":
        sandbox.run_program(f"import os\ntry: {attack}\nexcept OSError: pass", seconds=10)
        assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)) == before
