"""`rlhf-fast data`: what it shows of a file is what the stage trains on."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_fast import cli
from rlhf_fast.config import DataConfig, SFTConfig
from rlhf_fast.data.stage_rows import encode_stage
from rlhf_fast.report import doctor
from rlhf_fast.report.inspection import inspect, show
from tests.support.stages import write_rows
from tests.support.templates import byte_tokenizer


def turn(role, content):
    return {"role": role, "content": content}


ASK = [turn("user", "Name a colour.")]
BLUE, RED = turn("assistant", "Blue."), turn("assistant", "Red.")
SFT = [
    {
        "messages": [
            turn("system", "Brief."),
            *ASK,
            turn("assistant", "Blue."),
            turn("user", "More."),
            turn("assistant", "Red."),
        ]
    },
    {"prompt": "The film was", "completion": " a joy." * 20},
    {"prompt": "It is " * 20, "completion": "so"},
    {"prompt": "x", "completion": ""},
    {"prompt": "a"},
    {"prompt": [turn("user", "<|im_end|>"), turn("assistant", "The")], "completion": " end"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory, tokenizer = tmp_path_factory.mktemp("qwen3"), byte_tokenizer("qwen3")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def sft(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", SFT)


def test_what_is_shown_is_what_is_trained(model, sft):
    """The kept tokens of every text are the stage's example, its trained tokens those of the mask."""
    tokenizer = byte_tokenizer("qwen3")
    config = DataConfig(data=sft, model=model, max_length=80, max_prompt_length=60)
    found = inspect(sft, tokenizer, config)
    good = [row for row in SFT if "completion" in row or "messages" in row]
    stage = SFTConfig(model=model, output_dir="o", train_data="t", max_length=80, max_prompt_length=60)
    examples = encode_stage("sft", good, tokenizer, stage).examples
    assert len(found.examples) == len(examples) == 6 and found.rows == 6
    for shown, example in zip(found.examples, examples, strict=True):
        ((_, pieces),) = show(shown, tokenizer)
        kept = [(token, piece.kind != "prompt") for piece in pieces if piece.kind != "lost" for token in piece.ids]
        assert kept == list(zip(*example, strict=True))
        assert "".join(piece.text for piece in pieces) == tokenizer.decode([t for p in pieces for t in p.ids])
        ends = [piece for piece in pieces if piece.kind == "end"]
        assert [piece.text for piece in ends] == ["<|im_end|>"] * (not shown.cut.answers[0])
    assert [example.number for example in found.examples] == [1, 1, 2, 3, 4, 6]
    assert [(e.cut.prompt, e.cut.answers) for e in found.examples[2:4]] == [(0, (73,)), (60, (0,))]
    assert found.refused == [
        f"{sft}, line 5: missing completion; a row of kind sft needs prompt, completion (or messages)"
    ]


def test_oddities(model, sft):
    found = inspect(sft, byte_tokenizer("qwen3"), DataConfig(data=sft, model=model, max_length=130))
    several = "one of 2 texts, because the template writes earlier turns otherwise"
    assert [example.odd for example in found.examples] == [
        [several],
        [several],
        ["the answer's end is lost: the row does not teach where to stop"],
        [],
        ["an answer is empty"],
        [
            "the prompt is an answer that has begun: the completion goes on in it",
            "the special token <|im_end|> is spelled in the row's text",
        ],
    ]


def odd(tmp_path, family, stage, *rows, template=None):
    tokenizer = byte_tokenizer(family)
    tokenizer.chat_template = template or tokenizer.chat_template
    path = write_rows(tmp_path / "odd.jsonl", list(rows))
    return [example.odd for example in inspect(path, tokenizer, DataConfig(data=path, model="m", stage=stage)).examples]


def test_oddities_of_pairs_and_templates(tmp_path):
    same = {"prompt": ASK, "chosen": "Blue.", "rejected": "Blue.", "chosen_finished": True}
    cut = {**same, "rejected": "Red.", "rejected_finished": False}
    assert odd(tmp_path, "gemma", "dpo", same, cut) == [
        ["two answers are equal"],
        ["marked as cut off: no end is trained"],
    ]
    rows = [{"prompt": [turn("system", "Be brief."), *ASK]}, {"prompt": "<s>[INST]hi[/INST]"}]
    without = "{% for m in messages if m.role == 'user' %}{{ bos_token + bos_token + m.content }}{% endfor %}"
    assert odd(tmp_path, "mistral", "ppo", rows[0], template=without) == [
        ["two BOS in front", "the template does not write the text of a message of the role system"]
    ]
    as_text = "the prompt is a text in the form of the chat template: read as a conversation"
    assert odd(tmp_path, "mistral", "ppo", rows[1]) == [[as_text]]
    talk = [*ASK, turn("assistant", "Blue."), turn("user", "More."), turn("assistant", "Red."), turn("user", "Bye.")]
    assert odd(tmp_path, "plain words", "sft", {"messages": talk}) == [
        ["a turn has no end: the template writes none behind it"]
    ]


@pytest.mark.parametrize("stage", ["reward", "dpo", "kto", "rloo", "pairs"])
def test_every_stage_shows_its_rows(model, tmp_path, stage, capsys):
    rows = [{"prompt": text, "chosen": " Blue.", "rejected": " Red."} for text in ("It is", "x")]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    assert cli.main(["data", file, "--model", model, "--stage", stage]) == 0
    shown = capsys.readouterr().out
    assert f"{stage} reads rows of kind" in shown
    answers = {"kto": ["good: It is⟦ Blue.⟧⟦<|im_end|>⟧■"], **dict.fromkeys(("rloo", "pairs"), ["\nIt is\n"])}
    for answer in answers.get(stage, ["chosen: ⟦ Blue.⟧⟦<|im_end|>⟧■", "rejected: ⟦ Red.⟧⟦<|im_end|>⟧■"]):
        assert answer in shown


def test_the_command(model, sft, tmp_path, capsys):
    page = tmp_path / "page.html"
    flags = ["--model", model, "--max-length", "80", "--row", "2", "6", "--html", str(page)]
    assert cli.main(["data", sft, *flags]) == 1  # a row would stop the stage
    out, error = capsys.readouterr()
    assert error.startswith("rlhf-fast: data: 1 of 6 rows would stop the stage; the first: ") and "line 5" in error
    assert f"{sft}, line 2: 80 tokens, 68 trained, answer lost 73" in out and "line 1:" not in out
    assert "The film was⟦ a joy." in out and "⟨y. a joy. a joy." in out
    assert "line 6" in out and "! the special token <|im_end|> is spelled in the row's text" in out
    assert "  1  an answer is empty  (rows 4)" in out
    html = page.read_text()
    assert "&lt;|im_end|&gt;" in html and "<|im_end|>" not in html  # the rows' text is text
    assert '<span class="trained"> end</span><span class="end">&lt;|im_end|&gt;</span>' in html
    assert "http" not in html.replace("https", "http")
    assert cli.main(["data", sft, *flags]) == 1 and page.read_text() == html  # a page takes an earlier page's place
    capsys.readouterr()
    rows = Path(sft).read_bytes()
    assert cli.main(["data", sft, "--model", model, "--html", sft]) == 1 and Path(sft).read_bytes() == rows
    assert "html: expected a new file or an earlier page, got" in capsys.readouterr().err
    assert cli.main(["data", sft, "--model", model, "--row", "5"]) == 1
    assert "row: expected numbers of rows of" in capsys.readouterr().err
    assert cli.main(["data", sft, "--model", model, "--stage", "ppo", "--max-length", "9"]) == 1
    assert "max_length: expected none with ppo, which reads prompts; got 9" in capsys.readouterr().err
    assert cli.main(["data", sft, "--model", model, "--stage", "dpp"]) == 2
    assert "stage: expected one of sft, reward, ppo," in capsys.readouterr().err


def test_colours_of_a_terminal(model, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.jsonl", [SFT[5]])
    with open(tmp_path / "out", "w+") as out:
        console = Console(file=out, force_terminal=True, color_system="standard", highlight=False, width=80)
        monkeypatch.setattr(doctor, "Console", lambda **options: console)
        doctor.run(DataConfig(data=file, model=model))
        out.seek(0)
        text = out.read()
    assert "\x1b[32m end\x1b[0m\x1b[1;7;32m<|im_end|>\x1b[0m" in text and "⟦" not in text


def test_long_texts_are_shortened(model, tmp_path, capsys):
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "It is " * 100, "completion": "so"}])
    config = DataConfig(data=file, model=model, max_length=2000, max_prompt_length=1000)
    doctor.run(config)
    short = capsys.readouterr().out
    assert "[... 200 letters ...]" in short and "[... 579 ...]" in short
    doctor.run(dataclasses.replace(config, row=[1]))
    assert "letters" not in capsys.readouterr().out


def test_a_file_that_cannot_be_read_is_one_error(model, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert cli.main(["data", str(tmp_path / "bad.jsonl"), "--model", model]) == 1
    assert capsys.readouterr().err.startswith(f"rlhf-fast: {tmp_path / 'bad.jsonl'}, line 1: not JSON")
    rows = [{"prompt": ASK, "completion": json.dumps({})}, {"prompt": [turn("tool", "x")], "completion": "y"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    assert cli.main(["data", file, "--model", model, "--chat-template", str(template)]) == 1
    out, error = capsys.readouterr()
    assert "1 of 2 rows would stop the stage" in error and "line 2" in error and "no tools" in error
    assert "line 1:" in out
