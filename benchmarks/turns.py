"""What the benchmarks share: a command line, sides that take turns, in processes of their own or not, and tables."""

import argparse
import importlib.util
import multiprocessing
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project, before this folder, which has an attention.py too

PEAK_MEMORY = "peak memory"  # the question that every side in a process of its own can answer


def options(doc, defaults, quick, **positional):
    """The command line: `defaults` has the options, {name: value, of which a list may be given several}; positional
    {name: nargs}. --quick makes `quick`, {name: value}, the defaults.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, nargs in positional.items():
        parser.add_argument(name, nargs=nargs)
    for name, value in defaults.items():
        kind = {"type": type(value[0]), "nargs": "+"} if isinstance(value, list) else {"type": type(value)}
        kind = {"action": "store_true"} if value is False else kind
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, help=f"({value})", **kind)
    parser.add_argument("--quick", action="store_true", help=f"a size that takes seconds: {quick}")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


@cache
def installed(*modules):
    """Whether all of a peer's modules are there, without importing them; says so where one is not."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{' and '.join(missing)} not installed (pip install -r benchmarks/requirements.txt): our side alone")
    return not missing


def gpu():
    """Whether there is a GPU on which the CUDA kernels run; says which, or that there is none."""
    from engine import flash_cuda, xp  # not before BACKEND is chosen

    some = xp.ones((1, 1, 1, 64), "float32")
    if not flash_cuda.usable(some, some):
        print("Skipped: no CuPy, or no GPU on which flash.cu runs, so nothing is compared or timed.")
        return False
    print(xp.cuda.runtime.getDeviceProperties(0)["name"].decode(), "· CuPy", xp.__version__)
    return True


def demand(right, wrong):
    """Ends the benchmark where it would time a wrong result."""
    if not right:
        sys.exit(f"{wrong}, so times say nothing")


def compare(ways, turns):
    """Times sides that take turns, ours the first: {name: function() -> its time}. Who begins changes with each turn.
    Returns {name: median of its times}, and {other: median over the turns of its time over ours}: above 1, ours is
    faster.
    """
    times = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            times[name].append(ways[name]())
    ours, *others = times
    ratios = {name: statistics.median(b / a for a, b in zip(times[ours], times[name])) for name in others}
    return {name: statistics.median(times[name]) for name in times}, ratios


def row(*cells):
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells):
    return f"{row(*cells)}\n{row(*['---'] * len(cells))}"


def speeds(tokens, times, ratios, ask, memory=PEAK_MEMORY):
    """Speeds, ratios and memory of the sides, from `compare` and `sides`, as the columns of a table: heads and cells.
    tokens: what a time is for. memory: the question for a side's memory, in MB.
    """
    found = []
    for name, taken in times.items():
        speed = f"{tokens / taken:,.{0 if tokens > 100 * taken else 1}f}"
        found.append((name if name in ratios else f"{name}, tokens/s", speed))
        if name in ratios:
            found.append(("times as fast", f"{ratios[name]:.2f}"))
    found += [(f"peak MB of {name}", f"{side(memory)[0]:,.0f}") for name, side in ask.items()]
    return zip(*found)


@contextmanager
def sides(side, names, *arguments):
    """Runs each side in a process of its own, so that neither's threads or memory settings touch the other's.

    side: (name, *arguments) -> context manager of a function answer(question), of a module's top level.
    Yields {name: ask}: ask(question) is the side's answer and the seconds it took; to PEAK_MEMORY, see `peak_memory`.
    """

    def ask(name, process, question):
        try:
            return process.submit(_answer, question).result()
        except Exception as error:
            sys.exit(f"the side of {name} has failed: {error!r}")

    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        start = lambda name: stack.enter_context(ProcessPoolExecutor(1, spawn, _begin, (side, name, *arguments)))
        yield {name: partial(ask, name, start(name)) for name in names}


def _begin(side, *arguments):
    global _context, _own
    _context = side(*arguments)  # which ends with the process
    _own = _context.__enter__()


def _answer(question):
    began = time.perf_counter()
    return peak_memory() if question == PEAK_MEMORY else _own(question), time.perf_counter() - began


def peak_memory():
    """The most memory this process has held at a time, libraries and all, in MB (of 2²⁰ bytes)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started this process
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
