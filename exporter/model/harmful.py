"""The modules and functions that run programs, read files or open connections: a checkpoint that names one is
refused whole."""

from __future__ import annotations

# Modules whose functions run programs, read or write files, or open connections.
_MODULE_NAMES = """
    os posix nt ntpath posixpath subprocess sys socket socketserver importlib imp shutil pty ctypes _ctypes cffi runpy
    code codeop pickle _pickle cPickle dill cloudpickle joblib shelve marshal webbrowser multiprocessing threading
    _thread concurrent asyncio http httplib urllib urllib2 urllib3 ftplib smtplib telnetlib poplib imaplib nntplib
    xmlrpc requests httpx aiohttp paramiko commands popen2 pdb bdb profile cProfile timeit doctest unittest pip
    setuptools distutils ensurepip venv pkgutil zipimport zipfile tarfile tempfile fileinput glob mmap signal resource
    fcntl gc inspect platform pydoc linecache ast lib2to3 idlelib antigravity sqlite3 _operator
"""
# Functions and modules of packages that are otherwise harmless.
_PATH_NAMES = """
    io.open io.FileIO io.open_code _io.open _io.FileIO _io.open_code codecs.open codecs.EncodedFile logging.config
    operator.attrgetter operator.methodcaller operator.itemgetter functools.reduce types.FunctionType types.CodeType
    torch.hub torch.load torch.save torch.serialization.load torch.serialization.save torch.jit torch.package
    torch.ops.load_library torch.classes torch.multiprocessing torch.distributed.rpc torch.distributed.run
    torch.distributed.launch torch.utils.cpp_extension torch.utils.model_zoo torch.utils.collect_env
    torch.utils.bottleneck torch.utils._config_module torch._dynamo torch._inductor torch.fx
    torch.storage._load_from_bytes numpy.load numpy.lib.npyio numpy.lib._npyio_impl numpy.save numpy.savez
    numpy.fromfile numpy.memmap numpy.loadtxt numpy.genfromtxt numpy.f2py numpy.distutils numpy.testing numpy.ctypeslib
    torchvision.datasets.utils pandas.read_pickle pandas.io huggingface_hub transformers.utils.hub yaml.load
    yaml.unsafe_load
"""
# Of `builtins`, everything else is refused: eval, exec, open and the like. `getattr` is how old protocols name what
# lies inside a class; the interpreter looks nothing up, and checks the whole name.
_BUILTIN_NAMES = """
    set frozenset complex bytearray bytes list dict tuple int float bool str slice range object type Ellipsis
    NotImplemented NotImplementedType getattr
"""
GETATTR = "builtins.getattr"
MODULES = frozenset(_MODULE_NAMES.split())
_PATHS = tuple(_PATH_NAMES.split())
_BUILTINS = frozenset(_BUILTIN_NAMES.split())
_OLD_NAMES = {"__builtin__": "builtins", "__builtins__": "builtins", "copy_reg": "copyreg"}


class Harmful(Exception):
    """A pickle names a function or module that could run code; the argument is its name."""


def checked(module: str, name: str) -> str:
    """The dotted name of something in a module, of Python 3.

    Raises: Harmful.
    """
    root, *inner = module.split(".")
    root = _OLD_NAMES.get(root, root)
    whole = ".".join((root, *inner, name))
    parts = name.split(".")
    through = parts[:-1]  # protocol 4 reaches through a module: `torch`, then `serialization.os.system`
    if through and any(part.startswith("__") and part != "__new__" for part in parts):  # and through `__globals__`
        raise Harmful(whole)
    if root in MODULES or MODULES.intersection(through) or "builtins" in through:
        raise Harmful(whole)
    if any(whole == path or whole.startswith(path + ".") for path in _PATHS):
        raise Harmful(whole)
    if root == "builtins" and (inner or name not in _BUILTINS):
        raise Harmful(whole)
    return whole
