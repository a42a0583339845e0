"""The configuration as plain values, objects and fingerprints."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UserError
from ..models.family import at_width

# paths and options of this machine do not change results
_ELSEWHERE = re.compile(
    r"[+~]*(paths\.|data\.source|metrics\.weights|dry_run|force|overwrite|max_minutes|workers|threads)"
)
# settings of training that do not affect the trained model
_WATCHING = ("log_every", "save_every", "compile", "graph")


def source(cfg: DictConfig) -> str | None:
    """data.source, or None if it is not set."""
    return None if OmegaConf.is_missing(cfg.data, "source") else str(cfg.data.source)


def plain(cfg: DictConfig, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration (only these keys if given); paths of this machine are left out or shortened."""
    out = {}
    for key in keys or (k for k in map(str, cfg) if k != "paths"):
        node = cfg[key]
        out[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if isinstance(out.get("data"), dict):
        found = source(cfg)
        out["data"]["source"] = None if found is None else Path(found).name
    if isinstance(out.get("metrics"), dict) and out["metrics"].get("weights"):
        out["metrics"]["weights"] = Path(out["metrics"]["weights"]).name
    return out


def fingerprint(groups: dict[str, Any], inputs: dict[str, Any]) -> str:
    """Hash of configuration groups and input artefacts; with the input "width", `train` is that of this level."""
    if isinstance(train := groups.get("train"), dict):
        if "width" in inputs:
            groups["train"] = at_width(train, inputs["width"])
        elif not train.get("narrow"):
            train.pop("narrow", None)
        for key in _WATCHING:
            groups["train"].pop(key, None)
    text = json.dumps([_without_modules(groups), inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_modules(node: Any) -> Any:
    """The configuration with only the class name in every `_target_`, so that modules may move."""
    if isinstance(node, dict):
        return {k: str(v).rpartition(".")[2] if k == "_target_" and v else _without_modules(v) for k, v in node.items()}
    return [_without_modules(v) for v in node] if isinstance(node, list) else node


def build(node: Any, **more: Any) -> Any:
    """Hydra's instantiate; any of its errors becomes a UserError of one sentence."""
    try:
        return instantiate(node, **more)
    except (InstantiationException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{node.get('_target_')} cannot be built from the configuration ({reason}).") from error


def overrides() -> list[str]:
    """The command line's overrides that change results, sorted."""
    if not HydraConfig.initialized():
        return []
    return sorted(text for text in HydraConfig.get().overrides.task if not _ELSEWHERE.match(text))
