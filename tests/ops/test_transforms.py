"""torch.func's transforms of the operations: first derivatives and vmap are autograd's, anything more is one line."""

import pytest
import torch
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

import rlhf_fast as rf
from rlhf_fast.ops import backend

B, T, V, H = 4, 6, 9, 5
X, ROW, MASK = torch.randn(B, T), torch.randn(B), torch.ones(B, T, dtype=torch.bool)
LOGITS, IDS = torch.randn(B, T, V), torch.randint(V, (B, T))
HIDDEN, WEIGHT = torch.randn(B, T, H), torch.randn(V, H)


def hidden(x):
    return x[..., None] * HIDDEN


OPERATIONS = {
    "ppo_loss": lambda x: rf.ppo_loss(x, X / 2, X, MASK).loss,
    "ppo_value_loss": lambda x: rf.ppo_value_loss(x, X, X + 1, MASK).loss,
    "reinforce_loss": lambda x: rf.reinforce_loss(x, X, MASK),
    "kl_penalty": lambda x: rf.kl_penalty(x, X / 2, "k3").sum(),
    "token_logprobs": lambda x: rf.token_logprobs(x[..., None] * LOGITS, IDS, inplace_backward=True).logprobs.sum(),
    "token_kl": lambda x: rf.token_kl(x[..., None] * LOGITS, LOGITS, IDS).kl.sum(),
    "linear_token_logprobs": lambda x: rf.linear_token_logprobs(hidden(x), WEIGHT, IDS).logprobs.exp().sum(),
    "linear_token_kl": lambda x: rf.linear_token_kl(hidden(x), WEIGHT, HIDDEN, WEIGHT * 2, IDS).kl.sum(),
    "linear_sft_loss": lambda x: rf.linear_sft_loss(hidden(x), WEIGHT, IDS).loss,
    "linear_ppo_loss": lambda x: rf.linear_ppo_loss(hidden(x), WEIGHT, IDS, X, X, MASK).loss,
    "linear_dpo_loss": lambda x: rf.linear_dpo_loss(hidden(x), WEIGHT, IDS, ROW[:2], ROW[:2]).loss,
    "linear_kto_loss": lambda x: rf.linear_kto_loss(hidden(x), WEIGHT, IDS, ROW, ROW > 0, 0.1).loss,
    "linear_loss": lambda x: rf.linear_loss(hidden(x), WEIGHT, IDS, lambda logprobs, *_: -logprobs).loss,
    "dpo_loss": lambda x: rf.dpo_loss(x[:, 0], x[:, 1], ROW, ROW).losses.sum(),
    "kto_loss": lambda x: rf.kto_loss(x[:, 0], ROW, ROW > 0, 0.1).losses.sum(),
    "reward_loss": lambda x: rf.reward_loss(x[:, 0], x[:, 1]).loss,
    "ranking_loss": lambda x: rf.ranking_loss(x, IDS).loss,
}
KERNELS = [name for name in OPERATIONS if name != "linear_loss"]  # under a transform it runs the reference


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", OPERATIONS)
def test_first_derivatives(name):
    function = OPERATIONS[name]
    x = X.clone().requires_grad_()
    value = function(x)
    value.backward()
    results = {
        "grad": grad(function)(X),
        "vjp": vjp(function, X)[1](torch.tensor(1.0))[0],
        "jacrev": jacrev(function)(X),
        "half of vjp": 2 * vjp(function, X)[1](torch.tensor(0.5))[0],
    }
    if name in KERNELS:
        results["vmap of grad"] = vmap(grad(function))(torch.stack([X * 2, X]))[1]
        two = vmap(function)(torch.stack([X * 2, X]))
        torch.testing.assert_close(two, torch.stack([function(X * 2), value.detach()]), rtol=1e-5, atol=1e-5)
    for transform, result in results.items():
        torch.testing.assert_close(result, x.grad, rtol=1e-5, atol=1e-5, msg=lambda text, t=transform: f"{t}: {text}")


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_gradient_where_the_user_wants_none(name):
    function = OPERATIONS[name]

    def constant(x):
        with torch.no_grad():
            return function(x)

    assert torch.equal(grad(lambda x: constant(x) + x.sum())(X), torch.ones(B, T))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", KERNELS)
def test_what_kernels_do_not_have_is_said(name):
    function = OPERATIONS[name]
    second = f"^{name.replace('sft', 'weighted')}(_backward)?: second derivatives are not available; the reference"
    with pytest.raises(RuntimeError, match=second):
        grad(lambda x: grad(function)(x).square().sum())(X)
    for call in (lambda: jvp(function, (X,), (X,)), lambda: hessian(function)(X)):
        with pytest.raises(NotImplementedError, match="forward-mode derivatives are not available; the reference"):
            call()


def test_the_reference_has_them():
    function = OPERATIONS["ppo_loss"]
    with backend("reference"):
        second = grad(lambda x: grad(function)(x).square().sum())(X)
    assert second.abs().sum() > 0


def test_a_frozen_head_has_no_second_derivative():
    """Its derivative by the hidden states is made in the forward pass, and is a constant to autograd."""
    x = HIDDEN.clone().requires_grad_()
    loss = rf.linear_token_logprobs(x, WEIGHT, IDS).logprobs.exp().sum()
    with pytest.raises(RuntimeError, match="^linear_token_logprobs: second derivatives are not available"):
        torch.autograd.grad(loss, x, create_graph=True)
