"""Work in a forked child process, where it may be killed."""

import gc
import os
import traceback


def fork(work):
    """Begin work in a child and return its process id; it ends with 0, or with 1 and a traceback."""
    child = os.fork()
    if child == 0:
        code = 1
        gc.freeze()  # what the parent has left to collect may wait for threads that are not here (an engine's do)
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child):
    """Wait for a child; its exit code, below 0 if a signal killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
