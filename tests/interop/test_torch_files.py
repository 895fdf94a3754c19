"""Laws of the torch-free reader, on files made by hand as torch.save would."""

import argparse
import collections
import io
import os
import pickle
import struct
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sparx_jax.errors import UserError
from sparx_jax.interop.torch_files import read_torch_file

KINDS = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)


class Global(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    function: Any
    args: Any


class New(NamedTuple):
    """An object made by `__new__`, then given dict items and a state."""

    kind: Global
    items: dict
    state: Any


class Persistent(NamedTuple):
    id: tuple


class Opcodes(NamedTuple):
    code: bytes


class Evil:
    """Creates the file `marker` when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def emit(value: Any) -> bytes:
    """The instructions of pickle protocol 2 that push `value`."""
    match value:
        case Opcodes(code):
            return code
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, args):
            return emit(function) + emit(args) + b"R"
        case New(kind, items, state):
            filled = (
                emit(kind) + b")\x81(" + b"".join(map(emit, sum(items.items(), ())))
            )
            return filled + b"u" + emit(state) + b"b"
        case Persistent(id):
            return emit(id) + b"Q"
        case tuple():
            return b"(" + b"".join(map(emit, value)) + b"t"
        case dict():
            return b"}(" + b"".join(map(emit, sum(value.items(), ()))) + b"u"
        case _:
            return pickle.dumps(value, 2)[2:-1]  # without PROTO and STOP


def storage(kind: str, key: Any, numel: Any) -> Persistent:
    kind = Global("torch", f"{kind}Storage")
    return Persistent(("storage", kind, key, "cpu", numel))


def tensor(source, offset, shape, strides) -> Call:
    hooks = Call(Global("collections", "OrderedDict"), ())
    args = (source, offset, shape, strides, False, hooks)
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)


def whole(array: np.ndarray, key: str = "0") -> Call:
    """The contiguous tensor that fills the storage `key`."""
    kind = next(kind for kind in KINDS if KINDS[kind] == array.dtype)
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return tensor(storage(kind, key, array.size), 0, array.shape, strides)


def write(path, tree, *arrays, byteorder=b"little", compression=zipfile.ZIP_STORED):
    """A zip like that of torch.save whose storages "0", "1", ... hold `arrays`."""
    code = tree if isinstance(tree, bytes) else b"\x80\x02" + emit(tree) + b"."
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/byteorder", byteorder)
        for key, array in enumerate(arrays):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", b"3\n")
    return path


def refusal(path, key=None) -> str:
    """The one sentence, naming the file, with which reading `path` is refused."""
    with pytest.raises(UserError) as caught:
        read_torch_file(path, key)
    message = str(caught.value)
    assert message.startswith(f"{path} ") and message.endswith(".")
    assert "\n" not in message and ": " in message
    return message


@pytest.fixture
def pth(tmp_path):
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("extension", ["pth", "pt", "pth.tar", "bin", "ckpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_is_read_as_saved(kind, extension, tmp_path):
    saved = np.array([[0, 1, 2], [3, 100, 5]]).astype(KINDS[kind])
    path = write(tmp_path / f"a.{extension}", {"x": whole(saved)}, saved)
    read = read_torch_file(path)["x"]
    assert read.dtype == saved.dtype
    np.testing.assert_array_equal(read, saved)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "expected"),
    [
        (0, (4, 3), (1, 4), WEIGHTS.T),
        (5, (2, 2), (4, 2), WEIGHTS[1:, 1::2]),
        (7, (), (), WEIGHTS[1, 3]),
        (0, (2, 4), (0, 1), WEIGHTS[[0, 0]]),
        (12, (0, 4), (4, 1), WEIGHTS[3:]),
        (3, (1, 1), (99, 99), WEIGHTS[:1, 3:]),
    ],
    ids=["transposed", "sliced", "0-d", "expanded", "empty", "one element"],
)
def test_a_view_is_read_as_the_view(pth, offset, shape, strides, expected):
    view = tensor(storage("Float", "0", 12), offset, shape, strides)
    read = read_torch_file(write(pth, {"x": view}, WEIGHTS))["x"]
    assert read.shape == expected.shape
    np.testing.assert_array_equal(read, expected)


def test_tensors_of_one_storage_share_memory(pth):
    half = tensor(storage("Float", "0", 12), 6, (6,), (1,))
    read = read_torch_file(write(pth, {"a": whole(WEIGHTS), "b": half}, WEIGHTS))
    np.testing.assert_array_equal(read["b"], WEIGHTS.ravel()[6:])
    assert np.shares_memory(read["a"], read["b"])


@pytest.mark.parametrize(
    "name", ["_rebuild_parameter", "_rebuild_parameter_with_state"]
)
def test_a_parameter_is_its_tensor(pth, name):
    args = (whole(WEIGHTS), True, {}, {"_no_weight_decay": True})
    parameter = Call(Global("torch._utils", name), args)
    read = read_torch_file(write(pth, {"x": parameter}, WEIGHTS))
    np.testing.assert_array_equal(read["x"], WEIGHTS)


def test_the_order_of_the_file_is_kept(pth):
    names = ["b", "a", "c"]
    path = write(pth, {name: whole(WEIGHTS) for name in names}, WEIGHTS)
    assert list(read_torch_file(path)) == names


ENTRIES = ["model", "state_dict", "model_state_dict", "module"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_usual_entries_are_found_unasked(pth, entry):
    """Where there are several the first of them counts, wherever it stands."""
    later = ENTRIES[ENTRIES.index(entry) + 1 :]
    tree = {"epoch": 3, "optimizer": {"lr": 0.1}}
    tree |= {name: {"x": whole(WEIGHTS, "7")} for name in later}  # not in the file
    tree[entry] = {"x": whole(WEIGHTS)}
    np.testing.assert_array_equal(
        read_torch_file(write(pth, tree, WEIGHTS))["x"], WEIGHTS
    )


def test_the_key_chooses_the_entry_and_other_storages_stay_unread(pth):
    other = WEIGHTS * 2
    # The storage "7" of the entry "model" is missing from the file.
    tree = {"model": {"x": whole(WEIGHTS, "7")}, "model_ema": {"x": whole(other)}}
    path = write(pth, tree, other)
    np.testing.assert_array_equal(read_torch_file(path, key="model_ema")["x"], other)
    assert "data/7" in refusal(path)


def test_a_file_without_the_entry_lists_those_it_has(pth):
    path = write(pth, {"epoch": 1, "net": {"x": whole(WEIGHTS)}}, WEIGHTS)
    for key in (None, "model_ema", "epoch"):
        assert "'epoch', 'net'" in refusal(path, key)
    assert "no dict" in refusal(write(pth, [1, 2]))
    assert "no state dict" in refusal(write(pth, {"model": {}}))


def test_settings_beside_the_weights_are_inert(pth):
    config = New(Global("yacs.config", "CfgNode"), {"A": 1}, {"__frozen__": True})
    scalar = Global("numpy.core.multiarray", "scalar")
    tree = {
        "config": config,
        "args": argparse.Namespace(lr=0.1, steps=[1, (2, 2.5)], name=None),
        "best": Call(scalar, (Call(Global("numpy", "dtype"), ("f8", False)), b"8")),
        "metadata": collections.OrderedDict(a="shared", b="shared"),
        "model": {"x": whole(WEIGHTS)},
        "big": 2**70,
    }
    path = write(pth, tree, WEIGHTS)
    np.testing.assert_array_equal(read_torch_file(path)["x"], WEIGHTS)


def test_a_module_prefix_is_cut_off_only_if_all_names_have_it(tmp_path):
    def names(extension, *saved):
        path = tmp_path / f"a{extension}"
        if extension == ".safetensors":
            save_file(dict.fromkeys(saved, WEIGHTS), path)
        else:
            write(path, {name: whole(WEIGHTS) for name in saved}, WEIGHTS)
        return set(read_torch_file(path))

    for extension in (".pth", ".safetensors"):
        both = "module.a", "module.module.b"
        assert names(extension, *both) == {"a", "module.b"}
        assert names(extension, *both, "c") == {*both, "c"}
        for name in ("_orig_mod.a", "module._orig_mod.a", "_orig_mod.module.a"):
            assert names(extension, name) == {"a"}  # of torch.compile
    assert names(".ckpt", "model.a", "model.model.b") == {"a", "model.b"}


@pytest.mark.parametrize("protocol", range(6))
def test_code_in_a_file_is_refused_by_name_and_not_run(pth, tmp_path, protocol):
    marker = tmp_path / "marker"
    attack = pickle.dumps(Evil(marker), protocol)
    pickle.loads(attack)  # a real one
    assert marker.exists()
    marker.unlink()
    assert "posix.system" in refusal(write(pth, attack))
    assert not marker.exists()


OBJECT = New(Global("argparse", "Namespace"), {}, {})
REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


@pytest.mark.parametrize(
    "attack",
    [
        Call(OBJECT, ("id",)),
        Call(Call(REBUILD, (1, 2, 3, 4)), ()),
        Call(Global("torch", "FloatStorage"), (2**60,)),
        Call(REBUILD, ()),
        Call(REBUILD, 5),
        Persistent(("storage", REBUILD, "0", "cpu", 1)),
        Persistent(("module", Global("torch", "FloatStorage"), "0", "cpu", 1)),
        Persistent(5),
        Opcodes(b"\x82\x01"),  # EXT1: an extension code of copyreg
        Opcodes(b"\x96" + struct.pack("<Q", 2**60)),  # BYTEARRAY8 of 2**60 bytes
        Opcodes(b"00000"),  # POP of an empty stack
        Opcodes(b"RRRR"),
        Opcodes(b"tttt"),
        Opcodes(b"h\x07"),  # BINGET of what was not put
    ],
    ids=repr,
)
def test_misused_instructions_are_damage(pth, attack):
    tree = {"evil": attack, "model": {"x": whole(WEIGHTS)}}
    assert "damaged" in refusal(write(pth, tree, WEIGHTS))


def test_a_pickle_that_takes_more_than_there_is_is_damage(pth):
    assert "empty stack" in refusal(write(pth, b"\x80\x02}\x86."))


def test_an_old_style_instance_is_refused_by_name(pth):
    attack = Opcodes(b"(X\x02\x00\x00\x00idios\nsystem\n")
    assert "os.system" in refusal(write(pth, {"evil": attack}))


def test_attributes_set_on_allowed_globals_do_not_last(pth):
    def build(value):
        states = ({"x": 1, "__call__": 2}, {"__defaults__": (1,), "__code__": 2})
        return Opcodes(emit(value) + emit(states) + b"b")

    tree = {"a": build(REBUILD), "b": build(OBJECT), "c": build(whole(WEIGHTS))}
    tree["model"] = {"x": whole(WEIGHTS)}
    for _ in range(2):
        read = read_torch_file(write(pth, tree, WEIGHTS))
        np.testing.assert_array_equal(read["x"], WEIGHTS)


def test_enormous_memo_indices_cost_no_memory(pth):
    put = Opcodes(b"Nr\xff\xff\xff\xff")  # the C unpickler would allocate 64 GiB
    path = write(pth, {"a": put, "model": {"x": whole(WEIGHTS)}}, WEIGHTS)
    np.testing.assert_array_equal(read_torch_file(path)["x"], WEIGHTS)


def test_deep_nesting_does_not_overflow_the_stack(pth):
    key = Opcodes(b")" + b"\x85" * 200_000)
    path = write(pth, b"\x80\x02}" + emit(key) + b"Ns.")
    assert "no state dict" in refusal(path)


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "strides"),
    [
        (12, 1, (3, 4), (4, 1)),
        (12, 0, (3, 4), (5, 1)),
        (12, 12, (), ()),
        (12, -1, (2,), (1,)),
        (12, 11, (2,), (-1,)),
        (12, 0, (-1,), (1,)),
        (12, 0, (5,), (2**60,)),  # the last byte offset overflows 64 bits to zero
        (float("nan"), 0, (5,), (2**60,)),
        (12, 0, (2**40,), (0,)),
        (12, 0, (0, 2**70), (1, 1)),
        (12, 0, (2**32, 2**32), (0, 0)),
        (12, 0, (2, 2), (1,)),
        (12, 0.0, (2,), (1,)),
        (12, 0, ("2",), (1,)),
        (12, 0, None, (1,)),
        (13, 0, (13,), (1,)),  # storage shorter than declared
        (2**62, 0, (3, 4), (4, 1)),
    ],
)
def test_no_tensor_reaches_beyond_its_storage(pth, numel, offset, shape, strides):
    view = tensor(storage("Float", "0", numel), offset, shape, strides)
    assert "damaged" in refusal(write(pth, {"x": view}, WEIGHTS))


@pytest.mark.parametrize("key", ["/etc/passwd", "../../../../etc/passwd", "1", "", 0])
def test_storages_come_from_the_archive_alone(pth, key):
    view = tensor(storage("Byte", key, 1), 0, (1,), (1,))
    assert "damaged" in refusal(write(pth, {"x": view}, WEIGHTS))


def test_a_file_cut_anywhere_is_refused(pth):
    content = write(pth, {"x": whole(WEIGHTS)}, WEIGHTS).read_bytes()
    for length in [0, 1, 3, *range(4, len(content), 13), len(content) - 1]:
        pth.write_bytes(content[:length])
        assert "again" in refusal(pth)


def test_a_flipped_bit_in_the_weights_is_refused(pth):
    content = write(pth, {"x": whole(WEIGHTS)}, WEIGHTS).read_bytes()
    pth.write_bytes(content.replace(WEIGHTS.tobytes(), (-WEIGHTS).tobytes()))
    assert "CRC" in refusal(pth)


def test_the_format_before_torch_1_6_is_named(pth):
    pth.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    message = refusal(pth)
    assert "torch.save(torch.load(p, weights_only=True), p)" in message


def test_other_files_are_told_apart(tmp_path, pth):
    assert "No such file" in refusal(pth)
    assert "No such file" in refusal(tmp_path / "none.safetensors")
    assert "folder" in refusal(tmp_path)
    pth.write_text("<!DOCTYPE html>")
    assert "no torch file (it starts with b'<!DOCTYP')" in refusal(pth)
    other = tmp_path / "weights.h5"
    other.touch()
    assert "no torch file" in refusal(other)
    buffer = io.BytesIO()
    np.savez(buffer, x=WEIGHTS)
    pth.write_bytes(buffer.getvalue())
    assert "is a zip but no torch file" in refusal(pth)


def test_big_endian_and_compressed_files_are_refused(pth):
    tree = {"x": whole(WEIGHTS)}
    assert "big-endian" in refusal(write(pth, tree, WEIGHTS, byteorder=b"big"))
    bomb = write(pth, tree, WEIGHTS, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(bomb)


def test_records_that_claim_more_bytes_than_the_file_has_are_refused(pth):
    content = write(pth, {"x": whole(WEIGHTS)}, WEIGHTS).read_bytes()
    sizes, claim = struct.pack("<II", 48, 48), struct.pack("<II", 2**30, 2**30)
    pth.write_bytes(content.replace(sizes, claim))
    assert "records longer than the file" in refusal(pth)


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "a.safetensors"
    saved = {kind: np.array([[0, 1], [2, 3]]).astype(KINDS[kind]) for kind in KINDS}
    saved |= {"scalar": np.array(2.5), "empty": np.zeros((0, 3))}
    save_file(saved, path)
    read = read_torch_file(path)
    assert set(read) == set(saved)
    for name in saved:
        assert read[name].dtype == saved[name].dtype
        assert read[name].shape == saved[name].shape
        np.testing.assert_array_equal(read[name], saved[name])
    assert "leave out the key" in refusal(path, "model")


def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": WEIGHTS}, path)
    content = path.read_bytes()
    for length in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        assert "damaged" in refusal(path)
