"""A command line that ends in one sentence: what the user can mend is no traceback."""

import argparse
import os
import sys


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence too, without the list of all options."""

    def error(self, message):
        raise ValueError(message)


def run(main):
    """Runs a command line. What the user can mend is one sentence on standard error, and exit status 1. Ctrl-C ends it
    quietly, with status 130, and so does a reader of its output that has gone, with 141, as in `| head -1`.
    """
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(errors="replace")  # a terminal that lacks ⁹, or sends what is no UTF-8, stops nobody
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # here, because nobody hears of an error when the interpreter ends
    except KeyboardInterrupt:
        os._exit(130)  # at once: sys.exit would wait for the threads, of which each may have minutes to go
    except BrokenPipeError:
        os._exit(141)  # sys.exit would try to write what is left
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
    except ValueError as error:
        sys.exit(f"error: {error}")


def run_demo(demo):
    """Runs a function as a command line that takes no arguments."""

    def main():
        Parser(description=demo.__doc__).parse_args()
        demo()

    run(main)
