"""Bounds around an ASGI application: the size of a body, and how long a client may take to send one or to read."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

# Of /page alone: whatever a title holds, the browser loads nothing from elsewhere.
PAGE_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


class Guard:
    """
    Reads a request's body before the application sees it, bounded in bytes and seconds, and bounds each send.

    Args:
        app:
            The application.
        max_body (`int`):
            Bytes; more is 413.
        body_seconds (`float`):
            For the whole body; later is 408.
        send_seconds (`float`):
            For the client to take each piece of the answer; a slower one is let go.
        observe (`Callable`):
            Called at the end of each request with path, status and seconds.
    """

    def __init__(
        self,
        app: Any,
        max_body: int,
        body_seconds: float,
        send_seconds: float,
        observe: Callable[[str, int, float], None],
    ):
        self.app, self.max_body, self.body_seconds = app, max_body, body_seconds
        self.send_seconds, self.observe = send_seconds, observe

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # 499: the client left

        async def bounded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.setdefault("headers", [])
                message["headers"] = [*headers, (b"x-content-type-options", b"nosniff")]
                if scope["path"].startswith("/page"):
                    message["headers"].append((b"content-security-policy", PAGE_POLICY))
            await asyncio.wait_for(send(message), self.send_seconds)

        try:
            try:
                body = await asyncio.wait_for(self._body(scope, receive), self.body_seconds)
            except TimeoutError:
                body = (408, f"The request did not arrive whole within {self.body_seconds:g} s.")
            if isinstance(body, tuple):
                await _refuse(bounded_send, *body)
            elif body is not None:
                await self.app(scope, _replay(body, receive), bounded_send)
        except TimeoutError:
            pass  # a client that does not read: the connection is closed
        finally:
            route = getattr(scope.get("route"), "path", None)
            self.observe(
                route or ("/page" if scope["path"].startswith("/page") else "other"), status, time.monotonic() - start
            )

    async def _body(self, scope: Message, receive: Receive) -> bytes | tuple[int, str] | None:
        """The body, or status and sentence; `None` when the client left."""
        too_long = (413, f"The body is longer than {self.max_body} bytes.")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body:
            return too_long
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_body:
                return too_long
            if not message.get("more_body"):
                return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hands the body out once, then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
