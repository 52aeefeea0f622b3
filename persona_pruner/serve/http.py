"""What every request passes before it reaches a route: the size and pace of its body, and who may ask."""

import asyncio
import hmac
from contextlib import suppress
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from persona_pruner.serve import schemas

DRAIN = 64 << 20  # bytes of a refused body that are read all the same: a client that is cut off never sees the answer
OPEN = ("/", "/health", "/page.js", "/page.css", "/favicon.ico")  # without a token


@dataclass(frozen=True)
class Limits:
    """body: bytes; tokens: most of an answer, and how many where a request does not say; seconds: a request may take,
    waiting included; upload: seconds its body may take; grace: seconds for what is under way when the server ends."""

    body: int = 512 << 10
    tokens: int = 2048
    usual_tokens: int = 512
    seconds: float = 300.0
    upload: float = 30.0
    grace: float = 30.0


def failure(status: int, message: str, code: str | None = None, **rest) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}.get(status)
    return JSONResponse(schemas.error(message, kind, code, **rest), status, headers)


async def _drain(receive, until: float) -> None:
    """Reads the rest of a body, up to a size and a time, and forgets it."""
    left = DRAIN
    with suppress(TimeoutError):
        async with asyncio.timeout_at(until):
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))


class Gate:
    """ASGI middleware: bodies up to a size and within a time, and a bearer token where one is set."""

    def __init__(self, app, limits: Limits, token: str | None = None):
        self.app, self.limits, self.token = app, limits, token

    def _may(self, scope, headers: dict[bytes, bytes]) -> bool:
        if self.token is None or scope["path"] in OPEN or scope["method"] == "OPTIONS":
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token.encode())

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, until = dict(scope["headers"]), asyncio.get_running_loop().time() + self.limits.upload
        most, left, whole = self.limits.body, self.limits.body, False
        too_large = HTTPException(413, f"the body is larger than {most} bytes")
        length = headers.get(b"content-length", b"0")
        refused = None
        if not self._may(scope, headers):
            refused = failure(401, "a bearer token is needed: Authorization: Bearer TOKEN", "invalid_api_key")
        elif not length.isdigit() or int(length) > most:
            refused = failure(413, too_large.detail)
        if refused:
            if length.isdigit() and int(length) <= DRAIN:
                await _drain(receive, until)
            return await refused(scope, receive, send)

        async def limited():
            nonlocal left, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body took too long to arrive") from None
            if message["type"] == "http.request":
                whole, left = not message.get("more_body", False), left - len(message.get("body", b""))
                if left < 0:
                    if not whole:
                        await _drain(receive, until)
                    whole = True
                    raise too_large
            return message

        await self.app(scope, limited, send)
