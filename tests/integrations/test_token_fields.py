"""What trainers ask of the last layer: every field against float64, and against TRL's own head."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rlhf_fast.integrations import head
from rlhf_fast.integrations.forwards import distribution_of
from rlhf_fast.integrations.head import Distribution, Layer, token_fields
from rlhf_fast.integrations.trl import _fused_forward
from tests.support.models import model_config, random_policy

ALL = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
N, H, V = 23, 8, 31


def example(dtype=torch.float32, seed=0, spread=2.0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in ((N, H), (V, H), (V,)))
    ids = torch.randint(V, (N,), generator=g)
    ids[::4] = -100
    return (hidden * spread).requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), ids


def truth(hidden, weight, bias, ids, distribution):
    """The fields in float64."""
    z = distribution.scale * (hidden.double() @ weight.double().t() + bias.double())
    if distribution.softcap is not None:
        z = distribution.softcap * torch.tanh(z / distribution.softcap)
    z = z / distribution.temperature
    logp, counted = z.log_softmax(1), ids != -100
    fields = {
        "log_probs": logp.gather(1, ids.clamp(min=0)[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(1),
        "mean_logits": z.mean(1),
        "log_sum_sq_probs": (2 * logp).logsumexp(1),
    }
    top = (z.argmax(1) == ids) & counted
    return {name: torch.where(counted, field, 0.0) for name, field in fields.items()} | {"is_top1": top}


@pytest.mark.parametrize("distribution", [Distribution(), Distribution(0.7, 3.0, 0.5), Distribution(1.3, None, 2.0)])
def test_every_field_is_that_of_float64(distribution, monkeypatch):
    monkeypatch.setattr(head, "BLOCK_BYTES", 4 * V * 5)  # blocks of five tokens
    hidden, weight, bias, ids = example()
    ids[1::4] = (hidden @ weight.t() + bias).detach().argmax(1)[1::4]  # so that some are the most likely ones
    fields = token_fields(Layer(weight, bias, distribution), hidden, ids, ALL)
    exact = truth(hidden, weight, bias, ids, distribution)
    assert fields.keys() == exact.keys()
    assert exact["is_top1"].any() and not exact["is_top1"][ids != -100].all()
    assert torch.equal(fields["is_top1"], exact["is_top1"])
    for name in exact.keys() - {"is_top1"}:
        torch.testing.assert_close(fields[name].double(), exact[name], rtol=1e-5, atol=1e-5)
        assert fields[name].requires_grad == (name in ("log_probs", "entropy"))


def test_most_tokens_need_no_logits_to_tell_the_most_likely_one(monkeypatch):
    rows = []
    usual = head._Facts._logits
    monkeypatch.setattr(head._Facts, "_logits", lambda self, part: rows.append(len(part)) or usual(self, part))
    hidden, weight, bias, ids = example(spread=6.0)
    fields = token_fields(Layer(weight, bias, Distribution()), hidden, ids, ("is_top1",))
    assert torch.equal(fields["is_top1"], truth(hidden, weight, bias, ids, Distribution())["is_top1"])
    assert rows[0] < 0.3 * (ids != -100).sum()


def test_the_first_of_equal_logits_is_the_most_likely_one():
    weight = torch.tensor([[1.0], [1.0], [0.0]])
    fields = token_fields(Layer(weight, None, Distribution()), torch.ones(3, 1), torch.arange(3), ("is_top1",))
    assert fields["is_top1"].tolist() == [True, False, False]


@pytest.mark.parametrize("upstream", ["sum", "weights", "entropy"])
def test_a_gradient_made_ahead_is_the_right_one_whatever_the_loss(upstream):
    hidden, weight, bias, ids = example(torch.float64)
    weights = torch.linspace(-1, 2, N, dtype=torch.float64)

    def loss(fields):
        if upstream == "sum":
            return -fields["log_probs"].sum() / 7
        by_entropy = fields["entropy"].sum() if upstream == "entropy" else 0.0
        return (weights * fields["log_probs"]).sum() + by_entropy

    layer = Layer(weight, bias, Distribution(0.8, None, 1.5))
    mine = torch.autograd.grad(
        loss(token_fields(layer, hidden, ids, ("entropy",), summed=True)), (hidden, weight, bias)
    )
    exact = torch.autograd.grad(loss(truth(hidden, weight, bias, ids, layer.distribution)), (hidden, weight, bias))
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_batch_in_which_nothing_counts_has_gradients_of_zero():
    hidden, weight, bias, ids = example()
    for summed in (True, False):
        layer = Layer(weight, bias, Distribution())
        fields = token_fields(layer, hidden, torch.full_like(ids, -100), ALL, summed=summed)
        assert all(not field.any() for field in fields.values())
        found = torch.autograd.grad(fields["log_probs"].sum(), (hidden, weight, bias))
        assert all(not gradient.any() for gradient in found)


def scaled(model_type, **settings):
    sizes = model_config("llama", 37)
    sizes.pop("model_type")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **settings)).eval()


MODELS = {
    "llama": lambda: random_policy("llama"),
    "gemma2, a soft cap": lambda: random_policy("gemma2"),
    "gpt2, learned positions": lambda: random_policy("gpt2"),
    "cohere, logit_scale": lambda: scaled("cohere", logit_scale=0.25),
    "granite, logits_scaling": lambda: scaled("granite", logits_scaling=4.0),
}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_that_of_TRLs_head(name, padding):
    model = MODELS[name]()
    forward = _fused_forward(distribution_of(model.config, 0.9), ALL, False, True)
    add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", *ALL))
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 37, (3, 9), generator=g)
    slots, lengths = torch.arange(9), torch.tensor([[9], [6], [4]])
    mask = (slots >= 9 - lengths if padding == "left" else slots < lengths).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = labels[:, :6] if padding == "right" else -100
    inputs = {"input_ids": ids * mask, "attention_mask": mask, "fused_lm_head": True}
    for given in (
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": torch.tensor(11)},
        {"shift_labels": F.pad(labels[:, 1:], (0, 1), value=-100)},
    ):
        theirs, ours = model(**inputs, **given), forward(model, **inputs, **given)
        assert theirs.keys() == ours.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=2e-5, atol=2e-5)
    direction = torch.randn(ours.log_probs.shape, generator=g)
    gradients = []
    for out in (theirs, ours):
        model.zero_grad()
        (out.loss + (direction * (out.log_probs + out.entropy)).sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


def test_a_config_says_what_becomes_of_the_logits():
    assert distribution_of(MODELS["granite, logits_scaling"]().config, 2.0) == Distribution(2.0, None, 0.25)
    assert distribution_of(MODELS["cohere, logit_scale"]().config, 1.0) == Distribution(1.0, None, 0.25)
    assert distribution_of(MODELS["gemma2, a soft cap"]().config, 1.0) == Distribution(1.0, 30.0, 1.0)
