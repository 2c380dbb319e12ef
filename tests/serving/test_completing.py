"""Completions: what a plain greedy loop over one prompt at a time gives; scores as training counts them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import ParamsError
from pipeline.serving.predictor import Predictor
from tests.serving.folders import make_tuned
from tests.tuning.conftest import GOOD, PLAIN, write_decoder

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [
    "the film was good verdict :",
    None,
    "bad",
    "the day felt " * 12 + "sad verdict :",
    "a",
    "  ",
    "road song",
]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def decoder(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base = write_decoder(request.param, root / "base")
    options = {"kind": "causal", "text": ("ask",), "label": "say", "max_length": 24}
    model = make_tuned(root / "tuned", base, (), **options)
    return root / "tuned", model, base


def greedy(model, base, prompt, new):
    """The likeliest token, again and again."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(prompt)["input_ids"]
    start = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    ids = ids if len(ids) <= 24 - new else start + ids[len(ids) - (24 - new - len(start)) :]
    made = []
    with torch.no_grad():
        while len(made) < new:
            made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
            if made[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_completions_are_the_greedy_ones(decoder, batch_size):
    folder, model, base = decoder
    predictor = Predictor(folder, batch_size=batch_size, max_new_tokens=8, device="cpu")
    answers = predictor.answer({"ask": PROMPTS})
    assert answers.missing == {"ask": 2} and answers.cut == 1
    wanted = [
        None if prompt is None or not prompt.strip() else greedy(model, base, prompt, 8) for prompt in PROMPTS
    ]
    assert answers.columns["prediction"].to_pylist() == wanted
    assert len(set(wanted)) > 3


def test_predict_and_evaluate_by_the_command(decoder, tmp_path):
    folder, model, base = decoder
    rows = [{"ask": f"{word} verdict :", "say": f"{PLAIN[i]} {word}"} for i, word in enumerate(GOOD)]
    rows += [{"ask": "", "say": "good"}, {"ask": "sad", "say": None}]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))

    def run(*arguments):
        done = CliRunner().invoke(
            app, [str(a) for a in (*arguments, "-d", folder, "-i", source, "--device", "cpu")]
        )
        assert done.exit_code == 0, (done.output, done.exception)
        return done

    run("predict", "-o", tmp_path / "out.jsonl", "--max-new-tokens", 5)
    found = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == [greedy(model, base, row["ask"], 5) if row["ask"] else None for row in rows]
    done = run("evaluate", "--json")
    assert "1 of 12 rows lack 'say'" in done.stderr and "1 rows lack 'ask'" in done.stderr
    (result,) = json.loads(done.stdout)
    right, total = 0, 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    for row in rows[:10]:
        before = tokenizer(row["ask"])["input_ids"]
        after = [*tokenizer(row["say"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before + after])).logits[0]
        right += int((logits[len(before) - 1 : -1].argmax(1) == torch.tensor(after)).sum())
        total += len(after)
    assert result["rows"] == 10 and result["metric"] == "token_accuracy"
    assert result["scores"]["token_accuracy"] == pytest.approx(right / total)
    assert result["scores"]["perplexity"] > 1


def test_no_room_for_a_prompt_is_refused(decoder):
    with pytest.raises(ParamsError, match="--max-new-tokens 23: the model takes 24 tokens, prompt and completion"):
        Predictor(decoder[0], max_new_tokens=23, device="cpu").answer({"ask": ["good"]})
