"""The decision log: every promotion, rollback and refusal of a registered model, in order.

MLflow moves an alias for whoever asks last, but it numbers a registered model's versions one by
one: of two clients, on sqlite or through a server, one gets a number and the other the next. So a
decision about the model NAME is a version of the registered model NAME-decisions, and is written
with all its tags or not at all.

    log = DecisionLog(client, "tessera")
    mine = log.append("promote", "7", verdict, follows=log.last().number)
    log.holds(mine)  # False: another decision came first, and this one has no effect

A decision names the last valid one that its writer saw (`follows`), and is valid if that is still
the last valid one before it. Whoever reads the log comes to the same result, for entries never
change, apart from the mark that their aliases are set. They are not to be deleted.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, cast

from pipeline.config.promote import LOG_SUFFIX
from pipeline.errors import ResourceError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_DESCRIPTION = (
    "Promotions, rollbacks and refusals of {name}, in order. Written by Tessera; keep it."
)
_PAGE = 1_000  # entries asked for at once

Kind = Literal["promote", "rollback", "moved", "refuse"]
"""`moved`: somebody set the champion's alias in MLflow itself. `refuse` changes nothing."""


@dataclass(frozen=True)
class Verdict:
    """Whether a version may replace the champion.

    Attributes:
        passed: it may.
        over: the champion's version that it was judged against; None where there was none.
        reasons: one sentence per rule.
        evaluation: where the numbers are: runs:/RUN or runs:/RUN/ARTIFACT; "" for none.
    """

    passed: bool
    over: str | None
    reasons: tuple[str, ...]
    evaluation: str = ""

    def to_json(self) -> str:
        """As a tag holds it."""
        return json.dumps(vars(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """What `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "reasons": tuple(values["reasons"])})


@dataclass(frozen=True)
class Entry:
    """One decision.

    Attributes:
        number: its place in the log, from 1.
        kind: what was decided.
        version: of the model: the champion from now on, or the one refused.
        over: the champion's version before; None where there was none.
        reasons: one sentence each.
        evaluation: as in `Verdict`.
        follows: the number of the last valid entry that the writer saw; 0 for none.
        by: USER@HOST.
        time: ISO 8601, UTC.
        id: chosen by the writer, which knows its entry by it.
        applied: the aliases were set accordingly.
    """

    number: int
    kind: Kind
    version: str
    over: str | None
    reasons: tuple[str, ...]
    evaluation: str
    follows: int
    by: str
    time: str
    id: str
    applied: bool


NOTHING = Entry(0, "moved", "", None, (), "", 0, "", "", "", applied=True)
"""The last entry of an empty log."""


def valid(entries: Iterable[Entry]) -> list[Entry]:
    """The decisions that hold, of all in order: each follows the one before. Refusals are none."""
    chain = list[Entry]()
    for entry in entries:
        last = chain[-1].number if chain else 0
        if entry.kind != "refuse" and entry.follows == last:
            chain.append(entry)
    return chain


def last_valid(entries: Iterable[Entry]) -> Entry:
    """The last decision that holds; NOTHING if none does."""
    return (valid(entries) or [NOTHING])[-1]


def effective(entries: Sequence[Entry]) -> list[Entry]:
    """The valid decisions and the refusals, in order: all but those that came too late."""
    chain = {entry.number for entry in valid(entries)}
    return [entry for entry in entries if entry.kind == "refuse" or entry.number in chain]


class DecisionLog:
    """The log of one registered model.

    Args:
        client: connected to the registry.
        name: the registered model that is decided about.

    Every method raises ResourceError if the registry does not answer.
    """

    def __init__(self, client: MlflowClient, name: str) -> None:
        self.client, self.name, self.log_name = client, name, name + LOG_SUFFIX

    def entries(self) -> list[Entry]:
        """All entries, the oldest first."""
        found, token = list[Entry](), None
        with registry_answers(f"what was decided about {self.name}"):
            while True:
                page = self.client.search_model_versions(
                    f"name = '{self.log_name}'", max_results=_PAGE,
                    order_by=["version_number ASC"], page_token=token,
                )  # fmt: skip
                found += [_entry(version) for version in page if "kind" in version.tags]
                if not (token := page.token):
                    return found

    def last(self) -> Entry:
        """The last valid entry; NOTHING if there is none."""
        return last_valid(self.entries())

    def holds(self, entry_id: str) -> bool:
        """Whether the entry with this id is valid."""
        return any(entry.id == entry_id for entry in valid(self.entries()))

    def append(self, kind: Kind, version: str, verdict: Verdict, *, follows: int) -> str:
        """Write an entry, which `holds` then tells to be valid or not.

        Args:
            kind, version, follows: as in `Entry`.
            verdict: its `over`, reasons and evaluation are written.

        Returns:
            Its id.
        """
        from mlflow import MlflowException

        entry_id = uuid.uuid4().hex
        tags = {
            "kind": kind,
            "version": version,
            "over": verdict.over or "",
            "reasons": json.dumps(verdict.reasons, ensure_ascii=False),
            "evaluation": verdict.evaluation,
            "follows": str(follows),
            "by": _author(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "id": entry_id,
            "applied": "false",
        }
        with contextlib.suppress(MlflowException):  # it exists already
            self.client.create_registered_model(
                self.log_name, description=_DESCRIPTION.format(name=self.name)
            )
        with registry_answers(f"whether the decision about version {version} was written"):
            source = f"models:/{self.name}/{version}"
            self.client.create_model_version(self.log_name, source, tags=tags)
        return entry_id

    def mark_applied(self, entry: Entry) -> None:
        """Note that the aliases are set as an entry says."""
        insist(
            f"whether decision {entry.number} about {self.name} is applied",
            lambda: self.client.set_model_version_tag(
                self.log_name, str(entry.number), "applied", "true"
            ),
        )


def insist(what: str, write: Callable[[], object]) -> None:
    """Write to the registry what another job may be writing at the same moment.

    MLflow looks whether an alias or a tag is there and inserts it if not. Of two jobs that do so at
    once the database refuses one, which finds the row when it looks again.

    Args:
        what: as for `registry_answers`.
        write: may be done twice.

    Raises:
        ResourceError: the registry refuses the second time as well.
    """
    from mlflow import MlflowException

    try:
        write()
    except MlflowException:
        with registry_answers(what):
            write()


@contextlib.contextmanager
def registry_answers(what: str) -> Iterator[None]:
    """Turn an error of MLflow into a ResourceError that says what the registry does not say."""
    from mlflow import MlflowException

    try:
        yield
    except MlflowException as error:
        raise ResourceError(
            f"the registry does not say {what} ({error.message}); run the same command again to "
            "go on from here"
        ) from error


def _entry(version: ModelVersion) -> Entry:
    tags = cast(Mapping[str, str], version.tags)
    return Entry(
        number=int(version.version),
        kind=cast(Kind, tags["kind"]),
        version=tags["version"],
        over=tags["over"] or None,
        reasons=tuple(json.loads(tags["reasons"])),
        evaluation=tags["evaluation"],
        follows=int(tags["follows"]),
        by=tags["by"],
        time=tags["time"],
        id=tags["id"],
        applied=tags["applied"] == "true",
    )


def _author() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
