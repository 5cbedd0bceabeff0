"""A checkpoint of another model is refused with what differs, in one sentence; n-grams need the tokenizer's BOS."""

import pytest

from megachat.config import load_config
from megachat.data.tokenizer import load_tokenizer
from megachat.errors import UserError
from megachat.planning.plan import resolve_plan
from megachat.programs.job_inputs import check_document_start
from megachat.train.state import check_checkpoint
from tests.unit.convert.checkpoints import VOCAB_SIZE, make_run, step_folder

NGRAM = {"blocks": [0, 2], "rows": 50, "width": 12}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, ngram=ngram) for name, ngram in (("with", NGRAM), ("without", {}))}


def check(run, *settings):
    config = load_config(run / "config.json", settings)
    plan, tokenizer = resolve_plan(config, 1, VOCAB_SIZE), load_tokenizer(run / "tokenizer")
    check_document_start(plan, tokenizer)
    return check_checkpoint(step_folder(run), plan, tokenizer, config)


def refusal(run, *settings) -> str:
    with pytest.raises(UserError) as refused:
        check(run, *settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_same_model_is_accepted(runs):
    assert check(runs["with"])["model"]["ngram"]["rows"] == 50 and check(runs["without"])["model"]["ngram"] is None
    check(runs["with"], "run.seed=3", "ngram.storage=host")
    check(runs["without"], "ngram.optimizer=rowwise")  # has no effect
    assert "state of ngram.optimizer=adamw, but rowwise is" in refusal(runs["with"], "ngram.optimizer=rowwise")


def test_differences_are_listed(runs):
    text = refusal(runs["with"], "ngram.rows=60", "ngram.seed=1", "model.qk_scale=1.5")
    assert (
        "holds another model: qk_scale 1.2 (configured: 1.5), ngram.rows 50 (configured: 60), ngram.seed 0 (co" in text
    )
    assert "ngram yes (configured: no)" in refusal(runs["with"], "ngram.blocks=[]")
    assert "ngram no (configured: yes)" in refusal(runs["without"], "ngram.blocks=[1]")
    assert "ngram.blocks (0, 2) (configured: (0, 1))" in refusal(runs["with"], "ngram.blocks=[1,0]")
    assert "ngram.sign_trick True (configured: False)" in refusal(runs["with"], "ngram.sign_trick=false")


def test_documents_begin_with_the_tokenizers_bos(runs):
    wrong = f"ngram.bos is 5, but documents begin with {VOCAB_SIZE - 9}, the tokenizer's BOS: set ngram.bos="
    assert wrong in refusal(runs["with"], "ngram.bos=5")
