"""One token per row by inverse CDF, or the first maximum, with its log-prob and the row's entropy.

There are two launches and no atomics. The first launch reads the logits once, a program per block of columns, and keeps
each block's maximum and sums. In the second launch a program takes a row. The program finds the block into which u
falls, reads that block again, finds the token at which the rest of u falls, and merges the other blocks' states with
the state of this block without the token: the sums leave the target out, as in token_logprobs. Running sums are
float64. The relative error of a block's probability is that of its float32 sum, some 1e-7; the relative error of a
token's share of its block is that of one exponential. The caller applies top-k and top-p as logits of -inf.
"""

import triton
import triton.language as tl

from rlhf_fast.kernels.maths import LOG2E, number
from rlhf_fast.kernels.softmax import recentred, reduced, row_results

BLOCK = 4096
CHUNK = 128  # blocks of a row that the second launch reads at a time
WARPS = 8
DRAW_WARPS = 16
REGISTERS = {"maxnreg": 128}  # of _draw on NVIDIA, because ptxas by itself spills a few bytes
WIDE = True
MULTIPLES_OF_16 = "row_stride", "V"


@triton.jit
def _block_states(
    logits,
    states,
    row_stride: tl.int64,
    V: tl.int32,
    blocks: tl.int32,
    scale: tl.float64,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * row_stride + column, mask=column < V, other=float("-inf")).to(F)
    m, s, a = reduced(z, 1.0, 0.0, number(scale, F))
    mine = states + program.to(tl.int64) * 3
    tl.store(mine, m)
    tl.store(mine + 1, s)
    tl.store(mine + 2, a)


@triton.jit
def _load_states(states, block, there):
    m = tl.load(states + 3 * block, mask=there, other=float("-inf"))
    s = tl.load(states + 3 * block + 1, mask=there, other=0.0)
    return m, s, tl.load(states + 3 * block + 2, mask=there, other=0.0)


@triton.jit
def _weights(m, s, top, factor, first_maximum):
    """The weights of states beside a maximum `top`; for first_maximum, 1 at every maximum and 0 elsewhere."""
    e = tl.where(s == 0, 0.0, tl.exp2((m - top) * factor))
    return tl.where(first_maximum, tl.where(m == top, 1.0, 0.0), s.to(tl.float64) * e)


@triton.jit
def _first_beyond(weights, goal, COUNT: tl.constexpr):
    """(the first of COUNT places at which the running sum exceeds the goal, or COUNT if there is none; the last place
    whose weight is not 0, or -1)"""
    place = tl.arange(0, COUNT)
    beyond = (tl.cumsum(weights, 0) > goal) & (weights > 0)
    return tl.min(tl.where(beyond, place, COUNT), 0), tl.max(tl.where(weights > 0, place, -1), 0)


@triton.jit
def _draw(
    logits,
    uniforms,
    greedy,
    states,
    tokens,
    logprobs,
    entropy,
    row_stride: tl.int64,
    V: tl.int32,
    blocks: tl.int32,
    scale: tl.float64,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    states += row * blocks * 3
    factor = number(scale, F)
    each = tl.arange(0, CHUNK)
    u = tl.load(uniforms + row)
    first_maximum = False
    if greedy is not None:
        first_maximum = tl.load(greedy + row) != 0
        u = tl.where(first_maximum, 0.0, u)
    m = tl.full([CHUNK], float("-inf"), F)
    for start in range(0, blocks, CHUNK):
        m = tl.maximum(m, tl.load(states + 3 * (start + each), mask=start + each < blocks, other=float("-inf")))
    top = tl.max(m, 0)
    top = tl.where(top == float("-inf"), 0.0, top)

    total = tl.zeros([], tl.float64)
    for start in range(0, blocks, CHUNK):
        m, s, _ = _load_states(states, start + each, start + each < blocks)
        total += tl.sum(_weights(m, s, top, factor, first_maximum), 0)
    goal = u * total
    found = blocks
    last = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.float64)
    for start in range(0, blocks, CHUNK):
        m, s, _ = _load_states(states, start + each, start + each < blocks)
        weights = _weights(m, s, top, factor, first_maximum)
        here, last_here = _first_beyond(weights, goal - before, CHUNK)
        found = tl.where((found == blocks) & (here < CHUNK), start + here, found)
        last = tl.where(last_here < 0, last, start + last_here)
        before += tl.sum(weights, 0)
    block = tl.where(found == blocks, last, found)  # rounding may leave the goal unmet

    before = tl.zeros([], tl.float64)
    weight = tl.zeros([], tl.float64)
    m_others = tl.full([CHUNK], float("-inf"), F)
    s_others = tl.zeros([CHUNK], F)
    a_others = tl.zeros([CHUNK], F)
    for start in range(0, blocks, CHUNK):
        m, s, a = _load_states(states, start + each, start + each < blocks)
        weights = _weights(m, s, top, factor, first_maximum)
        before += tl.sum(tl.where(start + each < block, weights, 0.0), 0)
        weight += tl.sum(tl.where(start + each == block, weights, 0.0), 0)
        m = tl.where(start + each == block, float("-inf"), m)
        higher = tl.maximum(m_others, m)
        _, s_others, a_others = recentred(m_others, s_others, a_others, higher, factor, True)
        _, s, a = recentred(m, s, a, higher, factor, True)
        s_others += s
        a_others += a
        m_others = higher

    column = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + column, mask=column < V, other=float("-inf")).to(F)
    m_block = tl.load(states + 3 * block)
    m_block = tl.where(m_block == float("-inf"), 0.0, m_block)
    weights = _weights(z, tl.where(z == float("-inf"), 0.0, 1.0), m_block, factor, first_maximum)
    goal = (goal - before) / tl.where(weight == 0, 1.0, weight) * tl.sum(weights, 0)
    here, last_here = _first_beyond(weights, goal, BLOCK)
    token = block * BLOCK + tl.maximum(tl.where(here < BLOCK, here, last_here), 0)
    z_token = tl.load(logits + token).to(F)

    m, s, a = reduced(tl.where(column == token, float("-inf"), z), 1.0, 0.0, factor)
    m_others, s_others, a_others = reduced(m_others, s_others, a_others, factor)
    higher = tl.maximum(m, m_others)
    _, s, a = recentred(m, s, a, higher, factor, True)
    _, s_others, a_others = recentred(m_others, s_others, a_others, higher, factor, True)
    logprob, h, _, _ = row_results(higher, s + s_others, a + a_others, z_token, scale)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, logprob)
    tl.store(entropy + row, h)


def blocks_of(V):
    return triton.cdiv(V, BLOCK)


def sample_tokens(
    logits, row_stride, uniforms, greedy, rows, V, temperature, states, tokens, logprobs, entropy, registers,
    compute,
):  # fmt: skip
    """states: [rows, blocks_of(V), 3] of the statistics' dtype, uninitialised. registers: as in ppo_loss."""
    blocks, scale = blocks_of(V), LOG2E.value / temperature
    _block_states[(rows * blocks,)](
        logits, states, row_stride, V, blocks, scale, F=compute, BLOCK=BLOCK, num_warps=WARPS
    )
    _draw[(rows,)](
        logits, uniforms, greedy, states, tokens, logprobs, entropy, row_stride, V, blocks, scale, F=compute,
        BLOCK=BLOCK, CHUNK=CHUNK, num_warps=DRAW_WARPS, **registers,
    )  # fmt: skip


COMPILED = []
for _dtype in ("*bf16", "*fp16", "*fp32"):
    _constants = {"F": tl.float32, "BLOCK": BLOCK}
    COMPILED.append((_block_states, {"logits": _dtype}, {**_constants, "num_warps": WARPS}))
    _pointers = {"logits": _dtype, "uniforms": "*fp64", "greedy": "*i1", "tokens": "*i64"}
    for _greedy in ({"greedy": None}, {}):
        _options = {"CHUNK": CHUNK, "num_warps": DRAW_WARPS, **REGISTERS, **_greedy}
        COMPILED.append((_draw, _pointers, {**_constants, **_options}))
