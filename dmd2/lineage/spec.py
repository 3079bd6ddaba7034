"""The inputs of a stage, and the digest that decides when it runs again. Does not import torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr

from dmd2.config import AnyTeacher, Data, Evaluation, Features, Model, Pairs, Prompts, Sampler, StudentWeights, Train
from dmd2.config.reading import parse, read_mapping, read_yaml

VERSIONS = {
    "shards": 2,
    "components": 1,
    "latents": 1,
    "features": 1,
    "reference": 2,
    "teacher": 1,
    "pairs": 1,
    "train": 3,
    "import": 1,
    "sample": 1,
    "metrics": 2,
    "latency": 1,
    "curve": 1,
    "select": 3,
    "table": 1,
}
"""The version of each stage's algorithm: increase it when a code change changes what the stage writes."""


class Spec(Model):
    """Everything that determines what a stage writes: the keys it reads and the digests of its inputs' stages.

    The workflow passes it to the command line as one canonical string, a change of which also triggers a rerun: a stage
    cannot read a key that is not in its digest.
    """

    stage: str
    name: str
    version: int
    data: Data | None = None
    teacher: AnyTeacher | None = None
    features: Features | None = None
    pairs: Pairs | None = None
    sampler: Sampler | None = None
    evaluation: Evaluation | None = None
    prompts: Prompts | None = None
    train: Train | None = None
    weights: StudentWeights | None = None
    upstream: dict[str, str] = Field({}, description="digests of the stages whose outputs this one reads")
    _inputs: tuple[Spec, ...] = PrivateAttr(())

    @classmethod
    def of(cls, stage: str, name: str, upstream: Mapping[str, Spec] | None = None, **sections: Any) -> Spec:
        """The spec of `stage` for the artifact `name`, with the digests of its `upstream` specs."""
        digests = {key: spec.digest for key, spec in (upstream or {}).items()}
        spec = cls(stage=stage, name=name, version=VERSIONS[stage], upstream=digests, **sections)
        spec._inputs = tuple((upstream or {}).values())
        return spec

    @property
    def inputs(self) -> tuple[Spec, ...]:
        """The specs whose digests are in `upstream`; none for a spec that was read from a file or command line."""
        return self._inputs

    def to_json(self) -> str:
        """The canonical form: sorted keys, no white space, all defaults.

        For a file with a SHA-256 it has the name without the folder, so that moving a file triggers nothing; `located`
        restores the path.
        """
        content = _folderless(self.model_dump(mode="json", exclude_none=True))
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    def located(self, files: Mapping[str, str]) -> Spec:
        """The spec with the paths of its files replaced by `files`, a mapping from SHA-256 to path."""
        return Spec.model_validate(_located(self.model_dump(), files)) if files else self

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the canonical form without the name and the paths of files.

        A data set is identified by its source's fingerprint, a file by its SHA-256 if one is set.
        """
        content = _placeless(self.model_dump(mode="json", exclude_none=True, exclude={"name"}))
        content.get("data", {}).pop("path", None)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def need(self, section: str) -> Any:
        """The section `section`. Raises ValueError if the spec lacks it (a bug in the rule)."""
        value = getattr(self, section)
        if value is None:
            raise ValueError(f"stage {self.stage} reads `{section}`, which its spec lacks")
        return value


def _placeless(value: Any) -> Any:
    """`value` without the `path` of any mapping that has a `sha256`."""
    if not isinstance(value, dict):
        return value
    return {key: _placeless(item) for key, item in value.items() if key != "path" or "sha256" not in value}


def files_in(content: Any) -> dict[str, str]:
    """SHA-256 -> path of every file with a SHA-256 in a configuration (nested mappings)."""
    if not isinstance(content, Mapping):
        return {}
    found = {str(content["sha256"]): str(content["path"])} if content.get("sha256") and "path" in content else {}
    for item in content.values():
        found |= files_in(item)
    return found


def _folderless(value: Any) -> Any:
    """`value` with the `path` of any mapping that has a `sha256` reduced to the file's name."""
    if not isinstance(value, dict):
        return value
    cut = {key: _folderless(item) for key, item in value.items()}
    return {**cut, "path": Path(cut["path"]).name} if "sha256" in cut and "path" in cut else cut


def _located(value: Any, files: Mapping[str, str]) -> Any:
    if not isinstance(value, dict):
        return value
    found = {key: _located(item, files) for key, item in value.items()}
    return {**found, "path": files[found["sha256"]]} if found.get("sha256") in files else found


def read_spec(text_or_path: str) -> Spec:
    """Parses a spec from its canonical string, or from `@FILE` (JSON or YAML)."""
    if text_or_path.startswith("@"):
        return parse(Spec, read_yaml(text_or_path[1:]), text_or_path[1:])
    return parse(Spec, read_mapping(text_or_path, "--spec"), "--spec")
