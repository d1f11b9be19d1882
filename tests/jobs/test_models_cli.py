"""`tessera models`, `promote` and `rollback` on a real registry; the bundles are files alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from jobs.cli import app
from pipeline.bundles.decisions import DecisionLog, Verdict
from pipeline.bundles.registry import ModelRegistry, lineage
from pipeline.config import CanaryConfig, load_recipe
from pipeline.errors import BundleError, PromotionError
from pipeline.tracking.runs import Tracker
from serve import canary
from serve.canary import ServableReport

SLOW = PromotionError("the bundle cannot be served: 95 % of the images took up to 9 s")


class Desk:
    """A home, its registry and the commands at it.

    Attributes:
        checked: the canary settings of every serving check that was made.
        unservable: what the next checks raise.
    """

    def __init__(self, home: Path) -> None:
        self.home, self.registry = home, ModelRegistry(home)
        self.checked = list[CanaryConfig]()
        self.unservable: PromotionError | None = None

    def check(self, bundle: Path, home: Path, settings: CanaryConfig) -> ServableReport:
        assert (bundle / "model.safetensors").is_file() and home == self.home
        self.checked.append(settings)
        if self.unservable is not None:
            raise self.unservable
        return ServableReport((), (0.1, 0.2))

    def register(self, content: str, verdict: Verdict | None = None, *overrides: str) -> str:
        bundle = self.home / "made" / content
        bundle.mkdir(parents=True)
        (bundle / "config.json").write_text("{}")
        (bundle / "model.safetensors").write_text(content)
        made_from = lineage(load_recipe("smoke", overrides, environment={}), {"a": "abcdef0123456"})
        with Tracker(self.home).run("made") as run:
            version = self.registry.register(
                bundle, model_name="tessera", handle=run, tags=made_from
            )
        if verdict is not None:
            self.registry.record("tessera", version, verdict, {"kid/all": 0.125})
        return version

    def run(self, *arguments: str) -> Result:
        result = CliRunner().invoke(app, [*arguments, "--home", str(self.home)])
        assert result.exception is None or not isinstance(result.exception, AssertionError)
        return result

    def json(self, *arguments: str) -> Any:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.exception
        return json.loads(result.stdout)

    def champion(self) -> str | None:
        return self.registry.standing("tessera").champion

    def log(self) -> list[tuple[str, str, tuple[str, ...]]]:
        entries = DecisionLog(self.registry.client, "tessera").entries()
        return [(entry.kind, entry.version, entry.reasons) for entry in entries]


@pytest.fixture
def desk(new_home: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    desk = Desk(new_home("desk"))
    monkeypatch.setattr(canary, "check_servable", desk.check)
    return desk


def passed(over: str | None) -> Verdict:
    return Verdict(True, over, ("yes: KID fell",), "runs:/abc")


def test_a_version_that_passed_becomes_champion_and_can_be_taken_back(desk: Desk) -> None:
    desk.register("a", passed(None), "promote.canary.max_latency_s=7")
    said = desk.run("promote", "1").stdout
    assert said == "models:/tessera/1 is champion\n"
    assert [settings.max_latency_s for settings in desk.checked] == [7]
    assert desk.run("promote", "1").stdout == "models:/tessera/1 is champion already\n"
    desk.register("b", passed("1"))
    change = desk.json("promote", "models:/tessera@candidate")
    assert change == {
        "model": "tessera", "champion": "2", "previous": "1", "changed": True,
        "reasons": ["yes: KID fell"], "p95_s": 0.2,
    }  # fmt: skip
    said = desk.run("rollback", "--reason", "it forgot Chinese").stdout
    assert said == "models:/tessera/1 is champion; the previous one is 2\n"
    assert desk.json("rollback", "tessera")["champion"] == "2"
    assert desk.log() == [
        ("promote", "1", ("yes: KID fell",)),
        ("promote", "2", ("yes: KID fell",)),
        ("rollback", "1", ("it forgot Chinese",)),
        ("rollback", "2", ("rolled back by hand",)),
    ]


def test_what_did_not_pass_against_todays_champion_is_refused_and_recorded(desk: Desk) -> None:
    desk.register("a", passed(None))
    desk.register("b", Verdict(False, None, ("yes: KID fell", "no: retrieval fell"), "runs:/abc"))
    desk.register("c", passed(None))
    desk.register("d")
    refused = desk.run("promote", "2").exception
    assert isinstance(refused, PromotionError)
    assert "models:/tessera/2 is not promoted:\n  yes: KID fell\n  no: retrieval" in str(refused)
    assert "`--force --reason TEXT`" in str(refused) and desk.champion() is None
    assert desk.run("promote", "1").exit_code == 0
    late = desk.run("promote", "3").exception
    assert "evaluated against no champion, and now there is version 1: `tessera ret" in str(late)
    assert "it was not evaluated; `tessera retrain RECIPE`" in str(
        desk.run("promote", "4").exception
    )
    assert desk.champion() == "1" and len(desk.checked) == 1
    told = [(kind, version) for kind, version, _ in desk.log()]
    assert told == [("refuse", "2"), ("promote", "1"), ("refuse", "3"), ("refuse", "4")]
    absent = desk.run("promote", "9").exception
    assert isinstance(absent, BundleError) and "models:/tessera/9 is not in the reg" in str(absent)
    assert "`tessera models tessera` lists its versions" in str(absent)
    unknown = desk.run("promote", "models:/other/9").exception
    assert "the registered models are models:/tessera; " in str(unknown)


def test_what_cannot_be_served_is_not_promoted_by_force_either(desk: Desk) -> None:
    desk.register("a", passed(None))
    desk.unservable = SLOW
    assert desk.run("promote", "1").exception is SLOW
    assert desk.log() == [("refuse", "1", (f"no: {SLOW}",))]
    force = ("promote", "1", "--force", "--reason", "the canary's machine was busy")
    assert desk.run(*force).exception is SLOW
    assert desk.champion() is None
    assert desk.run(*force, "--skip-serving-check").exit_code == 0
    assert desk.champion() == "1"
    reasons = ("forced: the canary's machine was busy", "yes: KID fell")
    assert desk.log()[-1] == ("promote", "1", reasons)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--force",), "--force needs a reason"),
        (("--force", "--reason", " "), "--force needs a reason"),
        (("--skip-serving-check",), "is for --force alone"),
    ],
)
def test_force_is_deliberate(arguments: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["promote", "1", *arguments])
    assert result.exit_code == 2 and said in result.output


def test_there_must_be_a_previous_champion(desk: Desk) -> None:
    with pytest.raises(PromotionError, match="tessera has no previous champion to go back to"):
        raise desk.run("rollback").exception or AssertionError
    assert "no model is registered at sqlite" in desk.run("models").stderr
    assert "no version of nobody is registered" in desk.run("models", "nobody").stderr
    assert desk.json("models") == []


def test_the_table_says_of_each_version_what_it_is_and_what_became_of_it(desk: Desk) -> None:
    for number, content in enumerate("abc"):
        desk.register(content, passed(str(number) if number else None))
        desk.run("promote", str(number + 1))
    desk.register("d", Verdict(False, "3", ("no: KID rose",)))
    desk.run("promote", "4")
    desk.run("rollback", "--reason", "too slow")
    lines = desk.run("models").stdout.splitlines()
    assert [word in lines[0] for word in ("version", "aliases", "recipe", "metrics")] == [True] * 4
    told = [" ".join(line.replace("│", " ").split()) for line in lines if " smoke " in line]
    for line, start, end in zip(
        told,
        ["tessera 4 candidate smoke abcdef012345 2", "tessera 3 previous smoke",
         "tessera 2 champion smoke", "tessera 1 smoke"],
        ["kid/all 0.125 refused", "kid/all 0.125 rolled back to 2",
         "kid/all 0.125 came back for 3", "kid/all 0.125 promoted as the first"],
        strict=True,
    ):  # fmt: skip
        assert line.startswith(start) and line.endswith(end), line
    rows = desk.json("models", "tessera")
    assert [row["version"] for row in rows] == ["4", "3", "2", "1"]
    assert rows[0]["reasons"] == ["no: KID rose"] and rows[1]["reasons"] == ["too slow"]
    assert rows[2]["aliases"] == ["champion"] and rows[3]["data_digest"] == "abcdef0123456"
