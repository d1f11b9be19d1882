"""`tessera key NAME` and `tessera bench serve`: a running service's keys and speed."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from pydantic import ValidationError

from jobs.options import AsJson, Debug
from pipeline.errors import RecipeError
from pipeline.overrides import explain

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure speed: how a running service copes with load."
)


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is: letters, digits, '.', '_', '-'.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make an API key for the service: shown once, only its digest is for the settings file.

    Give the key to the client, and the other line to `tessera serve --config FILE`.
    """
    from serve.access import new_key
    from serve.settings import ApiKey

    secret, digest = new_key()
    try:
        ApiKey(name=name, sha256=digest)
    except ValidationError as error:
        raise RecipeError(explain(error, ApiKey)) from error
    if as_json:
        typer.echo(json.dumps({"name": name, "key": secret, "sha256": digest}))
        return
    typer.echo(f"the key, shown this once:  {secret}")
    typer.echo(f"for the settings' `keys:`  - {{name: {name}, sha256: {digest}}}")


@bench_app.command("serve")
def bench_serve(
    url: Annotated[str, typer.Option(help="The server, without /v1.")] = "http://127.0.0.1:8000",
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Users in a closed loop; may be repeated.")
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=0.001, help="Requests a second, Poisson arrivals; may be repeated."),
    ] = None,
    duration_s: Annotated[float, typer.Option(min=0.1, help="Of each load, seconds.")] = 10.0,
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "a red apple",
    n: Annotated[int, typer.Option(min=1, max=10, help="Pictures a request.")] = 1,
    num_steps: Annotated[int | None, typer.Option(help="Decoding steps.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="TESSERA_API_KEY", help="Where the server wants one.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of arrivals and pictures; default: a random one. Given again, it measures the "
            "server's result cache."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put load on a running server: pictures a second, p50, p95, p99 and errors of each load."""
    from jobs.bench import Load, bench

    load = Load(
        url.rstrip("/"), duration_s=duration_s, prompt=prompt, num_images=n,
        num_steps=num_steps, api_key=api_key, seed=seed,
    )  # fmt: skip
    concurrencies = concurrency or ([] if rate else [1, 8])
    results = bench(load, concurrencies=concurrencies, rates=rate or [])
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(result) for result in results]))
        return
    typer.echo("| load | requests | pictures/s | p50 s | p95 s | p99 s | worst s | errors |")
    typer.echo("|---|---|---|---|---|---|---|---|")
    for r in results:
        times = " | ".join("-" if t is None else f"{t:.3f}" for t in (r.p50, r.p95, r.p99, r.worst))
        errors = ", ".join(f"{kind}: {count}" for kind, count in r.errors.items()) or "none"
        typer.echo(f"| {r.load} | {r.requests} | {r.pictures_per_s:.2f} | {times} | {errors} |")
