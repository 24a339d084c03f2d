"""A training as the user sees it while it runs: the bar, the curve and the videos on the node, and the button there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..wan_core.model import WanModel, WanVAE
from ..wan_core.sampling.loop import working_room
from ..wan_core.training.framing import WAN_RATE
from ..wan_core.training.logs import read_losses
from ..wan_core.training.loss_chart import curve
from ..wan_core.training.samples import Sample
from ..wan_core.video import save_video
from .host import host
from .wires import decode_with

SHOWN_EVERY = 0.5  # seconds
SAMPLES_SHOWN = 4
RECENT = 20  # steps whose loss the bar tells; a single one says little


class Finished(Exception):
    """The user wants the training to end here, and the graph to go on with what there is."""


class Watch:
    """Shows the training in `folder` on a node, and hears whether it shall end."""

    def __init__(self, node_id: str | None, folder: Path):
        self.node_id, self.folder = node_id, folder
        self.losses: list[float] = []
        self.total = self.first = 0  # steps in all, and those of earlier runs
        self.began = self.shown = 0.0
        self.progress = None
        self.samples: list[dict[str, Any]] = []
        host.finish_asked(node_id)  # of an earlier run

    # What the training calls

    def prepared(self, done: int, total: int) -> None:
        if self.progress is None or self.progress.total != total:
            self.progress = host.progress(total, self.node_id)
        self.tell({"text": f"Encoding clips: {done} of {total}"})
        self.progress.update(done)

    def step(self, done: int, total: int, loss: float) -> None:
        """Raises Finished, or the host's interrupt."""
        if not self.total:
            self.losses = read_losses(self.folder)[: done - 1]  # of the training that this one goes on with
            self.total, self.first, self.began = total, done - 1, time.monotonic()
            self.progress = host.progress(total, self.node_id)
        self.losses.append(loss)
        self.tell(self.state())
        recent = self.losses[-RECENT:]
        self.progress.update(done, note=f"loss {sum(recent) / len(recent):.4f}")
        if host.finish_asked(self.node_id):
            raise Finished

    def show_samples(self, sample: Sample, vae: WanVAE, every: int) -> None:
        """From now on `sample` makes this video every so many steps."""
        self.made, self.vae, self.every = sample, vae, every

    def sample(self, model: WanModel, step: int) -> None:
        """Make a video, save it and show it, where it is time to."""
        if step % self.every and step != self.total:
            return
        room = working_room(model, self.made.shape, self.made.settings, self.made.conditions)
        with host.attached(model, room):
            latents = self.made.latents(model, lambda *_: host.check_interrupted())
        frames = decode_with(self.vae)(latents)
        file = self.folder / "samples" / f"step-{step:06}.mp4"
        save_video(frames, file, WAN_RATE, quality=8)
        self.samples.append({"step": step, **address(file)})
        self.tell(self.state(), at_once=True)

    # What the page is told

    def state(self, ended: bool = False) -> dict[str, Any]:
        done, points = len(self.losses), curve(self.losses)
        facts = [f"step {done} of {self.total}"] if self.total else []
        if points:
            facts.append(f"loss {points[-1][2]:.4f}")
        if not ended and done > self.first:
            pace = (time.monotonic() - self.began) / (done - self.first)
            facts.append(f"{in_words(pace * (self.total - done))} left")
        return {
            "text": ", ".join(facts),
            "curve": points,
            "total": self.total,
            "samples": self.samples[-SAMPLES_SHOWN:],
            "running": not ended,
        }

    def tell(self, state: dict[str, Any], at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self.shown > SHOWN_EVERY:
            self.shown = now
            host.show(self.node_id, {"running": True, **state})


def in_words(seconds: float) -> str:
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"


def address(file: Path) -> dict[str, str]:
    """Of a file in the output folder, as ComfyUI's pages ask for it."""
    subfolder = file.parent.relative_to(host.output_dir().resolve()).as_posix()
    return {"filename": file.name, "subfolder": subfolder, "type": "output"}
