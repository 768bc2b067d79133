"""KTO against its formula in float64, on labelled rows and on pairs, whatever the micro-batch."""

import json

import pytest
import torch

from rlhf_fast.config import KTOConfig
from rlhf_fast.data.encoding import encode_unpaired
from rlhf_fast.data.rows import load_unpaired
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.passes import response_logits
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.stages import kto
from rlhf_fast.stages.init import init_model
from rlhf_fast.training.metrics import read_metrics
from tests.support.models import model_config
from tests.support.stages import distance, stage_config, weights


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, tiny_model, tokenizer) -> str:
    directory = tmp_path_factory.mktemp("other")
    settings = model_config("llama", len(tokenizer))
    del settings["vocab_size"]
    init_model(settings, tokenizer, directory, seed=1)
    return str(directory)


def logps(path: str, sequences) -> torch.Tensor:
    """Summed log-probs of the responses, in float64."""
    model = load_policy(path, trainable=False).double()
    logp = torch.log_softmax(response_logits(model, sequences), -1)
    chosen = logp.gather(-1, sequences.response_ids[..., None]).squeeze(-1)
    return torch.where(sequences.response_mask, chosen, 0.0).sum(1)


@torch.no_grad()
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 8}, {"fused_head": False, "micro_batch_size": 24}])
def test_the_first_step_is_the_formula(loss_type, options, files, tiny_model, other_model, tmp_path):
    config = stage_config(
        KTOConfig, files, tiny_model, tmp_path, reference=other_model, batch_size=96, loss_type=loss_type, beta=0.3,
        desirable_weight=1.5, undesirable_weight=0.5, **options,
    )  # fmt: skip
    with torch.enable_grad():
        kto.train(config)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    tokenizer = load_tokenizer(tiny_model)
    examples = encode_unpaired(load_unpaired(files["unpaired"]), tokenizer, 512, 16).examples
    ratios = []
    for unrelated in (False, True):
        both = kto.sequences(examples, 0, torch.device("cpu"), unrelated=unrelated)
        ratios.append(logps(tiny_model, both) - logps(other_model, both))
    own, kl = 0.3 * ratios[0], ratios[1].mean()
    z = 0.3 * kl.clamp(min=0) if loss_type == "kto" else 0.0
    good = torch.tensor([e.label for e in examples])
    losses = torch.where(good, 1.5 * (1 - torch.sigmoid(own - z)), 0.5 * (1 - torch.sigmoid(z - own)))
    expected = {
        "loss": losses.mean(), "rewards/good": own[good].mean(), "rewards/bad": own[~good].mean(),
        **({"kl": kl} if loss_type == "kto" else {}),
    }  # fmt: skip
    assert 0 < good.sum() < 96 and abs(kl) > 1e-3
    assert {name: row[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()}, rel=2e-5)
    assert ("kl" in row) == (loss_type == "kto")


def test_micro_batches_change_nothing(files, tiny_model, tmp_path):
    for name, micro in (("whole", None), ("parts", 4)):
        config = stage_config(KTOConfig, files, tiny_model, tmp_path / name, micro_batch_size=micro, epochs=2)
        kto.train(config)
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) < 1e-6


def test_good_rows_gain_on_bad_rows(files, tiny_model, tmp_path):
    kto.train(stage_config(KTOConfig, files, tiny_model, tmp_path, epochs=8, eval_rows=files["unpaired"]))
    first, *_, last = read_metrics(tmp_path / "metrics.jsonl")
    assert first["loss"] == pytest.approx(0.5, abs=1e-6) and last["loss"] < 0.45
    assert last["rewards/good"] - last["rewards/bad"] > 0.2 > abs(first["rewards/good"] - first["rewards/bad"])
    assert last["eval/loss"] < 0.45
    assert json.loads((tmp_path / "run.json").read_text())["eval/loss"] == last["eval/loss"]


def test_a_pair_is_two_rows(files, tiny_model, tmp_path):
    pairs = load_unpaired(files["pairs"])
    assert len(pairs) == 192 and [row["label"] for row in pairs[:4]] == [True, False, True, False]
    assert pairs[0]["prompt"] == pairs[1]["prompt"] and pairs[0]["completion"] != pairs[1]["completion"]
    kto.train(stage_config(KTOConfig, files, tiny_model, tmp_path, train_data=files["pairs"]))
    assert json.loads((tmp_path / "run.json").read_text())["rows"] == 192
