"""results/<experiment>/ -> report.html: one self-contained page."""

from mlem_diffusion.experiment.report import write_report
from mlem_diffusion.experiment.stage import Config, Stage, entry_point, run_stage, shown


def work(stage: Stage) -> None:
    path = write_report(stage.results, title=stage.cfg.title or stage.cfg.name)
    print(f"report: {shown(path)}")


@entry_point("report")
def main(cfg: Config) -> None:
    run_stage("report", cfg, work)


if __name__ == "__main__":
    main()
