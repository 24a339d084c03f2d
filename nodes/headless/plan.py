"""`wanflow plan`: what a workflow will need and take, before a weight is read or a model downloaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...wan_core.errors import InputError
from ..host.standalone import host
from .workflows import add_workflow, apply_settings, read_workflow


def add_plan(commands: Any) -> argparse.ArgumentParser:
    plan = commands.add_parser(
        "plan",
        help="tell what a workflow needs of the card, of main memory and of the disk",
        description="Tell phase by phase how much memory a workflow takes, which weights stay on the card and which "
        "travel, and whether that costs time. Nothing is computed, no weight is read, nothing downloaded: of models "
        "that are not on this machine the published sizes are known.",
    )
    add_workflow(plan)
    plan.add_argument("--card", metavar="NAME", help="another graphics card than this machine's, such as 'RTX 4090'")
    plan.add_argument("--vram", type=float, metavar="GB", help="memory of the card; 0: no card")
    plan.add_argument("--ram", type=float, metavar="GB", help="main memory")
    plan.add_argument("--chart", type=Path, metavar="FILE.png", help="save the chart as a picture")
    plan.add_argument("--models-dir", type=Path, metavar="FOLDER", help="where the model folders are (./models)")
    plan.set_defaults(command=plan_command)
    return plan


def plan_command(options: argparse.Namespace) -> int:
    host.models_dir = options.models_dir or host.models_dir
    workflow = read_workflow(options.workflow)
    from ...wan_core.planning.chart import draw
    from ...wan_core.planning.report import page
    from .rehearsal import Rehearsal

    rehearsal = Rehearsal(machine_of(options.card, options.vram, options.ram))
    apply_settings(workflow, options.settings, rehearsal.runner.infos())
    found = rehearsal.run(workflow)
    print(page(found, Path(options.workflow).name.removesuffix(".json")))
    if options.chart:
        draw(found).save(options.chart)
        print(options.chart)
    return 0


def machine_of(card: str | None, vram: float | None, ram: float | None) -> Any:
    """The machine that is meant; sizes in GB, None: as it is."""
    from ...wan_core.planning import machines
    from ...wan_core.planning.here import main_memory, this_machine

    for name, value in (("--vram", vram), ("--ram", ram)):
        if value is not None and value < 0:
            raise InputError(f"{name} is {value:g}. Enter how many GB there are, such as 16.")
    sizes = {
        name: int(value * machines.GIB) for name, value in (("vram", vram), ("ram", ram)) if value is not None
    }
    if vram == 0:
        return this_machine("cpu").with_sizes(ram=sizes.get("ram"))
    if card:
        return machines.card_like(card).with_sizes(**sizes)
    if vram is not None:
        return machines.any_card(sizes["vram"]).with_sizes(ram=sizes.get("ram", main_memory()))
    return this_machine().with_sizes(**sizes)
