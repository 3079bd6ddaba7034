"""Two processes against one: the same batch, split, gives the same gradients, updates and checkpoints."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import start
from ranks import collectives, steps, stopped_fit, update
from torch import Tensor
from toy import assert_equal, flat
from trainees import Source, distillation

from dmd2.errors import UserError
from dmd2.training import ranks


def on_two_ranks(function: Callable[..., Any], out: Path, *arguments: Any) -> list[dict[str, Any]]:
    """Runs `function` on two gloo ranks; what each saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(function, rank, 2, port, out, *arguments) for rank in range(2)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_collectives_and_updates_of_two_ranks_equal_one_process(tmp_path: Path):
    for found in on_two_ranks(collectives, tmp_path):
        assert_equal(found["average"], [torch.full((2, 3), 0.5), torch.tensor(5.0)])
        assert found["notices"] == [[0, 0], [0, 1], [5, 11], [12, 10]], "known one call later, or at once on request"
        torch.testing.assert_close(found["update"], update(0, 1), rtol=1e-6, atol=1e-7)


def test_distillation_on_two_ranks_equals_one_process_with_the_whole_batch(latents: Path, tmp_path: Path):
    one, other = on_two_ranks(steps, tmp_path, latents, 5)
    assert_equal(one, other)
    whole = distillation(Source(latents))
    for index in range(5):
        whole.step(index)
    alone = flat(whole.state_dict())
    assert flat(one).keys() == alone.keys()
    for name, value in flat(one).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                value, alone[name], rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_one_rank_requested_to_stop_stops_all_and_they_resume_exactly(latents: Path, tmp_path: Path):
    one, other = on_two_ranks(stopped_fit, tmp_path, latents)
    assert one["stopped"] == other["stopped"] == "SIGTERM: saved after iteration 7; run the same command to resume"
    assert_equal(one["weights"], other["weights"])
    resumed, straight = (torch.load(tmp_path / f"{name}-0.pt", weights_only=True) for name in ("resumed", "straight"))
    assert_equal(resumed, straight)


def test_one_process_averages_and_waits_for_nothing():
    tensor = torch.ones(3)
    ranks.average([tensor])
    ranks.barrier()
    assert torch.equal(tensor, torch.ones(3))
    notices = ranks.AsyncFlags()
    assert [notices(3, 0), notices(0, 1, now=True)] == [[3, 0], [0, 1]]
    with ranks.process_group(torch.device("cpu")):
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("batch", "world", "remedy"), [(280, 16, "use 272 or 288"), (3, 8, "use 8"), (7, 2, "use 6 or 8")]
)
def test_batch_that_ranks_cannot_share_is_refused_with_a_remedy(
    batch: int, world: int, remedy: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(UserError, match=f"batch_size {batch} is not divisible by {world} ranks; {remedy}$"):
        ranks.local_share(batch)
    assert ranks.local_share(world * 5) == 5


def test_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=r"runtime\.device is cuda, but torch finds no CUDA device"):
        ranks.device_of("cuda")
    assert ranks.device_of("auto") == ranks.device_of("cpu") == torch.device("cpu")
