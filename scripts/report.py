"""results/<experiment>/ -> report.html: one self-contained page."""

import common
import hydra
from omegaconf import DictConfig

from mlem_diffusion.report import write_report


def work(stage: common.Stage) -> None:
    path = write_report(stage.results, title=stage.cfg.title or stage.cfg.name)
    print(f"report: {common.shown(path)}")


@hydra.main(version_base=None, config_path=common.CONFIGS, config_name="report")
def main(cfg: DictConfig) -> None:
    common.run("report", cfg, work)


if __name__ == "__main__":
    main()
