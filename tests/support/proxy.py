"""A way to a server of this machine that can be cut, for a while, with all connections on it."""

import contextlib
import socket
import threading


class Proxy:
    """Hands bytes on between its own port and a server's, until `cut`, and again after `mend`.

    Attributes:
      port: where clients connect.
    """

    def __init__(self):
        self._target, self.port = 0, 0
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self.mend()

    def lead_to(self, target: int) -> int:
        """Sets the server's port; returns the one where clients connect."""
        self._target = target
        return self.port

    def mend(self) -> None:
        """Takes connections."""
        listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.port, self._listener = listener.getsockname()[1], listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Refuses connections, and ends those that there are."""
        assert self._listener is not None
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._open |= {client, server}
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._hand_on, args=ends, daemon=True).start()

    def _hand_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()
