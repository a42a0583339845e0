"""Images -> data/<name>/: packed array, split and manifest."""

from mlem_diffusion.experiment.stage import Config, Stage, entry_point, run_stage


def work(stage: Stage) -> None:
    manifest = stage.prepare_data()
    split, size = manifest["split"], manifest["size"]
    print(
        f"data: {manifest['count']} images of {size[0]}x{size[1]} from {manifest['source']['name']} "
        f"in {stage.cfg.paths.data} ({split['train']} to train, {split['valid'] + split['test']} held out, "
        f"{split['method']} split)."
    )
    for treatment, count in manifest["treatment"].items():
        print(f"data: {count} images: {treatment}.")
    if manifest.get("skipped"):
        print(f"data: {len(manifest['skipped'])} broken image(s) skipped, listed in manifest.json.")


@entry_point("prepare_data")
def main(cfg: Config) -> None:
    run_stage("prepare_data", cfg, work, trained_only=True)


if __name__ == "__main__":
    main()
