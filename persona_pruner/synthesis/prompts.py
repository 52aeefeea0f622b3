"""Chats as token ids, by the model's own template."""

from collections.abc import Sequence

from persona_pruner.errors import InputError
from persona_pruner.packing import Example

SENTINEL = "\u2063PERSONA\u2063"


def render(tokenizer, messages: list[dict], continue_last: bool = False) -> str:
    """Text of a chat, ready for the assistant's turn (or for the rest of the last turn).

    A template without a system role, whether it raises or leaves the text out, gets the system text at the start of
    the first user turn; a tokenizer without a template gets a plain "User: / Assistant:" form.
    """
    if tokenizer.chat_template is None:
        turns = {"system": "", "user": "User: ", "assistant": "Assistant: "}
        text = "".join(f"{turns[m['role']]}{m['content']}\n" for m in messages)
        return text.split(SENTINEL)[0] if continue_last else f"{text}Assistant:"
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not continue_last)
        silent = system.strip() not in text
    except Exception as error:  # templates are programs: what they raise is theirs to choose
        if not system or len(messages) == 1:
            raise InputError(f"the model's chat template refused the conversation: {error}") from error
        silent = True
    if silent and len(messages) > 1:
        first = {"role": "user", "content": f"{system}\n\n{messages[1]['content']}"}
        return render(tokenizer, [first, *messages[2:]], continue_last)
    return text.split(SENTINEL)[0] if continue_last else text


def chat(system: str, *turns: str) -> list[dict]:
    """Messages of a conversation: system text (left out if empty), then user and assistant in turn."""
    roles = ("user", "assistant")
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of rendered text; the template has put every special token in already."""
    return tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]


def prompt_ids(tokenizer, system: str, question: str) -> list[int]:
    """Prompt for an answer to `question` under the system text."""
    return encode(tokenizer, render(tokenizer, chat(system, question)))


def open_question_ids(tokenizer, system: str, start: str) -> list[int]:
    """Prompt whose user turn is still being written, beginning with `start`: the model writes the question."""
    return encode(tokenizer, render(tokenizer, chat(system, start + SENTINEL), continue_last=True))


def examples(tokenizer, system: str, questions: Sequence[str], answers: Sequence[list[int]]) -> list[Example]:
    """Questions with the token ids of their answers, one each or several rounds, as training or test examples."""
    rounds = max(1, len(answers) // max(1, len(questions)))
    pairs = zip([*questions] * rounds, answers, strict=True)
    return [Example(prompt_ids(tokenizer, system, question), list(answer)) for question, answer in pairs]


def stop_ids(model, tokenizer) -> set[int]:
    """Ids that end a turn: the generation config's and the tokenizer's end-of-sequence."""
    config = model.generation_config.eos_token_id
    ids = set(config if isinstance(config, (list, tuple)) else [config])
    return {i for i in ids | {tokenizer.eos_token_id} if i is not None}
