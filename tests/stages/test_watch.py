"""The page about running jobs: what it shows, and that it changes nothing of what it reads."""

import base64
import threading
import urllib.error
import urllib.request
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.stages.watch import Watch, server
from dmd2.teachers import load_teacher

ROOT = Path(__file__).parents[2]
ROW = '{"step": 5, "matching_loss": 0.5, "neighbour_ratio": 0.6}\n'


@pytest.fixture
def plan() -> Plan:
    small = {"network": {"model_channels": 16, "channel_mult": [1], "attn_resolutions": [], "channels_per_head": 16}}
    return Plan(ROOT / "workflow", "smoke", {"teacher": small})


@pytest.fixture
def folder(tmp_path: Path, plan: Plan) -> Path:
    """Two trainings with a snapshot, one of which is of another network, and a job in progress."""
    spec = plan.train("dmd2")
    network = load_teacher(spec.need("teacher").model_copy(update={"training": None}), spec.need("data"), seed=0)
    weights = {name: value.contiguous() for name, value in network.denoiser.state_dict().items()}
    for run, content in {"dmd2": weights, "noreg": {name: weights[name] for name in list(weights)[:2]}}.items():
        state = tmp_path / f"state/{run}-0123456789abcdef"
        state.mkdir(parents=True)
        (state / "log.jsonl").write_text(ROW)
        save_file(content, state / "snapshot-00000005.safetensors")
    log = tmp_path / "logs/smoke/train/dmd2.log"
    log.parent.mkdir(parents=True)
    log.write_text("started\n12:00:00 dmd2: 25% 5/20 <fast>\n")
    marked = tmp_path / ".snakemake/incomplete"
    marked.mkdir(parents=True)
    (marked / base64.b64encode(b"results/smoke/dmd2/generator.safetensors").decode()).touch()
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_page_shows_jobs_curves_and_newest_samples_and_only_reads(folder: Path, plan: Plan):
    before = contents(folder)
    with server(Watch(folder, plan), "127.0.0.1", 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{serving.server_port}/"
        text = urllib.request.urlopen(address).read().decode()
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}state/")
        with pytest.raises(UserError, match=r"--port \d+: .*choose another"):
            server(Watch(folder, plan), "127.0.0.1", serving.server_port)
        serving.shutdown()
    assert contents(folder) == before
    assert "results/smoke/dmd2/generator.safetensors" in text
    assert "5/20 &lt;fast&gt;" in text
    assert text.count("data:image/svg+xml") == 1
    assert text.count("data:image/png") == 1
    assert "dmd2, iteration 5</figcaption>" in text
    assert "noreg, iteration 5: " in text  # of another network: said, not shown


def test_folder_in_which_nothing_runs(tmp_path: Path, plan: Plan):
    text = Watch(tmp_path, plan).page()
    assert "none" in text
    assert "<img" not in text
