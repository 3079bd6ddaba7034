"""EDM's pickles are read exactly; hostile and damaged ones execute nothing and end in one line."""

import builtins
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from edm_by_hand import randomised
from edm_pickles import edm_pickle
from hostile import Call, watching, with_storage
from torch import nn

from dmd2 import config
from dmd2.errors import UserError
from dmd2.teachers import load_teacher, outline
from dmd2.teachers.safe_pickle import read_edm_pickle
from dmd2.teachers.weights import read_network

DATA = config.Data(source="digits", resolution=8, channels=1, num_classes=10, levels=17)
NETWORK = config.Network(
    model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8
)
TEACHER = config.TeacherConfig(kind="edm", network=NETWORK)


@pytest.fixture
def executed(tmp_path: Path) -> Iterator[list[str]]:
    """What was executed during the test, reading the test's own file aside."""
    path = tmp_path / "warm.pkl"
    path.write_bytes(edm_pickle(nn.Linear(1, 1)))
    read_edm_pickle(path)  # torch's own first-call imports happen here
    with watching() as events:
        yield events


def write(folder: Path, content: bytes) -> Path:
    path = folder / "network.pkl"
    path.write_bytes(content)
    return path


def network(seed: int = 0) -> nn.Module:
    return randomised(load_teacher(TEACHER, DATA).denoiser, seed)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_edm_pickle_is_read_bit_exactly_in_order_without_running_its_source(tmp_path: Path, protocol: int):
    flag, source = tmp_path / "flag", network()
    path = write(tmp_path, edm_pickle(source, f"open({str(flag)!r}, 'w')", protocol, augment_pipe={1, 2}))
    state = read_edm_pickle(path)
    assert list(state) == list(source.state_dict())
    assert all(torch.equal(state[name], value) for name, value in source.state_dict().items())
    assert not flag.exists()


def test_teacher_can_be_loaded_from_a_pickle(tmp_path: Path):
    source = network()
    loaded = load_teacher(TEACHER, DATA, write(tmp_path, edm_pickle(source))).denoiser
    x, sigma, cond = torch.randn(2, 1, 8, 8), torch.ones(2), {"label": torch.tensor([1, 2])}
    assert torch.equal(loaded(x, sigma, cond), source(x, sigma, cond))


def test_views_of_shared_storage_are_read_as_their_own_values(tmp_path: Path):
    module = nn.Module()
    values = torch.arange(12.0)
    module.register_buffer("turned", values.view(3, 4).t())
    module.register_buffer("part", values[5:9])
    state = read_edm_pickle(write(tmp_path, edm_pickle(module)))
    assert torch.equal(state["turned"], values.view(3, 4).t())
    assert torch.equal(state["part"], values[5:9])


def test_network_of_a_pickle_has_the_order_and_dtypes_of_the_expected_one(tmp_path: Path):
    source = network()
    path = write(tmp_path, edm_pickle(source.half()))
    state = read_network(path, dict(reversed(outline(TEACHER, DATA).state_dict().items())))
    assert list(state) == list(reversed(source.state_dict()))
    assert all(value.dtype == torch.float32 for value in state.values())
    assert all(torch.equal(state[name], value.float()) for name, value in source.state_dict().items())


def test_pickle_of_another_network_is_refused_by_its_keys(tmp_path: Path):
    wider = NETWORK.model_copy(update={"channel_mult": (1, 3)})
    expected = outline(TEACHER.model_copy(update={"network": wider}), DATA).state_dict()
    path = write(tmp_path, edm_pickle(network()))
    with pytest.raises(UserError, match=r"network\.pkl: not the weights .* mismatching: model\.enc\.4x4_block0\.conv0"):
        read_network(path, expected)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    source = network()
    source.model.out_norm.bias.data[3] = float("nan")
    path = write(tmp_path, edm_pickle(source))
    with pytest.raises(UserError, match=r"1 containing NaN or infinity: model\.out_norm\.bias"):
        read_network(path, outline(TEACHER, DATA).state_dict())


def attacks(flag: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would touch `flag` under a plain loader, and what the error must tell."""
    touch = f"touch {flag}"
    code = f"open({str(flag)!r}, 'w')"
    plain = {
        "os.system": (Call(os.system, touch), f"blocked global '{os.name}.system'"),
        "eval": (Call(builtins.eval, code), "blocked global 'builtins.eval'"),
        "exec": (Call(builtins.exec, code), "blocked global 'builtins.exec'"),
        "popen": (Call(subprocess.Popen, ["touch", str(flag)]), "blocked global 'subprocess.Popen'"),
        "getattr": (Call(getattr, Call(__import__, "os"), "system"), "blocked global 'builtins.getattr'"),
        "torch.load": (Call(torch.load, str(flag)), "blocked global 'torch.serialization.load'"),
        "partial": (Call(__import__("functools").partial, os.system, touch), "blocked global 'functools.partial'"),
    }
    dumped = {name: (pickle.dumps({"ema": value}, 4), reported) for name, (value, reported) in plain.items()}
    unicode = [pickle.SHORT_BINUNICODE + bytes([len(s)]) + s for s in (b"collections", b"OrderedDict.__init__")]
    order = b"ccollections\nOrderedDict\n"
    opcodes = {
        "protocol 0": (f"cos\nsystem\n(S'{touch}'\ntR.".encode(), "blocked global 'os.system'"),
        "INST": (f"(S'{touch}'\nios\nsystem\n.".encode(), "blocked global 'os.system'"),
        "OBJ": (f"(cos\nsystem\nS'{touch}'\no.".encode(), "blocked global 'os.system'"),
        "dotted": (
            b"\x80\x04" + unicode[0] + unicode[1] + pickle.STACK_GLOBAL + b".",
            "blocked global 'collections.OrderedDict.__init__'",
        ),
        "state on a class": (order + b"(N}S'__new__'\nNstb.", "not a pickle in EDM's format, or truncated"),
        "call of a record": (order + b")R)R.", "not a pickle in EDM's format, or truncated"),
        "extension": (b"\x80\x02\x82\x01.", "extension code 1"),
        "persistent id": (b"Pos.system\n.", "persistent id"),
        "huge memo index": (b"\x80\x04Nr\xff\xff\xff\xff.", "holds no `ema` network"),
        "huge bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00.", "not a pickle in EDM's format, or truncated"),
        "huge number": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "not a pickle in EDM's format, or truncated"),
        "nested pickle": (with_storage(pickle.dumps(Call(os.system, touch), 2)), f"blocked global '{os.name}.system'"),
        "huge bytearray": (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "a buffer without data"),
        "tuple as key": (b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.", "a key of type tuple"),
        "tuple in a set": (b"\x80\x04\x8f(" + b")" + b"\x85" * 200_000 + b"\x90.", "a key of type tuple"),
        "not a pickle": (b"PK\x03\x04 something else", "not a pickle in EDM's format, or truncated"),
        "empty": (b"", "not a pickle in EDM's format, or truncated"),
        "not a network": (pickle.dumps({"ema": 3}), "'ema' is int, not a module"),
    }
    return dumped | opcodes


@pytest.mark.parametrize("name", list(attacks(Path("flag"))))
def test_hostile_pickle_executes_nothing_and_names_what_it_requested(name: str, tmp_path: Path, executed: list[str]):
    flag = tmp_path / "flag"
    content, reported = attacks(flag)[name]
    path = write(tmp_path, content)
    executed.clear()
    with pytest.raises(UserError) as caught:
        read_edm_pickle(path)
    assert reported in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert [event for event in executed if str(path) not in event] == []
    assert not flag.exists()


def test_hostile_pickles_would_act_under_a_plain_loader(tmp_path: Path):
    flag = tmp_path / "flag"
    for name in ("os.system", "eval", "exec", "protocol 0", "INST", "OBJ"):
        pickle.loads(attacks(flag)[name][0])
        assert flag.exists(), name
        flag.unlink()


def test_module_that_appears_twice_is_refused(tmp_path: Path):
    twice = nn.Module()
    twice.a = twice.b = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"module 'b\.' appears twice"):
        read_edm_pickle(write(tmp_path, edm_pickle(twice)))


def test_truncation_at_any_point_is_a_user_error(tmp_path: Path):
    content = edm_pickle(nn.Linear(2, 2))
    for length in range(0, len(content), 7):
        with pytest.raises(UserError, match=r"truncated|holds no"):
            read_edm_pickle(write(tmp_path, content[:length]))
