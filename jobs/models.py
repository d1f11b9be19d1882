"""The registered models as a person looks after them: what there is, promote one, go back.

    tessera models
    tessera promote 7                 # if its evaluation against today's champion passed
    tessera rollback --reason "it forgot Chinese"

A promotion needs a passed evaluation against the version that is champion now, and a model that can
be served (serve/canary.py). Promotions, rollbacks and refusals are noted in the decision log
(pipeline/bundles/decisions.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from pipeline.bundles.decisions import DecisionLog, Entry, Verdict, effective
from pipeline.bundles.registry import DECISION, METRICS, SCHEME, ModelRegistry, find_version
from pipeline.config import CanaryConfig, PromoteConfig
from pipeline.config.overrides import explain
from pipeline.errors import PromotionError, RecipeError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

SHOWN = 3  # metrics in the table, at most
FORCE = "`--force --reason TEXT` promotes it all the same"


@dataclass(frozen=True)
class Row:
    """One version of a registered model.

    Attributes:
        aliases: those that it has, such as champion.
        recipe, data_digest, code_version: what it was made from; "" if that was not noted.
        created: ISO 8601, UTC.
        metrics: of its latest evaluation.
        decision: the latest one about it, in a few words; "" for none.
        reasons: of that decision.
    """

    model: str
    version: str
    aliases: tuple[str, ...]
    recipe: str
    data_digest: str
    code_version: str
    created: str
    metrics: Mapping[str, float]
    decision: str
    reasons: tuple[str, ...]


def list_versions(home: Path, name: str | None = None) -> list[Row]:
    """All versions of a registered model, or of all that there are, the newest first.

    Raises:
        ResourceError: the registry does not answer.
    """
    registry = ModelRegistry(home)
    return [
        row for model in ([name] if name else registry.names()) for row in _rows(registry, model)
    ]


def _rows(registry: ModelRegistry, name: str) -> list[Row]:
    versions = registry.versions(name)
    if not versions:
        return []
    standing = registry.standing(name)
    log = effective(DecisionLog(registry.client, name).entries())
    return [_row(version, standing.aliases, log) for version in versions]


def _row(version: ModelVersion, aliases: Mapping[str, str], log: list[Entry]) -> Row:
    number, tags = str(version.version), version.tags
    about = [entry for entry in log if number in (entry.version, _left(entry))]
    created = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
    return Row(
        model=version.name,
        version=number,
        aliases=tuple(sorted(alias for alias, of in aliases.items() if of == number)),
        recipe=tags.get("recipe", ""),
        data_digest=tags.get("data_digest", ""),
        code_version=tags.get("code_version", ""),
        created=created.isoformat(timespec="seconds"),
        metrics=json.loads(tags.get(METRICS, "{}")),
        decision=_in_words(about[-1], number) if about else "",
        reasons=about[-1].reasons if about else (),
    )


def _left(entry: Entry) -> str | None:
    """The version that a rollback took the alias from."""
    return entry.over if entry.kind == "rollback" else None


def _in_words(entry: Entry, number: str) -> str:
    if entry.version != number:
        return f"rolled back to {entry.version}"
    over = f"over {entry.over}" if entry.over else "as the first"
    return {
        "promote": f"promoted {over}",
        "rollback": f"came back for {entry.over}" if entry.over else "came back",
        "moved": "alias set in MLflow",
        "refuse": "refused",
    }[entry.kind]


def version_table(rows: list[Row]) -> Table:
    """One line per version."""
    table = Table(show_edge=False)
    for name in ("model", "version", "aliases", "recipe", "data", "created", "metrics", "decision"):
        table.add_column(name, justify="right" if name == "version" else "left")
    for row in rows:
        metrics = [f"{name} {value:.3g}" for name, value in row.metrics.items()]
        cells = (
            row.model, row.version, ", ".join(row.aliases), row.recipe, row.data_digest[:12],
            row.created[:16].replace("T", " "), ", ".join(metrics[:SHOWN]), row.decision,
        )  # fmt: skip
        table.add_row(*map(escape, cells))
    return table


@dataclass(frozen=True)
class Change:
    """How a registered model stands after a command.

    Attributes:
        champion, previous: versions.
        changed: False if the version was the champion already.
        reasons: of the decision.
        p95_s: seconds that 95 % of the check's images took at most; None if nothing was drawn.
    """

    model: str
    champion: str | None
    previous: str | None
    changed: bool
    reasons: tuple[str, ...]
    p95_s: float | None = None


def promote(
    model: str, home: Path, *, force_because: str | None = None, check_serving: bool = True
) -> Change:
    """Make a version the champion, if its evaluation says so and it can be served.

    Args:
        model: a version's number, of the default model; models:/NAME/VERSION, models:/NAME@ALIAS.
        force_because: promote it whatever the evaluation says; the reason is noted.
        check_serving: draw with it in the real service first.

    Raises:
        PromotionError: it is refused, cannot be served, or another job promoted meanwhile. A
            refusal is noted in the log.
        BundleError: there is no such version, or it cannot be fetched.
        ResourceError: the registry does not answer.
    """
    registry = ModelRegistry(home)
    found = find_version(registry, _reference(model))
    name, number = found.name, str(found.version)
    standing = registry.standing(name)
    if standing.champion == number:
        return Change(name, number, standing.aliases.get("previous"), False, ())
    verdict = _recorded(found, standing.champion)
    if force_because is not None:
        verdict = Verdict(True, standing.champion, (f"forced: {force_because}", *verdict.reasons),
                          verdict.evaluation)  # fmt: skip
    if not verdict.passed:
        registry.refuse(name, number, verdict)
        reasons = "\n  ".join(verdict.reasons)
        raise PromotionError(f"{SCHEME}{name}/{number} is not promoted:\n  {reasons}\n{FORCE}")
    p95 = _serve(registry, found, verdict) if check_serving else None
    registry.promote(name, number, verdict)
    previous = registry.standing(name).aliases.get("previous")
    return Change(name, number, previous, True, verdict.reasons, p95)


def _reference(model: str) -> str:
    if model.startswith(SCHEME):
        return model
    return f"{SCHEME}{PromoteConfig().model_name}/{model}"


def _recorded(version: ModelVersion, champion: str | None) -> Verdict:
    """What the version's evaluation says of it, which must be over today's champion."""
    if DECISION not in version.tags:
        reason = "no: it was not evaluated; `tessera retrain RECIPE` evaluates what it trains"
        return Verdict(False, champion, (reason,))
    verdict = Verdict.from_json(version.tags[DECISION])
    if verdict.over == champion:
        return verdict
    before, now = (f"version {v}" if v else "no champion" for v in (verdict.over, champion))
    reason = (
        f"no: it was evaluated against {before}, and now there is {now}: `tessera retrain RECIPE` "
        "evaluates it again"
    )
    return Verdict(False, champion, (reason,), verdict.evaluation)


def _serve(registry: ModelRegistry, version: ModelVersion, verdict: Verdict) -> float:
    """Draw with it in the real service; the latency that 95 % of the images kept, in seconds."""
    from serve.canary import check_servable  # Ray, which takes seconds to import

    bundle = registry.download(version).path
    try:
        return check_servable(bundle, registry.home, _canary(version)).p95_s
    except PromotionError as error:
        refused = Verdict(False, verdict.over, (f"no: {error}",), verdict.evaluation)
        registry.refuse(version.name, str(version.version), refused)
        raise


def _canary(version: ModelVersion) -> CanaryConfig:
    """The settings of the recipe that the version was made from."""
    settings: dict[str, Any] = json.loads(version.tags.get("settings", "{}"))
    try:
        return CanaryConfig.model_validate(settings.get("promote", {}).get("canary", {}))
    except ValidationError as error:
        raise RecipeError(explain(error, CanaryConfig)) from error


def rollback(name: str, home: Path, reason: str) -> Change:
    """Make the previous champion champion again.

    Raises:
        PromotionError: there is none, or another job changed the champion meanwhile.
        ResourceError: the registry does not answer.
    """
    standing = ModelRegistry(home).rollback(name, reason)
    previous = standing.aliases.get("previous")
    return Change(name, standing.champion, previous, True, standing.last.reasons)
