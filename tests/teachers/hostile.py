"""Files that try to make their reader run something, or to exhaust it: generated from seeds, and watched while read."""

import io
import pickle
import pickletools
import random
import resource
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from edm_pickles import edm_pickle
from torch import nn

EVENTS = ("exec", "compile", "open", "import", "marshal.loads", "pickle.find_class", "code.__new__")
FAMILIES = ("os.", "subprocess.", "ctypes.", "socket.", "shutil.", "pty.", "glob.", "webbrowser.", "urllib.")
watched: list[str] | None = None


def audit(event: str, args: tuple[Any, ...]) -> None:
    """Notes whatever could come of running a file's content, while a test watches."""
    if watched is not None and (event in EVENTS or event.startswith(FAMILIES)):
        watched.append(f"{event} {args[0] if args else ''!r}")


sys.addaudithook(audit)


@contextmanager
def watching() -> Iterator[list[str]]:
    """What Python is made to do within the block, as it is done."""
    global watched
    events: list[str] = []
    watched = events
    try:
        yield events
    finally:
        watched = None


@contextmanager
def little_memory(spare: int) -> Iterator[None]:
    """Within the block the process cannot get more than `spare` bytes of address space beyond what it has."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def soon(seconds: float) -> Iterator[None]:
    """The block takes at most so much processor time."""
    begun = time.process_time()
    yield
    took = time.process_time() - begun
    assert took < seconds, f"took {took:.1f} s"


def text(value: str | bytes) -> bytes:
    """The opcodes that push a short text."""
    raw = value.encode() if isinstance(value, str) else value
    return pickle.BINUNICODE + len(raw).to_bytes(4, "little") + raw


def data(value: bytes) -> bytes:
    """The opcodes that push bytes."""
    return pickle.BINBYTES + len(value).to_bytes(4, "little") + value


def named(name: str) -> list[bytes]:
    """The ways of a pickle to push a global."""
    module, _, attribute = name.rpartition(".")
    return [
        f"c{module}\n{attribute}\n".encode(),
        text(module) + text(attribute) + pickle.STACK_GLOBAL,
    ]


CALLED = (
    *("os.system", "posix.system", "os.popen", "os.execl", "os.putenv", "subprocess.Popen", "subprocess.check_output"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.open", "builtins.__import__", "builtins.getattr"),
    *(
        "builtins.bytearray",
        "builtins.globals",
        "importlib.import_module",
        "runpy.run_path",
        "pty.spawn",
        "ctypes.CDLL",
    ),
    *("functools.partial", "operator.attrgetter", "operator.methodcaller", "types.FunctionType", "types.CodeType"),
    *("copyreg._reconstructor", "codecs.decode", "webbrowser.open", "socket.create_connection", "pickle.loads"),
    *("marshal.loads", "shelve.open", "logging.FileHandler", "pathlib.Path.touch", "collections.OrderedDict.fromkeys"),
    *("numpy.load", "numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.fromfile", "numpy.memmap"),
    *("torch.load", "torch.serialization.load", "torch.jit.load", "torch.hub.load", "torch.ops.load_library"),
    *("torch.utils.cpp_extension.load", "torch._utils._rebuild_tensor", "torch.storage.UntypedStorage.from_file"),
    *("torch_utils.persistence._src_to_module", "torch_utils.persistence.persistent_class", "dnnlib.util.open_url"),
)
ALLOWED = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")


def fragments(flag: Path) -> list[bytes]:
    """Runs of opcodes that would touch `flag`, or exhaust memory or stack, under a loader that does what they say."""
    touch, code = f"touch {flag}", f"open({str(flag)!r}, 'w')"
    found = []
    for name in (*CALLED, *ALLOWED):
        argument = text(code if name in ("builtins.eval", "builtins.exec") else touch)
        first, second = named(name)
        found += [first + argument + b"\x85R", second + argument + b"\x85R", first + argument + b"\x85\x81"]
        found += [first + argument + b"\x85}\x92", b"(" + first + argument + b"o"]
        module, _, attribute = name.rpartition(".")
        found.append(b"(" + argument + f"i{module}\n{attribute}\n".encode())
    system = named("builtins.getattr")[0] + b"(" + named("os.path")[0] + text("os") + b"tR" + text("system")
    found.append(named("builtins.getattr")[0] + b"(" + system + b"tR" + text(touch) + b"\x85R")
    hostile = pickle.dumps(Call(__import__("os").system, touch), 2)
    for wrapped in (hostile, old_torch_file(hostile)):
        found.append(named("torch.storage._load_from_bytes")[0] + data(wrapped) + b"\x85R")
    records = [named(name)[0] + b")R" for name in ("collections.OrderedDict", "dnnlib.util.EasyDict")]
    for record in records:
        for key in ("__class__", "__setstate__", "__reduce__", "__init__", "name", "items", "args"):
            found += [
                record + b"}" + text(key) + named("os.system")[0] + b"sb",
                record + b"N}" + text(key) + b"Ns\x86b",
            ]
    found += [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"Pos.system\n", text("os.system") + b"Q"]
    return found + bombs()


def bombs() -> list[bytes]:
    """Runs of opcodes that ask for more memory, stack or time than a file of their size may."""
    huge = [2**24, 2**31 - 1, 2**33, 2**40, 2**62, 2**64 - 1]
    found = [op + n.to_bytes(8, "little") for n in huge for op in (b"\x8d", b"\x8e", b"\x95", b"\x96")]
    found += [op + b"\xff\xff\xff\x7f" for op in (b"Nr", b"j", b"B", b"X", b"T", b"\x8b")]
    found += [b"\x97", b"\x98", b"I" + b"9" * 5000 + b"\n", b"L" + b"9" * 5000 + b"L\n"]
    found += [b")" + b"\x85" * 20_000, b"]" + b"2a" * 2000, b"]" + b"]a" * 2000, b"(" * 5000, b"N" + b"2" * 5000]
    found += [b"}" + b")" + b"\x85" * 200_000 + b"Ns", b"\x8f(" + b")" + b"\x85" * 200_000 + b"\x90"]
    found.append(named("torch._utils._rebuild_tensor_v2")[0] + b"(NK\x00(J\xff\xff\xff\x7ft(K\x00tNNtR")
    return found


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def old_torch_file(content: bytes, at: int = 3) -> bytes:
    """A file of torch before 1.6 whose pickle number `at`, of five, is `content`."""
    good = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, None, [])]
    return b"".join([*good[:at], content, *good[at + 1 :]])


def with_pickle(archive: bytes, pickled: bytes, **extra: bytes) -> bytes:
    """A file of torch with another pickle in it, and further entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(out, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, pickled if entry.filename.endswith("data.pkl") else source.read(entry))
        for name, content in extra.items():
            target.writestr(f"archive/{name}", content)
    return out.getvalue()


def with_storage(content: bytes) -> bytes:
    """An EDM pickle whose tensor says that its values are in the nested file `content`."""
    reduce = lambda storage: (torch.storage._load_from_bytes, (content,))  # noqa: E731
    with mock.patch.object(torch.storage.TypedStorage, "__reduce__", reduce):
        return edm_pickle(nn.Linear(1, 1))


def unframed(content: bytes) -> bytes:
    """The same pickle without frames, so that opcodes can be put in."""
    frames = [at for opcode, _, at in pickletools.genops(content) if opcode.name == "FRAME" and at is not None]
    for at in reversed(frames):
        content = content[:at] + content[at + 9 :]
    return content


def injected(content: bytes, fragment: bytes, rng: random.Random) -> bytes:
    """A pickle with a run of opcodes between two of its own; half the time what they push is taken away again."""
    places = [at for _, _, at in pickletools.genops(content) if at]
    at = rng.choice(places)
    return content[:at] + fragment + rng.choice([b"", b"0"]) + content[at:]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Up to four bytes replaced, removed, doubled, or exchanged for an opcode or a hostile global."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.randint(1, 9)]
        elif kind == 2:
            changed[at:at] = changed[at : at + rng.randint(1, 20)]
        elif kind == 3:
            changed[at : at + 1] = rng.choice([b"R", b"b", b"o", b"\x81", b"\x93", b"0", b"2", b"s", b"u", b"e", b"}"])
        else:
            changed[at:at] = rng.choice([b"cos\nsystem\n", b"cbuiltins\neval\n", b"\x8c\x02os\x8c\x06system\x93"])
    return bytes(changed)


def soup(rng: random.Random, flag: Path) -> bytes:
    """Opcodes in any order, with globals that EDM's files have and some that they have not."""
    known = [named(name)[rng.randrange(2)] for name in ALLOWED]
    bits = [bytes([op.code.encode("latin1")[0]]) for op in pickletools.opcodes if op.arg is None]
    values = [
        b"K\x01",
        b"M\x00\x01",
        text("_parameters"),
        text("ema"),
        data(b"x"),
        b"q\x00",
        b"h\x00",
        b"]",
        b"}",
        b")",
    ]
    length = rng.randint(3, 40)
    return b"\x80\x04" + b"".join(rng.choice([*bits, *values, *known]) for _ in range(length)) + rng.choice([b".", b""])
