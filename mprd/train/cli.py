"""`python -m mprd.train`: train on a data set, or on drawn pedestrians when none is given."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from mprd.cli import PRESETS, Command, choose_launcher, run_command
from mprd.text import new_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def train(
    preset: Annotated[str | None, typer.Option(help=PRESETS)] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data set, or a CSV file,split,identity,camera.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a setting; repeatable.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings, laid over the preset.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default one below runs/.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    launcher: Annotated[
        str | None, typer.Option(help="ray (the default where it is installed), or local: in this process.")
    ] = None,
    num_workers: Annotated[int, typer.Option(help="Workers that train the one model, under ray.")] = 1,
    address: Annotated[str | None, typer.Option(help="Ray cluster to train on; by default this machine.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set train.seed=SEED.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes, a minute on any data: does it work?")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time went; in this process.")] = False,
) -> None:
    """Train MPRD: alternate CNN and GCN, evaluate, and leave a run folder."""
    settings = {"preset": preset, "data": data, "set_": set_, "config": config, "seed": seed, "smoke": smoke}
    on_ray = {"num_workers": num_workers, "address": address}
    run_command(lambda: launch(settings, out=out, resume=resume, launcher=launcher, on_ray=on_ray, profiled=profile))


def launch(
    settings: dict[str, Any],
    *,
    out: Path | None,
    resume: Path | None,
    launcher: str | None,
    on_ray: dict[str, Any] | None = None,
    profiled: bool = False,
) -> None:
    """Read the settings and train; `on_ray` holds num_workers and address."""
    from mprd.errors import Interrupted, UserError

    # what is timed is this process
    launcher = choose_launcher("local" if profiled and launcher is None else launcher)
    if launcher == "local" and on_ray not in (None, {"num_workers": 1, "address": None}):
        raise UserError("--num-workers and --address are Ray's: give --launcher ray")
    if launcher == "ray" and profiled:
        raise UserError("--profile times a run in this process: give --launcher local")
    # what may change in a run that goes on
    changed = settings["set_"] or []
    # 0 is a seed too
    others = [value for name, value in settings.items() if name != "set_" and value is not None and value is not False]
    is_alone = out is None and not others
    if resume is not None and not (is_alone and all(text.startswith("data.on_changed=") for text in changed)):
        raise UserError("--resume goes on with the settings of its run folder; give it alone")
    from mprd.config.loading import build_config, read_given
    from mprd.config.nested import layered
    from mprd.runs.folder import RunFolder
    from mprd.text import quoted
    from mprd.train.recipe import read_settings

    if resume is not None:
        folder = RunFolder(resume)
        folder.check_is_resumable()
        config = build_config(layered(folder.read_config().model_dump(), read_given(None, changed)))
    else:
        config = read_settings(settings)
        folder = RunFolder(out or default_out(config.data.dataset, config.pairs.labeller))
    try:
        if launcher == "ray":
            from mprd.train.ray_workers import run_on_ray

            run_on_ray(config, folder, resume=resume is not None, console=new_console(), **(on_ray or {}))
            return
        from mprd.train.local import run_local

        run_local(config, folder, resume=resume is not None, console=new_console(), profiled=profiled)
    except KeyboardInterrupt:
        advice = f"; go on with --resume {quoted(folder.path)}" if folder.config_file.is_file() else ""
        raise Interrupted(f"stopped at once{advice}") from None


def default_out(dataset: str, labeller: str) -> Path:
    """Name a new run folder after what runs and when."""
    return Path("runs") / f"{dataset}-{labeller}-{datetime.now():%Y%m%d-%H%M%S}"
