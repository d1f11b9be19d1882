"""`tessera key NAME` and `tessera bench serve`: a service's API keys, and its speed under load."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from jobs.options import AsJson, Debug
from pipeline.config.overrides import explain
from pipeline.errors import RecipeError

if TYPE_CHECKING:
    from jobs.bench import Result

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure how fast a running service answers under load."
)


def key(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of the client, for its limits and the log: letters, digits, '.', '_', '-'."
        ),
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make an API key for one client of the service.

    Prints two lines: the key itself, which is stored nowhere and is for the client, and its sha256
    digest, which goes under `keys:` in the file of `tessera serve --config FILE`.
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
    url: Annotated[
        str, typer.Option(help="URL of the server, without /v1.")
    ] = "http://127.0.0.1:8000",
    concurrency: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Closed loop: this many clients, each of which sends its next request when the "
            "last one is answered. May be repeated. Default, without --rate: 1 and 8.",
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            min=0.001,
            help="Open loop: requests per second, at Poisson arrival times, however long answers "
            "take. May be repeated.",
        ),
    ] = None,
    duration_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds for which each load sends requests.")
    ] = 10.0,
    prompt: Annotated[str, typer.Option(help="Prompt of all requests.")] = "a red apple",
    n: Annotated[int, typer.Option(min=1, max=10, help="Images per request.")] = 1,
    num_steps: Annotated[
        int | None, typer.Option(help="Decoding steps per image. Default: the model's.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="TESSERA_API_KEY", help="API key, if the server requires one."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the arrival times and of the seeds that requests carry. Default: a new "
            "one in every run. A seed that was used before asks for the same images again, so the "
            "server answers from its result cache."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put load on a running server and measure images per second, latencies and errors.

    Every --concurrency, then every --rate, is one load, run after the ones before. Prints a
    Markdown table, one row per load: requests answered with images, images per second, latency in
    seconds (median, 95th and 99th percentile, worst) and errors by HTTP status.
    """
    from jobs.bench import Load, bench

    load = Load(
        url.rstrip("/"),
        duration_s=duration_s,
        prompt=prompt,
        num_images=n,
        num_steps=num_steps,
        api_key=api_key,
        seed=seed,
    )
    concurrencies = concurrency or ([] if rate else [1, 8])
    results = bench(load, concurrencies=concurrencies, rates=rate or [])
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(result) for result in results]))
    else:
        typer.echo(_table(results))


def _table(results: Sequence[Result]) -> str:
    lines = [
        "| load | requests | images/s | p50 s | p95 s | p99 s | worst s | errors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        times = " | ".join("-" if t is None else f"{t:.3f}" for t in (r.p50, r.p95, r.p99, r.worst))
        errors = ", ".join(f"{kind}: {count}" for kind, count in r.errors.items()) or "none"
        lines.append(f"| {r.load} | {r.requests} | {r.images_per_s:.2f} | {times} | {errors} |")
    return "\n".join(lines)
