"""A model in training against lm_eval's own HFLM on the exported folder: the same requests, the same answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from cpt.data.place import Place
from cpt.eval.live_model import LiveModel
from cpt.eval.model_tokenizer import tokenizer_as_exported
from cpt.eval.scoring import AskingError, Scorer, ScoringSpec
from cpt.model.export import ExportSpec, export_checkpoint
from cpt.model.kernels import prepare_model
from cpt.train.loss_head import attach_loss_head

TEXT = "the old house stood by a river and people walked over the bridge to the town; it rained all day. "
POSITIONS = 48


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE that puts a BOS before every text, as Llama's does."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    raw.train_from_iterator([TEXT] * 5, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(outside_a_job: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, LiveModel, Scorer]]:
    """HFLM on the exported folder, and the live model with its scorer."""
    root = tmp_path_factory.mktemp("live")
    tokenizer = write_tokenizer(root / "tokenizer")
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=320, max_position_embeddings=POSITIONS, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    export_checkpoint(model.named_parameters(), model.config, ExportSpec(root / "exported", tokenizer=tokenizer))
    prepare_model(model, "sdpa")
    attach_loss_head(model, "sdpa", vocab_size=300, device="cpu")
    spec = ScoringSpec(seq_len=32, micro_batch_size=3, backend="sdpa", device=torch.device("cpu"), place=Place())
    scorer = Scorer(model, spec, should_stop=lambda: False)
    live = LiveModel(scorer, tokenizer_as_exported(tokenizer, model.config), model.config)
    yield HFLM(str(root / "exported"), device="cpu", dtype="float32", batch_size=4), live, scorer


def requests(kind: str, *arguments: tuple[str, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


PROMPT = "the old house stood by"
ASKED = [
    (PROMPT, " a river"),
    (PROMPT, " a bridge to the town"),
    (PROMPT + " ", "a river"),  # the space belongs to the answer
    ("", TEXT[:20]),
    ("", "x"),
    ("<s>" + PROMPT, " a river"),  # BOS is there already
    (TEXT * 3, " it rained"),  # longer than the context
    (TEXT, ";"),
    *((PROMPT + " the", letter) for letter in (" a", " b", " c", " d", " t")),  # one-token answers to one prompt
]


def test_log_likelihoods_and_greedy_answers_are_those_of_hflm(pair: tuple[Any, LiveModel, Scorer]) -> None:
    theirs, live, scorer = pair
    expected = theirs.loglikelihood(requests("loglikelihood", *ASKED), disable_tqdm=True)
    found = scorer.lead(lambda: live.loglikelihood(requests("loglikelihood", *ASKED)))
    assert found is not None
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert [each[1] for each in found] == [each[1] for each in expected]


def test_what_greedy_decoding_gives_is_called_greedy(pair: tuple[Any, LiveModel, Scorer]) -> None:
    theirs, live, scorer = pair
    asked = []
    for end in (end for end in range(5, 40) if TEXT[end - 1] != " "):  # a space would go to the answer
        ids = live.tok_encode(TEXT[:end])
        with torch.no_grad():
            best = int(theirs.model(torch.tensor([ids])).logits[0, -1].argmax())
        answer = live.tokenizer.decode([best])
        if live.tok_encode(TEXT[:end] + answer) == [*ids, best]:  # it does not join the prompt's last token
            asked.append((TEXT[:end], answer))
    assert asked
    found = scorer.lead(lambda: live.loglikelihood(requests("loglikelihood", *asked)))
    assert found is not None and all(greedy for _, greedy in found)


def test_texts_of_any_length_are_those_of_hflm(pair: tuple[Any, LiveModel, Scorer]) -> None:
    theirs, live, scorer = pair
    texts = [(TEXT[:7],), (TEXT,), (TEXT * 7,)]
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    found = scorer.lead(lambda: live.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)))
    assert found == pytest.approx(expected, abs=1e-4 * 7)


def test_requests_of_which_the_beginning_is_not_read_are_named(pair: tuple[Any, LiveModel, Scorer]) -> None:
    _, live, scorer = pair
    scorer.lead(lambda: live.loglikelihood(requests("loglikelihood", *ASKED)))
    assert live.max_length == POSITIONS
    assert live.truncated == {(TEXT * 3, " it rained")}


def test_an_answer_longer_than_the_context_is_scored_by_its_end_and_named(pair: tuple[Any, LiveModel, Scorer]) -> None:
    _, live, scorer = pair
    live.truncated.clear()
    found = scorer.lead(lambda: live.loglikelihood(requests("loglikelihood", ("so ", TEXT * 4))))
    assert found is not None and found[0][0] < 0
    assert live.truncated == {("so ", TEXT * 4)}


def test_an_answer_without_a_token_is_refused(pair: tuple[Any, LiveModel, Scorer]) -> None:
    _, live, scorer = pair
    with pytest.raises(AskingError, match=r"no tokens of its own: \(prompt, answer\) = \('so', ''\)"):
        scorer.lead(lambda: live.loglikelihood(requests("loglikelihood", ("so", ""))))


def test_a_model_in_training_does_not_generate(pair: tuple[Any, LiveModel, Scorer]) -> None:
    with pytest.raises(NotImplementedError, match="cpt eval watch"):
        pair[1].generate_until([])
