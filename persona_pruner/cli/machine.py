"""doctor, bench: what this machine has, and how fast it is."""

from typing import Annotated

import typer

from persona_pruner.cli.app import Json, app, console, example, print_json
from persona_pruner.errors import InputError


@app.command(epilog=example("persona-pruner doctor"))
def doctor(as_json: Json = False):
    """Versions, processor, threads, and which backend every op uses, and why not the others."""
    from rich.table import Table

    from persona_pruner import doctor as examination

    found = examination.report()
    if as_json:
        return print_json(found)
    table = Table("what", "value", title=f"persona-pruner {found['persona_pruner']}, Python {found['python']}")
    for name, version in found["packages"].items():
        table.add_row(name, version)
    cpu = found["cpu"]
    table.add_row("CPU kernels", f"{cpu['isa']} on {cpu['machine']}, {cpu['threads']} threads")
    table.add_row("fast bf16 products", "yes" if cpu["fast_bf16"] else "no (dtype auto is float32)")
    table.add_row("CUDA module", found["cuda"]["module"])
    table.add_row("cuSPARSELt", found["cuda"]["cusparselt"])
    table.add_row("GPUs", ", ".join(found["cuda"]["devices"]) or "none")
    console.print(table, soft_wrap=False)
    for device, ops in found["ops"].items():
        rows = Table("op", "backend", "state", title=f"ops on {device}; automatic choice takes the first that is ready")
        for op, backends in ops.items():
            for backend, state in backends.items():
                rows.add_row(op, backend, state)
        console.print(rows, soft_wrap=False)


@app.command(
    epilog=example("persona-pruner bench linear24 --short"),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench(
    context: typer.Context,
    op: Annotated[
        str,
        typer.Argument(
            help="linear24, select24, importance, subset_ffn, search, generate, fleet or serve; "
            "its own options follow (--help)."
        ),
    ] = "",
):
    """Time an op against other ways to compute the same; every result is checked before it is timed."""
    from importlib import import_module
    from pkgutil import iter_modules

    folder = import_module("persona_pruner.benchmarks").__path__
    names = sorted(m.name.removeprefix("bench_") for m in iter_modules(folder) if m.name.startswith("bench_"))
    if op not in names:
        raise InputError(f"bench takes one of {', '.join(names)}, then that benchmark's options")
    import_module(f"persona_pruner.benchmarks.bench_{op}").main(context.args)
