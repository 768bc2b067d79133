"""Two baselines of the DPO paper that learn from pairs (arXiv 2305.18290, section 6): Unlikelihood and Preferred-FT.

Both minimise mean(alpha log pi(rejected) - log pi(chosen)), log-probs summed over a completion: alpha 0 is fine-tuning
on the preferred completions. With alpha > 0 the loss has no lower bound, so more steps are not better steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rlhf_fast.config import OfflineConfig
from rlhf_fast.config.fields import arg
from rlhf_fast.data.chat import with_template
from rlhf_fast.data.encoding import pad_id
from rlhf_fast.data.stage_rows import encode_stage
from rlhf_fast.lm.loading import default_device
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.stages.dpo import pair_sequences
from rlhf_fast.stages.offline import Offline
from rlhf_fast.training.batches import OfflineBatches
from rlhf_fast.training.evaluation import make_evaluator
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.resume import load_policy_and_reference
from rlhf_fast.training.tally import Tally


@dataclass(frozen=True, kw_only=True)
class UnlikelihoodConfig(OfflineConfig):
    """Unlikelihood training on preference pairs, or fine-tuning on the preferred completions."""

    alpha: float = arg(0.0, "Weight of the rejected completions' log-probs.", at_least=0)


@writes_alone("output_dir")
@trusts_as_asked
def train(config: UnlikelihoodConfig, *, listeners: Sequence[Listener] = ()) -> None:
    """Train `config.model` on preference pairs; the result goes to `config.output_dir`."""
    device = default_device()
    tokenizer = with_template(load_tokenizer(config.model), config.chat_template)
    data = encode_stage("dpo", config.train_data, tokenizer, config)
    batches = OfflineBatches(len(data.examples), config.batch_size, config.epochs, config.seed)
    policy, reference = load_policy_and_reference(config, device)
    evaluator = make_evaluator(config, tokenizer, device, reference.to(device), None)  # pyright: ignore[reportArgumentType]
    objectives = Objectives(policy, fused=config.fused_head)

    def loss(rows: list[int], whole: int, tally: Tally) -> Tensor:
        pairs = pair_sequences([data.examples[i] for i in rows], pad_id(tokenizer), device)
        logps = objectives.logprobs(pairs).logprobs.sum(dim=1).view(2, -1).sum(dim=1) / whole
        part = config.alpha * logps[1] - logps[0]
        tally.add("loss", config.alpha * logps[1].double() - logps[0].double())
        tally.add("logps/chosen", logps[0])
        tally.add("logps/rejected", logps[1])
        return part

    stage = Offline(
        config,
        "Unlikelihood" if config.alpha else "Preferred-FT",
        policy,
        tokenizer,
        batches,
        evaluator=evaluator,
        show=("loss", "logps/chosen", "logps/rejected"),
        listeners=listeners,
    )
    with stage.training(data):
        stage.steps(loss)
