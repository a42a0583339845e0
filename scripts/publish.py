"""A trained family -> checkpoints/<experiment>/published/: bf16 weights, statistics of the images, model card."""

import shutil
from pathlib import Path
from typing import Any

from mlem_diffusion.comparison.features import save_moments
from mlem_diffusion.experiment import config, runs
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.files import read_json
from mlem_diffusion.models.family import PUBLISHED, level_name, publish, read_metadata
from mlem_diffusion.training.levels import repeated


def statistics(exp: Experiment, path: Path) -> dict[str, Any] | None:
    """Write the moments of the training images' features; None if the experiment has no distances."""
    extractor = runs.make_extractor(exp) if exp.cfg.publish.statistics else None
    real = extractor and runs.real_images(exp, extractor)
    if extractor is None or real is None or real.features is None:
        return None
    save_moments(path, real.moments)
    floor = {"num_samples": len(real.features), "seed": exp.cfg.compare.seed, "distance": real.floor}
    return {"file": path.name, "name": extractor.name, "identity": extractor.key, "floor": floor}


@stage(trained=True)
def main(exp: Experiment) -> None:
    images, metadata, folder = exp.images, exp.metadata(), exp.checkpoints / PUBLISHED
    again = [name for v in repeated(exp.cfg) if (exp.checkpoints / (name := level_name(*v))).is_dir()]
    provenance = read_json(exp.results / "provenance.json", "train the levels (make train-levels)")
    noted = provenance["stages"]["train_levels"]
    facts: dict[str, Any] = {"experiment": exp.cfg.name, "title": exp.cfg.title, "data": images.manifest}
    facts["training"] = {key: noted.get(key) for key in ("commit", "finished", "device", "overrides")}
    shutil.rmtree(folder, ignore_errors=True)
    facts["gaussian"] = None
    if exp.cfg.family.gaussian and "gauss" not in metadata[0]:  # else the levels name its file
        denoiser: Any = exp.gaussian_level().denoise
        denoiser.save(folder / "gauss.safetensors")
        facts["gaussian"] = {"file": "gauss.safetensors", "asked_rank": exp.cfg.family.gaussian_rank}
    facts["statistics"] = statistics(exp, folder / "statistics.npz")
    publish(exp.checkpoints, folder, metadata, read_metadata(exp.checkpoints, again), facts)
    exp.print(f"publish: {len(metadata)} levels and the model card in {config.shown(folder)}/.")


if __name__ == "__main__":
    main()
