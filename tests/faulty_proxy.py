"""A loopback HTTP proxy in front of one port that spoils what passes: cuts, 503s, stalls, or 403 for everything.

with FaultyProxy(target_port) as proxy:
    proxy.cut = 0.4          share of connections that are cut within the answer's first bytes
    proxy.refuse = 0.1       share that is answered 503
    proxy.stall = 0.05       share that answers nothing for `stall_seconds`, then closes
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time

REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultyProxy:
    """One thread a connection; which connections are spoilt follows from the seed."""

    def __init__(self, target: int, seed: int = 0):
        self.target, self.draw = target, random.Random(seed)
        self.cut = self.refuse = self.stall = 0.0
        self.stall_seconds, self.forbid = 1.0, False
        self.cuts = self.refusals = self.stalls = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        fate = self.draw.random()
        with client:
            if self.forbid or fate < self.refuse:
                self.refusals += 1
                client.recv(65536)
                client.sendall(FORBIDDEN if self.forbid else REFUSAL)
                return
            fate -= self.refuse
            if fate < self.stall:
                self.stalls += 1
                time.sleep(self.stall_seconds)
                return
            limit = None
            if fate - self.stall < self.cut:
                self.cuts += 1
                limit = self.draw.randrange(1, 3_000_000)
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                up = threading.Thread(target=self._pump, args=(client, server, None), daemon=True)
                up.start()
                self._pump(server, client, limit)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, limit: int | None) -> None:
        """Pass bytes on until the end, or until `limit` of them."""
        passed = 0
        try:
            while data := source.recv(65536):
                if limit is not None and passed + len(data) > limit:
                    target.sendall(data[: limit - passed])
                    break
                target.sendall(data)
                passed += len(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
