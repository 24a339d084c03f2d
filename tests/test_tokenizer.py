"""Text cleaning, the end mark, padding, and the cut at 512 tokens, for both kinds of tokenizer file."""

import io

import pytest
import sentencepiece
import tokenizers
import torch
from comfyui_wanflow.wan_core.errors import FileError
from comfyui_wanflow.wan_core.models.tokenizer import END, MAX_TOKENS, PADDING, Tokenizer, clean
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "moves", "left"]


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory):
    """A folder like google/umt5-xxl, with truncation and padding switched on as published files may have it."""
    library = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    library.enable_truncation(4)
    library.enable_padding(length=4)
    folder = tmp_path_factory.mktemp("umt5-xxl")
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def piece_folder(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle moves left", "a blue circle moves left"] * 20), model_writer=model,
        vocab_size=32, hard_vocab_limit=False, pad_id=PADDING, eos_id=END, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize(
    "raw, cleaned",
    [
        ("  a   red\n\tcircle ", "a red circle"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("the Mona Lisa doesnâ€™t smile", "the Mona Lisa doesn't smile"),
        ("", ""),
    ],
)
def test_cleaning(raw, cleaned):
    assert clean(raw) == cleaned


def test_a_batch_is_padded_to_its_longest_text(json_folder):
    tokens = Tokenizer.open(json_folder)(["a red circle moves left", "blue", ""])
    assert tokens.ids.tolist() == [[3, 4, 6, 7, 8, 1], [5, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert tokens.mask.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert tokens.ids.dtype == torch.int64
    assert tokens.lengths == (6, 2, 1)
    assert tokens.cut == ("", "", "") and tokens.cut_counts == (0, 0, 0)


def test_what_does_not_fit_is_reported(json_folder):
    fits = "a " * (MAX_TOKENS - 1)
    tokens = Tokenizer.open(json_folder / "tokenizer.json")([fits, fits + "blue circle"])
    assert tokens.lengths == (MAX_TOKENS, MAX_TOKENS) and tokens.ids[1, -1] == END
    assert tokens.cut == ("", "blue circle") and tokens.cut_counts == (0, 2)


def test_a_sentencepiece_model_works_alike(piece_folder):
    tokens = Tokenizer.open(piece_folder)(["a red circle", "red " * 600])
    assert tokens.lengths[1] == MAX_TOKENS and tokens.cut_counts[1] > 0 and tokens.cut[1].endswith("red red")
    assert tokens.ids[0, tokens.lengths[0] - 1] == END
    library = sentencepiece.SentencePieceProcessor(model_file=str(piece_folder / "spiece.model"))
    assert tokens.ids[0, : tokens.lengths[0]].tolist() == [*library.encode("a red circle"), END]


def test_missing_and_broken_files_are_sentences(tmp_path):
    with pytest.raises(FileError, match="no tokenizer in .* Download the folder google/umt5-xxl"):
        Tokenizer.open(tmp_path)
    for name in ("tokenizer.json", "spiece.model"):
        (tmp_path / name).write_text("<html>not found</html>")
        with pytest.raises(FileError, match=f"{name} is not a readable"):
            Tokenizer.open(tmp_path / name)


def test_equals_transformers(tmp_path):
    """A real Unigram vocabulary, tokenised by the reference's call: padded to 512, cut at 512."""
    library = tokenizers.SentencePieceUnigramTokenizer()
    library.train_from_iterator(
        ["a red circle moves left on a blue background", "the café is closed, isn't it?"] * 10,
        vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False,
    )  # fmt: skip
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    library.save(str(tmp_path / "tokenizer.json"))
    twin = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>", eos_token="</s>")
    texts = ["a red circle", "Is the cafe blue? 红色", "", "moves left " * 300]
    expected = twin(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    tokens = Tokenizer.open(tmp_path)(texts)
    assert torch.equal(tokens.ids, expected.input_ids)
    assert torch.equal(tokens.mask, expected.attention_mask)
