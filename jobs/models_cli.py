"""`tessera models`, `promote` and `rollback`: the registered models, and which is the champion."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.console import output
from jobs.options import DEFAULT_HOME, AsJson, Debug, Home
from pipeline.config import PromoteConfig

if TYPE_CHECKING:
    from jobs.models import Change


def models(
    name: Annotated[
        str | None, typer.Argument(help="A registered model. Default: all that there are.")
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the versions in the model registry, and what was decided about each.

    One line per version, the newest first: its number, its aliases (candidate stood for promotion
    last, champion is served, previous was served before), the recipe and the digest of the data it
    was made from, when, its metrics and the latest decision about it. --json has the reasons too.
    """
    from jobs.models import list_versions, version_table
    from pipeline.tracking.runs import tracking_uri

    rows = list_versions(home, name)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], ensure_ascii=False))
    elif rows:
        output().print(version_table(rows))
    else:
        what = f"no version of {name} is" if name else "no model is"
        typer.echo(f"{what} registered at {tracking_uri(home)}", err=True)


def promote(
    model: Annotated[
        str,
        typer.Argument(
            help="Number of a version of the model that recipes name by default, "
            "models:/NAME/VERSION or models:/NAME@ALIAS."
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Promote it whatever its evaluation says.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Why, for the decision log; --force needs it.")] = "",
    skip_serving_check: Annotated[
        bool,
        typer.Option(
            "--skip-serving-check", help="With --force: do not draw with it in the service first."
        ),
    ] = False,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a registered version the champion, if it was evaluated against the champion and passed.

    Serves the version in a process of its own first and draws a few pictures with it (settings
    promote.canary of its recipe), then moves the alias champion; services follow it within seconds.
    A version whose evaluation failed, or was against a former champion, is refused with the
    reasons. Promotions and refusals are noted in the registry, in the log NAME-decisions.
    """
    if force and not reason.strip():
        raise typer.BadParameter("--force needs a reason", param_hint="--reason")
    if skip_serving_check and not force:
        raise typer.BadParameter("is for --force alone", param_hint="--skip-serving-check")
    from jobs.models import promote as run

    change = run(
        model, home, force_because=reason if force else None, check_serving=not skip_serving_check
    )
    _tell(change, as_json)


def rollback(
    name: Annotated[
        str, typer.Argument(help="A registered model. Default: the one that recipes name.")
    ] = PromoteConfig().model_name,
    reason: Annotated[str, typer.Option(help="Why, for the decision log.")] = "rolled back by hand",
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make the previous champion champion again.

    Swaps the aliases champion and previous, so that a second rollback undoes the first; services
    follow within seconds. Noted in the registry, in the log NAME-decisions.
    """
    from jobs.models import rollback as run

    _tell(run(name, home, reason), as_json)


def _tell(change: Change, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(change), ensure_ascii=False))
        return
    said = f"models:/{change.model}/{change.champion} is champion"
    if not change.changed:
        said += " already"
    elif change.previous:
        said += f"; the previous one is {change.previous}"
    typer.echo(said)
