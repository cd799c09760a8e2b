"""Text against what mmdet and its tokenizer compute: every id, position, mask bit, span and token set."""

import json
import pickle

import pytest
import torch

from groundingdino.inputs.text import (
    CaptionTokenizer,
    EncodedCaption,
    category_prompt,
    clean_name,
    collate_text,
    default_tokenizer,
    finish_caption,
    positive_map,
    split_by_tokens,
    split_names,
    sub_sentences,
    tokens_of_spans,
)


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "data" / "text.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return default_tokenizer()


def check_row(batch, row, case):
    length = len(case["input_ids"])
    assert batch.token_ids[row].tolist() == case["input_ids"]
    assert batch.position_ids[row].tolist() == case["position_ids"]
    rows = ["".join("01"[int(bit)] for bit in line) for line in batch.attends[row].tolist()]
    assert rows == case["attention_rows"]
    assert batch.attends.shape[1:] == (length, length)


def test_captions_alone_have_the_golden_ids_positions_and_masks(cases, tokenizer):
    for case in cases["single"]:
        batch = collate_text([tokenizer.encode(case["caption"])])
        check_row(batch, 0, case)
        assert bool(batch.valid.all())


def test_a_batch_has_the_golden_ids_positions_and_masks(cases, tokenizer):
    encoded = [tokenizer.encode(case["caption"]) for case in cases["batched"]]
    batch = collate_text(encoded)
    for row, case in enumerate(cases["batched"]):
        check_row(batch, row, case)
        assert batch.valid[row].tolist() == [column < len(encoded[row].token_ids) for column in range(12)]


def test_category_prompts_have_the_golden_captions_spans_and_tokens(cases, tokenizer):
    for case in cases["class_prompts"]:
        prompt = category_prompt(case["names"])
        assert list(prompt.names) == case["cleaned"] == [clean_name(name) for name in case["names"]]
        assert prompt.caption == case["caption"]
        assert [[list(span) for span in spans] for spans in prompt.spans] == case["tokens_positive"]
        tokens = tokens_of_spans(tokenizer.encode(prompt.caption), prompt.spans)
        assert {str(index + 1): tokens[index] for index in range(len(tokens))} == case["label_to_tokens"]


def test_explicit_spans_have_the_golden_tokens(cases, tokenizer):
    for case in cases["span_prompts"]:
        encoded = tokenizer.encode(case["caption"])
        assert tokens_of_spans(encoded, case["tokens_positive"]) == case["tokens"]
        bits = positive_map(encoded, case["tokens_positive"], num_tokens=20)
        assert [row.nonzero().flatten().tolist() for row in bits] == case["tokens"]
        assert bits.dtype == torch.bool and bits.shape == (len(case["tokens"]), 20)


def test_ids_offsets_and_token_sets_equal_transformers_fast_tokenizer(golden, cases, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizerFast(str(golden / "tiny" / "bert" / "vocab.txt"), do_lower_case=True)
    captions = [case["caption"] for case in cases["single"]]
    captions += [
        "",
        "[MASK] a [SEP] b [sep]",
        "한국 자동차. ½ cup. ﬁsh",
        "supercalifragilistic" * 8,
        "a\tb\n c\u200bd\u0301e",
    ]
    for caption in captions:
        ours, reference = tokenizer.encode(caption), theirs(caption, return_offsets_mapping=True)
        assert list(ours.token_ids) == reference["input_ids"]
        assert [tuple(pair) for pair in ours.offsets] == reference["offset_mapping"]
        for start in range(len(caption)):
            token = reference.char_to_token(start)
            assert token is None or tokens_of_spans(ours, [[(start, start + 1)]]) == [[token]]


def test_a_batch_row_is_the_caption_alone_when_the_caption_is_finished(tokenizer):
    captions = [finish_caption(text) for text in ("dog", "left most guy", "is it a bus? the red one", "a.", "x? y?")]
    batch = collate_text([tokenizer.encode(caption) for caption in captions])
    for row, caption in enumerate(captions):
        alone = collate_text([tokenizer.encode(caption)])
        length = alone.token_ids.shape[1]
        assert torch.equal(batch.attends[row, :length, :length], alone.attends[0])
        assert not batch.attends[row, :length, length:].any()
        assert torch.equal(batch.position_ids[row, :length], alone.position_ids[0])


def blocks_by_loop(ids):
    """The definition, token by token: (attends, positions) of one row."""
    attends = [[i == j for j in range(len(ids))] for i in range(len(ids))]
    positions = [0] * len(ids)
    before = 0
    for column, token in enumerate(ids):
        if token not in (101, 102, 1012, 1029):
            continue
        if 0 < column < len(ids) - 1:
            for i in range(before + 1, column + 1):
                positions[i] = i - before - 1
                for j in range(before + 1, column + 1):
                    attends[i][j] = True
        before = column
    return attends, positions


def test_random_rows_have_the_sub_sentences_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    alphabet = torch.tensor([0, 7, 8, 9, 102, 1012, 1012, 1029])
    for length in (2, 3, 9, 30):
        rows = alphabet[torch.randint(len(alphabet), (40, length), generator=generator)]
        rows[:, 0] = 101
        attends, positions = sub_sentences(rows)
        for row, mask, position in zip(rows.tolist(), attends.tolist(), positions.tolist(), strict=True):
            assert (mask, position) == blocks_by_loop(row)


def test_finish_caption_appends_as_mmdet_does():
    assert [finish_caption(text) for text in ("dog", "dog.", "dog. ", "")] == ["dog. ", "dog.", "dog. . ", ". "]


def test_a_long_caption_is_truncated_and_keeps_its_closing_sep(tokenizer):
    encoded = tokenizer.encode("cat. " * 200)
    assert len(encoded.token_ids) == 402
    batch = collate_text([encoded, tokenizer.encode("dog. ")])
    assert batch.token_ids.shape == (2, 256)
    assert batch.token_ids[0, 0] == 101 and batch.token_ids[0, -1] == 102
    assert batch.token_ids[0, 1:-1].tolist() == list(encoded.token_ids[1:255])
    assert positive_map(encoded, [[(0, 3)], [(995, 998)]], 256).sum(1).tolist() == [1, 0]


def test_spans_that_start_before_the_caption_are_refused(tokenizer):
    encoded = tokenizer.encode("a dog. ")
    with pytest.raises(ValueError, match="begins before the caption"):
        tokens_of_spans(encoded, [[(-1, 3)]])
    assert tokens_of_spans(encoded, [[(90, 95)], [(2, 2)], []]) == [[], [], []]


def test_empty_categories_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'\(weapon\)' is empty"):
        category_prompt(["cat", "(weapon)"])
    with pytest.raises(ValueError, match="no categories"):
        category_prompt([])
    with pytest.raises(ValueError, match="must be a list"):
        category_prompt("cat . dog")
    with pytest.raises(ValueError, match="no category"):
        split_names(" . . ")


def test_a_dot_separated_string_gives_its_names():
    assert split_names("cat . remote control . dog.") == ["cat", "remote control", "dog"]


def test_pieces_cover_all_names_in_order_and_fit_the_budget(tokenizer):
    names = [f"thing number {index} of_its kind (x)" for index in range(1203)]
    pieces = split_by_tokens(names, tokenizer)
    assert [index for piece in pieces for index in piece] == list(range(1203))
    sizes = [len(tokenizer.encode(category_prompt([names[i] for i in piece]).caption).token_ids) for piece in pieces]
    assert max(sizes) <= 256
    for piece, following in zip(pieces, pieces[1:], strict=False):  # and no piece could have taken one more
        longer = category_prompt([names[i] for i in (*piece, following[0])])
        assert len(tokenizer.encode(longer.caption).token_ids) > 256
    assert split_by_tokens(["cat"], tokenizer) == [range(1)]


def test_a_name_that_fits_in_no_prompt_is_refused_by_name(tokenizer):
    fitting = " ".join(["x"] * 253)
    assert split_by_tokens(["cat", fitting], tokenizer) == [range(1), range(1, 2)]
    with pytest.raises(ValueError, match="is 254 tokens long; a prompt holds 253"):
        split_by_tokens(["cat", fitting + " x"], tokenizer)
    with pytest.raises(ValueError, match="holds no token"):
        split_by_tokens(["\u200b"], tokenizer)


def test_the_tokenizer_survives_pickling(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (
        copy.encode("a dog. ")
        == tokenizer.encode("a dog. ")
        == EncodedCaption((101, 1037, 3899, 1012, 102), ((0, 0), (0, 1), (2, 5), (5, 6), (0, 0)))
    )


def test_another_vocabulary_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n.\n?\n")
    with pytest.raises(ValueError, match="not the bert-base-uncased vocabulary"):
        CaptionTokenizer(tmp_path / "vocab.txt")
