"""Reads tensors from untrusted files: npz, safetensors or PyTorch, recognised by their contents.

Files are not trusted. Nothing is unpickled, except by PyTorch in its weights-only mode, and sizes
are checked before memory is spent on them.
"""

import argparse
import codecs
import json
import math
import os
import re
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes  # also teaches NumPy, and so safetensors, the name "bfloat16"
import numpy as np
import safetensors.numpy

from vit_jax.errors import UserError, did_you_mean

# NumPy's (and PyTorch's) names of the dtypes that are taken, and safetensors'.
_DTYPES = {
    "bool": "BOOL", "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}
# In the order in which a directory is searched; after them, its only file with such a suffix.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
            "pytorch_model.bin.index.json")
_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")

# Where training scripts put the state dict, averaged weights first (as timm prefers them), and what
# wrappers of a module put before its names. One name is taken; "teacher" is DINO's average.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "teacher")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")

# A file of less than 1 GiB of tensors is always read. A larger one may unpack to at most 100 times
# its own size: weights hardly compress, and zip reaches 1000 on zeros only.
_ALWAYS_READ = 1 << 30
_MOST_EXPANSION = 100


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file, with the settings that lie beside it.

    Attributes:
      tensors: names as in the file (after `unwrapped`); bfloat16 is `ml_dtypes.bfloat16`.
      kind: "npz", "safetensors" or "torch".
      config: `config.json` beside the weights. It is looked for if a directory was given, or a
        file that is called as in a directory (model.safetensors, pytorch_model.bin); else the
        architecture that a training script names in the file, or None.
      preprocessor: `preprocessor_config.json`, in the same way.
      path: the weights file that was read; of several shards, their index.
      unwrapped: what was taken off: the key of the state dict, common prefixes of its names.
      choices: what was taken where there was something else of the same kind, in words.
      dropped: (name, shape, why) of what a wrapper holds beside the model.
    """

    tensors: dict[str, np.ndarray]
    kind: str
    path: Path
    config: dict | None = None
    preprocessor: dict | None = None
    unwrapped: tuple[str, ...] = ()
    dropped: tuple[tuple[str, tuple, str], ...] = ()
    choices: tuple[str, ...] = ()


def read_tensors(path: str | Path) -> TensorFile:
    """Reads a weights file, or the one weights file of a directory.

    Raises:
      UserError: it is missing, ambiguous, damaged, hostile or of another kind; in one sentence.
    """
    path = Path(os.path.expanduser(path))
    try:
        weights = _weights_in(path) if path.is_dir() else path
        if weights.name.endswith(".index.json"):
            file = _read_shards(weights)
        else:
            file = _read_file(weights)
        if file.kind != "npz":
            file = _without_wrapper(file)
        if not file.tensors:
            raise UserError(f"{weights} holds no tensors; save the weights again.")
        with_settings = path.is_dir() or path.name in _WEIGHTS
        config, preprocessor = (
            _read_json(weights.with_name(name), missing_ok=True) if with_settings else None
            for name in ("config.json", "preprocessor_config.json")
        )
        config = file.config if config is None else config
        if config and {"architecture", "input_size"} <= config.keys():  # flat, as timm's older ones
            config.setdefault("pretrained_cfg", dict(config))
    except OSError as error:
        where = error.filename or path
        raise UserError(f"{where} cannot be read: {error.strerror or error}.") from error
    return replace(file, config=config, preprocessor=preprocessor)


def _weights_in(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    found = [name for name in names if name.endswith(_SUFFIXES) and (folder / name).is_file()]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise UserError(f"{folder} holds several weights files ({_some(found)}); name one of them.")
    for above in (folder.parent, folder.parent.parent):
        if (above / "config.json").is_file() and (above / "checkpoints") in (folder, folder.parent):
            raise UserError(f"{folder} is inside the workdir of a run; give {above}, and for its "
                            "best checkpoint --best (in Python: checkpoint='best').")
    raise UserError(
        f"{folder} holds no weights file (*{', *'.join(_SUFFIXES)}) but "
        f"{_some(names) or 'nothing at all'}; give the file or the folder it lies in."
    )


def _read_shards(index: Path) -> TensorFile:
    """All files that Hugging Face's index of a sharded checkpoint names."""
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(x, str) for x in shard_of.values()):
        raise UserError(f"{index} has no 'weight_map' from names to files; download it again.")
    tensors, kinds = {}, set()
    for shard in sorted(set(shard_of.values())):
        # Keeps the reader inside the directory.
        if Path(shard).name != shard or not shard.endswith(_SUFFIXES):
            raise UserError(f"{index} names {shard!r:.80}, which is not a weights file beside it; "
                            "download it again.")
        part = _read_file(index.with_name(shard))
        kinds.add(part.kind)
        expected = {name for name, file in shard_of.items() if file == shard}
        if part.kind == "npz" or len(kinds) > 1 or set(part.tensors) != expected:
            raise UserError(f"{index.with_name(shard)} does not hold the tensors that {index.name} "
                            "promises; download both again.")
        tensors |= part.tensors
    return TensorFile(tensors, *(kinds or ["safetensors"]), index)


def _read_file(path: Path) -> TensorFile:
    kind = _kind(path)
    try:
        match kind:
            case "npz":
                return TensorFile(_read_npz(path), kind, path)
            case "safetensors":
                return TensorFile(_read_safetensors(path), kind, path)
            case "torch":
                return _read_torch(path)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a parser of damaged files raises anything
        raise _damaged(path, _reason(error)) from error


def _kind(path: Path) -> str:
    """Recognises a file by its first bytes; UserError where it holds no tensors."""
    if not os.path.exists(path):
        raise _missing(path)
    if not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder; give a weights file.")
    with path.open("rb") as file:
        head = file.read(1024)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        raise UserError(f"{path} is empty; download or copy it again.")
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _kind_of_archive(path)
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "a web page, as a failed download leaves behind; download the file itself"
    elif text.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer in place of the file; fetch the file with `git lfs pull`"
    elif head.startswith(b"\x93NUMPY"):
        what = "one array without a name (.npy); save all weights together with np.savez"
    elif head.startswith(b"\x89HDF"):
        what = "an HDF5 file, as Keras writes; save the weights as safetensors or npz"
    elif head.startswith(b"\x1f\x8b"):
        what = "compressed with gzip; unpack it first"
    elif _is_text(head):
        what = "a text file; give the npz, safetensors or .pth file with the weights"
    elif head[8:9] == b"{":
        return "safetensors"
    elif re.match(rb"\x80[\x02-\x05]", head):
        return "torch"
    else:
        what = "not an npz, safetensors or PyTorch file; give one of these"
    raise UserError(f"{path} is {what}.")


def _is_text(head: bytes) -> bool:
    try:
        text, _ = codecs.utf_8_decode(head, "strict", False)  # its last character may be cut
    except UnicodeDecodeError:
        return False
    return all(character in "\t\n\r\f" or character >= " " for character in text)


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(path, "its zip archive has no end") from error
    _check_expansion(path, sum(member.file_size for member in members))
    names = [member.filename for member in members]
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(f"{path} is a TorchScript program; save model.state_dict() instead.")
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    strangers = [name for name in names if not name.endswith(".npy")]
    if strangers or not names:
        raise UserError(f"{path} is a zip archive of {_some(strangers) or 'nothing'}, neither an "
                        "npz nor a PyTorch file; unpack it and give the weights file inside.")
    if len(set(names)) < len(names):
        raise _damaged(path, "it holds two tensors of the same name")
    return "npz"


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                header = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                          else np.lib.format.read_array_header_2_0)
                shape, _, dtype = header(file)
                if not _is_raw_bfloat16(dtype) and dtype.newbyteorder("=").name not in _DTYPES:
                    raise _unknown_dtype(path, name, dtype)
                # NumPy allocates what the header says before it reads.
                if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
                    raise _damaged(path, f"the size of {name!r:.80} does not match its shape")
    with np.load(path, allow_pickle=False) as arrays:
        tensors = {name: arrays[name] for name in arrays.files}
    return {
        name: array.view(ml_dtypes.bfloat16) if _is_raw_bfloat16(array.dtype)
        else array.astype(array.dtype.newbyteorder("="), copy=False)
        for name, array in tensors.items()
    }


def _is_raw_bfloat16(dtype: np.dtype) -> bool:
    """NumPy's format has no bfloat16: it is stored as two bytes without a meaning."""
    return dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """safetensors itself refuses large headers, gaps, overlaps and wrong sizes."""
    with safetensors.safe_open(path, framework="np") as file:
        for name in file.keys():
            if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES.values():
                raise _unknown_dtype(path, name, dtype)
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise _damaged(path, "its header has a duplicate key")

    json.loads(header, object_pairs_hook=unique)
    return safetensors.numpy.load_file(path)


def _read_torch(path: Path) -> TensorFile:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is a PyTorch file and PyTorch is not installed; install torch, or "
                        "save the weights as safetensors where it is.") from error
    if torch.__version__ < (2, 6):  # CVE-2025-32434: its weights-only mode could run code
        raise UserError(f"{path} is not read with PyTorch {torch.__version__}, which is not safe "
                        "against hostile files; install torch>=2.6.")
    try:
        # Namespaces, plain attributes, are how many training scripts keep their flags.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if code := re.search(r"GLOBAL ([\w.]{1,80})", str(error)):
            raise UserError(
                f"{path} holds more than tensors ({code[1]}), which could run code, so it was not "
                "opened; if you trust it, load it with PyTorch and save model.state_dict() alone."
            ) from error
        raise
    unwrapped, choices, config = (), (), None
    if isinstance(loaded, dict):
        found = tuple(key for key in _WRAPPERS if isinstance(loaded.get(key), dict)
                      and any(map(torch.is_tensor, loaded[key].values())))
        unwrapped = found[:1]
        choices = tuple(f"the weights under {found[0]!r}, where the file also has some under "
                        f"{other!r}" for other in found[1:])
        if isinstance(loaded.get("arch"), str):  # as timm's scripts write it
            config = {"architecture": loaded["arch"]}
    state = loaded[unwrapped[0]] if unwrapped else loaded
    if not isinstance(state, dict) or not any(torch.is_tensor(x) for x in state.values()):
        what = _some(list(map(str, state))) if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path} holds no state dict but {what}; save model.state_dict() alone.")
    # Numbers and texts between the tensors, such as the epoch, are no weights.
    state = {str(name): value.detach() for name, value in state.items() if torch.is_tensor(value)}
    # A few bytes can be expanded to a tensor of any size.
    _check_expansion(path, sum(x.numel() * x.element_size() for x in state.values()))
    tensors = {}
    for name, tensor in state.items():
        dtype, layout = (str(x).removeprefix("torch.") for x in (tensor.dtype, tensor.layout))
        if dtype not in _DTYPES or layout != "strided":
            raise _unknown_dtype(path, name, dtype if layout == "strided" else layout)
        tensor = tensor.contiguous()
        tensors[name] = (tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
                         if dtype == "bfloat16" else tensor.numpy())
    return TensorFile(
        tensors, "torch", path, config, unwrapped=unwrapped, choices=choices)


def _without_wrapper(file: TensorFile) -> TensorFile:
    """Takes off what a wrapping module, compiled or parallel, put before every name, and drops what
    one that averages or pretrains holds beside the model."""
    tensors, taken, dropped = dict(file.tensors), file.unwrapped, ()
    if "n_averaged" in tensors and tensors["n_averaged"].ndim == 0:  # PyTorch's AveragedModel
        dropped += (("n_averaged", tensors.pop("n_averaged").shape, "of weight averaging"),)
    for prefix in 2 * _PREFIXES:  # wrapped in either order
        if "backbone.patch_embed.proj.weight" in tensors:  # DINO's and DINOv2's, beside their heads
            beside = [name for name in tensors if not name.startswith("backbone.")]
            width = tensors["backbone.patch_embed.proj.weight"].shape[:1]
            if {*beside} == {"head.weight", "head.bias"} and (
                    tensors["head.weight"].shape[1:] == width):  # a classifier of one's own
                beside = []
                for name in ("head.weight", "head.bias"):
                    tensors[f"backbone.{name}"] = tensors.pop(name)
            dropped += tuple((name, tensors.pop(name).shape, "beside the backbone, as of "
                              "self-supervised training") for name in beside)
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): array for name, array in tensors.items()}
            taken += (prefix,)
    return replace(file, tensors=tensors, unwrapped=taken, dropped=dropped)


def _read_json(path: Path, *, missing_ok: bool = False) -> dict | None:
    if not os.path.exists(path):
        if missing_ok:
            return None
        raise _missing(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({_reason(error)}); correct it, or download it "
                        "again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is JSON but not an object {{...}}; download it again.")
    return value


def _check_expansion(path: Path, declared: int) -> None:
    size = path.stat().st_size
    if declared > max(_ALWAYS_READ, _MOST_EXPANSION * size):
        raise UserError(
            f"{path} has {size} bytes and would unpack to {declared}, more than "
            f"{_MOST_EXPANSION} times as many, so it was not read; save the weights uncompressed."
        )


def _missing(path: Path) -> UserError:
    """Names the first folder on the way that does not exist, and what is there instead."""
    while not os.path.exists(path.parent):
        path = path.parent
    try:
        names = os.listdir(path.parent)
    except OSError:
        names = []
    return UserError(f"{path} does not exist{did_you_mean(path.name, names)}")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged or incomplete ({reason}); download or save it again.")


def _unknown_dtype(path: Path, name: str, dtype: object) -> UserError:
    return UserError(f"{path} holds {name!r:.80} as {dtype}, which is not supported for weights; "
                     "save it as float32, float16 or bfloat16.")


def _reason(error: Exception) -> str:
    """One line; of PyTorch's long advice, what went wrong."""
    advice = r"(?s)^Weights only load failed.*(?:WeightsUnpickler error:|trusted source\.)\s*"
    text = re.sub(advice, "", str(error))
    text = re.split(r"\n|\. |\.$", text.strip())[0] or type(error).__name__
    return "".join(character for character in text if character.isprintable())[:200]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"{name!r:.80}" for name in names[:5]) + more
