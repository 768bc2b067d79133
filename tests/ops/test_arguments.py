"""Every argument of every public operation, wrong in turn: one ValueError or TypeError that names the argument."""

import inspect
import re
import warnings

import numpy
import pytest
import torch

import rlhf_fast
from rlhf_fast import ops

B, T, V, H = 4, 6, 9, 5
X, MASK, ROW = torch.randn(B, T), torch.ones(B, T, dtype=torch.bool), torch.randn(B)
LOGITS, IDS = torch.randn(B, T, V), torch.randint(V, (B, T))
HIDDEN, WEIGHT = torch.randn(B, T, H), torch.randn(V, H)
HEAD = dict(hidden=HIDDEN, weight=WEIGHT, token_ids=IDS)
LAYER = dict(bias=torch.randn(V), temperature=1.0, softcap=20.0, memory_budget=2**20)
NORMALIZED = dict(normalizer=torch.tensor(7.0))
PPO = dict(
    old_logprobs=X, advantages=X, mask=MASK, clip=(0.1, 0.3), dual_clip=3.0, ref_logprobs=X, kl_coef=0.1,
    kl_estimator="k3", entropy_coef=0.1, reduction="token_mean", objective="clip", importance_sampling_level="token",
    sapo_temperature=(1.0, 1.05), use_bias_correction_kl=True, **NORMALIZED,
)  # fmt: skip
DPO = dict(
    ref_chosen_logps=ROW[:2], ref_rejected_logps=ROW[:2], beta=0.1, loss_type="ipo", loss_weights=(2.0,),
    label_smoothing=0.0, mean_chosen_length=torch.tensor(2.5), simpo_gamma=0.5, cpo_alpha=1.0,
    chosen_lengths=torch.tensor([3, 2]), rejected_lengths=torch.tensor([3, 2]), reference_free=False,
)  # fmt: skip
KTO = dict(
    ref_logps=ROW, labels=ROW > 0, kl=torch.tensor(0.1), beta=0.1, loss_type="kto", desirable_weight=1.0,
    undesirable_weight=1.0,
)  # fmt: skip
GENERATOR = torch.Generator()

VALID = {
    "token_logprobs": dict(logits=LOGITS, token_ids=IDS, temperature=1.0, softcap=20.0, inplace_backward=False),
    "token_kl": dict(
        logits=LOGITS, ref_logits=LOGITS, token_ids=IDS, temperature=1.0, softcap=20.0, inplace_backward=False
    ),
    "linear_token_logprobs": HEAD | LAYER,
    "linear_token_kl": HEAD | LAYER | dict(ref_hidden=HIDDEN, ref_weight=WEIGHT, ref_bias=torch.randn(V)),
    "linear_sft_loss": HEAD | LAYER | NORMALIZED,
    "linear_reinforce_loss": HEAD | LAYER | NORMALIZED | dict(advantages=X, mask=MASK, reduction="token_mean"),
    "linear_ppo_loss": HEAD | LAYER | PPO,
    "linear_dpo_loss": HEAD | LAYER | NORMALIZED | DPO,
    "linear_kto_loss": HEAD | LAYER | NORMALIZED | KTO,
    "linear_loss": HEAD | LAYER | NORMALIZED | dict(coefficients=lambda logprobs, *_: -logprobs, pack="token"),
    "kl_penalty": dict(logprobs=X, ref_logprobs=X, estimator="k1"),
    "shape_rewards": dict(
        scores=ROW, logprobs=X, ref_logprobs=X, mask=MASK, kl_coef=0.1, estimator="k1", clip=5.0
    ),
    "gae": dict(rewards=X, values=X, mask=MASK, gamma=1.0, lam=0.95, value_lam=1.0),
    "discounted_returns": dict(rewards=X, mask=MASK, gamma=1.0),
    "length_adaptive_lambda": dict(lengths=ROW.abs(), alpha=0.05),
    "soft_overlong_punishment": dict(lengths=ROW.abs(), max_length=8, soft_punish_cache=3),
    "whiten": dict(x=X, mask=MASK, shift_mean=True),
    "remax_returns": dict(
        scores=ROW, greedy_scores=ROW, logprobs=X, ref_logprobs=X, mask=MASK, kl_coef=0.1, gamma=1.0, clip=5.0,
        variant="official",
    ),
    "rloo_advantages": dict(scores=ROW, group_size=2),
    "grpo_advantages": dict(scores=ROW, group_size=2, scale_rewards="group"),
    "ppo_loss": PPO | dict(logprobs=X, entropy=X),
    "ppo_value_loss": dict(values=X, old_values=X, returns=X, mask=MASK, clip=0.2, **NORMALIZED),
    "reinforce_loss": dict(logprobs=X, advantages=X, mask=MASK, reduction="token_mean", **NORMALIZED),
    "reward_loss": dict(chosen_scores=ROW, rejected_scores=ROW, margin=ROW, center_coef=0.1),
    "ranking_loss": dict(scores=X, ranks=torch.randint(3, (B, T))),
    "dpo_loss": dict(chosen_logps=ROW[:2], rejected_logps=ROW[:2], **DPO),
    "kto_loss": dict(logps=ROW, **KTO),
    "sample_tokens": dict(
        logits=LOGITS[0], temperature=1.0, greedy_mask=MASK[0], top_k=3, top_p=0.9, generator=GENERATOR,
        uniforms=torch.rand(T, dtype=torch.float64),
    ),
}  # fmt: skip
OPTIONAL = {"bias", "ref_bias", "softcap", "memory_budget", "normalizer", "dual_clip", "clip", "margin", "generator"}
OPTIONAL |= {"greedy_mask", "uniforms", "entropy", "ref_logprobs", "kl", "value_lam", "loss_weights"}
OPTIONAL |= {"mean_chosen_length"}  # or it says what else lacks it


def of_tensors(x: torch.Tensor) -> dict[str, object]:
    """What cannot stand for the tensor x."""
    floats = x.is_floating_point()
    wrong = {
        "a list": x.tolist(),
        "a float": 1.5 if x.dim() else "1.5",
        "a text": "abc",
        "a dict": {"x": 1},
        "numpy": x.numpy(),
        "complex": torch.ones(x.shape, dtype=torch.complex64),
        "another float" if floats else "floats": x.to(torch.float8_e4m3fn) if floats else x.float(),
        "meta": x.to("meta"),
        "a dimension more": x.unsqueeze(0),
        "an iterator": iter([x]),
        "the class": torch.Tensor,
    }
    if x.dtype != torch.bool:
        wrong |= {"bools": torch.ones(x.shape, dtype=torch.bool)}
    if x.dim():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own future
            wrong |= {
                "nested": torch.nested.nested_tensor([x, x]),
                "jagged": torch.nested.nested_tensor([x, x], layout=torch.jagged),
                "quantised": torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
            }
        wrong |= {"sparse": x.to_sparse(), "one row more": torch.cat([x, x[:1]])}
        wrong |= {"mkldnn": x.to_mkldnn()} if x.dtype == torch.float32 else {}
    return wrong


OF_NUMBERS = {
    "a list": [0.1],
    "a text": "0.1",
    "complex": 0.1 + 0j,
    "a tensor of two": torch.ones(2),
    "a tensor": torch.ones(()),
    "a dict": {},
    "an array": numpy.ones(2),
    "a bool": True,
    "NaN": float("nan"),
    "400 digits": 10**400,
    "5000 digits": -(10**5000),
}
OF_TEXTS = {"a number": 1, "a list": ["k1"], "unknown": "other", "none": None, "a tensor": torch.ones(2)}
OF_FLAGS = {"a list": [True], "a text": "no", "a tensor of two": torch.ones(2), "none": None, "a number": 2}
OF_OTHERS = {"a number": 1, "a text": "x", "a list": [1]}


def wrong_values(name: str, value: object) -> dict[str, object]:
    if isinstance(value, torch.Tensor):
        wrong = of_tensors(value)
        if name in ("normalizer", "kl", "mean_chosen_length"):  # a number does too
            del wrong["a float"], wrong["a list"]
            wrong |= {"a pair": (1.0, 2.0)}
        if name.endswith("_lengths"):
            del wrong["floats"]
        return wrong | ({} if name in OPTIONAL else {"none": None})
    if isinstance(value, bool):
        return OF_FLAGS
    if isinstance(value, str):
        return OF_TEXTS
    if isinstance(value, tuple):  # the bounds of a clip, or what there are several numbers of
        bounds = {"one": (0.1,), "three": (0.1, 0.2, 0.3), "texts": ("a", "b"), "lists": ([0.1], [0.2])}
        if len(value) == 1:
            del bounds["one"]
        return bounds | {key: wrong for key, wrong in OF_NUMBERS.items() if key != "a list"}
    if isinstance(value, int | float):
        more = {} if name in OPTIONAL else {"none": None}
        return OF_NUMBERS | more | ({"a fraction": 2.5} if isinstance(value, int) else {})
    return OF_OTHERS


def test_every_operation_and_every_argument_is_here():
    functions = {name for name in rlhf_fast.__all__ if inspect.isfunction(getattr(ops, name))}
    assert VALID.keys() == functions
    for name, valid in VALID.items():
        assert valid.keys() == inspect.signature(getattr(ops, name)).parameters.keys(), name


@pytest.mark.parametrize("op", VALID)
def test_the_valid_call(op):
    call(op, VALID[op])


def call(op: str, arguments: dict) -> object:
    """The operation. sample_tokens takes either a generator or uniforms."""
    if op == "sample_tokens" and isinstance(arguments["generator"], torch.Generator):
        arguments = arguments | {"generator": None}
    elif op == "sample_tokens":
        arguments = arguments | {"uniforms": None}
    return getattr(ops, op)(**arguments)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, valid in VALID.items() for name in valid])
def test_a_wrong_argument_is_named(op, name):
    for kind, wrong in wrong_values(name, VALID[op][name]).items():
        if kind in ("meta", "one row more") and sum(isinstance(x, torch.Tensor) for x in VALID[op].values()) == 1:
            continue  # a tensor alone may be anywhere, and of any length
        try:
            got = call(op, VALID[op] | {name: wrong})
        except (ValueError, TypeError) as error:
            message = str(error)
            assert re.search(rf"(^|\W){name}(\W|$)", message), (kind, message)
            assert "\n" not in message and len(message) < 400, (kind, message)
        except Exception as error:
            pytest.fail(f"{kind}: {type(error).__name__}: {error}")
        else:
            pytest.fail(f"{kind} was taken, with the result {got}")


@pytest.mark.parametrize("op", [name for name, valid in VALID.items() if "normalizer" in valid])
def test_a_normalizer_without_numbers(op):
    with pytest.raises(ValueError, match="^normalizer: expected device cpu or cpu, got meta$|^normalizer: .*got meta$"):
        call(op, VALID[op] | {"normalizer": torch.tensor(5.0, device="meta")})


def test_a_loss_type_is_checked_before_answers_are_counted():
    with pytest.raises(ValueError, match="^loss_type: expected a name, or several in a list, got nan"):
        ops.linear_dpo_loss(HIDDEN, WEIGHT, IDS, ROW[:2], ROW[:2], loss_type=float("nan"))  # pyright: ignore


def test_numbers_of_numpy_are_numbers():
    expected = ops.gae(X, X, MASK, gamma=0.5, lam=0.25)
    given = ops.gae(X, X, MASK, gamma=numpy.float32(0.5), lam=numpy.float64(0.25))
    assert torch.equal(given.advantages, expected.advantages)
    assert torch.equal(ops.rloo_advantages(ROW, numpy.int64(2)), ops.rloo_advantages(ROW, 2))
