"""Bodies that are too long, too slow or half."""

import asyncio
import socket
import time

import pytest

pytest.importorskip("fastapi", reason='needs `pip install "r2ec_trl[serve]"`')

from r2ec_trl.serving.guard import Guard  # noqa: E402


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
    assert "413" in raw(changing, f"{head}Content-Length: 10000000\r\n\r\n".encode() + b"x" * 65536)[:20]


def test_a_body_byte_by_byte_is_given_up_while_others_are_answered(changing):
    with socket.create_connection(("127.0.0.1", changing.port), timeout=5) as slow:
        slow.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 300\r\n\r\n")
        start = time.monotonic()
        while time.monotonic() - start < 0.4:
            slow.sendall(b" ")
            assert changing.ask(["i00"]).status_code == 200
        assert b"408" in slow.recv(65536)[:20] and time.monotonic() - start < 3


def test_who_does_not_read_the_answer_is_let_go():
    """A send that never ends is ended after `send_seconds`, and counted with the status it began with."""
    counted = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 100})
        raise AssertionError("the piece was not taken")

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    guard = Guard(app, 100, 1.0, 0.05, lambda *of_request: counted.append(of_request))
    asyncio.run(asyncio.wait_for(guard({"type": "http", "path": "/x", "headers": []}, receive, send), 5))
    assert [(path, status) for path, status, _ in counted] == [("other", 200)]
