"""A loopback proxy in front of one port that spoils what passes: cuts, 503s, stalls, or 403 for everything.

with FaultyProxy(target_port) as proxy:
    proxy.cut = 0.4          share of connections whose answer is cut after some of its bytes
    proxy.refuse = 0.1       share that is answered 503
    proxy.stall = 0.05       share that falls silent for `stall_seconds`, then closes

Counters say how much was really spoilt: `cuts`, `refusals`, `stalls`, of `connections`.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading

REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultyProxy:
    """Two threads a connection; the n-th connection's fate follows from the seed alone."""

    def __init__(self, target: int, seed: int = 0):
        self.target, self.draw = target, random.Random(seed)
        self.cut = self.refuse = self.stall = 0.0
        self.stall_seconds, self.forbid = 1.0, False
        self.connections = self.cuts = self.refusals = self.stalls = 0
        self.closing = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            # Where a cut comes: anywhere from the first line of a header to well within a shard.
            far = self.draw.choice([2.5, 2.5, 6])
            fate, limit = self.draw.random(), int(10 ** self.draw.uniform(1, far))
            threading.Thread(target=self._serve, args=(client, fate, limit), daemon=True).start()

    def _serve(self, client: socket.socket, fate: float, limit: int) -> None:
        with client, contextlib.suppress(OSError):
            if self.forbid or fate < self.refuse:
                self.refusals += 1
                client.recv(65536)
                client.sendall(FORBIDDEN if self.forbid else REFUSAL)
                return
            if fate < self.refuse + self.stall:
                self.stalls += 1
                self.closing.wait(self.stall_seconds)
                return
            cut = fate < self.refuse + self.stall + self.cut
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                # Closed by a reset: moto reads a request that merely ends too early for ever.
                server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
                self._pump(server, client, limit if cut else None)
                client.shutdown(socket.SHUT_RDWR)

    def _pump(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        """Pass bytes on until the end, or until `limit` of them; then nothing comes from `source` any more."""
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if limit is not None and passed + len(data) > limit:
                    self.cuts += 1
                    target.sendall(data[: limit - passed])
                    break
                target.sendall(data)
                passed += len(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)
