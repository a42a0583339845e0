"""Images -> data/<name>/: packed array, split and manifest."""

from mlem_diffusion.experiment.stage import Experiment, stage


@stage(trained=True)
def main(exp: Experiment) -> None:
    manifest = exp.prepare_data()
    split, size = manifest["split"], manifest["size"]
    notes = "; ".join([f"{split['method']} split", *manifest["treatment"], *manifest["notes"]])
    text = f"data: {manifest['count']} images of {size[0]}x{size[1]} from {manifest['source']['name']} in "
    text += f"{exp.cfg.paths.data} ({split['train']} to train, {split['valid'] + split['test']} held out, {notes})."
    exp.print(text)


if __name__ == "__main__":
    main()
