"""What every operator owes torch: a true schema, fake kernels, autograd, one compilation for all lengths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import rlhf_fast
import rlhf_fast.ops
import rlhf_fast.ops.attention
import rlhf_fast.ops.layers

B, T, V = 3, 5, 11


def mask(*shape):
    return torch.arange(torch.Size(shape).numel()).view(shape) % 4 > 0


def samples():
    """Arguments of every operator of the namespace: plain, and with everything optional."""
    f, g, h = (torch.randn(B, T) for _ in range(3))
    b = torch.randn(B)
    logits, ids = torch.randn(B, T, V), torch.randint(V, (B, T))
    forward = torch.ops.rlhf_fast.token_logprobs(logits, ids, 1.0, 0.0, False)
    ref_logits = torch.randn(B, T, V)
    *kl_forward, _, _, stats = torch.ops.rlhf_fast.token_kl(logits, ref_logits, ids, 1.0, 0.0, False)
    kl_kept = *kl_forward, stats
    x, w, c = torch.randn(B, T, 6), torch.randn(V, 6), torch.randn(V)  # of the linear family
    leaf = lambda x: x.clone().requires_grad_()  # noqa: E731
    q, k, slots = torch.randn(4, 5, 6), torch.randn(2, 5, 6), torch.tensor([0, 1, 2, 4, 5])  # rows of three and two
    attention = torch.ops.rlhf_fast.packed_attention(q, k, k.cos(), slots, None, None, 4, 0.5)
    turn = torch.rand(5, 6)  # stands for cosines and for sines
    total, scales, weight = x[0], x[0, :, 0].abs() + 1, w[0]
    n = torch.tensor(7.0)
    clip, sapo = ("clip", False, 0.2, 0.3, 2.0, 1.0, 1.0), ("sapo", True, 0.0, 0.0, 0.0, 1.0, 1.05)
    return {
        "token_logprobs": [
            (leaf(logits), ids, 1.0, 0.0, False),
            (leaf(logits.bfloat16()), ids, 0.7, 3.0, False),
            (leaf(logits.transpose(0, 1)), ids.t(), 1.0, 0.0, False),
        ],
        "token_logprobs_backward": [
            (logits, ids, *forward, f, g, 1.0, 0.0),
            (logits.transpose(0, 1), ids.t(), *(x.transpose(0, 1) for x in forward), None, g.t(), 1.0, 0.0),
        ],
        "token_logprobs_backward_": [(logits.clone(), ids, *forward, f, None, 1.0, 0.0)],
        "token_kl": [
            (leaf(logits), ref_logits, ids, 1.0, 0.0, False),
            (leaf(logits.bfloat16()), ref_logits.bfloat16(), ids, 0.7, 3.0, False),
            (leaf(logits.transpose(0, 1)), ref_logits.transpose(0, 1), ids.t(), 1.0, 0.0, False),
        ],
        "token_kl_backward": [
            (logits, ref_logits, ids, *kl_kept, f, g, h, 1.0, 0.0),
            (logits, ref_logits, ids, *kl_kept, None, None, g, 0.7, 3.0),
        ],
        "token_kl_backward_": [(logits.clone(), ref_logits, ids, *kl_kept, f, None, h, 1.0, 0.0)],
        "linear_token_kl": [
            (leaf(x), leaf(w), leaf(c), x[..., :4].cos(), w[:, :4].sin(), c.cos(), ids, 0.7, 3.0, 1 << 20),
            (leaf(x.bfloat16()), w.bfloat16(), None, x.cos(), w, None, ids, 1.0, 0.0, 1 << 20),
        ],
        "linear_token_kl_backward": [
            (x, w, c, x[..., :4].cos(), w[:, :4].sin(), None, ids, f, None, h, 1.0, 0.0, 1 << 20, True, True, False)
        ],
        "linear_token_logprobs": [
            (leaf(x), leaf(w), leaf(c), ids, 0.7, 3.0, 1 << 20, False),
            (leaf(x.bfloat16()), w.bfloat16(), None, ids, 1.0, 0.0, 1 << 20, True),
        ],
        "linear_token_logprobs_backward": [(x, w, c, ids, f, None, 1.0, 0.0, 1 << 20, True, True, False)],
        "linear_weighted_loss": [(leaf(x), leaf(w), leaf(c), ids, f.double(), 0.7, 3.0, 1 << 20, True, True, True)],
        "linear_ppo_loss": [
            (leaf(x), leaf(w), None, ids, g, b, mask(B, T), h, n, *clip, 0.1, "k1", False, 0.1, "constant", 1.0, 0.0,
             1 << 20, True, True, False),
            (leaf(x), leaf(w), None, ids, g, b, mask(B, T), None, None, "cispo", True, 0.0, 5.0, 0.0, 1.0, 1.0, 0.0,
             "k1", False, 0.0, "token_mean", 1.0, 0.0, 1 << 20, True, True, False),
        ],
        "linear_dpo_loss": [
            (leaf(x), leaf(w), None, torch.randint(V, (4, T)), b[:2], b[1:], None, None, n, None, ["sigmoid", "sft"],
             [1.0, 0.5], 0.1, 0.0, 0.5, 1.0, 0.0, 1 << 20, True, True, False)
            for x in [torch.randn(4, T, 6)]
        ],
        "linear_kto_loss": [
            (leaf(x), leaf(w), leaf(c), ids, b, b > 0, n, None, 0.1, "kto", 1.0, 2.0, 0.7, 3.0, 1 << 20, *[True] * 3),
            (leaf(x), w, None, ids, b, b > 0, n, n, 0.1, "apo_zero_unpaired", 1.0, 1.0, 1.0, 0.0, 1 << 20, True, False,
             False),
        ],
        "sample_tokens": [
            (torch.randn(B, V), torch.rand(B, dtype=torch.float64), None, 1.0),
            (torch.randn(V, B).t(), torch.rand(B, dtype=torch.float64), mask(B), 0.5),
        ],
        "packed_attention": [
            (leaf(q), leaf(k), leaf(k), slots, None, None, 4, 0.5),
            (leaf(q), leaf(k), leaf(k), slots, turn, turn.cos(), 4, 0.5),
            (leaf(q.bfloat16()), k.bfloat16(), k.mT.contiguous().mT.bfloat16(), slots, None, None, 4, 1.0),
        ],
        "packed_attention_backward": [
            (q, k, k.cos(), slots, *tables, *attention, q.transpose(0, 1), 4, 0.5)
            for tables in [(None, None), (turn, turn.cos())]
        ],
        "add_rms_norm": [
            (leaf(x), leaf(x.cos()), leaf(weight), 1e-6),
            (leaf(x.bfloat16()), None, leaf(weight.bfloat16()), 1e-6),
            (leaf(x.transpose(0, 1)), None, weight, 1e-6),
        ],
        "add_rms_norm_backward": [
            (total, weight, scales, total.cos(), total.sin(), True),
            (total, weight, scales, total.cos(), None, False),
        ],
        "swiglu": [(leaf(x), leaf(x.cos())), (x.bfloat16().transpose(0, 1), x.cos().bfloat16().transpose(0, 1))],
        "swiglu_backward": [(x, x.cos(), x.sin())],
        "kl_penalty": [(leaf(f), g, "k3", True), (f.t(), g.t(), "k1", False)],
        "shape_rewards": [(b, f, g, mask(B, T), 0.1, "k1", 5.0)],
        "gae": [(f, g, mask(B, T), None, 1.0, 0.95), (f, g, mask(B, T), b.sigmoid(), 1.0, 0.0)],
        "discounted_returns": [(f, mask(B, T), 0.9)],
        "whiten": [(f, mask(B, T), True)],
        "remax_returns": [(b, b.flip(0), f, g, mask(B, T), 0.1, 0.99, 5.0, "official")],
        "rloo_advantages": [(torch.randn(6), 2)],
        "grpo_advantages": [(torch.randn(6), 3)],
        "ppo_loss": [
            (leaf(f), g, h, mask(B, T), None, None, None, *clip, 0.0, "k3", False, 0.0, "token_mean", True, False),
            (leaf(f), g, b, mask(B, T), h, leaf(g), n, *clip, 0.1, "k1", True, 0.1, "constant", True, True),
            (f.t(), h.t(), h.t(), mask(T, B), *[None] * 3, *clip, 0.0, "k3", False, 0.0, "token_mean", False, False),
            (leaf(f), g, h, mask(B, T), h, None, None, *sapo, 0.1, "k2", False, 0.0, "sequence_mean", True, False),
        ],
        "ppo_value_loss": [(leaf(f), g, h, mask(B, T), n, 0.2, True), (f, g, h, mask(B, T), None, 0.2, False)],
        "reinforce_loss": [(leaf(f), b, mask(B, T), None, "sequence_sum", True)],
        "reward_loss": [(leaf(b), leaf(b), None, 0.0, True), (leaf(b), b, b, 0.1, True), (b, b, None, 0.0, False)],
        "ranking_loss": [(leaf(f), torch.randint(-1, 3, (B, T)), True)],
        "kto_loss": [
            (leaf(b), b.flip(0), b > 0, n, 0.1, "kto", 1.0, 2.0, True),
            (b, b.flip(0), b > 0, n, 0.1, "apo_zero_unpaired", 1.0, 1.0, False),
        ],
        "dpo_loss": [
            (leaf(b), leaf(b), b, b, None, None, 0.1, "sigmoid", 0.0, 0.5, True),
            (leaf(b), leaf(b), None, None, b.exp(), b.exp(), 0.1, "ipo", 0.0, 0.5, True),
        ],
    }  # fmt: skip


SAVED_GRADIENTS = [
    "kl_penalty", "ppo_loss", "ppo_value_loss", "reinforce_loss", "reward_loss", "ranking_loss", "dpo_loss",
    "kto_loss", "linear_sft_loss", "linear_reinforce_loss", "linear_ppo_loss", "linear_dpo_loss", "linear_kto_loss",
]  # fmt: skip


def test_every_operator_has_samples():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("rlhf_fast::")}
    assert names == set(samples())


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name):
    for arguments in samples()[name]:
        opcheck(getattr(torch.ops.rlhf_fast, name).default, arguments)


def public_calls():
    """Every public function on rows of a given length, with the tensors that get gradients first."""
    ops = rlhf_fast.ops
    n = torch.tensor(9.0)
    w = torch.linspace(-1, 1, V * 3).view(V, 3)
    head = lambda x: torch.stack([x, x.sin(), x.cos()], -1)  # noqa: E731
    return {
        "token_logprobs": lambda x: ops.token_logprobs(x[..., None] * torch.linspace(-1, 1, V), (x > 0).long()),
        "inplace_backward": lambda x: ops.token_logprobs(
            x[..., None] * torch.linspace(-1, 1, V), (x > 0).long(), temperature=0.5, inplace_backward=True
        ),
        "token_kl": lambda x: ops.token_kl(
            *(x[..., None] * torch.linspace(-1, end, V) for end in (1, 2)), (x > 0).long(), inplace_backward=True
        ),
        "linear_token_kl": lambda x: ops.linear_token_kl(head(x), w, head(x.cos()), w.sin(), (x > 0).long()),
        "linear_token_logprobs": lambda x: ops.linear_token_logprobs(head(x), w, (x > 0).long(), bias=w[:, 0]),
        "linear_sft_loss": lambda x: (ops.linear_sft_loss(head(x), w, (x > 0).long()).loss,),
        "linear_reinforce_loss": lambda x: (
            ops.linear_reinforce_loss(head(x), w, (x > 0).long(), x.detach()[:, 0], x > -1).loss,
        ),
        "linear_ppo_loss": lambda x: (
            ops.linear_ppo_loss(
                head(x), w, (x > 0).long(), x.detach(), x.detach().cos(), x > -1, normalizer=n, entropy_coef=0.1
            ).loss,
        ),
        "linear_dpo_loss": lambda x: (
            ops.linear_dpo_loss(head(x), w, (x > 0).long(), *x.detach()[:, 0].chunk(2)).loss,
        ),
        "linear_kto_loss": lambda x: (
            ops.linear_kto_loss(
                head(x), w, (x > 0).long(), x.detach()[:, 0], x[:, 0] > 0, n, undesirable_weight=2.0
            ).loss,
        ),
        "kl_penalty": lambda x: (ops.kl_penalty(x, x.sin(), "k3"),),
        "shape_rewards": lambda x: (x * ops.shape_rewards(x[:, 0], x, x.cos(), x > 0, kl_coef=0.1),),
        "gae": lambda x: (x * ops.gae(x, x.cos(), x > 0).advantages,),
        "discounted_returns": lambda x: (x * ops.discounted_returns(x, x > 0),),
        "whiten": lambda x: (x * ops.whiten(x, x > 0),),
        "remax_returns": lambda x: (x * ops.remax_returns(x[:, 0], x[:, 1], x, x.cos(), x > 0, kl_coef=0.1),),
        "groups": lambda x: (x.t() * ops.rloo_advantages(x[:, 0], 2) + ops.grpo_advantages(x[:, 1], 2),),
        "ppo_loss": lambda x: ops.ppo_loss(x, x.detach().sin(), x.detach().cos(), x > -1, normalizer=n),
        "ppo_value_loss": lambda x: ops.ppo_value_loss(x, x.detach().sin(), x.detach().cos(), x > -1),
        "reinforce_loss": lambda x: (ops.reinforce_loss(x, x.detach()[:, 0], x > -1, normalizer=7.0),),
        "reward_loss": lambda x: ops.reward_loss(x[0], x[1], center_coef=0.1),
        "ranking_loss": lambda x: ops.ranking_loss(x, torch.arange(x.shape[1]).expand_as(x)),
        "dpo_loss": lambda x: ops.dpo_loss(x[0], x[1], x[2], x[3]),
        "kto_loss": lambda x: ops.kto_loss(x[0], x.detach()[1], x[2] > 0, n, undesirable_weight=2.0),
    }


@pytest.mark.parametrize("name", list(public_calls()))
def test_one_compilation_serves_all_lengths(name):
    """fullgraph, with dynamic lengths: values and gradients are eager's, and new lengths compile nothing."""
    torch._dynamo.reset()
    call, counter = public_calls()[name], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length in (7, 12, 9):
        x = torch.randn(4, length)
        results = []
        for function in (call, compiled):
            y = x.clone().requires_grad_()
            torch._dynamo.mark_dynamic(y, 1)
            out = [z for z in function(y) if z.requires_grad]
            sum(z.sum() for z in out).backward()
            results.append([*out, y.grad])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", list(public_calls()))
def test_autocast_changes_nothing(kernels, name):
    call, x = public_calls()[name], torch.randn(4, 9, requires_grad=True)
    plain = call(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = call(x)
    assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.float32 for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.7}])
def test_sampling_compiles(options):
    """Draws are made by torch.rand in the graph: the same generator state gives the same tokens."""
    torch._dynamo.reset()
    compiled = torch.compile(rlhf_fast.ops.sample_tokens, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 8):
        logits = torch.randn(n, V)
        draws = []
        for function in (rlhf_fast.ops.sample_tokens, compiled):
            torch.manual_seed(4)
            draws.append(function(logits, temperature=0.9, **options).tokens)
        assert torch.equal(*draws)


def test_the_normalizer_is_data():
    """A denominator that changes each step does not recompile, as a tensor nor as a float."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x, rows = torch.randn(4, 6, requires_grad=True), torch.randn(4)

    def loss(x, n):
        return rlhf_fast.ops.reinforce_loss(x, rows, x > -1, normalizer=n)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for n in (3.0, 17.0, 250.5):
        torch.testing.assert_close(compiled(x, torch.tensor(n)), loss(x, n))
    assert counter.frame_count == 1
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for n in (3.0, 17.0, 250.5):
        torch.testing.assert_close(compiled(x, n), loss(x, n))
    assert counter.frame_count == 2


def test_inductor():
    """The default compiler, on a PPO step from logits to gradient, through the lazy names of the package."""
    torch._dynamo.reset()
    ids, old, advantages = torch.randint(V, (B, T)), torch.randn(B, T) - 2, torch.randn(B)

    def step(logits):
        out = rlhf_fast.token_logprobs(logits * 2, ids, temperature=0.8, inplace_backward=True)
        kept = ids > 1
        loss = rlhf_fast.ppo_loss(out.logprobs, old, advantages, kept, entropy=out.entropy, entropy_coef=0.01)
        return loss.loss, loss.clip_fraction

    results = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=True)):
        torch.manual_seed(1)
        logits = torch.randn(B, T, V, requires_grad=True)
        loss, clip_fraction = function(logits)
        loss.backward()
        results.append((loss.detach(), clip_fraction, logits.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_thread_count_changes_no_bit():
    x = torch.randn(8, 40_001)  # enough for several threads to be used
    ops, generator = rlhf_fast.ops, torch.Generator()
    own = {name: call for name, call in public_calls().items() if not name.startswith("linear")}  # not torch's matmul
    calls = own | {
        "sample_tokens": lambda y: ops.sample_tokens(y.detach(), temperature=1.0, generator=generator.manual_seed(0)),
        "ranking_loss": lambda y: ops.ranking_loss(y.view(-1, 4), torch.arange(4).expand(y.numel() // 4, 4)),
        "reward_loss": lambda y: ops.reward_loss(*y.view(2, -1)),
        "dpo_loss": lambda y: ops.dpo_loss(*y.view(4, -1)),
        "groups": lambda y: (ops.rloo_advantages(y.flatten(), 4), ops.grpo_advantages(y.flatten(), 4)),
    }
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([])
            for call in calls.values():
                y = x.clone().requires_grad_()
                out = [z for z in call(y) if z is not None]  # `kept` of a sample from all tokens
                differentiable = [z for z in out if z.requires_grad]
                if differentiable:
                    sum(z.sum() for z in differentiable).backward()
                results[-1] += [*out, y.grad if differentiable else x]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", SAVED_GRADIENTS)
def test_second_derivative_through_a_saved_gradient_is_refused(name):
    """Not even where the rest of the graph has one: what went through the loss would be missing from it."""
    x = torch.randn(4, 6, requires_grad=True)
    loss = public_calls()[name](x**2)[0].sum()
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("name", ["token_logprobs", "linear_sft_loss", "ppo_loss", "dpo_loss"])
def test_forward_mode_is_refused(name):
    """Autograd has no way of asking the operators for it, and would answer 0."""
    x = torch.randn(4, 6)
    with pytest.raises(NotImplementedError, match="forward-mode derivatives are not available"):
        torch.func.jvp(lambda x: public_calls()[name](x)[0], (x,), (x.cos(),))


def test_graphs_name_their_operators():
    x = torch.randn(4, 6, requires_grad=True)
    assert rlhf_fast.kl_penalty(x, x.detach()).grad_fn.name() == "rlhf_fast_kl_penaltyBackward"
    assert "rlhf_fast_reinforce_lossBackward" in repr(rlhf_fast.reinforce_loss(x, x.detach(), x > 0))


def test_fake_and_meta_tensors():
    """Shapes without numbers, as planners and exporters use them."""
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            x, mask = torch.empty(4, 6, requires_grad=True), torch.ones(4, 6, dtype=torch.bool)
            hidden, weight = torch.empty(4, 6, 3, requires_grad=True), torch.empty(V, 3, requires_grad=True)
            ids = torch.zeros(4, 6, dtype=torch.int64)
            losses = (
                rlhf_fast.ppo_loss(x, x.detach(), x[:, 0].detach(), mask),
                rlhf_fast.linear_sft_loss(hidden, weight, ids),
            )
            sum(out.loss for out in losses).backward()
            assert x.grad.shape == x.shape and hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("old_logprobs", lambda x, mask: rlhf_fast.ppo_loss(x, None, x[:, 0], mask)),
        ("old_values", lambda x, mask: rlhf_fast.ppo_value_loss(x, None, x, mask)),
        ("values", lambda x, mask: rlhf_fast.gae(x, None, mask)),
        ("ref_logprobs", lambda x, mask: rlhf_fast.kl_penalty(x, None)),
        ("rejected_scores", lambda x, mask: rlhf_fast.reward_loss(x[:, 0], None)),
        ("rejected_logps", lambda x, mask: rlhf_fast.dpo_loss(x[:, 0], None, x[:, 0], x[:, 0])),
    ],
)
def test_a_tensor_left_out(name, arguments):
    with pytest.raises(ValueError, match=f"{name}: expected a tensor, got NoneType"):
        arguments(torch.randn(4, 6), mask(4, 6))


def test_normalizer():
    x, A, counts = torch.randn(4, 6), torch.randn(4), mask(4, 6)
    loss = lambda n: rlhf_fast.ppo_loss(x, x.cos(), A, counts, normalizer=n).loss  # noqa: E731
    with torch.device("meta"):  # where new tensors go is no matter of a number
        five = loss(5.0)
    assert five.device.type == "cpu" and five == loss(torch.tensor(5.0))
    assert rlhf_fast.ppo_loss(x, x, A, counts & False, normalizer=torch.tensor(0.0)).loss == 0
    for wrong in (-1.0, 0.0, torch.tensor(-1.0), torch.tensor(torch.nan)):
        with pytest.raises(ValueError, match="normalizer: expected a finite number"):
            loss(wrong)
