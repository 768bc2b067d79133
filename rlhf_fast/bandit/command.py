"""`rlhf-fast bandit linear`: run the experiment, write JSON and plots, print the tables."""

import dataclasses
from pathlib import Path
from typing import Any

from rlhf_fast.bandit import experiment, report
from rlhf_fast.bandit.config import LinearBanditConfig
from rlhf_fast.bandit.problem import sampled_gaps
from rlhf_fast.checkpoint import write_json


def linear(config: LinearBanditConfig) -> dict[str, Any]:
    """Writes config.out and plots beside it; returns what the JSON holds."""
    out = Path(config.out)
    if not out.parent.is_dir():
        raise ValueError(f"out: expected a file in an existing directory, got {config.out}")
    seeds = experiment.seeds_of(config)
    run = experiment.run(config, config.n)
    gaps = experiment.gaps_of(config, run.thetas)
    sampled = sampled_gaps(list(run.thetas.values()), seeds, config.setting)
    published = report.published_of(config.setting, config.n, config.beta)
    record: dict[str, Any] = {
        "bandit": "linear",
        **{key: getattr(config, key) for key in ("mode", "setting", "n", "ratios", "beta", "seeds", "first_seed")},
        "pref_states": config.pref_states,
        "separable_seeds": [seed for seed, x in zip(seeds, run.separable, strict=True) if x],
        "largest_gradient": run.largest_gradient,
        "methods": {
            name: {
                "gap": gap.tolist(),
                **report.summary(gap),
                "published_evaluation": report.summary(noisy),
                "published": published.get(name),
                "theta": run.thetas[name].tolist(),
            }
            for (name, gap), noisy in zip(gaps.items(), sampled, strict=True)
        },
        **report.paired(gaps),
    }
    if config.mode == "exact":
        record["error_sources"] = {
            name: {piece: report.summary(gap - gaps[name]) for piece, gap in pieces.items()}
            for name, pieces in experiment.error_sources(config, run).items()
        }
    largest = dataclasses.replace(config, ratios=config.ratios and [max(config.ratios)])
    runs = {n: run if n == config.n else experiment.run(largest, n) for n in config.sizes}
    record["by_n"] = {
        str(n): {name: report.summary(gap) for name, gap in experiment.gaps_of(config, one.thetas).items()}
        for n, one in runs.items()
    }
    report.write_plots(record, run.thetas, out.with_suffix(""))
    write_json(out, record)
    report.show(record)
    return record
