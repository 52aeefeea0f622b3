"""A real server on loopback over a tiny model, in a thread of this process or as the command."""

import contextlib
import http.client
import json
import socket
import subprocess
import threading
import time

import torch
from sculpting import command, environment

from persona_pruner.fleet import Fleet
from persona_pruner.formats.persona_file import SUFFIX, PersonaFile
from persona_pruner.serve.app import create_app
from persona_pruner.serve.http import Limits
from persona_pruner.serve.watcher import Watcher
from persona_pruner.serve.worker import Engine
from persona_pruner.testing import tiny_model, tiny_tokenizer

SYSTEMS = {"bram": "You are Bram, a smith.", "lyra": "You are Lyra, who sings."}


def persona(name: str, seed: int, model=None) -> PersonaFile:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.randperm(64, generator=generator) < 32 for _ in range(3)]
    system = SYSTEMS.get(name, f"You are {name}.")
    return PersonaFile.of(model or tiny_model(), name.title(), system, masks, "tiny", ratio=0.5, greeting="Hail!")


def personas(folder, names=tuple(SYSTEMS)):
    for seed, name in enumerate(names):
        persona(name, seed).save(folder / f"{name}{SUFFIX}")
    return folder


def fleet(**options) -> Fleet:
    return Fleet(tiny_model(), tiny_tokenizer(), torch.float32, **{"kv_bytes": 8 << 20, "max_rows": 8, **options})


class Server:
    """Address and parts of a running server."""

    def __init__(self, port: int, engine=None, watcher=None, app=None):
        self.port, self.engine, self.watcher, self.app = port, engine, watcher, app
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, body=None, method: str | None = None, headers: dict | None = None):
        """(status, value of the JSON, headers)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if raw is not None else {}
        connection.request(method or ("GET" if raw is None else "POST"), path, raw, {**sent, **(headers or {})})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        kind = response.headers.get_content_type()
        return response.status, json.loads(text) if kind == "application/json" else text.decode(), response.headers

    def chat(self, model="bram", text="Who are you?", **rest):
        return self.ask("/v1/chat/completions", chat(model, text, **rest))


def chat(model="bram", text="Who are you?", **rest) -> dict:
    common = {"max_tokens": 12, "temperature": 0}
    return {"model": model, "messages": [{"role": "user", "content": text}], **common, **rest}


def endless(mine: Fleet, pause: float) -> Fleet:
    """A fleet whose answers end by their length alone, with a pause in every step."""
    step, mine.stop_ids = mine.step, set()

    def slow():
        time.sleep(pause)
        return step()

    mine.step = slow
    return mine


@contextlib.contextmanager
def serving(folder, limits=None, token=None, origins=(), room=1024, seconds=0.05, pause=None, **options):
    """A server of the characters of a folder, in a thread of this process. pause: see `endless`."""
    import uvicorn

    engine = Engine(endless(fleet(**options), pause) if pause else fleet(**options), "tiny", room)
    watcher = Watcher(folder, engine, seconds)
    app = create_app(engine, watcher, limits or Limits(), token, origins)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # else the system holds megabytes for a client
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield Server(listening.getsockname()[1], engine, watcher, app)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextlib.contextmanager
def serving_command(base, folder, *more):
    """The command in a process of its own: (process, Server)."""
    words = command("serve", "--base", base, "--personas", folder, "--port", 0, "--dtype", "float32", *more)
    with subprocess.Popen(words, stdout=-1, stderr=-1, text=True, env=environment()) as process:
        try:
            line = process.stdout.readline()
            assert " at http://" in line, process.stderr.read()
            yield process, Server(int(line.rpartition(":")[2]))
        finally:
            if process.poll() is None:
                process.kill()


def wait_for(condition, seconds: float = 30.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)
    return found
