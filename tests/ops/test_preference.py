import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast import dpo_loss, ranking_loss, reward_loss
from tests.support.oracle import GRADIENT_TOLERANCE, VALUE_TOLERANCE, error

DTYPES = list(VALUE_TOLERANCE)


def S(x: float) -> float:
    """log sigmoid"""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(S(x))


class TestRewardLoss:
    def test_hand_computed(self, kernels):
        """Differences 1, 0, -2: one win, one tie, one loss."""
        chosen = torch.tensor([1.0, 0.5, -1.0], requires_grad=True)
        rejected = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
        out = reward_loss(chosen, rejected)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(-(S(1) + S(0) + S(-2)) / 3, abs=1e-6)
        assert out.accuracy.item() == 0.5
        assert out.margin.item() == pytest.approx(-1 / 3, abs=1e-6)
        slope = -torch.tensor([sigmoid(-1), 0.5, sigmoid(2)]) / 3
        assert error(chosen.grad, slope) < 1e-6 and error(rejected.grad, -slope) < 1e-6

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("margin", [False, True])
    def test_matches_float64(self, kernels, dtype, margin):
        chosen, rejected, m = (torch.randn(37).mul(3).to(dtype) for _ in range(3))
        c, r = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
        out = reward_loss(c, r, margin=m if margin else None, center_coef=0.01)
        out.loss.backward()
        c64, r64 = chosen.double(), rejected.double()
        h = c64 - r64 - (m.double() if margin else 0)
        bt = torch.log1p(torch.exp(-h)).mean()
        assert error(out.bt_loss, bt) <= VALUE_TOLERANCE[dtype]
        assert error(out.loss, bt + 0.01 * ((c64 + r64) ** 2).mean()) <= VALUE_TOLERANCE[dtype]
        assert error(out.margin, (c64 - r64).mean()) <= VALUE_TOLERANCE[dtype]
        centre = 0.02 * (c64 + r64) / 37
        assert error(c.grad, centre - torch.sigmoid(-h) / 37) <= GRADIENT_TOLERANCE[dtype]
        assert error(r.grad, centre + torch.sigmoid(-h) / 37) <= GRADIENT_TOLERANCE[dtype]

    def test_gradcheck(self, kernels):
        c, r = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(lambda c, r: reward_loss(c, r, center_coef=0.1).loss, (c, r))

    def test_huge_scores(self, kernels):
        c = torch.tensor([1e4, -1e4], requires_grad=True)
        out = reward_loss(c, -c.detach())
        out.loss.backward()
        assert out.loss.item() == 1e4 and c.grad.tolist() == [0, -0.5]

    @given(shift=st.integers(-1000, 1000))
    def test_shift_invariance(self, shift):
        c, r = torch.randint(-64, 64, (2, 9)).div(8).unbind()
        assert torch.equal(reward_loss(c + shift, r + shift).loss, reward_loss(c, r).loss)

    def test_empty(self, kernels):
        c = torch.empty(0, requires_grad=True)
        out = reward_loss(c, torch.empty(0))
        out.loss.backward()
        assert out.loss.item() == out.accuracy.item() == 0 and c.grad.shape == (0,)


class TestRankingLoss:
    def test_hand_computed(self, kernels):
        """Scores 2, 1, 0 in this order: differences 1, 2, 1. The second row has one pair, scored wrongly: -3."""
        scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 3.0]], requires_grad=True)
        out = ranking_loss(scores, torch.tensor([[0, 1, 2], [4, 7, -1]]))
        out.loss.backward()
        assert out.loss.item() == pytest.approx(-(2 * S(1) + S(2) + S(-3)) / 4, abs=1e-6)
        assert out.accuracy.item() == 0.75
        a, b, c = sigmoid(-1), sigmoid(-2), sigmoid(3)
        assert error(scores.grad, torch.tensor([[-a - b, a - a, b + a], [-c, c, 0]]) / 4) < 1e-6

    def test_ties_and_absent_answers(self, kernels):
        """Equal ranks make no pair; a tie of scores is half right; what an absent answer scores has no effect."""
        scores = torch.tensor([[1.0, 1.0, torch.nan]], requires_grad=True)
        assert ranking_loss(scores, torch.tensor([[3, 3, -1]])).loss.item() == 0
        out = ranking_loss(scores, torch.tensor([[0, 1, -2]]))
        out.loss.backward()
        assert out.loss.item() == pytest.approx(math.log(2)) and out.accuracy.item() == 0.5
        assert scores.grad.tolist() == [[-0.5, 0.5, 0.0]]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matches_float64(self, kernels, dtype):
        B, K = 6, 5
        scores, ranks = torch.randn(B, K).mul(3).to(dtype), torch.randint(-1, 4, (B, K))
        x = scores.clone().requires_grad_()
        out = ranking_loss(x, ranks.int())
        out.loss.backward()
        s = scores.double().requires_grad_()
        pairs = [
            s[b, i] - s[b, j]
            for b in range(B) for i in range(K) for j in range(K)
            if 0 <= ranks[b, i] < ranks[b, j]
        ]  # fmt: skip
        truth = torch.log1p(torch.exp(-torch.stack(pairs))).mean()
        truth.backward()
        assert error(out.loss, truth.detach()) <= VALUE_TOLERANCE[dtype]
        assert error(x.grad, s.grad) <= GRADIENT_TOLERANCE[dtype]

    def test_two_answers_are_a_pair(self, kernels):
        c, r = torch.randn(9), torch.randn(9)
        out = ranking_loss(torch.stack([c, r], 1), torch.tensor([[0, 1]]).expand(9, 2))
        pair = reward_loss(c, r)
        assert error(out.loss, pair.loss) < 1e-6 and error(out.accuracy, pair.accuracy) < 1e-6

    def test_gradcheck(self, kernels):
        scores, ranks = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randint(-1, 3, (3, 4))
        assert torch.autograd.gradcheck(lambda s: ranking_loss(s, ranks).loss, scores)

    def test_empty(self, kernels):
        assert ranking_loss(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.int64)).loss.item() == 0


def closed_form(loss_type: str, c: float, r: float, beta: float, e: float, lengths: tuple[int, int]) -> float:
    """The papers' formulas, in Python floats."""
    if loss_type in ("ipo_averaged", "sigmoid_norm"):
        c, r = c / lengths[0], r / lengths[1]
    h, a, b = beta * (c - r), beta * c, beta * r
    q = sigmoid(h)
    m = sigmoid(h / 0.05)
    return {
        "sigmoid": lambda: -(1 - e) * S(h) - e * S(-h),
        "sigmoid_norm": lambda: -S(h),
        "robust": lambda: (-(1 - e) * S(h) + e * S(-h)) / (1 - 2 * e),
        "hinge": lambda: max(0.0, 1 - h),
        "ipo": lambda: (c - r - 1 / (2 * beta)) ** 2,
        "ipo_averaged": lambda: (c - r - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e),
        "nca_pair": lambda: -S(a) - 0.5 * S(-a) - 0.5 * S(-b),
        "apo_zero": lambda: (1 - sigmoid(a)) + sigmoid(b),
        "apo_down": lambda: sigmoid(a) + (1 - sigmoid(h)),
        "sppo_hard": lambda: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "discopop": lambda: -(1 - m) * S(h) + m * math.exp(-h),
    }[loss_type]()


VARIANTS = [
    ("sigmoid", 0.0),
    ("sigmoid", 0.1),
    ("robust", 0.1),
    ("hinge", 0.0),
    ("ipo", 0.0),
    ("ipo_averaged", 0.0),
    ("exo_pair", 0.1),
    ("nca_pair", 0.0),
    ("apo_zero", 0.0),
    ("apo_down", 0.0),
    ("sigmoid_norm", 0.0),
    ("sppo_hard", 0.0),
    ("discopop", 0.0),
]


def variant(name: str, smoothing: float, lengths: torch.Tensor) -> dict:
    options = dict(loss_type=name.removesuffix("_averaged"), label_smoothing=smoothing)
    if name in ("ipo_averaged", "sigmoid_norm"):
        options |= dict(chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    return options


class TestDPO:
    @pytest.mark.parametrize(("policy", "loss"), [((-12.0, -10.0), 0.7981), ((-9.0, -10.0), 0.6444)])
    def test_paper_losses(self, kernels, policy, loss):
        """Reference log-probs (-11, -11), beta 0.1: logits -2 and 1."""
        policy, ref = torch.tensor(policy), torch.tensor([-11.0, -11.0])
        out = dpo_loss(policy[:1], policy[1:], ref[:1], ref[1:], beta=0.1)
        assert out.losses.item() == pytest.approx(loss, abs=1e-4)
        assert out.chosen_rewards.item() == pytest.approx(0.1 * (policy[0].item() + 11), abs=1e-6)
        assert out.rejected_rewards.item() == pytest.approx(0.1 * (policy[1].item() + 11), abs=1e-6)

    @pytest.mark.parametrize(("ratios", "weight"), [((2.0, 0.0), 0.4502), ((0.0, 4.0), 0.5987), ((20.0, 0.0), 0.1192)])
    def test_paper_gradient_weights(self, kernels, ratios, weight):
        """dL / d logp_w = -beta sigma(r_l - r_w): large where the pair is ranked wrongly."""
        chosen, rejected = (torch.tensor([x], requires_grad=True) for x in ratios)
        zero = torch.zeros(1)
        dpo_loss(chosen, rejected, zero, zero, beta=0.1).losses.sum().backward()
        assert chosen.grad.item() == pytest.approx(-0.1 * weight, abs=1e-5)
        assert rejected.grad.item() == pytest.approx(0.1 * weight, abs=1e-5)

    def test_optimum_recovers_the_reward(self, kernels):
        """At pi ~ pi_ref e^{r/beta} (DPO eq. 4) implicit rewards differ as rewards do: -log sigma(r_w - r_l)."""
        ref, reward = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 1.0, 2.0])
        optimum = ref * (reward / 0.5).exp() / 13.6363468363
        chosen, rejected = torch.tensor([2, 1, 2]), torch.tensor([0, 0, 1])
        losses = dpo_loss(
            optimum[chosen].log(), optimum[rejected].log(), ref[chosen].log(), ref[rejected].log(), beta=0.5
        ).losses
        assert error(losses, torch.tensor([-S(2), -S(1), -S(1)])) < 1e-6

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("name", "smoothing"), VARIANTS)
    def test_closed_forms(self, kernels, dtype, name, smoothing):
        pc, pr, rc, rr = (torch.randn(19).mul(2).sub(20).to(dtype) for _ in range(4))
        lengths = torch.randint(1, 9, (2, 19))
        out = dpo_loss(pc, pr, rc, rr, beta=0.3, **variant(name, smoothing, lengths))
        c, r = (pc.double() - rc.double()).tolist(), (pr.double() - rr.double()).tolist()
        truth = [
            closed_form(name, c[i], r[i], 0.3, smoothing, (lengths[0, i].item(), lengths[1, i].item()))
            for i in range(19)
        ]
        assert error(out.losses, torch.tensor(truth, dtype=torch.float64)) <= VALUE_TOLERANCE[dtype]
        assert error(out.chosen_rewards, 0.3 * torch.tensor(c, dtype=torch.float64)) <= VALUE_TOLERANCE[dtype]
        assert error(out.rejected_rewards, 0.3 * torch.tensor(r, dtype=torch.float64)) <= VALUE_TOLERANCE[dtype]

    @pytest.mark.parametrize(("name", "smoothing"), VARIANTS)
    def test_gradcheck(self, kernels, name, smoothing):
        c, r = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        ref = torch.randn(2, 5, dtype=torch.float64)
        options = variant(name, smoothing, torch.randint(1, 9, (2, 5)))
        assert torch.autograd.gradcheck(lambda c, r: dpo_loss(c, r, *ref, beta=0.5, **options).losses, (c, r))

    @pytest.mark.parametrize(("name", "smoothing"), VARIANTS)
    def test_kernel_gradient_matches_the_reference(self, kernels, name, smoothing):
        """In float32 against the closed form's central difference in float64."""
        c, r = torch.randn(7).requires_grad_(), torch.randn(7).requires_grad_()
        lengths, zero = torch.randint(1, 9, (2, 7)), torch.zeros(7)
        options = variant(name, smoothing, lengths)
        dpo_loss(c, r, zero, zero, beta=0.3, **options).losses.sum().backward()
        for i in range(7):

            def loss(dc=0.0, dr=0.0, i=i):
                pair = (lengths[0, i].item(), lengths[1, i].item())
                return closed_form(name, c[i].item() + dc, r[i].item() + dr, 0.3, smoothing, pair)

            step = 1e-6
            assert c.grad[i].item() == pytest.approx((loss(dc=step) - loss(dc=-step)) / 2 / step, abs=1e-5)
            assert r.grad[i].item() == pytest.approx((loss(dr=step) - loss(dr=-step)) / 2 / step, abs=1e-5)

    @pytest.mark.parametrize(("name", "smoothing"), VARIANTS)
    @pytest.mark.parametrize("log_ratio", [500.0, -500.0, 2000.0, -2000.0])
    def test_huge_log_ratios(self, kernels, name, smoothing, log_ratio):
        c = torch.tensor([log_ratio], requires_grad=True)
        zero = torch.zeros(1)
        options = variant(name, smoothing, torch.ones(2, 1))
        losses = dpo_loss(c, -c.detach(), zero, zero, beta=0.5, **options).losses
        losses.sum().backward()
        assert torch.isfinite(losses).all() and torch.isfinite(c.grad).all()

    def test_empty_answer(self, kernels):
        """A length of 0 divides as 1: the log-ratio of an empty answer is 0."""
        zero, lengths = torch.zeros(1), (torch.tensor([0]), torch.tensor([2]))
        options = dict(beta=1.0, loss_type="sigmoid_norm", chosen_lengths=lengths[0], rejected_lengths=lengths[1])
        assert dpo_loss(zero, zero - 4, zero, zero, **options).losses.item() == pytest.approx(-S(2), abs=1e-6)

    def test_reference_free(self, kernels):
        c, r, zero = torch.randn(4), torch.randn(4), torch.zeros(4)
        free = dpo_loss(c, r, None, None, reference_free=True)
        assert torch.equal(free.losses, dpo_loss(c, r, zero, zero).losses)
        assert torch.equal(free.losses, dpo_loss(c, r, c, r, reference_free=True).losses)

    def test_gradients_flow_to_the_policy_only(self, kernels):
        c, r, rc, rr = (torch.randn(4, requires_grad=True) for _ in range(4))
        out = dpo_loss(c, r, rc, rr)
        (out.losses * torch.arange(4.0)).sum().backward()
        assert c.grad[0] == 0 and torch.all(c.grad[1:] < 0) and torch.equal(r.grad, -c.grad)
        assert rc.grad is None and rr.grad is None
        assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad

    def test_empty_and_strided(self, kernels):
        empty = torch.empty(0, requires_grad=True)
        losses = dpo_loss(empty, empty, torch.empty(0), torch.empty(0)).losses
        losses.sum().backward()
        assert losses.shape == empty.grad.shape == (0,)
        both = torch.randn(10, 2)
        assert torch.equal(
            dpo_loss(*both.t(), *both.t().flip(1)).losses,
            dpo_loss(*both.t().contiguous(), *both.t().flip(1).contiguous()).losses,
        )


b, kb = torch.zeros(2), torch.zeros(2, 3)


def dpo(**arguments):
    names = dict(chosen_logps=b, rejected_logps=b, ref_chosen_logps=b, ref_rejected_logps=b)
    return lambda: dpo_loss(**(names | arguments))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reward_loss(b, b[:1]), r"rejected_scores: expected shape \[2\] as chosen_scores, got \[1\]"),
        (lambda: reward_loss(kb, kb), r"chosen_scores: expected shape \[B\], got \[2, 3\]"),
        (lambda: reward_loss(b, b, margin=b[:1]), r"margin: expected shape \[2\]"),
        (lambda: reward_loss(b, b, margin=0.5), "margin: expected a tensor, got float"),
        (lambda: reward_loss(b, b, center_coef=-1), "center_coef: expected a number >= 0, got -1"),
        (lambda: reward_loss(b.int(), b), "chosen_scores: expected dtype .* got torch.int32"),
        (lambda: ranking_loss(b, b.long()), r"scores: expected shape \[B, K\], got \[2\]"),
        (lambda: ranking_loss(kb, kb), "ranks: expected dtype int64 or int32, got torch.float32"),
        (lambda: ranking_loss(kb, kb[:1].long()), r"ranks: expected shape \[2, 3\] as scores, got \[1, 3\]"),
        (dpo(loss_type="kto"), "loss_type: expected one of sigmoid, .* got 'kto'"),
        (dpo(beta=0.0), "beta: expected a finite number > 0, got 0.0"),
        (dpo(label_smoothing=1.5), r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
        (dpo(label_smoothing=0.5, loss_type="robust"), r"label_smoothing: expected a number in \[0, 0.5\) for robust"),
        (dpo(loss_type="exo_pair"), r"label_smoothing: expected a number in \(0, 1\) for exo_pair .* got 0.0"),
        (dpo(label_smoothing=0.1, loss_type="hinge"), "label_smoothing: expected 0, as hinge has none, got 0.1"),
        (dpo(loss_type="sigmoid_norm"), "chosen_lengths: expected a tensor, as sigmoid_norm divides by it"),
        (dpo(loss_type="ipo", chosen_lengths=b), "chosen_lengths: expected both lengths or neither"),
        (dpo(loss_type="ipo", chosen_lengths=kb, rejected_lengths=b), r"chosen_lengths: expected shape \[2\]"),
        (
            dpo(loss_type="ipo", chosen_lengths=b > 0, rejected_lengths=b),
            "chosen_lengths: expected a tensor of numbers",
        ),
        (dpo(ref_chosen_logps=None), "ref_chosen_logps: expected a tensor, as reference_free is False, got None"),
        (dpo(ref_rejected_logps=b[:1]), r"ref_rejected_logps: expected shape \[2\] as chosen_logps, got \[1\]"),
        (dpo(rejected_logps=b.long()), "rejected_logps: expected dtype .* got torch.int64"),
        (lambda: dpo_loss(kb, kb, kb, kb), r"chosen_logps: expected shape \[B\], got \[2, 3\]"),
    ],
)
def test_errors(kernels, call, message):
    with pytest.raises(ValueError, match=message):
        call()
