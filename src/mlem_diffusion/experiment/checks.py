"""The configuration checked as a whole, before anything runs: every value is of its kind, or one sentence says so.
The kind of a setting follows from its default in configs/: 16 asks for a whole number of 1 or more, 0.5 for a number of
0 or more. `_KINDS` has those whose default says too little. A kind is written as it is read: "auto or a path"."""

import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UserError
from ..models.compiled import SETTINGS
from ..multilevel.estimators import COINS
from ..multilevel.planner import METHODS
from .config import ROOT

_GROUPS = ("data", "process", "unet", "metrics")
_OPEN = ("metrics", "process", "process.schedule", "sampler")  # may have keys of the user's own
_SEARCH = "hydra.searchpath"  # folders with groups of the user's own
_PATHS = ("paths.data", "paths.checkpoints", "paths.results", "data.source", "metrics.weights")

_ANY, _AMOUNT, _POSITIVE, _FRACTION = "a number", "a number of 0 or more", "a number above 0", "a number in 0..1"
_COUNT, _NATURAL, _TWO = (f"a whole number of {least} or more" for least in (1, 0, 2))
_NAME, _GROUP = "the name of a folder, such as mine or faces/mine", "a group of settings in braces"
_LIST, _FULL = "a list, each ", "a list of one or more, each "
_INDICES = f"{_FULL}a whole number|text"  # of levels, or names
_TRAINING = "float32|autocast|bf16"
_RISING = f"a rising list, each {_COUNT}"
# by path, or by last key; a list takes everything after "each"
_KINDS = {
    "name": _NAME, "title": "null|text", "tracking.mode": "null|text", "seed": _NATURAL, "dynamics": "sde|ode",
    "compile": "|".join(SETTINGS), "precision": "float32|bf16", "reference_channels": _POSITIVE,
    "precondition": "scalar|gaussian",
    "methods": _LIST + "|".join(METHODS), "coins": _LIST + "|".join(COINS), "costs": _LIST + _POSITIVE,
    "attention": _LIST + _COUNT, "dropout": _FRACTION, "warmup_images": _NATURAL, "lr": _POSITIVE, "clip": _POSITIVE,
    "decay_fraction": _FRACTION, "snapshots": _FULL + _FRACTION, "graph": "auto|on|off", "seconds": _POSITIVE,
    "focus": f"null|{_FULL}{_ANY}", "train.teacher.widths": _RISING, "train.teacher.precision": f"auto|{_TRAINING}",
    "family.widths": _RISING, "family.target": "v|epsilon|x0",
    "family.gaussian_rank": f"null|{_COUNT}", "family.callable": f"null|{_GROUP}",
    "family.conditions": f"null|{_GROUP}", "family.decoder": f"null|{_GROUP}",
    "family.shape": f"null|{_FULL}{_COUNT}", "threads": f"null|{_COUNT}", "workers": f"auto|{_COUNT}",
    "max_minutes": f"null|{_AMOUNT}", "only": f"null|{_FULL}text", "data.size": "a whole number of 4 or more",
    "data.crop": "celeba|square|none", "data.count": f"null|{_TWO}", "process.logsnr_min": _ANY,
    "process.logsnr_max": _ANY, "process.base_steps": _TWO, "process.spacing": "time|logsnr",
    "metrics.weights": "null|a path", "train.precision": f"auto|{_TRAINING}",
    "train.narrow.precision": f"auto|{_TRAINING}", "gamma.noise_levels": _TWO, "gamma.repeats.levels": _NATURAL,
    "gamma.repeats.seeds": _LIST + _NATURAL, "optimise.cost": "flops|seconds",
    "optimise.bases": f"{_LIST}null|{_NATURAL}", "optimise.calibrate": _TWO, "optimise.calibrate_steps": _FULL + _TWO,
    "optimise.measured.steps": _LIST + _COUNT, "compare.gamma": f"auto|{_POSITIVE}", "compare.plans": "auto|none",
    "protocol": "both|strict|paper", "compare.num_distance": _NATURAL, "compare.num_real": f"null|{_TWO}",
    "compare.distances.paper": _NATURAL,
    "compare.distances.strict": _NATURAL, "compare.distances.evaluations": _POSITIVE,
    "compare.paper.baselines.levels": f"all|largest|{_INDICES}", "compare.paper.ml_em.c": _FULL + _POSITIVE,
    "compare.paper.ml_em.families": f"{_FULL}all|{_INDICES}", "compare.paper.patterns.count": _TWO,
    "compare.paper.learned.families": f"{_FULL}all|{_INDICES}",
    "compare.grid_images": _NATURAL, "compare.baselines.levels": f"all|largest|{_INDICES}",
    "compare.stitched.sequences": _FULL + _INDICES, "compare.stitched.switch": _FULL + _FULL + _FRACTION,
    "compare.ml_em.families": f"{_FULL}all|chain|{_INDICES}", "compare.ml_em.c": _FULL + _POSITIVE,
    "seeds": "seeds such as 0-63", "sampler": f"best|{_GROUP}", "rates.dynamics": f"{_FULL}sde|ode",
    "rates.gammas": _FULL + _POSITIVE, "rates.choose_seeds": _FULL + _NATURAL, "rates.judge_seeds": _FULL + _NATURAL,
    "benchmark.size": "auto|full|small", "modes": f"{_FULL}eager|compiled", "precisions": _FULL + _TRAINING,
    "process.schedule.offset": _AMOUNT, "sample.gflops": f"null|{_POSITIVE}", "sample.error": f"null|{_POSITIVE}",
    "sample.dynamics": "any|sde|ode", "optimise.diagnose.seeds": _COUNT, "rates.poisson.seeds": _COUNT,
    **dict.fromkeys(_PATHS[:4], "a path"),
}  # fmt: skip


@functools.cache
def _defaults() -> dict[str, Any]:
    """The defaults as plain values. Of a list of groups, all keys are known, and those that every one has needed."""

    def load(name: str) -> Any:
        return OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / f"{name}.yaml"))

    found = load("config")
    found |= {
        group: load(f"{group}/{entry[group]}") for entry in found["defaults"] for group in _GROUPS if group in entry
    }
    found["unet"]["patch"] = 1
    for part in ("unet", "train"):
        found[part]["narrow"] = [{"upto": 1}, {"upto": 1, **found[part]}]
    found["train"]["teacher"] = {**found["train"], **found["train"]["teacher"]}
    for size in ("full", "small"):
        found["benchmark"][size]["unet"] = found["unet"]
    found["optimise"]["rules"].append({**found["optimise"]["rules"][1], "methods": []})
    found = {key: value for key, value in found.items() if key not in ("defaults", "hydra")}
    return found | {"sampler": {"dynamics": "ode", "steps": 20, "gamma": 2.5}}


def settle(cfg: DictConfig, given: Sequence[str]) -> None:
    """Bring the configuration into its final form, in place; UserError for the first fault.
    given: the overrides of the command line. A group chosen there stands as in its file, with the fields given there:
    the experiment's were meant for another choice. Whole floats become int, and ~ the home folder."""
    parsed = OverridesParser.create().parse_overrides(list(given))
    chosen = {o.key_or_group for o in parsed if o.key_or_group in _GROUPS and isinstance(o.value(), str)}
    ours = {*chosen, "family"}  # a family's file may set fields of the groups
    own = [str(o.input_line) for o in parsed if o.key_or_group.split(".")[0] in ours or _SEARCH in o.key_or_group]
    fresh = compose("config", own) if chosen else {}  # without the experiment
    for group in chosen:
        cfg[group] = fresh[group]
    try:
        if missing := [key for key in _defaults() if key not in cfg]:
            raise UserError(f"The configuration lacks the key {missing[0]}.")
        _check(cfg, _defaults(), "")
        if not cfg.family.widths and cfg.family.callable is None:
            raise UserError(f"family.widths=[] must be {_KINDS['family.widths']}, and not empty.")
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration cannot be resolved: {' '.join(str(error).split())}.") from error


def _check(node: DictConfig, defaults: Mapping[str, Any], where: str) -> None:
    """Check the keys and values below the node at the path `where`."""
    rule = re.sub(r"\[\d+\]", "", where)
    for key in map(str, node):
        path, general = f"{where}.{key}".lstrip("."), f"{rule}.{key}".lstrip(".")
        if key == "_target_" or OmegaConf.is_missing(node, key):
            continue
        value, default = node[key], defaults.get(key)
        if key not in defaults and general not in _KINDS:
            near = isinstance(value, DictConfig) and get_close_matches(key, defaults, cutoff=0.8)
            if rule not in _OPEN and (rule or near):  # at the top, others may stand beside the groups
                raise UserError(f"{path} is no setting; {where or 'the configuration'} has {', '.join(defaults)}.")
        elif isinstance(default, Mapping) and isinstance(value, DictConfig):
            target = str(value.get("_target_") or "mlem_diffusion.")
            if target.startswith("mlem_diffusion."):  # a class of the user's has arguments of its own
                _check(value, default, path)
        elif isinstance(default, list) and default and isinstance(default[0], Mapping):
            _check_entries(node, key, default, path)
        else:
            _check_value(node, key, _KINDS.get(general) or _KINDS.get(key) or _kind_of(default), path)


def _check_entries(node: DictConfig, key: str, defaults: Sequence[Mapping[str, Any]], path: str) -> None:
    if node[key] is None:
        node[key] = []
    if not isinstance(node[key], ListConfig) or not all(isinstance(entry, DictConfig) for entry in node[key]):
        raise UserError(f"{path}={_shown(node[key])} must be {_LIST}{_GROUP}.")
    for i, entry in enumerate(node[key]):
        _check(entry, {k: v for default in defaults for k, v in default.items()}, f"{path}[{i}]")
        for name in defaults[0]:
            if name not in entry and all(name in default for default in defaults):
                raise UserError(f"{path}[{i}] lacks the key {name}.")


def _check_value(node: DictConfig, key: str, kind: str, path: str) -> None:
    """Check one value, and write it back if reading changes it."""
    value = OmegaConf.to_container(node[key], resolve=True) if OmegaConf.is_config(node[key]) else node[key]
    try:
        found = _read(value, kind)
    except (ValueError, OverflowError):
        raise UserError(f"{path}={_shown(value)} must be {kind.replace('|', ' or ')}.") from None
    if path in _PATHS and str(found).startswith("~"):
        raw: Any = OmegaConf.to_container(node, resolve=False)
        # with its ${name}, which a sweep changes
        found = os.path.expanduser(raw[key] if raw[key].startswith("~") else found.replace("${", r"\${"))
        if found.startswith("~"):
            raise UserError(f"{path}={value}: no such home folder is known here (HOME); write the whole path.")
    if repr(found) != repr(value):
        node[key] = found


def _read(value: Any, kind: str, alone: bool = True) -> Any:
    """The value in the type of its kind, or ValueError. alone: one value stands for a list of one."""
    parts: Any = re.fullmatch(r"(.*?)(?:(a (?:rising )?list[^,]*), each (.*))?", kind)  # words, then a list
    options, form, inner = parts.groups()
    for option in filter(None, options.split("|")):
        with suppress(ValueError):
            return _read_one(value, option)
    if form is None or not (alone or isinstance(value, list)):
        raise ValueError
    found = [_read(v, inner, alone=False) for v in (value if isinstance(value, list) else [value])]
    if ("more" in form and not found) or ("rising" in form and any(b <= a for a, b in pairwise(found))):
        raise ValueError
    return found


def _read_one(value: Any, option: str) -> Any:
    if number := re.fullmatch(r"a (whole )?number(?: (of|above|in) (\d+)\D*(\d*))?", option):
        found: Any = float(value) if isinstance(value, str) else value  # text may come from the environment
        whole, sign, least, most = number.groups()
        if isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found):
            inside = float(least or "-inf") <= found <= float(most or "inf") and (sign != "above" or found > 0)
            if inside and (not whole or found == int(found)):
                return int(found) if whole else found
    elif option == _GROUP:
        if isinstance(value, Mapping):
            return value
    elif option in ("text", "a path", _NAME, _KINDS["seeds"]):
        if isinstance(value, (str, int)) and not isinstance(value, bool):  # a folder may be called 2026
            text, path = str(value), PurePath(str(value))
            outside = option == _NAME and (path.is_absolute() or ".." in path.parts)
            if option == "text" or (text.strip() and not outside):
                return text
    elif option in ("true", "false") and value in (0, 1):
        if value == (option == "true"):
            return bool(value)
    elif _shown(value) == option or (option in ("on", "off") and value is (option == "on")):  # YAML's reading of on
        return {"null": None, "true": True, "false": False}.get(option, option)
    raise ValueError


def _kind_of(default: Any) -> str:
    if isinstance(default, list):
        return _FULL + _kind_of(default[0])
    return {bool: "true|false", int: _COUNT, float: _AMOUNT, str: "text", dict: _GROUP}[type(default)]


def _shown(value: Any) -> str:
    """A value as on the command line."""
    if isinstance(value, (list, ListConfig)):
        return f"[{','.join(map(_shown, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
