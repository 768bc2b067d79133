"""The peak of every phase: the models resident in it, and the pass that runs in it.

Which phases a method has, and how many rows a pass takes, follows from its row in the table of training stages.
"""

import copy
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from rlhf_fast.ops import backend
from rlhf_fast.ops.head_layers import layer_of
from rlhf_fast.ops.heads import MEMORY_BUDGET, working_bytes
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.passes import Curve, Lengths, Run, inference, rollout, set_bytes, training
from rlhf_fast.plan.roles import (
    Role,
    bytes_per_trained,
    master_bytes,
    roles_of,
    static_bytes,
    widened_bytes,
    zero_stage,
)
from rlhf_fast.plan.shapes import Shape
from rlhf_fast.plan.spread import Spread, own_rows, rows_of_minibatch, spread_of
from rlhf_fast.ranks import bytes_to_add
from rlhf_fast.training.evaluation import EVAL_ROWS

_SPEAKERS = ("policy", "reference")  # roles whose passes end in log-probs, not in scores
WHOLE = Spread("none", 1, 1)
_SIMULATED: dict[tuple, Curve] = {}
"""Kept for the process, because several methods planned for one model have most passes in common."""


class Phase(NamedTuple):
    """Bytes at the peak: "<role> weights", "<role> optimizer", "<role> gradients", "kept" for the sets that a rollout
    drew from, and "pass" for what it adds."""

    parts: dict[str, int]
    how: str  # where the pass's bytes come from

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


class Planner:
    """The curves of one configuration, from which the phases of any batch size and process follow by arithmetic.

    rank: the process whose bytes `static` and `phases` are about.
    """

    def __init__(self, plan: PlanConfig) -> None:
        self.plan, self.stage, self.roles, self.rank = plan, plan.stage, roles_of(plan), 0
        self.spread = spread_of(plan)
        self.sharded = self.spread.how != "none"
        self.static = {name: static_bytes(role, plan) for name, role in self.roles.items()}
        self.trained = [name for name, role in self.roles.items() if role.trained]
        self.main = self.trained[0]
        length = plan.prompt_length + plan.response_length
        self.lengths = Lengths(plan.prompt_length, plan.response_length)
        # a row in one piece has a prompt of one token, because every other token is predicted (and some are masked)
        self.trained_lengths = Lengths(1, length - 1) if self.stage.one_piece else self.lengths
        self.served = self.stage.online and plan.sampler == "vllm"
        self.truncated = self.stage.online and plan.truncated
        self.fused = plan.fused_head and not self.truncated
        self.samples = self.stage.samples_of(plan.group_size)
        self.rows_per_prompt = self.samples + self.stage.greedy
        # gradients wait on the weights for the optimizer's step; otherwise `static` has them, split or in CPU memory
        self.keeps_gradients = not (plan.optimizer_in_backward or plan.offload_optimizer or plan.zero >= 2)
        self.curves: dict[object, Curve] = {}
        self._others: dict[int, Planner] = {}

    def at(self, rank: int) -> "Planner":
        """The planner of another process, which has the same curves."""
        if rank not in self._others:
            other = copy.copy(self)
            other.rank = rank
            other.static = {name: static_bytes(role, self.plan, rank) for name, role in self.roles.items()}
            self._others[rank] = other
        return self._others[rank]

    def processes(self, device: str, batch: int | None = None) -> list[dict[str, Phase]]:
        """`phases` of every process."""
        return [self.at(rank).phases(device, batch) for rank in range(self.plan.gpus)]

    def phases(self, device: str, batch: int | None = None, micro: int | None = None) -> dict[str, Phase]:
        """Phase -> parts of its peak in the process `rank`, on `device` (cpu or cuda).

        batch: rows of all processes; default: the config's.
        """
        every = batch or self.plan.batch_size
        batch = self._own(every)
        step = rows_of_minibatch(batch, every, self.plan.minibatches, self.plan.gpus)  # rows of an optimizer step
        micro = micro or self.plan.micro_batch_size
        rows = min(micro or batch, batch)
        result = {}
        if self.stage.online:
            if self.served:  # a server decodes; a pass of ours takes the log-probs of what it has drawn
                result["rescoring"] = self._inference("policy", rows, device)
            else:
                result["rollout"] = self._rollout(batch)
            scored_by_model = "reward" in self.roles
            result["scoring"] = self._frozen("reward", rows, device) if scored_by_model else self._idle()
        if "reference" in self.roles:
            result["reference"] = self._frozen("reference", self.stage.sequences * rows, device)
        if "value" in self.roles:
            result["value"] = self._inference("value", rows, device)
        if self.stage.kl_pass:
            result["kl"] = self._inference("policy", rows, device)
        later = bool(micro) and micro < (self._most_rows_of_a_step(every) if self.sharded else step)
        result["policy_update"] = self._update(self.main, min(rows, step), later, device)
        if "value" in self.roles and not self.plan.shared_critic:
            result["value_update"] = self._update("value", min(rows, step), later, device)
        for name, role in self._first_passes().items():
            if name in result:
                result[name] = max(
                    result[name], self._trial(role, decoding=name == "rollout"), key=lambda phase: phase.peak_bytes
                )
        result["optimizer"] = self._optimizer()
        if self.truncated:
            for name, phase in result.items():
                phase.parts["kept"] = self._kept(name, batch, step)
        if self.plan.eval_rows:
            result["evaluation"] = self._evaluation(device, micro)
        return result

    def _own(self, batch: int) -> int:
        """Rows of this process out of `batch` rows. The samples of a prompt are in one process."""
        return self.samples * own_rows(batch // self.samples, self.plan.gpus, self.rank)

    def _most_rows_of_a_step(self, batch: int) -> int:
        """Rows of an optimizer step in the process with most of them: the others make idle passes beside it."""
        most = self.samples * -(-batch // self.samples // self.plan.gpus)
        return rows_of_minibatch(most, batch, self.plan.minibatches, self.plan.gpus)

    def _optimizer(self) -> Phase:
        gradients = {} if self.plan.offload_optimizer else {n: self.static[n].gradients for n in self.trained}
        parts = self._resident(None) | {f"{n} gradients": size for n, size in gradients.items()}
        messages = max(map(self._messages, self.trained))
        masters = bytes_per_trained(self.plan).master and not (self.plan.optimizer_in_backward or self.plan.zero)
        widened = widened_bytes(self.roles[self.main], self.plan, self.rank) if masters else 0
        if buffers := max(messages, widened):
            parts["messages" if messages == buffers else "fp32 gradients"] = buffers
        return Phase(parts, "")

    def _messages(self, name: str) -> int:
        """Bytes of the messages that add up a role's whole gradients over the processes."""
        plan, role = self.plan, self.roles[name]
        if plan.gpus == 1 or plan.zero or plan.optimizer_in_backward:
            return 0
        whole = [weight for weight in role.trained_weights if weight.whole or not self.sharded]
        dtypes = [torch.bfloat16 if bytes_per_trained(plan).gradient == 2 else torch.float32] * len(whole)
        return bytes_to_add(
            torch.empty(weight.numel, dtype=dtype, device="meta") for weight, dtype in zip(whole, dtypes, strict=True)
        )

    def _kept(self, phase: str, batch: int, step: int) -> int:
        """Bytes of the sets that a truncated rollout drew from, at a phase's peak."""
        rows = batch
        if phase in ("rollout", "scoring", "reference"):
            rows = batch // self.samples * self.rows_per_prompt  # the greedy rows' as well
        elif phase in ("policy_update", "value_update", "optimizer") and self.stage.minibatches:
            rows = batch + step  # a copy of the minibatch's
        return rows * self.plan.response_length * set_bytes(self.roles["policy"].shape.config)

    def held(self) -> int:
        """Bytes of weights and states in this process while the policy samples, its whole weights apart."""
        return sum(self._resident("policy").values())

    def _resident(self, at_work: str | None, *, stepped: bool = True) -> dict[str, int]:
        """Weights and optimizer states on the GPU while the role `at_work` runs.

        stepped: an optimizer step has been taken, so that the states are there; fp32 copies of bf16 weights always are.
        """
        parts = {}
        for name, role in self.roles.items():
            parts[f"{name} weights"] = self._weights(name, role, at_work == name)
            if not self.plan.offload_optimizer:
                there = self.static[name].optimizer if stepped else master_bytes(role, self.plan, self.rank)
                parts[f"{name} optimizer"] = there
        return {name: size for name, size in parts.items() if size}

    def _weights(self, name: str, role: Role, at_work: bool) -> int:
        """Bytes of a role's weights on the GPU.

        ZeRO 3 gathers the layers at work. An offloaded model is there in its own phase only, and with ZeRO 3 only those
        layers of it are.
        """
        plan, sharded = self.plan, zero_stage(role, self.plan) == 3
        dropped = not self.stage.online and not plan.eval_rows  # by an offline method, once its log-probs are known
        if role.frozen and not at_work and (plan.offload or dropped):
            return 0
        if self.sharded and at_work and self._comes_whole(name):
            return role.weight_bytes
        if self.sharded and plan.offload and role.frozen:
            return 0  # the parts wait in CPU memory, and the whole weights of a pass are the pass's
        gathered = role.gathered_bytes if role.own and at_work and sharded else 0
        if role.frozen and plan.offload and sharded:
            return gathered
        return self.static[name].weights + (gathered if plan.gpus > 1 else 0)

    def _comes_whole(self, name: str) -> bool:
        """Whether a role's first pass is made before the role is put into shards: an offline method's reference."""
        return name == "reference" and not self.stage.online

    def _rollout(self, batch: int) -> Phase:
        prompts = batch // self.samples
        at = self._rolled_out(prompts)
        part = max(at["gather"], at["prefill"], at["decode"])
        rows = prompts * self.rows_per_prompt
        if self.truncated:  # once the cache is gone, steps' sets become a rollout's: three times as many at a time
            part = max(part, at["whole"] + 2 * self._kept("rollout", batch, batch))
        text = f"{rows} rows: KV cache {at['kv_cache']:,} at {sum(self.lengths)} tokens, "
        text += f"the last decode step with it {at['decode']:,}; prefill of {prompts} prompts {at['prefill']:,}"
        if self.sharded:
            text += f"; whole weights {at['whole']:,} among them, {at['gather']:,} while they are gathered"
        return Phase(self._resident("policy") | {"pass": part}, text)

    def _first_passes(self) -> dict[str, str]:
        """Phase -> the role with bf16 weights whose fast paths are tried in it, before the first step."""
        first = {"rollout": "policy", "rescoring": "policy", "scoring": "reward", "reference": "reference"}
        if not self.sharded:  # `shard` takes the trials of a trained model's passes before the first phase
            first |= {"value": "value", "kl": "policy", "policy_update": self.main}
        return {phase: role for phase, role in first.items() if role in self.roles and self.roles[role].counts.trial}

    def _trial(self, name: str, *, decoding: bool) -> Phase:
        role = self.roles[name]
        copied = role.counts.trial + (role.counts.trial_head if decoding else 0)
        text = f"the first pass tries fast paths on fp32 copies of {copied:,} weights, see lm/precision.py"
        parts = self._resident(name, stepped=False) | {"fp32 trial pass": 4 * copied}
        if self.sharded and not self._comes_whole(name):
            parts["whole weights"] = role.whole_bytes(self.spread.parts)
        return Phase(parts, text)

    def _idle(self) -> Phase:
        return Phase(self._resident(None), "")

    def _frozen(self, name: str, rows: int, device: str) -> Phase:
        casts = self._rolled_out(rows)["casts"] if self.stage.online and self.plan.bf16 else 0
        phase = self._inference(name, rows, device)
        return Phase(phase.parts | ({"policy bfloat16 weights": casts} if casts else {}), phase.how)

    def _trunk(self, name: str, rows: int, device: str, *, plain: bool = False) -> dict[str, int]:
        """A pass of a role's trunk without gradients: its peak, "activations", and the hidden states, "loss".

        Both include the whole weights of a model in shards. plain: the model is not in shards yet.
        """
        shape = self.roles[name].shape._replace(head="policy" if name in _SPEAKERS else "score", checkpointing=False)
        shape = shape._replace(trained=shape.trained and shape.autocast)  # else it makes no difference
        spread = WHOLE if plain else self.spread
        # The head makes no difference to a trunk, but it is among the whole weights of a model in shards.
        key = ("inference", id(shape.config), shape[2 if spread.how == "none" else 1 :], plain)
        return self._curve(key, shape, inference(shape, self.lengths), rows, device, spread)

    def _inference(self, name: str, rows: int, device: str) -> Phase:
        at = self._trunk(name, rows, device, plain=self._comes_whole(name))
        head = at["loss"]
        text = f"{rows} rows: trunk {at['activations']:,}"
        if name in _SPEAKERS:
            working = self._head_bytes(self.roles[name], rows, device, wanted=(False, False))
            head += working
            text += f"; hidden states {at['loss']:,} + head {working:,}"
        stepped = self.stage.online or name != "reference"  # an offline method begins with the reference
        if at["whole"]:
            text += f"; whole weights {at['whole']:,} among them, {at['gather']:,} while they are gathered"
        peak = max(at["gather"], at["activations"], head)
        return Phase(self._resident(name, stepped=stepped) | {"pass": peak}, text)

    def _evaluation(self, device: str, micro: int | None) -> Phase:
        """The largest of: sampling the prompts, the exact KL of a micro-batch, and the reward model's pass."""
        prompts = own_rows(min(self.plan.eval_rows, EVAL_ROWS), self.plan.gpus, self.rank)
        rows = min(micro or prompts, prompts)
        sampled = self._rolled_out(prompts, rows_per_prompt=1)
        policy, reference = (self._trunk(name, rows, device) for name in _SPEAKERS)
        heads = [self._head_bytes(self.roles[name], rows, device, wanted=(False, False)) for name in _SPEAKERS]
        states = policy["loss"] + reference["loss"]
        # The two layers share the budget for logits, so that both take as much as the larger head does alone.
        both = max(
            policy["whole"] + reference["gather"],
            policy["activations"] + reference["whole"],
            policy["loss"] + reference["activations"],
            states + self._both(heads),
        )
        sampling = max(sampled["gather"], sampled["prefill"], sampled["decode"])
        parts = {} if self.plan.sampler == "vllm" else {"sampling": sampling}
        parts["KL"] = both
        if "reward" in self.roles:
            reward = self._trunk("reward", rows, device)
            parts["reward"] = policy["whole"] + max(reward["gather"], reward["activations"])
        casts = {"policy bfloat16 weights": sampled["casts"]} if self.plan.bf16 else {}
        text = f"{prompts} prompts, {rows} rows at once: " + ", ".join(f"{name} {n:,}" for name, n in parts.items())
        resident = self._resident(None if self.sharded else "reference")
        return Phase(resident | {"pass": max(parts.values())} | casts, text)

    def _both(self, heads: list[int]) -> int:
        return max(heads) if self.fused else sum(heads)

    def _update(self, name: str, micro: int, later: bool, device: str) -> Phase:
        role = self.roles[name]
        loss = {"policy": "tokens", "value": "values", "reward": "scores"}[name]
        rows = self.stage.sequences * micro
        run = training(
            role.shape,
            self.trained_lengths,
            loss=loss,
            fused=self.fused,
            truncated=self.truncated,
            keep=self.keeps_gradients,
            added=self.plan.gpus > 1 and not self.sharded and self.plan.zero == 0,
            repeats=2 if later else 1,
            critic=self.plan.shared_critic,
        )
        at = self._curve(("training", name, later), role.shape, run, rows, device)
        after = max(at["second layer"], at["first layer"], at["gradients"])
        text = f"{rows} rows: until the last layer's backward {at['activations']:,}, after it {after:,}"
        peak = max(at["activations"], after)
        if loss == "tokens" and self.fused:
            working = self._head_bytes(role, rows, device, wanted=(True, not self.plan.lora_rank))
            text += f"; at the loss {at['loss']:,} + fused head {working:,}"
            peak = max(peak, at["loss"] + working)
        if self.keeps_gradients:
            text += "; the new gradients among them"
        return Phase(
            self._resident(name) | self._other_gradients(name, later) | self._reduced(role) | {"pass": peak}, text
        )

    def _other_gradients(self, name: str, later: bool) -> dict[str, int]:
        """Gradients that are there while `name` makes its own: of the other model, and its own where split."""
        if self.plan.offload_optimizer or self.plan.optimizer_in_backward:
            return {}
        there = {n for n in self.trained if n != name and (later or n == self.main)}
        there |= set() if self.keeps_gradients else {name}
        return {f"{n} gradients": self.static[n].gradients for n in self.trained if n in there}

    def _reduced(self, role: Role) -> dict[str, int]:
        """Whole gradients of two layers on their way to the GPU (or CPU) that keeps them."""
        if not (self.plan.zero >= 2 or self.plan.offload_optimizer) or self.plan.optimizer_in_backward:
            return {}
        share = role.trained / role.counts.all
        return {"reduced gradients": round(2 * role.counts.layer * share) * role.shape.dtype.itemsize}

    def _head_bytes(self, role: Role, rows: int, device: str, wanted: tuple[bool, bool]) -> int:
        lengths = self.trained_lengths
        n = rows * self.plan.response_length
        text = role.shape.config.get_text_config()
        V, H, dtype = text.vocab_size, text.hidden_size, role.shape.dtype
        hidden = torch.bfloat16 if role.shape.autocast else dtype
        if not self.fused:  # the logits; truncated sampling makes two masks besides, of a byte for each
            return rows * lengths.response * V * (hidden.itemsize + 2 * self.truncated)
        with torch.device("meta"):
            layer = layer_of(nn.Parameter(torch.empty(V, H, dtype=dtype)), None, hidden, torch.float32, device)
        return working_bytes(rows * lengths.response, n, hidden, layer, MEMORY_BUDGET[device], wanted)

    def _rolled_out(self, prompts: int, rows_per_prompt: int | None = None) -> dict[str, int]:
        """Sampling so many prompts; by default with as many rows each as a round of the method has."""
        shape = self.roles["policy"].shape._replace(checkpointing=False)
        copies = rows_per_prompt or self.rows_per_prompt
        run = rollout(shape, self.lengths, copies, self.plan.top_k, self.plan.top_p)
        return self._curve(("rollout", copies), shape, run, prompts)

    def _curve(
        self, key: object, shape: Shape, run: Run, rows: int, device: str = "cpu", spread: Spread | None = None
    ) -> dict[str, int]:
        """A pass at `rows` rows, simulated at the first number asked for. device: whose attention it runs."""
        with backend("reference") if device == "cuda" else nullcontext():
            if (device, key) not in self.curves:
                first = max(2, rows)  # one row takes other paths than more do
                spread = (spread or self.spread)._replace(gloo=device == "cpu")
                model = shape.config.to_json_string(use_diff=False), shape[1:]
                known = device, model, run.settings, first, spread if spread.how != "none" else None
                if known not in _SIMULATED:
                    _SIMULATED[known] = Curve(shape, run, first, spread)
                self.curves[device, key] = _SIMULATED[known]
            return self.curves[device, key](rows)
