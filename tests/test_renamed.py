"""Old names in a configuration get one sentence that says the new one; today's configurations have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlem_diffusion.errors import UserError
from mlem_diffusion.experiment.renamed import check_config, check_overrides

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("compare.n=64", r"compare\.n is now compare\.num_samples\."),
        ("++compare.n_reference=64", r"compare\.n_reference is now compare\.num_reference\."),
        ("optimise.worth.mean=0.1", r"optimise\.worth is now optimise\.ablation\."),
        ("experiment=celeba64_tiny", r"experiment=celeba64_tiny is now experiment=celeba32\."),
        ("experiment=demo_fast", r"experiment=demo_fast was removed: see docs/results\.md"),
    ],
)
def test_an_old_override_says_the_new_name(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_overrides(["force=true", override])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"optimise": {"n_select": 8}}, r"optimise\.n_select is now optimise\.num_select\."),
        ({"compare": {"ml_em": [{"c": [1]}, {"knobs": [1]}]}}, r"compare\.ml_em: knobs is now c\."),
        ({"sampler": {"drift": "single"}}, r"sampler\.drift is now sampler\.estimator\."),
        (
            {"process": {"schedule": {"_target_": "mlem_diffusion.process.LinearSchedule"}}},
            r"mlem_diffusion\.process\.LinearSchedule is now mlem_diffusion\.diffusion\.process\.LinearSchedule\.",
        ),
    ],
)
def test_an_old_key_in_an_experiment_file_says_the_new_name(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_config(config)


def test_the_configurations_of_this_repository_have_no_old_names() -> None:
    check_overrides(["compare.num_samples=64", "experiment=celeba32", "compare.name=n"])
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        content = yaml.safe_load(file.read_text()) or {}
        nested = content if file.parent.name in ("experiment", "configs") else {file.parent.name: content}
        check_config(nested)
