"""The model registry: every bundle that stood for promotion, and which of them is the champion.

A registered model's versions are bundles, logged with the MLflow run that made them and told apart
by their digests. Aliases say what they are: `candidate` stood for promotion last, `champion` is
served, `previous` was served before it.

    registry = ModelRegistry(home)
    version = registry.register(bundle, model_name="tessera", handle=run)
    registry.promote("tessera", version, Verdict(True, over=None, reasons=("it is the first",)))
    registry.rollback("tessera", "it forgot Chinese")
    resolve_model("models:/tessera@champion", home=home).path  # the bundle, on this disk

A champion changes in two steps: the decision is written to the log (decisions.py), where of two
jobs only one can win, then the aliases are set as the last valid decision says. A process that
dies in between leaves the old champion in its place; the next one that asks for the champion, or
decides, sets the aliases. A process that was stopped while it set them looks again afterwards, and
sets right what it overwrote. An alias that somebody moved in MLflow itself is respected, and noted
in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline import __version__
from pipeline.artifacts import bundle_digest, publish_once, resolve_path
from pipeline.bundles.decisions import (
    DecisionLog,
    Entry,
    Verdict,
    insist,
    last_valid,
    registry_answers,
)
from pipeline.config import Recipe
from pipeline.config.overrides import stated
from pipeline.config.promote import LOG_SUFFIX
from pipeline.errors import BundleError, PromotionError
from pipeline.runtime import code_commit
from pipeline.tracking.runs import ABSENT, RunHandle, RunLogger, connect, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
SCHEME = "models:/"
DECISION = "decision"
METRICS = "metrics"
"""The tags of a version that hold its latest `Verdict` and the numbers behind it, as JSON."""
_TAG_CHARS = 100_000  # of a tag's value, at most, says MLflow


@dataclass(frozen=True)
class ResolvedModel:
    """A bundle on this machine's disk, with the name and version to show for it."""

    path: Path
    name: str
    version: str


@dataclass(frozen=True)
class Standing:
    """A registered model at a moment.

    Attributes:
        aliases: the version of each alias.
        last: the decision that made the champion what it is; decisions.NOTHING before the first.
    """

    aliases: Mapping[str, str]
    last: Entry

    @property
    def champion(self) -> str | None:
        """The champion's version; None while there is none."""
        return self.aliases.get(CHAMPION)


class ModelRegistry:
    """The registered models of the tracking server that `home` uses.

    Args:
        home: where versions are downloaded to; see `runs.tracking_uri`.
        client: one that is connected already.

    Raises:
        ResourceError: nothing answers at the tracking URI. So does every method if the registry
            stops answering.
    """

    def __init__(self, home: Path, client: MlflowClient | None = None) -> None:
        self.home = home
        self.client = client or connect(home)

    # ---- Versions --------------------------------------------------------------------------------

    def register(
        self,
        bundle: Path,
        *,
        model_name: str,
        handle: RunHandle,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Log a bundle with its run, make it a version of the registered model, once, and give it
        the alias `candidate`.

        Args:
            tags: of a version that is made; see `lineage`.

        Returns:
            The version; the known one if the same bundle was registered before.
        """
        digest = bundle_digest(bundle)
        same = f"name = '{model_name}' and tags.digest = '{digest}'"
        with registry_answers(f"whether {bundle} is a version of {model_name}"):
            known = self.client.search_model_versions(same)
        if known:
            version = str(known[0].version)
        else:
            version = self._create(bundle, model_name, handle, {**(tags or {}), "digest": digest})
        self._set_alias(model_name, CANDIDATE, version)
        return version

    def _create(self, bundle: Path, name: str, handle: RunHandle, tags: Mapping[str, str]) -> str:
        from mlflow import MlflowException

        with contextlib.suppress(MlflowException):  # it exists already
            self.client.create_registered_model(name)
        RunLogger(handle).files(bundle, folder="bundle")
        with registry_answers(f"whether {bundle} was made a version of {name}"):
            source = f"{self.client.get_run(handle.run_id).info.artifact_uri}/bundle"
            made = self.client.create_model_version(name, source, handle.run_id, tags=dict(tags))
        return str(made.version)

    def record(
        self,
        name: str,
        version: str,
        verdict: Verdict,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Note with a version how it was judged, for `tessera promote` and `tessera models`.

        Args:
            metrics: the few that tell it from others, the most important first.
        """
        tags = {
            DECISION: verdict.to_json(),
            METRICS: json.dumps(dict(metrics or {})),
            "evaluation": verdict.evaluation,
        }
        for key, value in tags.items():
            insist(
                f"whether the verdict on version {version} was noted",
                partial(self.client.set_model_version_tag, name, version, key, value),
            )

    def names(self) -> list[str]:
        """The registered models, without their decision logs, by name."""
        found: list[str] = []
        token = None
        with registry_answers("which models are registered"):
            while True:
                page = self.client.search_registered_models(page_token=token)
                found += [model.name for model in page if not model.name.endswith(LOG_SUFFIX)]
                if not (token := page.token):
                    return sorted(found)

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a registered model, the newest first; none if there is no such model."""
        found: list[ModelVersion] = []
        token = None
        with registry_answers(f"which versions {name} has"):
            while True:
                page = self.client.search_model_versions(
                    f"name = '{name}'", order_by=["version_number DESC"], page_token=token
                )
                found += page
                if not (token := page.token):
                    return found

    def version(
        self, name: str, *, alias: str | None = None, number: str = ""
    ) -> ModelVersion | None:
        """The version with an alias or a number; None if the registry says that there is none."""
        from mlflow import MlflowException

        wanted = f"is the {alias}" if alias is not None else f"is number {number}"
        with registry_answers(f"which version of {name} {wanted}"):
            try:
                if alias is not None:
                    return self.client.get_model_version_by_alias(name, alias)
                return self.client.get_model_version(name, number)
            except MlflowException as error:
                if error.error_code in ABSENT:
                    return None
                raise

    def download(self, version: ModelVersion) -> ResolvedModel:
        """A version's bundle in the home directory, downloaded once.

        Raises:
            BundleError: it cannot be downloaded.
        """
        from mlflow import MlflowException

        run = version.run_id
        if run is None:  # made by hand, not by `register`
            raise BundleError(
                f"version {version.version} of {version.name} has no run to fetch its bundle from: "
                "name another version"
            )
        folder = self.home / "models" / f"{version.name}-{version.version}-{run[:8]}"
        try:
            path = publish_once(folder, partial(self._fetch, run), is_done=_is_bundle)
        except (MlflowException, OSError) as error:
            raise BundleError(
                f"version {version.version} of {version.name} cannot be fetched: {error}"
            ) from error
        return ResolvedModel(resolve_path(path), name=version.name, version=str(version.version))

    def _fetch(self, run_id: str, path: Path) -> None:
        fetched = self.client.download_artifacts(run_id, "bundle", str(path.parent))
        Path(fetched).rename(path)

    # ---- The champion ----------------------------------------------------------------------------

    def champion(self, model_name: str) -> ResolvedModel | None:
        """The current champion's bundle, or None while there is none.

        Raises:
            BundleError: it cannot be downloaded.
            ResourceError: the registry does not say; without this error a registry that is down
                would let any candidate pass.
        """
        self.standing(model_name)
        version = self.version(model_name, alias=CHAMPION)
        return None if version is None else self.download(version)

    def standing(self, name: str) -> Standing:
        """The aliases and the last decision, once the aliases are what the decision says."""
        log, applied = DecisionLog(self.client, name), 0
        while True:
            last = log.last()  # before the aliases: a decision taken in between then wins below
            aliases = self._aliases(name)
            if not last.applied or applied not in (0, last.number):
                self._apply(name, last)
                log.mark_applied(last)
                applied = last.number
            elif (champion := aliases.get(CHAMPION)) not in (None, last.version):
                over = last.version or None
                moved = Verdict(True, over, ("the alias was set in MLflow",))
                log.append("moved", champion, moved, follows=last.number)
            else:
                return Standing(aliases, last)

    def promote(self, name: str, version: str, verdict: Verdict) -> None:
        """Make a version the champion, which nobody else may have done since it was judged.

        Args:
            verdict: passed, over the version that must still be the champion.

        Raises:
            PromotionError: the champion is another one by now.
        """
        assert verdict.passed, verdict
        standing = self.standing(name)
        if standing.champion == version:
            return
        if standing.champion != verdict.over:
            raise _overtaken(standing)
        self._decide("promote", name, version, verdict, standing)

    def refuse(self, name: str, version: str, verdict: Verdict) -> None:
        """Note in the log that a version was not promoted, and why, unless it says so already."""
        log = DecisionLog(self.client, name)
        entries = log.entries()
        about = [entry for entry in entries if entry.version == version]
        if about and about[-1].kind == "refuse" and about[-1].reasons == verdict.reasons:
            return
        log.append("refuse", version, verdict, follows=last_valid(entries).number)

    def rollback(self, name: str, reason: str) -> Standing:
        """Make the previous champion champion again; the one it replaces is then the previous.

        Returns:
            How the model stands afterwards.

        Raises:
            PromotionError: there is no previous one, or another job changed the champion meanwhile.
        """
        standing = self.standing(name)
        previous = standing.aliases.get(PREVIOUS)
        if previous is None or previous == standing.champion:
            raise PromotionError(
                f"{name} has no previous champion to go back to; `tessera models {name}` lists its "
                "versions, and `tessera promote` makes one of them champion"
            )
        left = standing.champion or standing.last.version or None  # its alias may have been removed
        return self._decide("rollback", name, previous, Verdict(True, left, (reason,)), standing)

    def _decide(
        self, kind: Literal["promote", "rollback"], name: str, version: str, verdict: Verdict,
        seen: Standing,
    ) -> Standing:  # fmt: skip
        log = DecisionLog(self.client, name)
        decision = log.append(kind, version, verdict, follows=seen.last.number)
        holds = log.holds(decision)
        standing = self.standing(name)
        if not holds:
            raise _overtaken(standing) if kind == "promote" else _went_already(name, standing)
        return standing

    def _apply(self, name: str, decision: Entry) -> None:
        """Set the aliases as a decision says; those of versions that were deleted stay unset."""
        if decision.over is not None and self.version(name, number=decision.over) is not None:
            self._set_alias(name, PREVIOUS, decision.over)
        elif self._aliases(name).get(PREVIOUS) == decision.version:
            what = f"whether version {decision.version} of {name} is no longer the {PREVIOUS}"
            insist(what, lambda: self.client.delete_registered_model_alias(name, PREVIOUS))
        if self.version(name, number=decision.version) is not None:
            self._set_alias(name, CHAMPION, decision.version)

    def _set_alias(self, name: str, alias: str, version: str) -> None:
        insist(
            f"whether version {version} of {name} is the {alias}",
            lambda: self.client.set_registered_model_alias(name, alias, version),
        )

    def _aliases(self, name: str) -> dict[str, str]:
        from mlflow import MlflowException

        with registry_answers(f"which aliases {name} has"):
            try:
                return {
                    alias: str(version)
                    for alias, version in self.client.get_registered_model(name).aliases.items()
                }
            except MlflowException as error:
                if error.error_code in ABSENT:
                    return {}
                raise


def lineage(recipe: Recipe, data: Mapping[str, str]) -> dict[str, str]:
    """Tags for `register`: what a version was made from.

    Args:
        data: digest of each shard set by its URI.

    Returns:
        recipe (its name), settings (those that it states, as JSON; left out if they are longer
        than a tag may be), data_digest (of several sets the sha256 of their digests), code_version.
    """
    digests = sorted(data.values())
    joined = hashlib.sha256("".join(digests).encode()).hexdigest()
    tags = {
        "recipe": recipe.name,
        "data_digest": digests[0] if len(digests) == 1 else joined,
        "code_version": f"{__version__} {code_commit()}".strip(),
    }
    settings = json.dumps(stated(recipe), ensure_ascii=False)
    return tags | ({"settings": settings} if len(settings) <= _TAG_CHARS else {})


def resolve_model(model: str, *, home: Path) -> ResolvedModel:
    """A bundle directory, asset:NAME, or models:/NAME@ALIAS or models:/NAME/VERSION.

    Raises:
        BundleError: there is no such bundle or no such registered version, or it cannot be fetched.
        ResourceError: nothing answers at the tracking URI.
    """
    if not model.startswith(SCHEME):
        path = resolve_path(model).absolute()
        return ResolvedModel(path, name=path.name, version=bundle_digest(path)[:12])
    registry = ModelRegistry(home)
    return registry.download(find_version(registry, model))


def find_version(registry: ModelRegistry, model: str) -> ModelVersion:
    """The version that models:/NAME@ALIAS or models:/NAME/VERSION names.

    Raises:
        BundleError: there is none.
    """
    reference = model.removeprefix(SCHEME)
    if "@" in reference:
        name, alias = reference.split("@", 1)
        version = registry.version(name, alias=alias)
    else:
        name, _, number = reference.partition("/")
        version = registry.version(name, number=number)
    if version is None:
        remedy = "`tessera retrain RECIPE` or `tessera demo` makes a champion"
        if registry.versions(name):
            remedy = f"`tessera models {name}` lists its versions and aliases"
        elif names := registry.names():
            known = ", ".join(f"{SCHEME}{known}" for known in names)
            remedy = f"the registered models are {known}; `tessera models` lists their versions"
        raise BundleError(
            f"{model} is not in the registry at {tracking_uri(registry.home)}; {remedy}"
        )
    return version


def has_champion(home: Path, model_name: str) -> bool:
    """Whether a version of the registered model has the alias `champion`.

    Raises:
        ResourceError: nothing answers at the tracking URI.
    """
    return ModelRegistry(home).version(model_name, alias=CHAMPION) is not None


def _overtaken(standing: Standing) -> PromotionError:
    if standing.champion is None:
        now = "the champion was removed"
    else:
        now = f"another job promoted version {standing.champion}"
    return PromotionError(
        f"{now} meanwhile: run the same command again to be judged against what is champion now"
    )


def _went_already(name: str, standing: Standing) -> PromotionError:
    return PromotionError(
        f"another job changed the champion of {name} meanwhile, to version {standing.champion}; "
        f"`tessera models {name}` says why. Nothing was rolled back here: do it again only if "
        "that version is to go as well"
    )


def _is_bundle(path: Path) -> bool:
    return (path / "config.json").is_file()
