"""How ranks learn that one of them has died, where their launcher does not end them.

MPI cannot tell: from a rank that is dead nothing comes, and nothing from one that writes a checkpoint or waits for a
disk. A heartbeat in Python cannot either, as whatever keeps the interpreter's lock silences it. The kernel can: it
closes the TCP connections of a process that has ended, however it ended, and answers for one that is alive, slow or
stopped. So rank 0 has a connection with each of the others, over which no data go: nothing but an end is heard there.
"""

from __future__ import annotations

import contextlib
import hmac
import platform
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

CONNECT_S = 5.0  # given to reach rank 0
#: Asked after 5 s of silence, every 5 s, 4 times: of a machine that has gone one knows after 25 s.
KEEPALIVE = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 5, "TCP_KEEPALIVE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
WELCOME, BYE, TOLD = b"w", b"b", b"t"


def connect(ranks: Any, one_machine: bool) -> dict[int, socket.socket]:
    """Connect rank 0 with all others, which call this at the same time.

    Parameters
    ----------
    ranks : Communicator
    one_machine : bool
        Whether all are on one; then nobody outside of it can connect.

    Returns
    -------
    dict of int to socket
        Rank -> connection: of rank 0 with all that have reached it, of another with rank 0 or, failing that, none.
    """
    listener: socket.socket | None = None

    def listen() -> tuple[str, int, bytes] | None:
        nonlocal listener
        with contextlib.suppress(OSError):
            listener = socket.create_server(("127.0.0.1" if one_machine else "", 0), backlog=ranks.size)
            host = "127.0.0.1" if one_machine else platform.node()
            return host, listener.getsockname()[1], secrets.token_bytes(16)
        return None

    place = ranks.first(listen)
    if place is None:
        return {}
    host, port, token = place
    found = _call(host, port, token, ranks.rank) if ranks.rank else {}
    called = ranks.gather(len(found))
    if listener is not None:
        with listener:
            found = _answer(listener, token, sum(called))
    else:
        found = {rank: own for rank, own in found.items() if _heard(own) == WELCOME}
    known = ranks.gather(len(found))
    for connection in found.values():
        connection.settimeout(None)
        _keep_alive(connection)
    return found if ranks.rank else {rank: own for rank, own in found.items() if known[rank]}


def _call(host: str, port: int, token: bytes, rank: int) -> dict[int, socket.socket]:
    with contextlib.suppress(OSError):
        connection = socket.create_connection((host, port), CONNECT_S)
        connection.settimeout(2 * CONNECT_S)
        connection.sendall(token + rank.to_bytes(4, "big"))  # never more than fits into an empty buffer
        return {0: connection}
    return {}


def _answer(listener: socket.socket, token: bytes, expected: int) -> dict[int, socket.socket]:
    """Welcome those that know the token."""
    end = time.monotonic() + CONNECT_S
    found: dict[int, socket.socket] = {}
    while len(found) < expected and (left := end - time.monotonic()) > 0:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            listener.settimeout(left)
            connection = stack.enter_context(listener.accept()[0])
            connection.settimeout(1.0)
            words = connection.recv(len(token) + 4, socket.MSG_WAITALL)
            if hmac.compare_digest(words[:-4], token):
                connection.sendall(WELCOME)
                found[int.from_bytes(words[-4:], "big")] = connection
                stack.pop_all()
    return found


def _keep_alive(connection: socket.socket) -> None:
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # systems differ
            connection.setsockopt(
                socket.SOL_SOCKET if name[0] == "S" else socket.IPPROTO_TCP, getattr(socket, name), value
            )


def _heard(connection: socket.socket) -> bytes:
    """Return a word, ``b""`` if the other end is no more."""
    try:
        return connection.recv(1)
    except OSError:
        return b""


class Watch:
    """Hears from the others that they are done, or that they are dead.

    Parameters
    ----------
    connections : mapping of int to socket
        See `connect`.
    end : callable
        Ends this process. Called in another thread, as the main one may be waiting for ever: with the rank that has
        died, or None if another one has said so already. The others have been told.
    """

    def __init__(self, connections: Mapping[int, socket.socket], end: Callable[[int | None], None]):
        self._connections, self._end = connections, end
        self.thread = threading.Thread(target=self._follow, name="cupyep-watch", daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    connection = self._connections[key.data]
                    word = _heard(connection)
                    if word == BYE:
                        selector.unregister(connection)
                        continue
                    self.say(TOLD)
                    self._end(None if word == TOLD else key.data)
                    return

    def say(self, word: bytes) -> None:
        """Tell those that this process is connected with that it is done (`BYE`), or has said why it ends (`TOLD`)."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(word)
