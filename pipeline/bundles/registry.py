"""The model registry: every bundle that stood for promotion, and which of them is the champion.

A registered model's versions are bundles, logged with the MLflow run that made them and told apart
by their digests. The alias `champion` names the version that is served.

    registry = ModelRegistry(home)
    version = registry.register(bundle, model_name="tessera", handle=run)
    registry.set_champion("tessera", version)
    resolve_model("models:/tessera@champion", home=home).path  # the bundle, on this disk
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts import bundle_digest, publish_once, resolve_path
from pipeline.errors import BundleError, ResourceError
from pipeline.tracking.runs import RunHandle, RunLogger, connect, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
SCHEME = "models:/"


@dataclass(frozen=True)
class ResolvedModel:
    """A bundle on this machine's disk, with the name and version to show for it."""

    path: Path
    name: str
    version: str


class ModelRegistry:
    """The registered models of the tracking server that `home` uses.

    Args:
        home: where versions are downloaded to; see `runs.tracking_uri`.
        client: one that is connected already.

    Raises:
        ResourceError: nothing answers at the tracking URI.
    """

    def __init__(self, home: Path, client: MlflowClient | None = None) -> None:
        self.home = home
        self.client = client or connect(home)

    def register(self, bundle: Path, *, model_name: str, handle: RunHandle) -> str:
        """Log a bundle with its run and make it a version of the registered model, once.

        Returns:
            The version; the known one if the same bundle was registered before.
        """
        digest = bundle_digest(bundle)
        same = f"name = '{model_name}' and tags.digest = '{digest}'"
        known = self.client.search_model_versions(same)
        if known:
            return str(known[0].version)
        from mlflow import MlflowException

        with contextlib.suppress(MlflowException):  # it exists already
            self.client.create_registered_model(model_name)
        RunLogger(handle).files(bundle, folder="bundle")
        source = f"{self.client.get_run(handle.run_id).info.artifact_uri}/bundle"
        created = self.client.create_model_version(
            model_name, source, handle.run_id, tags={"digest": digest}
        )
        return str(created.version)

    def champion(self, model_name: str) -> ResolvedModel | None:
        """The current champion's bundle, or None while there is none.

        Raises:
            BundleError: it cannot be downloaded.
            ResourceError: the registry does not say; without this error a registry that is down
                would let any candidate pass.
        """
        version = self.version(model_name, alias=CHAMPION)
        return None if version is None else self.download(version)

    def set_champion(self, model_name: str, version: str) -> None:
        """Move the alias `champion` to a version."""
        self.client.set_registered_model_alias(model_name, CHAMPION, version)

    def version(
        self, name: str, *, alias: str | None = None, number: str = ""
    ) -> ModelVersion | None:
        """The version with an alias or a number; None if the registry says that there is none.

        Raises:
            ResourceError: it does not say.
        """
        from mlflow import MlflowException

        try:
            if alias is not None:
                return self.client.get_model_version_by_alias(name, alias)
            return self.client.get_model_version(name, number)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            wanted = f"is the {alias}" if alias is not None else f"is number {number}"
            raise ResourceError(
                f"the registry does not say which version of {name} {wanted} ({error.message}); "
                "run the same command again to go on from here"
            ) from error

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
    reference = model.removeprefix(SCHEME)
    if "@" in reference:
        name, alias = reference.split("@", 1)
        version = registry.version(name, alias=alias)
    else:
        name, _, number = reference.partition("/")
        version = registry.version(name, number=number)
    if version is None:
        raise BundleError(
            f"{model} is not in the registry at {tracking_uri(home)}; "
            "`tessera retrain RECIPE` or `tessera demo` makes a champion"
        )
    return registry.download(version)


def has_champion(home: Path, model_name: str) -> bool:
    """Whether a version of the registered model has the alias `champion`.

    Raises:
        ResourceError: nothing answers at the tracking URI.
    """
    return ModelRegistry(home).version(model_name, alias=CHAMPION) is not None


def _is_bundle(path: Path) -> bool:
    return (path / "config.json").is_file()
