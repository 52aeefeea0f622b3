"""The bundled questions, question files of several kinds, and what keeps held-out material out."""

import json
import sys
import types

import pytest

from persona_pruner.errors import InputError
from persona_pruner.synthesis.bank import MAX_WORDS, Question, bundled, load_questions, passages, quiz
from persona_pruner.synthesis.overlap import HeldOut, grams, near_duplicates, words


def write(path, value, lines=False):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value) if lines else json.dumps(value)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_bank():
    search, heldout = bundled("search"), bundled("heldout")
    assert (len(search), len(heldout)) == (416, 80)
    everything = search + heldout
    assert len(set(map(str.lower, everything))) == len(everything) == len(near_duplicates(everything, 0.8))
    assert all(3 <= len(q.split()) <= MAX_WORDS and q == q.strip() for q in everything)


def test_search_and_heldout_share_no_run_of_eight_words():
    seen = HeldOut(bundled("heldout"))
    assert not [q for q in bundled("search") if seen.touches(q)]
    eval_texts = HeldOut(passages("neutral"))
    assert not [p for p in passages("calibration") if eval_texts.touches(p)]
    choices = HeldOut(row["question"] for row in quiz())
    assert not [q for q in bundled("search") + passages("calibration") if choices.touches(q)]


def test_passages_and_quiz():
    assert (len(passages("calibration")), len(passages("neutral")), len(quiz())) == (32, 16, 60)
    for row in quiz():
        assert len(row["choices"]) == len(set(row["choices"])) >= 2
        assert row["answer"] in row["choices"] or row["answer"] in range(len(row["choices"]))


ALPACA = [
    {"instruction": "Name a river.", "input": "", "output": "The Rhine."},
    {"instruction": "Translate to French:", "input": "Good day", "output": "Bonjour"},
    {"instruction": "  ", "input": "x", "output": "y"},
    {"instruction": "Name a river.", "output": "The Rhine."},
]
RIVERS = [Question("Name a river.", "The Rhine."), Question("Translate to French:\nGood day", "Bonjour")]


@pytest.mark.parametrize("lines", [False, True])
def test_alpaca(tmp_path, lines):
    path = write(tmp_path / ("a.jsonl" if lines else "a.json"), ALPACA, lines)
    assert load_questions(path) == RIVERS
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors save it
    assert load_questions(str(path)) == RIVERS


def test_sharegpt(tmp_path):
    rows = [
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "Hi there you?"}]},
        {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I."}]},
        {"conversations": [{"from": "gpt", "value": "I begin."}, {"from": "human", "value": "No."}]},
        {"conversations": [{"from": "human", "value": ""}]},
        {"conversations": ["text"]},
        {"conversations": []},
    ]
    path = write(tmp_path / "s.json", rows)
    assert load_questions(path) == [Question("Hi there you?"), Question("Who are you?", "I.")]


def test_strings_wrappers_and_the_paper_set(tmp_path):
    assert load_questions(write(tmp_path / "l.json", ["One?", " Two? ", "", 3])) == [Question("One?"), Question("Two?")]
    for key in ("questions", "data", "examples"):
        path = write(tmp_path / "w.json", {key: ["One?"], "other": ["Two?"]})
        assert load_questions(path) == [Question("One?")]
    paper = {
        "instruction": [{"pos": "You are roleplaying as ...", "neg": ""}],
        "questions": ["Where is Wendy?", "What do you write?"],
        "eval_prompt": "x",
    }
    assert [q.text for q in load_questions(write(tmp_path / "p.json", paper))] == paper["questions"]
    assert load_questions(write(tmp_path / "t.json", "One text?")) == [Question("One text?")]
    assert load_questions(write(tmp_path / "q.JSON", {"question": "Why?", "answer": "So."})) == [
        Question("Why?", "So.")
    ]


def test_rows_of_a_jsonl_end_at_a_line_feed_only(tmp_path):
    rows = ["Before\u2028after?", "Before\x85after?", "Before\u2029 and \x0bafter?"]
    assert [q.text for q in load_questions(write(tmp_path / "x.jsonl", rows, lines=True))] == rows


def test_documents_and_broken_text_are_no_questions(tmp_path):
    rows = ["word " * (MAX_WORDS + 1), "Fine?", "half \ud83d pair"]
    assert load_questions(write(tmp_path / "d.json", rows)) == [Question("Fine?")]


@pytest.mark.parametrize(
    "name, data",
    [
        ("missing.json", None),
        ("broken.json", b'{"questions": ["One'),
        ("broken.jsonl", b'"One?"\n{"x"'),
        ("binary.json", b"\xff\xfe\x00"),
        ("empty.json", b"[]"),
        ("empty.jsonl", b"\n"),
        ("number.json", b"7"),
        ("null.json", b"null"),
        ("other.json", b'{"name": "Mira"}'),
        ("deep.json", b"[" * 100_000),
        ("deep.jsonl", b"[" * 100_000),
        ("folder.json", "folder"),
    ],
)
def test_bad_files_are_named(tmp_path, name, data):
    path = tmp_path / name
    if data == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as caught:
        load_questions(path)
    assert "\n" not in str(caught.value)


def test_a_dataset_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"owner/name.*extra `datasets`"):
        load_questions("owner/name")

    def load_dataset(name, split):
        if name != "owner/name":
            raise ConnectionError("no such dataset\nsecond line")
        return ALPACA

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_questions("owner/name") == RIVERS
    with pytest.raises(InputError, match=r"'owner/other' cannot be loaded: no such dataset$"):
        load_questions("owner/other")


def test_words_and_grams():
    assert words("Don't PANIC, it's 42!") == ["don't", "panic", "it's", "42"]
    assert words("Żółć и мир") == ["żółć", "и", "мир"]
    assert grams("a b c", 2) == {("a", "b"), ("b", "c")} and grams("a b", 8) == {("a", "b")} and grams("?!") == set()


def test_held_out():
    seen = HeldOut(["one two three four five six seven eight nine", "Short question here?"])
    assert seen.touches("zero one two three four five six seven eight again")
    assert not seen.touches("one two three four five six seven and eight nine")
    assert seen.touches("short QUESTION here") and not seen.touches("a short question here")
    assert not seen.touches("") and not HeldOut().touches("one two")
    assert HeldOut(["Кто живёт в этом доме?"]).touches("кто живёт в этом доме")


def test_near_duplicates():
    texts = [
        "How do you forge a good sword?",
        "How do you forge a sword?",  # six of seven words
        "What is your favourite song?",
        "what is YOUR favourite song",
        "...",
        "Какая твоя любимая песня?",
        "Где ты родился?",
    ]
    assert near_duplicates(texts) == [0, 2, 5, 6]
    assert near_duplicates(texts[:2], 0.9) == [0, 1]
    assert near_duplicates(["a b c d e f g", "a b c d e f g h i j"], 0.7) == [0]  # exactly at the threshold
