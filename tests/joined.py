"""Several real processes that train the tiny model together on this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        return one.getsockname()[1]


class Joined:
    """Processes of tests/tiny.py, each with some devices; their output is in files."""

    def __init__(self, folder, count, devices, *arguments, each=lambda index: ()):
        self.files, self.processes = [], []
        port = free_port()
        environment = os.environ | {
            'PYTHONPATH': str(ROOT),
            'JAX_PLATFORMS': 'cpu',
            'JAX_NUM_CPU_DEVICES': str(devices),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            self.files.append(folder / f'{port}.{index}.txt')
            flags = [f'--coordinator=127.0.0.1:{port}', f'--processes={count}', f'--process={index}']
            with self.files[-1].open('w') as out:
                command = [sys.executable, str(ROOT / 'tests' / 'tiny.py'), *flags, *map(str, arguments), *each(index)]
                self.processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def text(self, index=0):
        return self.files[index].read_text()

    def wait_for(self, text, seconds=120):
        """Waits until the first process has written a text."""
        deadline = time.monotonic() + seconds
        while text not in self.text():
            assert self.processes[0].poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def statuses(self, seconds=240):
        return [process.wait(seconds) for process in self.processes]

    def digest(self):
        """The digest of the final state, the same in all processes."""
        assert self.statuses() == [0] * len(self.processes), [self.text(i) for i in range(len(self.processes))]
        (found,) = {re.search('digest (.*)', self.text(index))[1] for index in range(len(self.processes))}
        return found
