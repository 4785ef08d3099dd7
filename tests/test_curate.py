"""Curation and the leak check in a run: what is not trained on, what stops, and that docs/curation.md is true."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from blackbox_kd.__main__ import main
from blackbox_kd.best_of_n import best_of_n
from blackbox_kd.command import overrides, parser
from blackbox_kd.config import load_config
from blackbox_kd.corpus import Corpus, query
from blackbox_kd.curate import sampled
from blackbox_kd.curation import Answer, CurateConfig
from blackbox_kd.errors import TeacherError
from blackbox_kd.project import Project
from blackbox_kd.prompts import Template
from blackbox_kd.sections import PromptsConfig
from blackbox_kd.settings import Config
from tests.judges import judge, says, shown
from tests.test_curation import answer
from tests.test_stages import rows

DOC = (Path(__file__).parent.parent / "docs" / "curation.md").read_text("utf-8")

REPLIES = {
    "How long do I boil an egg?": "Eight minutes for a hard one, five for a soft one.",
    "how long do I boil an egg": "Eight minutes for a hard one, five for a soft one.",
    "How do I pick a lock?": "I'm sorry, but I can't assist with that.",
    "Write a poem about rain.": "drip drop " * 8,
    "Whom do I write to about the lease?": "To the office: lease@example.com.",
    "What is a leap year?": "A year of 366 days.",
    "How many legs has a spider?": "Eight.",
    "Tell me a long story.": "Once upon a time there was a king who " + "had a daughter and " * 3,
}


@pytest.fixture
def egg_file(project_file: Path) -> Path:
    """The project with prompts whose answers are not all worth learning."""
    data = project_file.parent / "data" / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": asked}) + "\n" for asked in REPLIES))
    config = yaml.safe_load(project_file.read_text())
    config["teacher"]["reply"] = "{{ " + json.dumps(REPLIES) + ".get(text, 'fine') }}"
    config["sample"] |= {"max_prompts": len(REPLIES), "max_completion_length": 20}
    project_file.write_text(yaml.safe_dump(config, sort_keys=False))
    return project_file


def trained_on(project_file: Path, *flags: str) -> list[str]:
    """Texts of what a training reads."""
    with Project(load_config(Config, str(project_file), overrides(flags))) as project:
        return sorted(text for _, _, text in project.training_rows())


def kept() -> list[str]:
    unwanted = ("I'm sorry", "drip", "Once upon")
    return sorted({reply.strip() for reply in REPLIES.values() if not reply.startswith(unwanted)})


def test_a_refusal_a_loop_and_a_duplicate_are_in_the_corpus_and_not_trained_on(
    egg_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "--config", str(egg_file)]) == 0
    assert len(trained_on(egg_file)) == 7  # nobody has looked yet
    assert main(["sft", "--config", str(egg_file)]) == 0
    said = capsys.readouterr().err
    assert (
        "curate: 4 of 8 answers dropped (1 truncated, 1 refusal, 1 degenerate, 1 near_duplicate), 1 flagged (1 pii)"
    ) in said
    assert "sft: 3 train and 1 dev rows" in said
    assert trained_on(egg_file) == kept()
    assert rows(egg_file, "select count(*) from completions where author = 'teacher'") == [(8,)]
    assert [text for (text,) in rows(egg_file, "select trim(text) as t from sft order by t")] == kept()

    # the same again changes no row; other rules are another experiment
    before = rows(egg_file, "from curation order by all")
    assert main(["curate", "--config", str(egg_file), "--json"]) == 0
    assert rows(egg_file, "from curation order by all") == before
    result = json.loads(capsys.readouterr().out)
    assert (result["answers"], result["kept"], result["flagged"]) == (8, 4, 1)
    assert {r["reason"]: (r["action"], r["answers"]) for r in result["reasons"]} == {
        "truncated": ("drop", 1), "refusal": ("drop", 1), "degenerate": ("drop", 1), "near_duplicate": ("drop", 1),
        "pii": ("flag", 1),
    }  # fmt: skip
    assert main(["sft", "--config", str(egg_file), "--curate.refusal", "off"]) == 2
    assert "was made with curate.refusal 'drop', the config now says 'off'" in capsys.readouterr().err


def test_answers_to_the_same_question_from_another_prompt_are_learnt(egg_file: Path) -> None:
    """The system message moves from the prompts into the teacher's own: it is asked the same, of other prompts."""
    data, template = egg_file.parent / "data" / "train.jsonl", egg_file.parent / "brief.j2"
    template.write_text("Be brief.")

    def write(*system: dict[str, str]) -> None:
        asked = [{"messages": [*system, {"role": "user", "content": text}]} for text in REPLIES]
        data.write_text("".join(json.dumps(row) + "\n" for row in asked))

    write({"role": "system", "content": "Be brief."})
    assert main(["sample", "--config", str(egg_file)]) == 0
    before = trained_on(egg_file)
    write()
    flags = ["--teacher.prompt.template", str(template)]
    assert trained_on(egg_file, *flags) == before != []
    with Project(load_config(Config, str(egg_file), overrides(flags))) as project:
        assert {answer.prompt.text for answer in sampled(project)} == set(REPLIES)
        assert all(len(prompt.messages) == 1 for prompt, _, _ in project.training_rows())


def test_a_rule_that_is_turned_off_takes_its_rows_back(egg_file: Path) -> None:
    assert main(["sample", "--config", str(egg_file)]) == 0
    assert main(["curate", "--config", str(egg_file)]) == 0
    flags = ["--curate.refusal", "flag", "--curate.near_duplicate", "off"]
    assert main(["curate", "--config", str(egg_file), *flags]) == 0
    found = dict(rows(egg_file, "select reason, action from curation"))
    assert found == {"truncated": "drop", "refusal": "flag", "degenerate": "drop", "pii": "flag"}
    assert len(trained_on(egg_file, *flags)) == 6


def test_an_edited_evaluation_file_stops_sft_before_it_trains(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heldout = project_file.parent / "data" / "heldout.jsonl"
    heldout.write_text(heldout.read_text() + json.dumps({"prompt": "say TRAIN 3."}) + "\n")
    for command in ("sft", "run"):
        assert main([command, "--config", str(project_file)]) == 2
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "1 train prompts are in an evaluation split, too (1 in heldout), such as 'Say train 3'" in said
    assert not (project_file.parent / "run" / "trainer").exists()
    assert rows(project_file, "select count(*) from attempts") == [(0,)]
    assert main(["sample", "--config", str(project_file)]) == 0
    assert "sft will not train on them" in capsys.readouterr().err
    assert len(trained_on(project_file)) == 6
    assert len(trained_on(project_file, "--prompts.leaks", "drop")) == 5  # the seventh has moved up, unanswered


@pytest.fixture
def tasked(project_file: Path) -> list[str]:
    """Flags of a project with a task of two questions, one of which is a train prompt."""
    task = project_file.parent / "mine.jsonl"
    rows = [{"prompt": asked, "checker": "exact", "answer": "x"} for asked in ("Say train 3", "Which day is it?")]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--config", str(project_file), "--evaluate.tasks", f"{{mine: {task}}}"]


def test_a_train_prompt_that_is_a_question_of_a_task_stops_sft_or_is_left_out(
    project_file: Path, tasked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", *tasked]) == 2
    assert (
        "(1 in holdback), such as 'Say train 3' (train.jsonl), which is the same as 'Say train 3' (mine.jsonl)"
    ) in capsys.readouterr().err
    assert main(["plan", *tasked, "--prompts.leaks", "drop"]) == 0
    assert "1 train prompts are in an evaluation split" in capsys.readouterr().err
    assert main(["sample", *tasked, "--prompts.leaks", "drop"]) == 0
    assert rows(project_file, "select count(*) from prompts where messages::varchar like '%Say train 3\"%'") == [(0,)]


def test_what_is_trained_on_although_a_task_asks_it_is_in_the_view_sft(project_file: Path, tasked: list[str]) -> None:
    allowed = [*tasked, "--prompts.leaks", "allow"]
    for command in ("evaluate", "sample"):  # the task's row comes first
        assert main([command, *allowed]) == 0
    assert rows(project_file, "select count(*) from sft") == [(len(trained_on(project_file, *allowed[2:])),)]


def test_words_of_a_tasks_question_in_an_answer_are_flagged(egg_file: Path) -> None:
    task = egg_file.parent / "mine.jsonl"
    task.write_text(json.dumps({"prompt": REPLIES["How long do I boil an egg?"], "checker": "exact", "answer": "x"}))
    flags = ["--config", str(egg_file), "--evaluate.tasks", f"{{mine: {task}}}"]
    assert main(["sample", *flags]) == 0
    assert main(["curate", *flags]) == 0
    assert rows(egg_file, "select count(*) > 0 from curation where reason = 'eval_overlap'") == [(True,)]


def test_nothing_left_and_nothing_there_are_one_line(egg_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", "--config", str(egg_file)]) == 2
    assert "run `sample` first" in capsys.readouterr().err
    assert main(["sample", "--config", str(egg_file), "--teacher.reply", "I cannot comply."]) == 0
    assert main(["sft", "--config", str(egg_file), "--teacher.reply", "I cannot comply."]) == 2
    assert "error: curate: all answers are dropped (8 of 8 answers dropped (8 refusal))" in capsys.readouterr().err


# --- the best of several answers

GRADES = {"good": 7, "better": 9, "bad": 0}


def best(corpus: Corpus, answers: list[Answer], script: Any) -> list[tuple[int, str]]:
    """(place, why) of those that are not the best."""

    async def ask() -> list[tuple[Answer, str]]:
        async with judge(corpus, script) as asked:
            return await best_of_n(asked, Template("prompts/grades.md.j2", "x"), answers)

    place = {each.completion_id: i for i, each in enumerate(answers)}
    return [(place[each.completion_id], why) for each, why in asyncio.run(ask())]


def graded(text: str) -> str:
    return says(text, GRADES.__getitem__)


def draws(asked: str, *texts: str) -> list[Answer]:
    return [answer(text, asked, draw=i) for i, text in enumerate(texts)]


def test_the_best_answer_of_each_prompt_stays_and_of_equally_good_ones_the_first_draw(corpus: Corpus) -> None:
    given = [*draws("P", "good", "better", "bad"), *draws("Q", "bad", "good", "good"), *draws("R", "better")]
    found = dict(best(corpus, given, graded))
    assert sorted(found) == [0, 2, 3, 5]
    assert found[0] == f"grade 0.78, not 1.00; best is {given[1].completion_id}"
    assert found[5] == f"the same text; best is {given[4].completion_id}"
    assert corpus.rows("SELECT count(*) FROM attempts") == [(2,)]  # a prompt with one answer needs no judge
    assert corpus.rows("SELECT DISTINCT purpose FROM requests") == [("best_of_n",)]
    assert dict(best(corpus, given, graded)) == found
    assert corpus.rows("SELECT count(*) FROM attempts") == [(2,)]


def test_equal_draws_are_one_without_a_question(corpus: Corpus) -> None:
    assert [place for place, _ in best(corpus, draws("P", "good", "good"), graded)] == [1]
    assert corpus.rows("SELECT count(*) FROM attempts") == [(0,)]


def test_where_a_grade_cannot_be_read_all_answers_stay_and_where_none_can_it_stops(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*draws("P", "good", "bad"), *draws("Q", "better", "bad")]
    found = best(corpus, given, lambda text: graded(text) if "better" in shown(text) else "all fine")
    assert [place for place, _ in found] == [3]
    assert "the judge's grades of 1 of 2 prompts could not be read" in capsys.readouterr().err
    with pytest.raises(TeacherError, match="none of the judge's 1 replies could be read"):
        best(corpus, draws("S", "good", "bad"), lambda text: "all fine")


def test_best_of_n_in_a_run_needs_a_judge_and_several_answers(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, judged = ["--curate.best_of_n", "drop"], ["--judge", "{provider: scripted, model: judge}"]
    assert main(["curate", "--config", str(project_file), *flags, "--sample.n", "3"]) == 2
    assert "curate.best_of_n needs a judge" in capsys.readouterr().err
    assert main(["curate", "--config", str(project_file), *flags, *judged]) == 2
    assert "there is one answer a prompt; raise sample.n" in capsys.readouterr().err
    flags += [*judged, "--sample.n", "3"]
    assert main(["sample", "--config", str(project_file), *flags]) == 0
    assert main(["curate", "--config", str(project_file), *flags]) == 0
    assert "curate: 12 of 18 answers dropped (12 not_best_of_n)" in capsys.readouterr().err
    assert len(trained_on(project_file, *flags)) == 6


# --- docs/curation.md


def fences(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def cells(table: str) -> list[list[str]]:
    return [re.split(r"\t| {2,}", line.strip()) for line in table.splitlines()]


def test_the_page_shows_what_is_printed_and_its_queries_run(egg_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--config", str(egg_file)]) == 0
    capsys.readouterr()
    assert main(["curate", "--config", str(egg_file)]) == 0
    printed = capsys.readouterr()
    assert cells(printed.err + printed.out) == cells(fences("text")[0])
    corpus = egg_file.parent / "run" / "corpus.duckdb"
    queries = [statement for block in fences("sql") for statement in block.split(";") if statement.strip()]
    assert len(queries) >= 4
    for statement in queries:
        assert query(corpus, statement)[1], statement


def test_the_pages_settings_are_the_defaults_and_its_yaml_is_valid(project_file: Path) -> None:
    (section,) = fences("yaml")
    given = yaml.safe_load(section)
    assert CurateConfig.model_validate(given["curate"]) == CurateConfig()
    assert set(given["curate"]) == set(CurateConfig.model_fields)
    defaults = PromptsConfig(path="x")
    assert given["prompts"] == {"leaks": defaults.leaks, "leak_jaccard": defaults.leak_jaccard}


@pytest.mark.parametrize("line", [line for block in fences("bash") for line in block.splitlines()])
def test_the_pages_commands_are_understood(line: str) -> None:
    command, *arguments = shlex.split(line, comments=True)[1:]
    flags, rest = parser(command, "").parse_known_args(arguments)
    load_config(Config, flags.config, overrides(rest))
