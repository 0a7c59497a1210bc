"""Weights files of every kind, whole, damaged and hostile."""

import argparse
import ast
import io
import json
import os
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import vit_jax
from vit_jax.checkpoints.files import read_tensors
from vit_jax.errors import UserError

core = pytest.mark.core

TENSORS = {
    "cls": np.arange(6, dtype=np.float32).reshape(1, 1, 6),
    "head/bias": np.array([1.5, -2, 3], ml_dtypes.bfloat16),
    "half": np.ones((2, 3), np.float16),
    "step": np.array(7, np.int64),
}


def assert_same(actual: dict, expected: dict):
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape
        np.testing.assert_array_equal(actual[name], array, strict=True)


def refused(path) -> str:
    """The message: one sentence of one line, which names the path."""
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert "\n" not in message and message[-1] in ".?" and len(message) < 600
    return message


def safetensors_file(path: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def zip_file(path: Path, members: dict[str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@core
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["weights.npz", "weights.safetensors", "no suffix"])
def test_npz_by_content(tmp_path, save, name):
    with (tmp_path / name).open("wb") as file:
        save(file, **TENSORS)
    file = read_tensors(tmp_path / name)
    assert_same(file.tensors, TENSORS)
    assert (file.kind, file.path) == ("npz", tmp_path / name)
    assert (file.config, file.preprocessor, file.unwrapped) == (None, None, ())


@core
def test_npz_of_other_byte_order_and_memory_order(tmp_path):
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    np.savez(tmp_path / "a.npz", big=array, fortran=np.asfortranarray(array.astype("<f4")))
    tensors = read_tensors(tmp_path / "a.npz").tensors
    assert tensors["big"].dtype.isnative
    for name in ("big", "fortran"):
        np.testing.assert_array_equal(tensors[name], np.arange(6).reshape(2, 3))


@core
@pytest.mark.parametrize("name", ["model.safetensors", "weights.npz"])
def test_safetensors_by_content(tmp_path, name):
    tensors = TENSORS | {"empty": np.zeros((0, 4), np.float32), "yes": np.array([True, False])}
    safetensors.numpy.save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    file = read_tensors(tmp_path / name)
    assert_same(file.tensors, tensors)
    assert file.kind == "safetensors"


@core
def test_directory_with_settings(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 12}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    for path in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        file = read_tensors(path)
        assert_same(file.tensors, TENSORS)
        assert file.path == tmp_path / "model.safetensors"
        assert file.config == {"num_attention_heads": 12}
        assert file.preprocessor == {"image_mean": [0.5]}
    (tmp_path / "other.npz").write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert read_tensors(tmp_path / "other.npz").config is None  # who knows whose it is


@core
def test_directory_with_one_file_of_any_name(tmp_path):
    np.savez(tmp_path / "ViT-B_16.npz", **TENSORS)
    (tmp_path / "README.md").write_text("# Weights")
    (tmp_path / "._ViT-B_16.npz").write_bytes(b"left by a Mac")
    file = read_tensors(tmp_path)
    assert_same(file.tensors, TENSORS)
    assert (file.path, file.config) == (tmp_path / "ViT-B_16.npz", None)


@core
def test_directories_that_do_not_say_which(tmp_path):
    assert "holds no weights file" in refused(tmp_path) and "nothing at all" in refused(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints" / "150").mkdir(parents=True)
    (run / "config.json").touch()
    for folder in (run / "checkpoints", run / "checkpoints" / "150"):
        assert f"{folder} is inside the workdir of a run; give {run}, and for" in refused(folder)
    shutil.rmtree(run)
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt" in refused(tmp_path)
    np.savez(tmp_path / "a.npz", **TENSORS)
    np.savez(tmp_path / "b.npz", **TENSORS)
    assert "several weights files ('a.npz', 'b.npz'); name one" in refused(tmp_path)


@pytest.fixture
def shards(tmp_path):
    first, second = {"cls": TENSORS["cls"]}, {"half": TENSORS["half"], "step": TENSORS["step"]}
    safetensors.numpy.save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    safetensors.numpy.save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {name: "model-00001-of-00002.safetensors" for name in first}
    weight_map |= {name: "model-00002-of-00002.safetensors" for name in second}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, first | second, weight_map


@core
def test_shards(shards):
    index, tensors, _ = shards
    (index.parent / "config.json").write_text("{}")
    for path in (index, index.parent):
        file = read_tensors(path)
        assert_same(file.tensors, tensors)
        assert (file.kind, file.path, file.config) == ("safetensors", index, {})


def test_shards_of_pytorch(tmp_path, torch):
    state = as_torch(torch)
    shard_of = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for shard in set(shard_of.values()):
        torch.save({name: state[name] for name in state if shard_of[name] == shard},
                   tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    (tmp_path / "config.json").write_text("{}")
    for path in (index, tmp_path):
        file = read_tensors(path)
        assert_same(file.tensors, TENSORS)
        assert (file.kind, file.path, file.config) == ("torch", index, {})
    index.write_text('{"weight_map": {}}')
    assert "holds no tensors" in refused(index)


@core
def test_shards_that_do_not_belong_together(shards, tmp_path_factory):
    index, _, weight_map = shards
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    safetensors.numpy.save_file({"cls": TENSORS["cls"]}, outside)

    def message(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))
        return refused(index.parent)

    assert "does not hold the tensors that" in message({**weight_map, "more": weight_map["cls"]})
    assert "does not hold the tensors that" in message({"step": weight_map["step"]})
    for name in (str(outside), os.path.relpath(outside, index.parent), "", "..", "config.json"):
        assert "not a weights file beside it" in message({"cls": name})
    assert "00003-of-00002.safetensors does not exist; did you mean 'model-0000" in message(
        {"cls": weight_map["cls"].replace("00001", "00003")})
    assert "no 'weight_map'" in message(["cls"])
    index.write_text('{"weight_map": ')
    assert "not valid JSON" in refused(index)


@core
def test_missing_paths(tmp_path):
    np.savez(tmp_path / "ViT-B_16.npz", **TENSORS)
    assert refused(tmp_path / "ViT-B_61.npz").endswith(
        "ViT-B_61.npz does not exist; did you mean 'ViT-B_16.npz'?")
    message = refused(tmp_path / "no such" / "deeper" / "a.npz")
    assert message == f"{tmp_path / 'no such'} does not exist."
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe")


@core
@pytest.mark.parametrize("content, message", [
    (b"", "is empty; download or copy it again"),
    (b"\n<!DOCTYPE html><html>404</html>", "is a web page, as a failed download leaves behind"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    ("Gewöhnlicher Text.\n".encode(), "is a text file"),
    (b"cos\nsystem\n(S'touch bad'\ntR.", "is a text file"),  # a pickle, in fact
    (npy(np.zeros(3)), r"one array without a name \(.npy\)"),
    (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
    (b"\x1f\x8b\x08" + bytes(50), "compressed with gzip; unpack it"),
    (bytes(2000), "is not an npz, safetensors or PyTorch file"),
    (b"PK\3\4 and then nothing", r"damaged or incomplete \(its zip archive has no end"),
])
def test_files_that_are_something_else(tmp_path, content, message):
    (tmp_path / "weights.npz").write_bytes(content)
    assert refused(tmp_path / "weights.npz").startswith(str(tmp_path / "weights.npz"))
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path / "weights.npz")


@core
@pytest.mark.parametrize("name, save", [
    ("a.npz", lambda path: np.savez(path, **TENSORS)),
    ("a.safetensors", lambda path: safetensors.numpy.save_file(TENSORS, path)),
])
def test_truncated_anywhere(tmp_path, name, save):
    path = tmp_path / name
    save(path)
    whole = path.read_bytes()
    for size in {*range(1, len(whole), 37), len(whole) - 1}:
        path.write_bytes(whole[:size])
        refused(path)


@core
def test_flipped_bits_of_an_npz(tmp_path):
    """Each is refused in a sentence, or hits what does not matter; never another exception."""
    path = tmp_path / "a.npz"
    np.savez(path, **TENSORS)
    whole = bytearray(path.read_bytes())
    for position in range(0, len(whole), 7):
        whole[position] ^= 0x55
        path.write_bytes(whole)
        whole[position] ^= 0x55
        try:
            tensors = read_tensors(path).tensors
        except UserError:
            continue
        assert sum(name in TENSORS for name in tensors) >= 3


@core
def test_hostile_npz(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, ok=np.ones(3), x=np.array([{"a": 1}], dtype=object))
    assert "holds 'x' as object" in refused(path)
    np.savez(path, x=np.array(["text"]))
    assert "holds 'x' as <U4, which is not supported for weights" in refused(path)
    np.savez(path, x=np.zeros(2, [("a", np.int16)]))
    assert "holds 'x' as" in refused(path)
    np.savez(path, x=np.zeros(2, np.complex64))
    assert "as complex64" in refused(path)
    np.savez(path)
    assert "zip archive of nothing" in refused(path)
    zip_file(path, {"a.npy": npy(np.ones(3)), "photo.jpg": b"..."})
    assert "zip archive of 'photo.jpg', neither an npz" in refused(path)
    zip_file(path, {"\x1b[31m\n" + 9999 * "a": b"..."})
    assert r"zip archive of '\x1b[31m\naaa" in refused(path)
    zip_file(path, {"a.npy": b"no array"})
    assert "damaged or incomplete" in refused(path)

    # Ten bytes that claim to be an exabyte.
    header = npy(np.zeros(1)).replace(b"(1,), }" + b" " * 15, b"(%d,), }" % 10**15)
    assert b"(1000000000000000,)" in header
    zip_file(path, {"a.npy": header})
    assert "the size of 'a' does not match its shape" in refused(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy(np.ones(3)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", npy(np.ones(3)))
    assert "two tensors of the same name" in refused(path)


@core
def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = zip_file(tmp_path / "a.npz", {"a.npy": npy(np.zeros(1 << 20))},
                    compression=zipfile.ZIP_DEFLATED)
    assert read_tensors(path).tensors["a"].shape == (1 << 20,)  # 8 MiB, a thousand times the file
    monkeypatch.setattr("vit_jax.checkpoints.files._ALWAYS_READ", 1 << 20)
    size = path.stat().st_size
    assert f"has {size} bytes and would unpack to 8388736, more than 100 times" in refused(path)


@core
@pytest.mark.parametrize("header, data, message", [
    (b'{"a":' + b"[" * 5000, b"", "damaged or incomplete"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4), "damaged"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4), "damaged"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), "damaged"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
      "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4), "damaged"),
    ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, bytes(4), "damaged"),
    (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
     b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4), "has a duplicate key"),
    ({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, bytes(4),
     "holds 'a' as F8_E4M3, which is not supported for weights"),
    ({}, b"", "holds no tensors"),
])
def test_hostile_safetensors(tmp_path, header, data, message):
    assert message in refused(safetensors_file(tmp_path / "a.safetensors", header, data))


@core
def test_safetensors_that_claims_a_huge_header(tmp_path):
    for length in (10**8, 10**12, 2**63, 2**64 - 1):
        path = safetensors_file(tmp_path / "a.safetensors", {}, length=length)
        assert "damaged or incomplete" in refused(path)


@core
@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff", "[" * 100_000])
def test_settings_that_cannot_be_read(tmp_path, text):
    np.savez(tmp_path / "a.npz", **TENSORS)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert str(tmp_path / "config.json") in refused(tmp_path)


@core
def test_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for content in (b"\x80\x02}q\x00.", None):
        path = zip_file(tmp_path / "a.pth", {"archive/data.pkl": b"\x80\x02}."})
        if content:
            path.write_bytes(content)
        assert "install torch, or save the weights as safetensors" in refused(path)


@core
def test_nothing_in_the_package_unpickles():
    """No module imports an unpickler; torch.load is called in its weights-only mode alone."""
    forbidden = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve",
                 "marshal"}
    files = sorted(Path(vit_jax.__file__).parent.rglob("*.py"))
    assert len(files) > 20
    torch_loads = 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names]
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {name.split(".")[0] for name in modules} & forbidden, file
            elif isinstance(node, ast.Call):
                call = ast.unparse(node)
                assert "allow_pickle=True" not in call, f"{file}: {call}"
                if ast.unparse(node.func).startswith("torch.") and "load" in ast.unparse(node.func):
                    assert ast.unparse(node.func) == "torch.load", f"{file}: {call}"
                    assert "weights_only=True" in call, f"{file}: {call}"
                    torch_loads += 1
    assert torch_loads == 1


@pytest.fixture
def torch():
    from torch_shim import torch

    return torch


def as_torch(torch) -> dict:
    state = {name: torch.tensor(array.astype(np.float64)) for name, array in TENSORS.items()}
    dtypes = {name: getattr(torch, array.dtype.name) for name, array in TENSORS.items()}
    return {name: tensor.to(dtypes[name]) for name, tensor in state.items()}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["a.pth", "pytorch_model.bin", "a.npz"])
def test_torch_by_content(tmp_path, torch, zipped, name):
    torch.save(as_torch(torch), tmp_path / name, _use_new_zipfile_serialization=zipped)
    for path in (tmp_path / name, tmp_path):
        file = read_tensors(path)
        assert_same(file.tensors, TENSORS)
        assert (file.kind, file.unwrapped, file.path) == ("torch", (), tmp_path / name)


def test_torch_views_and_parameters(tmp_path, torch):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    torch.save({"w": weight, "t": weight.detach().T, "b": torch.ones(4).bfloat16()[::2]},
               tmp_path / "a.pth")
    tensors = read_tensors(tmp_path / "a.pth").tensors
    np.testing.assert_array_equal(tensors["w"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(tensors["t"], np.arange(6).reshape(2, 3).T)
    assert tensors["b"].dtype == ml_dtypes.bfloat16 and tensors["b"].tolist() == [1, 1]


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "teacher"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_torch_wrappers(tmp_path, torch, wrapper, prefix):
    state = {prefix + name: tensor for name, tensor in as_torch(torch).items()}
    checkpoint = {wrapper: state, "optimizer": {"state": {}}, "epoch": 3,
                  "args": argparse.Namespace(lr=0.1)}
    torch.save(checkpoint, tmp_path / "a.pth")
    file = read_tensors(tmp_path / "a.pth")
    assert_same(file.tensors, TENSORS)
    assert file.unwrapped[0] == wrapper and "".join(file.unwrapped[1:]) == prefix


def test_torch_averaged_weights_come_first_and_prefixes_must_be_common(tmp_path, torch):
    path = tmp_path / "a.pth"
    one, two = {"a": torch.ones(1)}, {"backbone.a": torch.tensor([2.0])}
    torch.save({"model": one, "model_ema": two}, path)
    file = read_tensors(path)
    assert file.tensors["a"] == 2 and file.unwrapped == ("model_ema", "backbone.")
    assert file.choices == (
        "the weights under 'model_ema', where the file also has some under 'model'",)
    torch.save({"model": one, "model_ema": {}, "state_dict": {"name": "vit"}}, path)
    assert read_tensors(path).unwrapped == ("model",) and not read_tensors(path).choices
    torch.save({"model": two | {"head.a": torch.ones(1)}, "model_ema": None}, path)
    assert set(read_tensors(path).tensors) == {"backbone.a", "head.a"}


def test_torch_averaged_model(tmp_path, torch):
    """PyTorch's, in torchvision's training script, counts beside its module."""
    module = torch.nn.Linear(2, 3)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    torch.save({"model": module.state_dict(), "model_ema": averaged.state_dict()},
               tmp_path / "a.pth")
    file = read_tensors(tmp_path / "a.pth")
    assert set(file.tensors) == {"weight", "bias"} and file.unwrapped == ("model_ema", "module.")
    assert file.dropped == (("n_averaged", (), "of weight averaging"),)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil was here",)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_with_code_in_it_is_not_run(tmp_path, torch, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.ones(1), "b": Evil()}
    torch.save(state, "a.pth", _use_new_zipfile_serialization=zipped)
    assert "holds more than tensors (posix.mkdir), which could run code" in refused("a.pth")
    torch.save(torch.nn.Linear(2, 2), "a.pth", _use_new_zipfile_serialization=zipped)
    assert "torch.nn.modules.linear.Linear" in refused("a.pth")
    assert os.listdir() == ["a.pth"]


def test_torch_files_without_a_state_dict(tmp_path, torch, monkeypatch):
    path = tmp_path / "a.pth"
    torch.save({"student": {"a": torch.ones(1)}, "epoch": 1}, path)
    assert "no state dict but 'student', 'epoch'" in refused(path)
    torch.save(torch.ones(3), path)
    assert "no state dict but Tensor" in refused(path)
    torch.save({"a": torch.ones(3).to(torch.float8_e4m3fn)}, path)
    assert "holds 'a' as float8_e4m3fn" in refused(path)
    torch.save({"a": torch.eye(3).to_sparse()}, path)
    assert "holds 'a' as sparse_coo" in refused(path)
    torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)
    assert "would unpack to 4398046511104" in refused(path)
    zip_file(path, {"a/data.pkl": b"", "a/constants.pkl": b"", "a/code/x.py": b""})
    assert "TorchScript" in refused(path)
    path.write_bytes(b"\x80\x04\x95" + bytes(30))
    assert "damaged" in refused(path)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    assert "install torch>=2.6" in refused(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_torch(tmp_path, torch, zipped):
    path = tmp_path / "a.pth"
    torch.save(as_torch(torch), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in range(1, len(whole) - 1, len(whole) // 40):
        path.write_bytes(whole[:size])
        refused(path)
