"""Chats as token ids under templates of several kinds."""

import pytest

from persona_pruner.errors import InputError
from persona_pruner.synthesis import prompts
from persona_pruner.synthesis.overlap import HeldOut, words
from persona_pruner.synthesis.own import OPENINGS, own_questions
from persona_pruner.testing import CHATML, DROPS_SYSTEM, NO_SYSTEM, tiny_model, tiny_tokenizer

SYSTEM = "You are Mira, a smith."


def test_with_a_system_role():
    tokenizer = tiny_tokenizer()
    text = "<|im_start|>system\nYou are Mira, a smith.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
    ids = prompts.prompt_ids(tokenizer, SYSTEM, "Who?")
    assert tokenizer.decode(ids) == text + "<|im_start|>assistant\n"
    assert ids[0] == 1 and ids.count(2) == 2  # markers are single tokens, nothing is added in front
    open_ids = prompts.open_question_ids(tokenizer, SYSTEM, "Do you")
    assert tokenizer.decode(open_ids) == text.replace("Who?<|im_end|>\n", "Do you")


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["raises", "leaves it out"])
def test_without_a_system_role(template):
    tokenizer = tiny_tokenizer(template)
    text = f"<|im_start|>user\n{SYSTEM}\n\nWho?<|im_end|>\n"
    assert tokenizer.decode(prompts.prompt_ids(tokenizer, SYSTEM, "Who?")) == text + "<|im_start|>assistant\n"
    opened = tokenizer.decode(prompts.open_question_ids(tokenizer, SYSTEM, "Do you"))
    assert opened == f"<|im_start|>user\n{SYSTEM}\n\nDo you"
    longer = prompts.render(tokenizer, prompts.chat(SYSTEM, "One", "Two", "Three"))
    assert longer.count(SYSTEM) == 1 and longer.endswith("user\nThree<|im_end|>\n<|im_start|>assistant\n")
    assert prompts.render(tokenizer, prompts.chat("", "Who?")) == text.replace(f"{SYSTEM}\n\n", "") + (
        "<|im_start|>assistant\n"
    )


def test_a_template_that_strips_the_system_text():
    tokenizer = tiny_tokenizer(CHATML.replace("m['content']", "m['content'] | trim"))
    assert "system\nYou" in prompts.render(tokenizer, prompts.chat(f"  {SYSTEM}\n", "Who?"))
    assert prompts.render(tokenizer, prompts.chat(SYSTEM, " Do"), continue_last=True).endswith("Do<|im_end|>\n")
    assert tokenizer.decode(prompts.open_question_ids(tokenizer, SYSTEM, "Do")).endswith("user\nDo")


def test_without_a_template():
    tokenizer = tiny_tokenizer(None)
    assert tokenizer.decode(prompts.prompt_ids(tokenizer, SYSTEM, "Who?")) == f"{SYSTEM}\nUser: Who?\nAssistant:"
    assert tokenizer.decode(prompts.open_question_ids(tokenizer, SYSTEM, "Do you")) == f"{SYSTEM}\nUser: Do you"
    assert prompts.render(tokenizer, prompts.chat("", "A", "B", "C")) == "User: A\nAssistant: B\nUser: C\nAssistant:"


def test_a_template_that_refuses():
    tokenizer = tiny_tokenizer("{{ raise_exception('no chats today') }}")
    for system in (SYSTEM, ""):
        with pytest.raises(InputError, match="no chats today"):
            prompts.prompt_ids(tokenizer, system, "Who?")
    with pytest.raises(InputError, match="System role"):
        prompts.render(tiny_tokenizer(NO_SYSTEM), prompts.chat(SYSTEM))


def test_examples_and_stops():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    (example,) = prompts.examples(tokenizer, SYSTEM, ["Who?"], [[5, 2]])
    assert example.prompt == prompts.prompt_ids(tokenizer, SYSTEM, "Who?") and example.answer == [5, 2]
    with pytest.raises(ValueError):
        prompts.examples(tokenizer, SYSTEM, ["Who?"], [])
    model.generation_config.eos_token_id = [7, 9]
    assert prompts.stop_ids(model, tokenizer) == {2, 7, 9}
    model.generation_config.eos_token_id = None
    assert prompts.stop_ids(model, tokenizer) == {2}


def writes(monkeypatch, text_of):
    """Lets `own_questions` draft `text_of(draft number)` as token ids instead of asking the model."""

    def generate(model, prompts, stop, limit, seed, done):
        texts = [text_of(index) for index in range(len(prompts))]
        done(texts)
        return texts

    monkeypatch.setattr("persona_pruner.synthesis.own.generate", generate)


def test_own_questions_are_filtered(monkeypatch):
    tokenizer, model, told = tiny_tokenizer(), tiny_model(), []
    endings = {
        0: " swords that are forged for a king?<|im_end|>",
        1: " make with your favourite hammer in the old forge",  # did not end
        2: " write two\nlines of a question?<|im_end|>",
        OPENINGS.index("Are you"): "?<|im_end|>",  # two words
        4: " <|im_start|>assistant is who I am<|im_end|>",
        5: " you were the oldest smith that ever worked in this little town?<|im_end|>",  # held out
        6: " find the best metal for horseshoes?<|im_end|>",  # known
        len(OPENINGS): " swords that are forged for a king?<|im_end|>",  # the same as 0
        len(OPENINGS) + 1: " do on a rainy sunday morning?<|im_end|>",
    }
    writes(monkeypatch, lambda index: tokenizer(endings.get(index, ""))["input_ids"])
    held_out = HeldOut(["Nobody knows that you were the oldest smith that ever worked in this little town."])
    known = ["How did you find the best metal for horseshoes?"]
    found = own_questions(model, tokenizer, SYSTEM, 36, held_out, known=known, step=told.append)
    assert found == [
        "How do you feel about swords that are forged for a king?",
        "What did you do on a rainy sunday morning?",
    ]
    assert told == [54]
    assert own_questions(model, tokenizer, SYSTEM, 0, held_out) == []


def test_own_questions_of_a_real_loop():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = list(range(2, 120))  # a random model seldom ends a turn by itself
    first = own_questions(model, tokenizer, SYSTEM, 12, HeldOut(), seed=1)
    assert first and first == own_questions(model, tokenizer, SYSTEM, 12, HeldOut(), seed=1)
    assert len(first) <= 12 and all(q.startswith(OPENINGS) and len(words(q)) >= 3 for q in first)
    assert first != own_questions(model, tokenizer, SYSTEM, 12, HeldOut(), seed=2)
