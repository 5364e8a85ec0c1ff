"""Scripts that start in no time: processes forked by a server that has imported what takes a start its many seconds.

    python tests/warm.py SOCKET                    serve
    python tests/warm.py SOCKET SCRIPT FLAGS ...   run a script in place of `python SCRIPT FLAGS ...`

A forked script has the caller's streams, folder, environment and arguments, and dies at once when the caller is killed.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path

SLOW = ("3_train.py", "4_embed.py")  # all others start as ever


def serve(place: str) -> None:
    """Fork a process for each call, for ever."""
    for name in ("open_clip", "peft", "matplotlib.pyplot", "pyarrow.parquet"):
        importlib.import_module(name)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(place)
    listener.listen()
    print("ready", flush=True)
    while True:
        caller, _ = listener.accept()
        if not os.fork():
            listener.close()
            attend(caller)
            os._exit(0)
        caller.close()


def attend(caller: socket.socket) -> None:
    """Run what a caller asks for and tell it the exit code; kill script and children when the caller is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked, streams, *_ = socket.recv_fds(caller, 1 << 20, 3)
    script = os.fork()
    if not script:
        os.setpgid(0, 0)
        run(streams, **json.loads(asked))
    for stream in streams:  # they end with the script
        os.close(stream)
    ended = os.pidfd_open(script)
    if ended not in select.select([caller, ended], [], [])[0]:
        return os.killpg(script, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])
    caller.send(str(code if code >= 0 else 128 - code).encode(), socket.MSG_NOSIGNAL)


def run(streams: list[int], folder: str, environment: dict[str, str], arguments: list[str]) -> None:
    """Become the script; never returns."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")
    sys.exit(0)


def call(place: str, arguments: list[str]) -> int:
    """Let the server run a script; ends with its exit code."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(place)
        asked = {"folder": os.getcwd(), "environment": dict(os.environ), "arguments": arguments}
        socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
        return int(server.recv(100) or 1)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    if sys.argv[2] not in SLOW:
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
    sys.exit(call(sys.argv[1], sys.argv[2:]))
