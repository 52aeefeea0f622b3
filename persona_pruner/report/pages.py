"""The HTML templates of this folder: base.html holds what all pages share."""

from functools import cache
from urllib.parse import quote

from persona_pruner.report import facts


@cache
def template(name: str):
    """A Jinja template that escapes what is put in and refuses names that are not given."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("persona_pruner", "report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "size": facts.size_in_bytes,
        "signed": facts.signed,
        "percent": facts.percent,
        "path": quote,
    }
    return environment.get_template(name)
