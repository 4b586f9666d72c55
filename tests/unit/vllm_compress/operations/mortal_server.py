"""A fake server that dies in the middle of its work."""

from __future__ import annotations

import socket
import struct
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol


class Mortal(Protocol):
    """`dies_after` as many requests as were `seen`; negative: never."""

    dies_after: int
    seen: list[dict[str, Any]]


class MortalHandler(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def is_dead(self, server: Mortal) -> bool:
        """Whether it is time; the connection is then reset as it closes."""
        dead = 0 <= server.dies_after <= len(server.seen)
        if dead:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return dead
