"""The model card of a published family; all its numbers are read from the published files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_write, read_json
from .published import CARD

NOT_SHOWN = (
    "_target_",
    "log_every",
    "save_every",
    "precision",
    "compile",
    "graph",
)  # settings of how training runs, which do not change the result


def write_card(folder: Path, index: dict[str, Any]) -> Path:
    """Write README.md of a published folder from the content of family.json and the levels' metadata.json."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["shape"] = shape_in_words
    template = (Path(__file__).parent / "templates" / "model_card.md.jinja").read_text(encoding="utf-8")
    levels = [read_json(folder / name / "metadata.json", "publish the family again", False) for name in index["levels"]]
    for level in levels:
        level["loss"] = float(np.mean(level["held_out"]["loss"]))
    kind = index["data"]["source"]["kind"]
    text = environment.from_string(template).render(
        index=index,
        levels=levels,
        megabytes=sum((folder / name).stat().st_size for name in index["files"]) / 1e6,
        licence="mit" if kind == "portraits" else "other",
        celeba=kind == "download" or "celeba" in f"{index['data']['name']} {index['data']['source']['name']}".lower(),
        whole=[what for what in index["data"]["treatment"] if "whole frame" in what or what.startswith("already")],
        recipe=recipe(levels),
        commands=commands(index),
    )
    path = folder / CARD
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))
    return path


def shape_in_words(unet: dict[str, Any]) -> str:
    """Return a UNet's arguments as the text of one table cell."""

    def text(value: Any) -> str:
        return " ".join(str(v) for v in value) if isinstance(value, list) else str(value)

    return ", ".join(f"{key} {text(value)}" for key, value in unet.items() if value not in ([], None))


def recipe(levels: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return training settings as (name, value); if levels differ, the value lists each level's."""
    own = [level.get("train") or level["config"]["train"] for level in levels]
    rows = []
    for key in dict.fromkeys(key for settings in own for key in settings if key not in (*NOT_SHOWN, "narrow")):
        values = [settings.get(key) for settings in own]
        if all(value == values[0] for value in values):
            rows.append((key, str(values[0])))
        else:
            rows.append((key, ", ".join(f"{m['name']}: {v}" for m, v in zip(levels, values, strict=True))))
    return rows


def commands(index: dict[str, Any]) -> list[str]:
    """Return the commands that train and publish the family from the images."""
    training, source = index["training"], index["data"]["source"]
    experiment = f"EXPERIMENT={training['experiment'] or index['experiment']}"
    changed = [shlex.quote(argument).replace("\\", "\\\\").replace('"', '\\"') for argument in training["arguments"]]
    extra = f' ARGS="{" ".join(changed)}"' if changed else ""
    named = (
        ""
        if source["kind"] == "portraits"
        else f" SOURCE={'download' if source['kind'] == 'download' else source['name']}"
    )
    data = [argument for argument in changed if argument.lstrip("'").startswith("data.")]
    prepare = f"make data {experiment}{named}" + (f' ARGS="{" ".join(data)}"' if data else "")
    return [prepare, f"make train-levels {experiment}{extra}", f"make publish {experiment}{extra}"]
