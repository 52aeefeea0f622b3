"""Persona: text and cards of every version, published question sets, prompts and macros."""

import base64
import dataclasses
import json

import pytest
from cards import CARDS, V1, V3, charx, png, png_chunk, put, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_pruner.card_files import MAX_CARD, MAX_DEPTH
from persona_pruner.errors import InputError
from persona_pruner.persona import Persona


@pytest.mark.parametrize("text", ["", "  \n\t ", "blacksmith", " blacksmith\n", "剣", None, 7, "bad \ud800 text"])
def test_from_text_refuses_what_describes_nobody(text):
    with pytest.raises(InputError):
        Persona.from_text(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Mira is a blacksmith.", "Mira"),
        ("  Mira Venn, a blacksmith, works late.", "Mira Venn"),
        ("Ludwig van Beethoven is a composer.", "Ludwig van Beethoven"),
        ("You are Captain Orrin, who flies.", "Captain Orrin"),
        ("Élodie is a baker.", "Élodie"),
        ("He is a baker.", "Character"),
        ("A baker is up early.", "Character"),
        ("As the queen bee, I, Blair, rule.", "Character"),
        ("Quiet, thoughtful man.", "Character"),
        ("a grumpy old blacksmith", "Character"),
        ("疲れた灯台守の男である。", "Character"),
    ],
)
def test_name_is_guessed_from_the_opening_words(text, name):
    assert Persona.from_text(text).name == name
    assert Persona.from_text(text, name="Zed").name == "Zed"
    assert Persona.from_text(text).description == text.strip()


def test_default_system_prompt_of_a_text():
    assert Persona.from_text("Mira is a blacksmith.").system_prompt() == (
        "You are roleplaying as Mira, a character with this persona: Mira is a blacksmith.\n"
        "Answer as Mira would, in the first person and in character."
    )


def test_load_tells_descriptions_from_files(tmp_path):
    assert Persona.load("Mira is a blacksmith.") == Persona.from_text("Mira is a blacksmith.")
    assert Persona.load("Mira is a blacksmith.\n" * 500).name == "Mira"  # longer than any file name may be
    for name in ("m.txt", "m.MD"):
        assert Persona.load(put(tmp_path, name, b"\xef\xbb\xbfMira is a blacksmith.\n")).name == "Mira"
        assert Persona.load(str(tmp_path / name)).description == "Mira is a blacksmith."
    for name in ("gone.json", "gone.png", "gone.charx", "gone.txt", "two words.PNG"):
        with pytest.raises(InputError, match="no such file"):
            Persona.load(name)
    refused(tmp_path / "gone", "no such file")
    refused(put(tmp_path, "m.webp", b"RIFF"), "a persona file ends in")
    refused(put(tmp_path, "latin.txt", b"caf\xe9 owner"), "utf-8")
    refused(put(tmp_path, "one.txt", b"blacksmith"), "at least two words")
    refused(put(tmp_path, "big.txt", b"a b" * MAX_CARD), "larger than 8 MiB")
    (tmp_path / "folder.json").mkdir()
    refused(tmp_path / "folder.json", "no such file")
    with pytest.raises(InputError, match="cannot be read"):
        Persona.from_card(tmp_path / "folder.json")
    with pytest.raises(InputError, match="card is a"):
        Persona.from_card("m.yaml")


def test_v1_v2_and_v3_say_the_same(tmp_path):
    v2 = {"spec": "chara_card_v2", "spec_version": "2.0", "data": V1}
    v3 = {"spec": "chara_card_v3", "spec_version": "3.0", "data": V1}
    personas = [Persona.load(put(tmp_path, f"{i}.json", card)) for i, card in enumerate([V1, v2, v3])]
    assert personas[0] == personas[1] == personas[2]
    assert hash(personas[0]) == hash(personas[2])
    persona = personas[0]
    assert (persona.name, persona.personality, persona.scenario) == ("Mira", "gruff", "A forge at dusk.")
    assert persona.first_message == V1["first_mes"] and persona.example_dialogue == V1["mes_example"]
    assert [p.raw for p in personas] == [V1, v2, v3]


def test_v3_fields():
    persona = Persona.from_card(V3)
    assert persona.nickname == "Smith" and persona.tags == ("fantasy",)
    assert persona.alternate_greetings == ("You again, <USER>.",)
    assert persona.post_history_instructions == "Stay {{char}}."
    assert persona.raw == V3 and persona.raw is not V3


def test_the_dict_given_is_not_shared():
    card = json.loads(json.dumps(V3))
    persona = Persona.from_card(card)
    card["data"]["tags"].append("later")
    persona.to_card()["data"]["extensions"].clear()
    assert persona.raw == V3


@pytest.mark.parametrize("version", ["3.0", "3.7", "4", 9.5, "newest", None, [], "1e999"])
def test_any_spec_version_is_read_and_a_newer_one_is_kept(version):
    persona = Persona.from_card({**V3, "spec_version": version})
    assert persona == Persona.from_card(V3)
    expected = {"3.7": "3.7", "4": "4", 9.5: "9.5"}.get(version, "3.0") if not isinstance(version, list) else "3.0"
    assert persona.to_card()["spec_version"] == expected


def test_missing_and_null_fields_are_empty():
    persona = Persona.from_card({"description": "Orrin is a keeper.", "scenario": None, "tags": None})
    assert (persona.name, persona.scenario, persona.tags) == ("Orrin", "", ())
    only = Persona.from_card({"name": "Orrin", "personality": "weary"})
    assert only.system_prompt().count("weary") == 1


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        ({"name": "Mira"}, "neither a description nor a personality"),
        ({"name": "Mira", "description": " ", "personality": "\n"}, "neither a description nor a personality"),
        ({**V1, "description": ["a"]}, "description must be text"),
        ({**V1, "name": 3}, "name must be text"),
        ({**V1, "mes_example": {}}, "mes_example must be text"),
        ({**V1, "tags": "fantasy"}, "tags must be a list of texts"),
        ({**V1, "alternate_greetings": ["a", 1]}, "alternate_greetings must be a list of texts"),
        ({"spec": "chara_card_v2"}, "not a character card"),
        ({"spec": "chara_card_v2", "data": [V1]}, "not a character card"),
        ({"spec": "lorebook_v3", "data": V1}, "not a character card"),
        ({"spec": 5, "data": V1}, "not a character card"),
        ([V1], "must be a JSON object, not list"),
        ("Mira", "must be a JSON object, not str"),
        (b"", "not valid UTF-8 JSON"),
        (b"{'name': 1}", "not valid UTF-8 JSON"),
        (b'{"description": "\xff\xfe x"}', "not valid UTF-8 JSON"),
        (b'{"description": "half \\ud800 pair"}', "not valid UTF-8 JSON"),
        (b'{"description": "a b", "extensions": NaN}', "not valid UTF-8 JSON"),
        (b'{"description": ' + b"9" * 5000 + b"}", "not valid UTF-8 JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"x":' + b"[" * MAX_DEPTH + b"1" + b"]" * MAX_DEPTH + b"}", "nested more than"),
    ],
)
def test_bad_cards_are_refused_in_every_wrapping(tmp_path, card, problem):
    blob = card if isinstance(card, bytes) else json.dumps(card).encode()
    refused(put(tmp_path, "c.json", blob), problem)
    refused(put(tmp_path, "c.png", png(png_chunk(b"tEXt", b"chara\0" + base64.b64encode(blob)))), problem)
    refused(put(tmp_path, "c.charx", charx(blob)), problem)


def test_nesting_up_to_the_limit_is_read():
    inner = 1
    for _ in range(MAX_DEPTH - 1):
        inner = [inner]
    assert Persona.from_card({**V1, "deep": inner}).raw["deep"] == inner
    with pytest.raises(InputError, match="nested more than"):
        Persona.from_card({**V1, "deep": [inner]})


def test_bad_dicts():
    loop = dict(V1)
    loop["self"] = loop
    for card in ({**V1, "x": {1, 2}}, loop, {**V1, "x": float("nan")}, {**V1, "description": "half \udc00 pair"}):
        with pytest.raises(InputError, match="card dict"):
            Persona.from_card(card)


@pytest.mark.parametrize("path", sorted(CARDS.glob("*.*")), ids=lambda path: path.name)
def test_example_cards_load(path, tmp_path):
    persona = Persona.load(path)
    assert persona.name != "Character"
    assert "{{" not in persona.system_prompt() + persona.greeting()
    persona.save(tmp_path / "again.png")
    assert Persona.load(tmp_path / "again.png").fingerprint == persona.fingerprint


def test_there_are_example_cards():
    assert list(CARDS.glob("*.json")) and list(CARDS.glob("*.png"))


def question_set(description, prefix=""):
    task = "Answer the question, roleplay as the given persona."
    prompt = f"{prefix}You are roleplaying as a user with this persona: {description}\n{task}{prefix}"
    return {"instruction": [{"pos": prompt, "neg": ""}], "eval_prompt": "{question} {answer}", "questions": ["Why?"]}


@pytest.mark.parametrize("prefix", ["", "\n"])
def test_question_set(tmp_path, prefix):
    card = question_set("Orrin Vale is a keeper, weary of ships.\nHe drinks tea.", prefix)
    persona = Persona.load(put(tmp_path, "specific_user_0.json", card))
    assert persona.name == "Orrin Vale"
    assert persona.description == "Orrin Vale is a keeper, weary of ships.\nHe drinks tea."
    assert persona.system_prompt() == card["instruction"][0]["pos"]
    persona.save(tmp_path / "as_card.png")
    again = Persona.load(tmp_path / "as_card.png")
    assert again == persona and again.fingerprint == persona.fingerprint
    assert again.raw["questions"] == ["Why?"]


@pytest.mark.parametrize("instruction", [[], {}, None, [1], [{}], [{"pos": 3}], [{"pos": " "}]])
def test_broken_question_set(tmp_path, instruction):
    refused(put(tmp_path, "q.json", {"instruction": instruction, "questions": []}), "instruction[0].pos")


def test_system_prompt_of_a_card():
    persona = Persona.from_card(V1)
    assert persona.system_prompt(user="Ann") == (
        "You are roleplaying as Mira, a character with this persona: Mira is a blacksmith who owes Ann a sword.\n"
        "Personality: gruff\nScenario: A forge at dusk.\nExample dialogue:\n"
        "Ann: hi\nMira: Hm.\nAnn: bye\nMira: Shut the door.\n"
        "Answer as Mira would, in the first person and in character."
    )
    assert persona.example_dialogues == (
        "{{user}}: hi\n{{char}}: Hm.",
        "{{user}}: bye\n{{char}}: Shut the door.",
    )


def test_original_stands_for_the_default_prompt():
    plain = Persona.from_card(V1)
    own = dataclasses.replace(plain, system_prompt_template="Be {{char}}.")
    assert own.system_prompt() == "Be Mira."
    around = dataclasses.replace(plain, system_prompt_template="[{{ORIGINAL}}] \\1 {{original}}")
    assert around.system_prompt() == f"[{plain.system_prompt()}] \\1 {plain.system_prompt()}"
    blank = dataclasses.replace(plain, system_prompt_template=" \n")
    assert blank.system_prompt() == plain.system_prompt()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{char}} {{CHAR}} {{Char}} {{ char }}", "Smith Smith Smith Smith"),
        ("<BOT> <bot> <Bot> <char>", "Smith Smith Smith Smith"),
        ("{{user}} {{USER}} <USER> <user>", "Ann Ann Ann Ann"),
        ("a{{// hidden}}b{{comment: seen}}c{{COMMENT:x}}d", "abcd"),
        ("a{{// for {{user}} and {a} brace\nnext line }}b", "ab"),
        *[(text, text) for text in ("{{random:a,b}} {{roll:6}} {{original}} {char} {{chars}}", "{{// never closed")],
    ],
)
def test_macros(text, expected):
    persona = Persona.from_card(V3)
    assert persona.resolve(text, user="Ann") == expected
    assert dataclasses.replace(persona, first_message=text).greeting(user="Ann") == expected


def test_a_replaced_value_is_not_resolved_again():
    assert Persona.from_card(V1).resolve("{{user}} and {{char}}", user="{{char}}") == "{{char}} and Mira"


def test_greetings():
    persona = Persona.from_card(V3)
    assert persona.greeting() == "Mind the sparks, User."
    assert persona.greeting(1, user="Ann") == "You again, Ann."
    for index in (2, -1):
        with pytest.raises(InputError, match="greetings 0 to 1"):
            persona.greeting(index)


def test_fingerprint_follows_the_prompt_only():
    persona = Persona.from_card(V3)
    assert len(persona.fingerprint) == 64 and int(persona.fingerprint, 16)
    assert dataclasses.replace(persona, tags=(), first_message="Hi.").fingerprint == persona.fingerprint
    assert dataclasses.replace(persona, scenario="A ship.").fingerprint != persona.fingerprint


words = st.text(max_size=40)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
known = {key: words for key in (*V1, "system_prompt", "nickname") if key != "description"}
known |= {key: st.lists(words, max_size=3) for key in ("alternate_greetings", "tags")}
some_keys = st.sampled_from(["spec", "data", "instruction", "description", "name", "tags"])


@settings(max_examples=40, deadline=None)
@given(
    data=st.fixed_dictionaries({"description": words.map(lambda text: f"Mira {text}")}, optional=known),
    extra=st.dictionaries(words.map(lambda key: f"x_{key}"), json_values, max_size=3),
    wrapped=st.booleans(),
)
def test_any_card_survives_to_card(data, extra, wrapped):
    card = {"spec": "chara_card_v2", "data": {**data, **extra}, **extra} if wrapped else {**data, **extra}
    persona = Persona.from_card(card)
    written = persona.to_card()
    again = Persona.from_card(written)
    assert again == persona and again.fingerprint == persona.fingerprint and again.to_card() == written
    assert written["data"].items() >= extra.items()


@settings(max_examples=150, deadline=None)
@given(card=st.dictionaries(some_keys, json_values))
def test_any_json_object_is_a_persona_or_an_input_error(card):
    try:
        persona = Persona.from_card(card)
    except InputError as error:
        assert str(error).startswith("card dict: ")
    else:
        assert persona.name and persona.system_prompt() and persona.to_card()
