"""State dicts of `torch.save` are read; hostile and damaged files execute nothing and end in one line."""

import builtins
import io
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from hostile import Call, old_torch_file, watching, with_pickle

from dmd2.errors import UserError
from dmd2.teachers.torch_file import read_torch_file
from dmd2.teachers.weights import read_weights

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.tensor(3)}
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:'torch.load' received a zip")
NO_STATE = "not a state dict of torch.save, or truncated"


def saved(content: object, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_is_read_in_either_format_without_the_prefix_of_a_wrapper(
    zipped: bool, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(saved({prefix + name: value for name, value in STATE.items()}, zipped=zipped))
    found = read_weights(path)
    assert list(found) == list(STATE)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in STATE.items())


def attacks(flag: Path) -> dict[str, tuple[bytes, str]]:
    """Files that would touch `flag` under a plain loader, and what the error must say."""
    touch, code, good = f"touch {flag}", f"open({str(flag)!r}, 'w')", saved(STATE)
    calls = {
        f"{os.name}.system": Call(os.system, touch),
        "builtins.eval": Call(builtins.eval, code),
        "builtins.exec": Call(builtins.exec, code),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(flag)]),
        "builtins.getattr": Call(getattr, Call(__import__, "os"), "system"),
        "functools.partial": Call(__import__("functools").partial, os.system, touch),
        "torch.serialization.load": Call(torch.load, str(flag)),
    }
    pickles = {name: (pickle.dumps({"a": call}, 2), "blocked global '") for name, call in calls.items()}
    pickles |= {
        "protocol 0": (f"cos\nsystem\n(S'{touch}'\ntR.".encode(), "blocked global 'os.system'"),
        "INST": (f"(S'{touch}'\nios\nsystem\n.".encode(), NO_STATE),
        "OBJ": (f"(cos\nsystem\nS'{touch}'\no.".encode(), "blocked global 'os.system'"),
        "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.", NO_STATE),
        "extension": (b"\x80\x02\x82\x01.", NO_STATE),
    }
    files = {f"zip: {name}": (with_pickle(good, content), reported) for name, (content, reported) in pickles.items()}
    files |= {f"old: {name}": (old_torch_file(content), reported) for name, (content, reported) in pickles.items()}
    script = {"constants.pkl": pickle.dumps((), 2), "code.py": b"open('flag', 'w')"}
    return files | {
        "TorchScript": (with_pickle(good, pickle.dumps({}, 2), **script), "a TorchScript archive, not a state dict"),
        "truncated": (good[: len(good) // 2], NO_STATE),
        "empty": (b"", NO_STATE),
        "a list": (saved([1]), "holds list, not a state dict"),
        "a nested state dict": (saved({"model": STATE}), "entry 'model' is dict, not a tensor"),
    }


@pytest.mark.parametrize("name", list(attacks(Path("flag"))))
def test_a_hostile_or_damaged_file_executes_nothing_and_is_refused(name: str, tmp_path: Path) -> None:
    path, flag = tmp_path / "weights.bin", tmp_path / "flag"
    content, reported = attacks(flag)[name]
    path.write_bytes(content)
    with watching() as events, pytest.raises(UserError) as caught:
        read_torch_file(path)
    assert reported in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    acts = [event for event in events if not event.startswith(("open", "import 'torch", "import 'encodings"))]
    assert acts == []
    assert not flag.exists()
