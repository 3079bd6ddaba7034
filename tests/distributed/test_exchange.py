"""What ranks exchange in a step: gradients in buckets, bad terms, logged means; and how a loss of one is reported."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from events import wait_until
from forked import join, on_ranks
from torch import nn

from dmd2.config import Runtime
from dmd2.cost.overlap import departures
from dmd2.errors import Interrupted, UserError
from dmd2.training import ranks
from dmd2.training.checkpoint_store import CheckpointStore
from dmd2.training.gradient_buckets import Buckets, buckets_of
from dmd2.training.log import TrainLog
from dmd2.training.loop import fit
from dmd2.training.optimizer import FiniteGuard, Optimizer, warmup

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    rng = torch.Generator().manual_seed(0)
    built = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    for p in built.parameters():
        p.data = torch.randn(p.shape, generator=rng)
    # A weight in another memory order, as networks in channels_last have.
    built[2].weight = nn.Parameter(built[2].weight.data.T.contiguous().T)
    return built


def sample(rank: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(10 + rank))


def exchanged(rank: int, world: int, port: int, out: Path) -> None:
    """Gradients by buckets of two sizes, with and without overlap, over two passes; and when buckets left."""
    join(rank, world, port)
    found: dict[str, Any] = {}
    with ranks.process_group(CPU):
        for size in (1, 200, 10**6):
            for overlap in (True, False):
                built = network()
                buckets = Buckets(list(built.parameters()), size)
                built(sample(rank)).sum().backward()
                if overlap:
                    with buckets.overlapping():
                        built(sample(rank) + 1).sum().backward()
                    assert len(buckets._under_way) == len(buckets._buckets), "all left within the backward pass"
                else:
                    built(sample(rank) + 1).sum().backward()
                    assert buckets._under_way == []
                buckets.finish()
                grads = {name: p.grad for name, p in built.named_parameters()}
                storages = {grad.untyped_storage().data_ptr() for grad in grads.values()}
                assert len(storages) == len(buckets._buckets), "gradients lie in what was exchanged"
                assert all(p.grad.stride() == p.stride() for p in built.parameters())
                found[f"{size} {overlap}"] = {name: grad.clone() for name, grad in grads.items()}
        found["twice"] = second_pass_is_refused(rank)
        torch.save(found, out / f"{rank}.pt")


def traced(rank: int, world: int, port: int, out: Path) -> None:
    """How many gradients were there when each bucket left, from a trace of a backward pass, and as predicted."""
    join(rank, world, port)
    arrived: dict[nn.Parameter, int] = {}
    sent: list[tuple[int, int]] = []
    all_reduce = dist.all_reduce

    def noted(flat: torch.Tensor, **options: Any) -> Any:
        sent.append((flat.numel() * 4, len(arrived)))
        return all_reduce(flat, **options)

    with ranks.process_group(CPU), patch.object(dist, "all_reduce", noted):
        built = network()
        params = list(built.parameters())
        for param in params:
            param.register_post_accumulate_grad_hook(lambda p: arrived.__setitem__(p, len(arrived) + 1))
        buckets = Buckets(params, 200)
        with buckets.overlapping():
            built(sample(rank)).sum().backward()
        buckets.finish()
    predicted = [
        (each.num_bytes, round(each.done * len(params)))
        for each in departures(params, arrived, 0, len(params), bucket_bytes=200)
    ]
    torch.save({"sent": sent, "predicted": predicted, "num": len(params)}, out / f"{rank}.pt")


def test_buckets_leave_during_backward_when_the_overlap_command_says(tmp_path: Path):
    on_ranks(2, traced, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one == other, "both ranks exchange in the same order"
    assert one["sent"] == one["predicted"]
    during = [num for _, num in one["sent"] if num < one["num"]]
    assert len(during) == len(one["sent"]) - 1 > 0, "all but the last leave before the last gradient is there"


def second_pass_is_refused(rank: int) -> str:
    built = network()
    buckets = Buckets(list(built.parameters()), 1)
    try:
        with buckets.overlapping():
            built(sample(rank)).sum().backward()
            built(sample(rank)).sum().backward()
    except RuntimeError as error:
        buckets.finish()
        return str(error)
    return "nothing"


def test_gradients_become_means_whatever_the_buckets_and_the_overlap(tmp_path: Path):
    on_ranks(2, exchanged, tmp_path)
    wanted = {}
    built = network()
    for rank in range(2):
        for shift in (0, 1):
            (built(sample(rank) + shift).sum() / 2).backward()
    wanted = {name: p.grad for name, p in built.named_parameters()}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert "a second backward pass" in found.pop("twice")
        assert len(found) == 6
        for grads in found.values():
            for name, grad in grads.items():
                torch.testing.assert_close(grad, wanted[name], rtol=1e-6, atol=1e-6)


def test_buckets_hold_every_parameter_once_from_the_last_to_the_first():
    params = [nn.Parameter(torch.zeros(n)) for n in (10, 20, 30, 1000, 5)]
    params.append(nn.Parameter(torch.zeros(7, dtype=torch.float64)))
    buckets = buckets_of(params, 4 * 50)
    assert [p.numel() for bucket in buckets for p in bucket] == [7, 5, 1000, 30, 20, 10]
    assert [len(bucket) for bucket in buckets] == [1, 2, 2, 1], "a bucket is closed once it is full, or by a dtype"


def watched(rank: int, world: int, port: int, out: Path) -> None:
    """A loss that is not finite on the second rank alone, in the second of three updates; and logged means."""
    join(rank, world, port)
    with ranks.process_group(CPU):
        built, guard = network(), FiniteGuard(CPU)
        descent = Optimizer(
            built, learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.0, grad_clip=1.0, rate=warmup(0)
        )
        weights = []
        for index in range(3):
            built(sample(rank)).sum().backward()
            bad = index == 1 and rank == 1
            terms = {"good_loss": torch.tensor(1.0), "bad_loss": torch.tensor(float("inf") if bad else 1.0)}
            descent.step(index, guard, terms, "norm")
            weights.append(built[0].weight.detach().clone())
        reported = ""
        try:
            guard.raise_if_tripped()
        except UserError as error:
            reported = str(error)
        with TrainLog(out, 0, enabled=rank == 0) as rows:
            for index in range(2):
                rows.add({"loss": torch.tensor(float(10 * rank + index))})
            row = rows.flush(2, {})
        torch.save({"weights": weights, "error": reported, "loss": row["loss"]}, out / f"{rank}.pt")


def test_term_that_is_bad_on_one_rank_stops_all_at_the_same_update(tmp_path: Path):
    on_ranks(2, watched, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["error"] == other["error"]
    assert one["error"].startswith("step 2: bad_loss not finite")
    for mine, theirs in zip(one["weights"], other["weights"], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(one["weights"][0], one["weights"][2]), "neither update was made"
    assert one["loss"] == other["loss"] == (0 + 1 + 10 + 11) / 4, "a row is the mean over the ranks"
    assert [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [5.5]


class Idle:
    """A trainee that does nothing; `at` is called at steps of its own."""

    def __init__(self, at: dict[int, Callable[[], object]] | None = None) -> None:
        self.guard, self.at = FiniteGuard(CPU), at or {}

    def step(self, index: int) -> dict[str, torch.Tensor]:
        self.at.get(index, bool)()
        return {"loss": torch.tensor(0.0)}

    def export(self) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(1)}

    state_dict = export

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in folder.glob("step-*.json"))


def fitted(rank: int, world: int, port: int, out: Path) -> None:
    """Loops of seven iterations: by the clock of one rank, and with a signal to one rank in the third or the last."""
    join(rank, world, port)
    minutes = {"clock": 1e-9 if rank == 1 else 1e9, "third": 1e9, "last": 1e9}
    signalled = {"clock": None, "third": 2, "last": 6}
    reported = {}
    with ranks.process_group(CPU):
        for name, index in signalled.items():
            at = {index: lambda: os.kill(os.getpid(), signal.SIGTERM)} if index is not None and rank == 1 else {}
            runtime = Runtime(log_every=100, checkpoint_every=100, checkpoint_minutes=minutes[name])
            try:
                with CheckpointStore(out / name, "a" * 16, keep=100, in_background=True) as store:
                    fit(Idle(at), 7, store, runtime, title=name)
                reported[name] = "done"
            except Interrupted as stop:
                reported[name] = f"{stop.status} {stop}"
    torch.save(reported, out / f"{rank}.pt")


def test_ranks_save_and_stop_together_though_one_alone_received_the_signal(tmp_path: Path):
    on_ranks(2, fitted, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one == other
    assert one["clock"] == "done"
    assert kept(tmp_path / "clock") == [2, 4, 6, 7], "one iteration after the clock, and once for each time it is up"
    assert one["third"].startswith("143 SIGTERM: saved after iteration 4")
    assert kept(tmp_path / "third") == [4]
    assert one["last"].startswith("143 SIGTERM: saved after iteration 7")
    assert kept(tmp_path / "last") == [7]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("[/pytorch/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation"),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1\nmore"),
        dist.DistNetworkError("The client socket has timed out after 60000ms"),
    ],
)
def test_lost_rank_is_one_line_that_says_where_and_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"^rank 3 of 8, in the mean of x: another rank ended or was silent") as e:
        raise_in("the mean of x", error)
    assert "\n" not in str(e.value)
    assert str(error).partition("\n")[0] in str(e.value)
    assert "Run the same command again" in str(e.value)


def waiting_in_vain(rank: int, world: int, port: int, out: Path) -> None:
    """Three exchanges under way when the other rank falls silent: one times out, and takes the others with it."""
    join(rank, world, port)
    with ranks.process_group(CPU, timeout_minutes=0.01):
        if rank == 0:
            works = [dist.all_reduce(torch.ones(3), async_op=True) for _ in range(3)]
            for work in works:
                with pytest.raises(UserError, match="another rank ended or was silent"), ranks.exchange("x"):
                    work.wait()
            (out / "done").touch()
        else:
            wait_until((out / "done").exists)


def test_every_exchange_with_a_silent_rank_ends_in_that_line(tmp_path: Path):
    on_ranks(2, waiting_in_vain, tmp_path)
    assert (tmp_path / "done").exists()


def test_other_errors_pass_an_exchange_as_they_are():
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        raise_in("x", RuntimeError("CUDA out of memory"))
    with pytest.raises(UserError, match=r"^inner$"):
        raise_in("x", UserError("inner"))


def raise_in(what: str, error: Exception) -> None:
    with ranks.exchange(what):
        raise error
