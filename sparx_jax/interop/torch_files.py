"""Weights from PyTorch and safetensors files, without torch and without running code.

A `.pth` is a zip archive: `*/data.pkl` describes the tensors, `*/data/<key>` hold their
bytes (source: `_save` in torch/serialization.py). Unpickling can run any code, so the
pickle is interpreted here: nothing that it names is ever imported or called.
"""

import math
import os
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import load_file

from sparx_jax.errors import UserError

# In order of preference; the last is DeepSpeed's.
_ENTRIES = ("model", "state_dict", "model_state_dict", "module")
_KINDS = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": bfloat16}
_KINDS |= {"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1"}
_KINDS |= {"Byte": "u1", "Bool": "?"}
_DTYPES = {f"torch.{kind}Storage": np.dtype(_KINDS[kind]) for kind in _KINDS}
_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_PARAMETERS = {f"torch._utils._rebuild_parameter{end}" for end in ("", "_with_state")}
_DICTS = {"collections.OrderedDict"}
# Settings and scores beside the weights: read as objects without content.
_INERT = set(
    "argparse.Namespace yacs.config.CfgNode pathlib.PosixPath torch.Size torch.device "
    "numpy.core.multiarray.scalar numpy._core.multiarray.scalar numpy.dtype "
    "__builtin__.set _codecs.encode".split()
)
_ALLOWED = {*_DTYPES, *_TENSORS, *_PARAMETERS, *_DICTS, *_INERT}

# Instructions of a pickle whose value is their own argument, and those without one.
_LITERALS = set(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES "
    "SHORT_BINBYTES".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, as is `offset`


def read_torch_file(
    path: str | os.PathLike, key: str | None = None
) -> dict[str, np.ndarray]:
    """Reads the state dict of a file that torch saved, or of a `.safetensors` file.

    Args:
      path: the file; all but safetensors in the zip format of torch >= 1.6.
      key: the entry of the file that holds the state dict, such as "model_ema". By
        default the whole file if it is a state dict, else the first that is one of
        the entries "model", "state_dict", "model_state_dict", "module".

    Returns:
      Arrays by name, in the order of the file, with the shapes and dtypes as saved
      (bfloat16 is that of ml_dtypes). A prefix of DataParallel, torch.compile or
      Lightning that all names share is cut off. Arrays of a zip file are read-only
      views, strided and shared as saved.

    Raises:
      UserError: the file is missing, damaged, of another format, without a state dict,
        or refers to anything that tensors and plain settings do not need.
    """
    path = Path(path).expanduser()
    try:
        arrays = _read(path, key)
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        problem = f"cannot be read ({error.strerror or error})"
        _fail(path, problem, "check the path and its permissions", error)
    except Exception as error:  # the parsers of such bytes raise too many kinds
        problem = f"is cut short or damaged ({error or type(error).__name__})"
        _fail(path, problem, "download or copy it again", error)
    # Of DataParallel, of torch.compile inside or around it, and Lightning's "model.".
    for prefix in ("_orig_mod.", "module.", "_orig_mod.", "model."):
        if all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): a for name, a in arrays.items()}
    return arrays


def _fail(
    path: Path, problem: str, remedy: str, cause: Exception | None = None
) -> NoReturn:
    raise UserError(f"{path} {problem}: {remedy}.") from cause


def _read(path: Path, key: str | None) -> dict[str, np.ndarray]:
    if path.is_dir():
        _fail(path, "is a folder", "give the path of a file")
    if path.name.lower().endswith(".safetensors"):
        if key is not None:
            _fail(path, f"has no entry {key!r}, only tensors", "leave out the key")
        return load_file(path)
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"\x80"):  # a bare pickle
        resave = "torch.save(torch.load(p, weights_only=True), p)"
        problem = "has the format of torch before 1.6"
        _fail(path, problem, f"re-save it with torch>=1.6: {resave}")
    if not start.startswith(b"PK\x03\x04"):
        _fail(path, f"is no torch file (it starts with {start})", "download it again")
    with zipfile.ZipFile(path) as archive:
        return _read_zip(archive, key, path)


def _read_zip(archive: zipfile.ZipFile, key: str | None, path: Path) -> dict:
    records, limit = archive.infolist(), path.stat().st_size
    # torch.save does not compress: what would grow on reading is a zip bomb.
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        problem = "is a compressed zip, which torch.save does not make"
        _fail(path, problem, "save the state dict with torch.save")
    if sum(record.file_size for record in records) > limit:
        raise ValueError("records longer than the file")
    names = archive.namelist()
    roots = [name[:-8] for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        _fail(path, "is a zip but no torch file", "give a file made by torch.save")
    order = f"{roots[0]}byteorder"  # absent in files of torch < 2.1
    if order in names and archive.read(order) != b"little":
        _fail(path, "is big-endian", "re-save it on a little-endian machine")
    tensors = _select(_interpret(archive.read(f"{roots[0]}data.pkl"), path), key, path)
    # Last, so that the bytes of the optimizer and of other entries stay unread.
    storages = {tensor.storage.key for tensor in tensors.values()}
    data = {storage: archive.read(f"{roots[0]}data/{storage}") for storage in storages}
    return {n: _array(t, data[t.storage.key], limit) for n, t in tensors.items()}


def _select(tree: Any, key: str | None, path: Path) -> dict[str, _Tensor]:
    """The state dict in `tree`: its entry `key` or, for None, the first that fits."""
    if not isinstance(tree, dict):
        _fail(path, "holds no dict", "save the state dict of the model")
    for entry in [tree, *map(tree.get, _ENTRIES)] if key is None else [tree.get(key)]:
        if isinstance(entry, dict) and entry:
            named = all(isinstance(name, str) for name in entry)
            if named and all(isinstance(value, _Tensor) for value in entry.values()):
                return entry
    wanted = " or ".join(map(repr, _ENTRIES if key is None else [key]))
    found = ", ".join([*map(repr, tree)][:20] + ["..."] * (len(tree) > 20))
    remedy = f"name another entry by read_torch_file(path, key); it holds [{found}]"
    _fail(path, f"has no state dict in {wanted}", remedy)


def _array(tensor: _Tensor, data: bytes, limit: int) -> np.ndarray:
    """A view of the bytes `data` of a storage; `limit` is the size of the file."""
    storage, offset, shape, strides = tensor
    itemsize = storage.dtype.itemsize
    numbers = (storage.numel, offset, *shape, *strides)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("a tensor has malformed sizes")
    if len(data) < storage.numel * itemsize:
        raise ValueError(f"storage {storage.key} is shorter than declared")
    if math.prod(shape) * itemsize > limit:  # strides of 0 could promise any size
        raise ValueError("a tensor is larger than the file")
    if 0 in shape:
        return np.empty(shape, storage.dtype)
    # In Python's integers: NumPy's own check of the bounds overflows and can pass.
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if last >= storage.numel:
        raise ValueError(f"a tensor reaches out of storage {storage.key}")
    steps = [stride * itemsize for stride in strides]
    return np.ndarray(shape, storage.dtype, data, offset * itemsize, steps)


def _interpret(pickle: bytes, path: Path) -> Any:
    """What `pickle` describes: plain data, `_Tensor`s, and `object()` for the rest.

    Knows the instructions that torch.save writes; raises ValueError on others.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for opcode, arg, _ in pickletools.genops(pickle):
        before = opcode.stack_before  # what the instruction takes from the stack
        start = len(stack) - len(before)
        if pickletools.markobject in before:
            start = marks.pop() - before.index(pickletools.markobject)
        if start < 0:
            raise ValueError("pickle takes from an empty stack")
        taken = stack[start:]
        del stack[start:]
        match opcode.name:
            case "PROTO" | "FRAME":
                continue
            case "MARK":
                marks.append(len(stack))
                continue
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
                continue
            case "STOP":
                return taken[0]
            case "MEMOIZE":
                value = memo[len(memo)] = taken[0]
            case "BINGET" | "LONG_BINGET":
                value = memo[arg]
            case name if name in _LITERALS:
                value = arg
            case name if name in _CONSTANTS:
                value = _CONSTANTS[name]
            case "EMPTY_DICT":
                value = {}
            case "EMPTY_LIST":
                value = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                value = tuple(taken)
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS" | "BUILD":
                value = _filled(opcode.name, *taken)
            case "GLOBAL" | "STACK_GLOBAL":
                value = _checked(arg or " ".join(taken), path)
            case "REDUCE" | "NEWOBJ":
                value = _constructed(*taken)
            case "INST":
                value = _constructed(_checked(arg, path), taken)
            case "BINPERSID":
                value = _storage(*taken[0])
            case name:
                raise ValueError(f"unexpected pickle instruction {name}")
        stack.append(value)


def _filled(instruction: str, target: Any, *items: Any) -> Any:
    """`target` with `items` added if it is a list or dict; never with attributes."""
    if instruction.startswith("APPEND") and isinstance(target, list):
        target.extend(items)
    if instruction.startswith("SETITEM") and isinstance(target, dict):
        # Other keys matter to nobody, and hashing a deeply nested tuple could crash.
        keys = [key if isinstance(key, str | int) else object() for key in items[::2]]
        target.update(zip(keys, items[1::2], strict=True))
    return target


def _checked(name: str, path: Path) -> _Global:
    """The global `name`, "module attribute", if a file of weights may refer to it."""
    name = name.replace(" ", ".")
    if name not in _ALLOWED:
        problem = f"refers to {name!r}, which weights do not need, so it was not loaded"
        _fail(path, problem, "if you trust its source, re-save only its state dict")
    return _Global(name)


def _constructed(function: Any, args: Any) -> Any:
    """What stands for the result of calling the global `function`."""
    if not isinstance(function, _Global) or function.name in _DTYPES:
        raise ValueError("pickle calls what is no function")
    if function.name in _TENSORS:
        return _Tensor(*args[:4])
    if function.name in _PARAMETERS:
        return args[0]
    return {} if function.name in _DICTS else object()


def _storage(tag: str, kind: _Global, key: str, _: str, numel: int) -> _Storage:
    """The storage that a persistent id of torch describes."""
    if tag != "storage" or not isinstance(key, str):
        raise ValueError("malformed reference to a storage")
    return _Storage(_DTYPES[kind.name], key, numel)
