"""What is known of GPU kernels without a GPU: counts proved on two kernels, occupancy by hand, changes seen."""

import copy
import json

import pytest
import torch
import triton
import triton.language as tl

from bench.launches import on_rows
from bench.static import command, report, traffic
from bench.static.cuda import threads
from bench.static.occupancy import occupancy
from bench.static.triton import label, load_sizes
from rlhf_fast.kernels import token_logprobs as kernel
from rlhf_fast.ops import dispatch
from tests.emulation.counted import counted_cuda, counted_triton

ROWS, V = 2, kernel.ROWS * kernel.COLUMNS  # a tile for each row
TARGET = 2 + 8  # bytes of a row's own: its id, and the target's logit once more
STATISTICS = 4 * 4  # log-prob, entropy and two numbers for the backward pass


@pytest.mark.parametrize("name, context", [("triton", counted_triton), ("cuda", counted_cuda)])
def test_counts_of_two_kernels_are_those_of_their_formula(name, context):
    """The forward pass reads each logit once and the target's twice; the backward pass reads and writes once."""
    with context():
        forward, backward, *_ = on_rows(dispatch.KERNELS[name], ROWS, V, torch.bfloat16)
    with context() as read:
        forward.run(dispatch.KERNELS[name])
    with context() as both:
        backward.run(dispatch.KERNELS[name])
    logits = ROWS * V * 2
    partial = {"triton": 0, "cuda": 1}[name]  # CUDA shares these rows out over blocks, which leave states and a count
    assert logits + ROWS * TARGET <= read.loads <= logits + ROWS * (TARGET + 200 * partial)
    assert ROWS * STATISTICS <= read.stores <= ROWS * (STATISTICS + 200 * partial)
    assert logits <= both.loads <= logits + ROWS * 4 * 48  # a program's numbers of its row: 2 to 4 programs a row
    assert logits <= both.stores <= logits + ROWS * 2


def test_a_second_pass_counts_again():
    """Ten float32 numbers, read twice and written once; a number that all lanes read counts once."""

    @triton.jit
    def twice(x, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        total = tl.load(x + at, mask=at < 10, other=0.0)
        total += tl.load(x + at, mask=at < 10, other=0.0)
        tl.store(out + at, total + tl.load(x + at * 0), mask=at < 10)

    x = torch.ones(10)
    with counted_triton() as found:
        twice[(1,)](x, out := torch.zeros(10), BLOCK=16)
    assert out.tolist() == [3.0] * 10
    assert (found.loads, found.stores) == (2 * 40 + 4, 40)


@pytest.mark.parametrize(
    "arch, block, registers, shared, warps",
    [
        ("sm_90", 256, 64, 0, 32),  # 64 x 32 = 2048 registers a warp, 65536 / 2048
        ("sm_90", 256, 33, 0, 48),  # 33 x 32 = 1056, in units of 256: 1280; 51 warps, in blocks of 8
        ("sm_90", 128, 16, 0, 64),  # as many as there can be
        ("sm_80", 32, 16, 0, 32),  # 32 blocks
        ("sm_80", 128, 32, 40 << 10, 16),  # 41 KiB a block of 164
        ("sm_100", 1024, 65, 0, 0),  # 32 warps of 2304 registers do not fit
    ],
)
def test_occupancy_by_hand(arch, block, registers, shared, warps):
    assert occupancy(arch, block, registers, shared) == warps


def test_ptx_is_read():
    ptx = """
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 + 0 ];
        @%p2 ld.global.L1::evict_last.v2.b64 { %rd5, %rd6 }, [ %rd1 ];
        ld.global.cg.b32 %r9, [ %rd9 ];
        ld.global.b8 %rs1, [ %rd9 ];
        ld.shared.b32 %r10, [%r11];
    """
    assert load_sizes(ptx) == {16: 2, 4: 1, 1: 1}
    assert label({"SOFTCAP": True, "BLOCK": 64, "lams": None, "num_warps": 8}, {"logits": "*bf16"}) == (
        "bf16, softcap True, no lams"
    )
    assert threads("_ZN4rlhf_9dpo_pairsIfEE") == 64 and threads("_ZN4rlhf_forward") == 256


@pytest.mark.parametrize(
    "name, tile", [("_token_logprobs", kernel.ROWS * kernel.COLUMNS), ("_token_logprobs_backward", kernel.BLOCK)]
)
def test_ptx_loads_a_tile_once_too(name, tile):
    """The loads of 16 bytes in the PTX, by all threads, are the tile: the loop's body reads no number twice."""
    committed = json.loads(command.RESULTS.read_text())["kernels"]["Triton"]
    found = [row for row in committed if row["kernel"].startswith(f"token_logprobs.{name} (bf16")]
    assert {row["arch"] for row in found} == {"sm_80", "sm_90", "sm_100"}
    assert {16 * row["loads"]["16"] * row["threads"] for row in found} == {2 * tile}


def test_a_change_of_traffic_is_seen():
    committed = json.loads(command.RESULTS.read_text())
    assert report.differences(committed, copy.deepcopy(committed)) == []
    changed = copy.deepcopy(committed)
    changed["traffic"][0]["loads"] = 4.0
    (line,) = report.differences(committed, changed)
    row = committed["traffic"][0]
    assert line == f"token_logprobs Triton {row['shape']}: loads expected {row['loads']}, got 4.0"
    changed = copy.deepcopy(committed)
    changed["kernels"]["Triton"][0]["registers"] += 1
    assert len(report.differences(committed, changed)) == 1
    changed["made with"]["Triton"] = "another"
    assert report.differences(committed, changed) == []
    assert len(report.differences(committed, committed | {"traffic": committed["traffic"][1:]})) == 3


def test_the_committed_tables_cover_every_kernel():
    committed = json.loads(command.RESULTS.read_text())
    made_of_others = {name for name in dispatch.KERNELS["triton"] if name.startswith("linear_")} | {"kto_loss"}
    for name in traffic.COUNTED:
        assert {row["operator"] for row in committed["traffic"] if row["by"] == name} == (
            dispatch.KERNELS["triton"].keys() - made_of_others
        )
    for row in committed["traffic"]:
        if row["operator"] in ("token_logprobs", "token_logprobs_backward", "token_logprobs_backward_"):
            assert 1 <= row["of ideal"] <= 1.01
    assert (command.RESULTS.with_suffix(".md")).read_text() == report.markdown(committed)
