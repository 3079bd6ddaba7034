"""The results of a text-to-image preset, made in seconds: components that are hardly trained, and random networks."""

from pathlib import Path

import pytest
from toy import shaken
from world import WORKFLOW

from dmd2.datasets.sources import digit_pairs
from dmd2.lineage.plan import Plan
from dmd2.lineage.records import write_record
from dmd2.lineage.spec import Spec
from dmd2.stages import data
from dmd2.stages.components import components
from dmd2.teachers import load_teacher
from dmd2.training.checkpoint_store import save_weights

FEW = {"autoencoder_iterations": 2, "text_iterations": 2}
OVER = {"teacher": {"min_psnr": 0.1, "training": {"components": FEW}}}


def write_results(folder: Path) -> Path:
    """Writes `teacher`, `dmd2_1step` and `dmd2_4step` with their components to `folder`/results and returns that."""
    plan, results = Plan(WORKFLOW, "smoke-t2i", OVER), folder / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_pairs, "EACH", 2)
        data.shards(plan.shards, folder / "shards/manifest.json", None, {}, 1)
    components(plan.components, folder / "shards/manifest.json", results / "components/components.json")
    write_network(results / "teacher/teacher.safetensors", plan.teacher, 0)
    for seed, run in enumerate(("dmd2_1step", "dmd2_4step"), start=1):
        write_network(results / run / "generator.safetensors", plan.train(run), seed)
    return results


def write_network(path: Path, spec: Spec, seed: int) -> None:
    """Weights that are a function of `seed`, with the record of `spec`."""
    bare = spec.need("teacher").model_copy(update={"training": None})
    path.parent.mkdir(parents=True)
    save_weights(path, shaken(load_teacher(bare, spec.need("data")).denoiser, 0.05, seed).state_dict())
    write_record(path, spec)
