"""The routes: OpenAI's, health, metrics, and the page."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from persona_pruner import __version__
from persona_pruner.errors import InputError
from persona_pruner.fleet import Event, QueueFull
from persona_pruner.serve.http import Gate, Limits, failure
from persona_pruner.serve.metrics import Metrics
from persona_pruner.serve.schemas import Answer, ChatRequest, CompletionRequest, error
from persona_pruner.serve.watcher import Watcher
from persona_pruner.serve.worker import Character, Closing, Engine, Stream

log = logging.getLogger(__name__)
PATIENCE = 10.0  # seconds of silence in a stream before a comment is sent, so that proxies and clients keep it open
PAGE = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _model(one: Character) -> dict:
    about = {"persona": one.persona, "bytes": one.bytes, "ratio": one.ratio, "greeting": one.greeting}
    head = {"id": one.name, "object": "model", "created": one.created, "owned_by": "persona-pruner"}
    return {**head, "dense": one.dense, **about}


class _Timeout(Exception):
    """The request took longer than the server allows."""


class _Failed(Exception):
    """The request ended with an error after it had been taken."""


async def _batches(stream: Stream, until: float, patience: float) -> AsyncIterator[list[Event]]:
    """Events as they come, [] after a while of silence. Raises _Timeout and _Failed."""
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise _Timeout
        try:
            events = await stream.take(min(left, patience))
        except TimeoutError:
            if until - time.monotonic() > 0:
                yield []
            continue
        if events[-1].finish in ("error", "cancelled"):
            raise _Failed(events[-1].error or "the request was cancelled")
        yield events
        if events[-1].finish:
            return


@asynccontextmanager
async def _while_there(request: Request, stream: Stream):
    """Ends the stream when the client goes away, and in any case at the end."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        stream.fail("the client has gone", "cancelled")

    watch = asyncio.create_task(gone())
    try:
        yield
    finally:
        watch.cancel()
        stream.close()


def create_app(
    engine: Engine,
    watcher: Watcher | None = None,
    limits: Limits | None = None,
    token: str | None = None,
    origins: Sequence[str] = (),
) -> FastAPI:
    """The application. watcher: what fills the engine; token: asked of every request but the page and /health;
    origins: web pages of other addresses that may call it ("*" for all)."""
    limits = limits or Limits()

    @asynccontextmanager
    async def life(app: FastAPI):
        engine.start()
        if watcher:
            await asyncio.to_thread(watcher.scan)
            await asyncio.to_thread(engine.arrange)
            watcher.start()
        getattr(app.state, "ready", lambda: None)()
        yield
        if watcher:
            await asyncio.to_thread(watcher.stop)
        await engine.stop()

    app = FastAPI(title="persona-pruner", version=__version__, lifespan=life)
    metrics = Metrics(engine)
    app.state.metrics = metrics
    app.add_middleware(Gate, limits=limits, token=token)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(HTTPException)
    async def _http(request: Request, problem: HTTPException):
        return failure(problem.status_code, str(problem.detail))

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, problem: RequestValidationError):
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return failure(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None)

    @app.exception_handler(Exception)
    async def _fault(request: Request, problem: Exception):
        return failure(500, "the server met an error; its log says more")

    async def answer(body: ChatRequest | CompletionRequest, request: Request, chat: bool):
        begun, route = time.monotonic(), request.url.path
        response = await _answer(body, request, chat, begun)
        metrics.requests.labels(route, response.status_code).inc()
        return response

    async def _answer(body, request: Request, chat: bool, begun: float):
        if body.model not in engine.characters:
            return failure(404, f"the model {body.model!r} does not exist", "model_not_found", param="model")
        try:
            sampling = body.sampling(limits.usual_tokens, limits.tokens)
            prompt = body.conversation() if chat else body.text()
            stream = await engine.submit(body.model, prompt, sampling)
        except InputError as problem:
            gone = body.model not in engine.characters  # since we looked
            return failure(404, str(problem), "model_not_found") if gone else failure(400, str(problem))
        except QueueFull as problem:
            return failure(429, str(problem), "queue_full")
        except Closing as problem:
            return failure(503, str(problem), "closing")
        except RuntimeError as problem:
            return failure(500, str(problem))
        maker = Answer(chat, body.model, engine.token_text, sampling.logprobs is not None)
        until = begun + limits.seconds
        if body.stream:
            options = body.stream_options
            pieces = _pieces(request, stream, maker, until, begun, bool(options and options.include_usage))
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)
        events: list[Event] = []
        try:
            async with _while_there(request, stream):
                async for batch in _batches(stream, until, limits.seconds):
                    if batch and not events:
                        metrics.first.observe(time.monotonic() - begun)
                    events += batch
        except _Timeout:
            return failure(504, f"the answer took longer than {limits.seconds:g} s", "timeout")
        except _Failed as problem:
            return failure(503 if engine.closing else 500, str(problem))
        _count(maker.model, events[-1], begun)
        return JSONResponse(maker.whole(events))

    async def _pieces(request, stream: Stream, maker: Answer, until: float, begun: float, usage: bool):
        def line(value) -> str:
            return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"

        first = True
        async with _while_there(request, stream):
            try:
                async for batch in _batches(stream, until, PATIENCE):
                    if not batch:
                        yield ": waiting\n\n"
                        continue
                    if first:
                        metrics.first.observe(time.monotonic() - begun)
                    yield line(maker.piece(batch, first and maker.chat))
                    first = False
            except _Timeout:
                late = f"the answer took longer than {limits.seconds:g} s"
                yield line(error(late, "server_error", "timeout"))
                return
            except _Failed as problem:
                yield line(error(str(problem), "server_error"))
                return
        _count(maker.model, batch[-1], begun)
        if usage:
            yield line(maker.last_usage(batch[-1]))
        yield "data: [DONE]\n\n"

    def _count(model: str, last: Event, begun: float) -> None:
        metrics.tokens.labels(model).inc(last.completion_tokens)
        metrics.whole.observe(time.monotonic() - begun)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request):
        """An answer in a conversation; the character's prompt is put before it."""
        return await answer(body, request, True)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        """A text continued as it is, by the character's part of the model."""
        return await answer(body, request, False)

    @app.get("/v1/models")
    async def models():
        """The characters, and the base model."""
        return {"object": "list", "data": [_model(one) for one in engine.characters.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        if name not in engine.characters:
            return failure(404, f"the model {name!r} does not exist", "model_not_found")
        return {**_model(engine.characters[name]), "system": engine.characters[name].system}

    @app.get("/health")
    async def health():
        """Whether requests are taken."""
        if engine.failure or engine.closing:
            return failure(503, engine.failure or "the server is shutting down")
        stats = engine.stats
        return {"status": "ok", **{key: stats[key] for key in ("characters", "running", "queued")}}

    @app.get("/metrics")
    async def prometheus():
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon():
        return Response(status_code=204)

    for path, name in PAGE.items():
        _page(app, path, name)
    return app


def _page(app: FastAPI, path: str, name: str) -> None:
    text = resources.files("persona_pruner.serve").joinpath("static", name).read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    kind = KINDS[name.rpartition(".")[2]]

    @app.get(path, include_in_schema=False)
    async def page():
        return Response(text, media_type=f"{kind}; charset=utf-8", headers=headers)


def run(app: FastAPI, engine: Engine, listening, limits: Limits | None = None, level: str = "warning") -> None:
    """Serves on a listening socket until SIGINT or SIGTERM. What is under way then gets `limits.grace` seconds, new
    requests are refused; a second signal ends at once."""
    import uvicorn

    limits = limits or Limits()

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame) -> None:
            # as uvicorn's own, which would raise the signal again at the end: what was asked for is done, with code 0
            self.force_exit, self.should_exit = self.should_exit, True
            if engine.closing or engine._loop is None:
                return
            engine.closing = True
            late = f"the server is shutting down and waited {limits.grace:g} s"
            with suppress(RuntimeError):
                engine._loop.call_soon_threadsafe(engine._loop.call_later, limits.grace, engine.abort, late)

    config = uvicorn.Config(
        app, log_level=level, access_log=False, server_header=False, h11_max_incomplete_event_size=64 << 10,
        timeout_graceful_shutdown=int(limits.grace) + 5, timeout_keep_alive=30, lifespan="on", ws="none",
    )  # fmt: skip
    Server(config).run(sockets=[listening])
