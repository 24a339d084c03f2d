"""The `wanflow` command. Results go to stdout, all else to stderr; torch is imported only when nodes are needed."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...wan_core.errors import FileError, Lost, WanError
from ..host.standalone import Interrupted, host
from . import together
from .convert import add_convert, convert
from .models import add_models
from .plan import add_plan
from .train import add_train, add_validate, train, validate
from .validate import WorkflowError, describe, nearest
from .workflows import add_workflow, apply_settings, read_workflow

OK, ERROR, INVALID, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 for an error, 2 for an invalid workflow, 130 after ctrl-C."""
    options = parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return options.command(options)
    except WorkflowError as error:
        complain("This cannot run:", *(f"  - {problem}" for problem in error.problems))
        return INVALID
    except Lost:
        return ERROR
    except WanError as error:
        complain(str(error))
        return ERROR
    except (Interrupted, KeyboardInterrupt):
        complain("Stopped.")
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="wanflow", description="Wan 2.1 video models without ComfyUI.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a workflow", description="Run a workflow exported with "
                              "ComfyUI's Workflow > Export (API). Prints the path of each file it saves.")
    add_workflow(run)
    run.add_argument("--tiny", action="store_true", help="run the workflow's twin in the toy world, which shows in "
                     "seconds whether the graph works: the same nodes with WanTiny models, 64x64 pixels, toy pictures "
                     "and a caption of them. The video that it saves opens in ComfyUI as this twin")
    run.add_argument("--models-dir", type=folder, metavar="FOLDER", help="where the model folders are (./models)")
    run.add_argument("--input-dir", type=folder, metavar="FOLDER", help="where images and videos are read (./input)")
    run.add_argument("--output-dir", type=Path, metavar="FOLDER", help="where results go (./output)")
    run.add_argument("--quiet", action="store_true", help="show nothing but the paths and errors")
    run.add_argument("--processes", type=int, default=1, metavar="N",
                     help="sample in N processes together, each with a graphics card of its own")
    run.add_argument("--share", choices=["auto", "prompts", "tokens"], default="auto",
                     help="what they share: the prompts (fastest), the video's tokens (least memory), or auto: both")
    run.set_defaults(command=run_command)

    nodes = commands.add_parser("nodes", help="list the nodes, or show one with its inputs")
    nodes.add_argument("node", nargs="?", help="a node's name, such as WanFlowSampler")
    nodes.set_defaults(command=nodes_command)

    inspect = commands.add_parser("inspect", help="tell what a model file is, or how a video was made")
    inspect.add_argument("files", nargs="+", help="a checkpoint, all parts of one, a folder, a LoRA, a video or a "
                         "picture: a path, or a name in the model, input or output folder")
    inspect.add_argument("--models-dir", type=folder, metavar="FOLDER", help="where the model folders are (./models)")
    inspect.set_defaults(command=inspect_command)

    add_convert(commands).set_defaults(command=convert_command)
    add_models(commands)
    add_plan(commands)

    add_train(commands).set_defaults(command=train_command)
    add_validate(commands).set_defaults(command=validate_command)
    return top


def folder(text: str) -> Path:
    """The type of an argument that names a folder to read from."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return Path(text)


def check_writable(output: Path) -> None:
    """Raises FileError if results cannot be saved in the folder: better now than after hours of sampling."""
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        problem = "cannot be written" if there.is_dir() else "is not a folder"
        raise FileError(f"Results cannot be saved in {output}: {there} {problem}. Name another --output-dir.")


def run_command(options: argparse.Namespace) -> int:
    if options.processes > 1 and not together.is_part():
        return together.launch(together.wanflow(options.arguments), options.processes)
    if together.is_part():
        join_team(options)
    host.models_dir = options.models_dir or host.models_dir
    host.input_directory = options.input_dir or host.input_directory
    host.output_directory = options.output_dir or host.output_directory
    host.quiet = options.quiet
    workflow = read_workflow(options.workflow)
    from .runner import NodeError

    runner = all_nodes_runner()
    if options.tiny:
        from .twin import twin

        workflow = twin(workflow)
    apply_settings(workflow, options.settings, runner.infos())
    check_writable(host.output_directory)
    stop_on_interrupt()
    try:
        files = runner.run(workflow).files
    except NodeError as error:
        if isinstance(error.__cause__, Lost):
            return ERROR
        if not isinstance(error.__cause__, WanError):  # not foreseen, so whoever mends it needs to know where
            complain("".join(traceback.format_exception(error.__cause__)).rstrip())
        complain(str(error))
        return ERROR
    for path in files:
        print(path, flush=True)
    if host.team:
        host.team.leave()
    return OK


def join_team(options: argparse.Namespace) -> None:
    """Find the other processes of this run. Only the first of them says and saves anything."""
    from ...wan_core.parallel.team import join

    host.team = join(options.share)
    options.quiet |= not host.team.leads


def nodes_command(options: argparse.Namespace) -> int:
    infos = all_nodes_runner().infos()
    if options.node is None:
        width = max(map(len, infos))
        for name, info in infos.items():
            print(f"{name:{width}}  {info['display_name']}")
        return OK
    if options.node not in infos:
        complain(f"There is no node {options.node!r}{nearest(options.node, infos)}. `wanflow nodes` lists all of them.")
        return ERROR
    print("\n".join(node_page(infos[options.node])))
    return OK


def inspect_command(options: argparse.Namespace) -> int:
    from ...wan_core.loading.inspect import inspect
    from ..report import named_files

    host.models_dir = options.models_dir or host.models_dir
    print(inspect(named_files("\n".join(options.files))))
    return OK


def convert_command(options: argparse.Namespace) -> int:
    return files_command(convert, options)


def train_command(options: argparse.Namespace) -> int:
    if options.processes > 1 and not together.is_part():
        return together.launch(together.wanflow(options.arguments), options.processes)
    return files_command(train, options)


def validate_command(options: argparse.Namespace) -> int:
    return files_command(validate, options)


def files_command(make: Callable[[argparse.Namespace], Iterable[Path]], options: argparse.Namespace) -> int:
    """Tell the files that it makes."""
    stop_on_interrupt()
    for path in make(options):
        print(path, flush=True)
    return OK


def all_nodes_runner() -> Any:
    """A runner that knows our nodes and the stand-ins."""
    from .. import node_classes
    from . import core_nodes
    from .runner import Runner

    return Runner([*node_classes(), *core_nodes.NODES], host)


def node_page(info: dict[str, Any]) -> list[str]:
    """A node's inputs and outputs, as lines."""
    lines = [f"{info['name']}: {info['display_name']} ({info['category']})", info["description"], ""]
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            default = f", default {spec[1]['default']!r}" if "default" in spec[1] else ""
            mark = "" if group == "required" else ", optional"
            lines.append(f"  {name}: {describe(spec)}{default}{mark}. {spec[1].get('tooltip', '')}".rstrip())
    lines += [f"  -> {name}: {kind}" for name, kind in zip(info["output_name"], info["output"], strict=True)]
    return lines


def stop_on_interrupt() -> None:
    """The first ctrl-C stops at the next step, where all is in order; the second at once."""

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        host.interrupted = True
        if together.is_first():  # print is not safe here
            os.write(2, b"\nStopping after this step; press ctrl-C again to stop at once.\n")

    signal.signal(signal.SIGINT, handle)


def complain(*lines: str) -> None:
    """On stderr. Of the processes that sample together, in which the same goes wrong, the first one complains."""
    if host.team is None or host.team.speaks:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
