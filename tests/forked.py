"""Runs a command many times, each time in a process of its own that is forked when its imports are done.

python tests/forked.py MODULE, with a list of lists of arguments as JSON on stdin: prints a list of [status, stderr].
"""

import importlib
import json
import os
import runpy
import sys
import tempfile


def run(module, arguments):
    """Returns [status, what it wrote to stderr] of python -m `module`, which must do nothing when it is imported."""
    with tempfile.TemporaryFile() as error:
        process = os.fork()
        if not process:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(error.fileno(), 2)
            sys.argv[1:] = arguments
            del sys.modules[module]
            runpy.run_module(module, run_name='__main__', alter_sys=True)
            raise SystemExit
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        error.seek(0)
        return [status, error.read().decode()]


if __name__ == '__main__':
    importlib.import_module(sys.argv[1])
    print(json.dumps([run(sys.argv[1], arguments) for arguments in json.load(sys.stdin)]))
