"""Bodies that are too long, too slow or half."""

import socket
import time

import pytest

pytest.importorskip("fastapi", reason='needs `pip install "r2ec_trl[serve]"`')


def raw(served, data, wait=5.0):
    """What comes back for these bytes."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=wait) as connection:
        connection.sendall(data)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
            if b"}" in piece:
                break
        return answer.decode()


def test_bodies_are_bounded_in_size_and_time(changing):
    head = "POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    assert "413" in raw(changing, f"{head}Content-Length: 10000000\r\n\r\n".encode())[:20]
    chunks = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"800\r\n" + b" " * 2048 + b"\r\n"
    assert "413" in raw(changing, chunks + b"900\r\n" + b" " * 2304 + b"\r\n")[:20]
    start = time.monotonic()
    late = raw(changing, f'{head}Content-Length: 300\r\n\r\n{{"users": ['.encode())
    assert "408" in late[:20] and "did not arrive whole within 0.5 s" in late and time.monotonic() - start < 3
    with socket.create_connection(("127.0.0.1", changing.port)) as left:  # half a body, then gone
        left.sendall(f"{head}Content-Length: 300\r\n\r\n{{".encode())
    assert changing.ask(["i00"]).status_code == 200
