"""Processes that share pieces of work which hold the interpreter's lock, as work on strings does."""

import signal
import sys
from contextlib import suppress
from multiprocessing import get_context


def process_map(function, items, processes):
    """The built-in `map` over a list, in so many processes: results come in order, each process is at most two ahead,
    and all end where the asking does, or their parent. An exception of the function is raised here.

    On Linux a process begins as a copy of this one. Elsewhere it begins anew: function, items and results are pickled,
    and a program that gets here must stand under `if __name__ == "__main__"`. ValueError where a process was ended.
    """
    if processes < 2:
        yield from map(function, items)
        return
    context, workers = get_context("fork" if sys.platform == "linux" else "spawn"), []
    try:
        for i in range(processes):
            receive, send = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(function, items[i::processes], receive, send), daemon=True)
            workers.append((worker, receive))
            worker.start()
            send.close()  # so that the pipe ends with the process
        for i in range(len(items)):
            try:
                value, error = workers[i % processes][1].recv()
            except EOFError:
                raise ValueError("a process that shared the work was ended from outside, or never began") from None
            if error:
                raise error
            yield value
    finally:
        for worker, receive in workers:
            receive.close()
            if worker.pid:
                worker.terminate()
                worker.join()


def _work(function, items, receive, send):
    receive.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(BrokenPipeError):  # the parent has gone
        for item in items:
            try:
                result = function(item), None
            except Exception as error:
                result = None, error
            send.send(result)
