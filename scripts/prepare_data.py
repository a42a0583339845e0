"""Images -> data/<name>/: packed array, split and manifest."""

from mlem_diffusion.experiment.stage import Experiment, stage


@stage(trained=True)
def main(exp: Experiment) -> None:
    manifest = exp.prepare_data()
    split, size = manifest["split"], manifest["size"]
    notes = "; ".join([f"{split['method']} split", *manifest["notes"]])
    exp.print(
        f"data: {manifest['count']} images of {size[0]}x{size[1]} from {manifest['source']['name']} "
        f"in {exp.cfg.paths.data} ({split['train']} to train, {split['valid'] + split['test']} held out, "
        f"{notes})."
    )


if __name__ == "__main__":
    main()
