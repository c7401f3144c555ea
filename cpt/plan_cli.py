"""`cpt plan VERB`: from pilot runs to a share of general data. A verb's code is imported when it is called."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

plan_app = typer.Typer(
    help="Plan the mixture: pilot runs, fitted laws, a recommended share of general data with its interval.",
    no_args_is_help=True,
)

Csv = Annotated[
    Path, typer.Argument(metavar="OBSERVATIONS.csv", help="what `cpt plan pilots` wrote, or your own table")
]
LawName = Annotated[str, typer.Option("--law", help="auto: the one with the lowest held-out error; or a name that "
                                                    "`cpt plan compare` lists")]  # fmt: skip
Target = Annotated[str, typer.Option(help="whose loss: general, domain, or X of a column loss_X")]
Params = Annotated[
    float | None, typer.Option(help="parameters of the model, e.g. 8.0e9; default: the largest measured")
]
Tokens = Annotated[float | None, typer.Option(help="tokens of the full run, e.g. 20e9")]
Seed = Annotated[int, typer.Option(help="seed of random starts and bootstrap", min=0)]
Out = Annotated[Path, typer.Option("--out", help="file to write; a figure .png and .svg goes beside it")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@plan_app.command()
def pilots(
    config: Annotated[Path, typer.Argument(metavar="PILOTS.yaml", help="pilot file, see configs/runs/pilots_cpu.yaml")],
    slots: Annotated[int | None, typer.Option(help="pilots at a time; default: the file's", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the grid and its cost, train nothing")] = False,
    export_commands: Annotated[
        Path | None, typer.Option(help="write the jobs as a JSON list for a cluster's array job, train nothing")
    ] = None,
    only: Annotated[str | None, typer.Option(help="one run of the grid, as one job of many", hidden=True)] = None,
    as_json: Json = False,
) -> None:
    """Run a grid of small trainings and write observations.csv, resumable: cpt plan pilots
    configs/runs/pilots_cpu.yaml
    """
    from cpt.planner.pilot_facts import export_jobs, grid_facts, render_grid
    from cpt.planner.pilot_runs import run_only, run_pilots
    from cpt.planner.pilots import load_pilots
    from cpt.rundir import write_atomic

    grid = load_pilots(config)
    if only is not None:
        raise typer.Exit(run_only(grid, only))
    if export_commands is not None:
        jobs = export_jobs(grid, config)
        write_atomic(export_commands.absolute(), json.dumps(jobs, indent=1) + "\n")
        typer.echo(json.dumps(jobs, indent=1) if as_json else f"{export_commands}: {len(jobs)} jobs")
        return
    if dry_run:
        print_facts(grid_facts(grid), render_grid, as_json=as_json)
        return
    from rich.console import Console

    code = run_pilots(grid, slots=slots, console=Console(stderr=as_json))
    print_facts(grid_facts(grid), render_grid, as_json=as_json)
    if code:
        raise typer.Exit(code)


@plan_app.command()
def observe(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="finished run folders")],
    into: Annotated[Path, typer.Option(help="observations.csv to extend; rows of the same runs are replaced")],
    as_json: Json = False,
) -> None:
    """Add what finished runs measured to the observations, to fit again: cpt plan observe runs/full --into
    observations.csv
    """
    from cpt.planner.observe import append_observations, observe_runs

    rows = observe_runs(run_dirs)
    total = append_observations(into.absolute(), rows)
    facts = {"observations": str(into), "rows_added": len(rows), "rows": total, "runs": [str(run) for run in run_dirs]}
    typer.echo(
        json.dumps(facts, indent=1) if as_json else f"{into}: {len(rows)} rows of {len(run_dirs)} runs, {total} in all"
    )


@plan_app.command()
def fit(
    observations: Csv,
    law: LawName = "auto",
    target: Target = "domain",
    out: Out = Path("fit.json"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fit one law and say how far to trust it: cpt plan fit observations.csv --law dcpt --target domain"""
    _check_out(out, observations)
    from cpt.planner.fit_law import fit_facts
    from cpt.planner.observations import read_observations
    from cpt.planner.pictures import draw_fit
    from cpt.planner.tables import render_fit

    facts = fit_facts(read_observations(observations), law, target, seed=seed)
    _deliver(facts, out, render_fit, draw_fit, as_json=as_json)


@plan_app.command()
def compare(
    observations: Csv,
    out: Out = Path("compare.json"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Rank all laws by the error on what they were not fitted on: cpt plan compare observations.csv"""
    _check_out(out, observations)
    from cpt.planner.compare import compare_facts
    from cpt.planner.observations import read_observations
    from cpt.planner.pictures import draw_compare
    from cpt.planner.tables import render_compare

    table = read_observations(observations)
    with _progress() as say:
        facts = compare_facts(table, list(table.losses), seed=seed, progress=say)
    _deliver(facts, out, render_compare, draw_compare, as_json=as_json)


@plan_app.command()
def recommend(
    observations: Csv,
    params: Params = None,
    tokens: Tokens = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="highest rise of the general loss over the base, relative; default with --tokens: 0.03, 3%"),
    ] = None,
    domain_tokens: Annotated[
        float | None, typer.Option(help="tokens of the domain corpus; without --tokens it is used once")
    ] = None,
    general_tokens: Annotated[float | None, typer.Option(help="tokens of the general corpus, for a baseline")] = None,
    flops: Annotated[float | None, typer.Option(help="compute 6 N D, to choose size and tokens, e.g. 1e22")] = None,
    share_general: Annotated[float | None, typer.Option(help="share of general data, with --flops")] = None,
    available: Annotated[
        Path | None, typer.Option(help="JSON of source -> tokens, more than two sources: caps of 4 passes")
    ] = None,
    law: LawName = "auto",
    out: Out = Path("plan.json"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Recommend a share of general data; plan.json drives `cpt train RUN.yaml plan=plan.json`.

    Bounded forgetting: --params 8e9 --tokens 20e9 --tolerance 0.03

    Small domain corpus, used once: --params 8e9 --domain-tokens 5e9

    Size and tokens for a compute budget: --flops 1e22 --share-general 0.2
    """
    _check_out(out, observations)
    from cpt.planner.answers import Ask, recommend_facts
    from cpt.planner.observations import read_observations
    from cpt.planner.pictures import draw_recommend
    from cpt.planner.pledge import recommendation_of
    from cpt.planner.tables import render_recommend

    table = read_observations(observations)
    asked = Ask(
        params=params,
        tokens=tokens,
        tolerance=tolerance,
        domain_tokens=domain_tokens,
        general_tokens=general_tokens,
        flops=flops,
        share_general=share_general,
        available=available,
        law=law,
        seed=seed,
    )
    with _progress() as say:
        facts = recommend_facts(table, asked, progress=say)
    plan = recommendation_of(table, facts)
    facts = {**facts, "fingerprint": plan.fingerprint, "plan": str(out)}
    _deliver(facts, out, render_recommend, draw_recommend, as_json=as_json, content=plan.to_json())


@plan_app.command()
def critical(
    observations: Csv,
    tokens: Tokens = None,
    epsilon: Annotated[list[float] | None, typer.Option(help="allowed rise of the general loss in nats")] = None,
    more_epsilons: Annotated[
        list[float] | None, typer.Argument(metavar="[EPSILON]...", help="more of them, as in --epsilon 0 0.01 0.02")
    ] = None,
    params: Params = None,
    law: LawName = "auto",
    out: Out = Path("critical.json"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The smallest general share that forgets no more than epsilon (CMR): cpt plan critical observations.csv --tokens
    20e9 --epsilon 0.0 0.01 0.02 0.05
    """
    _check_out(out, observations)
    from cpt.planner.answers import Ask, critical_facts
    from cpt.planner.critical import render
    from cpt.planner.critical_figure import draw_critical
    from cpt.planner.observations import read_observations

    table = read_observations(observations)
    epsilons = tuple([*(epsilon or []), *(more_epsilons or [])]) or (0.0, 0.01, 0.02, 0.05)
    with _progress() as say:
        say("critical share: curves, then bootstrap refits")
        facts = critical_facts(table, epsilons, Ask(params=params, tokens=tokens, law=law, seed=seed))
    _deliver(facts, out, render, draw_critical, as_json=as_json)


@plan_app.command()
def predict(
    observations: Csv,
    target: Target = "domain",
    law: LawName = "auto",
    params: Params = None,
    tokens: Tokens = None,
    share_general: Annotated[float | None, typer.Option(help="share of general data, with two sources")] = None,
    weights: Annotated[Path | None, typer.Option(help="JSON of source -> weight, with more than two sources")] = None,
    out: Out = Path("predict.json"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Predict one loss with its interval: cpt plan predict observations.csv --target domain --tokens 20e9
    --share-general 0.25
    """
    _check_out(out, observations)
    from cpt.planner.answers import Ask, predicted_facts
    from cpt.planner.observations import read_observations
    from cpt.planner.pictures import draw_predict
    from cpt.planner.tables import render_predict

    table = read_observations(observations)
    asked = Ask(params=params, tokens=tokens, share_general=share_general, available=weights, law=law, seed=seed)
    with _progress() as say:
        facts = predicted_facts(table, target, asked, progress=say)
    _deliver(facts, out, render_predict, draw_predict, as_json=as_json)


@plan_app.command("predict-curve")
def predict_curve(
    curves: Annotated[list[Path], typer.Argument(metavar="CURVE.csv...", help="measured curves: step, lr, loss")],
    schedule: Annotated[Path, typer.Option(help="CSV with step and lr of the schedule to predict")],
    law: Annotated[
        Literal["mpl", "mpl_tied", "annealing"],
        typer.Option(help="multi-power law; the same with fewer free constants, for few curves; annealing law"),
    ] = "mpl_tied",
    out: Out = Path("curve.json"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Predict a whole loss curve under another learning-rate schedule: cpt plan predict-curve cosine.csv constant.csv
    --schedule wsd.csv
    """
    _check_out(out, schedule, *curves)
    from cpt.planner.curve_figure import draw_curve
    from cpt.planner.predict_curve import predict_curve as curve_facts
    from cpt.planner.predict_curve import render

    facts = curve_facts(curves, schedule, law, seed)
    _deliver(dict(facts), out, render, draw_curve, as_json=as_json)


@plan_app.command()
def show(plan: Annotated[Path, typer.Argument(metavar="PLAN.json")], as_json: Json = False) -> None:
    """Show a recommended plan, or the frozen plan of a run folder: cpt plan show plan.json"""
    from cpt.planner.show import render, show_facts

    print_facts(show_facts(plan), render, as_json=as_json)


@plan_app.command("fit-memory")
def fit_memory(
    config: Annotated[Path | None, typer.Argument(metavar="[RUN.yaml]", help="run file; or give --model")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="fields to change")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the job", min=1)] = 8,
    gpu_memory: Annotated[str, typer.Option(help="memory of one, e.g. 80GB or 79.6GiB")] = "80GB",
    model: Annotated[str | None, typer.Option(help="Hugging Face folder or hub name, without a run file")] = None,
    seq_len: Annotated[int, typer.Option(help="tokens in a row, with --model", min=1)] = 4096,
    as_json: Json = False,
) -> None:
    """Bytes per GPU for every ZeRO stage and micro-batch, and the best that fits: cpt plan fit-memory RUN.yaml --gpus 8
    --gpu-memory 80GB; cpt plan fit-memory --model meta-llama/Llama-3.1-8B --seq-len 8192 --gpus 8
    """
    from cpt.config import ConfigError, Problem, load_config
    from cpt.fit_memory import Device, fit_facts, parse_bytes, render_fit, run_config_for

    if (config is None) == (model is None):
        raise ConfigError(Problem("RUN.yaml", str(config), "give a run file or --model, one of the two"))
    device = Device(gpus, parse_bytes(gpu_memory))
    loaded = load_config(config, overrides or []) if config else run_config_for(str(model), seq_len=seq_len, gpus=gpus)
    facts = fit_facts(loaded, device)
    print_facts(facts, render_fit, as_json=as_json)
    if facts["choice"] is None:
        raise typer.Exit(2)


def print_facts(facts: Any, render: Callable[[Any], Any], *, as_json: bool) -> None:
    """JSON for programs, a table for people. Paths, names and texts of users look like markup: none is read in them."""
    if as_json:
        typer.echo(json.dumps(strict(facts), indent=1, allow_nan=False))
        return
    from rich.console import Console

    rendered = render(facts)  # a text is for copying, or to be read by another program: its lines stay whole
    Console(markup=False, emoji=False).print(rendered, soft_wrap=isinstance(rendered, str))


def _check_out(out: Path, *inputs: Path) -> None:
    """Raises ConfigError, before anything is computed, where ``out`` cannot be written or is one of the inputs."""
    from cpt.problems import ConfigError, Problem

    target = out.absolute()
    rule = ""
    if any(target == given.absolute() for given in inputs):
        rule = "is an input; it would be overwritten"
    elif target.suffix in (".png", ".svg"):
        rule = "is the name of the figure; the JSON goes beside it"
    elif target.is_dir():
        rule = "is a folder"
    elif any(parent.exists() and not parent.is_dir() for parent in target.parents):
        rule = "lies below a file"
    if rule:
        raise ConfigError(Problem("--out", str(out), rule, "give the name of a JSON file, such as plan.json"))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A status line on the terminal's error stream; nothing where it is no terminal."""
    from rich.console import Console

    with Console(stderr=True).status("planning") as status:
        yield lambda text: status.update(text)


def _deliver(
    facts: dict[str, Any],
    out: Path,
    render: Callable[[Any], Any],
    draw: Callable[[Any], Any],
    *,
    as_json: bool,
    content: str | None = None,
) -> None:
    """Write the JSON and its figure, then print: JSON for programs, a table for people."""
    from cpt.planner.pictures import save_figure
    from cpt.rundir import write_atomic

    plain = strict(facts)
    text = json.dumps(plain, indent=1, allow_nan=False)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out.absolute(), content or text + "\n")
    png, svg = save_figure(draw(plain), out.absolute().with_suffix(""))
    if as_json:
        typer.echo(text)
        return
    from rich.console import Console

    console = Console()
    console.print(render(plain))
    console.print(f"written: {out}, {png.name}, {svg.name}", style="dim")


def strict(value: Any) -> Any:
    """Facts as strict JSON holds them: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
