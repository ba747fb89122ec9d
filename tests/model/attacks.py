"""Pickles made to do harm, written opcode by opcode, and a watch over everything that Python could do."""

import io
import pickle
import struct
import sys
import zipfile
from contextlib import contextmanager

import torch

MAGIC = 0x1950A86A20F9469CFC6C
WATCHED = ("import", "exec", "compile", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "marshal.", "pickle.",
           "code.", "pty.", "builtins.input", "urllib.", "http.", "open")  # fmt: skip
_SEEN: list[str] = []
_WATCHING: list[str] = []


def _hook(event, arguments):
    if _WATCHING and event.startswith(WATCHED) and not (event == "open" and str(arguments[0]) == _WATCHING[0]):
        _SEEN.append(f"{event} {arguments[:1]}"[:200])


sys.addaudithook(_hook)


@contextmanager
def nothing_runs(path):
    """Fail if anything is imported, executed or opened but this file."""
    _SEEN.clear()
    _WATCHING.append(str(path))
    try:
        yield
    finally:
        _WATCHING.clear()
    assert not _SEEN, _SEEN


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module, attribute):
    return text(module) + text(attribute) + b"\x93"


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def storage(elements=4, key="0", kind="FloatStorage"):
    """A persistent id of a tensor's storage."""
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(elements) + b"tQ"


def tensor(size, stride, offset=0, elements=4, **which):
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    shape = b"(" + b"".join(map(number, size)) + b"t(" + b"".join(map(number, stride)) + b"t"
    return rebuild + b"(" + storage(elements, **which) + number(offset) + shape + b"\x89}tR"


def archive(path, content, storages=(("0", bytes(16)),)):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3\n")
        for key, values in storages:
            file.writestr(f"archive/data/{key}", values)


def stream(path, content):
    parts = [pickle.dumps(value, 2) for value in (MAGIC, 1001, {})]
    path.write_bytes(b"".join([*parts, content, pickle.dumps([], 2)]))


def beside(state, attack):
    """The bytes of a file that holds a sound state dict, and the attack after it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as file:
        entries = {entry: file.read(entry) for entry in file.namelist()}
    pickled = next(entry for entry in entries if entry.endswith("data.pkl"))
    entries[pickled] = b"\x80\x04}" + text("model") + entries[pickled][2:-1] + b"s" + text("x") + attack + b"s."
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as file:
        for entry, content in entries.items():
            file.writestr(entry, content)
    return whole.getvalue()


COMMAND = text("touch exploded")
SYSTEM = name("os", "system")
UNKNOWN = name("somewhere.else", "Thing")

# Each of them names something that does harm: (its pickle without protocol and STOP, the name).
HARMFUL = {
    "reduce": (SYSTEM + COMMAND + b"\x85R", "os.system"),
    "reduce by stack": (stack_name("posix", "system") + COMMAND + b"\x85R", "posix.system"),
    "reduce by an attribute": (stack_name("torch", "serialization.os.system") + COMMAND + b"\x85R", "torch.serial"),
    "reduce by memo": (
        text("os") + b"q\x600" + text("system") + b"q\x610" + b"h\x60h\x61\x93" + COMMAND + b"\x85R",
        "os.system",
    ),
    "only named": (SYSTEM, "os.system"),
    "newobj": (name("subprocess", "Popen") + COMMAND + b"\x85\x81", "subprocess.Popen"),
    "newobj_ex": (name("subprocess", "Popen") + COMMAND + b"\x85}\x92", "subprocess.Popen"),
    "inst": (b"(" + COMMAND + b"ios\nsystem\n", "os.system"),
    "obj": (b"(" + SYSTEM + COMMAND + b"o", "os.system"),
    "setstate": (UNKNOWN + b")\x81}" + text("__setstate__") + SYSTEM + b"sb", "os.system"),
    "getattr of a class": (name("builtins", "getattr") + name("torch", "serialization") + text("os.system") + b"\x86R"
        + COMMAND + b"\x85R", "os.system"),
    "getattr step by step": (name("builtins", "getattr") + name("builtins", "getattr") + name("torch", "serialization")
        + text("os") + b"\x86R" + text("system") + b"\x86R" + COMMAND + b"\x85R", "os.system"),
    "getattr of what a call returns": (name("builtins", "getattr") + name("builtins", "getattr")
        + name("torch.nn", "Linear") + text("extra_repr") + b"\x86R" + text("os") + b"\x85R" + text("system") + b"\x86R"
        + COMMAND + b"\x85R", "extra_repr.system"),
    "getattr of globals": (name("builtins", "getattr") + name("torch.nn", "Linear") + text("__init__.__globals__")
        + b"\x86R", "torch.nn.Linear.__init__.__globals__"),
    "a partial of getattr": (name("functools", "partial") + name("builtins", "getattr")
        + name("torch", "serialization") + text("os") + b"\x87R)R", "builtins.getattr"),
    "getattr in a list": (b"(" + name("builtins", "getattr") + b"l", "builtins.getattr"),
    "globals by a whole name": (name("torch.nn", "Linear.__init__.__globals__.get"), "__globals__"),
    "a method of a result is called": (name("builtins", "getattr") + UNKNOWN + b")R" + text("run") + b"\x86R" + COMMAND
        + b"\x85R", ".run"),
    "a method of a result is handed on": (name("functools", "partial") + name("builtins", "getattr") + UNKNOWN + b")R"
        + text("run") + b"\x86R\x85R", ".run"),
    "getattr of an object": (name("builtins", "getattr") + b"}" + text("update") + b"\x86R", "builtins.getattr"),
    "factory": (name("collections", "defaultdict") + SYSTEM + b"\x85R", "os.system"),
    "partial": (name("functools", "partial") + SYSTEM + COMMAND + b"\x86R", "os.system"),
    "storage type": (b"(" + text("storage") + SYSTEM + text("0") + text("cpu") + number(1) + b"tQ", "os.system"),
    "tensor subclass": (
        name("torch._tensor", "_rebuild_from_type_v2") + b"(" + SYSTEM + UNKNOWN + COMMAND + b"\x85}tR",
        "os.system",
    ),
    **{
        f"name {module}.{attribute}": (name(module, attribute) + COMMAND + b"\x85R", attribute)
        for module, attribute in (
            ("builtins", "eval"), ("__builtin__", "eval"), ("builtins", "exec"), ("builtins", "compile"),
            ("builtins", "open"), ("builtins", "__import__"), ("builtins", "getattr"), ("builtins", "setattr"),
            ("nt", "system"), ("sys", "exit"), ("socket", "create_connection"), ("importlib", "import_module"),
            ("shutil", "rmtree"), ("pty", "spawn"), ("ctypes", "CDLL"), ("runpy", "run_path"), ("code", "interact"),
            ("pickle", "loads"), ("_pickle", "loads"), ("marshal", "loads"), ("operator", "attrgetter"),
            ("webbrowser", "open"), ("multiprocessing.util", "spawnv_passfds"), ("asyncio", "run"),
            ("http.client", "HTTPConnection"), ("urllib.request", "urlopen"), ("ftplib", "FTP"), ("requests", "get"),
            ("torch.hub", "load"), ("torch", "load"), ("torch.serialization", "load"), ("numpy", "load"),
            ("io", "open"), ("torch.jit", "load"), ("torch.utils.cpp_extension", "load"),
        )
    },
}  # fmt: skip

# None of these has a name that does harm; each is inert or damage.
ODD = {
    "a stub that is called": UNKNOWN + b")R)R)R",
    "a stub that is built, filled and called": UNKNOWN + b")\x81}b(" + text("a") + text("b") + b"u)R(]]e",
    "a stub as a key": b"}" + UNKNOWN + b")R" + text("v") + b"s",
    "a stub with magic attributes": UNKNOWN + b")\x81}" + text("__class__") + UNKNOWN + b"sb",
    "a partial of nothing harmful": name("functools", "partial") + UNKNOWN + b"\x85R",
    "a length for a bytearray": name("builtins", "bytearray") + number(1 << 40) + b"\x85R",
    "an array of objects": name("numpy.core.multiarray", "_reconstruct")
    + name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R(K\x01" + number(1 << 40) + b"\x85"
    + name("numpy", "dtype") + text("O8") + b"\x89\x88\x87R\x89]tb",
    "an array that claims more than it holds": name("numpy._core.multiarray", "_reconstruct")
    + name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R(K\x01" + number(1 << 40) + b"\x85"
    + name("numpy", "dtype") + text("f8") + b"\x89\x88\x87R\x89C\x01xtb",
    "nested lists": b"]" * 50_000 + b"a" * 49_999,
    "nested tuples": b")" + b"\x85" * 50_000,
    "nested dicts": b"}" + (text("a") + b"}") * 20_000 + b"s" * 20_000,
    "a doubling tuple": b")" + b"2\x86" * 100,
    "a doubling tuple as a key": b"})" + b"2\x86" * 100 + text("v") + b"s",
    "a doubling tuple in a set": name("builtins", "set") + b"])" + b"2\x86" * 100 + b"a\x85R",
    "a list that holds itself": b"]2a",
    "a reconstructor of a stub": name("copyreg", "_reconstructor") + UNKNOWN + name("builtins", "object") + b"N\x87R",
    "a reconstructor of itself": name("copyreg", "_reconstructor") + b"2\x85R",
    "a path of no text": name("pathlib", "PosixPath") + b"]]\x86R",
}  # fmt: skip

# Damage, and attacks by size: refused in one line wherever they are.
BROKEN = {
    "an empty stack": b"R",
    "a mark that is not there": b"e",
    "members for a list below the mark": b"](Na",
    "a call of text": text("a") + b")R",
    "a call of None": b"N)R",
    "members for None": b"N(NNe",
    "entries for a tuple": b")" + text("a") + text("b") + b"s",
    "a state for a number": b"K\x01}b",
    "a memo that is not there": b"h\x99",
    "a memo below zero": b"Np-1\ng-2\n",
    "an odd number of entries": b"}(" + text("a") + b"u",
    "an entry twice": b"}" + (text("a") + b"Ns") * 2,
    "an extension": b"\x82\x01",
    "an extension of four bytes": b"\x84\xff\xff\xff\x7f",
    "a buffer out of band": b"\x97",
    "a read-only buffer": b"N\x98",
    "a persistent id of text": b"Pos.system\n",
    "a persistent id of a container": b"(" + text("module") + UNKNOWN + text("a.py") + COMMAND + b"tQ",
    "a persistent id of None": b"NQ",
    "a storage of no type": b"(" + text("storage") + UNKNOWN + text("0") + text("cpu") + number(1) + b"tQ",
    "a storage below zero": storage(-1),
    "a storage of text": b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") * 2 + b"tQ",
    "bytes of 2⁶² bytes": b"\x8e" + struct.pack("<Q", 1 << 62),
    "text of 2⁶² bytes": b"\x8d" + struct.pack("<Q", 1 << 62),
    "a bytearray of 2⁶² bytes": b"\x96" + struct.pack("<Q", 1 << 62),
    "a number of 2³⁰ bytes": b"\x8b" + struct.pack("<i", 1 << 30),
    "a number of many digits": b"I" + b"9" * 10_000 + b"\n",
    "text that is no text": b"X\x02\x00\x00\x00\xff\xfe",
    "an opcode that is none": b"\xff",
    "copies of a copy": b"](" + b"N" * 50_000 + b"eq\x600" + (name("builtins", "list") + b"h\x60\x85R0") * 3_000 + b"N",
    "a tensor beyond its storage": tensor([5], [1]),
    "a tensor from beyond its storage": tensor([1], [1], offset=4),
    "a tensor with steps beyond its storage": tensor([2, 2], [4, 1]),
    "a tensor with steps below zero": tensor([4], [-1]),
    "a tensor of a size below zero": tensor([-4], [1]),
    "a tensor of an offset below zero": tensor([4], [1], offset=-4),
    "a tensor of 2¹²² elements": tensor([1 << 61, 1 << 61], [0, 0]),
    "a tensor without steps": tensor([4], []),
    "a tensor of True": name("torch._utils", "_rebuild_tensor_v2")
    + b"("
    + storage()
    + b"\x88K\x01\x85K\x01\x85\x89}tR",
    "a tensor of a hundred axes": tensor([1] * 100, [1] * 100),
}
# The tensors claim a storage that the file does not have.
UNSTORED = {
    "a storage that is not there": tensor([4], [1], key="7"),
    "a storage of another file": tensor([4], [1], key="../../etc/passwd"),
    "a storage larger than the file": tensor([1 << 40], [1], elements=1 << 40),
    "a storage that ends early": tensor([8], [1], elements=8),
}
