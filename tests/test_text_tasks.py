"""Tasks of words and texts: lists, templates, splits, prompts, metrics, and what is refused."""

import json
import re
from collections import Counter

import pytest
import torch
from datasets import Dataset

from vtv_nnsight import data, metrics, tasks

PAIRS = {"hot": "cold", "big": "small", "up": "down", "wet": "dry"}
ROWS = [{"a": "fine film", "good": "joy", "bad": "anger"}, {"a": "dull film", "good": "anger", "bad": "joy"}]


@pytest.mark.parametrize("name", tasks.WORDS)
def test_lists_hold_60_to_120_pairs_and_are_found_by_name(name):
    task = tasks.get(name)
    assert 60 <= len(task.rows) <= 120 and task == tasks.words(name) and task.name == name
    assert all(text == text.strip() for row in task.rows for text in row.values())


def test_antonyms_hold_each_word_once():
    words = Counter(word for row in tasks.words("antonym").rows for word in row.values())
    assert words.most_common(1)[0][1] == 1 and len(tasks.WORDS) >= 8


def test_capitals_and_languages_agree_on_countries():
    capital, language = ({row["input"] for row in tasks.words(name).rows} for name in ("capital", "language"))
    assert len(capital & language) > 50


def test_a_prompt_solves_examples_and_ends_where_the_answer_begins():
    prompt = tasks.Words("mine", PAIRS).prompt([{"input": "hot", "output": "cold"}], "big")
    assert prompt.texts == ("Q: hot\nA: cold\n\nQ: big\nA:",) and prompt.answers is None
    assert prompt.query_only().texts == ("Q: big\nA:",)
    arrow = tasks.Words("mine", PAIRS, "{input} ->\n{output};").prompt([], {"input": "big", "output": "small"})
    assert (arrow.texts, arrow.answers, arrow.layout.stop) == (("big ->",), ("\nsmall",), ";")


def test_prompts_are_those_of_the_seed_and_ask_all_rows_equally_often():
    task = tasks.words("plural")
    train, _ = task.split()
    prompts = task.prompts(train, n=2 * len(train), seed=3)
    assert prompts.texts == task.prompts(train, 2 * len(train), 3).texts != task.prompts(train, 2 * len(train)).texts
    assert set(Counter(prompts.query_texts).values()) == {2}
    assert prompts.layout.shots == 8 and prompts.identifiers.shape == (len(prompts), 9)
    assert all(len(set(row)) == 9 for row in prompts.identifiers.tolist())
    answers = {row["input"]: row["output"] for row in task.rows}
    for text, answer in zip(prompts.texts, prompts.answers):
        *examples, query = [part.split("\nA:") for part in text.removeprefix("Q: ").split("\n\nQ: ")]
        assert all(said == f" {answers[word]}" for word, said in examples) and answer == f" {answers[query[0]]}"


@pytest.mark.parametrize("name", tasks.WORDS)
def test_no_input_of_the_tests_is_learned_from(name):
    task = tasks.words(name)
    train, test = task.split(seed=1)
    assert not {row["input"] for row in train} & {row["input"] for row in test}
    assert len(train) + len(test) == len(task.rows) and abs(len(test) - 0.3 * len(task.rows)) < 1
    assert train != task.split(seed=2)[0] and train == task.split(seed=1)[0]


def test_pairs_of_one_kind_that_share_a_word_stay_together_and_are_no_examples_of_each_other():
    pairs = [("big", "small"), ("Small", "big"), ("large", "small")]
    task = tasks.Words("opposite", [(f"{word}{i}", f"{answer}{i}") for i in range(12) for word, answer in pairs])
    for seed in range(5):
        train, test = ({word.casefold() for row in side for word in row.values()} for side in task.split(seed))
        assert test and not train & test
    for text in task.prompts(task.rows, n=36, shots=3).texts:
        *examples, query = [re.findall(r"\d+", part) for part in text.split("\n\n")]
        assert all(numbers[0] != query[0] for numbers in examples)


def test_an_answer_that_many_inputs_share_links_nothing():
    train, test = tasks.words("language").split()
    assert {row["output"] for row in train} & {row["output"] for row in test}


def test_texts_of_any_columns_and_pairs_of_answers():
    task = tasks.Text("mood", Dataset.from_list(ROWS), "Review: {a}\nMood: {good}\n\n", answer=("good", "bad"))
    prompts = task.prompts(ROWS, n=2, shots=1)
    assert sorted(zip(prompts.query_texts, prompts.answers, prompts.wrong_answers)) == [
        ("Review: dull film\nMood:", " anger", " joy"), ("Review: fine film\nMood:", " joy", " anger"),
    ]  # fmt: skip
    assert task.metric == metrics.PREFERENCE and task.needs == "good" and prompts[:1].wrong_answers
    mine = metrics.Metric("length", lambda said, _: torch.tensor([len(text) for text in said]), False, "↓", "text")
    assert tasks.Text("mood", ROWS, "{a}: {good}\n", answer="good", metric=mine).score(["ab"], ["a"]) == 2


def test_metrics_of_texts():
    logits, ids = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([[1, 0], [2, 1]])
    assert metrics.first_token(logits, ids).tolist() == [1, 0] == metrics.first_token(logits, ids[:, :1]).tolist()
    assert metrics.preference(logits, ids).tolist() == [1, 0]
    assert metrics.exact_match([" cold\n", "Cold", "cold water"], [" cold", " cold", " cold"]).tolist() == [1, 0, 0]
    assert tasks.words("antonym").loss(logits, ids).tolist() == [-1, 0]
    assert tasks.scored_by(tasks.words("antonym"), "exact_match").metric == metrics.EXACT_MATCH


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: tasks.words("hypernym"), "'hypernym' is not a list of words; choose from capital, antonym"),
        (lambda: tasks.Words("a/b", PAIRS), "name='a/b' cannot be a file's"),
        (lambda: tasks.Words("one", {"hot": "cold"}), "'one' has 1 row"),
        (lambda: tasks.Words("two", [("hot", "cold"), ("hot", "cool")]), "asks 'Q: hot.* twice"),
        (
            lambda: tasks.Words("mine", data.words()),
            "rows of 'mine' are of antonym, capital, .*; give those of one task",
        ),
        (lambda: tasks.Words("mine", ["hot", "cold"]), "'hot' is not a pair of 'mine'"),
        (lambda: tasks.Words("mine", [("hot", "cold", "cool"), ("a", "b")]), "'cool'. is not a pair of 'mine'"),
        (lambda: tasks.Words("mine", {"hot": "cold", "big": " "}), "row 1 of 'mine' has no 'output'"),
        (lambda: tasks.Words("mine", PAIRS, "{input}\n"), "must hold a column, {output} once"),
        (lambda: tasks.Words("mine", PAIRS, "{output}\n"), "must hold a column"),
        (lambda: tasks.Words("mine", PAIRS, "{input}: {output}"), "and an end of it"),
        (lambda: tasks.Words("mine", PAIRS, "{output} {input}\n"), "must hold a column"),
        (lambda: tasks.Words("mine", PAIRS, "{word}: {output}\n"), "row 0 of 'mine' has no 'word'"),
        (lambda: tasks.Words("mine", {"a": "New York", "b": "Rome"}, "{input}:{output} "), "holds ' ', which ends it"),
        (
            lambda: tasks.Words("mine", PAIRS, metric="iou"),
            "metric='iou' is not a metric here; choose from first_token",
        ),
        (
            lambda: tasks.Colorization(metric="exact_match"),
            "metric='exact_match' is not a metric here; choose from iou",
        ),
        (lambda: tasks.Words("mine", PAIRS).prompts(PAIRS), "row 0 of 'mine' is 'hot'; expected {column: text}"),
        (lambda: tasks.Words("mine", PAIRS).prompts([], n=3), "cannot be made of 0 rows"),
        (lambda: tasks.words("plural").prompts(data.words("plural"), shots=-1), "shots=-1 cannot be made"),
        (
            lambda: tasks.Words("mine", PAIRS).prompts(tasks.Words("mine", PAIRS).rows, shots=4),
            "cannot be made of 4 rows",
        ),
        (lambda: tasks.Words("mine", {"a": "b", "b": "a"}).split(), "no part can be kept for tests"),
        (lambda: tasks.get("antonym+plural"), "joins tasks of texts"),
    ],
)
def test_what_is_no_task_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_files_of_words_are_read(tmp_path):
    rows = [{"input": word, "output": answer} for word, answer in PAIRS.items()]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "mapping.json").write_text(json.dumps(PAIRS), encoding="utf-8")
    (tmp_path / "table.csv").write_text("input,output\nhot,cold\nbig,small\nup,down\nwet,dry\n", encoding="utf-8-sig")
    for name in ("rows.json", "mapping.json", "table.csv"):
        assert list(data.words(tmp_path / name)) == rows, name
        assert tasks.Words("mine", data.words(tmp_path / name)) == tasks.Words("mine", PAIRS)
    assert tasks.Words("mine", data.words("plural")).rows == tasks.words("plural").rows  # whatever the rows call it


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", "[1, 2", "a.json is not a .json or .csv file"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", '"hot"', "holds no rows"),
        ("a.json", '[{"input": "a"}, {"output": "b"}]', "row 1 of .* expected rows of the same columns"),
        ("a.json", '[{"input": ["a"]}]', "row 0 of"),
        ("a.csv", "input,output\nhot,cold,warm\n", "row 0 of"),
        ("a.csv", "input,output\nhot\n", "row 0 of"),
        ("a.csv", "", "holds no rows"),
    ],
)
def test_files_that_are_no_rows_of_texts_are_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        data.words(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is no file, and none of capital"):
        data.words(tmp_path / "missing.csv")


def test_the_source_words_has_a_side_of_every_list():
    train, test = data.split_data("words")
    assert set(train.column_names) == {"task", "input", "output"} and set(test["task"]) == set(tasks.WORDS)
    task = tasks.words("antonym")
    assert task.prompts(train, n=20).texts == task.prompts(task.split()[0], n=20).texts
    assert list(data.words("antonym")) == [{"task": "antonym", **row} for row in task.rows]


def test_a_template_with_braces_ends_answers_as_they_are_written():
    task = tasks.Words("json", {"a": "A", "b": "B"}, '{{"in": "{input}", "out": "{output}"}}\n')
    prompt = task.prompt(task.rows[:1], "b")
    assert task.stop == prompt.layout.stop == '"}\n'
    assert prompt.texts == ('{"in": "a", "out": "A"}\n{"in": "b", "out": "',)


@pytest.mark.parametrize(
    "template",
    [
        "{input -> {output}\n",
        "{input} -> {output}\n{",
        "{input} -> {{output}}\n",
        "{input:d} {output}\n",
        "{} {output}\n",
        3,
    ],
)
def test_what_is_no_template_is_named(template):
    with pytest.raises((TypeError, ValueError), match="template="):
        tasks.Words("x", {"a": "b", "c": "d"}, template)


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([{"input": "a", "output": float("nan")}, {"input": "b", "output": "c"}], "row 0 of 'x' has no 'output'"),
        ({"a": ["b", "c"], "d": "e"}, "give one text as 'output'"),
        (None, "pairs is a NoneType"),
        ([1, 2], "1 is not a pair"),
    ],
)
def test_pairs_that_are_no_texts_are_named(pairs, reason):
    with pytest.raises((TypeError, ValueError), match=reason):
        tasks.Words("x", pairs)


@pytest.mark.parametrize("answer", [(), ("v",), ("v", "v"), ("v", "w", "s")])
def test_an_answer_is_a_column_or_a_pair(answer):
    with pytest.raises(ValueError, match="no pair of columns"):
        tasks.Text("x", [{"q": "a", "v": "b", "w": "c", "s": "d"}] * 2, "{q}: {v}\n", answer=answer)


@pytest.mark.parametrize("arguments", [{"n": 2.5}, {"n": "3"}, {"shots": 1.5}, {"seed": -1}, {"positions": 1.5}])
def test_counts_of_prompts_are_whole_numbers(arguments):
    task = tasks.words("antonym")
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        task.prompts(task.rows, **{"n": 2, "shots": 1} | arguments)
