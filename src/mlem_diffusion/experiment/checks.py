"""The configuration checked as a whole, before anything runs: every value is of its kind, or one sentence says so.

The kind of a setting is that of its default in configs/config.yaml (and in the groups that it names): 16 asks for a
whole number of 1 or more, 0.5 for a number of 0 or more. `_KINDS` has those whose default does not say enough."""

import difflib
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UserError
from ..models.compiled import SETTINGS
from ..models.family import at_width
from ..multilevel.estimators import COINS
from ..multilevel.planner import METHODS

_CONFIGS = Path(__file__).resolve().parents[3] / "configs"
_GROUPS = ("data", "process", "unet", "metrics")


class Kind(NamedTuple):
    """What a value must be, in words, and how it is read: the value in its type, or ValueError."""

    text: str
    read: Callable[[Any], Any]


def _number(limits: str, fits: Callable[[Any], bool], whole: bool = False) -> Kind:
    """A finite number. A whole one becomes int, so that 3e2 has the hash of 300; text may come from the environment."""

    def read(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        found: Any = float(value) if isinstance(value, str) else value
        if not math.isfinite(found) or not fits(found) or (whole and found != int(found)):
            raise ValueError
        return int(found) if whole else found

    return Kind(f"a {'whole ' if whole else ''}number{limits}", read)


def _whole(least: int = 1) -> Kind:
    return _number(f" of {least} or more", lambda value: value >= least, whole=True)


def _text(text: str, fits: Callable[[str], bool]) -> Kind:
    def read(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not fits(str(value)):
            raise ValueError
        return str(value)  # a folder may be called 2026

    return Kind(text, read)


def _words(*known: Any) -> Kind:
    def read(value: Any) -> Any:
        switches = isinstance(value, bool) and "off" in known  # YAML reads on and off so
        value = ("on" if value else "off") if switches else value
        if not any(value is word or (isinstance(word, str) and value == word) for word in known):
            raise ValueError
        return value

    text = [*map(_shown, known)]
    return Kind(" or ".join([*filter(None, [", ".join(text[:-1])]), text[-1]]), read)


def _either(*kinds: Kind) -> Kind:
    def read(value: Any) -> Any:
        for kind in kinds:
            with suppress(ValueError):
                return kind.read(value)
        raise ValueError

    return Kind(" or ".join(kind.text for kind in kinds), read)


def _list(kind: Kind, alone: bool = True, empty: bool = False, rising: bool = False) -> Kind:
    """A list; alone: one value stands for a list of one. rising: each entry is above the one before."""

    def read(value: Any) -> list[Any]:
        if not isinstance(value, list) and not alone:
            raise ValueError
        found = [kind.read(v) for v in (value if isinstance(value, list) else [value])]
        if not (found or empty) or (rising and any(b <= a for a, b in pairwise(found))):
            raise ValueError
        return found

    return Kind(f"a {'rising ' if rising else ''}list{'' if empty else ' of one or more'}, each {kind.text}", read)


def _group(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError
    return value


def _inside(name: str) -> bool:
    return bool(name.strip()) and not PurePath(name).is_absolute() and ".." not in PurePath(name).parts


def _shown(value: Any) -> str:
    """A value as on the command line."""
    if isinstance(value, (list, ListConfig)):
        return f"[{','.join(map(_shown, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


NULL, FLAG, GROUP = _words(None), _words(True, False), Kind("a group of settings in braces", _group)
TEXT, PATH = _text("text", lambda text: True), _text("a path", lambda text: bool(text.strip()))
NAME = _text("the name of a folder, such as mine or faces/mine", _inside)
ANY, WHOLE = _number("", lambda value: True), _number("", lambda value: True, whole=True)
AMOUNT, POSITIVE = _number(" of 0 or more", lambda value: value >= 0), _number(" above 0", lambda value: value > 0)
FRACTION = _number(" in 0..1", lambda value: 0 <= value <= 1)
_INDEX = _either(_words("gauss"), WHOLE)  # of a level
_TRAINING = ("float32", "autocast", "bf16")

# by path, or by last key
_KINDS = {
    "name": NAME, "seed": _whole(0), "compile": _words(*SETTINGS),
    "dynamics": _words("sde", "ode"),     "precision": _words("float32", "bf16"),
    "methods": _list(_words(*METHODS), empty=True), "coins": _list(_words(*COINS)), "costs": _list(POSITIVE, empty=True),
    "attention": _list(_whole(), empty=True), "optimise.measured.steps": _list(_whole(), empty=True),
    "family.widths": _list(_whole(), rising=True), "family.target": _words("v", "epsilon", "x0"),
    "family.gaussian_rank": _either(NULL, _whole()), "family.shape": _either(NULL, _list(_whole())),
    "family.callable": _either(NULL, GROUP),
    "threads": _either(NULL, _whole()), "workers": _either(_words("auto"), _whole()),
    "max_minutes": _either(NULL, AMOUNT), "only": _either(NULL, _list(TEXT)),
    "paths.data": PATH, "paths.checkpoints": PATH, "paths.results": PATH, "data.source": PATH,
    "data.size": _whole(4), "data.crop": _words("celeba", "square", "none"), "data.count": _either(NULL, _whole(2)),
    "process.base_steps": _whole(2), "process.logsnr_min": ANY, "process.logsnr_max": ANY,
    "process.spacing": _words("time", "logsnr"), "process.schedule.offset": AMOUNT,
    "dropout": FRACTION, "metrics.weights": _either(NULL, PATH), "metrics.name": TEXT,
    "warmup_images": _whole(0), "lr": POSITIVE, "clip": POSITIVE, "decay_fraction": FRACTION, 
    "snapshots": _list(FRACTION), "graph": _words("auto", "on", "off"),
    "train.precision": _words("auto", *_TRAINING), "train.narrow.precision": _words("auto", *_TRAINING),
    "gamma.noise_levels": _whole(2), "gamma.repeats.levels": _whole(0), "gamma.repeats.seeds": _list(_whole(0), empty=True),
    "optimise.cost": _words("flops", "seconds"), "optimise.calibrate": _whole(2), "optimise.calibrate_steps": _whole(2),
    "optimise.bases": _list(_either(NULL, _whole(0)), empty=True),
    "compare.gamma": _either(_words("auto"), POSITIVE), "compare.plans": _words("auto", "none"),
    "compare.grid_images": _whole(0), "compare.baselines.levels": _either(_words("all", "largest"), _list(_INDEX)),
    "compare.stitched.sequences": _list(_list(_INDEX, alone=False)),
    "compare.stitched.switch": _list(_list(FRACTION, alone=False)),
    "compare.ml_em.families": _list(_either(_words("all", "chain"), _list(_INDEX, alone=False))),
    "compare.ml_em.c": _list(POSITIVE), "sampler.c": _either(NULL, POSITIVE),
    "seeds": Kind("a list of seeds such as 0-63", lambda v: v if isinstance(v, str) else str(_whole(0).read(v))),
    "sampler": _words("best", "a setting in braces"),
    "rates.dynamics": _list(_words("sde", "ode")), "rates.gammas": _list(POSITIVE),
    "rates.choose_seeds": _list(_whole(0)), "rates.judge_seeds": _list(_whole(0)),
    "optimise.diagnose.seeds": _whole(), "rates.poisson.seeds": _whole(),
    "benchmark.size": _words("auto", "full", "small"), "seconds": POSITIVE, "modes": _list(_words("eager", "compiled")),
    "precisions": _list(_words(*_TRAINING)),
}  # fmt: skip
_OPEN = ("metrics", "process.schedule", "sampler")  # other keys are possible
_PATHS = ("paths.data", "paths.checkpoints", "paths.results", "data.source", "metrics.weights")


@functools.cache
def _defaults() -> dict[str, Any]:
    """The defaults as plain values; of a list of entries, all keys are known, and those that every entry has needed."""

    def load(name: str) -> Any:
        return OmegaConf.to_container(OmegaConf.load(_CONFIGS / f"{name}.yaml"))

    found = load("config")
    chosen = {
        group: option for entry in found["defaults"] if isinstance(entry, dict) for group, option in entry.items()
    }
    found |= {group: load(f"{group}/{chosen[group]}") for group in _GROUPS}
    found["unet"]["patch"] = 1
    for part in ("unet", "train"):
        found[part]["narrow"] = [{"upto": 1}, {"upto": 1, **found[part]}]
    for size in ("full", "small"):
        found["benchmark"][size]["unet"] = found["unet"]
    rules = found["optimise"]["rules"]
    rules.append({**rules[-1], "methods": found["optimise"]["methods"]})
    found["sampler"] = {"dynamics": "ode", "steps": 20, "gamma": 2.5}
    return found


def _kind_of(default: Any) -> Kind:
    if isinstance(default, list):
        return _list(_kind_of(default[0]))
    return {bool: FLAG, int: _whole(), float: AMOUNT, str: TEXT, dict: GROUP}[type(default)]


def settle(cfg: DictConfig, given: Sequence[str]) -> None:
    """Check the configuration and bring it into its final form, in place; UserError for the first fault.

    given: the overrides of the command line."""
    try:
        _choose_groups(cfg, given)
        _walk(cfg, _defaults(), "")
        _check_attention(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration cannot be resolved: {' '.join(str(error).split())}.") from error


def _choose_groups(cfg: DictConfig, given: Sequence[str]) -> None:
    """A group chosen on the command line is that of its file and of the fields given there: those of the experiment
    were meant for another choice."""
    parsed = OverridesParser.create().parse_overrides(list(given))
    chosen = {o.key_or_group for o in parsed if o.key_or_group in _GROUPS and isinstance(o.value(), str)}
    own = [str(o.input_line) for o in parsed if o.key_or_group.split(".")[0] in chosen]
    fresh = compose("config", own) if chosen else {}  # without the experiment
    for group in chosen:
        cfg[group] = fresh[group]


def _home(path: str) -> str:
    """The path with ~ replaced; UserError if nothing says what it stands for."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(f"{path}: no home folder of that name is known here (HOME); write the whole path.")
    return found


def _walk(node: DictConfig, defaults: Mapping[str, Any], where: str) -> None:
    """Check the keys and values below a node; `where` is its path."""
    rule = re.sub(r"\[\d+\]", "", where)
    for key in map(str, node):
        path, general = f"{where}.{key}".lstrip("."), f"{rule}.{key}".lstrip(".")
        if key == "_target_" or OmegaConf.is_missing(node, key):
            continue
        if key not in defaults and general not in _KINDS:
            _refuse_unknown(node, key, defaults, where, rule)
            continue
        value, default = node[key], defaults.get(key)
        if isinstance(default, Mapping) and isinstance(value, DictConfig):
            _walk(value, default, path)
        elif isinstance(default, list) and default and isinstance(default[0], Mapping):
            _walk_entries(node, key, default, path)
        else:
            _read(node, key, _KINDS.get(general) or _KINDS.get(key) or _kind_of(default), path)


def _refuse_unknown(node: DictConfig, key: str, defaults: Mapping[str, Any], where: str, rule: str) -> None:
    near = difflib.get_close_matches(key, defaults, 1, 0.6 if rule else 0.8)
    if not rule:  # values of one's own may stand beside the groups
        near = [name for name in near if isinstance(node[key], DictConfig) and isinstance(defaults[name], Mapping)]
    if (rule or near) and rule not in _OPEN:
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(defaults)}."
        raise UserError(f"{where or 'The configuration'} has no key {key}; {hint}")


def _walk_entries(node: DictConfig, key: str, defaults: Sequence[Mapping[str, Any]], path: str) -> None:
    """Check a list of groups of settings."""
    if node[key] is None:
        node[key] = []
    if not isinstance(node[key], ListConfig) or not all(isinstance(entry, DictConfig) for entry in node[key]):
        raise UserError(f"{path}={_shown(node[key])} must be a list of entries in braces.")
    for i, entry in enumerate(node[key]):
        _walk(entry, {k: v for default in defaults for k, v in default.items()}, f"{path}[{i}]")
        for name in defaults[0]:
            if name not in entry and all(name in default for default in defaults):
                raise UserError(f"{path}[{i}] lacks the key {name}.")


def _read(node: DictConfig, key: str, kind: Kind, path: str) -> None:
    """Check one value; it is written back if reading changes it."""
    value = OmegaConf.to_container(node[key], resolve=True) if OmegaConf.is_config(node[key]) else node[key]
    try:
        found = kind.read(value)
    except (ValueError, OverflowError):
        raise UserError(f"{path}={_shown(value)} must be {kind.text}.") from None
    if path in _PATHS and str(found).startswith("~"):
        raw = str(OmegaConf.to_container(node, resolve=False)[key])  # type: ignore[index]
        node[key] = _home(raw if raw.startswith("~") else found)  # with its ${name}, which a sweep changes
    elif repr(found) != repr(value):
        node[key] = found


def _check_attention(cfg: DictConfig) -> None:
    """UserError if a resolution with attention occurs in no network of the family."""
    if cfg.family.callable is not None:
        return
    unet: Any = OmegaConf.to_container(cfg.unet, resolve=True)
    sizes, wanted = set(), set()
    for own in (at_width(unet, width) for width in cfg.family.widths):
        top = cfg.data.size // own.get("patch", 1)
        sizes |= {top >> i for i in range(len(own.get("multipliers", ())))}
        wanted |= set(own.get("attention", ()))
    if not wanted <= sizes:
        known = ", ".join(map(str, sorted(sizes, reverse=True)))
        raise UserError(
            f"unet.attention={_shown(sorted(wanted))} names resolutions that no network has; theirs are {known} "
            "(data.size over patches, halved by unet.multipliers)."
        )
