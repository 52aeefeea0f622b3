"""Loads a real server on loopback with clients of every kind, and counts what is not as it should be.

    persona-pruner bench serve --base smollm2-135m --requests 200 --at-once 32
    persona-pruner bench serve --minutes 30

Characters are random halves of the base's channels: speed does not depend on which. Of ten requests about six are
streamed chats, one is a whole chat, one client vanishes in the middle, one body is garbage and one prompt is too long.
Greedy answers of every character are taken first, one at a time, and each answer under load is held against them: in
float32 they must be equal, while in shorter types a batch may round to another token, and those are counted.
A request is lost when it has no answer, or one that is neither what was asked for nor an error in OpenAI's form.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from persona_pruner import models
from persona_pruner.benchmarks import common
from persona_pruner.formats.persona_file import SUFFIX, PersonaFile

KINDS = {"stream": 60, "whole": 10, "vanish": 10, "garbage": 10, "oversize": 10}  # shares
QUESTIONS = ("Who are you?", "What do you do all day?", "Tell me about the sea.", "What is iron good for?")
GARBAGE = (b"{", b"\xff\xfe", b"[]", b"[" * 50_000, b'{"model": 1}', b'{"model": "c0", "messages": [{"role": "x"}]}')
PATIENCE = 280.0  # seconds for one request before it counts as lost
WORDS = 200_000  # of a prompt that is too long for any model


@dataclass
class Found:
    """What a run has seen. first, whole: seconds until the first and the last token."""

    counts: dict = field(default_factory=dict)
    lost: list = field(default_factory=list)
    other: int = 0  # answers that differ from those given alone
    tokens: int = 0
    first: list = field(default_factory=list)
    whole: list = field(default_factory=list)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


async def request(port: int, path: str, body: bytes | None, stop_after: int | None = None):
    """(status, body, seconds to the first piece); with `stop_after`, leaves after so many bytes of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun, first = time.perf_counter(), None
    try:
        method = "POST" if body is not None else "GET"
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body or b'')}\r\n\r\n".encode() + (body or b""))
        await writer.drain()
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        pieces, size = [], 0
        chunked = "transfer-encoding: chunked" in head
        while True:
            if chunked:
                length = int(await reader.readuntil(b"\r\n"), 16)
                piece = await reader.readexactly(length)
                await reader.readexactly(2)
            else:
                piece = await reader.read()
            if not piece:
                break
            first = first or time.perf_counter() - begun
            pieces.append(piece)
            size += len(piece)
            if stop_after is not None and size >= stop_after:
                return status, b"", first
            if not chunked:
                break
        return status, b"".join(pieces), first
    finally:
        writer.close()


def is_error(body: bytes) -> bool:
    """Whether this is an error in OpenAI's form."""
    try:
        found = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return set(found) == {"message", "type", "param", "code"} and bool(found["message"])


def answer_of(body: bytes, streamed: bool) -> tuple[str, int] | None:
    """(text, tokens) of a complete answer, None of anything else."""
    try:
        if not streamed:
            found = json.loads(body)
            choice = found["choices"][0]
            return (
                (choice["message"]["content"], found["usage"]["completion_tokens"]) if choice["finish_reason"] else None
            )
        lines = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
        if lines[-1] != "[DONE]":
            return None
        pieces = [json.loads(line) for line in lines[:-1]]
        text = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces if p["choices"])
        return text, pieces[-1]["usage"]["completion_tokens"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def chat(model: str, question: str, tokens: int, stream: bool) -> bytes:
    """The body of a greedy chat."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0}
    return json.dumps(body | {"stream": stream, "stream_options": {"include_usage": True}}).encode()


async def client(port: int, kind: str, model: str, question: str, tokens: int, alone: dict, found: Found, dice) -> None:
    """One request of a kind, judged."""
    path, begun = "/v1/chat/completions", time.perf_counter()
    if kind == "vanish":
        await request(port, path, chat(model, question, tokens, True), stop_after=dice.randrange(0, 2000))
        return found.count("vanished")
    if kind in ("garbage", "oversize"):
        long = kind == "oversize"
        text = "word " * (WORDS if dice.random() < 0.5 else 20_000)  # more than the server reads; more than a context
        body = chat(model, text, tokens, False) if long else dice.choice(GARBAGE)
        status, answer, _ = await request(port, path, body)
        if status in (400, 413) and is_error(answer):
            return found.count(f"{kind}: {status}")
        return found.lost.append(f"{kind}: {status} {answer[:80]!r}")
    stream = kind == "stream"
    status, answer, first = await request(port, path, chat(model, question, tokens, stream))
    if status == 429 and is_error(answer):
        return found.count("refused: 429")
    got = answer_of(answer, stream) if status == 200 else None
    if got is None:
        return found.lost.append(f"{kind}: {status} {answer[-120:]!r}")
    found.count(kind)
    found.tokens += got[1]
    found.other += got[0] != alone[model, question]
    found.whole.append(time.perf_counter() - begun)
    if stream:
        found.first.append(first)


async def load(port: int, names: list[str], args, alone: dict, found: Found, until: float, seed: int) -> None:
    """`args.requests` clients, or as many as come until a time, `args.at_once` at a time."""
    dice, gate = random.Random(seed), asyncio.Semaphore(args.at_once)
    running: set[asyncio.Task] = set()

    async def one(kind: str, model: str, question: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await client(port, kind, model, question, args.tokens, alone, found, dice)
        except Exception as error:
            found.lost.append(f"{kind}: {type(error).__name__} {error}")
        finally:
            gate.release()

    count = 0
    while count < args.requests or time.monotonic() < until:
        count += 1
        kind = dice.choices(list(KINDS), KINDS.values())[0]
        await gate.acquire()
        task = asyncio.create_task(one(kind, dice.choice(names), dice.choice(QUESTIONS)))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


def resident(pid: int) -> float:
    """MB of a process in memory that are its own (no mapped files)."""
    rows = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("RssAnon")) / 1024


def characters(folder: Path, base: str, count: int) -> list[str]:
    """Persona files with random halves of the channels."""
    model, _ = models.load_model(base, dtype="auto")
    generator = torch.Generator().manual_seed(0)
    for n in range(count):
        masks = [torch.randperm(width, generator=generator) < width // 2 for width in models.widths(model)]
        file = PersonaFile.of(model, f"C{n}", f"You are character number {n}.", masks, base, ratio=0.5)
        file.save(folder / f"c{n}{SUFFIX}")
    return [f"c{n}" for n in range(count)]


async def measure(process, port: int, names: list[str], args) -> dict:
    alone = {}
    for name in names:
        for question in QUESTIONS:
            status, body, _ = await request(port, "/v1/chat/completions", chat(name, question, args.tokens, False))
            got = answer_of(body, False) if status == 200 else None
            if got is None:
                raise SystemExit(f"{name} does not answer: {status} {body[:200]!r}; nothing is measured")
            alone[name, question] = got[0]
    found, memory, over = Found(), [], asyncio.Event()
    begun = time.monotonic()

    async def watch() -> None:
        while not over.is_set():
            memory.append((time.monotonic() - begun, resident(process.pid)))
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watch())
    await load(port, names, args, alone, found, begun + 60 * args.minutes, args.seed)
    seconds = time.monotonic() - begun
    over.set()
    await watcher
    for _ in range(100):  # what vanished clients had asked for is given up within a step or two
        health = json.loads((await request(port, "/health", None))[1])
        if not health["running"] + health["queued"]:
            break
        await asyncio.sleep(0.05)
    if args.dtype == "float32" and found.other:
        raise SystemExit(f"{found.other} answers under load differ from those given alone; nothing is reported")
    quarter = len(memory) // 4
    parts = memory[quarter : 2 * quarter] or memory, memory[-quarter:] or memory
    early, late = (statistics.median(megabytes for _, megabytes in part) for part in parts)
    middle = lambda values: round(statistics.median(values), 2) if values else None  # noqa: E731
    return {
        "requests": sum(found.counts.values()) + len(found.lost), "seconds": round(seconds, 1), **found.counts,
        "lost": len(found.lost), "left running": health["running"] + health["queued"], "differ": found.other,
        "tokens/s": round(found.tokens / seconds, 1), "first token s": middle(found.first),
        "whole s": middle(found.whole), "MB at the start": round(memory[0][1]),
        "MB in the second quarter": round(early), "MB in the last quarter": round(late),
        "MB most": round(max(m for _, m in memory)), "examples": found.lost[:5],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("bench serve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default=models.SMOLLM2, help="alias, folder or hub name")
    parser.add_argument("--dtype", default="bfloat16", help="of the server's weights")
    parser.add_argument("--characters", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--minutes", type=float, default=0, help="go on for so long, whatever --requests says")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="24 requests of 8 tokens, 8 at once")
    parser.add_argument("--csv", help="write the row to this file")
    parser.add_argument("--json", help="write the same with the machine to this file")
    args = parser.parse_args(arguments)
    if args.short:
        args.requests, args.at_once, args.tokens = 24, 8, 8
    about = {"machine": common.machine()}
    print(", ".join(f"{key} {value}" for key, value in about["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        names = characters(Path(folder), args.base, args.characters)
        command = [sys.executable, "-P", "-m", "persona_pruner.cli", "serve", "--base", args.base, "--port", "0"]
        command += ["--personas", folder, "--dtype", args.dtype, "--threads", str(args.threads)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                line = process.stdout.readline()
                if " at http://" not in line:
                    raise SystemExit("the server did not start; nothing is measured")
                row = asyncio.run(measure(process, int(line.rpartition(":")[2]), names, args))
                alive = process.poll() is None
            finally:
                process.terminate()
            row["ended with"] = process.wait(60)
    about["command"] = {
        key: getattr(args, key) for key in ("base", "dtype", "characters", "at_once", "tokens", "threads")
    }
    print("\n".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    examples = row.pop("examples")
    common.write([row], about, args.csv, args.json)
    if row["lost"] or row["left running"] or not alive or row["ended with"]:
        raise SystemExit(f"the load test failed: {examples or row}")
    print("no crash, no lost request, every error in OpenAI's form")


if __name__ == "__main__":
    main()
