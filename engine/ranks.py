"""Several processes that train one model together, on one machine or on more: ranks, as MPI calls them.

`mpiexec` starts a program many times. Rank 0 runs it. The others read and write nothing: they wait until rank 0 makes
an object `everywhere`, make the same one, and repeat every call of its methods. In such a method a rank takes its share
(`pieces`, `own`), and all meet to add up or to hand round what they have (`combined`, `total`, `exchange`). A process
that was started alone is the only rank: all is its share, and MPI is not imported.
"""

import atexit
import functools
import operator
import os
import platform
import signal
import sys
import time
from contextlib import ExitStack, contextmanager

from engine.backend import np, to_numpy, xp
from engine.files import refuse
from engine.threads import cores, thread_pool

# where the environment says how many ranks there are, and which this is: Open MPI; MPICH and Intel MPI; Slurm
LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK"}
LAUNCHERS |= {"SLURM_STEP_NUM_TASKS": "SLURM_PROCID"}
# that end a run; Open MPI leaves a quarter of a second after the first two, and passes on the third
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

world = None  # MPI's communicator, where there is more than one rank
called = False  # whether rank 0 is in a call that all repeat, so that the others may wait for it in there


def count():
    return world.size if world else 1


def rank():
    return world.rank if world else 0


# ------------------------------------------------------------------------------------------------- shares


def pieces(rows, size):
    """This rank's share of so many rows, as slices of at most `size` of them."""
    start, stop = (rows * number // count() for number in (rank(), rank() + 1))
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def own(arrays, of=None):
    """The names of this rank's share of arrays, {name: array}, or of another's: of every size it has as many."""
    return sorted(arrays, key=lambda name: -arrays[name].size)[rank() if of is None else of :: count()]


def own_cores():
    """The number of threads for this rank: its share of the cores that it may use, as others may use the same."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(cores())
    mine = {(platform.node(), core) for core in usable}
    if world:
        arrive()
    taken = [core for some in (world.allgather(mine) if world else [mine]) for core in some]
    return max(1, int(sum(1 / taken.count(core) for core in mine) + 1e-6)) if xp is np else 1


def crew(threads):
    """Who computes, in words."""
    return f"{count()} processes" if world else f"{threads or own_cores()} threads"


# ------------------------------------------------------------------------------------------------ meetings


def wait(request):
    """Waits until ranks have exchanged something. MPI's own waiting keeps a core busy, which rank 0 may need while it
    prepares or saves; this one sleeps between looks, the longer it waits the longer, up to a millisecond.
    """
    began = time.perf_counter()
    while not request.Test():
        time.sleep(min(0.001, (time.perf_counter() - began) / 8))


def arrive():
    """Waits until all ranks are here."""
    wait(world.Ibarrier())


def combined(value, function):
    """On rank 0, the values of all ranks in order, joined by a function of two; elsewhere just the value."""
    if world:
        arrive()
        value = functools.reduce(function, world.gather(value) or [value])
    return value


def total(arrays):
    """The sum over all ranks of each of the arrays, {name: array}, in place."""
    if world:
        flat = packed(arrays, arrays)
        summed = np.empty_like(flat)
        wait(world.Iallreduce(flat, summed))
        unpack(summed, arrays.values())
    return arrays


def exchange(arrays):
    """Gives each rank the arrays, {name: array}, that others have as their `own`, in place."""
    if world:
        owned = [own(arrays, of) for of in range(count())]
        flat = packed(arrays, owned[rank()])
        sizes = [sum(arrays[name].size for name in names) for names in owned]
        whole = np.empty(sum(sizes), flat.dtype)
        wait(world.Iallgatherv(flat, (whole, sizes)))
        unpack(whole, [arrays[name] for names in owned for name in names])


def packed(arrays, names):
    """Some of the arrays in one, of one dimension, in main memory; of a type that all of them fit in."""
    empty = np.empty(0, np.result_type(*(array.dtype for array in arrays.values())))
    return np.concatenate([empty, *(to_numpy(arrays[name]).ravel() for name in names)])


def unpack(flat, arrays):
    for array in arrays:
        part, flat = flat[: array.size], flat[array.size :]
        array[...] = xp.asarray(part.reshape(array.shape))


class Shared:
    """An optimiser of which each rank does a share: it has the state of its own weights, and changes them. Of a step
    over 2,048 tokens in 6 million weights Muon is a quarter; where two ranks do all of it twice, the step takes 1.17
    times as long.
    """

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, params, grads, schedule, parallel_map):
        mine, state = own(grads), self.optimizer.state
        self.optimizer.state = {name: state[name] for name in mine if name in state}  # all of it, before a first step
        self.optimizer.step(params, {name: grads[name] for name in mine}, schedule, parallel_map)
        exchange({name: params[name] for name in grads})

    def state(self):
        """The state of all weights."""
        return combined(self.optimizer.state, operator.or_)


# ----------------------------------------------------------------------------------------- leader and followers


def lead(main):
    """Runs main on rank 0, and on the other ranks what it tells them. Where one of them fails, all end."""
    global world
    size, number = launched()
    if size == 1:
        return main()
    try:
        from mpi4py import MPI

        found = MPI.COMM_WORLD.size
    except (ImportError, RuntimeError):  # no package, or no library for it
        found = 0
    if found != size and number:
        return None  # rank 0 says it
    refuse(not found, "several processes need MPI: pip install mpi4py mpich")
    refuse(found != size, f"mpiexec started {size} processes, but mpi4py is of another MPI, and sees {found} of them")
    world = MPI.COMM_WORLD
    sys.stdout.reconfigure(line_buffering=True)  # which mpiexec reads through a pipe
    for one in SIGNALS if number else []:
        signal.signal(one, signal.SIG_IGN)  # all ranks get it, and rank 0 says what follows
    try:
        follow() if number else main()
    except BaseException as error:
        if number or called:
            atexit.register(abort)  # the last that this process does, as others may wait for it
        if isinstance(error, MPI.Exception) or number and isinstance(error, (ValueError, OSError)):
            raise ValueError(f"rank {number}: {error}") from None
        raise
    finally:
        if not number and not called:
            tell(None)


def abort():
    """Ends all ranks, once mpiexec has had the time to read what this one said last: Abort does not wait for that."""
    time.sleep(0.25)
    world.Abort(1)


def launched():
    """The number of processes that were started together, and which of them this is."""
    for size, number in LAUNCHERS.items():
        if size in os.environ and number in os.environ:
            return int(os.environ[size]), int(os.environ[number])
    return 1, 0


def tell(told=None):
    """Hands what rank 0 tells to all ranks, and returns it. None: they can go."""
    arrive()
    return world.bcast(told)


def follow():
    """Does what rank 0 tells: (None, what an object is made of), or (the name of a method of it, arguments)."""
    mine = None
    with ExitStack() as stack:
        while told := tell():
            name, arguments = told
            if name:
                getattr(mine, name)(*arguments)
            else:
                mine = stack.enter_context(made(*arguments))


def call(name, function, *arguments):
    """function(*arguments), which the other ranks, if there are any, know by its name."""
    global called
    if world:
        called = True
        tell((name, arguments))
    result = function(*arguments)
    called = False
    return result


@contextmanager
def made(kind, threads, *arguments):
    """An object of a class, on this rank: kind(the map of a pool of threads, *arguments)."""
    with thread_pool(threads or own_cores()) as pool:
        yield kind(pool.map, *arguments)


@contextmanager
def everywhere(*arguments):
    """For rank 0: an object as of `made`, of which each rank has one. A call of a method is a call on all of them, with
    the same arguments; it returns what it does on rank 0.
    """
    with ExitStack() as stack:
        yield Everywhere(call(None, lambda *arguments: stack.enter_context(made(*arguments)), *arguments))


class Everywhere:
    """Stands for an object that every rank has."""

    def __init__(self, mine):
        self.mine = mine

    def __getattr__(self, name):
        return functools.partial(call, name, getattr(self.mine, name))
