"""Ends Kafka when the process that started it has gone, however it went.

Run as a program of its own, with Kafka's command line as its arguments. Standard input is a pipe whose other
end only that process holds: the kernel closes it even after a SIGKILL. The guard leads a session of its own,
so a terminal's Ctrl-C reaches neither it nor Kafka and the worker may drain first. Standard library only, so
that it starts in milliseconds.
"""

import os
import select
import signal
import subprocess
import sys

STOP_S_MAX = 10.0
"""From SIGTERM to SIGKILL; Kafka needs about 0.5 s."""


def guard(command: list[str]) -> int:
    """Run `command` until it ends or standard input closes; its exit code, 128 + n after signal n."""
    gone, held_by_kafka = os.pipe()
    kafka = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[held_by_kafka])
    os.close(held_by_kafka)
    signal.signal(signal.SIGTERM, lambda *_: kafka.terminate())

    select.select([sys.stdin, gone], [], [])

    kafka.terminate()
    try:
        code = kafka.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        kafka.kill()
        code = kafka.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
