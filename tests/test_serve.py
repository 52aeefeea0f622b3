"""The server by real requests on loopback: the openai client, limits, refusals, clients that vanish, SIGTERM."""

import http.client
import json
import signal
import socket
import threading
import time

import pytest
from sculpting import save_tiny
from serving import SYSTEMS, chat, fleet, persona, personas, serving, serving_command, wait_for

from persona_pruner.fleet import DENSE
from persona_pruner.formats.persona_file import SUFFIX
from persona_pruner.serve.http import Limits

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")
MESSAGES = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(personas(tmp_path_factory.mktemp("personas"))) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def alone():
    """What a fleet of its own answers: (name, messages or text, max tokens) -> (text, finish, prompt tokens)."""
    mine = fleet()
    for seed, name in enumerate(SYSTEMS):
        mine.add(name, persona(name, seed))

    def answer(name, prompt, count, **sampling):
        events = list(mine.stream([(name, prompt)], count, **{"temperature": 0, **sampling}))
        return "".join(event.text for event in events), events[-1].finish, events[-1].prompt_tokens

    return answer


def is_error(answer, status):
    got, value, _ = answer
    assert got == status and set(value) == {"error"}, answer
    assert set(value["error"]) == {"message", "type", "param", "code"} and value["error"]["message"]
    return value["error"]


def test_models(server, client):
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["tiny", "bram", "lyra"] and found["bram"].owned_by == "persona-pruner"
    one = client.models.retrieve("bram").to_dict()
    assert one["persona"] == "Bram" and one["ratio"] == 0.5 and one["greeting"] == "Hail!" and not one["dense"]
    assert one["system"] == SYSTEMS["bram"] and "system" not in found["bram"].to_dict()
    assert 0 < one["bytes"] < 1000 < found["tiny"].to_dict()["bytes"]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("name", ["bram", "lyra", "tiny"])
def test_a_chat_is_what_the_fleet_answers(client, alone, name):
    text, finish, prompt = alone(DENSE if name == "tiny" else name, MESSAGES, 24)
    done = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=24, temperature=0)
    choice = done.choices[0]
    assert (choice.message.content, choice.finish_reason) == (text, finish) and choice.message.role == "assistant"
    assert done.usage.prompt_tokens == prompt and done.usage.total_tokens == prompt + done.usage.completion_tokens
    pieces = list(
        client.chat.completions.create(
            model=name, messages=MESSAGES, max_completion_tokens=24, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == text
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[-2].choices[0].finish_reason == finish
    assert pieces[-1].choices == [] and pieces[-1].usage == done.usage
    assert len({piece.id for piece in pieces}) == 1


def test_system_texts_of_the_client_follow_the_characters(client, alone):
    extra = [{"role": "system", "content": "It is night."}, {"role": "developer", "content": "Be brief."}]
    said = [
        *extra, {"role": "assistant", "content": "Hail!", "name": "Bram"}, {"role": "user", "name": "Kim", "content": [
            {"type": "text", "text": "Who"}, {"type": "text", "text": "are you?"}]},
    ]  # fmt: skip
    plain = [
        {"role": "system", "content": "It is night.\n\nBe brief."}, {"role": "assistant", "content": "Hail!"},
        {"role": "user", "content": "Who\nare you?"},
    ]  # fmt: skip
    text, _, prompt = alone("bram", plain, 16)
    done = client.chat.completions.create(
        model="bram", messages=said, max_tokens=16, temperature=0, presence_penalty=0.5, user="kim",
        extra_body={"top_k": 40, "typical_p": 1, "repetition_penalty": 1.0, "char_name": "Bram", "seed": -1},
    )  # fmt: skip
    assert (done.choices[0].message.content, done.usage.prompt_tokens) == (text, prompt)


def test_sampling_and_stops_reach_the_fleet(client, alone):
    whole, _, _ = alone("bram", MESSAGES, 24)
    stop = whole[5:8]
    done = client.chat.completions.create(model="bram", messages=MESSAGES, max_tokens=24, temperature=0, stop=[stop])
    assert done.choices[0].message.content == whole[: whole.index(stop)] and done.choices[0].finish_reason == "stop"
    settings = {"temperature": 0.9, "top_p": 0.9, "seed": 7}
    text, _, _ = alone("bram", MESSAGES, 24, **settings, min_p=0.05)
    done = client.chat.completions.create(
        model="bram", messages=MESSAGES, max_tokens=24, extra_body={"min_p": 0.05}, **settings
    )
    assert done.choices[0].message.content == text != whole


def test_logprobs(client, server):
    create = client.chat.completions.create
    wanted = {"model": "bram", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "logprobs": True}
    done = create(**wanted, top_logprobs=3).choices[0]
    content = done.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode("utf-8", "replace") == done.message.content
    for entry in content:
        best = entry.top_logprobs
        assert best[0].logprob == entry.logprob <= 0 and [b.logprob for b in best] == sorted(
            (b.logprob for b in best), reverse=True
        )
    pieces = [p.choices[0] for p in create(**wanted, top_logprobs=3, stream=True)]
    assert [e for p in pieces if p.logprobs for e in p.logprobs.content] == content
    assert all(entry.top_logprobs == [] for entry in create(**wanted).choices[0].logprobs.content)
    text = client.completions.create(model="bram", prompt="Iron", max_tokens=8, temperature=0, logprobs=2).choices[0]
    assert len(text.logprobs.tokens) == len(text.logprobs.token_logprobs) == len(text.logprobs.top_logprobs) == 8
    assert text.logprobs.text_offset[0] == 0 and text.logprobs.text_offset == sorted(text.logprobs.text_offset)


def test_completions_have_no_prompt_but_their_own(client, alone):
    text, finish, prompt = alone("bram", "Iron is", 10)
    for given in ("Iron is", ["Iron is"]):
        done = client.completions.create(model="bram", prompt=given, max_tokens=10, temperature=0)
        assert (done.choices[0].text, done.choices[0].finish_reason) == (text, finish)
        assert done.usage.prompt_tokens == prompt and done.object == "text_completion"
    ids = [5, 9, 12]
    done = client.completions.create(model="bram", prompt=ids, max_tokens=6, temperature=0)
    assert done.choices[0].text == alone("bram", ids, 6)[0] and done.usage.prompt_tokens == 3
    pieces = client.completions.create(model="bram", prompt=[ids], max_tokens=6, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == done.choices[0].text


def test_the_folder_is_watched(tmp_path):
    folder = personas(tmp_path, ["bram"])
    with serving(folder) as server:
        names = lambda: [model["id"] for model in server.ask("/v1/models")[1]["data"]]  # noqa: E731
        assert names() == ["tiny", "bram"]
        persona("mira", 3).save(folder / f"mira{SUFFIX}")
        persona("nell", 4).save(folder / "nell" / f"persona{SUFFIX}")  # as a sculpt leaves it
        wait_for(lambda: {"mira", "nell"} < set(names()))
        first = server.chat("mira")[1]["choices"][0]["message"]["content"]
        persona("mira", 9).save(folder / f"mira{SUFFIX}")
        wait_for(lambda: server.chat("mira")[1]["choices"][0]["message"]["content"] != first)
        whole = (folder / f"bram{SUFFIX}").read_bytes()
        (folder / f"late{SUFFIX}").write_bytes(whole[:100])
        (folder / f"tiny{SUFFIX}").write_bytes(whole)
        (folder / f"mira{SUFFIX}").unlink()
        wait_for(lambda: "mira" not in names() and {"late", "tiny"} <= set(server.watcher.refused))
        is_error(server.chat("mira"), 404)
        assert "damaged" in server.watcher.refused["late"] and "base model" in server.watcher.refused["tiny"]
        (folder / f"late{SUFFIX}").write_bytes(whole)
        wait_for(lambda: "late" in names())
        (folder / f"late{SUFFIX}").write_bytes(b"rubbish")
        wait_for(lambda: "late" not in names())


def test_a_character_removed_while_it_speaks(tmp_path):
    folder = personas(tmp_path)
    with serving(folder) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        pieces = iter(
            client.completions.create(model="bram", prompt="Iron", max_tokens=400, temperature=1, seed=3, stream=True)
        )
        next(pieces)
        (folder / f"bram{SUFFIX}").unlink()
        wait_for(lambda: "bram" not in server.engine.characters)
        assert list(pieces)[-1].choices[0].finish_reason in ("stop", "length")
        assert server.chat("lyra")[0] == 200


def test_a_token(tmp_path):
    with serving(personas(tmp_path), token="sesame", origins=["https://front.example"]) as server:
        for headers in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer sesam"},
            {"Authorization": "sesame"},
        ):
            for path in ("/v1/models", "/v1/none", "/metrics", "/docs"):
                problem = is_error(server.ask(path, headers=headers), 401)
                assert problem["code"] == "invalid_api_key"
            is_error(server.ask("/v1/chat/completions", chat(), headers=headers), 401)
        assert server.ask("/v1/models", headers={"Authorization": "bearer sesame"})[0] == 200
        assert all(server.ask(path)[0] == 200 for path in ("/health", "/", "/page.js", "/page.css"))
        asked = {"Origin": "https://front.example", "Access-Control-Request-Method": "POST"}
        status, _, headers = server.ask("/v1/chat/completions", method="OPTIONS", headers=asked)
        assert status == 200 and headers["access-control-allow-origin"] == "https://front.example"
        _, _, headers = server.ask("/v1/models", headers={"Origin": "https://front.example"})
        assert headers["access-control-allow-origin"] == "https://front.example"  # of an error as well
        _, _, headers = server.ask("/v1/models", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in headers


GARBAGE = {
    "no JSON": b"{", "nothing": b"", "no UTF-8": b"\xff\xfe\x00", "a list": b"[]", "deep": b"[" * 100_000,
    "half a pair": b'{"model": "bram", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "no messages": {"model": "bram"}, "empty": {"model": "bram", "messages": []}, "no model": {"messages": MESSAGES},
    "role": {"model": "bram", "messages": [{"role": "king", "content": "Hm"}]},
    "picture": {"model": "bram", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    "number": {"model": "bram", "messages": [{"role": "user", "content": 7}]},
    "temperature": chat(temperature=-1), "infinite": b'{"model": "bram", "messages": [], "temperature": Infinity}',
    "tokens 0": chat(max_tokens=0), "tokens": chat(max_tokens=10**9), "huge": chat(max_tokens=10**40),
    "n": chat(n=2), "top_logprobs": chat(logprobs=True, top_logprobs=21), "stop": chat(stop=["a"] * 17),
    "json_object": chat(response_format={"type": "json_object"}), "long": chat(text="word " * 5000),
}  # fmt: skip


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
def test_garbage(server, body):
    is_error(server.ask("/v1/chat/completions", body), 400)
    assert server.chat()[0] == 200


def test_other_refusals(server):
    assert is_error(server.chat("nobody"), 404)["code"] == "model_not_found"
    is_error(server.ask("/v2/models"), 404)
    is_error(server.ask("/v1/chat/completions"), 405)
    is_error(server.ask("/v1/models/nobody"), 404)
    for prompt in ([], ["a", "b"], [10**6], [-1], [[1], [2]], {"a": 1}):
        is_error(server.ask("/v1/completions", {"model": "bram", "prompt": prompt}), 400)
    is_error(server.ask("/v1/completions", {"model": "bram", "prompt": "a", "echo": True}), 400)
    is_error(server.ask("/v1/chat/completions", chat(), headers={"Content-Type": "text/plain"}), 400)
    assert server.chat()[0] == 200


def test_bodies_that_are_too_large_or_too_slow(tmp_path):
    with serving(personas(tmp_path), Limits(body=2000, upload=0.4)) as server:
        assert "2000 bytes" in is_error(server.chat(text="word " * 1000), 413)["message"]
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", (b"x" * 500 for _ in range(9)), kind, encode_chunked=True)
        response = connection.getresponse()
        is_error((response.status, json.loads(response.read()), response.headers), 413)
        large = chat(text="word " * 1_000_000)  # more than the system's buffers hold: it is read to its end
        assert [is_error(server.ask("/v1/chat/completions", large), 413)["type"] for _ in range(5)]
        for length, status in (("100", 408), ("-5", 400), ("99999999999999999999", 413)):
            with socket.create_connection(("127.0.0.1", server.port), 30) as raw:
                head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                raw.sendall(f"{head}Content-Length: {length}\r\n\r\n{{".encode())
                assert raw.recv(4096).split()[1] == str(status).encode()
        assert server.chat()[0] == 200


def open_stream(server, **rest):
    """A raw connection on which a long answer has begun."""
    raw = socket.create_connection(("127.0.0.1", server.port), 30)
    begin_stream(raw, **rest)
    return raw


def begin_stream(raw, **rest):
    body = json.dumps({"model": "bram", "prompt": "Iron", "stream": True, "seed": 3, **rest}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    raw.sendall(f"{head}\r\n\r\n".encode() + body)


LONG = {"max_tokens": 1500, "temperature": 100}


def test_a_full_queue_and_clients_that_vanish(tmp_path):
    with serving(personas(tmp_path), pause=0.005, max_rows=2, max_queue=1) as server:
        raws = []
        for running in (1, 2, 2):
            raws.append(open_stream(server, **LONG))
            wait_for(lambda: len(server.engine.streams) == len(raws))
            wait_for(lambda running=running: server.engine.stats["running"] == running)
        problem = is_error(server.chat(), 429)
        assert problem["code"] == "queue_full" and problem["type"] == "rate_limit_error"
        for raw in raws:
            raw.close()
        wait_for(lambda: not server.engine.streams and server.ask("/health")[1].get("running") == 0)
        assert server.chat()[0] == 200


def test_a_client_that_vanishes_while_it_waits_for_a_whole_answer(tmp_path):
    with serving(personas(tmp_path), pause=0.02) as server:
        with open_stream(server, stream=False, **LONG):
            wait_for(lambda: server.engine.streams)
        wait_for(lambda: not server.engine.streams)
        wait_for(lambda: server.engine.stats["running"] == 0)
        assert server.engine.stats["steps"] < 1000


def test_a_client_that_does_not_read_is_ended_and_does_not_block_the_others(tmp_path):
    with serving(personas(tmp_path), pause=0.001, room=50) as server:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # before it connects, so that the window is small
        raw.connect(("127.0.0.1", server.port))
        begin_stream(raw, **LONG, logprobs=20)
        wait_for(lambda: server.engine.streams)
        stream = next(iter(server.engine.streams.values()))
        for _ in range(5):
            assert server.chat("lyra")[0] == 200
        wait_for(lambda: stream.ended)
        wait_for(lambda: server.engine.stats["running"] == 0)
        assert server.engine.stats["tokens"] < 1500
        text = b""
        while b"reads too slowly" not in text:  # it is told when it reads at last
            text += raw.recv(65536) or pytest.fail("the connection ended without a word")
        raw.close()


def test_time_is_limited(tmp_path):
    with serving(personas(tmp_path), Limits(seconds=0.25), pause=0.01) as server:
        long = {"model": "bram", "prompt": "Iron", **LONG}
        assert is_error(server.ask("/v1/completions", long), 504)["code"] == "timeout"
        status, text, _ = server.ask("/v1/completions", {**long, "stream": True})
        last = json.loads(text.strip().rpartition("data: ")[2])
        assert status == 200 and last["error"]["code"] == "timeout" and text.count("data: ") > 1
        wait_for(lambda: server.engine.stats["running"] == 0)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="took longer"):
            list(client.completions.create(**long, stream=True))


def test_a_step_that_fails_does_not_end_the_server(tmp_path, monkeypatch):
    with serving(personas(tmp_path)) as server:
        step, calls = server.engine._fleet.step, []

        def broken():
            calls.append(1)
            if len(calls) == 1:
                raise ZeroDivisionError
            return step()

        monkeypatch.setattr(server.engine._fleet, "step", broken)
        assert "ZeroDivisionError" in is_error(server.chat(), 500)["message"]
        assert server.chat()[0] == 200 and server.ask("/health")[0] == 200


def test_metrics(server):
    from prometheus_client.parser import text_string_to_metric_families as parse

    def read():
        families = parse(server.ask("/metrics")[1])
        return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}

    before = read()
    count = server.chat(max_tokens=9)[1]["usage"]["completion_tokens"]
    is_error(server.chat("nobody"), 404)
    after = read()
    gained = lambda *key: after[key] - before.get(key, 0)  # noqa: E731
    assert gained("persona_pruner_answer_tokens_total", "bram") == count
    assert gained("persona_pruner_requests_total", "/v1/chat/completions", "200") == 1
    assert gained("persona_pruner_requests_total", "/v1/chat/completions", "404") == 1
    assert after[("persona_pruner_characters",)] == 2 and after[("persona_pruner_running",)] == 0
    assert gained("persona_pruner_first_token_seconds_count") == gained("persona_pruner_request_seconds_count") == 1
    assert server.ask("/health")[1] == {"status": "ok", "characters": 2, "running": 0, "queued": 0}


def test_many_at_once(server):
    """Every answer is the one it would be alone."""
    want = {name: server.chat(name, max_tokens=16)[1]["choices"] for name in ("bram", "lyra", "tiny")}
    got, names = [], list(want) * 8

    def ask(name):
        got.append((name, server.chat(name, max_tokens=16)[1]["choices"]))

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == len(names) and all(choices == want[name] for name, choices in got)


def test_sigterm_finishes_what_is_under_way(tmp_path):
    folder = personas(tmp_path)
    with serving_command(save_tiny(tmp_path / "base"), folder, "--threads", 1) as (process, server):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        long = {"model": "bram", "prompt": "Iron", "temperature": 2, "seed": 3, "max_tokens": 300}
        want = client.completions.create(**long).choices[0].text
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        kept.request("GET", "/health")
        assert kept.getresponse().read()
        pieces = iter(client.completions.create(**long, stream=True))
        first = next(pieces).choices[0].text
        process.send_signal(signal.SIGTERM)
        assert first + "".join(piece.choices[0].text for piece in pieces) == want
        assert process.wait(30) == 0 and "Traceback" not in process.stderr.read()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port), 5).close()


def test_sigterm_with_an_answer_that_takes_too_long(tmp_path):
    folder = personas(tmp_path)
    more = ["--threads", 1, "--grace", 0.2]
    with serving_command(save_tiny(tmp_path / "base"), folder, *more) as (process, server):
        raw = open_stream(server, **LONG)
        assert raw.recv(100)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        text = b""
        while found := raw.recv(65536):
            text += found
        events = [line for line in text.decode().splitlines() if line.startswith("data: ")]
        assert b"[DONE]" in text or "shutting down" in json.loads(events[-1][6:])["error"]["message"]
        assert process.wait(30) == 0 and time.monotonic() - begun < 20
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--personas", "nowhere"], "no folder of personas nowhere"),
        (["--personas", ".", "--base", "./nowhere"], "no model folder ./nowhere"),
        (["--personas", ".", "--token", ""], "the token must be printable ASCII"),
        (["--personas", ".", "--dtype", "int3"], "dtype 'int3' is not one of"),
        (["--personas", ".", "--host", "203.0.113.7"], "cannot listen on 203.0.113.7 port 8000"),
    ],
)
def test_bad_requests_of_the_command(capsys, arguments, why):
    from persona_pruner import cli

    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", *arguments])
    said, errors = capsys.readouterr()
    assert caught.value.code == 2 and said == "" and len(errors.splitlines()) == 1 and why in errors


def test_a_load_of_every_kind_of_client(tmp_path, capsys):
    """The load test of the benchmarks: answers are those given alone, and what is wrong is refused in OpenAI's form."""
    from persona_pruner.benchmarks import bench_serve

    base, file = save_tiny(tmp_path / "base"), tmp_path / "row.json"
    words = ["--base", base, "--dtype", "float32", "--short", "--characters", 3, "--threads", 1]
    bench_serve.main([*map(str, words), "--json", str(file)])
    row = json.loads(file.read_text())["rows"][0]
    assert row["lost"] == row["left running"] == row["differ"] == row["ended with"] == 0 and row["requests"] == 24
    assert {"stream", "vanished"} < set(row) and any(key.startswith(("garbage", "oversize")) for key in row)
    assert capsys.readouterr().out.endswith("no crash, no lost request, every error in OpenAI's form\n")
