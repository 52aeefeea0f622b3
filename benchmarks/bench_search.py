"""Times the mask search against a plain PyTorch loop with the same examples, and checks that both find the same mask.

    persona-pruner bench search --run runs/blacksmith --threads 2 --steps 3
    persona-pruner bench search --run runs/blacksmith --memory
    persona-pruner bench search --run runs/blacksmith --agree 20 --threads 2
    persona-pruner bench search --run runs/blacksmith --curve curve.json --plot curve.png

--run is the output folder of a sculpt; its stored questions and answers are the calibration set of every contestant.

The plain loop is what a careful engineer writes without this package: the model of transformers with its own attention
and MLP, frozen weights (no dW), a hook that multiplies what enters down_proj by a straight-through mask, autograd,
torch.optim.Adam. Each of our packs is given to it as the same examples, sorted by length, in padded micro-batches of
--micro rows whose gradients add up. It is tuned: only places that predict an answer token reach the head, and the
dense model's final states are computed once, not at every step. It does not share the prompt between questions.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from persona_pruner import files, models
from persona_pruner.benchmarks import common
from persona_pruner.evaluation import metrics
from persona_pruner.memory import kept_memory
from persona_pruner.nn import masked
from persona_pruner.packing import pack
from persona_pruner.persona import Persona
from persona_pruner.search import ste
from persona_pruner.search.masks import choose
from persona_pruner.search.scores import Context, channel_scores
from persona_pruner.synthesis.prompts import examples as to_examples


class Plain:
    """The plain loop: straight-through scores, and Fisher scores to start from."""

    def __init__(self, model, examples, micro: int):
        self.model, self.examples, self.micro = model, examples, micro

    def batches(self, rows):
        """(input_ids, attention_mask, where to predict, rows) of padded micro-batches."""
        rows = sorted(rows, key=lambda row: len(self.examples[row].prompt) + len(self.examples[row].answer))
        for first in range(0, len(rows), self.micro):
            part = rows[first : first + self.micro]
            texts = [torch.tensor(self.examples[row].prompt + self.examples[row].answer[:-1]) for row in part]
            ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
            lengths = torch.tensor([len(text) for text in texts])
            place = torch.arange(ids.shape[1])
            begin = torch.tensor([len(self.examples[row].prompt) - 1 for row in part])
            predict = (place >= begin[:, None]) & (place < lengths[:, None])
            yield ids, (place < lengths[:, None]).long(), predict, part

    def logits(self, ids, attention, predict):
        states = self.model.get_decoder()(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        return self.model.lm_head(states[predict]).float()

    def under(self, masks, handler=None):
        """Hooks that multiply what enters each down_proj by its mask."""

        def hook(mask, layer):
            def multiply(_, inputs):
                h = inputs[0] * mask.to(inputs[0].dtype)
                if handler:
                    h.register_hook(handler(layer, inputs[0].detach()))
                return (h,)

            return multiply

        mlps = models.gated_mlps(self.model)
        return [m.down_proj.register_forward_pre_hook(hook(masks[i], i)) for i, m in enumerate(mlps)]

    def fisher(self, packs):
        """As `search.scores.fisher`, with its own labels."""
        sums = [torch.zeros(width) for width in models.widths(self.model)]
        leaves = [torch.ones_like(s, requires_grad=True) for s in sums]
        generator = torch.Generator().manual_seed(0)

        def add(layer, value):
            def square(slope):
                sums[layer].add_((value * slope).float().square().flatten(0, -2).sum(0))

            return square

        handles = self.under(leaves, add)
        try:
            for batch in packs:
                for ids, attention, predict, _ in self.batches(batch.rows):
                    out = self.logits(ids, attention, predict)
                    with torch.no_grad():
                        labels = torch.multinomial(out.softmax(-1), 1, generator=generator)[:, 0]
                    F.cross_entropy(out, labels, reduction="sum").backward()
        finally:
            for handle in handles:
                handle.remove()
        return sums

    def search(self, state, settings, teacher, after_step=lambda masks, loss: None):
        """Straight-through steps from the scores of `state`; returns the masks."""
        scores = [s.clone().requires_grad_() for s in state.scores]
        adam = torch.optim.Adam(scores, lr=settings.lr, betas=(0.9, 0.99), eps=1e-12)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.steps)
        stream = ste.batches(self.examples, settings.budget, settings.seed)
        for _ in range(settings.steps):
            rows = next(stream)[1].rows
            count, total = sum(len(self.examples[row].answer) for row in rows), 0.0
            hard = choose([s.detach() for s in scores], settings.ratio, settings.scope)
            for ids, attention, predict, part in self.batches(rows):
                masks = [h + (s - s.detach()) for h, s in zip(hard, scores, strict=True)]
                handles = self.under(masks)
                try:
                    out = self.logits(ids, attention, predict)
                    if settings.loss == "kl":
                        with torch.no_grad():
                            wanted = self.model.lm_head(torch.cat([teacher[row] for row in part])).float()
                            wanted = wanted.log_softmax(-1)
                        loss = F.kl_div(out.log_softmax(-1), wanted, reduction="sum", log_target=True)
                    else:
                        target = torch.cat([torch.tensor(self.examples[row].answer) for row in part])
                        loss = F.cross_entropy(out, target, reduction="sum")
                    (loss / count).backward()
                finally:
                    for handle in handles:
                        handle.remove()
                total += loss.item() / count
            adam.step()
            adam.zero_grad()
            schedule.step()
            after_step(choose([s.detach() for s in scores], settings.ratio, settings.scope), total)
        return choose([s.detach() for s in scores], settings.ratio, settings.scope)


def load(args):
    """(model, calibration examples, held-out examples) of the run that --run names."""
    stages = Path(args.run) / "stages"
    stored = (files.read_json(stages / f"{name}.json") for name in ("held_out", "questions", "answers"))
    held_out, found, answers = (part["value"] for part in stored)
    model, tokenizer = models.load_model(args.model, dtype=args.dtype)
    system = Persona.load(args.persona).system_prompt()
    questions = [*found["own"], *found["bank"]]
    examples = to_examples(tokenizer, system, questions, answers)[: args.examples]
    return model, examples, to_examples(tokenizer, system, held_out["questions"], held_out["answers"])


def setup(args):
    model, examples, held_out = load(args)
    settings = ste.Settings(steps=args.agree or args.steps, budget=args.budget, seed=args.seed)
    teacher = ste.teacher_states(model, examples, settings.budget)
    generator = torch.Generator().manual_seed(args.seed)
    start = ste.start([torch.rand(width, generator=generator) + 0.1 for width in models.widths(model)], "layer")
    return model, examples, held_out, settings, teacher, start


def step_times(args) -> dict:
    """Seconds of a step of each, in turns, on the same packs from the same scores."""
    model, examples, _, _, teacher, start = setup(args)
    one = ste.Settings(steps=1, budget=args.budget, seed=args.seed)
    plain, times = Plain(model, examples, args.micro), {"plain": [], "ours": []}
    batch = next(ste.batches(examples, one.budget, one.seed))[1]
    for _ in range(args.steps + 1):
        for name in times:
            state = copy.deepcopy(start)
            begun = time.perf_counter()
            if name == "plain":
                plain.search(state, one, teacher)
            else:
                ste.search(model, examples, state, one, teacher)
            times[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(t[1:]) for name, t in times.items()}
    padded = sum(ids.numel() for ids, *_ in plain.batches(batch.rows))
    return {
        "answer_tokens": len(batch.target),
        "examples": len(batch.rows),
        "tokens": {"plain": padded, "ours": len(batch.input_ids)},
        "seconds": median,
        "gain": median["plain"] / median["ours"],
        "all": times,
    }


def agreement(args) -> dict:
    """Share of channels on which both masks agree after the same steps from the same scores."""
    model, examples, _, settings, teacher, start = setup(args)
    first = choose(start.scores, settings.ratio)
    theirs = Plain(model, examples, args.micro).search(start, settings, teacher)
    ours = ste.search(model, examples, start, settings, teacher)
    pairs = list(zip(ours, theirs, strict=True))
    share = lambda pairs: sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)  # noqa: E731
    moved = 1 - share(list(zip(ours, first, strict=True)))
    return {"steps": settings.steps, "same": share(pairs), "changed_by_the_search": moved}


def peak(args) -> dict:
    """MB of memory at the highest, one process each."""
    found = {}
    for name in ("plain", "ours"):
        command = [sys.executable, "-P", "-m", "persona_pruner.cli", "bench", "search", "--only", name]
        for option in ("run", "model", "persona", "dtype", "micro", "examples", "budget", "threads"):
            command += [f"--{option}", str(getattr(args, option))]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[name] = json.loads(out.splitlines()[-1])
    return found | {"share": found["ours"]["peak"] / found["plain"]["peak"]}


def alone(args) -> None:
    """One step of one contestant; prints this process's memory before and at the highest."""
    import resource

    model, examples, _, _, teacher, start = setup(args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    one = ste.Settings(steps=1, budget=args.budget, seed=args.seed)
    if args.only == "plain":
        Plain(model, examples, args.micro).search(start, one, teacher)
    else:
        ste.search(model, examples, start, one, teacher)
    print(json.dumps({"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


CONTESTANTS = {
    "plain, random start, CE": ("plain", "ce"),
    "ours": ("ours", "kl"),
    "plain, from scores, KL": ("plain", "kl"),
}


def curve(args) -> dict:
    """name -> [seconds, held-out KL of the mask] from the calibration set on, scores included; measuring stops the
    clock. What the file holds already is not run again."""
    path = Path(args.curve)
    done = files.read_json(path)["curves"] if path.exists() else {}
    model, examples, held_out, _, teacher, start = setup(args)
    reference = metrics.dense_reference(model, held_out)
    for name, (kind, loss) in CONTESTANTS.items():
        if name not in done:
            settings = ste.Settings(loss=loss, steps=args.steps, budget=args.budget, seed=args.seed)
            done[name] = points_of(kind, model, examples, reference, teacher, start, settings, args.micro)
            files.write_json(path, {"machine": common.machine(), "settings": vars(args), "curves": done})
            print(name, [[round(s, 1), round(kl, 3)] for s, kl in done[name]], flush=True)
    if args.plot:
        plot(done, args.plot)
    return done


def points_of(kind, model, examples, reference, teacher, start, settings, micro) -> list:
    """[seconds, KL] after 0, 1, 2, ... steps; the paper's loss, CE, starts from random scores, KL from Fisher's."""
    points, plain, clock, begun = [], Plain(model, examples, micro), 0.0, time.perf_counter()

    def mark(masks):
        nonlocal begun, clock
        clock += time.perf_counter() - begun
        with masked(model, masks):
            points.append([clock, metrics.fidelity(model, reference).kl])
        begun = time.perf_counter()

    state = start
    if settings.loss == "kl":
        packs = pack(examples, settings.budget)
        fisher = plain.fisher(packs) if kind == "plain" else channel_scores("fisher", Context(model, packs))
        state = ste.start(fisher, "layer")
    mark(choose(state.scores, settings.ratio))
    if kind == "plain":
        plain.search(state, settings, teacher, lambda masks, loss: mark(masks))
    else:
        ste.search(model, examples, state, settings, teacher, lambda now: mark(choose(now.scores, settings.ratio)))
    return points


def plot(curves: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="seconds from the calibration set on", ylabel="KL to the dense model, held-out", yscale="log")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


@kept_memory()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("bench search", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", required=True, help="output folder of a sculpt")
    parser.add_argument("--persona", default="examples/cards/blacksmith.json")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--examples", type=int, default=192, help="use the first so many of the calibration set")
    parser.add_argument("--budget", type=int, default=1536, help="tokens of a pack")
    parser.add_argument("--micro", type=int, default=4, help="rows of a padded micro-batch of the plain loop")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--agree", type=int, default=0, help="compare the masks after so many steps")
    parser.add_argument("--memory", action="store_true", help="peak memory, each in a process of its own")
    parser.add_argument("--only", choices=["plain", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--curve", help="KL on held-out questions against seconds, into this JSON file")
    parser.add_argument("--plot", help="the curve as a picture")
    parser.add_argument("--json", help="also write the result to this file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.only:
        return alone(args)
    measure = curve if args.curve else agreement if args.agree else peak if args.memory else step_times
    found = {"settings": vars(args), "machine": common.machine(), measure.__name__: measure(args)}
    print(json.dumps(found[measure.__name__], indent=1))
    if args.json:
        files.write_json(Path(args.json), found)


if __name__ == "__main__":
    main()
