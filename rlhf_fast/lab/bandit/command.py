"""`rlhf-fast bandit linear` and `bandit neural`: run the experiment, write JSON and plots, print the tables."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rlhf_fast.data.files import write_json
from rlhf_fast.lab.bandit import experiment, neural_experiment, report
from rlhf_fast.lab.bandit.config import BanditConfig, LinearBanditConfig, NeuralBanditConfig, seeds_of
from rlhf_fast.lab.bandit.problem import sampled_gaps

Config = TypeVar("Config", bound=BanditConfig)
_SHARED_KEYS = ("n", "ratios", "beta", "seeds", "first_seed", "pref_states")


def linear(config: LinearBanditConfig) -> dict[str, Any]:
    """Writes config.out and plots beside it; returns what the JSON holds."""
    _check_out(config)
    seeds = seeds_of(config)
    run = experiment.run(config, config.n)
    gaps = experiment.gaps_of(config, run.thetas)
    sampled = sampled_gaps(list(run.thetas.values()), seeds, config.setting)
    published = report.published_of("linear", config.setting, config.n, config.beta)
    record: dict[str, Any] = {
        "bandit": "linear",
        **{key: getattr(config, key) for key in ("mode", "setting", *_SHARED_KEYS)},
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
        record["error_sources"] = _changes(experiment.error_sources(config, run), gaps)
    runs = {n: run if n == config.n else experiment.run(_largest_ratio(config), n) for n in config.sizes}
    record["by_n"] = {str(n): report.summaries(experiment.gaps_of(config, one.thetas)) for n, one in runs.items()}
    return _finish(config, record, run.thetas)


def neural(config: NeuralBanditConfig) -> dict[str, Any]:
    """Writes config.out and plots beside it; returns what the JSON holds."""
    _check_out(config)
    run = neural_experiment.run(config, config.n, error_sources=True)
    published = report.published_of("neural", config.reward, config.n, config.beta)
    sizes = [n for n in config.sizes if n != config.n]
    runs = {n: neural_experiment.run(_largest_ratio(config), n, error_sources=False) for n in sizes}
    record = {
        "bandit": "neural",
        "mode": "faithful",
        "setting": config.reward,
        **{key: getattr(config, key) for key in _SHARED_KEYS},
        "methods": {
            name: {
                "gap": gap.tolist(),
                **report.summary(gap),
                "published": published.get(name),
                "steps": run.steps[name],
            }
            for name, gap in run.gaps.items()
        },
        **report.paired(run.gaps),
        "references": report.summaries(run.references),
        "commonest_best_action": {
            "per_seed": run.commonest_best_action.tolist(),
            **report.summary(run.commonest_best_action),
        },
        "error_sources": _changes(run.sources, run.gaps),
        "by_n": {str(n): report.summaries(runs.get(n, run).gaps) for n in config.sizes},
    }
    return _finish(config, record, None)


def _check_out(config: BanditConfig) -> None:
    if not Path(config.out).parent.is_dir():
        raise ValueError(f"out: expected a file in an existing directory, got {config.out}")


def _changes(sources: Mapping[str, Mapping], gaps: Mapping) -> dict[str, dict[str, Any]]:
    return {
        name: report.summaries({piece: gap - gaps[name] for piece, gap in pieces.items()})
        for name, pieces in sources.items()
    }


def _largest_ratio(config: Config) -> Config:
    """The config of the runs behind the gap against n."""
    return dataclasses.replace(config, ratios=config.ratios and [max(config.ratios)])


def _finish(config: BanditConfig, record: dict[str, Any], thetas: Mapping[str, Tensor] | None) -> dict[str, Any]:
    out = Path(config.out)
    report.write_plots(record, out.with_suffix(""), thetas)
    write_json(out, record)
    report.show(record)
    return record
