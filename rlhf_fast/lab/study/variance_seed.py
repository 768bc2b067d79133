"""One seed of `rlhf-fast study variance`: a policy trained by ReMax, its gradient estimators measured on the way.

At every place all estimators get the same policy, and each makes its gradients from equally many sampled completions.
REINFORCE, the batch mean, ReMax and the value model take completions of different prompts, RLOO groups of completions.
The estimators differ in the baseline alone. They share the KL penalty on each token and so, with gamma 1, the
expectation.

Every estimator is measured on three kinds of scores, because a baseline's task is to take offsets out: scores as they
are (a reward model centres them on the SFT model's samples); with one offset for all; and with one offset for every
last token of a prompt, drawn from the spread that the ReMax paper reports for its reward model within a batch, -14 to
7. Nothing is sampled again, because an offset changes the weights alone. ReMax and RLOO take both kinds of offset out
exactly, and the batch mean takes the constant out, so these are measured once.

The value models, one per kind of score, start where PPO's do and regress on the returns of every rollout that trains
the policy. They have PPO's settings without the clip around the old value, because the clip would let an offset in by
small steps only.
Left out: value models as adapters or on the policy's trunk.
"""

import copy
import dataclasses
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rlhf_fast.config import PipelineConfig, PPOConfig, ReMaxConfig
from rlhf_fast.data.files import write_json
from rlhf_fast.lab.study.config import VarianceStudyConfig
from rlhf_fast.lab.variance import gradient_moments, token_weights
from rlhf_fast.lm.loading import load_scorer
from rlhf_fast.lm.scores import Scores
from rlhf_fast.lm.tokenizers import check_tokenizer
from rlhf_fast.lm.trust import trusting
from rlhf_fast.ops import ppo_value_loss, rloo_advantages
from rlhf_fast.report import pipeline
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages import remax
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.stages.ppo import value_start
from rlhf_fast.stages.rounds import rounds
from rlhf_fast.training import checkpoint
from rlhf_fast.training.batches import micro_batches
from rlhf_fast.training.fingerprint import fingerprints
from rlhf_fast.training.learner import Learner, take_step
from rlhf_fast.training.lock import held
from rlhf_fast.training.run import Run
from rlhf_fast.training.tally import Tally

SPREAD = (-14.0, 7.0)
METHODS = ("REINFORCE", "batch mean", "RLOO", "ReMax", "value model")
PLAIN, CONSTANT, BY_PROMPT = PANELS = ("plain", "constant", "by prompt")


def measure_seed(argument: tuple[PipelineConfig, VarianceStudyConfig]) -> None:
    """Trains and measures from a prepared start; the figures go to variance/measured.json in the seed's directory."""
    start, config = argument
    began = time.perf_counter()
    directory = measured_file(start).parent
    with held(directory), trusting(start.trust_remote_code):
        checkpoint.clear(directory)  # of a run that was cut off: its figures are not on the disk
        seed = SeedRun(start, config)
        seed.online.run(seed.update)
        seed.measure()  # the trained policy
    seconds = time.perf_counter() - began
    record = {"config": settings(start, config), "made_of": read_by(start), "seed": start.seed, "seconds": seconds}
    write_json(measured_file(start), {**record, "points": seed.points})


def measured_file(start: PipelineConfig) -> Path:
    """The file of a seed's figures."""
    return Path(start.output_dir) / "variance" / "measured.json"


def settings(start: PipelineConfig, config: VarianceStudyConfig) -> dict[str, Any]:
    """What a seed's figures depend on."""
    remax_config, ppo_config, group_size = stages_of(start)
    return {
        "batches": config.batches,
        "policies": config.policies,
        "group_size": group_size,
        **{f"remax.{name}": value for name, value in dataclasses.asdict(remax_config).items()},
        **{f"ppo.{name}": value for name, value in dataclasses.asdict(ppo_config).items()},
    }


def read_by(start: PipelineConfig) -> dict[str, Any]:
    """Fingerprints of the models and data that a seed's figures depend on."""
    return {f"remax.{name}": value for name, value in fingerprints(stages_of(start)[0]).items()}


def stages_of(start: PipelineConfig) -> tuple[ReMaxConfig, PPOConfig, int]:
    """The pipeline's ReMax, its PPO for the value models' settings, and RLOO's samples per prompt."""
    methods = [*dict.fromkeys([*start.methods, "remax", "ppo", "rloo"])]
    plan = pipeline.make_plan(dataclasses.replace(start, methods=methods))
    trained = dataclasses.replace(
        plan["remax"],
        output_dir=str(Path(start.output_dir) / "variance"),
        eval_steps=plan["remax"].steps if plan["remax"].eval_steps else 0,
        save_steps=0,
        resume=False,
    )
    group_size = plan["rloo"].group_size
    if trained.batch_size % group_size:
        raise ValueError(f"group_size: expected a divisor of ReMax's batch_size={trained.batch_size}, got {group_size}")
    return trained, plan["ppo"], group_size


def rounds_of(policies: int, steps: int) -> list[int]:
    """After how many rounds of training the policies are measured: evenly, from none to all."""
    policies = min(policies, steps + 1)
    return [round(i * steps / (policies - 1)) for i in range(policies)]


def offsets(vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """What is added to the scores of a prompt that ends with a token: [V] for each panel, the same for all seeds."""
    low, high = SPREAD
    uniform = torch.rand(vocab_size, generator=torch.Generator().manual_seed(0)) * (high - low) + low
    constant = torch.full_like(uniform, (low + high) / 2)
    tables = {PLAIN: torch.zeros_like(uniform), CONSTANT: constant, BY_PROMPT: uniform}
    return {panel: table.to(device) for panel, table in tables.items()}


def in_groups(online: Online[ReMaxConfig], size: int) -> Online[ReMaxConfig]:
    """The same models and completions per round, `size` of them of each prompt and no greedy one."""
    grouped = copy.copy(online)
    grouped.samples, grouped.greedy, grouped.prompts_per_round = size, False, online.config.batch_size // size
    grouped.rounds = rounds(grouped.sampler, grouped.question, ahead=0, last=grouped.config.steps)
    return grouped


class SeedRun:
    """The run of a seed: what is trained, and the points measured so far."""

    def __init__(self, start: PipelineConfig, config: VarianceStudyConfig) -> None:
        remax_config, self.ppo, self.group_size = stages_of(start)
        length = remax_config.greedy_response_length
        self.online = Online(remax_config, "ReMax", greedy=True, greedy_length=length)
        self.grouped = in_groups(self.online, self.group_size)
        self.batches, self.rounds = config.batches, rounds_of(config.policies, remax_config.steps)
        vocabulary = cast(int, self.online.policy.get_input_embeddings().num_embeddings)
        self.offsets = offsets(vocabulary, self.online.device)
        self.critics = {panel: self._critic() for panel in PANELS}
        self.trained_rounds, self.points = 0, []

    def _critic(self) -> Learner:
        online, config = self.online, self.ppo
        path = config.value_model or value_start(online)
        check_tokenizer(path, online.tokenizer, "value_model")
        model = load_scorer(path, dtype=config.dtype, head="zero").to(online.device)  # pyright: ignore[reportArgumentType]
        updates = online.config.steps * config.epochs * config.minibatches
        return Learner(model, config, updates, learning_rate=config.value_learning_rate)

    def update(self, run: Run, experience: Experience) -> dict[str, float]:
        """One round of ReMax and of the value models, after the measurement where one is due."""
        if self.trained_rounds in self.rounds:
            self.measure()
        metrics = {}
        for panel, critic in self.critics.items():
            metrics[f"loss/value {panel}"] = self._fit(critic, experience.rollout, self._returns(panel, experience))
        self.trained_rounds += 1
        return metrics | remax.update(self.online, run, experience)

    def measure(self) -> None:
        """All estimators on the policy as it is now.

        Their rounds are numbered beyond training's, so that their random numbers are their own. Late in the run the
        policy may have been trained on their prompts.
        """
        first = self.online.config.steps + 1 + 2 * self.batches * len(self.points)
        single, groups = range(first, first + self.batches), range(first + self.batches, first + 2 * self.batches)
        measured = gradient_moments(self.online, single, self._weights)
        measured |= gradient_moments(self.grouped, groups, self._group_weights)
        evaluation = self.online.evaluator(self.online.policy).metrics if self.online.evaluator else {}
        panels = {
            panel: {m: measured.get((panel, m)) or measured[PLAIN, m] for m in METHODS} for panel in PANELS
        }  # an estimator that an offset does not change was measured in the first panel
        self.points.append({"rounds": self.trained_rounds, **evaluation, "panels": panels})

    def _scores(self, panel: str, experience: Experience) -> Tensor:
        return experience.scores + self.offsets[panel][experience.rollout.prompt_ids[:, -1]]

    def _returns(self, panel: str, experience: Experience) -> Tensor:
        """[B, T]: REINFORCE's weights, which a value model's V(s_t) is to predict."""
        scores = self._scores(panel, experience)
        return token_weights(self.online, experience, torch.zeros_like(scores), scores)

    def _weights(self, experience: Experience) -> dict[tuple[str, str], Tensor]:
        weights, scores = {}, {panel: self._scores(panel, experience) for panel in PANELS}
        for panel, scores_B in scores.items():
            returns_BT = self._returns(panel, experience)
            weights[panel, "REINFORCE"] = returns_BT
            weights[panel, "value model"] = returns_BT - self._values(panel, experience.rollout)
            if panel != CONSTANT:
                others = scores_B - rloo_advantages(scores_B, len(scores_B))
                weights[panel, "batch mean"] = token_weights(self.online, experience, others, scores_B)
        greedy_B, scores_B = experience.greedy_scores, scores[PLAIN]
        assert greedy_B is not None  # `self.online` decodes greedily too
        weights[PLAIN, "ReMax"] = token_weights(self.online, experience, greedy_B, scores_B)
        return weights

    def _group_weights(self, experience: Experience) -> dict[tuple[str, str], Tensor]:
        others = experience.scores - rloo_advantages(experience.scores, self.group_size)
        return {(PLAIN, "RLOO"): token_weights(self.online, experience, others, experience.scores)}

    @torch.no_grad()
    def _values(self, panel: str, rollout: Rollout) -> Tensor:
        critic = self.critics[panel]
        with critic.autocast():
            rows = micro_batches(len(rollout.finished), self.ppo.micro_batch_size)
            return torch.cat([Scores(critic.model).values(rollout.rows(r).sequences) for r in rows])

    def _fit(self, critic: Learner, rollout: Rollout, returns_BT: Tensor) -> float:
        """PPO's passes over one rollout; returns the mean loss of its steps."""
        losses = []
        for _ in range(self.ppo.epochs):
            for index in torch.randperm(len(returns_BT)).to(returns_BT.device).chunk(self.ppo.minibatches):
                losses.append(self._step(critic, rollout.rows(index), returns_BT[index]))
        return sum(losses) / len(losses)

    def _step(self, critic: Learner, rollout: Rollout, returns_BT: Tensor) -> float:
        tokens, tally = rollout.response_mask.sum(), Tally()
        for rows in micro_batches(len(returns_BT), self.ppo.micro_batch_size):
            part = rollout.rows(rows)
            with critic.autocast():
                values = Scores(critic.model).values(part.sequences)
                loss = ppo_value_loss(
                    values, values.detach(), returns_BT[rows], part.response_mask, clip=math.inf, normalizer=tokens
                ).loss
            loss.backward()
            tally.add("loss", loss)
        return take_step(tally, {"grad_norm": critic})["loss"]
