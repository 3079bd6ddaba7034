"""Reads presets and runs from YAML. Does not import torch (used by the workflow).

A *preset* (`workflow/presets/NAME.yaml`) sets data, teacher and scale; a *run* (`workflow/runs/NAME.yaml`) sets how a
student is trained. Both are YAML mappings with at most one parent (`extends: NAME`). A run's keys override the preset's
`train` section, and the preset may override a run by name under `runs`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dmd2.config import DiffusersTeacherConfig, Preset, Run, RunFile, TeacherConfig, Train
from dmd2.errors import UserError, closest, suggestion

M = TypeVar("M", bound=BaseModel)
SHOWN = 100
"""Characters of a wrong value in a message."""


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Reads the mapping in a YAML file. Raises UserError naming the file and line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        stems = [p.stem for p in path.parent.glob("*.yaml")]
        raise UserError(f"{path}: no such file; {suggestion(path.stem, stems)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error})") from None
    return read_mapping(text, str(path))


if TYPE_CHECKING:
    _FastLoader = yaml.SafeLoader
else:
    _FastLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast, where PyYAML has it


class _Loader(_FastLoader):
    """YAML's safe loader that rejects duplicate keys, of which PyYAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key `{key.value}` twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """The value of a YAML text. Planning reads the same few files hundreds of times."""
    return yaml.load(text, _Loader)


def read_mapping(text: str, where: str) -> dict[str, Any]:
    """Parses the mapping in a YAML or JSON text; empty text is {}. Raises UserError naming `where` and the line."""
    try:
        content = copy.deepcopy(_parsed(text))
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping of keys to values")
    return content


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merges `over` into a copy of `base`: mappings key by key; other values replace."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_chain(folder: Path | str, name: str, *, _seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """`folder/name.yaml` over its parents (`extends: NAME`, at most one each). Raises UserError on a cycle."""
    if name in _seen:
        raise UserError(f"{Path(folder) / name}.yaml: `extends` is a cycle: {' -> '.join((*_seen, name))}")
    content = read_yaml(Path(folder) / f"{name}.yaml")
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise UserError(f"{Path(folder) / name}.yaml: `extends` must be one name, got {parent!r}")
    return merge(read_chain(folder, parent, _seen=(*_seen, name)), content)


def parse(model: type[M], content: Mapping[str, Any], where: str) -> M:
    """Validates `content` as `model`. Raises UserError with a line per problem: file, key, value, rule, suggestion."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [_explain(model, problem) for problem in error.errors()]
        raise UserError(f"{where}: " + f"\n{where}: ".join(problems)) from None


def overrides(content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of Snakemake's `--config` that override the preset's; the others choose the preset or execution."""
    return {key: value for key, value in content.items() if key not in ("preset", "presets", "mirror", "pending")}


def load_preset(folder: Path | str, name: str, overrides: Mapping[str, Any] | None = None) -> Preset:
    """Loads the preset `name` from `folder`/presets, with the user's overrides. Raises UserError if it is invalid."""
    for key in overrides or {}:
        if key not in Preset.model_fields and closest(key, ["preset"]):
            raise UserError(f"unknown key `{key}`; did you mean 'preset'?")
    content = merge(read_chain(Path(folder) / "presets", name), overrides or {})
    return parse(Preset, {"name": name, **content}, f"preset {name}")


SEEDED = re.compile(r"(?P<run>.+)_seed(?P<seed>[0-9]+)")
"""`NAME_seedN` is the run NAME with training seed N, which also applies to its `init_run`."""


def load_run(folder: Path | str, name: str, preset: Preset) -> Run:
    """Loads the run `name` (or `NAME_seedN`) from `folder`/runs, merged with `preset`. Raises UserError if invalid."""
    seeded = None if (Path(folder) / "runs" / f"{name}.yaml").exists() else SEEDED.fullmatch(name)
    base = seeded["run"] if seeded else name
    file = parse(RunFile, read_chain(Path(folder) / "runs", base), f"run {base}")
    keys = merge(merge(preset.train.model_dump(exclude_unset=True), file.train), preset.runs.get(base, {}))
    if seeded:
        if file.weights is not None:
            raise UserError(f"run {name}: {base} is imported, and a training seed changes nothing; use {base}")
        parent = keys.get("init_run")
        keys |= {"seed": int(seeded["seed"])} | ({"init_run": f"{parent}_seed{seeded['seed']}"} if parent else {})
    where = f"run {name} on preset {preset.name}"
    train = parse(Train, keys, where)
    try:
        preset.check(train)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return Run(name=name, description=file.description, train=train, weights=file.weights, own=file.own)


def checked_import(run: Run, preset: Preset) -> Run:
    """The run itself. Raises UserError for an import that does not go with the preset's kind of teacher."""
    of_diffusers = {"own": run.own, "weights.lora_rank": run.weights and run.weights.lora_rank}
    found = [key for key, value in of_diffusers.items() if value is not None]
    if found and not isinstance(preset.teacher, DiffusersTeacherConfig):
        raise UserError(
            f"run {run.name} on preset {preset.name}: `{found[0]}` belongs to teachers of kind diffusers, not "
            f"{preset.teacher.kind}; use another preset"
        )
    return run


_KINDS: dict[str, type[BaseModel]] = {
    "edm": TeacherConfig,
    "mixture": TeacherConfig,
    "diffusers": DiffusersTeacherConfig,
}
"""The kinds of teachers, which pydantic adds to the path of a problem in a teacher's keys."""


def _explain(model: type[BaseModel], problem: Any) -> str:
    """One line for one pydantic problem, with a suggestion for a misspelt key."""
    loc = problem["loc"]
    shown = [part for before, part in zip(("", *loc), loc, strict=False) if before != "teacher" or part not in _KINDS]
    key = ".".join(map(str, shown))
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kind = problem["input"].get("kind") if isinstance(problem["input"], Mapping) else None
        return f"{key}.kind is {kind!r}; {suggestion(str(kind), list(_KINDS))}" if kind else f"missing key `{key}.kind`"
    if problem["type"] == "extra_forbidden":
        fields = _fields_at(model, problem["loc"][:-1])
        return f"unknown key `{key}`; {suggestion(str(problem['loc'][-1]), fields)}"
    if problem["type"] == "missing":
        return f"missing key `{key}`"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    value = repr(problem["input"])
    shown_value = value if len(value) <= SHOWN else f"{value[: SHOWN - 3]}..."
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"`{key}` is {shown_value}: input should be a mapping of keys to values, such as {{key: value}}"
    return f"`{key}` is {shown_value}: {message[0].lower()}{message[1:]}"


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the model at `loc` below `model`."""
    for part in loc:
        if part in _KINDS:
            model = _KINDS[str(part)]
            continue
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if nested:
            model = nested[0]
    return list(model.model_fields)
