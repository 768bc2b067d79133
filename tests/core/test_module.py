"""The compiled module by itself, on raw pointers: instruction sets agree, threads do not matter, no torch needed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast import _cpu

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def pointer(x):
    return 0 if x is None else x.data_ptr()


def token_logprobs(z_NV, ids_N, *, temperature=1.0, softcap=0.0, threads=2, in_place=False, scale=1.0):
    """(logprobs, entropy, gradient of scale * sum(0.7 logprobs - 0.3 entropy)) from the module."""
    N, V = z_NV.shape
    real = torch.float64 if z_NV.dtype == torch.float64 else torch.float32
    logprobs, entropy, stats = torch.empty(N, dtype=real), torch.empty(N, dtype=real), torch.empty(N, 2, dtype=real)
    head = (z_NV.data_ptr(), DTYPES[z_NV.dtype], z_NV.stride(0), ids_N.data_ptr(), N, V, 1 / temperature, softcap)
    saved = (logprobs.data_ptr(), entropy.data_ptr(), stats.data_ptr())
    assert _cpu.token_logprobs(*head, *saved, threads) == -1
    gradient = z_NV if in_place else torch.empty_like(z_NV)
    by_logprob, by_entropy = (torch.full((N,), scale * w, dtype=real) for w in (0.7, -0.3))
    _cpu.token_logprobs_backward(
        *head, *saved, pointer(by_logprob), pointer(by_entropy), gradient.data_ptr(), head[1],
        gradient.stride(0), threads,
    )  # fmt: skip
    return logprobs, entropy, gradient


def ppo_loss(B, T, dtype=torch.float32, threads=2, **options):
    g = torch.Generator().manual_seed(B * T)
    logp, old, ref, entropy, advantages = (torch.randn(B, T, generator=g, dtype=dtype) for _ in range(5))
    mask = torch.rand(B, T, generator=g) < 0.7
    grad_logp, grad_entropy, stats = torch.empty_like(logp), torch.empty_like(logp), torch.empty(8, dtype=dtype)
    settings = dict(
        objective=0, by_sequence=False, low=0.2, high=0.3, dual_clip=3.0, tau_pos=0.0, tau_neg=0.0, kl_coef=0.1,
        estimator=2, kl_by_ratio=False, entropy_coef=0.01, reduction=0, denominator=0.0,
    )  # fmt: skip
    tensors = (logp, old, advantages, True, mask, ref, entropy)
    _cpu.ppo_loss(
        DTYPES[dtype], *(x if x is True else x.data_ptr() for x in tensors), B, T, *(settings | options).values(),
        grad_logp.data_ptr(), grad_entropy.data_ptr(), stats.data_ptr(), threads,
    )  # fmt: skip
    return stats, grad_logp, grad_entropy


def sample_tokens(z_NV, u_N, threads=2):
    N, V = z_NV.shape
    tokens, logprobs, entropy = torch.empty(N, dtype=torch.long), torch.empty(N), torch.empty(N)
    greedy = torch.arange(N) % 4 == 3
    outputs = (pointer(x) for x in (u_N, greedy, tokens, logprobs, entropy))
    assert _cpu.sample_tokens(z_NV.data_ptr(), DTYPES[z_NV.dtype], V, N, V, 1.0, *outputs, threads) == -1
    return tokens, logprobs, entropy


def gae(B, T, threads=2):
    g = torch.Generator().manual_seed(T)
    rewards, values = torch.randn(B, T, generator=g), torch.randn(B, T, generator=g)
    mask, advantages, returns = torch.rand(B, T, generator=g) < 0.8, torch.empty(B, T), torch.empty(B, T)
    inputs = (rewards.data_ptr(), values.data_ptr(), mask.data_ptr(), 0)  # 0: the same lambda in every row
    _cpu.gae(0, *inputs, B, T, 0.99, 0.95, advantages.data_ptr(), returns.data_ptr(), threads)
    return advantages, returns


def logits(N, V, dtype=torch.float32):
    g = torch.Generator().manual_seed(N + V)
    return (torch.randn(N, V, generator=g) * 3).to(dtype), torch.randint(0, V, (N,), generator=g)


@pytest.fixture
def isa():
    chosen = _cpu.isa()
    yield _cpu.set_isa
    _cpu.set_isa(chosen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_agree(isa, dtype):
    z, ids = logits(9, 5003, dtype)
    uniforms = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    small = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    results = {}
    for name in _cpu.isas():
        isa(name)
        plain, capped = token_logprobs(z, ids), token_logprobs(z, ids, temperature=0.7, softcap=20.0)
        sampled = sample_tokens(z, uniforms) if dtype != torch.float64 else ()
        results[name] = (*plain, *capped, *sampled, *ppo_loss(5, 300, small), *gae(3, 70))
    assert "scalar" in results
    ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-6)  # of a gradient's own rounding
    for name, outputs in results.items():
        for got, expected in zip(outputs, results["scalar"], strict=True):
            relative = ulp if got.dtype == dtype else 1e-6
            torch.testing.assert_close(got, expected, rtol=relative, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# Large enough for several threads. One and two rows are fewer than the threads: their columns are split.
@pytest.mark.parametrize("N, V", [(1, 150001), (2, 100257), (33, 5003)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_thread_count(N, V, dtype):
    z, ids = logits(N, V, dtype)
    uniforms = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one = (*token_logprobs(z, ids, threads=1), *sample_tokens(z, uniforms, threads=1))
    for threads in (2, 3):
        many = (*token_logprobs(z, ids, threads=threads), *sample_tokens(z, uniforms, threads=threads))
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_same_bits_for_any_thread_count_in_losses():
    one = (*ppo_loss(70, 2001, threads=1), *gae(70, 2001, threads=1))
    for threads in (2, 3):
        many = (*ppo_loss(70, 2001, threads=threads), *gae(70, 2001, threads=threads))
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def hostile_rows():
    """Rows whose largest logits come late, far above everything before them; across several blocks and segments."""
    V, g = 33000, torch.Generator().manual_seed(3)
    noise = torch.randn(12, V, generator=g)
    for row, top in zip(noise[:4], (5, 20, 100, 1000), strict=True):
        row += torch.linspace(0, top, V)
    for row, top in zip(noise[4:9], (6, 9, 15, 40, 200), strict=True):
        row[31000] += top
    noise[9, :20000] = noise[10, 20000:] = noise[11, 1:] = -float("inf")
    return noise, torch.cat([torch.randint(20000, 30000, (9,), generator=g), torch.tensor([20001, 7, 0])])


@pytest.mark.parametrize("temperature", [1.0, 0.1, 3.0])
def test_late_and_missing_maxima_against_double(isa, temperature):
    z, ids = hostile_rows()
    x = z.double().requires_grad_()
    logp = torch.log_softmax(x / temperature, -1)
    entropy = -torch.where(logp > -float("inf"), logp.exp() * logp.clamp(min=-1e300), 0.0).sum(-1)
    logprobs = logp.gather(-1, ids[:, None])[:, 0]
    (0.7 * logprobs - 0.3 * entropy).sum().backward()
    for name in _cpu.isas():
        isa(name)
        got = token_logprobs(z, ids, temperature=temperature)
        for value, exact in zip(got, (logprobs, entropy, x.grad.nan_to_num()), strict=True):
            torch.testing.assert_close(value.double(), exact.detach(), rtol=1e-6, atol=1e-5)


def test_sampled_logprob_has_the_bits_of_token_logprobs():
    z, _ = logits(16, 5003)
    tokens, logprobs, entropy = sample_tokens(z, torch.linspace(0, 0.999, 16, dtype=torch.float64))
    again, entropy_again, _ = token_logprobs(z, tokens)
    assert torch.equal(logprobs, again) and torch.equal(entropy, entropy_again)


def test_sampling_follows_the_cdf():
    z = torch.tensor([[0.1, 0.0, 0.4, 0.5, 0.0]]).log().repeat(7, 1)
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.0, 0.4999, 0.5001, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs, _ = sample_tokens(z, uniforms)
    assert tokens.tolist() == [0, 0, 2, 3, 2, 3, 3]  # the fourth row is greedy
    torch.testing.assert_close(logprobs, torch.tensor([0.1, 0.1, 0.4, 0.5, 0.4, 0.5, 0.5]).log())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_sampling_names_the_first_row_without_a_distribution(bad):
    z, _ = logits(6, 300)
    z[4], z[2] = bad, bad
    tokens, out = torch.empty(6, dtype=torch.long), torch.empty(2, 6)
    uniforms = torch.full((6,), 0.5, dtype=torch.float64)
    inputs = (z.data_ptr(), 0, 300, 6, 300, 1.0, uniforms.data_ptr(), 0)
    assert _cpu.sample_tokens(*inputs, tokens.data_ptr(), out[0].data_ptr(), out[1].data_ptr(), 2) == 2


def test_in_place_gradient_has_the_same_bits():
    for dtype in DTYPES:
        z, ids = logits(5, 20011, dtype)
        _, _, apart = token_logprobs(z, ids, softcap=30.0)
        _, _, over = token_logprobs(z, ids, softcap=30.0, in_place=True)
        assert over is z and torch.equal(apart, over)


def test_offsets_beyond_32_bits():
    stride, V = 2**30 + 5, 7  # only the pages in use are ever resident
    memory = torch.empty(2 * stride + V, dtype=torch.bfloat16)
    z = memory.as_strided((3, V), (stride, 1))
    z.copy_(torch.arange(21.0).reshape(3, V).bfloat16() / 4)
    ids = torch.tensor([1, 2, 3])
    for got, expected in zip(token_logprobs(z, ids), token_logprobs(z.contiguous(), ids), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e6])  # fp16 sees denormals, then infinities
def test_half_gradients_are_the_float_gradients_rounded_once(isa, dtype, scale):
    z, ids = logits(4, 9973, dtype)
    for name in _cpu.isas():
        isa(name)
        _, _, half = token_logprobs(z, ids, scale=scale)
        _, _, full = token_logprobs(z.float(), ids, scale=scale)
        assert torch.equal(half, full.to(dtype)), name


def test_k3_keeps_its_digits_near_zero():
    d = torch.cat([torch.logspace(-6, 1.3, 500), -torch.logspace(-6, 1.3, 500)])
    zero, out, grad = torch.zeros_like(d), torch.empty_like(d), torch.empty_like(d)
    _cpu.kl_penalty(0, d.data_ptr(), zero.data_ptr(), d.numel(), 2, out.data_ptr(), grad.data_ptr(), 2)
    exact, x = torch.empty_like(d, dtype=torch.float64), -d.double()
    exact[:] = torch.where(x.abs() < 1e-3, x**2 / 2 + x**3 / 6 + x**4 / 24, torch.expm1(x) - x)
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), -torch.expm1(x), rtol=2e-6, atol=0)


def test_unknown_instruction_set_is_a_value_error():
    with pytest.raises(ValueError, match="isa: expected one of"):
        _cpu.set_isa("sse9")


def run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


LOAD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cpu", {_cpu.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def test_loads_without_torch_and_takes_a_lower_instruction_set():
    code = (
        LOAD
        + "assert 'torch' not in sys.modules and 'torch' not in open('/proc/self/maps').read(); print(module.isa())"
    )
    done = run(code, RLHF_FAST_CPU_ISA="scalar")
    assert (done.returncode, done.stdout.strip()) == (0, "scalar"), done.stderr


def test_runs_on_the_openmp_that_torch_loaded():
    code = "import torch\n" + LOAD + "print({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line})"
    done = run(code)
    assert done.stdout.count("gomp") == 1 and "torch" in done.stdout, done.stdout + done.stderr


def test_no_function_is_shared_between_instruction_sets():
    """A weak symbol compiled for AVX-512 could be the copy that the linker keeps for the scalar code."""
    build = Path(__file__).resolve().parents[2] / "build"
    objects = [p for p in build.glob("*/*.o") if p.suffixes[0] in (".scalar", ".avx2", ".avx512")]
    assert objects
    symbols = subprocess.run(
        ["nm", "-A", "--defined-only", *objects], capture_output=True, text=True, check=True
    ).stdout
    assert [line for line in symbols.splitlines() if line.split()[-2] == "W"] == []
