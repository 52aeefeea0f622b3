"""serve: characters by OpenAI's API."""

import ipaddress
from pathlib import Path
from typing import Annotated

import typer

from persona_pruner.cli.app import Device, Hub, Threads, app, console, err, example, set_threads
from persona_pruner.errors import InputError


@app.command(epilog=example("persona-pruner serve --base smollm2-135m --personas runs"))
def serve(
    personas: Annotated[Path, typer.Option(help="Folder of persona files or of sculpts; watched while it serves.")],
    base: Annotated[str, typer.Option(help="Alias, local folder or hub name of the base model.")] = "smollm2-135m",
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="PERSONA_PRUNER_TOKEN", help="Bearer token that requests must carry.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin of a web page that may call the server, or *; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16, float16, float32, int8.")] = "bfloat16",
    device: Device = "cpu",
    threads: Threads = 0,
    hub: Hub = False,
    kv_mib: Annotated[int, typer.Option(min=1, help="MiB for keys and values of all conversations.")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="Requests answered at a time.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused (429).")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 2048,
    max_body: Annotated[int, typer.Option(min=1024, help="Most bytes of a request.")] = 512 << 10,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a request may take, waiting included.")] = 300,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for what is under way when the server ends.")] = 30,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what is served and refused.")] = False,
):
    """Serve characters by an OpenAI-compatible API, with a page to try them; one base model in memory for all."""
    import logging
    import socket

    if not personas.is_dir():
        raise InputError(f"no folder of personas {personas}")
    try:
        from persona_pruner.serve.app import create_app, run
        from persona_pruner.serve.http import Limits
        from persona_pruner.serve.watcher import Watcher
        from persona_pruner.serve.worker import Engine
    except ImportError as error:
        raise InputError(f"serve needs the extra `serve` (pip install 'persona-pruner[serve]'): {error}") from error
    from persona_pruner.fleet import Fleet

    if token is not None and not (token and token.isascii() and token.isprintable()):
        raise InputError("the token must be printable ASCII and not empty")
    set_threads(threads)
    logging.basicConfig(level="INFO" if verbose else "WARNING", format="%(levelname)s %(name)s: %(message)s")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    fleet = Fleet.from_pretrained(base, dtype, device, kv_mib << 20, rows, queue, hub)
    engine = Engine(fleet, Path(base).name if Path(base).is_dir() else base)
    limits = Limits(max_body, max_tokens, min(512, max_tokens), timeout, grace=grace)
    watcher = Watcher(personas, engine)
    served = create_app(engine, watcher, limits, token, cors or ())

    def ready() -> None:
        listening.listen(512)
        where = f"[{host}]" if ":" in host else host
        count = len(engine.characters) - 1
        console.print(f"{count} characters on {engine.base} at http://{where}:{listening.getsockname()[1]}")
        if not token and not _loopback(host):
            err.print("persona-pruner: anyone who reaches this address may use it; --token asks for a token")

    served.state.ready = ready
    run(served, engine, listening, limits)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
