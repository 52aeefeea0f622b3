"""Times transformers' `generate` on a dense model and on the same model with its block linears packed 2:4.

    persona-pruner bench generate --threads 1 2 --tokens 64 --rounds 3

Contestants: dense in float32 and bfloat16, 2:4 with bfloat16 and with int8 values (the largest weights are kept: what
the model says is worth nothing, what it costs does not depend on it). Before anything is timed, the bfloat16 model is
held against the dense model with zeros, token for token (where their choices part, by how many steps of bfloat16), and
every int8 layer against its dequantized weight. Decoding is timed after the prompt, greedily; contestants take turns
and a figure is the median of the rounds. Bytes are those of parameters and buffers; on a CPU the kernels read these.
"""

import argparse
import copy
import math

import torch

from persona_pruner import models
from persona_pruner.benchmarks import common
from persona_pruner.evaluation.speed import decode_speeds
from persona_pruner.nn.sparse import block_linears, desparsify_, packed_layers, sparsify_
from persona_pruner.synthesis.prompts import prompt_ids

SYSTEM = "You are Borin, a blacksmith of few words."
QUESTIONS = ("Who are you?", "What is iron good for?", "Tell me about the sea.", "How do I keep a fire alive?")
STEPS = 4  # of bfloat16, by which rounding may part the best two tokens


def steps_apart(high: float, low: float) -> float:
    """How many steps of bfloat16 at `high` lie between two logits."""
    return (high - low) / 2.0 ** (math.floor(math.log2(max(abs(high), 1e-30))) - 7)


@torch.inference_mode()
def compare_tokens(packed, zeros, prompts, tokens):
    """Equal texts of so many, equal choices after the same text of so many places, and the most steps elsewhere."""
    found = {"texts": 0, "of": len(prompts), "places": 0, "all": 0, "steps": 0.0}
    ends = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for prompt in prompts:
        ids = torch.tensor([prompt])
        want, got = (
            m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, **ends)
            for m in (zeros, packed)
        )
        found["texts"] += torch.equal(want, got)
        logits, other = (m(want).logits[0, len(prompt) - 1 : -1].float() for m in (zeros, packed))
        best, chosen = logits.argmax(-1), other.argmax(-1)
        found["places"] += int((best == chosen).sum())
        found["all"] += len(best)
        for place in (best != chosen).nonzero()[:, 0].tolist():
            pair = logits[place, best[place]].item(), logits[place, chosen[place]].item()
            found["steps"] = max(found["steps"], steps_apart(*pair))
    if found["steps"] > STEPS:
        raise SystemExit(
            f"generate: packed and dense-with-zeros are {found['steps']:.1f} steps apart; nothing is timed"
        )
    return found


def check_layers(model):
    """The largest relative error of a packed layer against its dequantized weight, for random inputs."""
    worst = 0.0
    for name, layer in packed_layers(model).items():
        x = torch.randn(3, layer.in_features).to(layer.weight.dtype)
        want = torch.nn.functional.linear(x.double(), layer.to_linear(torch.float64).weight)
        bias = getattr(layer, "bias", None)
        error = layer(x).double() - (want if bias is None else want + bias.double())
        worst = max(worst, (error.norm() / want.norm()).item())
        if not worst <= 0.02:
            raise SystemExit(f"generate: {name} is off by {worst:.3f}; nothing is timed")
    return worst


def size_of(model) -> int:
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def main(argv=None):
    parser = argparse.ArgumentParser(
        "bench generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=models.SMOLLM2, help="alias, folder or hub name")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--json", help="write the same with the machine to this file")
    args = parser.parse_args(argv)
    about, rows = common.machine(), []
    print(about)
    wide, tokenizer = models.load_model(args.model, dtype=torch.float32)
    dense = copy.deepcopy(wide).to(torch.bfloat16)
    packed, whole = copy.deepcopy(dense), copy.deepcopy(dense)
    reports = {"2:4 bf16": sparsify_(packed), "2:4 int8": sparsify_(whole, dtype=torch.int8)}
    prompts = [prompt_ids(tokenizer, SYSTEM, question) for question in QUESTIONS]
    found = compare_tokens(packed, desparsify_(copy.deepcopy(packed)), prompts, args.tokens)
    about |= {"tokens": found, "int8 layer error": check_layers(whole)}
    print(
        f"2:4 bf16 against dense with zeros: {found['texts']} of {found['of']} texts equal; after the same text "
        f"the same choice at {found['places']} of {found['all']} places, elsewhere {found['steps']:.1f} steps of "
        f"bfloat16 apart at most; int8 layers within {about['int8 layer error']:.4f}"
    )
    forms = {"dense fp32": wide, "dense bf16": dense, "2:4 bf16": packed, "2:4 int8": whole}
    linears = sum(linear.weight.nbytes for linear in block_linears(dense).values())
    for threads in args.threads:
        torch.set_num_threads(threads)
        speeds = dict(
            zip(forms, decode_speeds(list(forms.values()), prompts[0], args.tokens, args.rounds), strict=True)
        )
        for name, model in forms.items():
            block = reports[name].bytes_after if name in reports else linears * (2 if name == "dense fp32" else 1)
            row = {"threads": threads, "form": name, "tokens/s": speeds[name]}
            row |= {f"over {peer}": speeds[name] / speeds[peer] for peer in ("dense fp32", "dense bf16")}
            rows.append(row | {"block MB": block / 1e6, "model MB": size_of(model) / 1e6})
            print(
                f"{threads} threads, {name}: {row['tokens/s']:.1f} tokens/s, {row['over dense fp32']:.2f}x dense fp32, "
                f"{row['over dense bf16']:.2f}x dense bf16; block linears {block / 1e6:.1f} MB "
                f"({block / linears:.2f}x bf16), model {rows[-1]['model MB']:.1f} MB",
                flush=True,
            )
    common.write(rows, {"machine": about}, args.csv, args.json)


if __name__ == "__main__":
    main()
