import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast import discounted_returns, gae, grpo_advantages, remax_returns, rloo_advantages, whiten
from tests.support.oracle import VALUE_TOLERANCE, error, poisoned, ragged_mask

DTYPES = list(VALUE_TOLERANCE)


def packed(x_BT: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    """The True places of each row as Python floats, i.e. float64."""
    return [row[keep].double().tolist() for row, keep in zip(x_BT, mask, strict=True)]


def unpacked(rows: list[list[float]], mask: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(mask.shape, dtype=torch.float64)
    out[mask] = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    return out


def gae_truth(rewards, values, mask, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} by its definition, over the row without its masked places."""
    rows = []
    for r, v in zip(packed(rewards, mask), packed(values, mask), strict=True):
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
        rows.append([sum((gamma * lam) ** (h - t) * delta[h] for h in range(t, len(r))) for t in range(len(r))])
    return unpacked(rows, mask)


class TestGAE:
    def test_hand_computed(self, kernels):
        """gamma = lam = 1/2, r = (1, 0, 2), V = (1/2, 1/4, 1):
        delta = (1 + 1/8 - 1/2, 1/2 - 1/4, 2 - 1) = (5/8, 1/4, 1), A = (3/4, 1/2, 1). The hole changes nothing."""
        nan = torch.nan
        rewards = torch.tensor([[nan, 1.0, nan, 0.0, 2.0, nan]])
        values = torch.tensor([[nan, 0.5, torch.inf, 0.25, 1.0, nan]])
        mask = torch.tensor([[False, True, False, True, True, False]])
        out = gae(rewards, values, mask, gamma=0.5, lam=0.5)
        assert out.advantages.tolist() == [[0, 0.75, 0, 0.5, 1.0, 0]]
        assert out.returns.tolist() == [[0, 1.25, 0, 0.75, 2.0, 0]]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 1), (5, 33), (17, 70)])
    def test_matches_float64(self, kernels, dtype, shape):
        if kernels == "triton":
            shape = min(shape[0], 5), shape[1]  # a row is a program, and programs are slow in the interpreter
        mask = ragged_mask(*shape)
        rewards, values = (torch.randn(shape).to(dtype) for _ in range(2))
        out = gae(poisoned(rewards, mask), poisoned(values, mask), mask, gamma=0.97, lam=0.9)
        truth = gae_truth(rewards, values, mask, 0.97, 0.9)
        assert error(out.advantages, truth) <= VALUE_TOLERANCE[dtype]
        assert error(out.returns, (truth + values.double()) * mask) <= VALUE_TOLERANCE[dtype]

    @given(gamma=st.floats(0, 1), holes=st.integers(0, 2**12 - 1))
    def test_lambda_one_is_return_minus_value(self, gamma, holes):
        mask = torch.tensor([[bool(holes >> t & 1) for t in range(12)]])
        rewards, values = torch.randn(1, 12, dtype=torch.float64), torch.randn(1, 12, dtype=torch.float64)
        out = gae(rewards, values, mask, gamma=gamma, lam=1.0)
        assert error(out.returns, discounted_returns(rewards, mask, gamma=gamma)) < 1e-12

    def test_is_a_constant(self, kernels):
        values = torch.randn(2, 3, requires_grad=True)
        assert not gae(torch.randn(2, 3), values, torch.ones(2, 3, dtype=torch.bool)).advantages.requires_grad

    def test_empty_and_strided(self, kernels):
        assert gae(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, 4, dtype=torch.bool)).returns.shape == (0, 4)
        assert gae(torch.empty(3, 0), torch.empty(3, 0), torch.empty(3, 0, dtype=torch.bool)).returns.shape == (3, 0)
        r, v, mask = torch.randn(7, 4).t(), torch.randn(4, 1).expand(4, 7), torch.rand(7, 4).t() < 0.7
        assert error(gae(r, v, mask).advantages, gae_truth(r, v, mask, 1.0, 0.95)) < 1e-5

    def test_permuted_rows_give_permuted_bits(self):
        r, v, order = torch.randn(11, 50), torch.randn(11, 50), torch.randperm(11)
        mask = ragged_mask(11, 50)
        assert torch.equal(gae(r, v, mask).advantages[order], gae(r[order], v[order], mask[order]).advantages)


class TestDiscountedReturns:
    def test_hand_computed(self, kernels):
        """gamma = 1/2, r = (1, 2, 4): 1 + 2/2 + 4/4 = 3, 2 + 4/2 = 4, 4."""
        mask = torch.tensor([[True, False, True, True]])
        returns = discounted_returns(torch.tensor([[1.0, torch.nan, 2.0, 4.0]]), mask, gamma=0.5)
        assert returns.tolist() == [[3, 0, 4, 4]]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matches_float64(self, kernels, dtype):
        mask = ragged_mask(6, 45)
        rewards = torch.randn(6, 45).to(dtype)
        rows = [
            [sum(0.9 ** (h - t) * r[h] for h in range(t, len(r))) for t in range(len(r))] for r in packed(rewards, mask)
        ]
        returns = discounted_returns(poisoned(rewards, mask), mask, gamma=0.9)
        assert error(returns, unpacked(rows, mask)) <= VALUE_TOLERANCE[dtype]


class TestWhiten:
    def test_hand_computed(self, kernels):
        """(1, 3, 5): mean 3, unbiased variance 4."""
        x, mask = torch.tensor([1.0, torch.nan, 3.0, 5.0]), torch.tensor([True, False, True, True])
        assert error(whiten(x, mask), torch.tensor([-1.0, 0.0, 0.0, 1.0])) < 1e-6
        assert error(whiten(x, mask, shift_mean=False), torch.tensor([2.0, 0.0, 3.0, 4.0])) < 1e-6

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shift_mean", [True, False])
    def test_matches_float64(self, kernels, dtype, shift_mean):
        mask = ragged_mask(6, 40)
        x = (torch.randn(6, 40) * 0.1 + 7).to(dtype)
        kept = x[mask].double()
        truth = torch.zeros(6, 40, dtype=torch.float64)
        truth[mask] = (kept - kept.mean()) / (kept.var() + 1e-8).sqrt() + (0 if shift_mean else kept.mean())
        assert error(whiten(poisoned(x, mask), mask, shift_mean=shift_mean), truth) <= 10 * VALUE_TOLERANCE[dtype]

    @pytest.mark.parametrize("count", [0, 1])
    def test_fewer_than_two(self, kernels, count):
        """The variance counts as 0; the value itself is the mean."""
        x, mask = torch.tensor([[4.0, torch.nan]]), torch.tensor([[count == 1, False]])
        assert whiten(x, mask).tolist() == [[0, 0]]
        assert whiten(x, mask, shift_mean=False).tolist() == [[4.0 * count, 0]]

    @given(scale=st.floats(0.5, 50), shift=st.floats(-50, 50))
    def test_affine_invariance(self, scale, shift):
        x, mask = torch.randn(5, 9, dtype=torch.float64), torch.rand(5, 9) < 0.8
        assert error(whiten(x * scale + shift, mask), whiten(x, mask)) < 1e-6


class TestReMax:
    """Row (1): score 3, greedy 1, two tokens with log-ratios (0.5, -1). Row (2): score 0, greedy 9, one token, 0.25."""

    scores, greedy = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 9.0])
    logprobs = torch.tensor([[-1.0, torch.nan, -3.0], [torch.inf, -0.5, torch.nan]])
    ref = torch.tensor([[-1.5, torch.nan, -2.0], [torch.nan, -0.75, torch.inf]])
    mask = torch.tensor([[True, False, True], [False, True, False]])

    def weights(self, **options):
        return remax_returns(self.scores, self.greedy, self.logprobs, self.ref, self.mask, kl_coef=0.1, **options)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (dict(), [[1.95, 0, 2.1], [0, -9.025, 0]]),
            (dict(gamma=0.5), [[0.25 * 2 - 0.05, 0, 0.5 * 2 + 0.1], [0, 0.5 * -9 - 0.025, 0]]),
            (dict(gamma=0.5, clip=1.0), [[0.25 - 0.05, 0, 0.5 + 0.1], [0, -0.5 - 0.025, 0]]),
            (dict(gamma=0.5, variant="paper"), [[1.95, 0, 2.1], [0, -9.025, 0]]),
            (dict(gamma=0.5, variant="verl"), [[2 - 0.1 * (0.5 - 1), 0, 2.1], [0, -9.025, 0]]),
            (dict(variant="verl", clip=5.0), [[2.05, 0, 2.1], [0, -5.025, 0]]),
        ],
    )
    def test_hand_computed(self, kernels, options, expected):
        assert error(self.weights(**options), torch.tensor(expected)) < 1e-6

    @pytest.mark.parametrize("variant", ["official", "paper", "verl"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matches_float64(self, kernels, variant, dtype):
        mask = ragged_mask(6, 41)
        s, g = torch.randn(6).to(dtype), torch.randn(6).to(dtype)
        a, b = (torch.randn(6, 41).to(dtype) for _ in range(2))
        rows = []
        for row, d in enumerate(packed(a.double() - b.double(), mask)):
            A, L = max(-0.8, min(0.8, s[row].double().item() - g[row].double().item())), len(d)
            rows.append(
                {
                    "official": [0.95 ** (L - t) * A - 0.2 * d[t] for t in range(L)],
                    "paper": [A - 0.2 * d[t] for t in range(L)],
                    "verl": [A - 0.2 * sum(d[t:]) for t in range(L)],
                }[variant]
            )
        weights = remax_returns(
            s, g, poisoned(a, mask), poisoned(b, mask), mask, kl_coef=0.2, gamma=0.95, clip=0.8, variant=variant
        )
        assert error(weights, unpacked(rows, mask)) <= VALUE_TOLERANCE[dtype]


class TestGroups:
    def test_hand_computed(self, kernels):
        """(1, 2, 6): means of the others 4, 3.5, 1.5; mean 3, unbiased variance 7."""
        scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
        assert error(rloo_advantages(scores, 3), torch.tensor([-3.0, -1.5, 4.5, 0, 0, 0])) < 1e-6
        truth = torch.tensor([-2.0, -1.0, 3.0, 0, 0, 0]) / (7**0.5 + 1e-4)
        assert error(grpo_advantages(scores, 3), truth) < 1e-6

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("k", [2, 5])
    def test_matches_float64(self, kernels, dtype, k):
        scores = (torch.randn(4 * k) + 30).to(dtype)
        groups = scores.double().view(4, k)
        others = torch.stack([groups[:, [j for j in range(k) if j != i]].mean(1) for i in range(k)], 1)
        assert error(rloo_advantages(scores, k), (groups - others).flatten()) <= VALUE_TOLERANCE[dtype]
        truth = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        assert error(grpo_advantages(scores, k), truth.flatten()) <= 10 * VALUE_TOLERANCE[dtype]

    @given(k=st.integers(2, 9))
    def test_each_group_sums_to_zero(self, k):
        scores = torch.randn(3 * k, dtype=torch.float64)
        for advantages in (rloo_advantages(scores, k), grpo_advantages(scores, k)):
            assert advantages.view(3, k).sum(1).abs().max() < 1e-12

    def test_empty_and_strided(self, kernels):
        scores = torch.randn(8)[::2]
        for op in (rloo_advantages, grpo_advantages):
            assert op(torch.empty(0), 4).shape == (0,)
            assert torch.equal(op(scores, 2), op(scores.contiguous(), 2))


x, mask, s = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gae(x, x[:1], mask), r"values: expected shape \[2, 3\] as rewards, got \[1, 3\]"),
        (lambda: gae(x[0], x[0], mask[0]), r"rewards: expected shape \[B, T\], got \[3\]"),
        (lambda: gae(x, x, mask, gamma=1.1), r"gamma: expected a number in \[0, 1\], got 1.1"),
        (lambda: gae(x, x, mask, lam=-0.1), r"lam: expected a number in \[0, 1\], got -0.1"),
        (lambda: gae(x, x, mask.float()), "mask: expected a bool tensor .* got torch.float32"),
        (lambda: gae(x, x.long(), mask), "values: expected dtype .* got torch.int64"),
        (lambda: discounted_returns(x, mask[:, :2]), r"mask: expected shape \[2, 3\] as rewards, got \[2, 2\]"),
        (lambda: discounted_returns(x, mask, gamma=2), r"gamma: expected a number in \[0, 1\], got 2"),
        (lambda: discounted_returns(s, mask[0, :2]), r"rewards: expected shape \[B, T\], got \[2\]"),
        (lambda: whiten(x, mask.to("meta")), "mask: expected device cpu as x, got meta"),
        (lambda: whiten(x.int(), mask), "x: expected dtype .* got torch.int32"),
        (lambda: whiten(x, None), "mask: expected a bool tensor .* got NoneType"),
        (
            lambda: remax_returns(s, s, x, x, mask, kl_coef=0.1, variant="v4"),
            "variant: expected one of official, paper",
        ),
        (lambda: remax_returns(s, x[0], x, x, mask, kl_coef=0.1), r"greedy_scores: expected shape \[2\], .* \[3\]"),
        (
            lambda: remax_returns(s, s, x, x, mask, kl_coef=0.1, clip=-1.0),
            "clip: expected a number > 0 or None, got -1",
        ),
        (lambda: remax_returns(s, s, x, x, mask, kl_coef=0.1, gamma=1.5), r"gamma: expected a number in \[0, 1\]"),
        (lambda: rloo_advantages(s, 1), "group_size: expected at least 2 answers per prompt, got 1"),
        (
            lambda: grpo_advantages(torch.zeros(7), 2),
            "group_size: expected a divisor of the number of scores, 7, got 2",
        ),
        (lambda: rloo_advantages(x, 3), r"scores: expected shape \[B\], got \[2, 3\]"),
        (lambda: grpo_advantages(s.long(), 2), "scores: expected dtype .* got torch.int64"),
    ],
)
def test_errors(kernels, call, message):
    with pytest.raises(ValueError, match=message):
        call()
