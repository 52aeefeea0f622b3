"""The command: what it writes and prints, exit codes, one sentence for what is wrong, Ctrl-C and a full disk."""

import io
import json
import signal
import subprocess
import time
import zlib
from pathlib import Path

import pytest
import torch
from limits import files_up_to
from sculpting import HELD_OUT, QUICK_ARGUMENTS, TEXT, command, comparable, environment, run, save_tiny, snapshot

from persona_pruner import __version__, cli
from persona_pruner.errors import InputError
from persona_pruner.formats.persona_file import PersonaFile

SETTINGS = [*QUICK_ARGUMENTS, "--eval-questions", HELD_OUT, "--no-compare", "--dtype", "float32"]
CARDS = Path(__file__).parents[1] / "examples" / "cards"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    from persona_pruner.testing import tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """(finished process, output folder) of a sculpt with --json; not to be changed."""
    out = tmp_path_factory.mktemp("made") / "run"
    card = CARDS / "blacksmith.json"
    return run("sculpt", "--persona", card, "--model", base, "--out", out, "--json", *SETTINGS), out


def sculpt(base, out, *more, persona=TEXT):
    return ["sculpt", "--persona", persona, "--model", base, "--out", out, *SETTINGS, *more]


def test_json_and_nothing_else_on_standard_output(made):
    done, out = made
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "metrics.json").read_text())
    lines = done.stderr.splitlines()
    assert lines[0].startswith("loading ") and all(line.endswith(" s") for line in lines)
    assert len(lines) >= 9 and not {"\x1b", "\r", "%", "━"} & set(done.stderr)  # no bars without a terminal


def test_everything_is_written_and_a_second_run_computes_nothing(made, base, call):
    _, out = made
    assert {path.name for path in out.iterdir()} == {
        "README.md", "metrics.json", "persona.persona.safetensors", "report.html", "run.yaml", "slim", "stages",
    }  # fmt: skip
    assert PersonaFile.load(out).base == str(base)
    before = snapshot(out)
    code, said, errors = call(*sculpt(base, out, "--threads", 1, persona=CARDS / "blacksmith.json"))
    assert code == 0 and snapshot(out) == before
    assert errors.splitlines()[1:] == [f"{out} is complete for these settings; nothing was computed anew"]
    for part in ("FFN bytes", "persona-pruner, mask only", f"written to {out}: README.md, metrics.json"):
        assert part in said


def test_the_recorded_command_makes_the_same(made, base, call, tmp_path):
    """README.md of a result says how it was made."""
    import shlex

    text = (made[1] / "README.md").read_text()
    line = text[text.index("persona-pruner sculpt") :].partition("```")[0].replace("\\\n", " ")
    words = shlex.split(line.replace("CARD", str(CARDS / "blacksmith.json")).replace("FOLDER", str(tmp_path)))
    assert call(*words[1:])[0] == 0
    again, first = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, made[1]))
    assert comparable(again) == comparable(first)


def test_ctrl_c_in_the_middle(base, call, tmp_path):
    """A real signal to a real process; the same command then goes on and ends where a run in one go does."""
    arguments = [*SETTINGS, "--set", "steps=60", "--threads", "1"]
    out, state = tmp_path / "run", tmp_path / "run" / "stages" / "search.safetensors"
    words = ["sculpt", "--persona", TEXT, "--model", base, "--out", out, *arguments]
    # a test run in the background may ignore the signal, and its children with it
    heard = ["env", "--default-signal=INT", *command(*words)]
    with subprocess.Popen(heard, stdout=-1, stderr=-1, text=True, env=environment()) as process:
        until = time.monotonic() + 120
        while not state.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and said == ""
    last = errors.splitlines()[-1]
    assert last == "persona-pruner: interrupted; the same command goes on from the last finished stage"
    assert "Traceback" not in errors and "straight-through search" not in errors
    assert {path.name for path in out.iterdir()} == {"stages"}
    before = snapshot(out / "stages")
    assert set(before) == {
        "held_out.json", "questions.json", "answers.json", "scores.safetensors", "search.safetensors",
    }  # fmt: skip
    assert call(*words)[0] == 0
    after = snapshot(out / "stages")
    assert {name for name in before if after[name] != before[name]} == {"search.safetensors"}
    words[words.index(out)] = tmp_path / "whole"
    assert call(*words)[0] == 0
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "whole"))
    assert comparable(one) == comparable(two) and len(one["search"]["losses"]) == 60


def test_a_full_disk(base, call, tmp_path):
    with files_up_to(60_000):
        code, said, errors = call(*sculpt(base, tmp_path / "run", "--threads", 1))
    assert code == 1 and said == "" and "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"persona-pruner: could not write {tmp_path / 'run'}") and "too large" in last
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.name == "slim"]
    assert call(*sculpt(base, tmp_path / "run", "--threads", 1))[0] == 0
    assert (tmp_path / "run" / "slim" / "model.safetensors").exists()


def png(*chunks):
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = chunk(b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 8, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")


def persona_files(folder):
    (folder / "empty.txt").write_text("")
    (folder / "word.txt").write_text("Blacksmith")
    (folder / "bare.png").write_bytes(png())
    (folder / "broken.json").write_text('{"name": "Bram", "description": ')
    (folder / "list.json").write_text("[1, 2]")
    (folder / "nobody.json").write_text('{"name": "Bram"}')
    (folder / "long.json").write_text('{"description": "' + "iron " * 2_000_000 + '"}')
    bomb = b"chara\0\0" + zlib.compress(b"A" * 50_000_000, 9)
    (folder / "bomb.png").write_bytes(png((b"zTXt", bomb)))
    (folder / "card.docx").write_text("A gruff blacksmith")
    (folder / "deep.json").write_text("[" * 100_000)


PERSONAS = {
    "": "at least two words",
    "Blacksmith": "at least two words",
    "empty.txt": "at least two words",
    "word.txt": "at least two words",
    "bare.png": "holds no character card",
    "broken.json": "not valid UTF-8 JSON",
    "list.json": "must be a JSON object",
    "nobody.json": "neither a description nor a personality",
    "long.json": "larger than 8 MiB",
    "bomb.png": "decompresses to more than 12 MiB",
    "deep.json": "nested too deeply",
    "none.json": "none.json",
    "card.docx": "a persona file ends in",
}


@pytest.mark.parametrize("persona, why", PERSONAS.items(), ids=[name or "nothing" for name in PERSONAS])
def test_bad_personas(call, base, tmp_path, persona, why):
    persona_files(tmp_path)
    where = tmp_path / persona if "." in persona else persona
    refused(call, why, tmp_path / "run", *sculpt(base, tmp_path / "run", persona=where))


def refused(call, why, out, *arguments):
    """Exit code 2, one sentence, nothing written; with --debug the exception itself."""
    code, said, errors = call(*arguments)
    lines = [line for line in errors.splitlines() if not line.startswith("loading ")]
    assert code == 2 and said == "", errors
    assert len(lines) == 1 and lines[0].startswith("persona-pruner: ") and why in lines[0], errors
    assert not out.exists()
    with pytest.raises(InputError):
        cli.main([*map(str, arguments), "--debug"])


SCULPTS = {
    "ratio 0": (["--ratio", 0], "setting ratio: 0 removes nothing"),
    "ratio 1": (["--ratio", 1], "setting ratio: Input should be less than 1"),
    "ratio -1": (["--ratio", -1], "setting ratio: Input should be greater than or equal to 0"),
    "ratio 1.5": (["--ratio", 1.5], "setting ratio: Input should be less than 1"),
    "ratio nan": (["--ratio", "nan"], "setting ratio"),
    "ratio 0.001": (["--ratio", 0.001], "removes none of 64 channels"),
    "scope": (["--scope", "row"], "setting scope"),
    "seed": (["--seed", -1], "setting seed"),
    "set without =": (["--set", "steps"], "--set steps is not of the form name=value"),
    "set unknown": (["--set", "stepps=3"], "setting stepps: Extra inputs are not permitted"),
    "set no number": (["--set", "steps=many"], "setting steps"),
    "set no YAML": (["--set", "steps=[1"], "--set steps=[1: the value is not valid YAML"),
    "set nothing": (["--set", "=3"], "setting : Extra inputs are not permitted"),
    "dtype": (["--dtype", "int4"], "dtype 'int4' is not one of auto, float32"),
    "device": (["--device", "abacus"], "'abacus' is not a torch device"),
    "device meta": (["--device", "meta"], "device 'meta' cannot be used here"),
    "questions": (["--questions", "nowhere.json"], "cannot read nowhere.json"),
    "test questions": (["--eval-questions", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    "no folder": (["--model", "./nowhere"], "no model folder ./nowhere"),
    "no alias": (["--model", "smollm3-135m"], "neither an alias (smollm2-135m) nor a folder here"),
}


@pytest.mark.parametrize("arguments, why", SCULPTS.values(), ids=SCULPTS)
def test_bad_requests(call, base, tmp_path, monkeypatch, arguments, why):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(call, why, tmp_path / "run", *sculpt(base, tmp_path / "run", *arguments))


def test_bad_models(call, gpt2, base, tmp_path, monkeypatch):
    from huggingface_hub import constants

    refused(call, "no decoder layers", tmp_path / "run", *sculpt(gpt2, tmp_path / "run"))
    (tmp_path / "bare").mkdir()
    refused(call, "cannot be loaded", tmp_path / "run", *sculpt(tmp_path / "bare", tmp_path / "run"))
    if not torch.cuda.is_available():
        arguments = sculpt(base, tmp_path / "run", "--device", "cuda")
        refused(call, "torch sees no CUDA GPU", tmp_path / "run", *arguments)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, errors = call(*sculpt("no-owner/no-model", tmp_path / "run"))  # it may exist: the hub cannot be asked
    assert code == 1 and len(errors.splitlines()) == 1 and "'no-owner/no-model' cannot be loaded" in errors
    (tmp_path / "run").write_text("mine")
    code, _, errors = call(*sculpt(base, tmp_path / "run"))
    assert code == 2 and f"{tmp_path / 'run'} is a file" in errors and (tmp_path / "run").read_text() == "mine"


def test_bad_requests_of_other_commands(call, made, gpt2, tmp_path):
    out, none = made[1], tmp_path / "none"
    file = out / "persona.persona.safetensors"
    other = save_tiny(tmp_path / "other", family="qwen2")
    for arguments, why in (
        (["chat", none], "no such file or folder"),
        (["chat", tmp_path, "--prompt", "Hi"], "neither a persona file"),
        (["chat", file, "--base", other, "--prompt", "Hi"], "does not fit"),
        (["chat", file, "--base", gpt2, "--prompt", "Hi"], "does not fit"),
        (["chat", out, "--json"], "--json needs --prompt"),
        (["chat", out, "--prompt", ""], "the prompt is empty"),
        (["chat", out, "--prompt", "Hi", "--dtype", "int4"], "dtype 'int4'"),
        (["eval", none], "no such file or folder"),
        (["eval", out, "--base", other], "does not fit"),
        (["eval", out, "--questions", "nowhere.json"], "cannot read nowhere.json"),
        (["eval", out / "slim"], "has no persona file"),
        (["inspect", none], "no such file or folder"),
        (["inspect", tmp_path], "no persona file"),
        (["inspect", out / "slim" / "model.safetensors"], "is not a persona file"),
    ):
        refused(call, why, none, *arguments)


def test_words_that_are_no_command(call, base, tmp_path):
    for arguments in (["sculpt"], ["sing"], ["sculpt", "--ratio", "half"], sculpt(base, tmp_path, "--threads", -1)):
        code, said, errors = call(*arguments)
        assert code == 2 and said == "" and "Traceback" not in errors and "Error" in errors


def test_tracebacks_only_with_debug():
    plain, debug = (run("inspect", "nowhere.json", *flag) for flag in ([], ["--debug"]))
    assert plain.returncode == 2 and plain.stderr == "persona-pruner: no such file or folder: nowhere.json\n"
    assert debug.returncode == 1 and "Traceback" in debug.stderr and "InputError" in debug.stderr


def test_what_is_no_fault_of_the_user(call, made, monkeypatch):
    from persona_pruner import doctor

    def report():
        raise ZeroDivisionError("of [red]all[/red]\nthings :boom:")

    monkeypatch.setattr(doctor, "report", report)
    code, _, errors = call("doctor")
    assert code == 1
    assert errors == "persona-pruner: ZeroDivisionError: of [red]all[/red] (--debug shows where)\n"


def test_help_and_version(call):
    assert call("--version")[:2] == (0, f"persona-pruner {__version__}\n")
    commands = ("sculpt", "chat", "eval", "inspect", "doctor")
    assert all(name in call("--help")[1] for name in commands)
    for name in commands:
        code, said, _ = call(name, "--help")
        assert code == 0 and f"Example: persona-pruner {name}" in " ".join(said.split())


def test_inspect(call, made):
    _, out = made
    code, said, _ = call("inspect", out, "--json")
    found = json.loads(said)
    file = PersonaFile.load(out)
    assert code == 0 and found["persona"] == file.name and found["kept"] == [48] * 3 and found["channels"] == 192
    assert found["bytes"] == (out / "persona.persona.safetensors").stat().st_size < 32_768
    card = json.loads(call("inspect", CARDS / "captain.png", "--json")[1])
    assert card["persona"] and card["words"] == len(card["system"].split()) and card["greeting"]
    assert f"{file.base}\n" in call("inspect", out / "persona.persona.safetensors")[1]


def test_eval(call, made):
    numbers = json.loads((made[1] / "metrics.json").read_text())
    code, said, _ = call("eval", made[1], "--dtype", "float32", "--json")
    assert code == 0 and json.loads(said)["kl"] == pytest.approx(numbers["methods"][0]["kl"], rel=1e-3)
    code, said, _ = call("eval", made[1], "--dtype", "float32", "--count", "1")
    assert code == 0 and "questions            1\n" in said and "nll_drop" in said


def test_doctor(call):
    found = json.loads(call("doctor", "--json")[1])
    code, said, _ = call("doctor")
    assert code == 0 and all(op in said for op in found["ops"]["cpu"]) and found["packages"]["torch"] in said


def test_chat_with_one_prompt(call, made, base):
    question = ["--prompt", "Who are you?", "--dtype", "float32", "--max-new-tokens", 24, "--seed", 5]
    answers = {}
    for source in ([made[1]], [made[1] / "persona.persona.safetensors"], [made[1], "--dense"], [made[1] / "slim"]):
        code, said, errors = call("chat", *source, *question)
        answer = json.loads(call("chat", *source, *question, "--json")[1])
        assert code == 0 and errors == "" and said == answer["answer"] + "\n" and answer["answer"]
        answers[answer["answer"]] = answer["character"]
    assert len(answers) == 4 and list(answers.values()) == [PersonaFile.load(made[1]).name] * 3 + ["slim"]
    assert call("chat", made[1], *question, "--seed", 6)[1] not in {f"{answer}\n" for answer in answers}
    bare = call("chat", made[1], *question, "--system", "")[1]
    assert bare == call("chat", made[1] / "slim", *question)[1]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_conversation_from_standard_input(call, made, monkeypatch, end):
    talk = ["chat", made[1], "--dtype", "float32", "--max-new-tokens", 12, "--temperature", 0]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Who are you?\nWhat is iron?{end}\n"))
    code, said, _ = call(*talk)
    greeting, rest = said.split("ends the conversation)\n")
    assert code == 0 and greeting.startswith(f"{PersonaFile.load(made[1]).name}: ")
    _, first, second = (f"\n{rest}").split("you: ")[:3]
    alone = [call(*talk, "--prompt", question)[1] for question in ("Who are you?", "What is iron?")]
    assert first == alone[0] and second.strip() and second != alone[1]  # the second answer has read the first


def test_greetings_are_printed_as_they_are(call, made, base, monkeypatch, tmp_path):
    file = PersonaFile.load(made[1])
    file.name, file.greeting = "Bram", "Hail :smile: [bold]friend[/bold]\t!"
    file.save(tmp_path / "bram.persona.safetensors")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, said, _ = call("chat", tmp_path / "bram.persona.safetensors")
    assert code == 0 and said.startswith(f"Bram: {file.greeting}\n")
