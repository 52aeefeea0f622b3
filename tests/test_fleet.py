"""The fleet on tiny random models: the tokens of each request, however it is batched, cached, queued or cut off."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

import persona_pruner as pp
from persona_pruner.errors import InputError
from persona_pruner.fleet import DENSE, Fleet, QueueFull, Sampling
from persona_pruner.fleet import decoder as decoding
from persona_pruner.fleet.decoder import Decoder
from persona_pruner.formats.persona_file import PersonaFile
from persona_pruner.nn import slim_
from persona_pruner.ops import _native
from persona_pruner.ops.paged_attention import BLOCK
from persona_pruner.synthesis.prompts import chat, encode, prompt_ids, render
from persona_pruner.testing import FAMILIES, tiny_model, tiny_tokenizer

QUESTIONS = ["hello there", "who are you, and what do you do all day long?", "why?"]


@cache
def tokenizer():
    return tiny_tokenizer()


@cache
def files(family="llama"):
    """Three characters; widths differ between them and between layers."""
    generator, model = torch.Generator().manual_seed(1), tiny_model(family)
    shares = {"anna": 0.5, "bert": 0.25, "carl": 0.7}
    return {
        name: PersonaFile.of(
            model, name, f"You are {name}. Speak like {name}, always and to everyone who asks you something.",
            [torch.rand(64, generator=generator) < share for _ in range(3)], greeting=f"I am {name}",
        )
        for name, share in shares.items()
    }  # fmt: skip


def fleet(family="llama", dtype=None, **limits):
    new = Fleet(tiny_model(family), tokenizer(), dtype, **{"kv_bytes": 1 << 21, "max_rows": 3, **limits})
    for name, file in files(family).items():
        new.add(name, file)
    return new


@cache
def slim(family, name):
    model = tiny_model(family)
    return slim_(model, files(family)[name].masks) if name else model


def continuation(model, ids, count):
    """Greedy tokens by transformers' generate."""
    ids = torch.tensor([ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist()


@cache
def expected(family, name, question, count):
    system = files(family)[name].system if name else ""
    return continuation(slim(family, name), prompt_ids(tokenizer(), system, question), count)


def answers(fleet, requests, count, **sampling):
    out = [[] for _ in requests]
    asked = [(name, chat("", question)) for name, question in requests]
    for event in fleet.stream(asked, count, **{"temperature": 0, **sampling}):
        assert event.error is None
        if event.token is not None:
            out[event.request].append(event.token)
    assert fleet.idle and fleet.stats()["kv_used"] == 0
    return out


def everyone(names=("anna", "bert", DENSE, "carl")):
    return [(name, question) for question in QUESTIONS for name in names]


def stretches(fleet, name):
    """How many pieces the channels of a character lie in, over all layers."""
    channels, begin = fleet._characters._kept(fleet._characters[name])
    return sum(1 + int((np.diff(channels[a:b]) > 1).sum()) for a, b in pairwise(begin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("family", FAMILIES)
def test_arranged_channels_give_the_same_tokens(family, dtype):
    one, requests = fleet(family, dtype), everyone()
    before = answers(one, requests, 20)
    scattered = sum(stretches(one, name) for name in files(family))
    rows = [{row.numpy().tobytes() for row in layer.channels} for layer in one.decoder.layers]
    one.arrange()
    assert (
        sum(stretches(one, name) for name in files(family)) < scattered
    )  # ranges of eight channels leave little to gain
    assert rows == [{row.numpy().tobytes() for row in layer.channels} for layer in one.decoder.layers]
    assert answers(one, requests, 20) == before
    one.remove("carl")
    one.add("dora", files(family)["carl"])
    again = [("dora" if name == "carl" else name, question) for name, question in requests]
    assert answers(one, again, 20) == before
    one.arrange()
    assert answers(one, again, 20) == before
    for name in one.names():
        one.remove(name)
    one.arrange()  # nobody left
    assert answers(one, [(DENSE, QUESTIONS[0])], 20) == [before[requests.index((DENSE, QUESTIONS[0]))]]


def test_arranging_in_mid_answer():
    one, found = fleet(), []
    for event in one.stream([("anna", chat("", QUESTIONS[0]))], 20, temperature=0):
        found.append(event.token)
        one.arrange()
    assert found == expected("llama", "anna", QUESTIONS[0], 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate_with_the_slim_model(family):
    requests = everyone()
    assert answers(fleet(family), requests, 20) == [expected(family, *request, 20) for request in requests]


@pytest.mark.parametrize(("rows", "blocks"), [(1, 12), (2, 14), (8, 30), (12, 400)])
def test_tokens_do_not_depend_on_rows_or_room(rows, blocks):
    """Small caches queue, evict and compute again; the tokens stay."""
    size = fleet().decoder.block_bytes
    small = fleet(max_rows=rows, kv_bytes=blocks * size)
    requests = everyone()
    want = [expected("llama", *request, 20) for request in requests]
    assert answers(small, requests, 20) == want
    assert answers(small, requests[::-1], 20) == want[::-1]


def test_requests_join_and_leave_between_steps():
    one, out, numbers = fleet(max_rows=4), {}, {}
    todo = everyone()
    for step in range(200):
        if step % 3 == 0 and todo:
            (name, question), count = todo.pop(), 8 + step % 5
            number = one.submit(name, chat("", question), Sampling(count, temperature=0))
            numbers[number] = name, question, count
        for event in one.step():
            out.setdefault(event.request, []).append(event.token)
    assert one.idle and len(out) == len(numbers) == len(everyone())
    for number, (name, question, count) in numbers.items():
        assert out[number] == expected("llama", name, question, count)


def test_a_prompt_is_computed_once_for_all_who_share_it():
    one = fleet(max_rows=12)
    requests = [("anna", f"{question} {number}") for number in range(4) for question in QUESTIONS]
    prompts = [prompt_ids(tokenizer(), files()["anna"].system, question) for _, question in requests]
    shared = min(len(p) for p in prompts) // BLOCK * BLOCK
    while any(p[:shared] != prompts[0][:shared] for p in prompts):
        shared -= BLOCK
    assert shared >= 2 * BLOCK
    answers(one, requests, 4)
    stats = one.stats()
    assert stats["prompt_tokens"] + stats["prompt_tokens_reused"] == sum(map(len, prompts))
    assert stats["prompt_tokens"] <= shared + sum(len(p) - shared for p in prompts)


def test_a_conversation_finds_what_was_said_before():
    one, turns = fleet(), chat("", "tell me a story about the sea and the wind, please")
    (first,) = answers(one, [("anna", turns[0]["content"])], 40)
    said = tokenizer().decode(first)
    turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "and then?"}]
    before = one.stats()["prompt_tokens"]
    ids = encode(tokenizer(), render(tokenizer(), [{"role": "system", "content": files()["anna"].system}, *turns]))
    out = [event.token for event in one.stream([("anna", turns)], 12, temperature=0)]
    assert out == continuation(slim("llama", "anna"), ids, 12)
    assert one.stats()["prompt_tokens"] - before < len(ids) - 2 * BLOCK


def test_one_who_waits_for_anothers_blocks_takes_over_when_that_one_leaves():
    one = fleet(max_rows=4)
    long = "word " * 200
    first = one.submit("anna", chat("", long), Sampling(4, temperature=0))
    second = one.submit("anna", chat("", long), Sampling(4, temperature=0))
    one.step()  # the prompt is longer than a step's budget
    one.cancel(first)
    events = [event for _ in range(12) for event in one.step()]
    assert [e.finish for e in events if e.request == first] == ["cancelled"]
    got = [e.token for e in events if e.request == second]
    assert got == expected("llama", "anna", long, 4)
    assert one.idle and one.stats()["kv_used"] == 0


def test_another_character_under_the_same_name_does_not_see_old_keys():
    one = fleet()
    answers(one, [("anna", QUESTIONS[1])], 6)
    swapped = PersonaFile.of(tiny_model(), "x", files()["anna"].system, files()["carl"].masks)
    one.add("anna", swapped)
    want = continuation(slim("llama", "carl"), prompt_ids(tokenizer(), swapped.system, QUESTIONS[1]), 6)
    assert answers(one, [("anna", QUESTIONS[1])], 6) == [want]
    one.remove("anna")
    with pytest.raises(InputError, match="anna"):
        one.submit("anna", chat("", "hello"))


def test_a_character_removed_meanwhile_is_answered_to_the_end():
    one = fleet()
    number = one.submit("bert", chat("", QUESTIONS[0]), Sampling(6, temperature=0))
    one.step()
    one.remove("bert")
    events = [event for _ in range(8) for event in one.step()]
    assert events[-1].finish == "length" and events[-1].request == number
    assert "bert" not in one.names()


def test_what_is_refused():
    one = fleet(max_queue=2, kv_bytes=10 * fleet().decoder.block_bytes)
    other = PersonaFile.of(tiny_model(intermediate_size=96), "d", "", [torch.ones(96, dtype=torch.bool)] * 3)
    for wrong, match in (
        (lambda: one.submit("nobody", chat("", "hello")), "nobody"),
        (lambda: one.submit("anna", []), "empty"),
        (lambda: one.submit("anna", [1, 512]), "outside"),
        (lambda: one.submit("anna", [{"role": "user"}]), "role and a content"),
        (lambda: one.submit(DENSE, list(range(3, 100)), Sampling(100)), "never fit"),
        (lambda: one.submit(DENSE, [5] * 2048), "context"),
        (lambda: one.add("d", other), "does not fit"),
        (lambda: one.add("", files()["anna"]), "empty name"),
        (lambda: one.remove("nobody"), "nobody"),
        (lambda: Fleet(tiny_model(), tokenizer(), kv_bytes=10), "kv_bytes"),
        (lambda: Sampling(top_p=0), "top_p"),
        (lambda: Sampling(stop=("",)), "stop"),
        (lambda: Decoder(torch.nn.Linear(2, 2), torch.float32), "Linear"),
        (lambda: Decoder(tiny_model(), torch.float64), "float64"),
    ):
        with pytest.raises(InputError, match=match):
            wrong()
    for _ in range(2):
        one.submit(DENSE, [5, 6, 7], Sampling(2))
    with pytest.raises(QueueFull):
        one.submit(DENSE, [5, 6, 7], Sampling(2))


def test_answers_end_with_the_context():
    one = Fleet(tiny_model(max_position_embeddings=40), tokenizer(), kv_bytes=1 << 21)
    out = list(one.stream([(DENSE, list(range(3, 33)))], 100, temperature=0))
    assert len(out) == 10 and out[-1].finish == "length" and out[-1].completion_tokens == 10


def test_sampling_depends_on_the_seed_and_nothing_else():
    alone, together = fleet(max_rows=1), fleet(max_rows=8)
    requests, sampling = everyone()[:8], {"temperature": 0.9, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1}
    first = answers(alone, requests, 12, seed=7, **sampling)
    assert answers(together, requests, 12, seed=7, **sampling) == first
    assert answers(together, requests, 12, seed=8, **sampling) != first


def test_stop_strings_and_end_of_turn():
    one = fleet()
    (full,) = answers(one, [("anna", QUESTIONS[0])], 20)
    text = tokenizer().decode(full, skip_special_tokens=True)
    stop = text[3:6]
    events = list(one.stream([("anna", chat("", QUESTIONS[0]))], 20, temperature=0, stop=(stop,)))
    assert "".join(e.text for e in events) == text[: text.index(stop)] and events[-1].finish == "stop"
    one.stop_ids = {full[4]}
    events = list(one.stream([("anna", chat("", QUESTIONS[0]))], 20, temperature=0))
    end = full.index(full[4])
    assert len(events) == end + 1 and events[-1].finish == "stop" and events[-1].token == full[4]


def test_log_probabilities_are_the_models():
    one, ids = fleet(), list(range(3, 20))
    (event,) = one.stream([(DENSE, ids)], 1, temperature=0, logprobs=4)
    logs = tiny_model()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    best = logs.topk(4)
    assert event.token == best.indices[0]
    assert [token for token, _ in event.top] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor([event.logprob]), best.values[:1], rtol=1e-4, atol=1e-4)


def test_broken_logits_end_their_request_only():
    model = tiny_model()
    model.get_input_embeddings().weight[7] = torch.nan  # tied: one logit of everyone is NaN
    one = Fleet(model, tokenizer())
    one.submit(DENSE, [3, 4, 5], Sampling(4))
    (event,) = one.step()
    assert event.finish == "error" and "not numbers" in event.error and one.idle


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_smaller_weights_give_nearly_the_same_logits(family, dtype):
    ids = torch.randint(3, 512, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    exact = slim(family, "anna")(torch.tensor([ids])).logits[0, -1]
    got = []
    for kind in (torch.float32, dtype):
        one = fleet(family, kind)
        choose = one.decoder.forward
        one.decoder.forward = lambda *args, choose=choose: got.append(choose(*args)) or got[-1]
        list(one.stream([("anna", ids)], 1, temperature=0))
    torch.testing.assert_close(got[0][0], exact, rtol=1e-4, atol=1e-4)
    error = (got[1][0] - exact).norm() / exact.norm()
    assert 0 < error < (0.08 if dtype == torch.int8 else 0.04)


def test_what_is_known_of_a_character(tmp_path):
    one = fleet()
    one.add("file", files()["anna"].save(tmp_path / "a.persona.safetensors"))
    assert one.names() == ["anna", "bert", "carl", "file"]
    known = one.info("file")
    assert known["widths"] == files()["anna"].widths and known["greeting"] == "I am anna" and known["bytes"] < 1000
    assert one.info(DENSE)["widths"] == [64] * 3
    assert answers(one, [("file", QUESTIONS[0])], 5) == answers(one, [("anna", QUESTIONS[0])], 5)


def test_smollm2_in_float32_writes_what_its_slim_model_writes():
    model, tok = pp.load_model("smollm2-135m", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(1536, generator=generator) < 0.8 for _ in range(30)]
    file = PersonaFile.of(model, "smith", "You are Borin, a gruff blacksmith.", masks)
    one = Fleet(model, tok)
    one.add("smith", file)
    questions = ["What are you forging?", "Name three tools."]
    asked = [(name, chat("", question)) for name in (DENSE, "smith") for question in questions]
    out = [[] for _ in asked]
    for event in one.stream(asked, 16, temperature=0):
        out[event.request].append(event.token)
    for name, start in ((DENSE, 0), ("smith", 2)):
        if name:
            file.apply(model)
        for index, question in enumerate(questions):
            ids = prompt_ids(tok, file.system if name else "", question)
            assert out[start + index] == continuation(model, ids, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_steps_give_the_same_logits_in_every_bit(family, monkeypatch):
    """Two conversations with one character and one with another, joining and leaving; few plans are kept."""
    monkeypatch.setattr(decoding, "PLANS", 2)
    seen = {}
    for most in (0, decoding.MOST_PLANNED):
        monkeypatch.setattr(decoding, "MOST_PLANNED", most)
        one, logits = fleet(family), []
        forward = one.decoder.forward
        one.decoder.forward = lambda *args, forward=forward, logits=logits: (
            logits.append(forward(*args).clone()) or logits[-1]
        )
        for name, question, count in (("anna", "hello", 9), ("anna", "why?", 30), ("bert", "hello", 5)):
            one.submit(name, chat("", question), Sampling(max_new_tokens=count, temperature=0))
            one.step()
        while not one.idle:
            one.step()
        seen[most] = logits
        assert len(one.decoder._steps) == (0 if not most or "gemma" in family else 2)
    assert len(seen[0]) == len(seen[4]) > 20
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[4], strict=True))


def test_a_plan_refuses_what_is_no_call():
    module = _native.cpu_module()
    for calls, error in (
        (np.zeros((1, 3), np.int64), TypeError),
        (np.full((1, module.most_arguments + 1), len(module.names), np.int64), IndexError),
        (np.full((1, module.most_arguments + 1), -1, np.int64), IndexError),
    ):
        with pytest.raises(error):
            module.sequence(calls)
