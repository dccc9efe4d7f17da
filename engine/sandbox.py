"""Running a program that nobody has read (for HumanEval), so that it can do no harm.

A program that a model wrote may loop, fill the memory or delete files. So it runs in a process of its own that first
gives up, for good, the rights to do so. Linux only.
"""

import functools
import inspect
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile

# so that NumPy starts no threads, which `confine` forbids
THREADS = {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")}


def run_program(program, seconds=3.0, megabytes=512, unconfined=False):
    """Whether a program runs to its end, in a new Python process of its own that gives up its rights first (`confine`).

    It has `seconds`, in which Python also has to start and to be confined, `megabytes`, an empty folder and an empty
    input; its output goes nowhere. That it came to its end is not told by an exit status or by text, which any program
    can forge, but by a random token (`run_confined`).

    A program that fails, stops, hangs or merely claims success does not pass. No verdict from within its own process
    can promise that a program made to deceive did not: it can skip its own asserts, search its memory for the token, or
    return an object that is equal to everything. What passes for no good reason is for a reader to find.
    Raises ValueError where the system is not Linux, and, unless `unconfined`, where its kernel does not confine: if it
    refuses namespaces, network and processes stay open; if it neither mounts read-only nor has Landlock, files do. If
    of these it has only Landlock, the access rights and times of the user's own files are left to the audit hook.
    """
    if sys.platform != "linux":
        raise ValueError("programs are only run on Linux, where a process can be confined")
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as job:
        job.write(json.dumps([program, token, unconfined, [folder, seconds, megabytes]]).encode())
        job.seek(0)
        command = [sys.executable, "-I", "-B", "-c", _runner()]
        options = {"cwd": folder, "env": THREADS, "stderr": subprocess.DEVNULL, "start_new_session": True}
        with subprocess.Popen(command, stdin=job, stdout=subprocess.PIPE, **options) as process:
            try:
                ready, _, _ = select.select([process.stdout], [], [], seconds)  # something, or the end of the pipe
                told = os.read(process.stdout.fileno(), 256).decode(errors="replace") if ready else ""
            finally:
                process.terminate()  # it kills the program before it ends, and leaving the block waits for that
    if told.startswith(token + " "):
        lacking = told.removeprefix(token + " ")
        raise ValueError(f"the kernel cannot confine programs, without {lacking}; --unconfined runs them all the same")
    return told == token


@functools.cache
def _runner():
    return "\n".join([*map(inspect.getsource, (keep_watch, confine, run_confined)), "run_confined()"])


def keep_watch():
    """Goes on in a child, which the parent kills when it is told to, or when its own parent dies.

    The child is killed by its id, so no change of its session, group or death signal saves it; in a namespace of its
    own it cannot name the parent, and the death of the first process there is that of all.
    """
    import os
    import signal

    waking = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, waking)
    if child := os.fork():
        signal.sigwait(waking)
        os.kill(child, signal.SIGKILL)  # nobody has waited for it yet, so that the id is still its own
        os.waitpid(child, 0)
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, waking)


def confine(folder, seconds, megabytes):
    """Gives up for good what this process could do harm with. It runs in the new process, without our modules.
    Returns what the kernel refused of what it takes to confine a program, as text; "" is a program confined.

    By the kernel, so that no code can get around it: limits of time, memory and file sizes; no new process or thread; a
    user other than root. Where the kernel grants namespaces (to root, on most systems to everyone): no network, and all
    files read-only but for a folder in memory, which ends with the process. Where it has Landlock (Linux 5.13): no
    change of files outside the folder, no program started; later versions add TCP and signals.
    By an audit hook, everywhere: who tries to write elsewhere, open a socket or a database, start a program, send a
    signal, call C or look at all objects, ends there and then. It sees neither what a descriptor stands for, nor the
    folder that a path is relative to (dir_fd), nor os.mkfifo and files that C code opens by itself; a program that
    replaces functions of posixpath gets past it, too, and so does code that breaks the interpreter. It alone stands
    before Unix sockets in the file system and, without namespaces, before UDP and the access rights of the user's own
    files: that is not called confined. What can be read is not hidden, but there is nobody to tell.
    """
    import ctypes
    import os
    import resource
    import struct
    import sys

    libc, uid, gid = ctypes.CDLL(None), os.getuid(), os.getgid()
    mounts, ipc, user, pids, network = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
    namespaces = libc.unshare(mounts | ipc | network | pids | (user if uid else 0)) == 0
    kept = False  # the files, from being written
    if namespaces and uid:  # the user keeps the id it has, so that files stay its own
        for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
            try:
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            except OSError:  # Ubuntu 24.04 grants a namespace without its rights; Landlock and the hook remain
                pass
    libc.prctl(1, 15, 0, 0, 0)  # be told when the parent dies
    keep_watch()  # the child is the first process of its own namespace, and can name no other
    if namespaces:
        private, recursive, read_only, tmpfs = 0x44000, 0x8000, struct.pack("4Q", 1, 0, 0, 0), b"tmpfs"
        libc.mount(None, b"/", None, private, None)  # what is mounted from here on is mounted here only
        kept = libc.syscall(442, -100, b"/", recursive, read_only, len(read_only)) == 0  # mount_setattr
        libc.mount(tmpfs, os.fsencode(folder), tmpfs, 6, b"mode=777,size=64m")  # no devices, no set-user-id programs
    if not uid:  # not root, on whom a limit of processes has no hold
        os.chown(folder, 65534, 65534)
        libc.prctl(8, 1, 0, 0, 0)  # keep the capabilities, for capset below
        os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
    may_read = 0 if uid else 4  # root's right to read all files, as only root may be allowed to read Python's own
    libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", may_read, may_read, 0, 0, 0, 0))
    libc.prctl(38, 1, 0, 0, 0)  # no set-user-id program gives any of it back
    libc.prctl(1, 9, 0, 0, 0)  # die with the parent
    os.chdir(folder)
    os.environ["TMPDIR"] = folder

    version = libc.syscall(444, None, 0, 1)  # of Landlock
    if version > 0:
        change = 0x1FF2 | 0x2000 * (version > 1) | 0x4000 * (version > 2)  # write, make, remove, rename, truncate
        tcp, signals = 3 * (version > 3), 3 * (version > 5)
        rules = libc.syscall(444, struct.pack("3Q", change | 1, tcp, signals), 24, 0)  # 1: execute
        for path, rights in (folder, change), ("/dev/null", change & 0x4002):
            libc.syscall(445, rules, 1, struct.pack("=Qi", rights, os.open(path, os.O_PATH)), 0)
        kept = libc.syscall(446, rules, 0) == 0 or kept
    limits = {"CPU": int(seconds) + 1, "AS": megabytes << 20, "FSIZE": 16 << 20, "NPROC": 0, "NOFILE": 24, "CORE": 0}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))

    never = "socket. sqlite3. subprocess. ctypes. gc. pty. resource.prlimit signal.pthread_kill os.system os.exec"
    never = *never.split(), "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "os.unshare", "os.setns"
    names = "remove rename rmdir mkdir link symlink truncate chmod chown utime setxattr removexattr"
    changes, writes = {f"os.{name}" for name in names.split()}, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    inside, stop, real, decode = os.path.join(os.path.realpath(folder), ""), os._exit, os.path.realpath, os.fsdecode

    def hook(event, args):
        if event.startswith(never):
            stop(1)
        if event in changes or event == "open":
            named = args[: 1 if event == "open" else 2]
            paths = [real(decode(path)) for path in named if isinstance(path, (str, bytes)) and path != "/dev/null"]
            reads = event == "open" and not args[2] & writes
            memory = any(path.startswith("/proc/") and path.endswith("/mem") for path in paths)  # of a process
            if memory or not reads and not all((path + "/").startswith(inside) for path in paths):
                stop(1)

    sys.addaudithook(hook)
    lacking = (not namespaces) * ["namespaces"], (not kept) * ["read-only mounts and Landlock"]
    return " and ".join(sum(lacking, []))


def run_confined():
    """Reads a job, confines this process, runs the program, and tells that it came to its end.

    While the program runs, the token is only in the closure of an audit hook, and Python shows hooks to nobody. The
    hook writes it when asked by this very frame, which does so only after the exec.
    """
    import json
    import os
    import sys

    def keep(token):
        write, stop, frame, caller = os.write, os._exit, sys._getframe, sys._getframe(1)

        def end(event, args):  # calls nothing that is written in Python, from where the program could look back at it
            if event == "sandbox.end" and frame(1) is caller:
                write(pipe, token)
                stop(0)

        sys.addaudithook(end)

    program, token, unconfined, confined = json.load(sys.stdin)
    pipe, nowhere = os.dup(1), os.open("/dev/null", os.O_RDWR)
    for standard in 0, 1, 2:
        os.dup2(nowhere, standard)
    lacking = confine(*confined)
    if lacking and not unconfined:
        os.write(pipe, f"{token} {lacking}".encode())
        os._exit(1)
    keep(token.encode())
    del token
    exec(compile(program, "program", "exec"), {"__name__": "program"})
    sys.audit("sandbox.end")
