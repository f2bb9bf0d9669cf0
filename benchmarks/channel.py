"""What a worker and the driver say to each other: lines of JSON on stdout, and "go STEPS" or "stop" on stdin."""

import json
import os
import sys


class Channel:
    """The worker's end. It takes stdout for itself; whatever else prints goes to stderr."""

    def __init__(self):
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **message) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def steps_asked(self) -> int:
        """Waits for the driver; 0 where there is nothing more to do."""
        word, _, steps = sys.stdin.readline().partition(" ")
        return int(steps) if word == "go" else 0


def peak_bytes() -> int:
    """The most memory that this process has had resident so far."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
