"""Put first on PYTHONPATH: every attempt of the process to reach another machine fails, and is written to $ATTEMPTS."""

import os
import sys

HERE = ("127.0.0.1", "::1", "localhost", None, "")
REACHING = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")


def watch(event, arguments):
    if event not in REACHING:
        return
    place = arguments[0] if event.startswith("socket.get") else arguments[1]
    host = place[0] if isinstance(place, tuple) else place
    if isinstance(host, bytes):
        host = host.decode("utf-8", "replace")
    if host in HERE or (
        isinstance(place, str) and event == "socket.connect" and place.startswith("/")
    ):  # or a Unix socket
        return
    with open(os.environ["ATTEMPTS"], "a", encoding="utf-8") as file:
        file.write(f"{event} {place}\n")
    raise OSError(f"no network here: {event} {place}")


# Python tells this hook of a socket's every use, whichever module holds the socket.
sys.addaudithook(watch)
