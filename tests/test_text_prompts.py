import pytest
import torch

from vtv_nnsight.text_prompts import TextLayout, TextPrompts

LAYOUT = TextLayout("Q: {input}\nA: {output}\n\n", shots=1, stop="\n\n")


def prompts(words=("big", "hot", "up"), answers=(" small", " cold", " down")):
    queries = [f"Q: {word}\nA:" for word in words]
    return TextPrompts([f"Q: in\nA: out\n\n{query}" for query in queries], answers, LAYOUT, queries)


def test_a_lone_text_is_a_batch_of_one_without_a_truth():
    one = TextPrompts("The opposite of hot is")
    assert one.texts == one.query_texts == ("The opposite of hot is",) and one.answers is None
    assert one.query_only() is one and one.layout.num_positions == 1


def test_query_only_drops_the_examples_and_one_shot_brings_them_back():
    few = prompts()
    zero = few.query_only()
    assert zero.texts == few.query_texts and zero.answers == few.answers and zero.layout.shots == 0
    assert zero[[2, 0]].one_shot().texts == (few.texts[2], few.texts[0])
    assert TextPrompts.cat([zero[:1], zero[1:]]).one_shot().texts == few.texts
    assert few.one_shot() is few


@pytest.mark.parametrize(
    ("rows", "kept"),
    [(1, [1]), (-1, [2]), (slice(1, None), [1, 2]), ([2, 2], [2, 2]), ([], []), (torch.tensor([2, 0]), [2, 0]),
     (torch.tensor([True, False, True]), [0, 2]), (torch.tensor(1), [1])],
)  # fmt: skip
def test_rows_are_always_a_batch(rows, kept):
    few = prompts()
    some = few[rows]
    assert some.texts == tuple(few.texts[i] for i in kept) and some.answers == tuple(few.answers[i] for i in kept)
    assert some.queries.tolist() == few.queries[kept].tolist()
    with pytest.raises(IndexError):
        few[3]


def test_split_and_cat_are_inverse():
    few = prompts()
    again = TextPrompts.cat(list(few.split(2)))
    assert (again.texts, again.answers, again.digest) == (few.texts, few.answers, few.digest)
    assert torch.equal(again.identifiers, few.identifiers) and len(list(few)) == 3


def test_queries_tell_equal_queries_from_others():
    numbers = prompts(("big", "hot", "big"), (" small", " cold", " tiny")).queries
    assert numbers[0] == numbers[2] != numbers[1] and numbers.dtype == torch.long


def test_the_digest_tells_texts_and_answers_apart():
    digests = {prompts().digest, prompts(answers=(" small", " cold", " off")).digest, prompts().query_only().digest}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TextPrompts(["a", "b"], [" c"]), "there are 1 answers for 2 texts"),
        (lambda: TextPrompts(["a", " "]), "number 1 of texts is empty"),
        (lambda: TextPrompts(["a"], [" "]), "number 0 of answers is empty"),
        (lambda: TextLayout(shots=-1), "shots=-1"),
        (lambda: TextPrompts.cat([]), "no prompts"),
        (lambda: TextPrompts.cat([prompts(), prompts().query_only()]), "cannot share a batch"),
        (lambda: TextPrompts.cat([TextPrompts("a"), TextPrompts("a", " b")]), "some of these prompts have answers"),
    ],
)
def test_what_is_no_batch_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_prompt_is_shown_as_text():
    assert repr(prompts()) == (
        "TextPrompts(3 prompts, 1 example(s), the first: 'Q: in\\nA: out\\n\\nQ: big\\nA:' → ' small')"
    )
