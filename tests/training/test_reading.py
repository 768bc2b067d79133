"""A reward model of another family reads conversations as its own chat template writes them."""

import pickle

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.encoding import encode_preferences
from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.loading import load_scorer, mark_trained_here, trained_here
from rlhf_fast.lm.saving import save_model
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages.init import train_bpe
from rlhf_fast.training.evaluation import compared_prompts, completion_rewards, prompt_columns, scored_prompts
from rlhf_fast.training.reading import Conversation, Reader
from rlhf_fast.training.rewards import Answers, Reward
from tests.support.models import random_policy

CPU = torch.device("cpu")
POLICYS = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
OWN = (
    "{{ bos_token }}{% if tools %}{{ tools | length }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' and strict %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<' + m.role + '>' + (m.content | trim) + eos_token + '\n' }}{% endfor %}"
)
TEXTS = ["the film was good . the plot was bad , <user> <assistant> [user] [assistant] "] * 3
HELLO = [{"role": "user", "content": "the film"}]
BEGUN = [*HELLO, {"role": "assistant", "content": "the plot"}]


def tokenizer_of(template: str | None, vocabulary: int = 300, **special: str) -> PreTrainedTokenizerBase:
    return train_bpe(TEXTS, vocabulary, chat_template=template, **special)


@pytest.fixture(scope="module")
def policys():
    return tokenizer_of(POLICYS, 280)


@pytest.fixture(scope="module")
def own():
    return tokenizer_of(OWN, 310, bos_token="<s>")


def reader_of(tokenizer, *, as_trained=False, context=1000) -> Reader:
    return Reader(tokenizer, "judge", as_trained=as_trained, context=context)


def asked(messages, **row) -> Conversation:
    return Conversation("as the policy reads it", messages, row)


def ids_of(pairs) -> list[list[int]]:
    return [prompt + answer for prompt, answer in pairs]


def rendered(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def answered(messages, text):
    return [*messages, {"role": "assistant", "content": text}]


def test_somebody_elses_model_reads_what_its_template_writes(own):
    (found,) = ids_of(reader_of(own).encode([asked(HELLO)], ["was good ."], [True]))
    assert found == rendered(own, answered(HELLO, "was good ."))
    assert own.decode(found).endswith(f"<assistant>was good .{own.eos_token}\n")


def test_a_cut_off_completion_has_no_end(own):
    for text in ("was good .", "was good ", ""):
        (found,) = ids_of(reader_of(own).encode([asked(HELLO)], [text], [False]))
        whole = own.apply_chat_template(answered(HELLO, "X"), tokenize=False)
        assert found == own(whole[: whole.rindex("X")] + text, add_special_tokens=False)["input_ids"], text


def test_a_begun_answer_goes_on_in_its_message(own):
    (found,) = ids_of(reader_of(own).encode([asked(BEGUN)], [" was bad ,"], [True]))
    assert found == rendered(own, answered(HELLO, "the plot was bad ,"))


def test_a_model_that_was_trained_here_reads_the_ids_of_training(own):
    for messages in (HELLO, BEGUN):
        row = {"prompt": messages, "chosen": " good", "rejected": " bad", "rejected_finished": False}
        (pair,) = encode_preferences([row], own, 1000, 1000).examples
        for text, done, ids in ((" good", True, pair.chosen_ids), (" bad", False, pair.rejected_ids)):
            (found,) = ids_of(reader_of(own, as_trained=True).encode([asked(messages)], [text], [done]))
            assert found == pair.prompt_ids + ids
            assert (found[-1] == own.eos_token_id) is done  # and no line break behind the end


def test_tools_and_options_of_a_row_go_to_the_template(own):
    tools = [{"type": "function", "function": {"name": "film"}}]
    (found,) = ids_of(reader_of(own).encode([asked(HELLO, tools=tools)], ["good"], [True]))
    assert found == rendered(own, answered(HELLO, "good"), tools=tools) != rendered(own, answered(HELLO, "good"))
    told = [{"role": "system", "content": "the"}, *HELLO]
    reader_of(own).check([asked(told), "plain text"])
    with pytest.raises(ValueError, match=r"^reward: the chat template of judge refuses a conversation: no system$"):
        reader_of(own).check([asked(told, chat_template_kwargs={"strict": True})])


def test_a_long_conversation_loses_its_left_end_and_keeps_bos(own):
    whole = rendered(own, answered(HELLO, "was good ."))
    (found,) = ids_of(reader_of(own, context=8).encode([asked(HELLO)], ["was good ."], [True]))
    assert found == whole[:1] + whole[-7:] and found[0] == own.bos_token_id


def test_without_a_template_a_conversation_is_plain_text():
    bare = tokenizer_of(None)
    reader = reader_of(bare)
    with pytest.warns(UserWarning, match="reward model judge has no chat template, so it reads .* as plain text"):
        pairs = reader.encode([asked(HELLO), asked(BEGUN)], ["good", " was bad"], [True, False])
    wanted = ["the film\ngood", "the film\nthe plot was bad"]
    ends = [[bare.eos_token_id], []]
    assert ids_of(pairs) == [bare(text)["input_ids"] + end for text, end in zip(wanted, ends, strict=True)]
    assert [bare.decode(prompt) for prompt, _ in pairs] == ["the film\n", "the film\nthe plot"]


def judge(directory, tokenizer, *, here=False, **options) -> str:
    torch.manual_seed(0)
    random_policy("llama", len(tokenizer)).save_pretrained(directory)
    model = load_scorer(directory, **options)
    if here:
        mark_trained_here(model)
    save_model(model, directory / "judge")
    tokenizer.save_pretrained(directory / "judge")
    return str(directory / "judge")


def plain_score(directory, ids) -> float:
    model = load_scorer(directory, head=None, trainable=False).double()
    with torch.no_grad():
        return model.score(model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]).item()


def rollout_of(tokenizer, prompts, texts, finished) -> Rollout:
    rows = [(p.prompt_ids, tokenizer(t)["input_ids"]) for p, t in zip(prompts, texts, strict=True)]
    rows = [(p, [*t, tokenizer.eos_token_id] if end else t) for (p, t), end in zip(rows, finished, strict=True)]
    P, T = (max(map(len, side)) for side in zip(*rows, strict=True))
    prompt_ids = torch.tensor([[0] * (P - len(p)) + p for p, _ in rows])
    prompt_mask = torch.tensor([[False] * (P - len(p)) + [True] * len(p) for p, _ in rows])
    answers = torch.tensor([t + [0] * (T - len(t)) for _, t in rows])
    mask = torch.tensor([[True] * len(t) + [False] * (T - len(t)) for _, t in rows])
    zeros = torch.zeros(answers.shape)
    return Rollout(prompt_ids, prompt_mask, answers, mask, zeros, zeros, torch.tensor(finished))


def test_scores_of_rollouts_and_of_the_rows_own_completions(policys, own, tmp_path):
    """Conversations and plain text side by side, against plain passes in float64."""
    spec = judge(tmp_path, own)
    rows = [{"prompt": HELLO}, {"prompt": BEGUN}, {"prompt": "the film"}]
    prompts = scored_prompts(rows, policys, 1000).examples
    texts, finished = ["was good .", " was bad ,", " was"], [True, False, True]
    reward = Reward(spec, policys, CPU, micro_batch_size=2, max_prompt_length=4)
    columns = prompt_columns(prompts)
    reward.check(columns)
    scores = reward(rollout_of(policys, prompts, texts, finished), columns)
    whole = own.apply_chat_template(answered(HELLO, "the plot was bad ,"), tokenize=False)
    ids = [
        rendered(own, answered(HELLO, "was good .")),
        own(whole[: whole.rindex(own.eos_token)], add_special_tokens=False)["input_ids"],
        own("the film was")["input_ids"] + [own.eos_token_id],
    ]
    wanted = torch.tensor([plain_score(spec, row) for row in ids])
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5)
    compared = [{"prompt": HELLO, "completion": answered([], "was good .")}]
    own_rewards = completion_rewards(compared_prompts(compared, policys, 1000), reward)
    torch.testing.assert_close(own_rewards, wanted[:1], rtol=1e-4, atol=1e-5)
    several = Reward([spec, lambda completions: [1.0] * len(completions)], policys, CPU, weights=[2.0, 1.0])
    torch.testing.assert_close(
        several.of_texts(["was good ."], prompt_columns(prompts[:1])), 2 * wanted[:1] + 1, rtol=1e-4, atol=1e-5
    )


def test_the_same_vocabulary_with_another_template(policys, tmp_path):
    other = tokenizer_of(OWN, 280)
    assert other.get_vocab() == policys.get_vocab()
    spec = judge(tmp_path, other)
    prompts = scored_prompts([{"prompt": HELLO}, {"prompt": "the film"}], policys, 1000).examples
    rollout = rollout_of(policys, prompts, ["was good .", " was"], [True, True])
    scores = Reward(spec, policys, CPU)(rollout, prompt_columns(prompts))
    plain = prompts[1].prompt_ids + policys(" was")["input_ids"] + [policys.eos_token_id]
    wanted = [plain_score(spec, rendered(other, answered(HELLO, "was good ."))), plain_score(spec, plain)]
    torch.testing.assert_close(scores, torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    for template in (POLICYS, None):  # the ids of the policy then are its own
        spec = judge(tmp_path / str(template is None), tokenizer_of(template, 280))
        part = Reward(spec, policys, CPU).parts[0]
        assert part.reader is None
        answers = Answers(policys, prompt_columns(prompts), rollout=rollout)
        assert torch.equal(part(answers), part(Answers(policys, {"prompt": ["", ""]}, rollout=rollout)))


def test_a_reward_model_knows_that_it_was_trained_here(own, tmp_path):
    for name, options in {"whole": {}, "adapter": {"lora": LoRA(2, 4.0, 0)}}.items():
        spec = judge(tmp_path / name, own, here=True, **options)
        assert trained_here(load_scorer(spec, head=None, trainable=False))
        assert Reward(spec, tokenizer_of(POLICYS, 280), CPU).parts[0].reader.as_trained
    assert not trained_here(load_scorer(judge(tmp_path / "other", own), head=None))


def test_a_conversation_stays_a_text():
    prompt = asked(HELLO, tools=[1])
    again = pickle.loads(pickle.dumps(prompt))
    assert again == prompt == "as the policy reads it"
    assert (again.messages, again.options) == (HELLO, {"tools": [1]}) and not again.begun
