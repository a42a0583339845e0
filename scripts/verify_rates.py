"""A problem with a known answer -> results/rates/: exponents of cost against error for EM, ML-EM and jump process."""

from joblib import cpu_count

from mlem_diffusion.experiment.stage import Experiment, stage
from mlem_diffusion.figures.rates import plot_rates
from mlem_diffusion.rates.exponents import summary, verify


@stage(outputs=["rates.json", "rates.png", "rates.csv"], depends=["rates"], folder="rates")
def main(exp: Experiment) -> None:
    workers = cpu_count() if exp.cfg.workers == "auto" else int(exp.cfg.workers)
    result, frame = verify(exp.cfg.rates, workers, exp.progress, exp.should_stop)
    exp.save("rates.json", result)
    exp.save("rates.csv", frame.to_csv(index=False, float_format="%.6g"))
    exp.figure("rates.png", plot_rates(result, frame))
    exp.print(summary(result))


if __name__ == "__main__":
    main()
