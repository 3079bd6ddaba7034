"""A stage that a server of preloaded packages runs is, to its caller, the process that it would have been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from events import wait_for_end
from preload_world import COMMANDS, STAGE, World, line

from dmd2.commands import preload_server, preloaded


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="dmd2-") as sockets:  # a socket's path is short
        made = World(tmp_path, Path(sockets))
        yield made
        made.end()


def test_stage_finds_what_a_process_of_its_own_finds(world: World):
    env = {"SOME": "value \udcff", "OMP_NUM_THREADS": "3"}
    _, parent, preloaded = world.say("facts", "two words", **env)
    _, own_parent, plain = world.say("facts", "two words", module="dmd2", **env)
    assert own_parent == os.getpid() != parent
    for found in (plain, preloaded):
        found["env"].pop("LC_CTYPE", None)
    assert preloaded == plain


@pytest.mark.slow
def test_packages_have_the_threads_that_the_caller_says(world: World):
    shutil.rmtree(world.root / "packages")
    stage = STAGE.replace("name, *rest", 'os.environ.update(OMP_NUM_THREADS="2", MKL_NUM_THREADS="2")\nname, *rest', 1)
    (world.root / "dmd2/__main__.py").write_text(stage)  # as the option's handler does
    unset: dict[str, str | None] = {name: None for name in os.environ if name.endswith("_NUM_THREADS")}
    by_option = ("--threads=2", "threads"), unset
    by_variable = ("threads",), {**unset, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    _, own_parent, plain = world.say(*by_option[0], module="dmd2", **unset)
    assert own_parent == os.getpid()
    seeds = []
    for arguments, env in (by_option, by_variable):
        _, parent, found = world.say(*arguments, **env)
        assert parent != os.getpid()
        assert found[:2] == plain[:2]
        assert found[0] == 2
        seeds.append(found[2:])
    assert all(first != second for first, second in zip(*seeds, strict=True)), "seeds are its own"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["echo"], 0, "on stderr\n"),
        (["end", "3"], 3, ""),
        (["end", "None"], 0, ""),
        (["end", "'a reason'"], 1, "a reason\n"),
        (["raise"], 1, "ValueError: nothing repaired it\n"),
        (["kill", "9"], -9, ""),
        (["kill", "15"], -15, ""),
        (["kill", "11"], 128 + 11, ""),
    ],
)
def test_caller_ends_as_its_stage(world: World, arguments: list[str], status: int, said: str):
    found, out, err = world.run(*arguments, stdin="from the caller")
    assert found == status
    assert out == ("FROM THE CALLER" if arguments == ["echo"] else "")
    assert err.endswith(said)
    assert world.num_servers == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_reaches_the_stage_and_its_status_the_caller(world: World, signum: signal.Signals):
    caller = world.start("wait")
    stage, server, _ = line(caller.stdout)
    assert stage != caller.pid
    assert psutil.Process(server).status() != psutil.STATUS_ZOMBIE
    os.killpg(caller.pid, signum)  # as a terminal does: the stage stands in no group of its caller's
    caller.communicate(timeout=100)
    assert caller.returncode == 100 + signum


def test_stopped_caller_stops_its_stage(world: World):
    caller = world.start("wait")
    stage = psutil.Process(line(caller.stdout)[0])
    for signum, wanted in ((signal.SIGTSTP, True), (signal.SIGCONT, False)):
        caller.send_signal(signum)
        end = time.monotonic() + 100
        while any((p.status() == psutil.STATUS_STOPPED) != wanted for p in (stage, psutil.Process(caller.pid))):
            assert time.monotonic() < end
            time.sleep(0.01)
    caller.terminate()
    caller.communicate(timeout=100)
    assert caller.returncode == 100 + signal.SIGTERM


def test_stage_is_killed_with_its_caller(world: World):
    caller = world.start("wait")
    line(caller.stdout)
    caller.kill()
    out, _ = caller.communicate(timeout=100)  # it returns when the stage, too, has closed these files
    assert out == ""
    assert world.say("say")[2] == "old", "the server goes on"
    assert world.num_servers == 1


def test_server_leaves_signals_to_all_processes_to_its_stages(world: World):
    caller = world.start("wait")
    _, server, _ = line(caller.stdout)
    os.kill(server, signal.SIGTERM)
    caller.terminate()
    caller.communicate(timeout=100)
    assert caller.returncode == 100 + signal.SIGTERM
    assert world.say("say")[1] == server


def test_stage_starts_again_when_the_server_dies(world: World, tmp_path: Path):
    caller = world.start("twice", str(tmp_path / "begun"))
    _, server, _ = line(caller.stdout)
    os.kill(server, signal.SIGKILL)
    out, err = caller.communicate(timeout=100)
    assert (caller.returncode, out) == (0, "")
    assert err == "warning: the server of preloaded stages died; the stage starts again without it\n"


def test_stage_that_was_terminated_does_not_start_again(world: World):
    caller = world.start("wait")
    stage, server, _ = line(caller.stdout)
    os.kill(stage, signal.SIGSTOP)
    caller.terminate()
    psutil.Process(server).kill()
    caller.communicate(timeout=100)
    assert caller.returncode == -signal.SIGTERM


def test_dead_servers_socket_is_replaced(world: World):
    _, server, _ = world.say("say")
    os.kill(server, signal.SIGKILL)
    wait_for_end(server)
    assert any(path.is_socket() for path in (world.sockets / f"dmd2-preload-{os.getuid()}").iterdir())
    _, another, _ = world.say("say")
    assert another not in (server, os.getpid())
    assert world.num_servers == 2


@pytest.mark.parametrize("case", ["switched off", "one of several", "no folder", "open folder", "a file", "long path"])
def test_stage_runs_without_a_server(world: World, case: str):
    env = {"switched off": {"DMD2_PRELOAD": "0"}, "one of several": {"LOCAL_WORLD_SIZE": "2"}}.get(case, {})
    folder = world.sockets / f"dmd2-preload-{os.getuid()}"
    if case == "no folder":
        env = {"TMPDIR": str(world.sockets / "gone")}
    elif case == "open folder":
        folder.mkdir()
        folder.chmod(0o777)
    elif case == "a file":
        folder.touch()
    elif case == "long path":
        (world.sockets / ("x" * 100)).mkdir()
        env = {"TMPDIR": str(world.sockets / ("x" * 100))}
    assert world.say("say", **env)[1:] == (os.getpid(), "old")
    assert world.num_servers == 0


def test_server_that_cannot_be_is_not_tried_at_each_call(world: World):
    world.torch.write_text(world.torch.read_text() + "raise RuntimeError('a library does not fit')\n")
    for _ in range(2):
        assert world.say("say")[1:] == (os.getpid(), "old")
    assert world.num_servers == 1
    assert "a library does not fit" in (world.sockets / f"dmd2-preload-{os.getuid()}/log").read_text()


def test_two_first_callers_start_one_server(world: World):
    gate = world.root / "gate"
    os.mkfifo(gate)
    world.torch.write_text(world.torch.read_text() + f"open({str(gate)!r}).close()\n")
    callers = [world.start("say") for _ in range(2)]
    gate.open("w").close()  # it waits until a server imports
    reported = [json.loads(caller.communicate(timeout=100)[0]) for caller in callers]
    assert reported[0][0] != reported[1][0]
    assert reported[0][1] == reported[1][1] != os.getpid()
    assert world.num_servers == 1


def test_next_stage_runs_edited_code_in_the_same_server(world: World):
    _, server, said = world.say("say")
    main = world.root / "dmd2/__main__.py"
    main.write_text(STAGE.replace('say("old")', "import dmd2.added\n    say(dmd2.added.__doc__)"))
    (world.root / "dmd2/added.py").write_text('"""new"""')
    _, parent, edited = world.say("say")
    assert (said, edited) == ("old", "new")
    assert parent == server


def test_only_what_imports_read_asks_for_another_server(world: World):
    servers = [world.say("say", **env)[1] for env in ({}, {"DMD2_RUNTIME": "x", "PATH": "/bin"}, {"TORCH_LOGS": "all"})]
    assert servers[0] == servers[1] != servers[2]


def test_server_without_work_ends():
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        assert preload_server.Server(listener).serve(idle_s=0) is None


def test_caller_imports_no_package():
    code = "import sys, dmd2.commands.preloaded; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(COMMANDS.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "typer", "pydantic", "subprocess"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "options", "command"),
    [
        (["--threads", "2", "--log=a", "train", "--spec", "x"], {"--threads": "2", "--log": "a"}, "train"),
        (["table"], {}, "table"),
        (["--help"], {"--help": ""}, ""),
    ],
)
def test_options_before_the_command(arguments: list[str], options: dict[str, str], command: str):
    assert preloaded.leading_options(arguments) == (options, command)
