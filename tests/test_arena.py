"""Stage 5: the application, its log, what it draws, what it gives away, and what happens when things go wrong."""

from __future__ import annotations

import base64
import contextlib
import csv
import errno
import html
import http.client
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import integrate
from scipy.stats import beta, binom, binomtest, chi2_contingency
from werkzeug.test import EnvironBuilder, run_wsgi_app

import arena_world as world
import common
from arena_world import KEYS, KINDS, Judge, arena, csrf_of, make_world, shown, write_master
from tiny import fork_server

ROOT = Path(__file__).parents[1]
CHOICES = [*arena.CHOICES]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """160 items with pictures; 40 of them are queries."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def app(catalogue, tmp_path):
    return arena.create_app(world.setup(*catalogue, tmp_path / "a.sqlite"))


@pytest.fixture
def place(app):
    return app.extensions["arena"]


# --------------------------------------------------------------------------------------------------------------------
# Voting


def test_a_vote_goes_through_and_is_written_with_all_that_was_shown(app, place):
    judge = Judge(app, "Ada")
    trial = judge.trial()
    assert set(trial) == {"trial", "undo", "votes", "decided"} and re.fullmatch("[0-9a-f]{32}", trial["trial"])
    row = shown(place.log, trial["trial"])
    assert row["judge"] == judge.id and {row["left_model"], row["right_model"]} == {"b" * 64, "f" * 64}
    assert len(row["left_items"]) == len(row["right_items"]) == 4 and row["place"] == 1
    assert row["query"] not in row["left_items"] + row["right_items"]
    assert judge.vote("A", trial["trial"]) == {"trial": trial["trial"], "choice": "A", "number": 1}
    after = judge.trial()
    assert after["trial"] != trial["trial"] and after["undo"] == trial["trial"]
    assert (after["votes"], after["decided"]) == (1, 1)
    judge.vote("T"), judge.vote("N"), judge.vote("B")
    after = judge.trial()
    assert (after["votes"], after["decided"]) == (4, 2)  # neither a tie nor an abstention decides anything
    votes = place.log.votes(place.number)
    assert [vote["choice"] for vote in votes] == ["A", "T", "N", "B"] and votes[0]["judge_name"] == "Ada"


def test_answers_are_the_nearest_items_outside_the_querys_group(catalogue, place):
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(catalogue[0])
    experiment = place.experiment
    for model, column in enumerate(("base_embedding", "finetuned_embedding")):
        vectors = np.stack(table.column(column).to_pylist())
        for number in range(0, len(experiment.rows), 7):
            query = experiment.rows[number]
            scores = vectors @ vectors[query]
            scores[query] = -9
            assert experiment.lists[model, number].tolist() == np.argsort(-scores)[:4].tolist()


def test_duplicates_of_the_query_are_never_answers_and_a_group_asks_once(tmp_path):
    count = 80
    groups = [f"g{i // 4 * 4}" for i in range(count)]  # four items a group, of which one is in the test split
    groups[4] = groups[0]  # and one group with two test items
    vectors = world.random_vectors(count)
    for name in vectors:  # group members are each other's nearest neighbours
        vectors[name] = world.unit(np.repeat(vectors[name][::4], 4, axis=0) + 0.01 * vectors[name])
    master = write_master(tmp_path / "m.parquet", vectors, group=groups)
    (tmp_path / "i").mkdir()
    experiment = arena.Arena(world.setup(master, tmp_path / "i", tmp_path / "a.sqlite")).experiment
    assert len(experiment.rows) == len({groups[row] for row in experiment.rows}) == 19
    for number, query in enumerate(experiment.rows):
        answers = experiment.lists[:, number].ravel()
        assert not {groups[i] for i in answers} & {groups[query]}


def test_the_same_trial_over_reload_and_tabs_and_one_ahead(app):
    judge = Judge(app)
    first = judge.trial()["trial"]
    assert {judge.trial()["trial"] for _ in range(3)} == {first}
    ahead = judge.trial(after=first)["trial"]
    assert ahead != first and judge.trial(after=first)["trial"] == ahead and judge.trial()["trial"] == first
    assert judge.post("/trial", after=ahead).status_code == 409  # not two ahead
    judge.vote("T", first)
    assert judge.trial()["trial"] == ahead


def test_the_same_vote_twice_is_one_another_choice_is_refused(app, place):
    judge = Judge(app)
    token = judge.trial()["trial"]
    first = judge.post("/vote", trial=token, choice="B")
    judge.vote("A")
    again = judge.post("/vote", trial=token, choice="B")
    assert again.status_code == 200 and again.data == first.data
    for other in "ATN":
        assert judge.post("/vote", trial=token, choice=other).status_code == 409
    assert [vote["choice"] for vote in place.log.votes(place.number)] == ["B", "A"]


def test_undo_appends_one_row_and_asks_the_same_trial_again(app, place):
    judge = Judge(app)
    tokens = []
    for choice in "ABT":
        tokens.append(judge.trial()["trial"])
        judge.vote(choice)
    waiting = judge.trial()["trial"]
    again = judge.post("/undo", trial=tokens[2]).json
    assert (again["trial"], again["undo"], again["votes"]) == (tokens[2], tokens[1], 2)
    assert judge.post("/undo", trial=tokens[2]).json == again  # asked twice, done once
    assert judge.post("/undo", trial=tokens[0]).status_code == 409  # only the newest
    assert judge.post("/undo", trial=waiting).status_code == 409  # there is no vote on it
    assert judge.get(f"/picture/{tokens[2]}/8").status_code == 200  # it can be seen again
    judge.post("/undo", trial=tokens[1])  # two in a row: the earlier one comes first again
    assert judge.trial()["trial"] == tokens[1]
    judge.vote("A")
    assert judge.trial()["trial"] == tokens[2]
    assert judge.vote("N", tokens[2])["number"] == 3
    assert judge.vote("N", tokens[2])["number"] == 3  # and the same vote again is still one
    assert judge.post("/vote", trial=tokens[2], choice="T").status_code == 409
    assert judge.trial()["trial"] == waiting
    log = place.log.votes(place.number)
    assert [(vote["choice"], bool(vote["revoked"])) for vote in log] == [
        ("A", False), ("B", True), ("T", True), ("A", False), ("N", False),
    ]  # fmt: skip
    assert [vote["token"] for vote in log] == [*tokens, tokens[1], tokens[2]]
    again = arena.Log(place.log.path)
    assert judge.trial()["decided"] == place.log.decided(place.number) == again.decided(place.number) == 2
    found = arena.results(place.log, place.log.experiments()[0])
    assert found["votes"] == {
        "rows": 5, "counted": 2, "judges": 1, "excluded": {"undone": 2, "identical": 0, "abstained": 1, "repeat": 0},
    }  # fmt: skip


def test_undo_ends_with_the_session_and_quitting_thanks_with_the_own_count(app):
    judge, other = Judge(app), Judge(app)
    other.vote("A")
    token = judge.trial()["trial"]
    judge.vote("A"), judge.vote("T"), judge.vote("N")
    waiting = judge.trial()["trial"]
    response = judge.client.post("/quit", headers=judge.headers)
    assert response.status_code == 303 and response.location == "thanks"
    page = judge.get("/thanks").text
    assert re.search(r'id="own-count">3<', page) and "Thank you" in page
    assert judge.post("/trial", after=None).status_code == 403
    assert judge.post("/vote", trial=waiting, choice="A").status_code == 403
    assert "Welcome back" in judge.get("/").text
    judge.client.post("/start", headers=judge.headers)
    assert judge.trial()["undo"] is None and judge.trial()["trial"] == waiting
    assert judge.post("/undo", trial=token).status_code == 409


def test_what_the_question_is_short_of_counts_queries_not_judges(app, place):
    judges = [Judge(app) for _ in range(3)]
    first = shown(place.log, judges[0].trial()["trial"])["query"]
    for judge in judges:  # the same query for all three
        token = judge.trial()["trial"]
        if shown(place.log, token)["query"] != first:
            token = exchanged(place, shown_for(place, first), judge.id)
        judge.vote("A", token)
    assert judges[0].trial()["decided"] == place.log.decided(place.number) == 1


def shown_for(place, query: str) -> str:
    """The token of the first trial of a query."""
    return place.log.one("SELECT token FROM trials WHERE query = ? ORDER BY id", query)[0]


def test_the_log_refuses_changes(app, place):
    judge = Judge(app)
    token = judge.trial()["trial"]
    judge.vote("A")
    judge.post("/undo", trial=token)
    for table, verb in itertools.product(
        ("trials", "votes", "revocations"), ("UPDATE {} SET time = ''", "DELETE FROM {}")
    ):
        with pytest.raises(sqlite3.IntegrityError, match="insert-only"):
            place.log.connection.execute(verb.format(table))
    with pytest.raises(sqlite3.IntegrityError):
        place.log.connection.execute("INSERT INTO votes (trial, session, choice, time) VALUES (2, 1, '?', '')")


def test_every_choice_has_its_button_and_its_words_and_is_counted_for_the_judge(app, place):
    judge = Judge(app)
    page = judge.get("/").text
    assert json.loads(re.search("data-choices='([^']+)'", page)[1]) == arena.CHOICES  # of the page's script
    assert set(re.findall('data-choice="(.)"', page)) == arena.CHOICES.keys()
    for choice in CHOICES:
        judge.vote(choice)
    words = ["one row better", *list(arena.CHOICES.values())[2:]]
    counted = re.findall("<dt>(.+)</dt><dd>(.+)</dd>", judge.get("/thanks").text)
    assert counted == [(each, "2" if each == words[0] else "1") for each in words]


def test_nothing_left_to_judge_says_so(tmp_path):
    master, images = make_world(tmp_path, count=24, pictures=False)
    judge = Judge(arena.create_app(world.setup(master, images, tmp_path / "a.sqlite")))
    for _ in range(6):
        judge.vote("T")
    assert judge.trial()["trial"] is None and judge.trial()["votes"] == 6


# --------------------------------------------------------------------------------------------------------------------
# Drawing


def simulate(place, judges: int, draws: int, seed: int = 1) -> list[dict]:
    """People come in any order and vote at random; returns the trials as drawn."""
    chance = random.Random(seed)
    people = [place.log.start(place.number, None) for _ in range(judges)]
    drawn = []
    for _ in range(draws):
        who = chance.choice(people)
        token = place.trial(who)["trial"]
        place.log.vote(place.number, who, token, chance.choice(CHOICES))
        drawn.append(shown(place.log, token))
    return drawn


def unlogged(place):
    """No fsync: drawing is what is tested here."""
    place.log.connection.execute("PRAGMA synchronous = OFF")
    return place


@pytest.mark.parametrize("judges", [1, 7])
def test_a_thousand_draws_are_fair_balanced_and_without_repeats(tmp_path, judges):
    master, images = make_world(tmp_path, count=4 * 1100, pictures=False)
    place = unlogged(arena.Arena(world.setup(master, images, tmp_path / "a.sqlite")))
    assert len(place.experiment.queries) == 1100
    drawn = simulate(place, judges, 1000)
    assert len({(row["judge"], row["query"]) for row in drawn}) == 1000
    counts = Counter(row["category"] for row in drawn)
    assert set(counts) == set(KINDS) and max(counts.values()) - min(counts.values()) <= 1
    # A fair coin fails p > 0.001 once in a thousand runs; both halves of the draws at once, once in a million.
    left = [row["left_model"] == "f" * 64 for row in drawn]
    assert max(binomtest(sum(half), len(half)).pvalue for half in (left[::2], left[1::2])) > 0.001
    seen, shared = Counter(row["query"] for row in drawn), place.experiment.shared
    assert len(shared) == 220
    if judges > 1:
        full = [query for query in seen if query in shared and seen[query] == 3]
        assert len(full) >= 0.8 * len([query for query in seen if query in shared])
        assert max(seen.values()) == 3 and {seen[query] for query in set(seen) - shared} == {1}


def test_drawing_does_not_depend_on_how_people_vote(tmp_path, monkeypatch):
    master, images = make_world(tmp_path, pictures=False)
    orders = []
    for name, choices in (("a", "A"), ("b", "BTN")):
        place = unlogged(arena.Arena(world.setup(master, images, tmp_path / f"{name}.sqlite")))
        numbers = iter(range(99))
        monkeypatch.setattr(arena.secrets, "token_hex", lambda n, numbers=numbers: f"{next(numbers):032x}")
        judge = place.log.start(place.number, None)
        queries = []
        for number in range(30):
            token = place.trial(judge)["trial"]
            place.log.vote(place.number, judge, token, choices[number % len(choices)])
            queries.append(shown(place.log, token)["query"])
        orders.append(queries)
    assert orders[0] == orders[1]


def test_identical_rows_are_counted_but_not_shown_and_another_order_is_flagged(tmp_path):
    vectors = world.random_vectors(120)
    vectors["finetuned_embedding"] = vectors["base_embedding"].copy()
    for i in range(4, 120, 8):  # every other query: the fine-tuned model turns its picture's row around
        query = vectors["base_embedding"][i]
        vectors["finetuned_embedding"][i] = world.unit((query + 0.35 * np.roll(query, 1))[None])[0]
    master = write_master(tmp_path / "m.parquet", vectors)
    (tmp_path / "i").mkdir()
    place = unlogged(arena.Arena(world.setup(master, tmp_path / "i", tmp_path / "a.sqlite")))
    lists = place.experiment.lists
    same = (lists[0] == lists[1]).all(axis=1)
    assert 5 < same.sum() < 25
    judges = [place.log.start(place.number, None) for _ in range(2)]
    drawn = []
    for judge in judges:
        while token := place.trial(judge)["trial"]:
            place.log.vote(place.number, judge, token, "A")
            drawn.append(shown(place.log, token))
    assert len(drawn) == 2 * (~same).sum()
    for row in drawn:
        assert row["left_items"] != row["right_items"]
        assert row["facts"]["same_set"] == (set(row["left_items"]) == set(row["right_items"]))
    found = arena.results(place.log, place.log.experiments()[0])
    assert found["identical"] == {"queries": same.sum(), "share": pytest.approx(same.mean())}
    assert found["votes"]["excluded"]["identical"] == same.sum()  # once, not once a judge
    exported = list(csv.DictReader(io.StringIO(arena.export(place.log, place.log.experiments()))))
    assert sum(int(row["identical"]) for row in exported) == same.sum()


def test_other_models_items_or_queries_are_another_experiment(tmp_path, catalogue, capsys):
    database = tmp_path / "a.sqlite"
    master, images = catalogue
    other = make_world(tmp_path / "o", pictures=False, facts={"finetuned_fingerprint": "9" * 64})[0]
    numbers = []
    for path, settings in (
        (master, {}),
        (other, {}),
        (master, {"query": "text"}),
        (master, {"top_k": 5}),
        (master, {}),
    ):
        place = arena.Arena(world.setup(path, images, database, **settings))
        judge = place.log.start(place.number, None)
        place.log.vote(place.number, judge, place.trial(judge)["trial"], "A")
        numbers.append(place.number)
    assert numbers == [1, 2, 3, 4, 1]
    assert arena.main(["stats", "--database", str(database), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["votes"]["counted"] for one in found] == [2, 1, 1, 1]
    command = ["stats", "--database", str(database), "--embeddings", str(other), "--format", "json"]
    assert arena.main(command) == 0
    assert [one["experiment"]["id"] for one in json.loads(capsys.readouterr().out)] == [2]
    nobodys = make_world(tmp_path / "n", pictures=False, facts={"finetuned_fingerprint": "8" * 64})[0]
    assert arena.main(["stats", "--database", str(database), "--embeddings", str(nobodys)]) == 1
    assert "no votes on these models" in capsys.readouterr().err


def test_text_queries_show_the_prompt_and_search_with_its_vector(catalogue, tmp_path):
    app = arena.create_app(world.setup(*catalogue, tmp_path / "a.sqlite", query="text"))
    place, judge = app.extensions["arena"], Judge(app)
    trial = judge.trial()
    row = shown(place.log, trial["trial"])
    assert trial["words"] == row["query"].replace("id-", "prompt ") and row["query"] not in row["left_items"]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(catalogue[0])
    number = int(row["query"][3:])
    asked = np.array(table.column("base_text_embedding")[number].as_py())
    scores = np.stack(table.column("base_embedding").to_pylist()) @ asked
    scores[number] = -9
    side = "left" if row["left_model"] == "b" * 64 else "right"
    assert row[f"{side}_items"] == [f"id-{i}" for i in np.argsort(-scores)[:4]]
    assert "Searched for" in judge.get("/").text
    assert judge.get(f"/picture/{trial['trial']}/0").status_code == 404  # the words' own item is not shown
    assert judge.get(f"/picture/{trial['trial']}/1").status_code == 200


def test_other_prompts_of_the_same_items_are_another_experiment_by_words_only(catalogue, tmp_path):
    master = catalogue[0]
    other = write_master(tmp_path / "o.parquet", read_vectors(master), prompt=[f"words {i}" for i in range(160)])
    keys = {
        (path, query): arena.Experiment([path], arena.ArenaConfig(query=query)).key
        for path in (master, other) for query in ("image", "text")
    }  # fmt: skip
    assert keys[master, "image"] == keys[other, "image"] and keys[master, "text"] != keys[other, "text"]
    facts = {"finetuned_fingerprint": "9" * 64}
    third = write_master(
        tmp_path / "t.parquet", read_vectors(master), facts=facts, prompt=[f"words {i}" for i in range(160)]
    )
    assert arena.Experiment([master, third], arena.ArenaConfig())
    with pytest.raises(common.Fail, match="different prompts"):
        arena.Experiment([master, third], arena.ArenaConfig(query="text"))


def test_two_files_compare_their_fine_tuned_models(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    vectors, masters = world.random_vectors(160), []
    for number, scenario in enumerate(("linear_probe", "dual_lora", "dual_lora")):
        own = vectors | {"finetuned_embedding": world.random_vectors(160, seed=number + 5)["finetuned_embedding"]}
        facts = {"scenario": scenario, "finetuned_fingerprint": str(number) * 64}
        masters.append(write_master(tmp_path / f"{number}.parquet", own, facts=facts))
    database = tmp_path / "a.sqlite"
    place = unlogged(arena.Arena(world.setup(masters[:2], images, database)))
    assert [model.name for model in place.experiment.models] == ["linear_probe", "dual_lora"]
    chance = random.Random(5)
    for _ in range(3):
        judge = place.log.start(place.number, None)
        for _ in range(30):
            row = shown(place.log, place.trial(judge)["trial"])
            assert {row["left_model"], row["right_model"]} == {"0" * 64, "1" * 64}
            better = "A" if row["left_model"] == "1" * 64 else "B"
            place.log.vote(place.number, judge, row["token"], better if chance.random() < 0.9 else "T")
    flags = [flag for master in masters[:2] for flag in ("--embeddings", str(master))]
    assert arena.main(["stats", *flags, "--database", str(database)]) == 0
    assert "dual_lora is preferred to linear_probe" in capsys.readouterr().out
    names = [model.name for model in arena.Experiment(masters[1:], arena.ArenaConfig()).models]
    assert names == ["dual_lora (11111111)", "dual_lora (22222222)"]
    with pytest.raises(common.Fail, match="more than two --embeddings"):
        arena.Experiment(masters, arena.ArenaConfig())


# --------------------------------------------------------------------------------------------------------------------
# Blindness

SECRETS = re.compile(
    r"secret|base|fine.?tuned|lora|model|b{16}|f{16}|id-\d|p/\d|\.jpg|parquet|embedding|title \d|prompt \d|score"
    r"|left|right"
)


def everything(judge: Judge, token: str) -> list:
    """All responses of a showing: the page, the trial, the query's picture, four of row A, four of row B."""
    pictures = [judge.get(f"/picture/{token}/{place}") for place in range(9)]
    return [judge.get("/"), judge.post("/trial", after=None), *pictures]


def test_nothing_sent_names_a_model_an_item_or_a_side(app, place):
    judge = Judge(app, "Ada")
    texts = []
    for _ in range(5):
        for response in everything(judge, judge.trial()["trial"]):
            texts.append(repr(list(response.headers)))
            if response.mimetype != "image/jpeg":
                texts.append(response.text)
                continue
            image = Image.open(io.BytesIO(response.data))
            assert image.size == (64, 64) and not image.getexif()
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
            assert b"secret" not in response.data
        texts.append(json.dumps(judge.vote("A")))
    for text in texts:
        assert not SECRETS.search(text.lower().replace("base-uri", "")), text
    for name in ("arena.js", "arena.css"):
        text = judge.get(f"/static/{name}").text.lower()
        assert not re.search(r"fine.?tuned|lora|secret", text)
    assert judge.get("/picture/" + "0" * 32 + "/0").status_code == 404


def test_the_cookie_holds_the_judge_and_nothing_else(app):
    client = app.test_client()
    headers = {"X-CSRF-Token": csrf_of(client.get("/").text)}
    response = client.post("/start", data={"name": "Eve"}, headers=headers)
    cookie = response.headers["Set-Cookie"]
    assert cookie.startswith("judge=") and "HttpOnly" in cookie and "SameSite=Lax" in cookie
    value = cookie.split(";")[0].removeprefix("judge=").split(".")[0]
    decoded = json.loads(base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)))
    assert set(decoded) == {"judge", "_permanent"} and re.fullmatch("[0-9a-f]{32}", decoded["judge"])
    assert client.post("/trial", headers=headers).status_code == 200
    forged = cookie.split(";")[0].replace(value, base64.urlsafe_b64encode(b'{"judge":"x"}').decode().rstrip("="))
    stranger = app.test_client(use_cookies=False)
    assert stranger.post("/trial", headers=headers | {"Cookie": forged}).status_code == 403
    assert '"start"' in stranger.get("/", headers={"Cookie": forged}).text  # nobody is known by it


def exchanged(place, token: str, judge: str) -> str:
    """Write the same trial down for another judge, its sides exchanged; returns the new token."""
    row = dict(place.log.connection.execute("SELECT * FROM trials WHERE token = ?", (token,)).fetchone())
    del row["id"], row["token"], row["time"]
    for one, two in (("left_model", "right_model"), ("left_items", "right_items")):
        row[one], row[two] = row[two], row[one]
    row |= {"judge": judge, "token": arena.secrets.token_hex(16)}
    with place.log.writing():
        place.log.insert("trials", **row)
    return row["token"]


def test_two_hundred_trials_exchanged_differ_only_in_the_order_of_their_rows(app, place):
    """Two judges in step: one sees a trial, the other the same, sides exchanged. All that is sent is compared."""
    place = unlogged(place)

    def sent(judge: Judge, token: str) -> list[tuple]:
        responses = [*everything(judge, token), judge.post("/vote", trial=token, choice="T")]
        return [
            (r.status_code, list(r.headers), re.sub(rb"[0-9a-f]{32,64}", b"-", r.data))  # tokens struck out
            for r in responses
        ]

    for number in range(200):
        if number % 25 == 0:
            one, two = Judge(app), Judge(app)
        token = one.trial()["trial"]
        swapped = exchanged(place, token, two.id)
        assert two.trial()["trial"] == swapped
        page, trial, query, a1, a2, a3, a4, b1, b2, b3, b4, vote = sent(one, token)
        assert {answer[0] for answer in (page, trial, query, a1, b4, vote)} == {200} and a1 != b1
        assert sent(two, swapped) == [page, trial, query, b1, b2, b3, b4, a1, a2, a3, a4, vote]
    assert len(place.log.votes(place.number)) == 400


def test_a_classifier_on_everything_sent_is_no_better_than_a_coin(tmp_path):
    """Random disjoint lists, so that only a leak could tell the models apart; 600 showings to learn, 2,000 held out."""
    showings = 2600
    master, images = make_world(tmp_path, count=4 * showings, pictures=False)
    settings = {"picture_size": 32, "limit": showings, "shared": 0.0}
    app = arena.create_app(world.setup(master, images, tmp_path / "a.sqlite", **settings))
    place, rng = unlogged(app.extensions["arena"]), np.random.default_rng(3)
    for number in range(showings):  # each query is shown once, so nothing that was learned of its rows is of use
        place.experiment.lists[:, number] = rng.choice(4 * showings, 8, replace=False).reshape(2, 4)
    ready = [place.encode(Image.new("RGB", (40 + n, 50), (4 * n, 90, 250 - 4 * n))) for n in range(60)]
    place.jpeg = lambda row: ready[row % 60]  # what is left to measure is the code's own path
    sent, left = all_sent(app, showings)
    right = told_apart(sent, left)
    if not 0.471 <= right <= 0.529:  # 2.6 standard errors: a coin leaves this band once in a hundred runs
        right = told_apart(sent[::-1], left[::-1])  # learns on other showings; a leak would be found again
    assert 0.471 <= right <= 0.529, right


def all_sent(app, showings: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each showing all bytes and headers of trial, pictures and vote, token, sizes, times; and who stood left."""
    place, rows, left = app.extensions["arena"], [], []
    for number in range(showings):
        if number % 50 == 0:
            judge = Judge(app)
            cookie = f"judge={judge.client.get_cookie('judge', domain='127.0.0.1').value}"
            environ = EnvironBuilder(headers={"Host": judge.host, "Cookie": cookie}).get_environ()
        clock = [time.perf_counter()]
        trial = judge.post("/trial", after=None)
        clock.append(time.perf_counter())
        token, bodies, headers = trial.json["trial"], [trial.data], [repr(list(trial.headers)).encode()]
        for path in [f"/picture/{token}/{place_}" for place_ in range(9)]:
            body, _, own = run_wsgi_app(app.wsgi_app, environ | {"PATH_INFO": path})
            clock.append(time.perf_counter())
            bodies.append(b"".join(body))
            headers.append(repr(list(own)).encode())
        vote = judge.post("/vote", trial=token, choice=CHOICES[number % len(CHOICES)])
        clock.append(time.perf_counter())
        bodies.append(vote.data)
        headers.append(repr(list(vote.headers)).encode())
        row = [np.frombuffer(part.ljust(1000, b"\0"), np.uint8)[:1000] for part in (*bodies, *headers)]
        named = [int(token[i : i + 4], 16) for i in range(0, 32, 4)]
        summed = [sum(body) % 251 for body in bodies]
        sizes = [len(part) for part in (*bodies, *headers)]
        rows.append(np.concatenate([*row, named, summed, sizes, np.diff(clock) * 1e4]).astype(np.float32))
        left.append(shown(place.log, token)["left_model"] == "f" * 64)
    return np.array(rows), np.array(left, np.float32) * 2 - 1


def told_apart(X: np.ndarray, y: np.ndarray, learn: int = 600, columns: int = 40) -> float:
    """Accuracy, on what was held out, of ridge regression on the columns and roots that go with y most closely."""
    X = X[:, X[:learn].std(axis=0) > 0]
    X = (X - X[:learn].mean(axis=0)) / X[:learn].std(axis=0)
    X = np.concatenate([X, np.sign(X) * np.sqrt(abs(X))], axis=1)
    X = X[:, np.argsort(-abs(X[:learn].T @ y[:learn]))[:columns]]
    weights = np.linalg.solve(X[:learn].T @ X[:learn] + 100 * np.eye(X.shape[1]), X[:learn].T @ y[:learn])
    return float(((X[learn:] @ weights > 0) == (y[learn:] > 0)).mean())


def test_the_classifier_would_find_a_leak():
    rng = np.random.default_rng(0)
    y = np.sign(rng.normal(size=2600))
    X = rng.normal(size=(2600, 5000))
    assert 0.471 <= told_apart(X, y) <= 0.529
    X[:, 7] += 0.4 * y  # one byte, or a size, that is a little larger on one side
    assert told_apart(X, y) > 0.56


def test_missing_pictures_look_the_same_everywhere_and_are_named_in_the_log(tmp_path, capsys):
    count = 160
    paths = [f"p/{i}.jpg" for i in range(count)]
    paths[8:12] = ["../../etc/passwd", "/etc/passwd", "p/\0.jpg", "p/" + "x" * 300]
    master, images = make_world(tmp_path, count=count, image_path=paths)
    for number in range(0, count, 2):
        (images / f"p/{number}.jpg").unlink(missing_ok=True)
    (images / "p/1.jpg").write_bytes(b"<html>")
    app = arena.create_app(world.setup(master, images, tmp_path / "a.sqlite"))
    place, judge = app.extensions["arena"], Judge(app)
    blank = place.placeholder
    for row in (0, 1, 2, 8, 9, 10, 11):
        assert place.jpeg(row) == blank
    assert place.jpeg(3) != blank
    said = capsys.readouterr().err
    for name in (
        "'id-0': missing file",
        "'id-1': not an image",
        "'id-8': outside",
        "'id-9': outside",
        "'id-10': missing",
    ):
        assert name in said
    lengths = {False: set(), True: set()}
    for _ in range(30):
        trial = judge.trial()
        row = shown(place.log, trial["trial"])
        for side, items in ((0, row["left_items"]), (4, row["right_items"])):
            for rank, item in enumerate(items):
                response = judge.get(f"/picture/{trial['trial']}/{1 + side + rank}")
                if int(item[3:]) % 2 == 0:
                    assert response.data == blank
                    lengths[bool(side)].add(repr([h for h in response.headers if h[0] != "Date"]))
        judge.vote("T")
    assert lengths[False] == lengths[True] and len(lengths[True]) == 1


@pytest.mark.parametrize("count", [2, 5])
def test_judges_who_vote_in_turn_see_every_type_and_meet_in_shared_queries(app, place, count):
    judges = [Judge(app, f"J{number}") for number in range(count)]
    for _ in range(2 * len(place.experiment.types)):
        for judge in judges:
            judge.vote("A")
    trials = place.log.all("SELECT judge, query FROM trials WHERE NOT identical")
    kinds = {judge.id: {place.experiment.queries[row["query"]].category for row in trials if row["judge"] == judge.id}
             for judge in judges}  # fmt: skip
    assert all(len(own) >= len(place.experiment.types) - 1 for own in kinds.values()), kinds
    assert place.results()["agreement"]["units"] > 0


def test_pictures_leave_votes_some_threads(app, place, monkeypatch):
    judge, seats, rows = Judge(app), arena.THREADS - 8, iter(range(1000, 2000))
    token = judge.trial()["trial"]
    full, free = threading.Barrier(seats + 1), threading.Event()

    def slow(row: int) -> bytes:  # as a disk that does not answer
        if next(rows) < 1000 + seats:
            full.wait(30)
        free.wait(30)
        return b"JPEG"

    monkeypatch.setattr(place, "jpeg", slow)
    with ThreadPoolExecutor(seats) as pool:
        loading = [pool.submit(place.picture, judge.id, token, 1) for _ in range(seats)]
        full.wait(30)
        busy = judge.get(f"/picture/{token}/0")
        free.set()
        assert busy.status_code == 503 and "Busy" in busy.json["error"]
        assert {one.result() for one in loading} == {b"JPEG"}
    assert judge.get(f"/picture/{token}/0").status_code == 200
    assert judge.vote("A", token)["number"] == 1


def test_a_picture_that_the_disk_did_not_give_is_asked_for_again(app, place, monkeypatch):
    judge, whole = Judge(app), Image.open
    token = judge.trial()["trial"]
    for number in (errno.EIO, errno.EMFILE):
        monkeypatch.setattr(Image, "open", lambda *_, n=number, **__: (_ for _ in ()).throw(OSError(n, os.strerror(n))))
        answer = judge.get(f"/picture/{token}/0")
        assert answer.status_code == 503 and "error" in answer.json
    monkeypatch.setattr(Image, "open", whole)
    answer = judge.get(f"/picture/{token}/0")
    assert answer.status_code == 200 and answer.data != place.placeholder


def test_pictures_kept_are_bounded_by_their_size(catalogue, tmp_path):
    sizes = {480: 2000, 960: 500, 4096: 50}
    for size, count in sizes.items():
        place = arena.Arena(world.setup(*catalogue, tmp_path / "a.sqlite", picture_size=size))
        assert place.jpeg.cache_info().maxsize == count


# --------------------------------------------------------------------------------------------------------------------
# Strangers


def test_cross_site_posts_are_refused(app):
    """Another site's page can make the browser send its cookie, at the worst, but never knows the token."""
    judge, other = Judge(app), Judge(app)
    token = judge.trial()["trial"]
    for csrf in (None, "", "é", "0" * 64, other.headers["X-CSRF-Token"], judge.headers["X-CSRF-Token"][:-1]):
        headers = {"Host": judge.host} | ({"X-CSRF-Token": csrf} if csrf is not None else {})
        form = {"trial": token, "choice": "A"} | ({"csrf": csrf} if csrf else {})
        for path in ("/vote", "/trial", "/undo", "/start", "/quit"):
            assert judge.client.post(path, json=form, headers=headers).status_code == 403
            assert judge.client.post(path, data=form, headers={"Host": judge.host}).status_code == 403
    nobody = app.test_client(use_cookies=False)  # a browser that keeps no cookie across sites
    assert nobody.post("/quit", headers=judge.headers).status_code == 403
    assert judge.trial()["votes"] == 0 and judge.trial()["trial"] == token
    assert judge.get("/").headers.get("Access-Control-Allow-Origin") is None


def test_a_wrong_host_is_refused(app):
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "[::2]:80", "a b", "127.0.0.1:99999"):
        for path in ("/", "/results", "/static/arena.js"):
            response = app.test_client().get(path, headers={"Host": host})
            assert response.status_code == 400, (host, path)
            assert "evil" not in response.text
    for host in ("127.0.0.1:8000", "localhost:8000", "localhost"):
        assert app.test_client().get("/", headers={"Host": host}).status_code == 200


def test_names_are_known_in_any_case_and_with_blanks_between(monkeypatch):
    import socket

    monkeypatch.setattr(socket, "gethostname", lambda: "Front-Desk")
    monkeypatch.setattr(socket, "getfqdn", lambda: "Front-Desk.Shop.example")
    settings = arena.ArenaConfig(host="Desk.example", trusted_host=" Shop.Example , vote.example,, ")
    names = {"front-desk", "front-desk.shop.example", "desk.example", "shop.example", "vote.example"}
    assert set(arena.trusted_hosts(settings)) == names | {"127.0.0.1", "localhost"}


def test_ipv6_is_refused_with_one_line(catalogue, tmp_path, capsys):
    flags = ["--embeddings", str(catalogue[0]), "--images", str(catalogue[1])]
    for host in ("::1", "::", "fe80::1"):
        assert arena.main(["serve", *flags, "--database", str(tmp_path / "a.sqlite"), "--host", host]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "IPv6" in said
    assert not list(tmp_path.iterdir())


def test_forged_old_and_other_judges_tokens_are_refused(app):
    one, two = Judge(app), Judge(app)
    mine = one.trial()["trial"]
    for token in (mine, "0" * 32, mine[:-1], mine + "0", "", "' OR 1=1 --", "../" * 9):
        assert two.post("/vote", trial=token, choice="A").status_code == 404
        assert two.post("/undo", trial=token).status_code == 404
    assert two.get(f"/picture/{mine}/0").status_code == 404
    assert one.get(f"/picture/{mine}/8").status_code == 200
    for place_ in ("9", "-1", "x", "1.0", "99999999999999999999"):
        assert one.get(f"/picture/{mine}/{place_}").status_code == 404
    one.vote("A", mine)
    assert one.get(f"/picture/{mine}/0").status_code == 404  # judged: there is nothing more to see
    nobody = app.test_client()
    headers = {"X-CSRF-Token": csrf_of(nobody.get("/").text)}
    for path in ("/trial", "/vote", "/undo"):
        answer = nobody.post(path, data={"trial": mine, "choice": "A"}, headers=headers)
        assert answer.status_code == 403
    assert nobody.get(f"/picture/{mine}/0").status_code == 403


def test_wrong_bodies_methods_and_sizes_are_refused(app, place):
    judge = Judge(app)
    token = judge.trial()["trial"]
    headers = judge.headers
    for choice in ("?", "a", "", "AB", "A,B"):
        assert judge.client.post("/vote", data={"trial": token, "choice": choice}, headers=headers).status_code == 400
    for body in ({"trial": "5", "choice": "A"}, {"choice": "A"}, {"trial": "", "choice": "A"}):
        assert judge.client.post("/vote", data=body, headers=headers).status_code == 404
    for body in ({"trial": token}, {}):
        assert judge.client.post("/vote", data=body, headers=headers).status_code == 400
    for body in ({"trial": token, "choice": "A"}, [], "A", None, 7):  # the script sends a form
        assert judge.client.post("/vote", json=body, headers=headers).status_code == 400
    big = {"trial": token, "choice": "A", "more": "x" * 10_000}
    assert judge.client.post("/vote", data=big, headers=judge.headers).status_code == 413
    assert judge.client.post("/start", data={"name": "x" * 10_000}, headers=judge.headers).status_code == 413
    for path, methods in (("/vote", "GET PUT DELETE PATCH"), ("/trial", "GET"), ("/quit", "GET"), ("/", "POST")):
        for method in methods.split():
            assert judge.client.open(path, method=method, headers=judge.headers).status_code == 405
    for path in ("../5_arena.py", "%2e%2e/base.html", "..%2f..%2f.env", "/etc/passwd", "..\\base.html"):
        assert judge.get(f"/static/{path}").status_code == 404
    assert not place.log.votes(place.number)


def test_text_that_is_no_unicode_is_another_trial(app):
    judge = Judge(app)
    judge.trial()
    for path, status in (("/vote", 404), ("/undo", 404), ("/trial", 409)):
        body, kind = "trial=%ed%a0%80&after=%ed%a0%80&choice=A", "application/x-www-form-urlencoded"
        answer = judge.client.post(path, data=body, content_type=kind, headers=judge.headers)
        assert answer.status_code == status and "error" in answer.json


def test_errors_are_json_for_the_script_and_pages_for_people(app, monkeypatch, place):
    client = app.test_client()
    assert client.post("/vote", json={}).is_json and client.get("/picture/0/0").is_json
    for path in ("/votes.csv", "/vote-for-us", "/trials", "/picture.png"):
        assert client.get(path).mimetype == "text/html", path
    client.get("/")
    monkeypatch.setattr(place.log, "one", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("disk I/O error")))
    page = client.get("/")
    assert page.status_code == 503 and "vote" not in re.sub("<[^>]*>", "", page.text).lower().replace("voting", "")


def test_every_page_has_the_headers(app):
    judge = Judge(app)
    token = judge.trial()["trial"]
    for path in ("/", "/thanks", "/nothing", f"/picture/{token}/0", "/static/arena.css", "/results"):
        headers = judge.get(path).headers
        assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Frame-Options"] == "DENY"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    for page in (ROOT / "templates").glob("*.html"):
        if page.name != "report.html":
            assert not re.search(r"\son[a-z]+=|\sstyle=|<style|<script(?! type=\"module\" src=)", page.read_text()), (
                page
            )


def test_script_in_names_and_titles_stays_text(tmp_path):
    nasty = "<script>alert(1)</script>\"'><img src=x onerror=y> \u202egnp.exe"
    master, images = make_world(
        tmp_path,
        pictures=False,
        title=[nasty] * 160,
        prompt=[nasty] * 160,
        object_type=[nasty] * 160,
        style=[nasty] * 160,
    )
    app = arena.create_app(world.setup(master, images, tmp_path / "a.sqlite", query="text"))
    judge = Judge(app, nasty[:60])
    assert judge.trial()["words"] == nasty  # JSON, which the page's script puts in as text
    assert judge.post("/trial", after=None).content_type == "application/json"
    for choice in "ABTNAB":
        judge.vote(choice)
    admin = app.test_client()
    assert admin.get(f"/results?token={KEYS['admin_token']}").status_code == 303
    pages = [admin.get("/results").text, judge.get("/").text, judge.get("/thanks").text]
    judge.client.post("/quit", headers=judge.headers)
    pages.append(judge.get("/").text)
    for page in pages:
        assert "<script>alert" not in page and "onerror=y>" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in pages[0] and "<bdi>" in pages[3]


def test_a_name_cannot_be_a_spreadsheets_formula(app, place):
    for name in ("=1+1", "+A1", "-2", "@x", "plain"):
        Judge(app, name).vote("A")
    text = arena.export(place.log, place.log.experiments())
    names = [row["judge_name"] for row in csv.DictReader(io.StringIO(text))]
    assert names == ["'=1+1", "'+A1", "'-2", "'@x", "plain"]


# --------------------------------------------------------------------------------------------------------------------
# Who may see what


def test_results_are_for_the_admin_and_with_reveal_for_those_who_have_finished(catalogue, tmp_path):
    app = arena.create_app(world.setup(*catalogue, tmp_path / "a.sqlite"))
    judge = Judge(app)
    judge.vote("A")
    for path in ("/results", "/votes.csv"):
        assert judge.get(path).status_code == 403
        assert "dual_lora" not in judge.get(path).text
    assert judge.get("/results?token=wrong").status_code == 403
    assert judge.get("/search").status_code == 404
    admin = app.test_client()
    response = admin.get(f"/results?token={KEYS['admin_token']}")
    assert response.status_code == 303 and response.location == "results"
    assert "HttpOnly" in response.headers["Set-Cookie"] and KEYS["admin_token"] not in response.headers["Set-Cookie"]
    page = admin.get("/results").text
    assert "dual_lora" in page and "Wilson" in page and "<svg" in page
    arena_of = app.extensions["arena"]
    arena_of.keys = arena_of.keys | {"admin_token": "another"}
    assert admin.get("/results").status_code == 403  # the cookie went with the token
    arena_of.keys = KEYS
    assert admin.get("/votes.csv").text.count("\n") == 2
    open_app = arena.create_app(world.setup(*catalogue, tmp_path / "a.sqlite", reveal=True))
    judge = Judge(open_app, "Zoe")
    judge.vote("B")
    for path in ("/results", "/search", "/item/3"):
        assert judge.get(path).status_code == 403  # in the middle of voting
    assert "results" not in judge.get("/thanks").text
    judge.client.post("/quit", headers=judge.headers)
    assert 'href="results"' in judge.get("/thanks").text
    assert (
        judge.get("/results").status_code == judge.get("/search").status_code == judge.get("/item/3").status_code == 200
    )
    assert judge.get("/item/999").status_code == 404
    # Names and single votes stay with the admin.
    assert "Zoe" not in judge.get("/results").text
    assert judge.get("/votes.csv").status_code == 403
    admin = open_app.test_client()
    admin.get(f"/results?token={KEYS['admin_token']}")
    assert "Zoe" in admin.get("/votes.csv").text


@pytest.mark.parametrize("path", ["/results", "/search"])
def test_who_has_looked_at_the_results_votes_no_more(catalogue, tmp_path, path):
    app = arena.create_app(world.setup(*catalogue, tmp_path / "a.sqlite", reveal=True))
    judge = Judge(app)
    judge.vote("A")
    token = judge.trial()["trial"]
    cookie = judge.client.get_cookie("judge", domain="127.0.0.1").value
    judge.client.post("/quit", headers=judge.headers)
    assert judge.get(path).status_code == 200
    refused = judge.client.post("/start", headers=judge.headers)
    assert refused.status_code == 403 and "no longer be blind" in refused.text
    other = app.test_client()  # the cookie from before, as in another browser
    other.set_cookie("judge", cookie, domain="127.0.0.1")
    assert other.post("/start", headers=judge.headers).status_code == 303
    answer = judge.post("/vote", trial=token, choice="A")
    assert answer.status_code == 403 and "no longer be blind" in answer.json["error"]
    nobody = app.test_client()
    nobody.get(path, headers={"Host": judge.host})  # looks first, and starts then
    headers = {"Host": judge.host, "X-CSRF-Token": csrf_of(nobody.get("/", headers={"Host": judge.host}).text)}
    assert nobody.post("/start", headers=headers).status_code == 403


def test_another_host_asks_for_the_judges_token(catalogue, tmp_path, monkeypatch):
    app = arena.create_app(world.setup(*catalogue, tmp_path / "a.sqlite", host="10.1.2.3", trusted_host="shop.example"))
    for token in ("", "wrong", KEYS["admin_token"], "é"):
        client = app.test_client()
        headers = {"Host": "10.1.2.3", "X-CSRF-Token": csrf_of(client.get("/", headers={"Host": "10.1.2.3"}).text)}
        refused = client.post("/start", data={"token": token}, headers=headers)
        assert refused.status_code == 403 and "judges' token" in html.unescape(refused.text)
    page = app.test_client().get(f"/?token={KEYS['judge_token']}", headers={"Host": "shop.example"}).text
    assert f'value="{KEYS["judge_token"]}"' in page
    Judge(app, host="shop.example").vote("A")
    assert app.test_client().get("/", headers={"Host": "else.example"}).status_code == 400
    monkeypatch.setenv("ARENA_JUDGE_TOKEN", "from-the-environment")
    keys = arena.read_keys(tmp_path / "k.sqlite")
    assert keys["judge_token"] == "from-the-environment" and len(keys["admin_token"]) >= 24
    assert arena.read_keys(tmp_path / "k.sqlite") == keys
    file = tmp_path / "k.sqlite.keys.json"
    assert file.stat().st_mode & 0o077 == 0 and "environment" not in file.read_text()


def test_blanks_around_a_token_of_the_environment_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("ARENA_JUDGE_TOKEN", " for-judges \n")
    monkeypatch.setenv("ARENA_ADMIN_TOKEN", "  ")
    keys = arena.read_keys(tmp_path / "k.sqlite")
    assert keys["judge_token"] == "for-judges" and len(keys["admin_token"]) >= 24


@pytest.mark.parametrize("header", "X-Forwarded-For X-Forwarded-Proto X-Real-IP Forwarded Via HTTP/1.0".split())
def test_a_request_through_a_proxy_brings_the_judges_token(app, header):
    plain = {"SERVER_PROTOCOL": header} if header == "HTTP/1.0" else {}  # nginx, as it is without further settings
    client, host = app.test_client(), {"Host": "127.0.0.1:8000"} | ({} if plain else {header: "1"})
    page = client.get("/", headers=host, environ_overrides=plain).text
    assert 'name="token"' in page
    headers = host | {"X-CSRF-Token": csrf_of(page)}
    for token in ("", "wrong"):
        answer = client.post("/start", data={"token": token}, headers=headers, environ_overrides=plain)
        assert answer.status_code == 403 and "judges' token" in html.unescape(answer.text)
    form = {"token": KEYS["judge_token"]}
    assert client.post("/start", data=form, headers=headers, environ_overrides=plain).status_code == 303
    client.post("/quit", headers=headers)
    page = client.get("/", headers=host, environ_overrides=plain).text
    assert "Welcome back" in page and 'name="token"' not in page  # who is known is not asked again
    assert client.post("/start", headers=headers, environ_overrides=plain).status_code == 303
    assert 'name="token"' not in app.test_client().get("/", headers={"Host": "127.0.0.1:8000"}).text  # this machine


def test_with_a_trusted_host_everybody_brings_the_judges_token(catalogue, tmp_path):
    """A proxy that leaves no trace looks like a browser on this machine."""
    app = arena.create_app(world.setup(*catalogue, tmp_path / "a.sqlite", trusted_host="shop.example,other.example"))
    for host in ("127.0.0.1:8000", "shop.example", "other.example"):
        client = app.test_client()
        page = client.get("/", headers={"Host": host}).text
        assert 'name="token"' in page
        headers = {"Host": host, "X-CSRF-Token": csrf_of(page)}
        assert client.post("/start", data={"token": "x"}, headers=headers).status_code == 403
        Judge(app, host=host).vote("A")


def test_every_link_works_below_a_path(catalogue, tmp_path):
    """A proxy that serves the arena at /arena/ strips that off; what the pages name must lead back below it."""
    app = arena.create_app(world.setup(*catalogue, tmp_path / "a.sqlite", reveal=True))
    judge = Judge(app)
    judge.vote("A")
    admin = app.test_client()
    assert admin.get(f"/results?token={KEYS['admin_token']}").location == "results"
    pages = {path: judge.get(path).text for path in ("/", "/thanks", "/nowhere", "/no/where/deep", "/picture/x/y")}
    pages |= {path: admin.get(path).text for path in ("/", "/results", "/search")}
    for path, page in pages.items():
        links = re.findall(r'(?:href|src|action)="([^"#]+)', page)
        assert len(links) >= 3 or path.startswith("/picture"), path
        for link in links:
            target = urllib.parse.urljoin(f"http://shop.example/arena{path}", link)
            assert target.startswith("http://shop.example/arena/"), (path, link)
            found = admin.get(target.removeprefix("http://shop.example/arena"))
            assert found.status_code in (200, 405), (path, link)  # 405: what a form posts to
    script = judge.get("/static/arena.js").text
    assert not re.search(r"""["'`]/[a-z]""", script)
    assert judge.client.post("/quit", headers=judge.headers).location == "thanks"
    assert judge.client.post("/start", headers=judge.headers).location == "./"


def tiny_models(folder: Path, **columns) -> tuple[Path, Path, list]:
    """(master.parquet of 24 drawn pictures as two small CLIPs see them, images folder, the two models)."""
    import torch

    from tiny import make_clip

    folders = [make_clip(folder / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    loaded = [common.load_clip(f"local-dir:{one}") for one in folders]
    images = folder / "images"
    pictures = [arena.load_image(world.draw_picture(images / f"p/{i}.jpg", i)) for i in range(24)]
    vectors = {}
    for kind, model in zip(("base", "finetuned"), loaded, strict=True):
        pixels = torch.stack(
            [torch.from_numpy(np.array(arena.letterbox(p, model.size))).permute(2, 0, 1) for p in pictures]
        )
        vectors[f"{kind}_embedding"] = common.encode(model, pixels).numpy()
    facts = {"base_model": f"local-dir:{folders[0]}", "finetuned_model": "local-dir:two"}  # beside master.parquet
    facts |= {"base_fingerprint": loaded[0].fingerprint, "finetuned_fingerprint": loaded[1].fingerprint}
    return write_master(folder / "m.parquet", vectors, facts=facts, **columns), images, loaded


def read_vectors(master: Path) -> dict[str, np.ndarray]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(master)
    return {name: np.stack(table[name].to_pylist()) for name in table.column_names if name.endswith("embedding")}


def test_words_that_people_typed_are_asked_and_the_log_names_their_file(tmp_path, capsys):
    master, images, models = tiny_models(tmp_path, color=["red", "blue"] * 12)
    file, database = tmp_path / "shop queries.csv", tmp_path / "a.sqlite"
    file.write_text("query,id,weight\ngrey couch,id-1,3\nGrey  Couch,id-2,1\nnight lamp,id-8,1\n=tall shelf,id-9,2\n"
                    "lost,id-99,1\n,id-3,1\nnight lamp,id-8,1\n")  # fmt: skip
    settings = {"query": "text", "queries": str(file), "shared": 0.0}
    app = arena.create_app(world.setup(master, images, database, **settings))
    said, place, vectors = capsys.readouterr().err, app.extensions["arena"], read_vectors(master)
    assert "3 queries" in said and all(f"left out: 1 rows ({why}" in said for why in ("product", "empty", "duplicate"))
    judge = Judge(app)
    for number in range(3):
        trial = judge.trial()
        row = shown(place.log, trial["trial"])
        assert trial["words"] == row["query"] in ("grey couch", "night lamp", "=tall shelf")
        for kind, model in zip(("base", "finetuned"), models, strict=True):
            scores = vectors[f"{kind}_embedding"] @ common.encode(model, captions=[row["query"]]).numpy()[0]
            side = "left" if row["left_model"] == model.fingerprint else "right"
            assert row[f"{side}_items"] == [f"id-{i}" for i in np.argsort(-scores)[:4]]  # right answers among them
        assert row["category"] == {"=tall shelf": "lamp", "night lamp": "lamp"}.get(row["query"], "chair")
        attributes = row["facts"]["left_attributes"]
        assert (attributes["color"] is None) == (row["query"] == "grey couch")  # one is red, the other blue
        for response in everything(judge, trial["trial"])[:2]:
            text = response.text.lower().replace("the right kind", "")
            assert "queries" not in text and not SECRETS.search(text)
        assert judge.get(f"/picture/{trial['trial']}/0").status_code == 404
        judge.vote("AB"[number % 2])
    assert judge.trial()["trial"] is None
    digest = common.file_digest(file)
    facts = place.log.experiments()[0]["facts"]
    assert facts["file"] == {"name": "shop queries.csv", "sha256": digest, "queries": 3, "trained": 2, "made_up": False}
    assert arena.main(["stats", "--database", str(database)]) == 0
    assert f"words from shop queries.csv (sha256 {digest[:12]}); 2 of its 3" in capsys.readouterr().out
    admin = app.test_client()
    admin.get(f"/results?token={KEYS['admin_token']}")
    assert "shop queries.csv" in admin.get("/results").text
    assert "'=tall shelf," in admin.get("/votes.csv").text  # a stranger's text is no formula
    again = arena.Arena(world.setup(master, images, database, **settings))
    assert again.number == 1 and "found the answers" not in capsys.readouterr().err
    file.write_text(file.read_text() + "new,id-3,1\n")  # another file is another experiment
    assert arena.Arena(world.setup(master, images, database, **settings)).number == 2
    flags = ["--database", str(database), "--embeddings", str(master)]
    assert arena.main(["stats", *flags, "--format", "json"]) == 0
    assert [one["experiment"]["id"] for one in json.loads(capsys.readouterr().out)] == [1, 2]
    for wrong, message in ((["--queries", "20"], "--limit"), (["--query", "text", "--queries", "none.csv"], "no such")):
        assert arena.main(["serve", *flags, "--images", str(images), *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_search_page_answers_with_both_models(tmp_path):
    master, images, loaded = tiny_models(tmp_path)
    vectors = read_vectors(master)
    app = arena.create_app(world.setup(master, images, tmp_path / "a.sqlite", reveal=True))
    client = app.test_client()
    assert client.get("/search").status_code == 200
    page = client.get("/search?q=red+chair").text
    asked = common.encode(loaded[0], captions=["red chair"]).numpy()
    best = int(np.argmax(vectors["base_embedding"] @ asked[0]))
    hits = re.findall(r'src="item/(\d+)"', page)
    assert len(hits) == 16 and int(hits[0]) == best and "dual_lora" in page
    assert client.get(f"/item/{best}").data == app.extensions["arena"].jpeg(best)
    upload = {"picture": ((images / "p/7.jpg").open("rb"), "x.jpg")}
    assert client.post("/search", data=upload).status_code == 403
    csrf = {"csrf": csrf_of(page)}  # as the page's form sends it, before the picture
    upload = csrf | {"picture": ((images / "p/7.jpg").open("rb"), "x.jpg")}
    page = client.post("/search", data=upload).text
    hits = re.findall(r'src="item/(\d+)"', page)
    assert hits[0] == hits[8] == "7" and "data:image/jpeg;base64," in page
    for body in (b"", b"no picture", b"\xff\xd8\xff broken"):
        upload = csrf | {"picture": (io.BytesIO(body), "x.jpg")}
        assert client.post("/search", data=upload).status_code == 400
    upload = csrf | {"picture": (io.BytesIO(b"x" * (arena.UPLOAD_LIMIT + 1)), "x.jpg")}
    assert client.post("/search", data=upload).status_code == 413
    changed = write_master(tmp_path / "n.parquet", vectors, facts={"base_model": f"local-dir:{tmp_path / 'one'}"})
    app = arena.create_app(world.setup(changed, images, tmp_path / "b.sqlite", reveal=True))
    response = app.test_client().get("/search?q=chair")
    assert response.status_code == 500 and "run 4_embed.py again" in response.text


# --------------------------------------------------------------------------------------------------------------------
# Results


def test_stats_and_votes_are_recomputed_from_the_log(app, place, tmp_path, capsys):
    chance = random.Random(2)
    judges = [Judge(app, f"J{i}") for i in range(3)]
    tally = Counter()
    for judge in judges:
        seen = set()
        for _ in range(30):
            token = judge.trial()["trial"]
            row = shown(place.log, token)
            choice = chance.choice(["A", *CHOICES])
            judge.vote(choice, token)
            if choice in "AB" and row["query"] not in seen:
                won = row["left_model"] if choice == "A" else row["right_model"]
                tally["wins" if won == "f" * 64 else "losses"] += 1
            if choice != "N":
                seen.add(row["query"])
    database = str(tmp_path / "a.sqlite")
    assert arena.main(["stats", "--database", database, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)[0]
    assert (found["challenger"], found["base"]) == ("dual_lora", "secret-base-model")
    assert {name: found["counts"][name] for name in ("wins", "losses")} == dict(tally)
    assert sum(found["votes"]["excluded"].values()) + found["votes"]["counted"] == found["votes"]["rows"] == 90
    assert found["position"]["share_a"] > 0.5 and found["anytime"]["course"]["n"][-1] == found["anytime"]["queries"]
    assert arena.main(["stats", "--database", database]) == 0
    text = capsys.readouterr().out
    assert f"{tally['wins']} wins, {tally['losses']} losses" in text and "confidence sequence" in text
    assert "  style" in text and "in rows that won" in text
    assert arena.main(["votes", "--database", database]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 90 and {row["judge_name"] for row in rows} == {"J0", "J1", "J2"}
    assert Counter(row["choice"] for row in rows) == Counter(v["choice"] for v in place.log.votes(place.number))
    for row in rows:
        preferred = arena.CHOICES | {"A": row["left_model"], "B": row["right_model"], "T": "tie", "N": ""}
        assert row["preferred"] == preferred[row["choice"]]


@pytest.mark.parametrize("votes", [0, 1, 5])
def test_the_results_page_stands_with_few_votes(app, votes):
    judge = Judge(app)
    for number in range(votes):
        judge.vote("ATNBA"[number])
    admin = app.test_client()
    admin.get(f"/results?token={KEYS['admin_token']}")
    page = admin.get("/results")
    assert page.status_code == 200 and ("No votes yet" in page.text) == (votes == 0)
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", page.text.lower())


def test_plots_keep_to_their_box(app):
    judge, admin = Judge(app), app.test_client()
    admin.get(f"/results?token={KEYS['admin_token']}")
    for number in range(40):
        judge.vote(["A", *CHOICES][number % (1 + len(CHOICES))])
        lines = re.findall(r' points="([^"]+)"', admin.get("/results").text)
        points = [tuple(map(float, point.split(","))) for line in lines for point in line.split()]
        assert len(lines) >= 2 and all(0 <= x <= 540 and 0 <= y <= 180 for x, y in points)


# --------------------------------------------------------------------------------------------------------------------
# Faults


def test_every_connection_has_its_pragmas(app, place):
    names, seen = ("journal_mode", "synchronous", "busy_timeout", "foreign_keys"), []

    def look():
        db = place.log.connection
        seen.append([db.execute(f"PRAGMA {name}").fetchone()[0] for name in names])

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    look()
    assert seen == [["wal", 2, 10_000, 1]] * 4  # synchronous 2 is FULL: a commit is on the disk


def test_a_hundred_parallel_posts_of_one_vote_make_one_row(app, place):
    judge = Judge(app)
    token = judge.trial()["trial"]
    cookie = judge.client.get_cookie("judge", domain="127.0.0.1").value

    def post(_):
        client = app.test_client()
        client.set_cookie("judge", cookie, domain="127.0.0.1")
        return client.post("/vote", data={"trial": token, "choice": "A"}, headers=judge.headers)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(post, range(100)))
    assert {answer.status_code for answer in answers} == {200} and len({answer.data for answer in answers}) == 1
    assert len(place.log.votes(place.number)) == 1


def test_a_hundred_parallel_first_visits_draw_one_trial(app, place):
    judge = Judge(app)
    with ThreadPoolExecutor(20) as pool:
        tokens = {trial["trial"] for trial in pool.map(lambda _: place.trial(judge.id), range(100))}
    assert len(tokens) == 1


def test_a_full_disk_answers_503_and_acknowledges_nothing(app, place, capsys):
    judge = Judge(app)
    judge.vote("A")
    token = judge.trial()["trial"]
    db = place.log.connection
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite itself reports SQLITE_FULL from here on
    answers = []
    for _ in range(300):  # what is left in the last pages is used up first
        trial = judge.post("/trial", after=None)
        if trial.status_code == 503:
            break
        token = trial.json["trial"]
        answers.append(judge.post("/vote", trial=token, choice="A"))
        if answers[-1].status_code == 503:
            break
    refused = trial if trial.status_code == 503 else answers.pop()
    assert refused.status_code == 503 and "tried again" in refused.json["error"]
    assert "full" in capsys.readouterr().err
    acknowledged = 1 + len([answer for answer in answers if answer.status_code == 200])
    assert len(place.log.votes(place.number)) == acknowledged
    db.execute("PRAGMA max_page_count = 1000000")
    judge.vote("A")
    assert len(place.log.votes(place.number)) == acknowledged + 1


def test_a_log_that_lacks_a_column_gets_one_line(tmp_path, capsys):
    database = tmp_path / "other.sqlite"
    arena.Log(database).experiment("key", {})
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.execute("ALTER TABLE experiments RENAME COLUMN facts TO fact")
    for command in ("stats", "votes"):
        assert arena.main([command, "--database", str(database)]) == 1
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and "damaged, or not written by this program" in printed


def test_stats_and_votes_leave_the_database_as_it_is(app, place, tmp_path, capsys):
    Judge(app, "Ada").vote("A")
    copy = tmp_path / "copy.sqlite"
    with contextlib.closing(sqlite3.connect(copy)) as db:
        place.log.connection.backup(db)
        db.execute("PRAGMA journal_mode = DELETE")
    before = copy.read_bytes()
    for command in ("stats", "votes"):
        assert arena.main([command, "--database", str(copy)]) == 0
        assert "Ada" in capsys.readouterr().out or command == "stats"
        assert copy.read_bytes() == before and not list(tmp_path.glob("copy.sqlite-*"))


def test_a_wrong_images_folder_makes_no_database(catalogue, tmp_path, capsys):
    flags = ["--database", str(tmp_path / "a.sqlite"), "--embeddings", str(catalogue[0])]
    assert arena.main(["serve", *flags, "--images", str(tmp_path / "nowhere")]) == 2
    assert "no such images folder" in capsys.readouterr().err and not (tmp_path / "a.sqlite").exists()


def test_a_locked_database_answers_503(app, place, tmp_path, monkeypatch):
    judge = Judge(app)
    token = judge.trial()["trial"]
    place.log.connection.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(tmp_path / "a.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert judge.post("/vote", trial=token, choice="A").status_code == 503
    other.execute("ROLLBACK")
    assert judge.vote("A", token)["number"] == 1


def read_line(process: subprocess.Popen, start: str, seconds: float = 30) -> str:
    """The first line of standard output that begins so."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        if line.startswith(start):
            return line
        assert line or process.poll() is None, process.stderr.read()
    raise AssertionError(f"no line {start!r}")


def serve(master: Path, images: Path, database: Path, *flags: str) -> tuple[subprocess.Popen, str]:
    """Start the server as people do; returns the process and its address."""
    command = [sys.executable, str(ROOT / "5_arena.py"), "serve", "--embeddings", str(master), "--images", str(images)]
    command += ["--database", str(database), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, read_line(process, "Vote at").split()[-1].rstrip("/")


def serving(command: list[str], said: Path) -> None:
    """The real command line, for a process of its own, which prints into a file."""
    with open(said, "w", buffering=1) as file, contextlib.redirect_stdout(file):
        code = arena.main(command)
    sys.exit(code)


class Caller:
    """A judge over real HTTP; `headers` make another caller the same judge."""

    def __init__(self, home: str, headers: dict | None = None):
        self.home, self.headers = home, headers or {}
        if not headers:
            with urllib.request.urlopen(home + "/", timeout=10) as page:
                self.headers = {"Cookie": page.headers["Set-Cookie"].split(";")[0]}
                self.headers["X-CSRF-Token"] = csrf_of(page.read().decode())
            request = urllib.request.Request(home + "/start", b"name=x", self.headers)
            with urllib.request.urlopen(request, timeout=10) as page:  # redirected to the voting page
                assert 'id="trial"' in page.read().decode()

    def post(self, path: str, **body) -> dict:
        form = urllib.parse.urlencode({name: value for name, value in body.items() if value is not None})
        request = urllib.request.Request(self.home + path, form.encode(), self.headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)


def test_killed_twenty_times_under_twenty_voters_every_acknowledged_vote_stands_once(tmp_path):
    master, images = make_world(tmp_path, count=4 * 600, pictures=False)
    database = tmp_path / "a.sqlite"
    acknowledged: dict[str, str] = {}
    doubtful: dict[str, tuple[str, dict]] = {}  # sent, but never answered: token -> (choice, the judge's headers)
    chance = random.Random(20)
    judges: list[dict] = []
    context = fork_server("test_arena", "waitress", "pyarrow.parquet")
    command = f"serve --embeddings {master} --images {images} --database {database} --port 0".split()
    for round_ in range(21):
        said = tmp_path / f"said-{round_}"
        process = context.Process(target=serving, args=(command, said))
        process.start()
        while not (said.exists() and (found := re.search("Vote at +(http\\S+)/\n", said.read_text()))):
            assert process.is_alive()
            time.sleep(0.01)
        home = found[1]
        for token, (choice, headers) in list(doubtful.items()):  # replay what was in doubt
            answer = Caller(home, headers).post("/vote", trial=token, choice=choice)
            assert answer["choice"] == choice
            acknowledged[token] = choice
            del doubtful[token]
        if not judges:
            judges = [Caller(home).headers for _ in range(20)]
        if round_ == 20:
            process.terminate()
            process.join(20)
            assert process.exitcode == 0
            break
        goal = len(acknowledged) + chance.randint(1, 25)
        enough = threading.Event()

        def people(headers: dict, home=home, goal=goal, enough=enough, seed=round_) -> None:
            own, caller = random.Random(f"{headers} {seed}"), Caller(home, headers)
            while not enough.is_set():
                token = None
                try:
                    token = caller.post("/trial", after=None)["trial"]
                    choice = own.choice(CHOICES)
                    doubtful[token] = (choice, headers)
                    caller.post("/vote", trial=token, choice=choice)
                except (OSError, http.client.HTTPException):  # killed: nothing came, or half an answer
                    return
                acknowledged[token] = doubtful.pop(token)[0]
                if len(acknowledged) >= goal:
                    enough.set()

        threads = [threading.Thread(target=people, args=(headers,)) for headers in judges]
        for thread in threads:
            thread.start()
        assert enough.wait(30)
        process.kill()  # while the others are in the middle of theirs
        process.join(10)
        for thread in threads:
            thread.join(15)
    log = arena.Log(database, create=False)
    votes = log.votes(1)
    assert Counter(vote["token"] for vote in votes) == Counter(acknowledged.keys())
    assert {vote["token"]: vote["choice"] for vote in votes} == acknowledged
    assert log.connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert len(acknowledged) >= 100


def test_serve_speaks_plainly(catalogue, tmp_path, capsys):
    master, images = catalogue
    process, home = serve(master, images, tmp_path / "a.sqlite")
    try:
        answer = urllib.request.urlopen(home + "/", timeout=10)
        page = answer.read().decode()
        assert answer.headers.get("Server") in (None, "") and "Blind search test" in page and "token" not in page
        forwarded = urllib.request.Request(home + "/", headers={"X-Forwarded-For": "203.0.113.9"})
        assert 'name="token"' in urllib.request.urlopen(forwarded, timeout=10).read().decode()
        port = home.rpartition(":")[2]
        common_flags = ["--embeddings", str(master), "--images", str(images)]
        assert arena.main(["serve", *common_flags, "--database", str(tmp_path / "a.sqlite")]) == 1
        assert "another arena serves it" in capsys.readouterr().err
        assert arena.main(["serve", *common_flags, "--database", str(tmp_path / "b.sqlite"), "--port", port]) == 1
        assert "choose another --host or --port" in capsys.readouterr().err
    finally:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # inherited, where a shell runs the tests behind it
        process.send_signal(signal.SIGTERM if ignored else signal.SIGINT)
        assert process.wait(20) == 0
    assert "stopped" in process.stderr.read()


def test_twenty_browsers_may_keep_six_connections_each(catalogue, tmp_path):
    process, home = serve(*catalogue, tmp_path / "a.sqlite")
    kept = [http.client.HTTPConnection(home.removeprefix("http://"), timeout=10) for _ in range(130)]
    try:
        for connection in kept:  # all stay open, as browsers leave them
            connection.request("GET", "/static/icon.svg")
            assert connection.getresponse().read().startswith(b"<svg")
    finally:
        process.terminate()
        process.wait(20)
    assert {connection.sock is not None for connection in kept} == {True}


def test_bad_use_gets_one_line(tmp_path, catalogue, capsys):
    master, images = catalogue
    vectors = world.random_vectors(24)
    paths = {
        "same": write_master(tmp_path / "same.parquet", vectors, facts={"finetuned_fingerprint": "b" * 64}),
        "untested": write_master(tmp_path / "untested.parquet", vectors, split=["train"] * 24),
        "few": write_master(tmp_path / "few.parquet", vectors, group=["g"] * 22 + ["h", "i"]),
        "other": write_master(tmp_path / "other.parquet", vectors),
    }
    broken = vectors | {"finetuned_embedding": vectors["finetuned_embedding"].copy()}
    broken["finetuned_embedding"][5, 3] = np.nan
    paths["nan"] = write_master(tmp_path / "nan.parquet", broken)
    paths["narrow"] = write_master(tmp_path / "narrow.parquet", {"base_embedding": vectors["base_embedding"]})
    (tmp_path / "text").write_text("no parquet")
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"a": [1]}), tmp_path / "columns.parquet")
    cases = [
        ([], "needs --embeddings and --images", 2),
        (["--embeddings", "nowhere.parquet", "--images", str(images)], "run 4_embed.py first", 2),
        (["--embeddings", str(tmp_path / "text"), "--images", str(images)], "not a readable Parquet file", 1),
        (["--embeddings", str(tmp_path / "columns.parquet"), "--images", str(images)], "no column image_id", 1),
        (["--embeddings", str(master), "--images", str(tmp_path / "none")], "no such images folder", 2),
        (["--embeddings", str(master), "--images", str(images), "--top-k", "0"], "--top-k 0", 2),
        (["--embeddings", str(paths["same"]), "--images", str(images)], "both models are the same", 1),
        (["--embeddings", str(paths["untested"]), "--images", str(images)], "no row of the test split", 1),
        (["--embeddings", str(paths["few"]), "--images", str(images)], "fewer than 4 items", 1),
        (["--embeddings", str(paths["nan"]), "--images", str(images)], "not finite", 1),
        (["--embeddings", str(paths["narrow"]), "--images", str(images)], "no column finetuned_embedding", 1),
        (
            ["--embeddings", str(master), "--embeddings", str(paths["other"]), "--images", str(images)],
            "different items",
            1,
        ),
    ]
    for number, (flags, expected, code) in enumerate(cases):
        assert arena.main(["serve", *flags, "--database", str(tmp_path / f"{number}.sqlite")]) == code, flags
        said = capsys.readouterr().err
        assert expected in said and "Traceback" not in said, said
    (tmp_path / "junk.sqlite").write_bytes(b"not a database at all" * 100)
    flags = ["--embeddings", str(master), "--images", str(images), "--database", str(tmp_path / "junk.sqlite")]
    assert arena.main(["serve", *flags]) == 1 and "cannot be used" in capsys.readouterr().err
    assert arena.main(["stats", "--database", str(tmp_path / "no.sqlite")]) == 1
    assert "unable to open" in capsys.readouterr().err
    assert not (tmp_path / "no.sqlite").exists()


def test_vectors_stay_on_disk_and_answers_are_kept(tmp_path, monkeypatch):
    master, images = make_world(tmp_path, pictures=False)
    place = arena.Arena(world.setup(master, images, tmp_path / "a.sqlite"))
    blocks = place.experiment.models[0].items.vectors("base_embedding")
    assert max(map(len, blocks)) <= common.VECTOR_ROWS
    import pyarrow as pa

    items = arena.Items(write_master(tmp_path / "large.parquet", world.random_vectors(4000, 128)))
    before = pa.total_allocated_bytes()
    for name in ("base_embedding", "finetuned_embedding"):  # 2 MB each
        assert sum(map(len, items.vectors(name))) == 4000
    assert pa.total_allocated_bytes() - before < 1e6
    monkeypatch.setattr(common, "top_k", lambda *_: pytest.fail("searched again"))
    again = arena.Arena(world.setup(master, images, tmp_path / "a.sqlite"))
    assert (again.experiment.lists == place.experiment.lists).all()
    monkeypatch.undo()
    make_world(tmp_path, pictures=False, seed=9)  # other vectors in the same place: nothing stale is used
    changed = arena.Arena(world.setup(master, images, tmp_path / "a.sqlite"))
    assert (changed.experiment.lists != place.experiment.lists).any()
    assert os.listdir(tmp_path / "a.sqlite.cache")


def test_a_folder_of_parts_is_the_same_experiment_as_the_file(catalogue, tmp_path):
    import pyarrow.parquet

    (master, images), folder = catalogue, tmp_path / "master"
    folder.mkdir()
    table, parts = pyarrow.parquet.read_table(master), ["part-0.parquet", "part-1.parquet"]
    for name, part in zip(parts, (table.slice(0, 90), table.slice(90)), strict=True):
        pyarrow.parquet.write_table(part, folder / name)
    (folder / "part-9.parquet").write_bytes(b"of an earlier run")
    (folder / common.PARTS).write_text(json.dumps({"parts": parts}))
    one, two = (arena.Arena(world.setup(path, images, tmp_path / "a.sqlite")) for path in (master, folder))
    assert one.number == two.number and (one.experiment.lists == two.experiment.lists).all()
    assert one.folder == two.folder and one.experiment.items.row == two.experiment.items.row


def test_trials_of_answers_that_have_changed_can_still_be_shown(tmp_path):
    master, images = make_world(tmp_path)
    judge = Judge(arena.create_app(world.setup(master, images, tmp_path / "a.sqlite")))
    cookie = judge.client.get_cookie("judge", domain="127.0.0.1")
    trial = judge.trial()["trial"]
    before = [judge.get(f"/picture/{trial}/{place}").data for place in range(9)]
    world.write_master(tmp_path / "master.parquet", world.random_vectors(160, seed=4))
    app = arena.create_app(world.setup(master, images, tmp_path / "a.sqlite"))
    judge.client = app.test_client()
    judge.client.set_cookie("judge", cookie.value, domain="127.0.0.1")
    assert judge.trial()["trial"] == trial
    assert [judge.get(f"/picture/{trial}/{place}").data for place in range(9)] == before
    judge.vote("A")


def test_a_file_that_is_older_than_an_attribute_is_read_without_it(catalogue, tmp_path, capsys):
    import pyarrow.parquet

    master, images = catalogue
    table = pyarrow.parquet.read_table(master)
    assert {"style", "object_type"} < {*common.ATTRIBUTES}
    pyarrow.parquet.write_table(table.drop(["style", "object_type"]), tmp_path / "older.parquet")
    app = arena.create_app(world.setup(tmp_path / "older.parquet", images, tmp_path / "a.sqlite"))
    judge, place = Judge(app), app.extensions["arena"]
    row = shown(place.log, judge.trial()["trial"])
    rates = row["facts"]["left_attributes"]
    assert row["category"] == "other" and rates["style"] is rates["object_type"] is None and rates["color"] == 1
    judge.vote("A")
    assert [each["attribute"] for each in place.results()["attributes"]] in (["color"], ["color", "material"])
    pyarrow.parquet.write_table(table.drop(["title"]), tmp_path / "less.parquet")
    flags = ["--images", str(images), "--database", str(tmp_path / "b.sqlite")]
    assert arena.main(["serve", "--embeddings", str(tmp_path / "less.parquet"), *flags]) == 1
    assert "no column title" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# Databases of older versions


def make_old(database: Path) -> None:
    """Turn a database into one of the first edition: one vote a trial; what was taken back came as another trial."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        columns = "id INTEGER PRIMARY KEY, trial INTEGER NOT NULL UNIQUE REFERENCES trials, session INTEGER NOT NULL "
        columns += (
            "REFERENCES sessions, choice TEXT NOT NULL CHECK (choice IN ('A', 'B', 'T', 'N')), time TEXT NOT NULL"
        )
        db.execute(f"CREATE TABLE old ({columns})")
        db.execute("INSERT INTO old SELECT * FROM votes")
        db.execute("DROP TABLE votes")
        db.execute("ALTER TABLE old RENAME TO votes")
        newest = db.execute("SELECT MAX(id) FROM votes").fetchone()[0]
        db.execute("INSERT INTO revocations (vote, time) VALUES (?, 'then')", (newest,))
        kept = "experiment, judge, place, query, category, left_model, right_model, left_items, right_items, facts"
        db.execute(f"INSERT INTO trials (token, {kept}, reissue_of, time) SELECT 'new', {kept}, id, '' FROM trials "
                   f"WHERE id = (SELECT trial FROM votes WHERE id = {newest})")  # fmt: skip
        db.execute(f"INSERT INTO trials (token, {kept}, repeat_of, time) SELECT 'again', {kept}, id, '' FROM trials "
                   "WHERE id = 1")  # fmt: skip
        again = db.execute("SELECT id FROM trials WHERE token = 'again'").fetchone()[0]
        db.execute("INSERT INTO votes SELECT NULL, ?, session, choice, time FROM votes WHERE trial = 1", (again,))


def test_a_database_of_the_first_edition_goes_on_being_used(catalogue, tmp_path, capsys):
    database = tmp_path / "a.sqlite"
    judge = Judge(arena.create_app(world.setup(*catalogue, database)))
    tokens = []
    for choice in "ABAT":
        tokens.append(judge.trial()["trial"])
        judge.vote(choice)
    make_old(database)
    before = arena.Log(database, create=False).votes(1)
    assert arena.main(["stats", "--database", str(database), "--format", "json"]) == 0  # without changing the file
    excluded = {"undone": 1, "identical": 0, "abstained": 0, "repeat": 1}
    assert json.loads(capsys.readouterr().out)[0]["votes"] == {
        "rows": 5, "counted": 3, "judges": 1, "excluded": excluded,
    }  # fmt: skip
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert "UNIQUE" in db.execute("SELECT sql FROM sqlite_master WHERE name = 'votes'").fetchone()[0]
    cookie = judge.client.get_cookie("judge", domain="127.0.0.1")
    app = arena.create_app(world.setup(*catalogue, database))
    place, judge.client = app.extensions["arena"], app.test_client()
    judge.client.set_cookie("judge", cookie.value, domain="127.0.0.1")
    assert place.number == 1 and place.log.votes(1) == before
    assert judge.trial()["trial"] == "new" and judge.trial()["votes"] == 4  # the trial that took the old one's place
    assert judge.post("/vote", trial=tokens[3], choice="T").status_code == 404
    judge.vote("B", "new")
    judge.post("/undo", trial="new")
    assert judge.trial()["trial"] == "new" and judge.vote("A", "new")["number"] == 5
    assert [vote["choice"] for vote in place.log.votes(1)] == [*"ABATABA"]
    for verb in ("UPDATE votes SET time = ''", "DELETE FROM votes"):
        with pytest.raises(sqlite3.IntegrityError, match="insert-only"):
            place.log.connection.execute(verb)
    assert place.log.connection.execute("PRAGMA foreign_key_check").fetchall() == []


def stored(database: Path) -> tuple[dict, list]:
    """(what the database holds: name -> its CREATE; the votes)."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        made = dict(db.execute("SELECT name, sql FROM sqlite_master"))
        return made, db.execute("SELECT * FROM votes ORDER BY id").fetchall()


def recreate_votes(database: Path, old: str, new: str) -> None:
    """Make the table of votes, with its rows, from another text than the schema's."""
    schema = (arena.TEMPLATES / "schema.sql").read_text()
    assert schema.count(old) == 1
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.executescript(arena.REBUILD.format(schema=schema.replace(old, new)))


def test_votes_whose_check_lacks_a_choice_move_to_a_table_that_has_it(catalogue, tmp_path):
    database = tmp_path / "a.sqlite"
    judge = Judge(arena.create_app(world.setup(*catalogue, database)))
    for choice in "ABN":
        judge.vote(choice)
    judge.post("/undo", trial=judge.trial()["undo"])
    before = stored(database)
    recreate_votes(database, "'T', ", "")
    made, votes = stored(database)
    assert "'T'" not in made["votes"] and votes == before[1]
    cookie = judge.client.get_cookie("judge", domain="127.0.0.1")
    app = arena.create_app(world.setup(*catalogue, database))
    assert stored(database) == before  # with triggers and indexes
    judge.client = app.test_client()
    judge.client.set_cookie("judge", cookie.value, domain="127.0.0.1")
    assert judge.vote("T")["number"] == 3
    log = app.extensions["arena"].log
    assert [(vote["choice"], bool(vote["revoked"])) for vote in log.votes(1)] == [
        ("A", False), ("B", False), ("N", True), ("T", False),
    ]  # fmt: skip
    with pytest.raises(sqlite3.IntegrityError, match="insert-only"):
        log.connection.execute("DELETE FROM votes")
    assert log.one("PRAGMA foreign_keys")[0] == 1 and log.all("PRAGMA foreign_key_check") == []
    made = log.one("PRAGMA schema_version")[0]
    arena.Log(database)
    assert log.one("PRAGMA schema_version")[0] == made  # once is enough


def test_votes_that_the_schema_refuses_stay_as_they_are(catalogue, tmp_path):
    database = tmp_path / "a.sqlite"
    judge = Judge(arena.create_app(world.setup(*catalogue, database)))
    judge.vote("A")
    recreate_votes(database, "'T', ", "'T', '?', ")
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("INSERT INTO votes (trial, session, choice, time) VALUES (1, 1, '?', '')")
    before = stored(database)
    with pytest.raises(common.Fail, match=r"cannot be used as the arena's database \(CHECK"):
        arena.Log(database)
    assert stored(database) == before and len(before[1]) == 2 and "votes_update" in before[0]


def test_a_column_of_votes_that_the_schema_lacks_is_not_lost(catalogue, tmp_path):
    database = tmp_path / "a.sqlite"
    Judge(arena.create_app(world.setup(*catalogue, database))).vote("A")
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("ALTER TABLE votes ADD COLUMN remark TEXT NOT NULL DEFAULT 'why'")
    before = stored(database)
    with pytest.raises(common.Fail, match="cannot be used"):
        arena.Log(database)
    assert stored(database) == before and before[1][0][-1] == "why"


def test_an_experiment_of_several_models_is_named_and_its_votes_are_exported(tmp_path, capsys):
    log = arena.Log(tmp_path / "a.sqlite")
    models = [{"name": name, "fingerprint": name} for name in "abc"]
    log.experiment("key", {"models": models, "query": "image", "top_k": 4})
    assert arena.main(["stats", "--database", str(tmp_path / "a.sqlite"), "--format", "json"]) == 0
    said = capsys.readouterr()
    assert "more than two models" in said.err and json.loads(said.out) == []
    assert arena.main(["votes", "--database", str(tmp_path / "a.sqlite")]) == 0


# --------------------------------------------------------------------------------------------------------------------
# Statistics, against fixtures worked out elsewhere, scipy, and naive calculations written out here


def wilson(wins: int, n: int) -> tuple[float, float]:
    rate = arena.vote_rate(wins, n, n)
    return rate["low"], rate["high"]


def test_wilson_fixture_and_edges():
    low, high = wilson(120, 200)
    assert (round(low, 3), round(high, 3)) == (0.531, 0.665)
    for wins, n in [(0, 1), (1, 1), (3, 7), (0, 50), (50, 50), (99_999, 100_000)]:
        theirs = binomtest(wins, n).proportion_ci(method="wilson")
        assert wilson(wins, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)
    for judges in (2, 5):  # who agree: as one
        assert arena.vote_rate(3 * judges, 7 * judges, 7) == pytest.approx(arena.vote_rate(3, 7, 7) | {"n": 7 * judges})


def test_binomial_fixtures_and_edges():
    assert arena.binomial_test(120, 200) == pytest.approx(0.0057, abs=5e-5)
    assert arena.binomial_test(65, 100) == pytest.approx(0.0035, abs=5e-5)
    assert arena.binomial_test(0, 0) == 1.0 and 0 <= arena.binomial_test(100_000, 100_000) < 1e-300


def test_e_value_fixtures_and_the_integral():
    assert math.exp(arena.log_e_value(120, 80)) == pytest.approx(11.74, abs=0.005)
    assert math.exp(arena.log_e_value(65, 35)) == pytest.approx(18.47, abs=0.005)
    for wins, losses, theta in [(0, 0, 0.5), (7, 2, 0.5), (30, 41, 0.4), (12, 0, 0.7)]:
        mixture, _ = integrate.quad(
            lambda q, w=wins, n=losses, t=theta: beta.pdf(q, 10, 10) * (q / t) ** w * ((1 - q) / (1 - t)) ** n, 0, 1
        )
        assert math.exp(arena.log_e_value(wins, losses, theta)) == pytest.approx(mixture, rel=1e-7)


def test_e_value_is_safe_at_the_edges():
    assert arena.log_e_value(0, 0) == 0.0
    for wins, losses in [(100_000, 0), (0, 100_000), (50_000, 50_000)]:
        assert math.isfinite(arena.log_e_value(wins, losses))
        (low,), (high,) = arena.confidence_sequence([wins], [losses])
        assert 0 <= low < high <= 1 and low <= wins / 100_000 <= high
    assert arena.confidence_sequence([0], [0]) == (0.0, 1.0)


def test_confidence_sequence_fixture_and_a_search_by_hand():
    (low,), (high,) = arena.confidence_sequence([120], [80])
    assert (round(float(low), 3), round(float(high), 3)) == (0.494, 0.700)
    for wins, losses in [(1, 0), (3, 9), (40, 60)]:
        inside = [t for t in np.linspace(0.0005, 0.9995, 1000) if arena.log_e_value(wins, losses, t) < math.log(20)]
        (low,), (high,) = arena.confidence_sequence([wins], [losses])
        assert low == pytest.approx(inside[0], abs=0.001) and high == pytest.approx(inside[-1], abs=0.001)


def test_confidence_sequences_only_narrow_and_cover_at_all_times():
    rng, missed = np.random.default_rng(12), 0
    for _ in range(200):
        wins = np.cumsum(rng.random(300) < 0.6)
        low, high = arena.confidence_sequence(wins, np.arange(1, 301) - wins)
        assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all()
        missed += low[-1] > 0.6 or high[-1] < 0.6
    assert missed <= 10


def test_null_experiments_looked_at_after_every_vote():
    rng = np.random.default_rng(17)
    wins = np.cumsum(rng.random((2000, 500)) < 0.5, axis=1)
    n = np.arange(1, 501)
    assert (arena.log_e_value(wins, n - wins) >= math.log(20)).any(axis=1).mean() <= 0.05
    edge = binom.ppf(0.025, n, 0.5)  # reject below it: P(X < edge) <= 0.025
    naive = (np.minimum(wins, n - wins) < edge).any(axis=1).mean()
    assert 0.31 <= naive <= 0.41  # the plain binomial, looked at after every vote
    wins = np.cumsum(rng.random((500, 300)) < 0.65, axis=1)
    assert (arena.log_e_value(wins, n[:300] - wins) >= math.log(20)).any(axis=1).mean() >= 0.95  # finds what is there


def test_krippendorff_on_the_example_of_its_author():
    judges = ["123321412...", "1233224125.3", ".33323422 51.".replace(" ", ""), "12332441251."]  # columns are units
    units = [[judge[unit] for judge in judges if judge[unit] != "."] for unit in range(12)]
    result = arena.krippendorff_alpha(units)
    assert result["alpha"] == pytest.approx(0.743, abs=0.0005)
    assert (result["units"], result["labels"]) == (11, 40)


def test_krippendorff_by_the_coincidence_matrix_and_at_its_edges():
    rng = np.random.default_rng(24)
    units = [rng.choice(["base", "tie", "new"], size=rng.integers(1, 5)).tolist() for _ in range(50)]
    coincidence, total = Counter(), Counter()
    for unit in units:
        for one, other in itertools.permutations(range(len(unit)), 2):
            coincidence[unit[one], unit[other]] += 1 / (len(unit) - 1)
    for (one, _), weight in coincidence.items():
        total[one] += weight
    n = sum(total.values())
    observed = sum(weight for (one, other), weight in coincidence.items() if one != other)
    expected = sum(total[x] * total[y] for x in total for y in total if x != y) / (n - 1)
    result = arena.krippendorff_alpha(units)
    assert result["alpha"] == pytest.approx(1 - observed / expected)
    assert result["agreement"] == pytest.approx(1 - observed / n)
    assert arena.krippendorff_alpha([])["alpha"] is None
    assert arena.krippendorff_alpha([["a"], ["b"]])["agreement"] is None
    same = arena.krippendorff_alpha([["a", "a"], ["a", "a"]])
    assert same["alpha"] is None and same["agreement"] == 1.0
    assert arena.krippendorff_alpha([["a", "a"], ["b", "b"]])["alpha"] == 1.0


def test_votes_needed_by_exact_power():
    """By hand: every outcome that the exact test rejects, its chance at that win rate, from the number named on."""
    for rate, needed in arena.NEEDED.items():
        powers = {}
        for n in range(needed - 1, needed + 40):
            lost = np.arange(n // 2 + 1)
            edge = lost[2 * binom.cdf(lost, n, 0.5) <= 0.05].max()  # rejects at so few wins, or losses
            powers[n] = binom.cdf(edge, n, 1 - rate) + binom.cdf(edge, n, rate)
        assert powers.pop(needed - 1) < 0.8 <= min(powers.values())


# --------------------------------------------------------------------------------------------------------------------
# The results of a log

BASE, TUNED = {"name": "base", "fingerprint": "b"}, {"name": "tuned", "fingerprint": "t"}


def a_vote(number: int, choice: str | None, query: str | None = None, judge: str = "ann", top: str = "t", **more):
    """A row of Log.votes; the challenger stands in row A unless `top` says otherwise."""
    rows = {"t": ("abxy", {"color": 1.0, "style": None}), "b": ("abcd", {"color": 0.5, "style": 0.25})}
    other = "b" if top == "t" else "t"
    facts = {"left_pictures": [*rows[top][0]], "right_pictures": [*rows[other][0]]}
    facts |= {"left_attributes": rows[top][1], "right_attributes": rows[other][1]}
    row = {"vote": number, "judge": judge, "judge_name": judge, "query": query or f"q{number}", "category": "sofa"}
    row |= {"choice": choice, "left_model": top, "right_model": other, "facts": facts, "revoked": None, "identical": 0}
    return row | {"time": 1000 + number} | more


def a_log(wins: int, losses: int, ties: int = 0) -> list[dict]:
    """Votes with these counts, as evenly mixed as can be, on alternating sides."""
    kinds = [("win", wins), ("loss", losses), ("tie", ties)]
    spread = sorted(((i + 0.5) / count, kind) for kind, count in kinds for i in range(count))
    log = []
    for number, (_, kind) in enumerate(spread):
        top = "tb"[number % 2]
        win, loss = ("A", "B") if top == "t" else ("B", "A")
        log.append(a_vote(number, {"win": win, "loss": loss, "tie": "T"}[kind], top=top))
    return log


def found_in(votes: list[dict]) -> dict:
    found = arena.arena_statistics(votes, BASE, TUNED)
    json.dumps(found, allow_nan=False)
    return found


def test_the_fixture_reads_not_yet():
    found = found_in(a_log(120, 80, 25))
    assert found["counts"]["votes"] == found["counts"]["queries"] == 225
    assert found["planned"]["p"] == pytest.approx(0.0057, abs=5e-5)
    assert (round(found["win_rate"]["low"], 3), round(found["win_rate"]["high"], 3)) == (0.531, 0.665)
    assert 10 ** found["anytime"]["log10_e"] == pytest.approx(11.74, abs=0.005)
    assert found["anytime"]["p"] == pytest.approx(10 ** -found["anytime"]["max_log10_e"])
    assert found["anytime"]["win_low"] >= 0.493 and found["anytime"]["win_high"] <= 0.701
    assert found["verdict"]["answer"] == "not yet" and found["verdict"]["sentence"].startswith("Not yet")
    assert found["tie_rate"]["value"] == pytest.approx(25 / 225)
    assert found["net"]["value"] == pytest.approx(40 / 225) and found["net"]["low"] > 0
    assert [row["missing"] for row in found["needed"]] == [620, 10, 0]


@pytest.mark.parametrize(
    ("wins", "losses", "answer"),
    [(0, 0, "no votes"), (20, 18, "no difference shown"), (70, 20, "tuned"), (20, 70, "base"), (65, 35, "not yet")],
)
def test_verdicts(wins, losses, answer):
    assert found_in(a_log(wins, losses) or [a_vote(0, "N")])["verdict"]["answer"] == answer


def test_every_row_is_counted_once_with_its_reason():
    found = found_in([
        a_vote(0, "A"), a_vote(1, "N"), a_vote(2, "B", revoked="now"), a_vote(3, "B", query="q2"),
        a_vote(4, None, identical=1), a_vote(5, "B", query="q0", top="b"), a_vote(6, "T"),
    ])  # fmt: skip
    assert found["votes"]["excluded"] == {"undone": 1, "identical": 1, "abstained": 1, "repeat": 1}
    assert found["votes"]["counted"] == 3 and found["votes"]["rows"] == 7 and found["votes"]["judges"] == 1
    assert {name: found["counts"][name] for name in ("wins", "losses", "ties", "abstained")} == {
        "wins": 1, "losses": 1, "ties": 1, "abstained": 1,
    }  # fmt: skip
    assert found["tie_rate"]["value"] == pytest.approx(1 / 3) and found["identical"] == {"queries": 1, "share": 0.25}


def test_a_first_answer_that_abstained_leaves_the_second_to_count():
    found = found_in([a_vote(0, "N", query="q"), a_vote(1, "A", query="q")])
    assert found["counts"]["votes"] == 1 and found["votes"]["excluded"]["repeat"] == 0


def test_judges_who_always_agree_are_worth_one():
    copies = [vote | {"judge": judge} for vote in a_log(30, 18) for judge in "vwxyz"]
    once, five = found_in(a_log(30, 18)), found_in(copies)
    for part in ("planned", "anytime"):
        assert five[part]["p"] == pytest.approx(once[part]["p"])
    for part in ("win_rate", "tie_rate", "net"):
        assert {k: five[part][k] for k in ("value", "low", "high")} == pytest.approx(
            {k: once[part][k] for k in ("value", "low", "high")}
        )
    assert five["anytime"]["queries"] == 48 and five["agreement"]["alpha"] == 1.0
    assert (five["categories"][0]["win_low"], five["categories"][0]["p"]) == pytest.approx(
        (once["categories"][0]["win_low"], once["categories"][0]["p"])
    )


def test_votes_of_several_judges_on_a_query_do_not_make_up_for_queries():
    copies = [vote | {"judge": judge} for vote in a_log(40, 30) for judge in "xyz"]
    assert [row["missing"] for row in found_in(copies)["needed"]] == [750, 140, 27]


def test_intervals_cover_where_some_queries_have_three_judges_who_agree():
    rng, covered = np.random.default_rng(31), 0
    for _ in range(1500):
        wins = rng.random(100) < 0.6
        log = [a_vote(n, "AB"[not wins[n]], f"q{n}", judge) for n in range(100) for judge in ("a" if n % 5 else "abc")]
        arena.mark_votes(log, "b", "t")
        rate = arena.vote_rate(arena.tally(log)["wins"], len(log), arena.effective_queries(log))
        covered += rate["low"] <= 0.6 <= rate["high"]
    assert 0.935 <= covered / 1500 <= 0.965  # 0.91 with the number of queries in place of the effective one
    assert arena.effective_queries([]) == 0 and arena.effective_queries(a_log(7, 5)) == 12
    assert found_in(log)["win_rate"]["low"] == rate["low"]


def test_the_e_value_takes_each_querys_first_decided_vote():
    log = [a_vote(0, "T", query="q"), a_vote(1, "A", query="q", judge="bob"), a_vote(2, "B", query="q", judge="cid")]
    found = found_in(log)
    assert found["anytime"]["queries"] == 1 and found["anytime"]["course"]["win_rate"] == [None, 1.0]
    assert found["counts"]["losses"] == 1 and found["net"]["value"] == 0.0  # the others count here


def test_null_logs_of_judges_who_agree_raise_no_false_alarms():
    """Five judges a query who mostly agree: counting them as independent would raise an alarm in a quarter of logs."""
    rng, alarms = np.random.default_rng(18), 0
    for _ in range(300):
        latent = np.repeat(rng.choice([0.1, 0.9], size=40), 5)
        chosen = np.where(rng.random(200) < 0.05, "N", np.where(rng.random(200) < latent, "A", "B"))
        order = np.argsort(np.repeat(np.arange(40.0), 5) + rng.exponential(8, size=200))
        log = [a_vote(i, str(chosen[n]), query=f"q{n // 5}", judge=f"j{n % 5}") for i, n in enumerate(order)]
        arena.mark_votes(log, "b", "t")
        decided = [vote for vote in log if vote["outcome"]]
        first = [own[0]["outcome"] for own in arena.group(decided, "query").values()]
        alarms += arena._anytime(first)["p"] <= 0.05
    assert alarms / 300 <= 0.05


def test_a_judge_of_the_top_row_fires_the_position_test_and_not_the_preference():
    rng, position, preference = np.random.default_rng(20), 0, 0
    for _ in range(100):
        log = [a_vote(n, "A" if rng.random() < 0.8 else "B", top=str(rng.choice(["t", "b"]))) for n in range(200)]
        found = found_in(log)
        position += found["position"]["p"] <= 0.05
        preference += found["planned"]["p"] <= 0.05
    assert position == 100 and preference <= 10


def test_object_types_are_compared_by_chi_square_and_corrected_where_they_were_tested():
    choices = {"bed": "A" * 18 + "B" * 2, "desk": "A" * 5, "sofa": "A" * 12 + "B" * 12}
    votes = [(name, choice) for name, chosen in choices.items() for choice in chosen]
    found = found_in([a_vote(n, choice, category=name) for n, (name, choice) in enumerate(votes)])
    bed, desk, sofa = found["categories"]
    assert bed["p"] == pytest.approx(binomtest(18, 20).pvalue) and bed["p_holm"] == pytest.approx(2 * bed["p"])
    assert (desk["p"], desk["p_holm"], desk["votes"]) == (None, None, 5)
    assert sofa["p"] == 1.0 and (sofa["wins"], sofa["losses"], sofa["ties"]) == (12, 12, 0)
    theirs = chi2_contingency([[18, 2], [12, 12]], correction=False).pvalue
    assert found["heterogeneity"] == {"p": pytest.approx(theirs), "categories": 2}
    assert found_in(a_log(30, 10))["heterogeneity"]["p"] is None  # one type
    both = [a_vote(n, "A", category="bed" if n % 2 else "sofa") for n in range(60)]
    assert found_in(both)["heterogeneity"]["p"] is None  # nothing but wins


def test_what_the_rows_held():
    found = found_in([a_vote(0, "A"), a_vote(1, "B"), a_vote(2, "A")])
    (color,) = found["attributes"]  # the challenger's rows say nothing of style
    assert (color["attribute"], color["votes"]) == ("color", 3)
    assert (color["won"], color["lost"], color["difference"]) == pytest.approx((2.5 / 3, 2 / 3, 0.5 / 3))
    assert found_in([])["attributes"] == []


def test_courses_for_the_plots():
    queries = found_in([*a_log(300, 200, 100), a_vote(1000, "N")])["anytime"]["course"]
    assert queries["log10_e"][-1] == pytest.approx(arena.log_e_value(300, 200) / math.log(10))
    assert queries["n"][-1] == 500 and queries["win_rate"][-1] == 0.6
    low, high = np.array(queries["low"]), np.array(queries["high"])
    assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all() and (low <= high).all()
    assert len(low) == len(high) == len(queries["n"]) == arena.LOOKS


def test_figures_end_where_their_quantities_end():
    """Every share, rate and preference with its interval, of small and one-sided logs."""
    chance = random.Random(3)
    for count in range(1, 40):
        weights = chance.choice([(9, 1, 0, 0), (1, 9, 0, 1), (1, 1, 8, 0), (4, 4, 1, 1)])
        weights += (1,) * (len(CHOICES) - len(weights))
        log = [a_vote(n, choice, query=f"q{n // 2}", judge=f"j{n % 2}", top=chance.choice("tb"))
               for n, choice in enumerate(chance.choices(CHOICES, weights, k=count))]  # fmt: skip
        found = found_in(log)
        rows = [(-1, found["net"]), *((-1, dict(row, value=row["difference"])) for row in found["attributes"])]
        rows += [(0, found["win_rate"]), (0, found["tie_rate"])]
        rows += [(0, {end: row[f"win_{end}"] for end in ("low", "high")} | {"value": row["win_rate"]})
                 for row in found["categories"]]  # fmt: skip
        rows += [(0, {"low": found["anytime"]["win_low"], "high": found["anytime"]["win_high"], "value": None})]
        for least, row in rows:
            numbers = [row[name] for name in ("low", "value", "high") if row[name] is not None]
            assert numbers == sorted(numbers) and all(least <= number <= 1 for number in numbers), (count, row)
        assert 0 < found["anytime"]["p"] <= 1 and found["anytime"]["max_log10_e"] >= found["anytime"]["log10_e"]


def test_a_course_that_no_rate_explains_has_no_interval():
    turned = [a_vote(n, "A" if n < 120 else "B") for n in range(400)]
    found = found_in(turned)
    assert found["anytime"]["win_low"] is None and found["anytime"]["win_high"] is None
    course = found["anytime"]["course"]
    assert all(low <= high for low, high in zip(course["low"], course["high"], strict=True))
    facts = {"id": 1, "query": "image", "top_k": 4}
    assert "no one rate fits the whole course" in arena.report(found | {"experiment": facts})
    assert found_in([a_vote(n, "A") for n in range(3000)])["verdict"]["sentence"].count("E reached 10^") == 1


def test_the_same_log_gives_the_same_page():
    assert found_in(a_log(30, 20, 5)) == found_in(a_log(30, 20, 5))
