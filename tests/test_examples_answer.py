"""The question answering example: answers that follow from the stories, and a run in small."""

import importlib.util

import jax
import numpy as np
import pytest

from tests.conftest import load_example

pytest.importorskip("matplotlib", reason="examples draw with matplotlib")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def example(monkeypatch):
    module = load_example("answer")
    monkeypatch.setattr(module, "TESTED", 40)
    return module


def follow(story):
    """Where people and things are at the end of a story, read sentence by sentence; raises where it makes no sense."""
    people, things, held = {}, {}, {}
    for sentence in story.removesuffix(" .").split(" . "):
        person, verb, *_, last = sentence.split()
        if verb in ("went", "moved", "travelled", "journeyed"):
            assert people.get(person) != last
            people[person] = last
        elif verb in ("took", "got", "grabbed", "picked"):
            assert last not in held
            assert things.get(last, people[person]) == people[person]
            held[last] = person
        else:
            assert held.pop(last) == person
            things[last] = people[person]
        things.update({thing: people[person] for thing, person in held.items()})
    return people, things


@pytest.mark.parametrize("task", [1, 2, 6])
def test_answers_follow_from_the_stories(example, task):
    answers = []
    for story, question, answer in example.questions(task, 300, 0):
        people, things = follow(story)
        words = question.split()
        if task == 1:
            assert people[words[2]] == answer
        elif task == 2:
            assert things[words[3]] == answer
        else:
            assert ("yes" if people[words[1]] == words[4] else "no") == answer
        assert set(story.split()) | set(words) | {answer} <= set(example.IDS)
        answers.append(answer)
    assert set(answers) == ({"yes", "no"} if task == 6 else set(example.PLACES))


def test_what_is_tested_was_not_trained_on(example):
    tested = example.questions(1, 200, 1)
    assert not {*tested} & {*example.questions(1, 2000, 3, {*tested})}


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_padding_does_not_change_an_answer(example, kind):
    data = example.questions(1, 3, 0)
    network = example.networks(5)[kind]
    params = network.init(jax.random.key(0))
    together = network.scores(params, example.encode(data, 80))
    for i, one in enumerate(data):
        alone = network.scores(params, example.encode([one], len(one[0].split())))
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)


def test_a_run_in_small_prints_the_table_and_draws(example, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    options = ["--tasks", "6", "--questions", "64", "--steps", "2", "--hidden", "4", "--out", str(picture)]
    options += ["--checkpoint", str(tmp_path / "runs")] if importlib.util.find_spec("orbax.checkpoint") else []
    table = example.main(options)
    assert table == example.main(options)  # from the checkpoints, where there are any
    assert len(table) == 3  # 64 questions are few: the LSTM is trained on all of them, once
    assert all(0 <= share <= 1 for share in table.values())
    assert picture.stat().st_size
    assert "published LSTM, 1,000 questions" in capsys.readouterr().out
