import math

import pytest
import torch

from rlhf_fast import sample_tokens, token_logprobs
from rlhf_fast.ops import backend
from rlhf_fast.ops.truncation import kept_tokens, packed, unpacked
from tests.support.oracle import VALUE_TOLERANCE, error, token_truth

INF = math.inf


def uniform(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def seeded(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def test_inverse_cdf_by_hand(kernels):
    """p = (1/8, 0, 2/8, 5/8): steps at 1/8 and 3/8, the token is the first whose running sum exceeds u."""
    logits = torch.tensor([1.0, 0.0, 2.0, 5.0]).log().expand(6, 4)
    uniforms = uniform(0.0, 0.1249, 0.1251, 0.3749, 0.3751, math.nextafter(1, 0))
    out = sample_tokens(logits, temperature=1.0, uniforms=uniforms)
    assert out.tokens.tolist() == [0, 0, 2, 2, 3, 3]
    assert error(out.logprobs, torch.tensor([1, 1, 2, 2, 5, 5]).div(8).log()) < 1e-6


@pytest.mark.parametrize("dtype", list(VALUE_TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (3, 5000), (33, 257)])
def test_statistics_are_those_of_token_logprobs(kernels, dtype, shape):
    greedy, zero = torch.arange(shape[0]) % 3 == 1, torch.zeros(shape[0])
    for temperature, scale in ((0.7, 3.0), (0.003, 0.01)):
        logits = (torch.randn(shape) * scale + 0.3).to(dtype)
        out = sample_tokens(logits, temperature=temperature, greedy_mask=greedy)
        logprobs, entropy, _ = token_truth(logits, out.tokens, zero, zero, temperature=temperature)
        assert error(out.logprobs, logprobs) <= VALUE_TOLERANCE[dtype]
        assert error(out.entropy, entropy) <= VALUE_TOLERANCE[dtype]
        assert torch.equal(out.tokens[greedy], logits.argmax(-1)[greedy])


def test_frequencies(kernels):
    """Draws over 6 tokens: chi-squared with 5 degrees of freedom stays under its 1 - 1e-6 quantile, 35.9."""
    logits = torch.tensor([0.1, -0.5, 1.4, 0.3, -0.9, 0.8])
    n = 30_000 if kernels in ("reference", "cpu") or logits.is_cuda else 80  # an interpreted row takes 50 ms
    generator = seeded(1)
    tokens = sample_tokens(logits.expand(n, 6), temperature=1.3, generator=generator).tokens
    expected = n * torch.softmax(logits.double() / 1.3, -1)
    assert ((torch.bincount(tokens, minlength=6) - expected).square() / expected).sum().item() < 35.9


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_shares_of_evenly_spaced_numbers(kernels, scale):
    """Over n numbers (i + 1/2) / n a token is drawn n p times, to 1 at either end; over blocks of columns too."""
    logits, n = torch.randn(9001) * scale, 50
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = sample_tokens(logits.expand(n, -1), temperature=0.8, uniforms=uniforms).tokens
    assert torch.all(tokens.diff() >= 0)
    p = torch.softmax(logits.double() / 0.8, -1)
    assert (torch.bincount(tokens, minlength=9001) - n * p).abs().max() < 1
    cdf = p.cumsum(-1)
    assert torch.all(uniforms < cdf[tokens] + 1e-6) and torch.all(uniforms >= cdf[tokens] - p[tokens] - 1e-6)


def test_impossible_tokens_are_never_drawn(kernels):
    logits = torch.randn(3, 5000)
    logits[:, 1:-7] = -INF
    logits[:, -6:] = -INF
    out = sample_tokens(logits, temperature=1.0, uniforms=uniform(0.0, 0.5, math.nextafter(1, 0)))
    assert set(out.tokens.tolist()) <= {0, 4993}


def test_greedy_takes_the_first_maximum(kernels):
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [-INF, -INF, -INF, -5.0]])
    out = sample_tokens(logits, temperature=1.0, greedy_mask=torch.tensor([True, True]))
    assert out.tokens.tolist() == [1, 3]
    assert out.logprobs[1].item() == out.entropy[1].item() == 0


def test_every_number_draws_its_token(kernels):
    """u in the middle of a token's step, away from the rounding of the running sum."""
    p = torch.softmax((logits := torch.randn(12, 9001) * 2).double(), -1)
    tokens, rows = torch.multinomial(p, 1).squeeze(1), torch.arange(12)
    uniforms = p.cumsum(-1)[rows, tokens] - p[rows, tokens] / 2
    assert torch.equal(sample_tokens(logits, temperature=1.0, uniforms=uniforms).tokens, tokens)


def test_generator_decides(kernels):
    logits = torch.randn(20, 50)
    a, b = (sample_tokens(logits, temperature=1.0, generator=seeded(5)) for _ in range(2))
    c = sample_tokens(logits, temperature=1.0, generator=seeded(6))
    assert torch.equal(a.tokens, b.tokens) and not torch.equal(a.tokens, c.tokens)


def test_uniforms_in_place_of_a_generator(kernels):
    """The generator's own numbers give its tokens; any strides; a row's token is the same in any batch."""
    logits = torch.randn(20, 50)
    drawn = sample_tokens(logits, temperature=1.0, generator=seeded(5)).tokens
    uniforms = torch.empty(20, dtype=torch.float64).uniform_(generator=seeded(5))
    strided = torch.stack([uniforms, -uniforms], 1)[:, 0]
    assert torch.equal(sample_tokens(logits, temperature=1.0, uniforms=strided).tokens, drawn)
    alone = [sample_tokens(logits[i : i + 1], temperature=1.0, uniforms=uniforms[i : i + 1]).tokens for i in range(20)]
    assert torch.equal(torch.cat(alone), drawn)


class TestTruncation:
    @property
    def logits(self):
        return torch.tensor([[0.15, 0.4, 0.05, 0.3, 0.1]]).log()

    def drawn(self, **options):
        """At evenly spaced numbers, which meet every token of a probability of at least 1 / 20."""
        uniforms = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
        out = sample_tokens(self.logits.expand(20, 5), temperature=1.0, uniforms=uniforms, **options)
        return out, set(out.tokens.tolist())

    def test_top_k(self, kernels):
        out, tokens = self.drawn(top_k=2)
        assert tokens == {1, 3}
        truth = torch.where(out.tokens == 1, 4 / 7, 3 / 7).log()
        assert error(out.logprobs, truth) < 1e-6

    def test_top_k_larger_than_the_vocabulary(self, kernels):
        assert self.drawn(top_k=99)[1] == {0, 1, 2, 3, 4}

    @pytest.mark.parametrize(
        ("top_p", "kept"), [(0.39, {1}), (0.41, {1, 3}), (0.71, {0, 1, 3}), (0.96, {0, 1, 2, 3, 4}), (1e-9, {1})]
    )
    def test_top_p(self, kernels, top_p, kept):
        """The smallest set that reaches top_p: sums 0.4, 0.7, 0.85, 0.95, 1."""
        out, tokens = self.drawn(top_p=top_p)
        assert tokens == kept
        mass = sum(self.logits.exp()[0, j].item() for j in kept)
        assert error(out.logprobs, (self.logits[0, out.tokens].exp() / mass).log()) < 1e-6

    def test_top_p_sees_the_temperature(self, kernels):
        """At temperature 1/2 the probabilities are squared: 0.16 / 0.285 alone reaches 0.55."""
        out = sample_tokens(self.logits.expand(9, 5), temperature=0.5, top_p=0.55)
        assert set(out.tokens.tolist()) == {1}

    def test_ties_stay_together(self, kernels):
        logits = torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0]])
        for options in (dict(top_k=2), dict(top_p=0.8), dict(top_k=2, top_p=0.8)):
            kept = sample_tokens(logits, temperature=1.0, **options).kept
            assert unpacked(kept, 5).tolist() == [[True, True, True, False, True]]

    def test_both_distributions(self, kernels):
        """Log-probs on the kept set and the whole row, entropy on the kept set, the set itself; top_p after top_k."""
        logits, temperature = torch.randn(3, 500) * 2, 0.8
        out = sample_tokens(logits, temperature=temperature, top_k=20, top_p=0.6)
        kept = unpacked(out.kept, 500)
        largest = (logits.double() / temperature).sort(-1, descending=True).values[:, :20].softmax(-1)
        assert kept.sum(-1).tolist() == ((largest.cumsum(-1) - largest) < 0.6).sum(-1).tolist()
        zero = torch.zeros(3)
        inside = logits.masked_fill(~kept, -INF)
        logprobs, entropy, _ = token_truth(inside, out.tokens, zero, zero, temperature=temperature)
        full = token_truth(logits, out.tokens, zero, zero, temperature=temperature)[0]
        assert error(out.logprobs, logprobs) < 1e-5 and error(out.entropy, entropy) < 1e-5
        assert error(out.full_logprobs, full) < 1e-5 and torch.all(out.full_logprobs < out.logprobs)

    def test_none(self, kernels):
        out = sample_tokens(torch.randn(2, 9), temperature=1.0)
        assert out.full_logprobs is out.logprobs and out.kept is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
    @pytest.mark.parametrize("top_p", [0.05, 0.5, 0.99])
    def test_nucleus_of_any_size(self, dtype, scale, top_p):
        """From one token to nearly all, sorted whole or in part; ties, of which bfloat16 has many, by the threshold."""
        logits = (torch.randn(6, 5000) * scale).to(dtype)
        p = torch.softmax(logits.double(), -1)
        ordered, order = p.sort(-1, descending=True)
        needed = (ordered.cumsum(-1) - ordered < top_p).sum(-1, keepdim=True)
        threshold = logits.gather(-1, order.gather(-1, needed - 1))
        assert torch.equal(kept_tokens(logits, 1.0, 0, top_p), logits >= threshold)

    @pytest.mark.parametrize("places", [1, 7, 8, 9, 50257])
    def test_bits(self, places):
        mask = torch.rand(2, 3, places) < 0.5
        bits = packed(mask)
        assert bits.dtype == torch.uint8 and bits.shape == (2, 3, -(-places // 8))
        assert torch.equal(unpacked(bits, places), mask)
        assert bits[0, 0, 0].item() == sum(1 << j for j in range(min(places, 8)) if mask[0, 0, j])


def test_no_rows(kernels):
    out = sample_tokens(torch.randn(0, 9), temperature=1.0)
    assert out.tokens.shape == out.logprobs.shape == out.entropy.shape == (0,)


def test_strided_logits(kernels):
    logits = torch.randn(3, 4, 50)
    greedy = torch.ones(3, dtype=torch.bool)
    for view in (logits[:, -1], logits[:, 0, ::2], logits[0, :3].t()):
        out = sample_tokens(view, temperature=2.0, greedy_mask=torch.ones(len(view), dtype=torch.bool))
        assert torch.equal(out.tokens, view.argmax(-1))
        again = token_logprobs(view.contiguous(), out.tokens, temperature=2.0).logprobs
        if kernels in ("reference", "cpu"):
            assert torch.equal(out.logprobs, again)
        else:  # other tiles, other rounding
            torch.testing.assert_close(out.logprobs, again, rtol=1e-6, atol=1e-6)
    assert sample_tokens(logits[:, -1], temperature=1.0, greedy_mask=greedy[::1]).tokens.shape == (3,)


def test_permuted_rows_give_permuted_bits():
    logits, order = torch.randn(37, 1003), torch.randperm(37)
    greedy = torch.rand(37) < 0.5
    uniforms = torch.rand(37, dtype=torch.float64)
    a = torch.ops.rlhf_fast.sample_tokens(logits, uniforms, greedy, 0.8)
    b = torch.ops.rlhf_fast.sample_tokens(logits[order], uniforms[order], greedy[order], 0.8)
    assert all(torch.equal(x[order], y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("junk", [torch.nan, INF, -INF])
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_row_without_a_distribution(name, junk):
    """Of CPU tensors. Those of a GPU are not checked, that would wait for it: test_cuda.py has what becomes of them."""
    logits = torch.randn(4, 6)
    logits[2] = junk
    with (
        backend(name),
        pytest.raises(ValueError, match="logits: expected a finite largest logit in every row, got .* in row 2"),
    ):
        sample_tokens(logits, temperature=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(logits=torch.zeros(3)), r"logits: expected shape \[N, V\] with V > 0, got \[3\]"),
        (dict(logits=torch.zeros(3, 0)), r"logits: expected shape \[N, V\] with V > 0, got \[3, 0\]"),
        (dict(logits=torch.zeros(2, 3, dtype=torch.int32)), "logits: expected dtype .* got torch.int32"),
        (dict(temperature=0.0), "temperature: expected a finite number > 0, got 0.0"),
        (dict(greedy_mask=torch.zeros(2)), "greedy_mask: expected dtype bool, got torch.float32"),
        (dict(greedy_mask=torch.zeros(3, dtype=torch.bool)), r"greedy_mask: expected shape \[2\] .* got \[3\]"),
        (dict(uniforms=torch.zeros(2)), "uniforms: expected dtype float64, got torch.float32"),
        (dict(uniforms=torch.zeros(3).double()), r"uniforms: expected shape \[2\] as the rows of logits, got \[3\]"),
        (
            dict(uniforms=torch.zeros(2).double(), generator=torch.Generator()),
            "uniforms: expected no uniforms beside a generator, got both",
        ),
        (dict(top_k=-1), "top_k: expected an integer >= 0, got -1"),
        (dict(top_p=0.0), r"top_p: expected a number in \(0, 1\], got 0.0"),
        (dict(top_p=1.1), r"top_p: expected a number in \(0, 1\], got 1.1"),
    ],
)
def test_errors(kernels, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(**(dict(logits=torch.zeros(2, 3), temperature=1.0) | arguments))
