"""Building, reading and checking a run's config; config_keys.py lists its keys.

A recipe (`configs/*.py`) calls `base_config()`, changes values and returns it; `main` adds the
command line's `--config.key=value` and hands the result to `validate`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from vit_jax.config_keys import FIELDS, Field
from vit_jax.errors import UserError, did_you_mean
from vit_jax.models.variants import canonical_name


def base_config() -> ml_collections.ConfigDict:
    """All keys at their defaults. Recipes assign freely; `validate` judges and locks the result."""
    config = ml_collections.ConfigDict(type_safe=False)
    for path, field in FIELDS.items():
        *sections, key = path.split(".")
        node = config
        for section in sections:
            if section not in node:
                node[section] = ml_collections.ConfigDict(type_safe=False)
            node = node[section]
        node[key] = field.default
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'model.variant': 'S/16', ...}, in the order of the config."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ml_collections.ConfigDict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Nested dictionaries, as `config.json` stores them."""
    return {
        key: to_json(value) if isinstance(value, ml_collections.ConfigDict) else value
        for key, value in config.items()
    }


def from_json(values: dict[str, Any]) -> ml_collections.ConfigDict:
    """The inverse of `to_json`. Keys that this version added get their defaults.

    Raises:
      UserError: an unknown key or a wrong value.
    """
    config = base_config()
    for path, value in flatten(values).items():
        set_value(config, path, value)
    return config


def set_value(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
    """Sets one key by its dotted path, checked and converted.

    Raises:
      UserError: unknown key, or a value of the wrong type or range.
    """
    value = check_value(path, value)
    *sections, key = path.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[key] = value


def parse_value(path: str, text: str) -> Any:
    """Reads a command line's text as the type of key `path`; `1e3` is an integer, `none` is None
    (but for keys that have a choice of that name, which only `None` resets).

    Raises:
      UserError: unknown key, or text that is no such value.
    """
    field = _field(path)
    if field.optional and text.strip().lower() == "none" and text not in field.choices:
        return None
    if field.type is tuple or (field.length and "," in text):
        if field.item is not str or text.strip() in ("()", "[]"):  # a regex keeps its brackets
            text = text.strip("()[] ")
        parts = [part.strip() for part in _split(text)]
        return check_value(
            path, tuple(_parse_scalar(path, field.item, part) for part in parts if part))
    return check_value(path, _parse_scalar(path, field.type, text))


def _split(text: str) -> list[str]:
    r"""Splits at commas, but not at those inside the brackets of a regex or after a backslash:
    `a\d{1,2},b` has two parts."""
    parts, depth = [""], 0
    for token in re.findall(r"\\.|\[\^?\]?(?:\\.|[^]\\])*\]|.", text, re.DOTALL):
        depth = max(0, depth + (token in ("(", "{")) - (token in (")", "}")))
        if token == "," and not depth:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def format_value(value: Any) -> str:
    """What `parse_value` reads as this value."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(format_value, value)) or "()"
    return str(value)


def _parse_scalar(path, type_, text):
    try:
        if type_ is bool:
            return {"true": True, "1": True, "yes": True,
                    "false": False, "0": False, "no": False}[text.strip().lower()]
        if type_ is int:
            try:
                return int(text)
            except ValueError:
                number = float(text)
                if number != int(number):
                    raise
                return int(number)
        return type_(text)
    except (ValueError, KeyError, OverflowError):
        raise UserError(
            f"config.{path}={text!r} is not {_type_name(_field(path))}."
        ) from None


def check_value(path: str, value: Any) -> Any:
    """Returns `value` in the key's own type (1 becomes 1.0 for a float).

    Raises:
      UserError: unknown key; wrong type, choice, range or length.
    """
    field = _field(path)
    if value is None and field.optional:
        return None
    many = isinstance(value, (tuple, list)) and (field.type is tuple or field.length)
    if many:
        value = tuple(_convert(path, field, field.item, item) for item in value)
        if field.length and len(value) != field.length:
            raise UserError(f"config.{path}={value!r} must have {field.length} entries.")
    elif field.type is tuple:
        raise UserError(f"config.{path}={value!r} is not {_type_name(field)}.")
    else:
        value = _convert(path, field, field.type, value)
    for item in value if many else (value,):
        if field.choices and item not in field.choices:
            raise UserError(
                f"config.{path}={item!r} is not one of "
                f"{', '.join(map(repr, field.choices))}{did_you_mean(str(item), field.choices)}"
            )
        if isinstance(item, (int, float)) and not field.minimum <= item <= field.maximum:
            limits = [f"at least {field.minimum:.10g}"] if field.minimum > -math.inf else []
            limits += [f"at most {field.maximum:.10g}"] if field.maximum < math.inf else []
            raise UserError(f"config.{path}={item} must be {' and '.join(limits)}.")
    return value


def _convert(path, field, type_, value):
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{path}={value} is not a finite number.")
    if type_ is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type_ is int and isinstance(value, float) and value == int(value):
        return int(value)
    if isinstance(value, type_) and (type_ is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"config.{path}={value!r} is not {_type_name(field)}.")


def _type_name(field: Field) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string",
             tuple: "a list"}
    name = names[field.type]
    if field.type is tuple:
        name += f" of {field.length} values" if field.length else " of values"
    elif field.length:
        name += f" or {field.length} of them"
    return name + (" or none" if field.optional else "")


def _field(path: str) -> Field:
    if path in FIELDS:
        return FIELDS[path]
    inside = [key for key in FIELDS if key.startswith(path + ".")]
    if inside:
        raise UserError(f"config.{path} is a section; set one of its keys: {', '.join(inside)}.")
    # The nearest name: of the whole path first, else of its last part (`batchsize` in the wrong
    # section).
    by_last_part = {key.rsplit(".", 1)[-1]: key for key in FIELDS}
    hint = did_you_mean(path, FIELDS)
    last = path.rsplit(".", 1)[-1]
    if last in by_last_part:
        hint = f"; did you mean {by_last_part[last]!r}?"
    raise UserError(f"Unknown config key {path!r}{hint}")


def validate(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Checks a finished config: every key known and of its type, and the keys fit each other.

    Returns:
      A locked config with every value in its field's own type.

    Raises:
      UserError: naming the key.
    """
    config = from_json(config)
    try:
        canonical_name(config.model.variant)
    except ValueError as error:
        raise UserError(f"config.model.variant: {error}") from None
    if (config.total_steps is None) == (config.epochs is None):
        given = "both are" if config.epochs is not None else "neither is"
        raise UserError(f"Give one of config.total_steps and config.epochs; {given} set.")
    if config.epochs == 0:
        raise UserError("config.epochs=0 would train nothing; set it above 0.")
    if config.batch_size % config.accumulation_steps:
        raise UserError(
            f"config.batch_size={config.batch_size} is not divisible by "
            f"config.accumulation_steps={config.accumulation_steps}."
        )
    if config.task == "masked_patches":
        if config.init:
            raise UserError("config.task='masked_patches' starts from random weights; config.init "
                            "is for fine-tuning what comes out of it.")
        for key in ("mixup", "cutmix", "random_erasing"):
            if config.data[key]:
                raise UserError(f"config.data.{key}={config.data[key]} changes the colours that "
                                "config.task='masked_patches' predicts; set it to 0.")
        for key in ("loss.name", "loss.label_smoothing", "model.representation_size",
                    "model.head_bias_init"):
            section, name = key.split(".")
            if config[section][name] != (default := FIELDS[key].default):
                raise UserError(f"config.{key}={config[section][name]} only applies to "
                                "classification, not to config.task='masked_patches'; leave it at "
                                f"{default}.")
    for key in ("names", "shots") if config.probes.every else ():
        if not config.probes[key]:
            raise UserError(f"config.probes.{key} is empty, so that config.probes.every="
                            f"{config.probes.every} would probe nothing; name some, or set "
                            "config.probes.every=0.")
    if config.model.scan_unroll and not config.model.scan_layers:
        raise UserError("config.model.scan_unroll=true requires config.model.scan_layers=true; set "
                        "that too.")
    if config.mesh.data == 0:
        raise UserError("config.mesh.data=0 must be -1 (all devices that are left) or at least 1.")
    for key in ("crop_area", "crop_aspect"):
        low, high = config.data[key]
        if low > high:
            raise UserError(f"config.data.{key}=({low}, {high}) must be (smallest, largest).")
    first, last = config.profile_steps or (1, 1)
    if first > last:
        raise UserError(f"config.profile_steps=({first}, {last}) would record nothing; give "
                        f"({last}, {first}).")
    smallest = min(image_size(config))
    if config.data.eval_crop == "center_crop" and (config.data.eval_resize or smallest) < smallest:
        raise UserError(
            f"config.data.eval_resize={config.data.eval_resize} is smaller than the image_size "
            f"{smallest}, which config.data.eval_crop='center_crop' cuts out of it; set it to "
            f"{smallest} or more."
        )
    if config.optimizer.name == "adam" and config.optimizer.weight_decay:
        raise UserError(
            "config.optimizer.name='adam' has no weight decay; use 'adamw' (decoupled decay) or "
            "set config.optimizer.weight_decay=0."
        )
    if config.ema_decay == 0:
        raise UserError(
            "config.ema_decay=0 would average nothing; use none to keep no EMA weights, or a "
            "factor such as 0.9999."
        )
    if config.optimizer.clip_norm == 0:
        raise UserError(
            "config.optimizer.clip_norm=0 would clip every gradient to zero; use none to disable "
            "clipping."
        )
    if config.parallelism == "pmap" and (config.mesh.fsdp, config.mesh.tensor) != (1, 1):
        raise UserError(
            "config.parallelism='pmap' is data parallel only; set mesh.fsdp=1 and mesh.tensor=1, "
            "or parallelism='jit'."
        )
    return config.lock()


def image_size(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """(height, width) of the model's input."""
    size = config.data.image_size
    return size if isinstance(size, tuple) else (size, size)


def differences(
    ours: ml_collections.ConfigDict, theirs: ml_collections.ConfigDict
) -> dict[str, str]:
    """`key: their value -> our value` for every key whose values differ."""
    ours, theirs = flatten(ours), flatten(theirs)
    return {
        key: f"{key}: {theirs[key]!r} -> {ours[key]!r}"
        for key in FIELDS
        if ours[key] != theirs[key]
    }


def describe() -> str:
    """All keys with defaults and meanings, for --help."""
    lines, section = [], None
    for path, field in FIELDS.items():
        if path.rpartition(".")[0] != section:
            section = path.rpartition(".")[0]
            lines.append(f"\n {section or 'run'}")
        choices = f" [{'|'.join(field.choices)}]" if field.choices else ""
        lines.append(f"  --config.{path}={field.default}{choices}\n      {field.help}")
    return "\n".join(lines)
