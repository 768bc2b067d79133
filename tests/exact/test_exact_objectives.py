"""The policy objectives and the KL terms on a model whose completions can all be enumerated: what is their gradient?"""

import pytest
import torch

import rlhf_fast as rf
from rlhf_fast import exact
from tests.support.worlds import close, random_logprobs, random_rewards, random_tabular

L = 3


class World:
    """Completions of one to three tokens, a tabular policy, an older policy, a reference, and rewards."""

    def __init__(self):
        self.completions = exact.completions(3, L, eos_token_id=0)
        self.mask, N = self.completions.mask, len(self.completions.tokens)
        self.policy, old = random_tabular(self.completions, seed=0), random_tabular(self.completions, seed=1)
        self.tokens, self.old = self.policy.token_logprobs(), old.token_logprobs().detach()
        self.ref_policy = exact.TabularPolicy(self.completions)
        self.ref_policy.set_logprobs(random_logprobs(N, seed=9))
        self.ref = self.ref_policy.token_logprobs().detach()
        self.rewards = random_rewards(N)
        scores = exact.score_functions(self.policy(), self.policy.parameters())
        self.true_gradient = exact.policy_gradient(self.policy().detach(), scores, self.rewards)

    def gradient(self, weights, **options):
        """Of -ppo_loss by the logits, on policy. weights: advantages [N] or [N, T]."""
        loss = rf.ppo_loss(self.tokens, self.tokens.detach(), weights, self.mask, **options).loss
        (gradient,) = torch.autograd.grad(-loss, self.policy.logits, retain_graph=True)
        return gradient.flatten()

    def divergence(self, sampler, reverse):
        """Gradient of the KL of the next token, over the prefixes that `sampler` visits; the prefixes are constants."""
        nodes, mass = self.policy.nodes, torch.zeros(len(self.policy.logits), dtype=torch.float64)
        p = torch.where(self.mask, sampler, 0.0).sum(1).exp()
        mass.index_add_(0, nodes[self.mask], p[self.mask.nonzero()[:, 0]])
        pi, ref = self.policy.logits.log_softmax(-1), self.ref_policy.logits.detach().log_softmax(-1)
        kl = (pi.exp() * (pi - ref) if reverse else ref.exp() * (ref - pi)).sum(-1)
        (gradient,) = torch.autograd.grad((mass * kl).sum(), self.policy.logits)
        return gradient.flatten()


@pytest.fixture(scope="module")
def world():
    return World()


ON_POLICY = {
    "ppo": dict(),
    "gspo": dict(importance_sampling_level="sequence"),
    "gspo-token": dict(importance_sampling_level="sequence_token"),
    "cispo": dict(objective="cispo"),
    "sapo": dict(objective="sapo"),
    "sapo, hot": dict(objective="sapo", sapo_temperature=(9.0, 0.1)),
}


@pytest.mark.parametrize("options", ON_POLICY.values(), ids=ON_POLICY)
def test_on_policy_all_objectives_have_the_policy_gradient(world, options):
    """Summed over tokens, each completion in its proportion. Dr. GRPO divides this sum by a constant."""
    weights = world.tokens.sum(1).exp().detach() * world.rewards
    close(world.gradient(weights, reduction="constant", normalizer=1.0, **options), world.true_gradient, 1e-10)
    dr_grpo = world.gradient(weights, reduction="constant", normalizer=len(weights) * L, **options)
    close(dr_grpo * len(weights) * L, world.true_gradient, 1e-10)


@pytest.mark.parametrize("options", ON_POLICY.values(), ids=ON_POLICY)
def test_the_mean_over_a_completion_is_biased_by_its_length(world, options):
    """`sequence_mean`, of GRPO, GSPO and SAPO: the gradient is that of rewards divided by the completion's length."""
    p = world.tokens.sum(1).exp().detach()
    got = world.gradient(p * world.rewards, reduction="sequence_mean", normalizer=1.0, **options)
    lengths = world.mask.sum(1)
    expected = world.gradient(p * world.rewards / lengths, reduction="constant", normalizer=1.0)
    close(got, expected, 1e-10)
    assert torch.nn.functional.cosine_similarity(got, world.true_gradient, dim=0) < 0.99
    close(
        world.gradient(p * world.rewards * lengths, reduction="sequence_mean", normalizer=1.0),
        world.true_gradient,
        1e-10,
    )


KL = {
    ("k1", False): None,
    ("k2", False): True,
    ("k3", False): False,
    ("k1", True): True,
    ("k3", True): True,
}  # fmt: skip


@pytest.mark.parametrize("estimator, by_ratio", KL)
def test_which_divergence_the_kl_term_descends_on_policy(world, estimator, by_ratio):
    """k2, and k1 and k3 by the ratio: KL(policy || reference). k3: KL(reference || policy). k1: none."""
    p = world.tokens.sum(1).exp().detach()
    reverse = KL[estimator, by_ratio]
    expected = 0 * world.true_gradient if reverse is None else world.divergence(world.tokens.detach(), reverse)
    close(-kl_gradient(world, p, estimator, by_ratio, world.tokens.detach()), expected, 1e-10)
    if reverse is not None:
        other = world.divergence(world.tokens.detach(), not reverse)
        assert (expected - other).abs().max() > 1e-2


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_by_the_ratio_it_is_the_reverse_kl_off_policy_too(world, estimator):
    p = world.old.sum(1).exp()
    expected = world.divergence(world.old, True)
    close(-kl_gradient(world, p, estimator, True, world.old), expected, 1e-10)
    assert (-kl_gradient(world, p, "k2", False, world.old) - expected).abs().max() > 1e-2


def test_a_kl_term_in_the_loss_leaves_out_what_a_token_does_to_later_ones(world):
    """The KL of completions also counts the prefixes that a token leads to. The KL in the reward has both parts."""
    whole = exact.kl(world.policy(), torch.where(world.mask, world.ref, 0.0).sum(1))
    (expected,) = torch.autograd.grad(whole, world.policy.logits)
    p, zeros = world.tokens.sum(1).exp().detach(), torch.zeros(len(world.rewards), dtype=torch.float64)
    assert (world.divergence(world.tokens.detach(), True) - expected.flatten()).abs().max() > 1e-2
    to_go = rf.remax_returns(zeros, zeros, world.tokens.detach(), world.ref, world.mask, kl_coef=1.0, variant="verl")
    got = world.gradient(to_go * p[:, None], reduction="constant", normalizer=1.0)
    close(-got, expected.flatten(), 1e-10)


def kl_gradient(world, proportions, estimator, by_ratio, old):
    """Of minus the KL term, where each completion comes in its proportion [N]: one row is one loss."""
    total = torch.zeros_like(world.true_gradient)
    for n, share in enumerate(proportions):
        row = slice(n, n + 1)
        loss = rf.ppo_loss(
            world.tokens[row], old[row], torch.zeros(1, dtype=torch.float64), world.mask[row],
            ref_logprobs=world.ref[row], kl_coef=share.item(), kl_estimator=estimator, use_bias_correction_kl=by_ratio,
            reduction="constant", normalizer=1.0,
        ).loss  # fmt: skip
        (gradient,) = torch.autograd.grad(-loss, world.policy.logits, retain_graph=True)
        total += gradient.flatten()
    return total
