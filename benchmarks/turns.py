"""What the benchmarks share: sides that take turns, in processes of their own where it matters, and table rows."""

import importlib.util
import multiprocessing
import re
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

PEAK_MEMORY = "peak memory"  # the question that every side in a process of its own can answer


def options(parser, quick, argv=None):
    """The options of the command line. --quick makes `quick`, {name: value}, the defaults of other options."""
    values = {name: value if isinstance(value, list) else [value] for name, value in quick.items()}
    written = [f"--{name.replace('_', '-')} {' '.join(map(str, value))}" for name, value in values.items()]
    parser.add_argument("--quick", action="store_true", help=f"a size that takes seconds: {' '.join(written)}")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args(argv)


def installed(*modules):
    """Whether all of a peer's modules are there, without importing them; says so where one is not."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{' and '.join(missing)} not installed (pip install -r benchmarks/requirements.txt): our side alone")
    return not missing


def seconds(function, *arguments):
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def alternate(ways, turns):
    """{name: a list of what ways[name]() gave in each turn}. Who comes first changes from turn to turn."""
    given = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            given[name].append(ways[name]())
    return given


def times_as_fast(ours, theirs):
    """The median over the turns of their time over ours: above 1, ours is faster."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def row(*cells):
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells):
    return f"{row(*cells)}\n{row(*['---'] * len(cells))}"


@contextmanager
def sides(side, names, *arguments):
    """Runs each side in a process of its own, so that neither's threads or memory settings touch the other's.

    side: (name, *arguments) -> context manager of a function answer(question), of a module's top level.
    Yields {name: ask}: ask(question) is the side's answer, and ask(PEAK_MEMORY) its memory, see `peak_memory`.
    """
    context = multiprocessing.get_context("spawn")
    asking, started = {}, []

    def ask(name, pipe, question):
        pipe.send(question)
        try:
            return pipe.recv()
        except EOFError:  # the process has printed why
            sys.exit(f"the side of {name} has failed")

    try:
        for name in names:
            pipe, far_end = context.Pipe()
            process = context.Process(target=_serve, args=(far_end, side, name, arguments), daemon=True)
            process.start()
            far_end.close()  # so that the pipe ends with the process
            started.append((process, pipe))
            asking[name] = lambda question, name=name, pipe=pipe: ask(name, pipe, question)
        yield asking
    finally:
        for process, pipe in started:
            pipe.close()
            process.join()


def _serve(pipe, side, name, arguments):
    with side(name, *arguments) as answer:
        while True:
            try:
                question = pipe.recv()
            except EOFError:
                return
            pipe.send(peak_memory() if question == PEAK_MEMORY else answer(question))


def peak_memory():
    """The most memory this process has held at a time, libraries and all, in MB (of 2²⁰ bytes)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started this process
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
