"""What one flag is: its name, the values it takes, and where the known flags come from.

Flags come from the kit's dataclasses (arguments.py) and from the trainers' configuration classes. The latter are
read from the installed libraries' source text: importing torch and transformers takes 5-7 s, reading 20 ms.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from stagecraft.errors import UserError

# Configuration classes from the most general to the most specific: (package, file, class).
_TRAINING = [("transformers", "training_args.py", "TrainingArguments")]
_TRL = [*_TRAINING, ("trl", "trainer/base_config.py", "_BaseConfig")]
TRAINERS = {
    "transformers": _TRAINING,
    "reward": [*_TRL, ("trl", "trainer/reward_config.py", "RewardConfig")],
    "dpo": [*_TRL, ("trl", "trainer/dpo_config.py", "DPOConfig")],
}

_KINDS = (bool, int, float, str)


@dataclass
class Flag:
    """One flag: where its value goes and how text becomes a value."""

    name: str
    kinds: set[type]
    is_list: bool = False  # takes several words
    item: type = str
    or_single: bool = False  # one word stays a plain value ("tensorboard" rather than ["tensorboard"])
    optional: bool = False
    required: bool = False
    default: Any = None
    help: str = ""
    group: str = ""
    aliases: tuple[str, ...] = ()
    positional: bool = False
    choices: tuple[str, ...] = ()

    def convert(self, value: Any) -> Any:
        """A YAML value or the list of words after a flag -> a checked value. Raises ValueError with the reason."""
        if isinstance(value, Words):
            if self.is_list and not (self.or_single and len(value) == 1):
                if self.optional and len(value) == 1 and value[0] in ("None", "null"):
                    return None
                return [_to_kind(word, {self.item}) for word in value]
            if not value and bool in self.kinds:
                return True
            if len(value) != 1:
                raise ValueError(f"needs one value, not {len(value)}")
            value = value[0]
        if self.is_list and value is not None and not (self.or_single and not isinstance(value, list)):
            items = value if isinstance(value, list) else [value]
            return [_to_kind(item, {self.item}) for item in items]
        if value is None or (self.optional and value in ("None", "null")):
            if self.optional:
                return None
            raise ValueError("has no value")
        value = _to_kind(value, self.kinds)
        if self.choices and value not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}, not {value!r}")
        return value


class Words(list):
    """The words after a flag on the command line (to tell them from a YAML list)."""


def dataclass_flags(group: type) -> list[Flag]:
    """The fields of one of the kit's dataclasses as flags."""
    flags = []
    for item in dataclasses.fields(group):
        # Text where the module postpones annotations, else the class or the union itself.
        annotation = item.type.__name__ if isinstance(item.type, type) else str(item.type)
        flag = _flag_from_annotation(item.name, annotation)
        flag.required = item.default is MISSING and item.default_factory is MISSING
        if item.default is not MISSING:
            flag.default = item.default
        elif item.default_factory is not MISSING:
            flag.default = item.default_factory()
        flag.help = item.metadata.get("help", "")
        flag.aliases = tuple(item.metadata.get("aliases", ()))
        flag.positional = item.metadata.get("positional", False)
        flag.choices = tuple(item.metadata.get("choices", ()))
        flag.group = (group.__doc__ or group.__name__).splitlines()[0]
        flags.append(flag)
    return flags


@functools.cache
def _class_fields(package: str, file: str, name: str) -> list[Flag]:
    """Annotated fields of a configuration class, from the installed source, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {package} is not installed here: run `make setup`")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    flags = []
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            flag = _flag_from_annotation(node.target.id, ast.unparse(node.annotation))
            for keyword in node.value.keywords if isinstance(node.value, ast.Call) else []:
                if keyword.arg == "default":
                    flag.default = _literal(keyword.value)
                if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                    for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                        if _literal(key) == "help":
                            flag.help = str(_literal(value) or "").replace("%%", "%")
            flags.append(flag)
    return flags


def trainer_flags(trainer: str) -> dict[str, Flag]:
    """Every field of a trainer's configuration; `trainer` is a key of TRAINERS."""
    flags: dict[str, Flag] = {}
    for source in TRAINERS[trainer]:
        for flag in _class_fields(*source):
            flag.group = "Trainer"
            flags[flag.name] = flag
    return flags


def _literal(node: ast.AST | None) -> Any:
    try:
        return ast.literal_eval(node)  # type: ignore[arg-type]
    except (ValueError, TypeError, SyntaxError):
        return None


def _flag_from_annotation(name: str, annotation: str) -> Flag:
    """'int | None', 'Optional[list[str]]', 'dict | str | None' ... -> the kinds of value the flag takes."""
    flag = Flag(name, set())
    text = annotation.strip("'\"")
    flag.optional = "None" in text or "Optional" in text
    listed = re.search(r"[Ll]ist\[(\w+)\]", text)
    if listed:
        flag.is_list = True
        flag.item = {"float": float, "int": int}.get(listed[1], str)
        flag.or_single = "str" in text.replace(listed[0], "")
    words = set(re.findall(r"\w+", text))
    flag.kinds = {kind for kind in _KINDS if kind.__name__ in words}
    if {"dict", "Dict"} & words:
        flag.kinds.add(dict)
    if not flag.kinds or words - {
        "bool",
        "int",
        "float",
        "dict",
        "None",
        "Optional",
        "str",
        "Any",
        "Union",
        "list",
    }:
        flag.kinds.add(str)  # enumerations (SchedulerType, OptimizerNames) take their value's text
    return flag


def _to_kind(value: Any, kinds: set[type]) -> Any:
    """The value as one of `kinds`, the narrowest first. Raises ValueError."""
    if dict in kinds and (isinstance(value, dict) or str(value).lstrip().startswith("{")):
        try:
            return value if isinstance(value, dict) else json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not JSON: {error}") from None
    for kind, convert in ((bool, to_bool), (int, _to_int), (float, _to_float)):
        if kind in kinds:
            try:
                return convert(value)
            except (ValueError, TypeError):
                continue
    if str in kinds and not isinstance(value, (dict, list)):
        return str(value)
    wanted = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        dict: "a JSON object",
        str: "text",
    }
    raise ValueError(
        f"must be {' or '.join(text for kind, text in wanted.items() if kind in kinds)}, not {value!r}"
    )


def to_bool(value: Any) -> bool:
    """true/false, yes/no, 1/0; a bare flag is true. Raises ValueError."""
    if isinstance(value, bool):
        return value
    if value == []:
        return True
    text = str(value).lower()
    if text in ("true", "yes", "1"):
        return True
    if text in ("false", "no", "0"):
        return False
    raise ValueError(f"must be true or false, not {value!r}")


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or isinstance(value, float) and not value.is_integer():
        raise ValueError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)
