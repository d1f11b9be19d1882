"""The `tessera` command: one function per command, each a thin layer over one job of jobs/.

Results go to standard output (as JSON with --json); progress, tables of times and errors go to
standard error. Docstrings and help texts here are what `--help` shows and what jobs/README.md
holds: after changing one, run `python -m jobs.cli_docs`.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from jobs.console import ConsoleReporter, output, time_table, trial_table
from jobs.data_cli import data_app
from jobs.entry import INTERRUPTED
from jobs.ingest_cli import ingest_app
from jobs.models_cli import models, promote, rollback
from jobs.options import DEFAULT_HOME, AsJson, Debug, Home, Overrides, RecipeName
from jobs.serving_cli import bench_app, key
from pipeline.errors import RecipeError, user_error
from pipeline.runtime import TERMINATED, exit_on_sigterm, set_environment, terminated

if TYPE_CHECKING:
    from pipeline.chain.workflow import Outcome
    from serve.settings import ServiceConfig

app = typer.Typer(
    name="tessera",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a text-to-image model on captioned pictures, judge it, and serve it as an "
    "autoscaled image API. Start with `tessera demo`.",
)
app.add_typer(ingest_app, name="ingest")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
console = Console(stderr=True, emoji=False)


@app.command()
def demo(
    home: Home = DEFAULT_HOME,
    recipe: Annotated[
        str, typer.Option(help="The recipe to run, shipped or a YAML file.")
    ] = "emoji-demo",
    serve: Annotated[
        bool, typer.Option(help="Serve the champion afterwards, until Ctrl-C.")
    ] = True,
    port: Annotated[
        int, typer.Option(help="Port of the server, which listens on this machine alone.")
    ] = 8000,
    debug: Debug = False,
) -> None:
    """Fine-tune the shipped base model, evaluate it before and after, promote, serve.

    Reads the emoji pictures and the base that ship with Tessera; writes everything below --home.
    Prints the path of a picture grid: before, after and real pictures, side by side. The decision
    with its reasons, the numbers before and after, and the report's path go to standard error.
    Takes about a quarter of an hour on 2 CPU cores. Interrupted, the same command goes on.
    """
    from pipeline.config import load_recipe

    loaded = load_recipe(recipe)  # a mistake is told before anything heavy is imported
    from jobs.demo import before_and_after, first_grid, served_model
    from jobs.retrain import retrain as run
    from serve.launch import check_port
    from serve.settings import resolve_service

    if serve:
        check_port("127.0.0.1", port)
    with ConsoleReporter(console) as reporter:
        outcome = run(loaded, home, reporter, debug=debug)
    console.print(time_table(outcome.seconds))
    _print_decision(outcome, loaded.promote.model_name)
    if outcome.page is not None:
        console.print(before_and_after(outcome))
        console.print(f"report: {outcome.page}", highlight=False, markup=False, soft_wrap=True)
    typer.echo(first_grid(loaded, outcome, home))
    if serve:
        model = served_model(loaded, outcome, home)
        if not model.startswith("models:"):
            console.print("no model won yet: the candidate is served for you to look at")
        _serve(model, resolve_service(loaded.serve), home, "127.0.0.1", port)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what `retrain` would do and why, without doing it.

    Prints each step: done or to do, what changed since it was last done, the inputs it is made
    from, and how much disk space it takes at most. Trains nothing and starts no Ray. The inputs are
    shown by the first digits of their digests; --json has them whole, and the resolved settings.
    """
    from pipeline.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from jobs.plan import as_json as to_json
    from jobs.plan import plan_table, preview

    found = preview(loaded, home)
    if as_json:
        typer.echo(json.dumps(to_json(found), ensure_ascii=False))
    else:
        output().print(plan_table(found))


@app.command()
def retrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a recipe's whole chain: preprocess, train, evaluate, promote what wins.

    Reads the recipe's shard sets; writes each step's results, MLflow's runs and the registered
    model below --home (or to the tracking server that MLFLOW_TRACKING_URI names). Steps that were
    done before with the same data and settings are skipped.

    Prints the evaluation as a Markdown table and the directory of the candidate's bundle; with
    --json one object: bundle, decision with reasons, registered version, metrics, seconds per step.
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
    from pipeline.evaluation.reports import markdown_table

    if outcome.reports:
        typer.echo(markdown_table(outcome.reports.values()))
    _print_decision(outcome, loaded.promote.model_name)
    if outcome.page is not None:
        console.print(f"report: {outcome.page}", highlight=False, markup=False, soft_wrap=True)
    typer.echo(outcome.bundle)


def _print_decision(outcome: Outcome, model_name: str) -> None:
    """Tell on standard error why this candidate was chosen, and why it was promoted or not."""
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
        typer.Option(
            min=0,
            max=1,
            help="The job fails if a larger share of the samples is quarantined; replaces the "
            "recipe's preprocess.max_bad_fraction.",
        ),
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Turn a recipe's shards into pixels: check, decode, square and resize every picture.

    Writes Parquet files below --home: pixels/ (uint8 pictures with captions, style, licence and
    split), quarantine/ (samples that cannot be used, with the reason) and report.json (counts).
    Prints the path of pixels/; with --json also the counts.
    """
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


_step_command(
    "pretrain",
    """Train a recipe's image tokenizer on its pictures alone, after preprocessing them.

    The tokenizer is the autoencoder between pictures and image tokens. Prints its directory, which
    tokenizer.source of another recipe takes. A recipe that takes a trained tokenizer trains none.
    """,
)
_step_command(
    "align",
    """Train a recipe's aligner on its pictures and captions, after preprocessing them.

    The aligner embeds pictures and captions in one space (contrastive, as CLIP); evaluation
    retrieves captions with it. Prints its directory, which aligner.source of another recipe takes.
    """,
)
_step_command(
    "train",
    """Train a recipe's generator, after all the steps that it needs.

    Prints the directory of its bundle, which `tessera serve` and `tessera generate` take. Of a
    recipe with several candidates all are trained and evaluated, and the best one's bundle is
    printed; why it is the best goes to standard error.
    """,
)
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Shard set to evaluate models on: a directory, URI, asset:NAME or home:NAME; may be "
        "repeated.",
    ),
]


@app.command()
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            help="A recipe (its name or a YAML file), or with --data a model: a bundle's "
            "directory, asset:base, models:/NAME@ALIAS or models:/NAME/VERSION."
        ),
    ],
    overrides: Overrides = None,
    data: Data = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Evaluate a recipe's generator, or any model on any captioned pictures.

    A recipe's generator is trained first if that was not done before, and measured beside the
    champion and the untuned base. Real pictures, blurred ones, the tokenizer's reconstructions and
    shuffled captions are measured beside every model, as floors. Prints the path of report.html, a
    self-contained page; report.json beside it holds the same. Nothing is promoted: `tessera
    retrain` does that.
    """
    from jobs.evaluate import is_model

    if not is_model(target):
        if data:
            raise RecipeError(
                f"--data is for models, and {target!r} is a recipe: write data.shards=[...] instead"
            )
        _run_step("evaluate", target, overrides or [], home, as_json, debug)
        return
    _evaluate_models({"candidate": target}, overrides, data, home, as_json, debug)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="A model, as `tessera evaluate` takes it.")],
    after: Annotated[str, typer.Argument(help="The model that is compared with it.")],
    overrides: Overrides = None,
    data: Data = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Evaluate two models on the same pictures and report what the second gains over the first.

    Prints the path of report.html: every metric of both with intervals, the gains resampled
    together, and their pictures side by side. Nothing is promoted.
    """
    models = {"before": before, "after": after}
    _evaluate_models(models, overrides, data, home, as_json, debug)


def _evaluate_models(
    models: dict[str, str],
    overrides: list[str] | None,
    data: list[str] | None,
    home: Path,
    as_json: bool,
    debug: bool,
) -> None:
    if not data:
        raise RecipeError(
            "say with --data which captioned pictures to evaluate on, for example "
            "--data asset:emoji"
        )
    from jobs.evaluate import evaluate_models, gain_table

    with ConsoleReporter(console) as reporter:
        found = evaluate_models(
            models, data, home, reporter, overrides=overrides or (), debug=debug
        )
    if as_json:
        report = json.loads(found.page.with_suffix(".json").read_text(encoding="utf-8"))
        typer.echo(json.dumps({**report, "page": str(found.page)}, ensure_ascii=False))
        return
    console.print(gain_table(found))
    typer.echo(found.page)


@app.command(name="tune")
def tune_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Copy the best recipe to this file, for `tessera train`.")
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Search better settings for a recipe's generator, over the section `tune`.

    Ray Tune trains trials with settings drawn from tune.space; ASHA stops the worse ones early by
    their validation loss. Writes the best trial's settings as a recipe and prints its path, for
    `tessera train`; the table of trials goes to standard error, with --json to the result.
    Interrupted, the same command goes on where it stopped.
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
            help="models:/NAME@ALIAS or models:/NAME/VERSION of the registry, a bundle's "
            "directory, or asset:base. Default: the champion; the shipped base while there is none."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe whose section `serve` says how many replicas there are; its champion is "
            "served if MODEL is left out."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with the service's settings: API keys, limits, safety, replicas. "
            "serve/README.md lists them."
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. One that other machines reach requires API keys."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    home: Home = DEFAULT_HOME,
    debug: Debug = False,
) -> None:
    """Serve a model with OpenAI's images API until Ctrl-C, on replicas of Ray Serve.

    Prints the address and a curl command to standard error. A model named by alias is followed:
    when the alias moves to another version, replicas change over without a restart.
    serve/README.md describes the API.
    """
    from pipeline.config import PromoteConfig, load_recipe
    from serve.settings import check_exposure, resolve_service

    loaded = load_recipe(recipe) if recipe else None
    service = resolve_service(loaded.serve if loaded else None, config)
    check_exposure(host, service)  # a mistake is told before anything heavy is imported
    from jobs.generate import default_model

    name = loaded.promote.model_name if loaded else PromoteConfig().model_name
    _serve(model or default_model(home, name), service, home, host, port)


def _serve(model: str, service: ServiceConfig, home: Path, host: str, port: int) -> None:
    """Serve `model` until Ctrl-C, telling on standard error where and how to ask for a picture."""
    from serve.launch import start_server

    server = start_server(model, service, home=str(home.absolute()), host=host, port=port)
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


app.command()(key)
app.command()(models)
app.command()(promote)
app.command()(rollback)


@app.command()
def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            help="What to draw, in English, Chinese or another language of the "
            "model's caption encoder."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="File to write, in the format of its ending: .png, .jpg or .webp. With --n above "
            "1 it shows all pictures in a row, and each is also written beside it: NAME-1.png, "
            "NAME-2.png, ..."
        ),
    ] = Path("picture.png"),
    n: Annotated[int, typer.Option(min=1, max=64, help="Number of pictures.")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Seed of the first picture; the following ones use seed + 1, seed + 2, ... "
            "Default: a random one, which the file's metadata tells.",
        ),
    ] = None,
    keep_prompt: Annotated[
        bool, typer.Option(help="Write the prompt into the files' metadata.")
    ] = True,
    style: Annotated[
        str | None,
        typer.Option(
            help="One of the styles that the model was trained on. Default: whichever it prefers."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance, 1 (off) to 20; higher follows the prompt more "
            "literally. Default: the model's."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sampling temperature, 0 (greedy) to 4; lower varies less. Default: the model's."
        ),
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="Decoding steps, 1 to 64. Default: the model's.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to draw with, named as for `tessera serve`. Default: the champion; the "
            "shipped base while there is none."
        ),
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Draw pictures of a prompt and write them as files, without a server.

    Prints the paths of the files written, --out first.
    """
    from jobs.generate import default_model
    from jobs.generate import generate as run
    from pipeline.config import PromoteConfig

    model = model or default_model(home, PromoteConfig().model_name)
    paths = run(
        prompt, out, home=home, model=model, num_images=n, seed=seed, keep_prompt=keep_prompt,
        style=style, guidance_scale=guidance_scale, temperature=temperature, num_steps=num_steps,
    )  # fmt: skip
    names = [str(path) for path in paths]
    typer.echo(json.dumps(names) if as_json else "\n".join(names))


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="Model of the causal family, named as for `tessera serve`.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to create; it must not exist.")],
    home: Home = DEFAULT_HOME,
    debug: Debug = False,
) -> None:
    """Write a causal model as an ordinary Hugging Face model directory.

    Prints the directory. `AutoModelForCausalLM.from_pretrained` loads it; tessera.json in it says
    which of its token ids are image tokens.
    """
    from jobs.export import export as run

    typer.echo(run(model, out, home=home))


@app.command()
def recipes(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the recipes that ship with Tessera: name and description, one per line.

    With --json one object of descriptions by name.
    """
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
    """Check whether this machine can run Tessera; exits with 1 if something is missing.

    Looks at Python, CPU cores, memory, disk space below --home, the device, Ray, MLflow, the
    caption encoder and the shipped assets. Prints one line per finding, with the remedy where one
    is needed.
    """
    from jobs.doctor import as_json as to_json
    from jobs.doctor import examine

    findings = examine(home)
    if as_json:
        typer.echo(json.dumps(to_json(findings)))
    else:
        for item in findings:
            mark = "ok  " if item.fine else "FAIL"
            typer.echo(
                f"{mark} {item.what}: {item.found}" + ("" if item.fine else f" ({item.remedy})")
            )
    if not all(item.fine for item in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line.

    An error is told in one message, with a traceback only if --debug is given. Exit status: 1 for
    an error that the user can mend, 2 for an unexpected one and for a mistake in the arguments,
    130 after Ctrl-C, 143 after SIGTERM.
    """
    set_environment()
    exit_on_sigterm()
    debug = "--debug" in sys.argv
    logging.basicConfig(
        level=logging.INFO if debug else logging.WARNING, format="%(name)s: %(message)s"
    )
    if not debug:
        warnings.simplefilter("ignore")
    try:
        app()
    except SystemExit as end:
        if terminated.is_set():
            end.code = TERMINATED
        if end.code in (INTERRUPTED, TERMINATED):
            console.print("interrupted; run the same command again to go on from here")
        raise
    except Exception as error:
        if debug:
            raise
        _print_error(error)
        sys.exit(1 if user_error(error) else 2)


def _print_error(error: Exception) -> None:
    """Tell in one message what went wrong, and how to learn more if a user cannot mend it."""
    if told := user_error(error):
        message = f"[bold red]error:[/bold red] {escape(str(told))}"
    else:
        message = (
            f"[bold red]unexpected error:[/bold red] {type(error).__name__}: "
            f"{escape(str(error))}\nRun the same command with --debug for the traceback."
        )
    console.print(message, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
