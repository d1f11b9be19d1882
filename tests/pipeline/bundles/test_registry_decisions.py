"""Who is champion when two jobs promote at once, when one dies half-way, when a person interferes.

The decisive moment is between reading the log and writing to it, so processes are held there; the
registry is real, a database and the MLflow server over it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowException
from served import free_port

from pipeline.bundles import decisions
from pipeline.bundles.decisions import NOTHING, DecisionLog, Entry, Verdict, valid
from pipeline.bundles.registry import ModelRegistry
from pipeline.errors import PromotionError
from pipeline.tracking.runs import Tracker, tracking_uri

ROUNDS = 4
PATIENCE_S = 120
fresh = multiprocessing.get_context("forkserver")  # a process that has imported all it needs
fresh.set_forkserver_preload(["pipeline.bundles.registry", "mlflow", "pytest", "served"])


@pytest.fixture(scope="module")
def home(new_home: Callable[[str], Path]) -> Path:
    return new_home("decisions")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[str]:
    """The URI of an MLflow server over the same database."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "2"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", tracking_uri(home), "--artifacts-destination", str(home / "far")),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE_S
    try:
        while not _healthy(uri):
            assert process.poll() is None and time.monotonic() < deadline, "no MLflow server"
            time.sleep(0.2)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _healthy(uri: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=5):
        return True
    return False


@pytest.fixture(params=["sqlite", "server"])
def registry(
    request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch
) -> ModelRegistry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if request.param == "server":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("server"))
    return ModelRegistry(home)


@pytest.fixture
def name(request: pytest.FixtureRequest, registry: ModelRegistry) -> str:
    """A registered model with four versions and no champion."""
    name = request.node.name.replace("[", "-").replace("]", "")
    tracker = Tracker(registry.home)
    registry.client.create_registered_model(name)
    with tracker.run("made") as run:
        at = registry.client.get_run(run.run_id).info.artifact_uri
    for _ in range(4):
        registry.client.create_model_version(name, f"{at}/bundle", run.run_id)
    return name


def judged(over: str | None, *reasons: str) -> Verdict:
    return Verdict(True, over, reasons or ("it is better",))


def start(target: Any, *arguments: Any) -> Any:
    process = fresh.Process(target=target, args=arguments)
    process.start()
    return process


def aliases(registry: ModelRegistry, name: str) -> dict[str, str]:
    """What MLflow says, without anybody having repaired it."""
    found = registry.client.get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}


# ---- Two jobs at once ----------------------------------------------------------------------------


def compete(home: Path, uri: str, name: str, both: Barrier, told: Any, rival: int) -> None:
    """Promote one version per round, held until the other job has read the log as well."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    registry, append = ModelRegistry(home), DecisionLog.append

    def held(self: DecisionLog, *args: Any, **options: Any) -> str:
        both.wait(PATIENCE_S)
        return append(self, *args, **options)

    decisions.DecisionLog.append = held  # type: ignore[method-assign]
    for turn in range(ROUNDS):
        over = registry.standing(name).champion
        version = str(1 + rival + 2 * (turn % 2))
        try:
            registry.promote(name, version, judged(over))
            told.put((turn, version, ""))
        except PromotionError as error:
            told.put((turn, version, str(error)))
        both.wait(PATIENCE_S)


def test_of_two_jobs_that_promote_at_once_exactly_one_wins(
    registry: ModelRegistry, name: str
) -> None:
    both, told = fresh.Barrier(2), fresh.Queue()
    uri = os.environ.get("MLFLOW_TRACKING_URI", tracking_uri(registry.home))
    jobs = [start(compete, registry.home, uri, name, both, told, rival) for rival in range(2)]
    outcomes = [told.get(timeout=PATIENCE_S) for _ in range(2 * ROUNDS)]
    for job in jobs:
        job.join(PATIENCE_S)
        assert job.exitcode == 0
    winners = list[str]()
    for turn in range(ROUNDS):
        (won,) = [version for at, version, error in outcomes if at == turn and not error]
        (lost,) = [error for at, _, error in outcomes if at == turn and error]
        assert f"another job promoted version {won} meanwhile: run the same command again" in lost
        winners.append(won)
    log = DecisionLog(registry.client, name)
    chain, everything = valid(log.entries()), log.entries()
    assert len(everything) == 2 * ROUNDS, "both wrote in every round: the log decided, not chance"
    assert [entry.version for entry in chain] == winners
    assert [entry.over for entry in chain] == [None, *winners[:-1]]
    assert all(entry.applied for entry in chain)
    assert aliases(registry, name) == {"champion": winners[-1], "previous": winners[-2]}


@pytest.mark.parametrize("registry", ["sqlite"], indirect=True)
def test_an_alias_that_two_jobs_set_at_the_same_moment_is_set(
    registry: ModelRegistry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = registry.client.set_registered_model_alias, list[str]()

    def raced(*args: Any) -> None:
        calls.append(args[1])
        real(*args)
        if calls.count(args[1]) == 1:  # the other job's row is there, and the database says so
            raise MlflowException("UNIQUE constraint failed: registered_model_aliases.alias")

    monkeypatch.setattr(registry.client, "set_registered_model_alias", raced)
    registry.promote(name, "1", judged(None))
    assert aliases(registry, name) == {"champion": "1"} and calls == ["champion"] * 2


# ---- A job that dies -----------------------------------------------------------------------------


def die_at(home: Path, uri: str, name: str, call: str, nth: int) -> None:
    """Promote version 2 over 1, and be killed at the nth call of a method of MLflow's client."""
    os.environ["MLFLOW_TRACKING_URI"] = uri
    registry, calls = ModelRegistry(home), 0
    real = getattr(registry.client, call)

    def killed(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(registry.client, call, killed)
    registry.promote(name, "2", judged("1"))


@pytest.mark.parametrize(
    ("call", "nth", "left", "champion"),
    [
        ("create_model_version", 1, {"champion": "1"}, "1"),
        ("set_registered_model_alias", 1, {"champion": "1"}, "2"),
        ("set_registered_model_alias", 2, {"champion": "1", "previous": "1"}, "2"),
        ("set_model_version_tag", 1, {"champion": "2", "previous": "1"}, "2"),
    ],
    ids=["before-the-decision", "before-the-aliases", "between-the-aliases", "before-the-mark"],
)
@pytest.mark.parametrize("registry", ["sqlite"], indirect=True)
def test_a_job_killed_half_way_leaves_a_valid_registry_that_the_next_call_repairs(
    registry: ModelRegistry, name: str, call: str, nth: int, left: dict[str, str], champion: str
) -> None:
    registry.promote(name, "1", judged(None))
    job = start(die_at, registry.home, tracking_uri(registry.home), name, call, nth)
    job.join(PATIENCE_S)
    assert job.exitcode == -signal.SIGKILL
    assert aliases(registry, name) == left
    assert registry.standing(name).champion == champion
    repaired = aliases(registry, name)
    assert DecisionLog(registry.client, name).last().applied
    assert repaired == (left if champion == "1" else {"champion": "2", "previous": "1"})
    registry.promote(name, "3", judged(champion))
    assert aliases(registry, name) == {"champion": "3", "previous": champion}


@pytest.mark.parametrize("registry", ["sqlite"], indirect=True)
def test_a_job_that_was_stopped_does_not_undo_a_later_promotion(
    registry: ModelRegistry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, real = ModelRegistry(registry.home), registry.client.set_registered_model_alias
    stopped = False

    def late(model: str, alias: str, version: str) -> None:
        nonlocal stopped
        if alias == "champion" and not stopped:  # meanwhile another job repairs and promotes
            stopped = True
            other.promote(name, "2", judged("1"))
        real(model, alias, version)

    monkeypatch.setattr(registry.client, "set_registered_model_alias", late)
    registry.promote(name, "1", judged(None))
    assert aliases(registry, name) == {"champion": "2", "previous": "1"}
    assert [e.kind for e in valid(DecisionLog(registry.client, name).entries())] == ["promote"] * 2


# ---- What is decided -----------------------------------------------------------------------------


def test_promotions_refusals_and_rollbacks_are_recorded(registry: ModelRegistry, name: str) -> None:
    registry.promote(name, "1", judged(None, "第一个"))
    registry.promote(name, "2", replace(judged("1"), evaluation="runs:/abc/evaluation"))
    registry.refuse(name, "3", Verdict(False, "2", ("no: KID rose", "no: it is slow")))
    standing = registry.rollback(name, "it forgot Chinese")
    assert (standing.champion, standing.aliases["previous"]) == ("1", "2")
    assert registry.rollback(name, "it did not").champion == "2"
    entries = DecisionLog(registry.client, name).entries()
    told = [(e.number, e.kind, e.version, e.over, e.follows, e.reasons) for e in entries]
    assert told == [
        (1, "promote", "1", None, 0, ("第一个",)),
        (2, "promote", "2", "1", 1, ("it is better",)),
        (3, "refuse", "3", "2", 2, ("no: KID rose", "no: it is slow")),
        (4, "rollback", "1", "2", 2, ("it forgot Chinese",)),
        (5, "rollback", "2", "1", 4, ("it did not",)),
    ]
    assert entries[1].evaluation == "runs:/abc/evaluation" and "@" in entries[1].by
    assert [e.applied for e in entries] == [True, True, False, True, True]


@pytest.mark.parametrize("registry", ["sqlite"], indirect=True)
def test_there_must_be_something_to_go_back_to(registry: ModelRegistry, name: str) -> None:
    with pytest.raises(PromotionError, match=rf"{name} has no previous champion .* `tessera prom"):
        registry.rollback(name, "why not")
    registry.promote(name, "1", judged(None))
    with pytest.raises(PromotionError, match="no previous champion"):
        registry.rollback(name, "why not")
    assert aliases(registry, name) == {"champion": "1"}


@pytest.mark.parametrize("registry", ["sqlite"], indirect=True)
def test_a_verdict_against_a_former_champion_does_not_count(
    registry: ModelRegistry, name: str
) -> None:
    registry.promote(name, "1", judged(None))
    registry.promote(name, "2", judged("1"))
    for late in (judged("1"), judged(None)):
        with pytest.raises(PromotionError, match="another job promoted version 2 meanwhile"):
            registry.promote(name, "3", late)
    registry.promote(name, "2", judged("1"))  # what is done already is no mistake
    assert len(DecisionLog(registry.client, name).entries()) == 2


# ---- People --------------------------------------------------------------------------------------


def test_an_alias_moved_in_mlflow_is_respected_and_recorded(
    registry: ModelRegistry, name: str
) -> None:
    registry.client.set_registered_model_alias(name, "champion", "4")  # before there was a log
    assert registry.standing(name).champion == "4"
    registry.promote(name, "1", judged("4"))
    registry.client.set_registered_model_alias(name, "champion", "3")
    with pytest.raises(PromotionError, match="version 3"):
        registry.promote(name, "2", judged("1"))
    assert aliases(registry, name) == {"champion": "3", "previous": "1"}
    chain = valid(DecisionLog(registry.client, name).entries())
    told = [(entry.kind, entry.version, entry.over) for entry in chain]
    assert told == [("moved", "4", None), ("promote", "1", "4"), ("moved", "3", "1")]
    registry.standing(name)
    assert len(DecisionLog(registry.client, name).entries()) == 3, "it is recorded once"


@pytest.mark.parametrize("registry", ["sqlite"], indirect=True)
def test_a_champion_deleted_in_mlflow_leaves_a_registry_that_goes_on(
    registry: ModelRegistry, name: str
) -> None:
    registry.promote(name, "1", judged(None))
    registry.promote(name, "2", judged("1"))
    registry.client.delete_model_version(name, "2")  # and with it the alias
    assert registry.champion(name) is None
    with pytest.raises(PromotionError, match="the champion was removed meanwhile"):
        registry.promote(name, "3", judged("2"))
    assert registry.rollback(name, "it is the last that is known to be good").champion == "1"
    registry.client.set_registered_model_alias(name, "champion", "3")
    registry.client.delete_model_version(name, "1")
    assert registry.standing(name).aliases == {"champion": "3"}
    registry.promote(name, "4", judged("3"))
    assert aliases(registry, name) == {"champion": "4", "previous": "3"}


# ---- The rule ------------------------------------------------------------------------------------


def test_a_decision_is_valid_if_it_follows_the_last_valid_one() -> None:
    def entry(number: int, follows: int, **others: Any) -> Entry:
        return replace(NOTHING, number=number, follows=follows, kind="promote", **others)

    refused = replace(entry(3, 1), kind="refuse")
    log = [entry(1, 0), entry(2, 0), refused, entry(4, 1), entry(5, 1), entry(6, 2), entry(7, 4)]
    assert [e.number for e in valid(log)] == [1, 4, 7]
    assert valid([]) == []


def test_a_verdict_survives_its_tag() -> None:
    verdict = Verdict(False, None, ("no: 差", "yes"), "runs:/abc")
    assert Verdict.from_json(verdict.to_json()) == verdict
    assert "差" in verdict.to_json() and json.loads(verdict.to_json())["over"] is None


@pytest.mark.parametrize("registry", ["sqlite"], indirect=True)
@pytest.mark.parametrize("deleted", [False, True])
def test_a_rollback_after_the_champion_was_removed(
    deleted: bool, registry: ModelRegistry, name: str
) -> None:
    registry.promote(name, "1", judged(None))
    registry.promote(name, "2", judged("1"))
    registry.client.delete_registered_model_alias(name, "champion")
    if deleted:
        registry.client.delete_model_version(name, "2")
    registry.rollback(name, "it is gone")
    left = {} if deleted else {"previous": "2"}
    assert aliases(registry, name) == {"champion": "1", **left}


@pytest.mark.parametrize("registry", ["sqlite"], indirect=True)
def test_a_rollback_that_came_too_late_is_not_to_be_repeated(
    registry: ModelRegistry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote(name, "1", judged(None))
    registry.promote(name, "2", judged("1"))
    real = DecisionLog.append

    def late(self: DecisionLog, *args: Any, **options: Any) -> str:
        real(self, "rollback", "1", judged("2"), follows=options["follows"])
        return real(self, *args, **options)

    monkeypatch.setattr(DecisionLog, "append", late)
    with pytest.raises(PromotionError, match=r"to version 1; .*Nothing was rolled back here"):
        registry.rollback(name, "so do I")
    assert aliases(registry, name) == {"champion": "1", "previous": "2"}


@pytest.mark.parametrize("registry", ["sqlite"], indirect=True)
def test_a_refusal_is_noted_once(registry: ModelRegistry, name: str) -> None:
    for reasons in (("KID rose",), ("KID rose",), ("it is slow",)):
        registry.refuse(name, "3", Verdict(False, None, reasons))
    noted = [entry.reasons for entry in DecisionLog(registry.client, name).entries()]
    assert noted == [("KID rose",), ("it is slow",)]
