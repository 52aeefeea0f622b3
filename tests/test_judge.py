"""The judge: numbers from token probabilities by hand, and a real llama.cpp server."""

import json
import sys
from math import log

import pytest
from sculpting import QUICK

from persona_pruner.errors import InputError, RunError
from persona_pruner.evaluation import judge as judging
from persona_pruner.evaluation.judge import Judge, Verdict, expected_score, judged, read_prompt, summary, text_score
from persona_pruner.study.compare import compare
from persona_pruner.study.plan import load_personas
from persona_pruner.testing import tiny_model, tiny_tokenizer

PAPER = "You rate {question} and {answer} for a persona.\nRespond with a number between 0 and 100, just the number."
pytestmark = pytest.mark.usefixtures("no_waiting")

NOBODY = "http://127.0.0.1:9/v1"


def place(written, **mass):
    """One place of a reply: what was written, and the probabilities of the alternatives."""
    return written, [(token.replace("_", ""), log(p)) for token, p in mass.items()]


def test_whole_numbers():
    reply = [place("80", _80=0.5, _90=0.3, _5=0.1, _I=0.1), ("", [])]
    mean, mass = expected_score(reply)
    assert mass == pytest.approx(0.9) and mean == pytest.approx((80 * 0.5 + 90 * 0.3 + 5 * 0.1) / 0.9)
    assert expected_score([place("101", _101=0.6, _100=0.2)])[0] == pytest.approx(100)
    assert expected_score([place("Score", _Score=0.2), place(" ", _x=1.0), *reply])[0] == pytest.approx(mean)
    assert expected_score([place("I", _I=0.6, _40=0.4)]) == (pytest.approx(40), pytest.approx(0.4))


def test_single_digits():
    """8 was written, then 5: 80 to 89 and 8 itself are known, what 7 would have gone on to is not."""
    reply = [place("8", _8=0.6, _7=0.4), place("5", _5=0.5, _0=0.3, _x=0.2)]
    mean, mass = expected_score(reply)
    assert mass == pytest.approx(0.6) and mean == pytest.approx(85 * 0.5 + 80 * 0.3 + 8 * 0.2)
    one = [place("1", _1=1.0), place("0", _0=1.0), place("0", _0=0.7, _x=0.3)]
    assert expected_score(one) == (pytest.approx(100 * 0.7 + 10 * 0.3), pytest.approx(1.0))
    cut = expected_score([place("7", _7=0.9, _x=0.1)])  # the reply ends after the digit
    assert cut == (pytest.approx(7), pytest.approx(0.9))


def test_no_number():
    assert expected_score([place("I", _I=1.0)]) == (None, 0) and expected_score([]) == (None, 0)
    texts = {"85": 85, "Score: 70.": 70, "I would say 12/100": 12, "none": None, "1000": None, "3.5": 3.5, "": None}
    assert {text: text_score(text) for text in texts} == texts


def test_prompts(tmp_path):
    published = tmp_path / "set.json"
    published.write_text(json.dumps({"eval_prompt": PAPER}))
    assert read_prompt(published) == PAPER
    (tmp_path / "own.txt").write_text("{question}: {answer} {persona}")
    assert read_prompt(tmp_path / "own.txt").endswith("{persona}")
    assert judging.fill("{question}|{answer}", question="{answer}?", answer="{x}") == "{answer}?|{x}"
    (tmp_path / "bad.txt").write_text("{question}")
    (tmp_path / "bad.json").write_text('{"eval_prompt": 3}')
    for name, word in (
        ("bad.txt", "has no {answer}"),
        ("bad.json", "no text eval_prompt"),
        ("none.txt", "cannot read"),
    ):
        with pytest.raises(InputError, match=word):
            read_prompt(tmp_path / name)
    judging.check_prompt(judging.PROMPT)
    judging.check_prompt(judging.PAIR_PROMPT, ("question", "first", "second", "persona"))


def test_summary():
    rows = [Verdict(80, False, "80", 0.9), Verdict(None, True, "REFUSAL", None), Verdict(40, False, "40", None)]
    rows.append(Verdict(None, False, "well", None))
    assert summary(rows) == {"score": 60, "scored": 2, "refusals": 1, "unread": 1, "mass": 0.9}
    assert summary([]) == {"score": None, "scored": 0, "refusals": 0, "unread": 0, "mass": None}


STEADY = "{question}\n{answer}\nAnswer with digits only. 2 + 2 = 4. 10 + 10 = 20. 50 + 25 ="


def test_a_server_judges_by_probabilities(llama, tmp_path):
    judge = Judge(llama[1], tmp_path / "judge.jsonl")
    found = judge.score(STEADY, "", "")
    assert not found.refusal and 0 <= found.score <= 100 and found.text.strip()
    (row,) = map(json.loads, (tmp_path / "judge.jsonl").read_text().splitlines())
    tokens = row["reply"]["tokens"]
    assert tokens and all(len(alternatives) == judging.TOP for _, alternatives in tokens)
    assert found.text in "".join(token for token, _ in tokens)
    mean, mass = expected_score(tokens)
    assert mass >= judging.LEAST_MASS and found == Verdict(mean, False, found.text, mass)


def test_nothing_is_asked_twice(llama, tmp_path):
    first = Judge(llama[1], tmp_path / "judge.jsonl")
    found = judged(first, STEADY, ["Who?", "Why?"], ["I.", "Iron."])
    again = Judge(llama[1], tmp_path / "judge.jsonl")
    again.client = None  # any request would fail
    assert judged(again, STEADY, ["Who?", "Why?"], ["I.", "Iron."]) == found
    with pytest.raises(AttributeError):
        again.score(STEADY, "Who?", "Another answer.")
    assert found["judge"] == first.model and len(found["prompt"]) == 16 and found["scored"] + found["unread"] == 2


def test_both_orders(llama, tmp_path):
    judge = Judge(f"{llama[1]}#any", tmp_path / "judge.jsonl")
    wins = judge.prefers_first(judging.PAIR_PROMPT, "Who are you?", "Bram, the smith.", "A cloud of tea.", "a smith")
    back = judge.prefers_first(judging.PAIR_PROMPT, "Who are you?", "A cloud of tea.", "Bram, the smith.", "a smith")
    assert len(judge.replies) == 2 and judge.model == "any"  # the same two prompts in both calls
    assert (wins is None and back is None) or wins + back == pytest.approx(1)
    same = judge.prefers_first(judging.PAIR_PROMPT, "Who are you?", "Tea.", "Tea.", "a smith")
    assert same is None or same == pytest.approx(0.5)  # liking the letter A cancels out


def replied(judge, text, tokens=None):
    judge._ask = lambda prompt: {"text": text, "tokens": tokens}
    return judge


def test_what_a_reply_can_be(llama, tmp_path):
    judge = Judge(llama[1])
    assert replied(judge, "REFUSAL").score(PAPER, "q", "a") == Verdict(None, True, "REFUSAL", None)
    assert replied(judge, " 85").score(PAPER, "q", "a") == Verdict(85, False, " 85", None)  # no probabilities
    few = [["40", [["40", log(0.1)], ["well", log(0.9)]]]]
    assert replied(judge, "40", few).score(PAPER, "q", "a") == Verdict(40, False, "40", None)  # little mass: the text
    sure = [["40", [["40", log(0.5)], ["60", log(0.5)]]]]
    assert replied(judge, "40", sure).score(PAPER, "q", "a").score == pytest.approx(50)
    letters = [["A", [["A", log(0.75)], ["B", log(0.25)]]]]
    assert replied(judge, "A", letters).prefers_first(judging.PAIR_PROMPT, "q", "x", "y") == pytest.approx(0.5)
    assert replied(judge, "B").prefers_first(judging.PAIR_PROMPT, "q", "x", "y") == 0.5
    assert replied(judge, "neither").prefers_first(judging.PAIR_PROMPT, "q", "x", "y") is None


def test_no_server_and_no_client(monkeypatch):
    with pytest.raises(RunError, match=f"the judge at {NOBODY} failed: Connection error"):
        Judge(NOBODY)
    with pytest.raises(RunError, match="failed: Connection error"):
        Judge(f"{NOBODY}#name").score(PAPER, "q", "a")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match="needs the extra `endpoint`"):
        Judge(NOBODY)


def test_a_comparison_with_a_judge(llama, tmp_path, monkeypatch):
    from persona_pruner.study import measure
    from persona_pruner.synthesis import bank

    items, passages = bank.quiz()[:4], bank.passages
    monkeypatch.setattr(bank, "quiz", lambda: items)
    monkeypatch.setattr(bank, "passages", lambda split: passages(split)[:2])
    monkeypatch.setattr(measure, "ANSWER_TOKENS", 8)
    card = {"instruction": [{"pos": "You are Bram, a smith.", "neg": ""}], "questions": ["Who are you?", "Why iron?"]}
    (tmp_path / "bram.json").write_text(json.dumps(card | {"eval_prompt": STEADY}))
    people, settings = load_personas(tmp_path / "bram.json"), {**QUICK, "own_questions": 0, "bank_questions": 2}
    arguments = (tiny_model(), tiny_tokenizer(), people, tmp_path / "out", ["magnitude"], [0.5])
    result = compare(*arguments, judge=llama[1], base="tiny", **settings)
    (cell,), dense = result["cells"], result["judge"]["dense"]["bram"]
    assert dense["scored"] + dense["unread"] + dense["refusals"] == 2 and dense["prompt"] == cell["judge"]["prompt"]
    scores = dense["score"], cell["judge"]["score"]  # of what a random model says: the judge may have no number for it
    assert cell["judge_drop"] == (None if None in scores else pytest.approx(scores[0] - scores[1]))
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "## Judge" in text and dense["prompt"] in text and "not understood" in text
    assert ("judge drop |" in text) == (None not in scores)
    assert len((tmp_path / "out" / "judge.jsonl").read_text().splitlines()) <= 2 + 2 + 4
