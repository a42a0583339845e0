"""Conditions per sample, a guide that all levels share, and latents: in samplers, plans, checks and experiments."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pipeline import Place
from torch import Tensor, nn

from mlem_diffusion import (
    BrownianPath,
    FlowSchedule,
    Latents,
    Level,
    Multilevel,
    Process,
    SingleLevel,
    UserError,
    adapt,
    calibrate,
    flow,
    guided,
    latents_of,
    sample,
    step_rule,
)
from mlem_diffusion.multilevel.diagnostics import diagnose
from mlem_diffusion.multilevel.gains import measure_effects
from mlem_diffusion.multilevel.learned import learn_probabilities

SHAPE, CLASSES = (4, 8, 8), 10
PROCESS = Process(FlowSchedule(), -40.0, 9.0, 129, "time")
DDIM = step_rule("ode/ddim")


class Sit(nn.Module):
    """A small stand-in for SiT: network(x, t, y) -> x0 - eps, with attention between patches, and a mask in `extra`."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.into, self.out = nn.Conv2d(4, width, 2, 2), nn.ConvTranspose2d(width, 8, 2, 2)
            self.label = nn.Embedding(CLASSES + 1, width)
            self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, extra: Any = None) -> Tensor:
        h = self.into(x)
        moved = h + (self.label(y) + torch.sin(3 * t)[:, None])[:, :, None, None]
        if extra is not None:
            moved = moved * extra["mask"][0][:, None, None, None]
        tokens = self.block(moved.flatten(2).permute(2, 0, 1)).permute(1, 2, 0)
        return self.out(tokens.unflatten(2, h.shape[2:]))


def family(*names: str, **options: Any) -> list[Level]:
    """Three levels that take labels and what `names` names."""
    return [
        adapt(f"s{width}", Sit(width, 3).eval(), prediction="velocity", coordinates=flow(data_at=1), time="t",
              conditions=["y", *names], flops=float(width) ** 2, shape=SHAPE, **options)
        for width in (8, 16, 32)
    ]  # fmt: skip


def guide(width: int = 4, **options: Any) -> Level:
    """A network with the null label."""
    return adapt("null", Sit(width, 4).eval(), prediction="velocity", coordinates=flow(data_at=1), time="t",
                 conditioning={"y": torch.tensor([CLASSES])}, flops=16.0, **options)  # fmt: skip


def guided_by(levels: list[Level], scale: Any) -> list[Level]:
    one = guide()
    return [guided(level, one, scale, common=True) for level in levels]


def labels(seeds: list[int]) -> dict[str, Any]:
    return {"y": torch.tensor(seeds) * 7 % CLASSES}


NESTED = {"mask": (torch.tensor([1.0, 0.5, 2.0, 1.5, 0.1, 1.0]), "as it is")}
COINS = np.array([1.0, 0.6, 0.4])


def test_all_coins_certain_is_the_largest_level_bit_for_bit() -> None:
    levels, path = family(), BrownianPath(range(6), SHAPE, conditions=labels)
    guides = guided_by(levels, 2.0)
    for own in (levels, guides):
        for rule in (DDIM, step_rule("sde/ddpm"), step_rule("ode/dpmpp_2m")):
            alone = sample(SingleLevel(own[-1]), rule, PROCESS.grid(9), path)[0]
            assert torch.equal(sample(Multilevel(own, np.ones(3)), rule, PROCESS.grid(9), path)[0], alone)


def test_a_batch_of_mixed_conditions_equals_one_by_one() -> None:
    """To 1e-5, with coins of its own for each sample; the ledgers are equal, and count the guide once a step."""
    own = guided_by(family("extra"), 1.5)
    estimator, rule, grid = Multilevel(own, COINS), step_rule("sde/ddpm"), PROCESS.grid(9)
    given = {**labels([0, 1, 2, 3, 4, 5]), "extra": NESTED}
    whole = BrownianPath(range(6), SHAPE, conditions=given)
    images, ledger = sample(estimator, rule, grid, whole)
    for i in range(6):
        one, its = sample(estimator, rule, grid, whole.part(i, i + 1))
        assert (one[0] - images[i]).abs().max() < 1e-5 * images.abs().max()
        assert its.per_sample.tolist() == ledger.per_sample[i : i + 1].tolist()
    assert 0 < ledger.per_sample[:, 2].sum() < 6 * 9  # some coins fired
    assert ledger.base_flops == 9 * 16 and ledger.flops == [8**2, 16**2, 32**2]
    other = sample(estimator, rule, grid, BrownianPath(range(6), SHAPE, conditions=given | labels([5, 0, 1, 2, 3, 4])))
    assert not torch.allclose(other[0], images, atol=1e-3)


def test_plans_gains_and_checks_know_the_conditions() -> None:
    """Of each seed its own: the effects of one batch equal those seed by seed."""
    levels, options = family(), {"steps": (5, 9), "calibrate_steps": (9,), "seeds": range(8)}
    found = calibrate(levels, PROCESS, DDIM, SHAPE, conditions=labels, **options)
    path = BrownianPath(range(8), SHAPE, conditions=labels)
    same = [measure_effects(levels, DDIM, PROCESS.grid(9), path.part(i, i + 1)).values for i in range(8)]
    np.testing.assert_allclose(found.effects.values, np.concatenate(same), rtol=1e-3, atol=1e-5)
    assert found.plan("systematic", cost=9 * 600.0).build(levels).levels[-1].name == "s32"
    diagnosed = diagnose(levels, PROCESS, DDIM, path, 9, 4, lambda done, total: None, found.effects)
    assert not [f for f in diagnosed["findings"] if "telescope" in f["text"] and f["severity"] != "ok"]
    p, _ = learn_probabilities(
        levels, DDIM, PROCESS.grid(5), SHAPE, torch.device("cpu"), costs=np.array([64.0, 256, 1024]), wanted=2000.0,
        start=COINS, iterations=2, paths=2, draws=4, conditions=labels,
    )  # fmt: skip
    assert p.shape == (5, 3) and np.all((p > 0) & (p <= 1))


def test_missing_unknown_and_short_conditions_are_one_sentence() -> None:
    levels, grid = family(), PROCESS.grid(5)
    with pytest.raises(UserError, match="s32 needs the condition y of each sample"):
        sample(SingleLevel(levels[-1]), DDIM, grid, BrownianPath([0], SHAPE))
    given = labels([0, 1]) | {"text": torch.zeros(2)}
    with pytest.raises(UserError, match="No level takes the condition text; they take y"):
        calibrate(levels, PROCESS, DDIM, SHAPE, steps=(5,), seeds=[0, 1], conditions=given)
    wrong: list[tuple[Any, str]] = [
        (labels([0]), "The condition y has 1 rows for 2 samples"), ({"y": [1, 2]}, "The condition y has no tensor"),
        (torch.zeros(2), "a mapping from names to tensors, not a Tensor"), ({"y": torch.tensor(1)}, "y has no rows"),
    ]  # fmt: skip
    for conditions, sentence in wrong:
        with pytest.raises(UserError, match=sentence):
            BrownianPath([0, 1], SHAPE, conditions=conditions)
    with pytest.raises(UserError, match="conditions are a list of names"):
        adapt("net", Sit(4, 1), prediction="x0", conditions="y", flops=1.0)


def test_a_network_that_writes_into_its_condition_gets_a_copy() -> None:
    given = torch.ones(2)
    level = adapt(
        "net", lambda x, t, c: x * c.mul_(0.5)[:, None, None, None], prediction="x0", conditions=["c"], flops=1
    )
    sample(SingleLevel(level), DDIM, PROCESS.grid(5), BrownianPath([0, 1], SHAPE, conditions={"c": given}))
    assert given.tolist() == [1, 1]


def test_guides_and_latents_that_do_not_fit_are_one_sentence() -> None:
    levels, (scaled, other) = family(), (family(latents=Latents(nn.Identity(), scale)) for scale in (0.18, 0.2))
    guides = guided_by(levels, 2.0)
    cases: list[tuple[Any, str]] = [
        (lambda: guided(levels[0], guides[1], 2.0), "is guided itself"),
        (lambda: guided(guides[0], levels[1], 2.0), "is guided already"),
        (lambda: guided(scaled[0], other[1], 2.0), "so one cannot guide the other"),
        (lambda: guided(levels[0], guide(), [(3, -3, 2.0)]), "scale is a finite number, or a list of intervals"),
        (lambda: guided(levels[0], guide(), float("nan")), "scale is a finite number"),
        (lambda: guided(levels[0], guide(), (-1.0, 1.0, 2.0)), "scale is a finite number"),  # type: ignore[arg-type]
        (lambda: guided(levels[0], replace(guide(), name="s8"), 2.0, common=True), "rename the guide"),
        (lambda: Latents(nn.Identity(), batch=0), "is not an image or more"),
        (lambda: Latents(lambda z: z[:1]).decode(torch.zeros(2, 4, 2, 2)), "returned 1 images for 2 latents"),
        (lambda: Multilevel([levels[0], *guides[1:]], COINS), "are guided differently: a family has one guidance"),
        (lambda: Multilevel([*guides[:2], guided(levels[2], guides[0].base, 3.0, common=True)], COINS), "differently"),
        (lambda: Multilevel([*guides[:2], *guided_by(levels[2:], 2.0)], COINS), "s8 and s32 are guided differently"),
        (lambda: Multilevel([guide(), *guided_by(levels[1:], [(-3, 3, 2.0)])], COINS), "at some noise levels only"),
        (lambda: Multilevel([*other[:2], scaled[2]], COINS), "denoises scale .0.2., shift .0.0., and s32 scale .0.18."),
        (lambda: guided(Level("a", lambda *x: x[0], 9.0, base=levels[0]), guide(), 2.0, common=True),
         "cannot have a common guide: s8 is a base already"),
        (lambda: Latents(nn.Identity(), (1.0, 2.0)).decode(torch.zeros(1, 4, 2, 2)), "cannot be scaled by 2 numbers"),
    ]  # fmt: skip
    for case, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            case()


# ---------------------------------------------------------------------------------------------------- latents
def test_latents_are_scaled_per_channel_and_decoded_in_pieces_that_fit() -> None:
    sizes: list[int] = []

    def decoder(raw: Tensor) -> Tensor:
        sizes.append(len(raw))
        if len(raw) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return raw[:, :3].repeat_interleave(2, -1)

    latents = Latents(decoder, (1.0, 2.0, 4.0, 8.0), (0.0, 1.0, 2.0, 3.0), batch=6)
    raw = torch.randn(7, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents.encode(raw)[:, 2], (raw[:, 2] - 2) * 4)
    torch.testing.assert_close(latents.decode(latents.encode(raw)), raw[:, :3].repeat_interleave(2, -1))
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1] or max(sizes[2:]) <= 2
    path = BrownianPath(range(2), SHAPE, conditions=labels)
    decoded = sample(SingleLevel(family()[0]), DDIM, PROCESS.grid(5), path, latents.decode)[0]
    torch.testing.assert_close(
        decoded, latents.decode(sample(SingleLevel(family()[0]), DDIM, PROCESS.grid(5), path)[0])
    )


def test_latents_of_a_diffusers_autoencoder() -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), shift_factor=0.1).eval()
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(z / 0.18215 + 0.1).sample
    torch.testing.assert_close(latents_of(vae, batch=2).decode(z), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ experiments
def guided_family() -> list[Level]:
    return guided_by(family(), 1.5)


def labels_of_seeds() -> Any:
    return labels


def decoder() -> Latents:
    return Latents(lambda raw: torch.tanh(raw[:, :3]).repeat_interleave(2, -1).repeat_interleave(2, -2), 2.0, batch=5)


RULE = "{dynamics: ode, step_rule: ddim, steps: [5, 9], methods: [independent]}"
OPTIONS = (
    "family.callable={_target_: test_conditions.guided_family}", "family.shape=[4,8,8]", "metrics=none",
    "family.conditions={_target_: test_conditions.labels_of_seeds}",
    "family.decoder={_target_: test_conditions.decoder}", "process=flow", "process.base_steps=129", "protocol=strict",
    f"optimise.rules=[{RULE}]", "optimise.calibrate=4", "optimise.calibrate_steps=[9]", "optimise.num_select=4",
    "optimise.measured.costs=[]", "optimise.learned.costs=[]", "optimise.diagnose.seeds=4", "compare.gamma=2.5",
    "compare.num_samples=8", "compare.batch=4", "compare.baselines=[{dynamics: ode, step_rule: ddim, levels: all, "
    "steps: [5, 9]}]", "compare.stitched=[]", "compare.ml_em=[{dynamics: ode, step_rule: ddim, families: [all], "
    "coins: [independent], c: [4], steps: [9]}]", "workers=1",
)  # fmt: skip


def test_an_experiment_with_labels_a_guide_and_a_decoder(here: Any, tmp_path: Any) -> None:
    place = Place(tmp_path, "smoke", OPTIONS)
    sampler = "sampler={dynamics: ode, step_rule: ddim, estimator: ml_em, levels: s8+s16+s32, steps: 9, c: 4, "
    sampler += "probabilities: constant, coins: independent}"
    for stage, more in (("optimise", ()), ("sample_compare", ()), ("sample", ("seeds=0-4", sampler))):
        here(stage, place, *more)
    rows = pd.read_csv(place.results / "compare.csv")
    assert set(rows.estimator) >= {"single", "ml_em"} and rows.error.notna().all()
    with Image.open(place.results / "samples" / "000003.png") as picture:
        assert picture.size == (16, 16)
        drawn = np.asarray(picture)
    setting = json.loads((place.results / "samples.json").read_text())["setting"]
    assert drawn.std() > 0 and setting["dynamics"] == "ode" and (place.results / "grids/ode.png").is_file()
