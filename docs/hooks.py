"""What `mkdocs build` adds to the pages in docs/: documents of other folders, the tables of keys, the API reference.

Links in the Markdown files are those of the repository, so that they work on GitHub too. A document outside docs/ keeps
its path in the site; docs/ itself is the site's root, and links are rewritten to match.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("data/README.md", "results/README.md", "kernels/README.md", "CONTRIBUTING.md")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    assert config.nav is not None
    named = str(config.nav)
    config.nav.extend(path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in named)
    config.nav.append({"API": [{name: uri} for name, uri, _ in _api()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, uri, text in _api():
        files.append(File.generated(config, uri, content=f"# {name}\n\n{text}"))
    waiting = [*OUTSIDE, *(f"docs/{file.src_uri}" for file in files.documentation_pages() if not file.generated_by)]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/"):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        for link in _links(path) - seen:
            if (ROOT / link).is_file() and not link.startswith("docs/"):
                waiting.append(link)
                seen.add(link)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    if uri.startswith("api/"):
        return markdown
    path = uri if uri in files.src_uris and (ROOT / uri).is_file() else f"docs/{uri}"
    folder = os.path.dirname(uri)
    markdown = LINK.sub(lambda link: os.path.relpath(_in_site(_in_repository(path, link[1])), folder or "."), markdown)
    return markdown.replace("<!-- keys -->", "".join(_configuration())) if uri == "configuration.md" else markdown


def _links(path: str) -> set[str]:
    if not path.endswith(".md"):
        return set()
    return {_in_repository(path, link) for link in LINK.findall((ROOT / path).read_text())}


def _in_repository(path: str, link: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(path), link))


def _in_site(path: str) -> str:
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _api() -> Iterator[tuple[str, str, str]]:
    """Name, address and text of a page for every package, with its public modules."""
    for source in (ROOT, ROOT / "kernels"):
        for init in sorted(source.glob("dmd2*/**/__init__.py")):
            name = ".".join(init.parent.relative_to(source).parts)
            modules = [f"{name}.{path.stem}" for path in sorted(init.parent.glob("[!_]*.py"))]
            yield name, f"api/{name}.md", _modules([name, *modules])


def _modules(names: list[str]) -> str:
    options = "    options: {show_submodules: false, heading_level: 3}"
    return "".join(f"## {name}\n\n::: {name}\n{options}\n\n" for name in names)


def _configuration() -> Iterator[str]:
    sys.path.insert(0, str(ROOT))
    from dmd2 import config

    for kind, what in (("presets", "Presets"), ("runs", "Runs")):
        yield f"## {what}\n\n| name | description |\n|---|---|\n"
        for path in sorted((ROOT / "workflow" / kind).glob("*.yaml")):
            yield f"| `{path.stem}` | {_cell(yaml.safe_load(path.read_text()).get('description', ''))} |\n"
        yield "\n"
    places: dict[type[BaseModel], str] = {}
    yield "## Keys of a preset\n\n"
    yield from _model(config.Preset, "", places)
    yield "## Keys of a run file\n\n"
    yield from _model(config.RunFile, "", places)


def _model(model: type[BaseModel], key: str, places: dict[type[BaseModel], str]) -> Iterator[str]:
    """The table of a model's keys, then those of the models in it, each at the first key that has it."""
    if key:
        yield f"### `{key}` {{#{_anchor(key)}}}\n\n"
    yield f"{(model.__doc__ or '').strip()}\n\n| key | type | default | description |\n|---|---|---|---|\n"
    below = {}
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        kind = _type(field)
        for inner in _models_in(field.annotation):
            path = f"{key}.{name}{'.NAME' if get_origin(field.annotation) is dict else ''}".lstrip(".")
            if places.setdefault(inner, path) == path:
                below[path] = inner
            kind = kind.replace(inner.__name__, f"[keys](#{_anchor(places[inner])})")
        yield f"| `{name}` | {kind} | {default} | {_cell(field.description or '')} |\n"
    yield "\n"
    for path, inner in below.items():
        yield from _model(inner, path, places)


def _anchor(key: str) -> str:
    return f"keys-{key.replace('.', '-').lower()}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _type(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    rules = [(sign, getattr(rule, name, None)) for rule in field.metadata for name, sign in signs.items()]
    limits = [f"{sign} {limit}" for sign, limit in rules if limit is not None]
    return _cell(", ".join([_name(field.annotation), *limits]))


def _name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if annotation is type(None):
        return "null"
    if hasattr(annotation, "__metadata__"):
        return _name(arguments[0])
    if origin is dict:
        return f"mapping of names to {_name(arguments[1])}"
    if origin in (list, tuple):
        return f"list of {', '.join(_name(argument) for argument in arguments if argument is not Ellipsis)}"
    if arguments:
        return " or ".join(_name(argument) for argument in arguments)
    names = {bool: "true or false", str: "string", int: "integer", float: "number", Any: "any value"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    return names.get(annotation, str(annotation))


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "its defaults"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
    if value is None:
        return "null"
    if isinstance(value, tuple):
        text = f"[{', '.join(map(str, value))}]"
    return f"`{text}`"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
