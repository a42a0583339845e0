"""What make sample chooses from a comparison, and the folder of pictures that it writes."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

from mlem_diffusion.comparison.choice import candidates, choose
from mlem_diffusion.comparison.pictures import begin, draw, file_names, parse_seeds, read_pictures
from mlem_diffusion.comparison.planned import frontiers
from mlem_diffusion.comparison.settings import Measurement, SamplerSetting
from mlem_diffusion.diffusion.brownian import BrownianPath
from mlem_diffusion.diffusion.level import Level
from mlem_diffusion.diffusion.process import LinearSchedule, Process
from mlem_diffusion.errors import Interrupted, UserError


def measured(kind: str, gflops: float, error: float | None, dynamics: str = "ode", fires: int = 100) -> Measurement:
    setting = SamplerSetting(dynamics, "ddim", kind, ("w2",) if kind == "single" else ("w2", "w8"), 8)
    more = {"gflops_realised": gflops, "error": error, "top_evaluations": fires}
    return Measurement(setting.row | more | {"protocol": "strict"}, np.zeros(1))


ROWS = [
    measured("ml_em", 1, 0.1), measured("ml_em", 4, 0.01), measured("ml_em", 8, 8e-4), measured("ml_em", 9, 4e-4),
    measured("ml_em", 2, 0.03, "sde"), measured("single", 2, 0.012), measured("single", 6, 6e-4),
    measured("ml_em", 5, 0.02), measured("ml_em", 1, 1e-9, fires=99), measured("ml_em", 1, None),
]  # fmt: skip
BEST = candidates([ROWS[i] for own in frontiers([m.row for m in ROWS]).values() for i in own])
NOTHING: dict[str, Any] = {"gflops": None, "error": None, "dynamics": "any"}


@pytest.mark.parametrize(("wanted", "gflops", "words"), [
    ({"gflops": 3.99}, 4, "accurate baseline that costs at most 3.99 GFLOP per image: DDIM, w2, 8 steps (ODE)"),
    ({"gflops": 1}, 1, "There is no baseline that costs at most 1 GFLOP"),
    ({"error": 0.02}, 4, "cheapest baseline with a squared error of at most 0.02: DDIM, w2, 8 steps (ODE)"),
    ({"error": 5e-4}, 9, "There is no baseline with a squared error of at most 0.0005"),
    ({"dynamics": "sde"}, 2, "(SDE), squared error 0.03 for 2 GFLOP"),  # the most accurate, if none is good enough
    ({}, 8, "with a squared error of at most 0.001"),
])  # fmt: skip
def test_the_best_multilevel_setting_beside_the_best_baseline(wanted, gflops, words):
    row, reason = choose(BEST, NOTHING | wanted, "w8")
    assert row["gflops_realised"] == gflops and row["estimator"] == "ml_em" and words in reason
    assert "ARGS=sample.gflops=... (" in reason


@pytest.mark.parametrize(("best", "wanted", "words"), [
    (BEST, {"gflops": 0.9}, "No multilevel setting reaches sample.gflops=0.9: their costs are 1 to 9 GFLOP"),
    (BEST, {"error": 1e-4}, "sample.error=0.0001: their squared errors are 0.0004 to 0.1"),
    (BEST, {"error": 1, "gflops": 1}, "both given"),
    (BEST | {"multilevel": []}, {}, "no multilevel setting"),
    (None, {"gflops": 1}, "make sample-compare first"),
])  # fmt: skip
def test_what_nothing_reaches_is_one_sentence(best, wanted, words):
    with pytest.raises(UserError) as error:
        choose(best, NOTHING | wanted, "w8")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["x", "5-3", "", "1,,2", "0-99999999999", str(1 << 64)])
def test_bad_seeds_are_refused(text):
    with pytest.raises(UserError, match="SEEDS="):
        parse_seeds(text)


class Tiny(torch_fidelity.FeatureExtractorBase):
    """Mean colours as features, and the number of images seen."""

    seen = 0
    get_provided_features_list = staticmethod(lambda: ("mean",))
    get_default_feature_layer_for_metric = staticmethod(lambda metric: "mean")

    def __init__(self, name: str, features_list: Any, **more: Any):
        super().__init__(name, features_list)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        Tiny.seen += len(images)
        return (images.float().mean((2, 3)),)


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """run(seeds, batch): what make sample does with its folder; stops before the batch number `stop`."""
    process = Process(LinearSchedule(), base_steps=16)
    setting, calls = SamplerSetting("sde", "ddpm", "single", ("f",), 8), []
    level = Level("f", lambda x, logsnr: calls.append(len(x)) or 0.9 * torch.sigmoid(logsnr) * x, 1.0)
    folder, grid = tmp_path / "samples", tmp_path / "samples.png"

    def run(text: str, batch: int = 4, stop: bool = False, key: str = "") -> list[str]:
        def progress(done: int, total: int) -> None:
            if stop:
                raise Interrupted("stopped")

        seeds = parse_seeds(text)
        begin(folder, grid, tmp_path / "cache" / "key", key or text)
        shared = (batch, partial(BrownianPath, shape=(3, 4, 4)), None, folder, progress)
        draw(setting.build({"f": level}, 2.5, {}), setting.rule, process.grid(8), seeds, *shared)
        Image.fromarray(read_pictures([folder / name for name in file_names(seeds)])[0][0]).save(grid)
        return sorted(path.name for path in folder.iterdir())

    return SimpleNamespace(run=run, folder=folder, grid=grid, calls=calls)


def test_the_folder_holds_exactly_the_pictures_that_were_asked_for(place):
    place.run("0-9")
    (place.folder / ".000001.png.7.partial").touch()
    assert place.run("1,3-6") == file_names([1, 3, 4, 5, 6])
    torch_fidelity.register_feature_extractor("tiny", Tiny)
    options: Any = {"fid": True, "feature_extractor": "tiny", "cuda": False, "cache": False, "save_cpu_ram": True}
    options |= {"input1": str(place.folder), "input2": str(place.folder), "verbose": False}
    found = torch_fidelity.calculate_metrics(**options)
    assert Tiny.seen == 2 * 5 and abs(found["frechet_inception_distance"]) < 1e-4
    for own in ("000099.png", "notes.txt"):  # not signed: of the user
        Image.new("RGB", (9, 9)).save(place.folder / own, format="PNG")
        with pytest.raises(UserError, match=f"did not write .{own}"):
            place.run("8")
        (place.folder / own).unlink()
        assert len(list(place.folder.iterdir())) == 5


def test_a_stopped_run_goes_on_and_another_begins_anew(place):
    with pytest.raises(Interrupted):
        place.run("0-9", stop=True)
    first = (place.folder / "000003.png").stat().st_mtime_ns
    assert place.run("0-9") == file_names(range(10)) and sum(place.calls) == 8 * 10
    assert (place.folder / "000003.png").stat().st_mtime_ns == first
    place.run("0-9")  # it was finished: with force=true
    assert sum(place.calls) == 2 * 8 * 10
    with pytest.raises(Interrupted):
        place.run("0-9", stop=True, key="another sampler")
    assert len(list(place.folder.iterdir())) == 4 and not place.grid.exists()


def test_pictures_depend_on_their_seed_only_and_sort_by_it(place):
    (one, two), text = place.run("5,4294967301"), "2,5,999999,1000000"
    images = read_pictures([place.folder / one, place.folder / two])
    assert (images[0] != images[1]).any()  # torch's CPU generator alone would take both seeds as 5
    assert place.run(text, batch=3) == file_names(sorted(parse_seeds(text)))
    assert (read_pictures([place.folder / "0000005.png"])[0] == images[0]).all()
