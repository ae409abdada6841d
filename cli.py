"""The imagemill command: parse, make one call, print."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from jobs.progress import Status
    from storage.database import Database
    from storage.objects import Store
    from storage.settings import Settings

_POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Home:
    """What a command works on: settings, index and store."""

    settings: Settings
    db: Database
    store: Store


def main() -> None:
    """The console script. A user's mistake is one line and exit code 2; a failed run one line and exit code 1."""
    sys.exit(_run(cli, sys.argv[1:]))


def _run(command: click.Command, arguments: list[str]) -> int:
    from storage.errors import BadInput, ImagemillError, NotFound

    try:
        code = command.main(arguments, prog_name="imagemill", standalone_mode=False)
        return int(code or 0)
    except click.exceptions.Abort:
        return 130
    except KeyboardInterrupt:
        return 130
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "imagemill"
        text = " ".join(error.format_message().split()).rstrip(".")
        click.echo(f"imagemill: {text}; see: {path} --help", err=True)
        return error.exit_code
    except ImagemillError as error:
        from workers.logs import masked

        click.echo(f"imagemill: {masked(str(error))}", err=True)
        return 2 if isinstance(error, BadInput | NotFound) else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A disk that is full or a file that may not be touched, wherever it was met: nothing a traceback would explain.
        where = f": {error.filename!r}" if error.filename else ""
        click.echo(
            f"imagemill: {error.strerror or error}{where}; check the disk, the path and its permissions", err=True
        )
        return 1


def _home(*, check: bool = True) -> Home:
    from storage import migrate
    from storage.database import Database
    from storage.objects import open_store
    from storage.settings import load
    from workers.logs import configure

    settings = load()
    configure(settings.log_level)
    _make_home(settings)
    db = Database(settings.database, patience_s=8)
    if check:
        migrate.check(db, create=not settings.database_url)
    return Home(settings, db, open_store(settings.store, settings))


def _make_home(settings: Settings) -> None:
    from storage.errors import Misconfigured

    try:
        settings.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Misconfigured(
            f"cannot make the home folder {settings.home}: {error.strerror}; set IMAGEMILL_HOME"
        ) from None


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, sort_keys=True, default=str))


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts, and nothing else.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="imagemill")
def cli() -> None:
    """Run vision models over whole image datasets.

    No image is lost, none counted twice, and every label says where it came from.
    """


# ------------------------------------------------------------------------------------------------ annotate


def _job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command that computes a dataset takes."""
    options = (
        click.option("--param", "extra", multiple=True, metavar="NAME=VALUE", help="Any other parameter of the model."),
        click.option("--out", help="Also export the results to this folder or s3:// prefix, in the kind's own format."),
        click.option("--name", default="", help="A name for the job, for people."),
        click.option("--priority", type=int, default=0, show_default=True, help="Higher runs first."),
        click.option("--shard-size", type=int, help="Items in a shard; default 256, for images that are drawn 64."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu or gpu."),
        click.option("--batch", type=int, help="Items in one forward pass; measured, or 8 on a CPU and 32 on a GPU."),
        click.option("--precision", default="auto", show_default=True, help="auto, fp32, bf16 or fp16."),
        click.option(
            "--runtime",
            default="auto",
            show_default=True,
            help="auto, torch, onnx, openvino, tensorrt or inductor.",
        ),
        click.option(
            "--exact", is_flag=True, help="Torch in fp32, however long the job: --runtime torch --precision fp32."
        ),
        click.option("--force", is_flag=True, help="Compute every item again, fresh or not."),
        click.option("--prune-all", is_flag=True, help="Prune items gone from the dataset even if more than a fifth."),
        click.option(
            "--max-failures", type=float, default=0.2, show_default=True, help="Pause above this share of failures."
        ),
        click.option("--token", help="A repeated submit with the same token returns the same job."),
        click.option("--wait/--detach", default=True, help="Wait for the end, or only submit."),
        click.option("--quiet", is_flag=True, help="No progress bar."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts, and nothing else."),
    )
    for option in reversed(options):
        command = option(command)
    return click.option("--model", required=True, help="A weights file, or a name from: imagemill models.")(command)


def _params(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """The model's parameters among a command's options: those that were given, and every --param."""
    params = {name: options[name] for name in names if options[name] is not None}
    if params.get("classes"):
        params["classes"] = tuple(c.strip() for c in params["classes"].split(",") if c.strip())
    return {**params, **_named_values(options["extra"])}


@cli.command()
@click.argument("source")
@click.option("--conf", type=float, help="Keep boxes that score higher than this (0..1).")
@click.option("--iou", type=float, help="Of boxes that overlap more than this, keep the best (0..1).")
@click.option("--imgsz", type=int, help="Longer side of the network's input, in pixels.")
@click.option("--max-det", type=int, help="At most so many boxes an image.")
@click.option("--classes", help="Only these labels, with commas between.")
@_job_options
def annotate(source: str, **options: Any) -> int:
    """Find objects in every image of SOURCE: a folder, s3://bucket/prefix, or a manifest file."""
    params = _params(options, "conf", "iou", "imgsz", "max_det", "classes")
    return _submit_and_wait("detections", source, params, options)


# ------------------------------------------------------------------------------------------------ the other kinds


@cli.command()
@click.argument("source")
@click.option("--boxes-from", metavar="JOB", help="Mask the boxes that this job found in SOURCE, while it still runs.")
@click.option("--label", default="", help="Of those boxes only the ones with this label.")
@click.option("--min-score", type=float, default=0.0, help="Of those boxes only the ones that score so high.")
@click.option("--prompts", metavar="FILE", help="Boxes and points for each image: csv, jsonl or parquet with a key.")
@click.option("--conf", type=float, help="Keep objects that score higher than this (0..1).")
@click.option("--imgsz", type=int, help="Longer side of the network's input, in pixels.")
@click.option("--classes", help="Only these labels, with commas between.")
@_job_options
def mask(source: str, boxes_from: str | None, label: str, min_score: float, prompts: str | None, **options: Any) -> int:
    """Mask objects in every image of SOURCE: by prompts, by an earlier job's boxes, or everything there is."""
    from workers import submit

    if boxes_from and prompts:
        raise click.UsageError("--boxes-from and --prompts exclude each other: give one of them")
    if (label or min_score) and not boxes_from:
        raise click.UsageError("--label and --min-score choose among the boxes of --boxes-from, which is missing")
    home = _home()
    if boxes_from:
        source = submit.results_of(home.db, boxes_from, source, "boxes", label, min_score)
    elif prompts:
        source = submit.prompted(source, prompts)
    return _submit_and_wait("masks", source, _params(options, "conf", "imgsz", "classes"), options)


@cli.command()
@click.argument("source")
@click.option("--crops-from", metavar="JOB", help="Embed each box that this job found in SOURCE, while it still runs.")
@click.option("--label", default="", help="Of those boxes only the ones with this label.")
@click.option("--min-score", type=float, default=0.0, help="Of those boxes only the ones that score so high.")
@click.option("--pool", help="How a vector is made of the network's tokens: cls or mean.")
@click.option("--l2/--no-l2", default=None, help="Scale every vector to length 1.")
@click.option("--dtype", help="float32 or float16.")
@click.option("--imgsz", type=int, help="Side of the network's input, in pixels.")
@_job_options
def embed(source: str, crops_from: str | None, label: str, min_score: float, **options: Any) -> int:
    """Make a vector of every image of SOURCE, or of every box an earlier job found in it."""
    from workers import submit

    if (label or min_score) and not crops_from:
        raise click.UsageError("--label and --min-score choose among the boxes of --crops-from, which is missing")
    if crops_from:
        source = submit.results_of(_home().db, crops_from, source, "crops", label, min_score)
    return _submit_and_wait("embedding", source, _params(options, "pool", "l2", "dtype", "imgsz"), options)


@cli.command()
@click.argument("source")
@click.option("--topk", type=int, help="Labels of each image, the best ones.")
@click.option("--conf", type=float, help="Only labels that score higher than this (0..1).")
@click.option("--imgsz", type=int, help="Side of the network's input, in pixels.")
@_job_options
def classify(source: str, **options: Any) -> int:
    """Say what every image of SOURCE shows, by a classifier. By labelled examples: imagemill knn."""
    return _submit_and_wait("labels", source, _params(options, "topk", "conf", "imgsz"), options)


@cli.command()
@click.argument("source")
@click.option("--prompt", help="Draw this over every image of SOURCE, which is then a dataset of images.")
@click.option("-n", "images", type=int, default=1, show_default=True, help="Images for each prompt.")
@click.option("--negative-prompt", help="What should not be drawn.")
@click.option("--steps", type=int, help="Steps of denoising.")
@click.option("--guidance", type=float, help="How closely the prompt is followed.")
@click.option("--width", type=int, help="In pixels.")
@click.option("--height", type=int, help="In pixels.")
@click.option("--scheduler", help="Such as DPMSolverMultistep, DDIM or EulerDiscrete.")
@click.option("--seed", type=int, help="Of the job; each image's own follows from it and from its key.")
@click.option("--strength", type=float, help="How much of a reference image is drawn anew (0..1).")
@_job_options
def generate(source: str, prompt: str | None, images: int, **options: Any) -> int:
    """Draw images. SOURCE is a file of prompts (txt, csv, jsonl, parquet), or with --prompt a dataset of images."""
    from workers import submit

    if prompt is not None and not prompt.strip():
        raise click.UsageError("--prompt is empty: say what to draw over the images, or give a file of prompts")
    names = ("negative_prompt", "steps", "guidance", "width", "height", "scheduler", "seed", "strength")
    params = _params(options, *names)
    if prompt is None:
        return _submit_and_wait("image", submit.prompts(source, images), params, options)
    return _submit_and_wait("image", submit.variants(source, images), {**params, "prompt": prompt}, options)


@cli.command()
@click.argument("source")
@click.option("-n", "variants", type=int, default=1, show_default=True, help="Variants of each image.")
@click.option("--boxes-from", metavar="JOB", help="The boxes that this job found in SOURCE follow the geometry.")
@click.option("--seed", type=int, help="Of the job; each variant's own follows from it and from its key.")
@_job_options
def transform(source: str, variants: int, boxes_from: str | None, **options: Any) -> int:
    """Make new images of every image of SOURCE: resize, crop, filter, augment. --model names what is done."""
    from workers import submit

    if boxes_from:
        source = submit.results_of(_home().db, boxes_from, source, "boxes", "", 0.0)
    return _submit_and_wait("image", submit.variants(source, variants), _params(options, "seed"), options)


@cli.command()
@click.argument("pipeline", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--quiet", is_flag=True, help="No progress bar.")
@_json_option
def run(pipeline: Path, quiet: bool, as_json: bool) -> int:
    """Run a chain of jobs from a YAML file: boxes, then masks of them, then vectors of the crops, ..."""
    from workers import pipeline as chain

    home = _home()
    steps = chain.read(pipeline)
    with _Show(quiet=quiet or as_json) as show:
        specs = chain.resolve(home.db, home.store, home.settings, steps, show.download)
        statuses = chain.run(home.db, home.store, home.settings, steps, specs, show)
    if as_json:
        _print_json([_status_json(status) for status in statuses])
    for step, status in zip([] if as_json else steps, statuses, strict=False):
        counts = f"{status.results} results + {status.failures} failures of {status.planned}, {status.fresh} fresh"
        click.echo(f"{step.name}: job {status.id} {status.state}: {counts}")
    return 0 if all(status.state in ("done", "done with failures") for status in statuses) else 1


def _named_values(pairs: tuple[str, ...]) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise click.UsageError(f"--param expects NAME=VALUE, but got {pair!r}")
        try:
            values[name.replace("-", "_")] = json.loads(text)
        except json.JSONDecodeError:
            values[name.replace("-", "_")] = text
    return values


def _submit_and_wait(kind: str, source: str, params: dict[str, Any], options: dict[str, Any]) -> int:
    from storage import staging
    from workers import runjob, submit

    home = _home()
    show = _Show(quiet=options["quiet"] or options["as_json"])
    if options["out"]:
        staging.check_empty(_place(home, options["out"]))  # now, not when everything is computed
    spec = submit.resolve(
        home.db,
        home.store,
        home.settings,
        dataset=source,
        kind=kind,
        model=options["model"],
        params=params,
        on_download=show.download,
        **_how_run(options),
        **{name: options[name] for name in ("device", "batch", "shard_size")},
    )
    how = runjob.How(**{field.name: options[field.name] for field in dataclasses.fields(runjob.How)})
    with show:
        ran = runjob.run(home.db, home.store, home.settings, spec, how, show)
    return (
        _conclude(home, ran.status, options, ran.notes) if how.wait else _detached(home, ran.status, options, ran.notes)
    )


def _how_run(options: dict[str, Any]) -> dict[str, Any]:
    """The runtime and the precision that were asked for."""
    asked = {"runtime": str(options["runtime"]), "precision": str(options["precision"])}
    exact = {"runtime": "torch", "precision": "fp32"}
    for name, value in exact.items() if options["exact"] else ():
        if asked[name] not in ("auto", value):
            raise click.UsageError(f"--exact runs in {value}, but --{name} {asked[name]} was given; give one of them")
    return exact if options["exact"] else asked


def _detached(home: Home, status: Status, options: dict[str, Any], notes: list[str]) -> int:
    if options["as_json"]:
        _print_json({**_status_json(status), "notes": notes})
    else:
        _print_notes(notes)
        click.echo(f"job {status.id} {status.state}: {status.planned} planned, {status.fresh} fresh")
        if home.settings.embedded and not status.ended:
            click.echo("no worker runs by itself here; start some with: imagemill up")
    return 0


def _conclude(home: Home, status: Status, options: dict[str, Any], notes: list[str]) -> int:
    from storage import index

    labels = index.label_counts(home.db, status.recipe_id)
    sheet = _contact_sheet(home, status)
    if options["out"]:
        format_name = {"detections": "coco", "masks": "coco", "image": "images"}.get(status.kind, "parquet")
        _export(home, status.id, format_name, options["out"], {}, _Show(quiet=True))
    if options["as_json"]:
        extra = {
            "labels": [{"label": label, "images": images, "objects": objects} for label, images, objects in labels],
            "contact_sheet": sheet,
            "notes": notes,
        }
        _print_json({**_status_json(status), **extra})
    else:
        _print_notes(notes)
        _print_summary(home, status, labels, sheet)
    return 0 if status.state in ("done", "done with failures") else 1


def _contact_sheet(home: Home, status: Status) -> str | None:
    path = home.settings.home / "sheets" / f"recipe-{status.recipe_id}.jpg"
    if path.is_file() and not status.planned and not status.pruned:
        return str(path)
    if home.settings.untrusted:
        return None  # pictures nobody vouches for are not opened beside this process's credentials
    from storage.errors import ImagemillError

    try:
        from workers import contactsheet

        drawn = contactsheet.draw(home.db, home.store, home.settings, status.recipe_id, path)
    except (ImportError, ImagemillError):  # a job that is done stays done, drawn or not
        return None
    return str(drawn) if drawn else None


def _print_notes(notes: list[str]) -> None:
    """What planning had to remark; with --quiet too, which is about progress."""
    for note in notes:
        click.echo(f"note: {note}", err=True)


def _print_summary(home: Home, status: Status, labels: list[tuple[str, int, int]], sheet: str | None) -> None:
    from storage import index

    click.echo(f"{status.fresh} fresh, {status.planned} to do" + (f", {status.pruned} pruned" if status.pruned else ""))
    if status.planned:
        click.echo(
            f"job {status.id} {status.state}: {status.results} results + {status.failures} failures "
            f"= {status.results + status.failures} of {status.planned} planned, {status.rate:.1f} images/s"
        )
    if status.reason:
        click.echo(f"reason: {status.reason}")
    results, failures = index.totals(home.db, status.recipe_id)
    click.echo(f"the dataset now has {results} images with results, {failures} failures")
    for label, images, objects in labels[:20]:
        click.echo(f"  {label:<20} {images:>8} images {objects:>9} objects")
    if len(labels) > 20:
        click.echo(f"  ... and {len(labels) - 20} more labels")
    for stage, reason, count in index.reason_counts(home.db, status.recipe_id)[:10]:
        click.echo(f"  failed: {stage}/{reason:<20} {count:>8} images")
    if sheet:
        click.echo(f"contact sheet: {sheet}")


# ------------------------------------------------------------------------------------------------ questions


def _status_json(status: Status) -> dict[str, Any]:
    value = dataclasses.asdict(status)
    value["complete"] = status.ended and status.planned == status.results + status.failures
    return value


@cli.command()
@click.argument("job", default="latest")
@_json_option
def status(job: str, as_json: bool) -> None:
    """How far a job is: JOB is its number, its name, or 'latest'."""
    from jobs import progress

    home = _home()
    found = progress.status(home.db, progress.find_job(home.db, job))
    if as_json:
        _print_json(_status_json(found))
        return
    click.echo(f"job {found.id} {found.name}".rstrip() + f": {found.state}")
    if found.reason:
        click.echo(f"  reason     {found.reason}")
    click.echo(f"  dataset    {found.dataset}")
    click.echo(f"  model      {found.model} on {found.spec['queue']}")
    for device, how in found.choices.items():
        click.echo(f"  runs in    {how.runtime} {how.precision}, batch {how.batch} on {device} ({how.why})")
    twice = f", {found.duplicates} with the key of another" if found.duplicates else ""
    click.echo(f"  planned    {found.planned} images ({found.fresh} fresh, {found.pruned} pruned{twice})")
    click.echo(f"  committed  {found.results} results + {found.failures} failures")
    click.echo(f"  live       {found.live} finished, not committed yet, on {found.workers} workers")
    if found.doing:
        click.echo(f"  doing      {found.doing}")
    click.echo(f"  rate       {found.rate:.1f} images/s" + _time_left(found.time_left_s))
    shards = ", ".join(f"{count} {state}" for state, count in sorted(found.shards.items())) or "none"
    click.echo(f"  shards     {shards}; {found.crashes} crashes, {found.errors} errors")


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f", {hours}:{minutes:02}:{rest:02} left"


@cli.command()
@click.argument("job", default="latest")
@_json_option
def profile(job: str, as_json: bool) -> None:
    """Say where a job's time went: fetch, decode, prepare, device, post, answer, start, idle, gap, write."""
    from jobs import progress

    home = _home()
    found = progress.profile(home.db, progress.find_job(home.db, job))
    if as_json:
        _print_json({**dataclasses.asdict(found), "busy": found.busy})
        return
    busy = "nothing has run" if found.busy is None else f"the device was busy {found.busy:.1%} of its time"
    click.echo(f"{found.items} items; {busy}")
    for stage in ("fetch", "decode", "prepare", "device", "post", "answer", "start", "idle", "gap", "write"):
        spent = found.seconds.get(stage, 0.0)
        click.echo(f"  {stage:<8} {spent:>10.2f} s  {1000 * spent / max(1, found.items):>9.2f} ms an item")


@cli.command("jobs")
@click.option("--limit", type=int, default=20, show_default=True)
@click.option("--active", is_flag=True, help="Only those that have not ended.")
@_json_option
def list_jobs(limit: int, active: bool, as_json: bool) -> None:
    """List jobs, the newest first."""
    from jobs import progress

    rows = progress.jobs(_home().db, limit=limit, active=active)
    if as_json:
        _print_json([_status_json(row) for row in rows])
        return
    click.echo(f"{'job':>5}  {'state':<18} {'done':>10} / {'planned':<10} {'failed':>7}  {'model':<16} dataset")
    for row in rows:
        done = f"{row.results + row.failures:>10} / {row.planned:<10} {row.failures:>7}"
        click.echo(f"{row.id:>5}  {row.state:<18} {done}  {row.model:<16} {row.dataset}")


@cli.command()
@click.argument("job", default="latest")
@click.option("--quiet", is_flag=True, help="No progress bar: print the end only.")
def watch(job: str, quiet: bool) -> int:
    """Follow a job until it ends."""
    from jobs import progress
    from workers import runjob

    home = _home()
    with _Show(quiet=quiet) as show:
        job_id = progress.find_job(home.db, job)
        found = runjob.wait(home.db, job_id, show, start=runjob.starter(home.settings))
    click.echo(f"job {found.id} {found.state}: {found.results} results + {found.failures} failures of {found.planned}")
    return 0 if found.state in ("done", "done with failures") else 1


@cli.command()
@click.argument("job", default="latest")
@click.option("--label", help="Only images in which this label was found.")
@click.option("--min-score", type=float, help="Only where its highest score is at least this.")
@click.option("--limit", type=int, default=50, show_default=True, help="At most so many; 0 for all.")
@_json_option
def results(job: str, label: str | None, min_score: float | None, limit: int, as_json: bool) -> None:
    """List the results of a job's recipe as they are now, one image a line (JSON lines with --json)."""
    from jobs import progress
    from storage import index

    home = _home()
    found = progress.status(home.db, progress.find_job(home.db, job))
    _check_label(label, found.spec["labels"])
    rows = index.find(home.db, found.recipe_id, label=label, min_score=min_score, ok=True, limit=limit or None)
    for row in rows:
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(row)))
        else:
            counted = found.kind in ("detections", "masks", "labels")
            labels = ", ".join(f"{n} {name}" for name, n in row.labels.items()) or (
                "nothing" if counted else found.kind
            )
            score = "" if row.top_score is None else f"  {row.top_score:.2f}"
            click.echo(f"{row.key}  {labels}{score}")


def _check_label(label: str | None, known: list[str]) -> None:
    from storage.errors import BadInput
    from workers.models import nearest

    if label is not None and known and label not in known:
        raise BadInput(f"the model has no label {label!r}{nearest(label, known)}; it has: {', '.join(known[:12])}")


@cli.command()
@click.argument("key")
@click.argument("job", default="latest")
@click.option("-k", "count", type=int, default=10, show_default=True, help="So many.")
@_json_option
def similar(key: str, job: str, count: int, as_json: bool) -> None:
    """The images most like the image KEY, by the vectors of an embed JOB."""
    from jobs import progress
    from storage import vectors

    home = _home()
    recipe_id = progress.status(home.db, progress.find_job(home.db, job)).recipe_id
    vector = _vector(home, recipe_id, key)
    (found,) = vectors.nearest(home.db, home.store, recipe_id, vector, count)
    if as_json:
        _print_json([dataclasses.asdict(row) for row in found])
        return
    for row in found:
        click.echo(f"{row.score:.4f}  {row.key}")


def _vector(home: Home, recipe_id: int, key: str) -> Any:
    from storage import vectors
    from storage.errors import NotFound

    for keys, rows in vectors.matrix(home.db, home.store, recipe_id):
        if key in keys:
            return rows[keys.index(key)]
    raise NotFound(f"no embedded image has the key {key!r}; list them with: imagemill results")


@cli.command()
@click.argument("job")
@click.option("--examples", required=True, metavar="FILE", help="csv, jsonl or parquet with the columns key and label.")
@click.option("-k", "count", type=int, default=20, show_default=True, help="Examples that vote on each image.")
@_json_option
def knn(job: str, examples: str, count: int, as_json: bool) -> None:
    """Label every image of an embed JOB by the labelled examples most like it (JSON lines with --json)."""
    from jobs import progress, tabular
    from storage import vectors

    home = _home()
    recipe_id = progress.status(home.db, progress.find_job(home.db, job)).recipe_id
    given = tabular.pairs(examples, home.settings, "list of examples", "key", "label")
    for key, label, score in vectors.knn_labels(home.db, home.store, recipe_id, given, min(count, len(given))):
        click.echo(
            json.dumps({"key": key, "label": label, "score": score}) if as_json else f"{key}  {label}  {score:.2f}"
        )


@cli.command()
@click.argument("job", default="latest")
@click.option("--limit", type=int, default=50, show_default=True, help="At most so many; 0 for all.")
@_json_option
def failures(job: str, limit: int, as_json: bool) -> None:
    """List what failed and why, one image a line (JSON lines with --json)."""
    from jobs import progress
    from storage import index

    home = _home()
    found = progress.status(home.db, progress.find_job(home.db, job))
    if not as_json:
        for stage, reason, count in index.reason_counts(home.db, found.recipe_id):
            click.echo(f"{count:>8} images  {stage}/{reason}")
    for row in index.find(home.db, found.recipe_id, ok=False, limit=limit or None):
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(row)))
        else:
            click.echo(f"{row.key}  {row.stage}/{row.reason}: {row.message}")


@cli.command()
@click.argument("job", default="latest")
@click.option("--format", "format_name", required=True, help="coco, yolo, parquet, images or classmaps.")
@click.option("--to", "destination", required=True, help="A folder, or an s3:// prefix.")
@click.option("--option", "extra", multiple=True, metavar="NAME=VALUE", help="An option of the format.")
@click.option("--quiet", is_flag=True, help="No progress.")
@_json_option
def export(job: str, format_name: str, destination: str, extra: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Write the results of a job's recipe in a format other programs read."""
    from jobs import progress

    home = _home()
    options = _named_values(extra)
    with _Show(quiet=quiet or as_json) as show:
        report = _export(home, progress.find_job(home.db, job), format_name, destination, options, show)
    if as_json:
        _print_json({**dataclasses.asdict(report), "to": destination, "format": format_name})
    elif not quiet:
        results = report.items - report.failures
        click.echo(f"exported {results} results and {report.failures} failures to {destination}, {report.files} files")
        for note in report.notes:
            click.echo(f"note: {note}")


def _export(home: Home, job_id: int, format_name: str, destination: str, options: dict[str, Any], show: _Show) -> Any:
    from jobs import progress
    from storage import exporters

    found = progress.status(home.db, job_id)
    return exporters.export(
        home.db,
        home.store,
        found.recipe_id,
        format_name,
        _place(home, destination),
        job={**found.spec, "job": found.id, "name": found.name},
        options=options,
        settings=home.settings,
        on_progress=show.exporting,
    )


def _place(home: Home, destination: str) -> Store:
    """The store at a folder's path or a URL."""
    from storage.errors import BadInput, Misconfigured
    from storage.objects import open_store

    url = destination if "://" in destination else Path(destination).expanduser().absolute().as_uri()
    try:
        return open_store(url, home.settings)
    except Misconfigured as error:
        raise BadInput(str(error)) from None  # here it is the request, not the installation, that names the place


# ------------------------------------------------------------------------------------------------ verbs


def _verb(name: str, act: Callable[[Any, int], bool], done: str, text: str) -> None:
    @cli.command(name, help=text)
    @click.argument("job")
    def command(job: str) -> None:
        from jobs import progress

        home = _home()
        job_id = progress.find_job(home.db, job)
        click.echo(f"job {job_id} {done}" if act(home.db, job_id) else f"job {job_id} has ended already")


def _pause(db: Any, job_id: int) -> bool:
    from jobs import lifecycle

    return lifecycle.pause(db, job_id)


def _resume(db: Any, job_id: int) -> bool:
    from jobs import lifecycle

    return lifecycle.pause(db, job_id, paused=False)


def _cancel(db: Any, job_id: int) -> bool:
    from jobs import lifecycle

    return lifecycle.cancel(db, job_id)


_verb("pause", _pause, "is paused", "Let no more of a job be claimed; what is done stays.")
_verb("resume", _resume, "goes on", "Go on with a paused job.")
_verb("cancel", _cancel, "is cancelled", "Cancel what is not done of a job; what is done stays.")


@cli.command()
@click.argument("job")
@click.argument("number", type=int)
def priority(job: str, number: int) -> None:
    """Change a job's priority; higher runs first."""
    from jobs import lifecycle, progress

    home = _home()
    job_id = progress.find_job(home.db, job)
    done = lifecycle.set_priority(home.db, job_id, number)
    click.echo(f"job {job_id} has priority {number}" if done else f"job {job_id} has ended already")


@cli.command()
@click.argument("job")
@_json_option
def retry(job: str, as_json: bool) -> None:
    """Compute again what failed in a job's recipe, and nothing else. Workers do it; follow with: imagemill watch"""
    from jobs import lifecycle, plan, progress
    from storage.errors import Conflict

    home = _home()
    old = lifecycle.get(home.db, progress.find_job(home.db, job))
    new, fresh = lifecycle.submit(home.db, old.spec, name=f"retry of {old.id}", priority=old.priority, only="failures")
    if not fresh and new.only != "failures":
        raise Conflict(f"job {new.id} of this recipe has not ended yet; retry when it has")
    plan.plan(home.db, home.store, home.settings, new)
    found = progress.status(home.db, new.id)
    if as_json:
        _print_json(_status_json(found))
    else:
        click.echo(f"job {new.id}: {found.planned} failed items to compute again")


@cli.command()
@click.argument("job", default="latest")
@_json_option
def verify(job: str, as_json: bool) -> int:
    """Hold every row of a job against its object and checksum; exit code 1 when something does not agree."""
    from jobs import progress
    from jobs import verify as audit

    home = _home()
    job_id = progress.find_job(home.db, job)
    problems = list(audit.verify(home.db, home.store, job_id))
    if as_json:
        _print_json([dataclasses.asdict(problem) for problem in problems])
    for problem in [] if as_json else problems:
        click.echo(f"{problem.what:<15} shard {problem.shard_id}: {problem.detail}")
    if not as_json:
        found = progress.status(home.db, job_id)
        sums = f"planned {found.planned} = {found.results} results + {found.failures} failures"
        click.echo(
            f"job {job_id}: "
            + (f"{len(problems)} problems; imagemill repair {job_id}" if problems else f"{sums}; all agree")
        )
    return 1 if problems else 0


@cli.command()
@click.argument("job")
@_json_option
def repair(job: str, as_json: bool) -> None:
    """Put back lost rows from good objects; submit a job that computes again what lost its object."""
    from jobs import lifecycle, plan, progress
    from jobs import verify as audit

    home = _home()
    done = audit.repair(home.db, home.store, progress.find_job(home.db, job))
    if done.job_id is not None:
        plan.plan(home.db, home.store, home.settings, lifecycle.get(home.db, done.job_id))
    if as_json:
        _print_json(dataclasses.asdict(done))
        return
    click.echo(f"{done.rows} rows put back from their objects, {done.again} items to compute again")
    if done.job_id is not None:
        click.echo(f"job {done.job_id} computes them; follow with: imagemill watch {done.job_id}")
    elif done.again:
        click.echo("another job of this recipe has not ended yet; the next run of its command computes them")


@cli.command()
@click.option("--dry-run", is_flag=True, help="Say what would go, take nothing.")
@_json_option
def gc(dry_run: bool, as_json: bool) -> None:
    """Take away what nobody needs: objects that never committed, broken-off uploads, rows of pruned images."""
    from jobs.collect import collect

    home = _home()
    done = collect(home.db, home.store, home.settings, dry_run=dry_run)
    if as_json:
        _print_json(dataclasses.asdict(done))
        return
    word = "would go" if dry_run else "are gone"
    click.echo(
        f"{done.objects} objects ({done.bytes / 1e6:.1f} MB), {done.uploads} uploads and {done.rows} rows {word}"
    )


@cli.command()
@click.argument("worker_id")
def drain(worker_id: str) -> None:
    """Let a worker finish its batch, give back the rest and stop. WORKER_ID: as `imagemill workers` shows it."""
    from jobs import leases, progress
    from storage.errors import NotFound

    home = _home()
    found = [w.id for w in progress.workers(home.db) if w.id.startswith(worker_id)]
    if len(found) != 1:
        raise NotFound(f"{len(found)} live workers have an id that begins with {worker_id!r}; see: imagemill workers")
    leases.set_desired(home.db, found[0], leases.DRAIN)
    click.echo(f"worker {found[0][:8]} drains; it stops within its next heartbeats")


# ------------------------------------------------------------------------------------------------ processes


@cli.command()
@click.option("--device", default="auto", show_default=True, help="auto, cpu, gpu, or GPU numbers with commas between.")
def worker(device: str) -> int:
    """Run the workers of this machine, one process a device, until told to stop."""
    from workers import devices
    from workers.fleet import Fleet

    home = _home()
    if home.settings.embedded:
        raise click.UsageError(
            "no broker is set: set IMAGEMILL_BROKER_URL, or run broker and workers with: imagemill up"
        )
    from jobs import queue

    queue.check(home.settings)
    fleet = Fleet(home.settings, devices.find(device))
    fleet.start()
    _until_stopped(fleet.watch)
    fleet.drain()
    return 0


@cli.command()
@click.option("--device", default="auto", show_default=True, help="auto, cpu, gpu, or GPU numbers with commas between.")
def up(device: str) -> int:
    """Run everything on this machine in the foreground: broker, workers, reconciler."""
    from workers.local import Local

    home = _home()
    with Local(home.settings, device, quiet=False) as local:
        local.tend()
        if not local.owner:
            raise click.UsageError(f"another imagemill runs the workers of {home.settings.home}; stop it first")
        names = ", ".join(d.name for d in local.devices)
        click.echo(f"imagemill is up on {names}; Ctrl-C stops it", err=True)
        _until_stopped(local.tend)
    return 0


@cli.command()
def reconcile() -> int:
    """Run only the loop that makes lost things right again; any number of copies may run."""
    from jobs.reconcile import Reconciler
    from storage.database import Database

    home = _home()
    stop = threading.Event()
    loop = Reconciler(Database(home.settings.database, patience_s=5), home.settings)
    thread = threading.Thread(target=loop.run, args=(stop,), daemon=True)
    thread.start()
    _until_stopped(lambda: None)
    stop.set()
    thread.join(timeout=10)
    return 0


def _until_stopped(tend: Callable[[], None]) -> None:
    """Call `tend` a few times a second until SIGTERM or Ctrl-C."""
    stopped = threading.Event()

    def stop(number: int, frame: Any) -> None:
        # A second signal finds the default action: it ends this process at once, and the kernel its workers.
        signal.signal(number, signal.SIG_DFL)
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not stopped.wait(_POLL_S):
        tend()


@cli.command()
@click.option("--all", "everyone", is_flag=True, help="Also those that have stopped or were lost.")
@_json_option
def workers(everyone: bool, as_json: bool) -> None:
    """List the workers: device, model, state, heartbeat, images a second."""
    from jobs import progress

    rows = progress.workers(_home().db, live_only=not everyone)
    if as_json:
        _print_json([dataclasses.asdict(row) for row in rows])
        return
    click.echo(f"{'worker':<10} {'name':<28} {'state':<6} {'queue':<8} {'images/s':>9} {'beat':>7}  model")
    for row in rows:
        click.echo(
            f"{row.id[:8]:<10} {row.name:<28} {row.state:<6} {row.queue:<8} {row.rate:>9.1f} "
            f"{row.heartbeat_age_s:>6.1f}s  {row.doing or row.model}"
        )


@cli.group(invoke_without_command=True)
@_json_option
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """List the models known by name, and what each needs. A weights file of the same families works too."""
    if context.invoked_subcommand:
        return
    from workers import models as known

    lacking = {name: known.missing(name) for name in known.families()}
    rows = known.cards()
    if as_json:
        _print_json([_card_json(row, lacking[row.family]) for row in rows])
        return
    click.echo(f"{'name':<34} {'kind':<11} {'family':<24} {'memory':>7}  {'licence':<24} installed")
    for row in rows:
        need = "yes" if not lacking[row.family] else f"no: pip install 'imagemill[{known.extra(row.family)}]'"
        memory = f"{row.memory_gb:.1f} GB"
        click.echo(f"{row.name:<34} {row.kind:<11} {row.family:<24} {memory:>7}  {row.licence:<24} {need}")


def _card_json(card: Any, lacking: list[str]) -> dict[str, Any]:
    return {**dataclasses.asdict(card), "params": _defaults(card.params), "lacking": lacking}


@cli.command()
@click.argument("model")
@click.argument("source", default="")
@click.option("--kind", help="detections, masks, embedding or labels; needed where a model yields several.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or gpu.")
@click.option("--param", "extra", multiple=True, metavar="NAME=VALUE", help="A parameter of the model.")
@_json_option
def tune(model: str, source: str, kind: str | None, device: str, extra: tuple[str, ...], as_json: bool) -> None:
    """Measure how MODEL runs fastest on this machine, on pictures of SOURCE; later jobs run it so.

    SOURCE is a dataset; without one, that of the model's newest job. Only ways whose results agree with those of torch
    in fp32 are taken.
    """
    from workers import models as known
    from workers import submit, tunenow, tuning

    home = _home()
    wanted = kind or known.kind_of(model)
    with _Show(quiet=as_json) as show:
        spec = submit.resolve(
            home.db,
            home.store,
            home.settings,
            dataset=source or tunenow.dataset_of(home.db, Path(model).stem if "/" in model else model),
            kind=wanted,
            model=model,
            params=_named_values(extra),
            device=device,
            on_download=show.download,
        )
        tell = (lambda measured: None) if as_json else (lambda measured: click.echo(f"  {tuning.shown(measured)}"))
        started = time.monotonic()
        building = lambda: show.building(f"for {spec.model}", time.monotonic() - started)  # noqa: E731
        best, found = tunenow.tune(home.db, home.store, home.settings, spec, tell, building)
    if as_json:
        _print_json({"chosen": dataclasses.asdict(best), "measured": [dataclasses.asdict(one) for one in found]})
        return
    click.echo(f"{spec.model} runs in {best.runtime} {best.precision}, batch {best.batch} ({best.why})")


@models.command("check")
@click.argument("model")
@click.option("--kind", help="detections, masks, embedding, labels or image; needed where a model yields several.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--precision", default="fp32", show_default=True, help="fp32, bf16 or fp16.")
@click.option("--param", "extra", multiple=True, metavar="NAME=VALUE", help="A parameter of the model.")
@_json_option
def check_model(
    model: str, kind: str | None, device: str, precision: str, extra: tuple[str, ...], as_json: bool
) -> None:
    """Load a model, run one picture, print shapes and times."""
    from storage.settings import load
    from workers import check
    from workers import models as known

    with _Show(quiet=as_json) as show:
        found = check.check(
            load(),
            model,
            kind or known.kind_of(model),
            _named_values(extra),
            device=device,
            precision=precision,
            on_download=show.download,
        )
    if as_json:
        _print_json(dataclasses.asdict(found))
        return
    click.echo(f"{found.name} ({found.family}, {found.kind}) on {found.device} in {found.precision}")
    click.echo(f"  loaded in {found.load_s:.2f} s; one picture took {found.first_s:.3f} s, then {found.again_s:.3f} s")
    for name, value in found.result.items():
        click.echo(f"  {name:<12} {value}")


@cli.group()
def engines() -> None:
    """What runtimes have built from networks, kept in the store for the whole fleet."""


@engines.command("ls")
@_json_option
def list_engines(as_json: bool) -> None:
    """List the engines in the store, the newest first. Those of the runtime onnx serve openvino and tensorrt too."""
    from workers import enginelist

    rows = enginelist.rows(_home().store)
    if as_json:
        _print_json([dataclasses.asdict(row) for row in rows])
        return
    click.echo(f"{'name':<26} {'model':<20} {'runtime':<9} {'precision':<9} {'size':>10} {'age':>6}  digest")
    for row in rows:
        size, age = f"{row.size / 1e6:.1f} MB", _age(time.time() - row.modified)
        click.echo(
            f"{row.name:<26} {row.model:<20} {row.runtime:<9} {row.precision:<9} {size:>10} {age:>6}  {row.digest[:12]}"
        )


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


@engines.command("build")
@click.argument("model")
@click.option("--kind", help="detections, masks, embedding, labels or image; needed where a model yields several.")
@click.option("--runtime", required=True, help="onnx, openvino or tensorrt.")
@click.option("--precision", default="fp32", show_default=True, help="fp32, bf16 or fp16.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, gpu, or a GPU's number.")
@click.option("--param", "extra", multiple=True, metavar="NAME=VALUE", help="A parameter of the model.")
@click.option("--quiet", is_flag=True, help="No progress.")
@_json_option
def build_engines(model: str, kind: str | None, extra: tuple[str, ...], quiet: bool, as_json: bool, **how: Any) -> None:
    """Build the engines of MODEL for this machine's device into the store, before a job asks for them."""
    from workers import enginelist
    from workers import models as known

    home = _home()
    kind, params = kind or known.kind_of(model), _named_values(extra)
    with _Show(quiet=quiet or as_json) as show:
        found = enginelist.build(
            home.store,
            home.settings,
            model=model,
            kind=kind,
            params=params,
            on_download=show.download,
            on_progress=show.building,
            **how,
        )
    if as_json:
        _print_json([dataclasses.asdict(engine) for engine in found])
        return
    for engine in found:
        done = f"built in {engine.seconds:.1f} s" if engine.built else "was there already"
        click.echo(f"{engine.digest[:12]}  {engine.name}  {engine.size / 1e6:.1f} MB  {done}")


@engines.command("rm")
@click.argument("digests", nargs=-1, metavar="[DIGEST]...")
@click.option("--all", "everything", is_flag=True, help="All of them, and what was begun and never finished.")
@_json_option
def remove_engines(digests: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Remove engines from the store and this machine. DIGEST: its beginning, as `imagemill engines ls` shows it."""
    from workers import enginelist

    if everything == bool(digests):
        raise click.UsageError("give the beginnings of digests, as shown by: imagemill engines ls, or --all")
    home = _home()
    gone = enginelist.remove(home.store, home.settings, digests, everything=everything)
    if as_json:
        _print_json([dataclasses.asdict(row) for row in gone])
        return
    for row in gone:
        click.echo(f"removed {row.digest[:12]}  {row.name}")
    if not gone:
        click.echo("there were none")


def _defaults(params: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(params)}


@cli.command()
@_json_option
def doctor(as_json: bool) -> int:
    """Check database, store, broker, devices and libraries; say the remedy for what is wrong."""
    from workers.doctor import examine

    findings = examine()
    if as_json:
        _print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            click.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.what:<10} {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1


@cli.group()
def db() -> None:
    """The SQL index."""


@db.command()
def upgrade() -> None:
    """Bring the database to this version's tables. Safe to repeat."""
    from storage import migrate
    from storage.settings import masked

    home = _home(check=False)
    before, after = migrate.upgrade(home.db)
    where = masked(home.db.url)
    click.echo(f"{where} is at {after}" + (" already" if before == after else f" (was {before or 'empty'})"))


# ------------------------------------------------------------------------------------------------ progress


class _Show:
    """The progress bar, or on a pipe a line now and then, or nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._said_at = 0.0

    def __enter__(self) -> _Show:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("planning", total=None, text="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line for people."""
        if not self.quiet:
            click.echo(text, err=True)

    def download(self, name: str, done: int, total: int) -> None:
        """While weights are fetched."""
        share = f" of {total / 1e6:.1f}" if total else ""
        self._line(f"fetching {name}: {done / 1e6:.1f}{share} MB", None, None)

    def building(self, name: str, seconds: float) -> None:
        """While a runtime builds what it needs, when that takes longer than a moment."""
        if seconds >= 2:
            self._line(f"building {name}: {seconds:.0f} s", None, None)

    def planning(self, report: Any) -> None:
        """While the dataset is listed."""
        self._line(f"listed {report.listed}, {report.fresh} fresh, {report.planned} to do", None, None)

    def exporting(self, report: Any) -> None:
        """While results are written for other programs."""
        self._line(f"exported {report.items} items, {report.files} files", None, None)

    def status(self, status: Status) -> None:
        """While the job runs."""
        text = f"{status.done}/{status.planned} images  {status.rate:.1f}/s{_time_left(status.time_left_s)}"
        doing = f"  {status.doing}" * bool(status.doing)
        self._line(text + f"  {status.failures} failed{doing}", status.done, status.planned)

    def _line(self, text: str, done: int | None, total: int | None) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            name = "working" if total is None else "running"
            self._bar.update(self._task, description=name, text=text, completed=done or 0, total=total)
        elif time.monotonic() - self._said_at > 5:
            self._said_at = time.monotonic()
            click.echo(text, err=True)
