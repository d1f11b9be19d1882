"""The `tessera` command: one function a command, each over one job.

Results go to standard output (as JSON with --json), everything else to standard error.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from jobs.console import ConsoleReporter, time_table, trial_table
from jobs.data_cli import data_app, ingest_app
from jobs.options import DEFAULT_HOME, AsJson, Debug, Home, Overrides, RecipeName
from jobs.serving_cli import bench_app, key
from pipeline.errors import TesseraError
from pipeline.runtime import set_environment

app = typer.Typer(
    name="tessera",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Captioned pictures in, an autoscaled text-to-image API out. Start with `tessera demo`.",
)
app.add_typer(ingest_app, name="ingest")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.command()(key)
console = Console(stderr=True, emoji=False)
INTERRUPTED = 130  # what Typer ends with after Ctrl-C


@app.command()
def demo(
    home: Home = DEFAULT_HOME,
    recipe: Annotated[str, typer.Option(help="The recipe to show.")] = "emoji-demo",
    serve: Annotated[bool, typer.Option(help="Stay up and answer requests afterwards.")] = True,
    port: Annotated[int, typer.Option(help="The server's port.")] = 8000,
    debug: Debug = False,
) -> None:
    """Fine-tune the shipped base, test before against after, promote, draw a grid, serve.

    Takes at most 15 minutes on 2 CPU cores. Interrupted, it goes on where it stopped.
    """
    from pipeline.config import load_recipe

    loaded = load_recipe(recipe)  # a mistake is told before anything heavy is imported
    from jobs.demo import first_grid
    from jobs.retrain import retrain as run
    from serve.launch import check_port

    if serve:
        check_port("127.0.0.1", port)
    with ConsoleReporter(console) as reporter:
        outcome = run(loaded, home, reporter, debug=debug)
    console.print(time_table(outcome.seconds))
    _print_decision(outcome, loaded.promote.model_name)
    typer.echo(first_grid(loaded, outcome, home))
    if serve:
        _serve(
            f"models:/{loaded.promote.model_name}@champion", loaded.serve, home, "127.0.0.1", port
        )


@app.command()
def retrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a recipe's whole chain: preprocess, train, evaluate, decide, promote.

    Steps that were done before with the same data and settings are skipped.
    """
    from pipeline.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from jobs.retrain import retrain as run
    from jobs.retrain import summary

    with ConsoleReporter(console) as reporter:
        outcome = run(loaded, home, reporter, debug=debug)
    console.print(time_table(outcome.seconds))
    if as_json:
        typer.echo(json.dumps(summary(outcome)))
        return
    from pipeline.reports import markdown_table

    typer.echo(markdown_table(list(outcome.reports.values())))
    _print_decision(outcome, loaded.promote.model_name)
    typer.echo(outcome.bundle)


def _print_decision(outcome: Any, model_name: str) -> None:
    for sentence in outcome.choice:
        console.print(sentence, highlight=False, markup=False)
    verdict = "promoted to champion" if outcome.decision.promoted else "not promoted"
    version = escape(f"models:/{model_name}/{outcome.version}")
    console.print(f"{version}: [bold]{verdict}[/bold]", highlight=False)
    for reason in outcome.decision.reasons:
        console.print(f"  {reason}", highlight=False, markup=False)


def _step_command(name: str, help_text: str) -> None:
    def command(
        recipe: RecipeName,
        overrides: Overrides = None,
        home: Home = DEFAULT_HOME,
        as_json: AsJson = False,
        debug: Debug = False,
    ) -> None:
        _run_step(name, recipe, overrides or [], home, as_json, debug)

    app.command(name=name, help=help_text)(command)


@app.command()
def preprocess(
    recipe: RecipeName,
    overrides: Overrides = None,
    max_bad_fraction: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Quarantined / promised; above it the job fails."),
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Shards to pixels: check, decode, square, resize, quarantine."""
    settings = list(overrides or ())
    if max_bad_fraction is not None:
        settings.append(f"preprocess.max_bad_fraction={max_bad_fraction}")
    _run_step("preprocess", recipe, settings, home, as_json, debug)


def _run_step(
    name: str, recipe: str, overrides: list[str], home: Path, as_json: bool, debug: bool
) -> None:
    from pipeline.config import load_recipe

    loaded = load_recipe(recipe, overrides)
    from jobs.steps import run_step

    with ConsoleReporter(console) as reporter:
        result = run_step(name, loaded, home, reporter, debug=debug)
    for sentence in result.get("choice", ()):
        console.print(sentence, highlight=False, markup=False)
    typer.echo(json.dumps(result) if as_json else result["path"])


_step_command("pretrain", "Train a recipe's image tokenizer on pictures alone.")
_step_command("align", "Train a recipe's aligner, which evaluation retrieves captions with.")
_step_command(
    "train", "Train a recipe's generator, or its candidates; print the best bundle's path."
)
_step_command("evaluate", "Judge the candidate against champion, untuned base and floors.")


@app.command(name="tune")
def tune_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the best recipe here too, ready for `train`.")
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Search better settings for a recipe's generator, over its section `tune`.

    Ray Tune draws trials from tune.space and trains them; ASHA stops the worse ones early. Prints
    the path of the best recipe. Interrupted, the same command goes on where it stopped.
    """
    from pipeline.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from jobs.tune import run_search

    with ConsoleReporter(console) as reporter:
        result = run_search(loaded, home, reporter, out=out, debug=debug)
    if as_json:
        typer.echo(json.dumps(result))
        return
    console.print(trial_table(result["trials"]))
    typer.echo(result["path"])


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="models:/NAME@ALIAS, a bundle directory or asset:base. Default: the "
            "champion, or the shipped base while there is none."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Take this recipe's serve section, and its champion if MODEL is left out."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML with keys, limits and safety; serve/README.md lists them."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's want keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    home: Home = DEFAULT_HOME,
    debug: Debug = False,
) -> None:
    """Serve a model behind the OpenAI images API until Ctrl-C."""
    from pipeline.config import PromoteConfig, load_recipe, load_serve_section
    from serve.settings import ServiceConfig, check_exposure, load_service

    loaded = load_recipe(recipe) if recipe else None
    replicas = loaded.serve if loaded else load_serve_section()
    service = load_service(config) if config else ServiceConfig()
    check_exposure(host, service)  # a mistake is told before anything heavy is imported
    from jobs.generate import default_model

    name = loaded.promote.model_name if loaded else PromoteConfig().model_name
    _serve(model or default_model(home, name), replicas, home, host, port, service)


def _serve(model: str, config: Any, home: Path, host: str, port: int, service: Any = None) -> None:
    from serve.launch import serve_forever

    server = serve_forever(
        model,
        config,
        home=str(home.absolute()),
        service=service,
        host=host,
        port=port,
        blocking=False,
    )
    console.print(
        f"[bold]{escape(model)}[/bold] draws at {server.url} (Ctrl-C stops):\n"
        f"  curl {server.url}/v1/images/generations -H 'content-type: application/json' "
        """-d '{"model": "champion", "prompt": "红苹果"}'""",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    try:
        server.wait()
    finally:
        server.close()


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw, in English, Chinese, ...")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("picture.png"),
    n: Annotated[int, typer.Option(min=1, max=64, help="How many pictures.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture.")] = 0,
    style: Annotated[str | None, typer.Option(help="One of the model's styles.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 to 20; higher: more literal.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 to 4; lower: less varied.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="1 to 64 decoding steps.")] = None,
    model: Annotated[str | None, typer.Option(help="As in `tessera serve`.")] = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Draw pictures without a server."""
    from jobs.generate import default_model
    from jobs.generate import generate as run
    from pipeline.config import PromoteConfig

    model = model or default_model(home, PromoteConfig().model_name)
    paths = run(
        prompt, out, home=home, model=model, num_images=n, seed=seed,
        style=style, guidance_scale=guidance_scale, temperature=temperature, num_steps=num_steps,
    )  # fmt: skip
    names = [str(path) for path in paths]
    typer.echo(json.dumps(names) if as_json else "\n".join(names))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A model of the causal family, as in `serve`.")],
    out: Annotated[Path, typer.Option(help="The directory to make.")],
    home: Home = DEFAULT_HOME,
    debug: Debug = False,
) -> None:
    """Write a causal model as an ordinary Hugging Face directory.

    `AutoModelForCausalLM.from_pretrained` loads it; tessera.json in it says which of its ids are
    image tokens.
    """
    from jobs.export import export as run

    typer.echo(run(model, out, home=home))


@app.command()
def recipes(as_json: AsJson = False, debug: Debug = False) -> None:
    """The recipes that ship with Tessera."""
    from pipeline.config import load_recipe, recipe_names

    known = {name: load_recipe(name, environment={}).description for name in recipe_names()}
    if as_json:
        typer.echo(json.dumps(known))
        return
    width = max(map(len, known))
    for name, description in known.items():
        typer.echo(f"{name:<{width}} {description}")


@app.command()
def doctor(home: Home = DEFAULT_HOME, as_json: AsJson = False, debug: Debug = False) -> None:
    """What this machine has and lacks. Exits with 1 if something is missing."""
    from jobs.doctor import as_json as to_json
    from jobs.doctor import examine

    findings = examine(home)
    if as_json:
        typer.echo(json.dumps(to_json(findings)))
    else:
        for item in findings:
            mark = "ok  " if item.fine else "LACK"
            typer.echo(
                f"{mark} {item.what}: {item.found}" + ("" if item.fine else f" ({item.remedy})")
            )
    if not all(item.fine for item in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: one clear message for what a user can mend, a traceback with --debug alone."""
    set_environment()
    debug = "--debug" in sys.argv
    logging.basicConfig(
        level=logging.INFO if debug else logging.WARNING, format="%(name)s: %(message)s"
    )
    if not debug:
        warnings.simplefilter("ignore")
    try:
        app()
    except TesseraError as error:
        if debug:
            raise
        console.print(
            f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.print("interrupted; run the same command again to go on from here")
        raise
    except Exception as error:
        if debug:
            raise
        console.print(
            f"[bold red]unexpected error:[/bold red] {type(error).__name__}: "
            f"{escape(str(error))}\n"
            "Run the same command with --debug for the traceback.", highlight=False, soft_wrap=True,
        )  # fmt: skip
        sys.exit(2)


if __name__ == "__main__":
    main()
