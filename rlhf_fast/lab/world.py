"""The embedded sentiment world: film reviews from a stochastic grammar, with a reward that is known exactly.

It makes the controlled-sentiment experiment of the DPO paper (Rafailov et al. 2023, section 6.1) small enough for a
laptop: prompts are beginnings of reviews, and the reward says how positive the whole review is. Nothing is downloaded,
and everything follows from the seed.

A review is drawn from a latent sentiment, bad, mixed or good (40, 20, 40 %), which its opinions follow. The prompt
therefore explains more than half of the reward's variance. RL has to find the rest: a "but" or a few more opinions can
still turn the verdict.

The reward of a text, as defined in `polarity` and `true_reward`:
 1. Words are what stands between white space. A sentence ends with the word "."; words after the last "." do not count.
    A sentence is one clause, or two joined by "but"; a sentence with more than one "but" is worth 0.
 2. A clause is an opinion if it has exactly one of the two forms
        the NOUN COPULA [not|never] [DEGREE] ADJECTIVE      "the plot was not very good"
        SUBJECT [never] [DEGREE] VERB the NOUN              "i really loved the acting"
    with words from the lists below. Every other clause, a statement of fact or garbage, is worth 0.
 3. An opinion is worth 0.6 for a positive word, -0.6 for a negative one; 1 and -1 after an intensifier, 0.3 and -0.3
    after a softener. A negation then multiplies by -0.5.
 4. A polarity word counts the first time it stands in an opinion; later opinions with the same word are worth 0.
 5. "A but B" is worth 0.25 A + 0.75 B.
 6. The reward is sigmoid(sum over the sentences).

By hand: "the plot was not good . i really loved the acting but the music was bad ."
    -0.5 * 0.6 + 0.25 * 1 + 0.75 * -0.6 = -0.5      reward = sigmoid(-0.5) = 0.3775
"""

import math
import random
from collections.abc import Iterable
from typing import NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_LEXICON = """
    noun             film plot story script acting cast music ending dialogue pacing camera humor editing lighting
    noun             scenery opening romance action villain hero sound
    copula           was is felt seemed
    subject          i we everyone critics
    intensifier      really truly absolutely
    softener         somewhat rather mildly
    good_adjective   good great brilliant charming moving funny fresh superb clever warm gripping lovely witty elegant
    good_adjective   stunning perfect honest vivid
    bad_adjective    bad awful dull boring clumsy weak stale terrible stupid cold tedious ugly lazy messy hollow
    bad_adjective    painful fake bland
    good_verb        loved enjoyed liked admired praised adored
    bad_verb         hated disliked loathed regretted despised mocked
    place            paris london tokyo berlin space prison alaska
    day              monday friday sunday
    number           two three four
    role             lawyer soldier teacher sailor doctor thief
"""
LEXICON: dict[str, list[str]] = {}
for _kind, *_words in map(str.split, _LEXICON.strip().splitlines()):
    LEXICON.setdefault(_kind, []).extend(_words)
FACTS = (  # clauses without an opinion; capitals stand for a word of that kind
    "it takes place in PLACE",
    "it runs for NUMBER hours",
    "it is about a ROLE",
    "a ROLE travels to PLACE",
    "i saw it on DAY",
    "it opened on a DAY",
)
ADJECTIVES = {word: sign for sign, kind in ((1, "good_adjective"), (-1, "bad_adjective")) for word in LEXICON[kind]}
VERBS = {word: sign for sign, kind in ((1, "good_verb"), (-1, "bad_verb")) for word in LEXICON[kind]}
SIZES = {word: size for size, kind in ((1.0, "intensifier"), (0.3, "softener")) for word in LEXICON[kind]}
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


class Style(NamedTuple):
    """Shares of a review's sentences: facts, "but" and negations; and how often an opinion follows the sentiment."""

    facts: float = 0.12
    buts: float = 0.12
    negations: float = 0.1
    follows: float = 0.95


USUAL = Style()
SHIFTED = Style(facts=0.3, buts=0.4, negations=0.5)  # another domain in the same words, for studies


# ---------------------------------------------------------------------------------------------------- reward


def true_reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """sigmoid(polarity(prompt + " " + completion)) for every pair, in [0, 1]; defined for any string."""
    return [
        _sigmoid(polarity(f"{prompt} {completion}")) for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _sigmoid(x: float) -> float:
    return 0.5 + 0.5 * math.tanh(0.5 * x)  # cannot overflow, and sigmoid(-x) is exactly 1 - sigmoid(x)


def polarity(text: str) -> float:
    """Sum of what the sentences are worth, by the rules at the top of the module."""
    total, seen = 0.0, set()
    words = text.split()
    while "." in words:
        end = words.index(".")
        clauses = _split(words[:end], "but")
        values = [_opinion(clause, seen) for clause in clauses]
        if len(values) == 1:
            total += values[0]
        elif len(values) == 2:
            total += 0.25 * values[0] + 0.75 * values[1]
        words = words[end + 1 :]
    return total


def _split(words: list[str], separator: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _opinion(clause: list[str], seen: set[str]) -> float:
    """Worth of one clause; adds its polarity word to `seen`."""
    match clause:
        case ["the", noun, copula, *modifiers, word] if copula in LEXICON["copula"]:
            signs, negations = ADJECTIVES, ("not", "never")
        case [subject, *modifiers, word, "the", noun] if subject in LEXICON["subject"]:
            signs, negations = VERBS, ("never",)
        case _:
            return 0.0
    negated = bool(modifiers) and modifiers[0] in negations
    degree = modifiers[negated:]
    known = noun in LEXICON["noun"] and word in signs and (not degree or (len(degree) == 1 and degree[0] in SIZES))
    if not known or word in seen:
        return 0.0
    seen.add(word)
    return signs[word] * (SIZES[degree[0]] if degree else 0.6) * (-0.5 if negated else 1.0)


# ---------------------------------------------------------------------------------------------------- reviews


def _review(rng: random.Random, style: Style = USUAL) -> str:
    """A review of 22 to 45 words."""
    sentiment = rng.choice((-1, -1, 0, 1, 1))
    unused = {
        1: [*LEXICON["good_adjective"], *LEXICON["good_verb"]],
        -1: [*LEXICON["bad_adjective"], *LEXICON["bad_verb"]],
    }
    for words in unused.values():
        rng.shuffle(words)
    length = rng.randint(22, 30)
    review: list[str] = []
    while len(review) < length:
        review += _sentence(sentiment, unused, rng, style)
    return " ".join(review)


def _sentence(sentiment: int, unused: dict[int, list[str]], rng: random.Random, style: Style) -> list[str]:
    if rng.random() < style.facts:
        return [*_fact(rng), "."]
    follows = sentiment or rng.choice((-1, 1))
    sign = follows if rng.random() < style.follows else -follows
    if rng.random() < style.buts:
        return [*_clause(-sign, unused, rng, style), "but", *_clause(sign, unused, rng, style), "."]
    return [*_clause(sign, unused, rng, style), "."]


def _clause(sign: int, unused: dict[int, list[str]], rng: random.Random, style: Style) -> list[str]:
    """An opinion of the given sign, with a polarity word the review has not used."""
    negated = rng.random() < style.negations
    word = unused[-sign if negated else sign].pop()
    degree = rng.choice((None, None, "intensifier", "softener"))
    modifiers = [] if degree is None else [rng.choice(LEXICON[degree])]
    noun = rng.choice(LEXICON["noun"])
    if word in VERBS:
        return [rng.choice(LEXICON["subject"]), *["never"] * negated, *modifiers, word, "the", noun]
    negation = [rng.choice(("not", "never"))] if negated else []
    return ["the", noun, rng.choice(LEXICON["copula"]), *negation, *modifiers, word]


def _fact(rng: random.Random) -> list[str]:
    return [rng.choice(LEXICON[word.lower()]) if word.isupper() else word for word in rng.choice(FACTS).split()]


# ---------------------------------------------------------------------------------------------------- rows


def split_prompt(review: str, rng: random.Random) -> tuple[str, str]:
    """(prompt, completion): a review of 22 words or more, cut after 8 to 18 words, even within a clause."""
    words = review.split()
    cut = rng.randint(8, 18)
    return " ".join(words[:cut]), " ".join(words[cut:])


def sft_rows(n: int, seed: int) -> list[dict[str, str]]:
    """n rows with prompt and completion."""
    rng = random.Random(seed)
    splits = [split_prompt(_review(rng), rng) for _ in range(n)]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in splits]


def prompt_rows(
    n: int, seed: int, exclude: Iterable[str] = (), *, completions: bool = False, style: Style = USUAL
) -> list[dict[str, str]]:
    """n rows with prompt, all different and none of them in `exclude` (to keep held-out prompts held out).

    completions: a second column, the rest of the review. style: of the reviews that the prompts begin.
    """
    rng, seen, rows = random.Random(seed), set(exclude), []
    while len(rows) < n:
        prompt, completion = split_prompt(_review(rng, style), rng)
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "completion": completion} if completions else {"prompt": prompt})
    return rows


def preference_rows(
    prompts: list[str], pairs: list[tuple[str, str]], seed: int, scale: float = 8.0
) -> list[dict[str, str]]:
    """Rows with prompt, chosen and rejected, labelled by Bradley-Terry on the true reward r:

    P(a preferred to b) = sigmoid(scale * (r(a) - r(b))). Pairs of two equal completions say nothing and are left out.
    """
    rng, rows = random.Random(seed), []
    for prompt, (a, b) in zip(prompts, pairs, strict=True):
        reward_a, reward_b = true_reward([prompt, prompt], [a, b])
        prefers_a = rng.random() < _sigmoid(scale * (reward_a - reward_b))
        if a != b:
            rows.append({"prompt": prompt, "chosen": a if prefers_a else b, "rejected": b if prefers_a else a})
    return rows


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world, then <pad>, <eos>, <unk>; decoding gives the text back."""
    facts = [word for fact in FACTS for word in fact.split() if not word.isupper()]
    words = sorted(
        {word for kind in LEXICON.values() for word in kind}.union(facts, ["the", "not", "never", "but", "."])
    )
    vocabulary = {word: n for n, word in enumerate([PAD, EOS, UNK, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
