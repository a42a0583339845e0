"""results/<experiment>/ -> report.html: one self-contained page."""

from mlem_diffusion.experiment.config import shown
from mlem_diffusion.experiment.report import render
from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.files import write_text


@stage()
def main(exp: Experiment) -> None:
    path = exp.results / "report.html"
    write_text(path, render(exp.results, exp.cfg.title or exp.cfg.name))  # not a result: no entry in provenance.json
    exp.print(f"report: {shown(path)}")


if __name__ == "__main__":
    main()
