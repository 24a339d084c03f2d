"""Which published model runs on which card, at which size and at which cost: docs/cards.md is written from here.

`python -m comfyui_wanflow.wan_core.planning.cards` writes it anew; `tests/test_planning.py` compares.
"""

from __future__ import annotations

from pathlib import Path

from ..loading.catalog import PUBLISHED, Row
from ..loading.load import load_model
from ..loading.outline import published_layout, published_outline
from ..model import WanModel
from ..sampling.loop import Settings
from ..size import latent_shape
from .forecast import Outlook, outlook
from .machines import GIB, Machine, any_card
from .phases import Phase, sampling_phase

PAGE = Path(__file__).parents[2] / "docs" / "cards.md"
CARDS = (8, 12, 16, 24, 32, 48, 80)  # GB
SIZES = ((832, 480, 81), (1280, 720, 81))
RAM = 128  # GB, so that files stay in main memory
STEPS = 50

HEAD = """# Which model runs on which card

Written by `python -m comfyui_wanflow.wan_core.planning.cards` from what the planner says before a run: nothing here was
measured on a card. Every model runs on every card of the list; what does not fit travels while the card computes.

- **all**: all weights stay on the card.
- **40 %**: so much of the weights travels to the card in every pass, wholly hidden behind the computing.
- **40 %, +15 %**: so much travels, and the run takes so much longer than with all weights on the card.

**needs** is the peak with all weights on the card, with what driver and kernels take (0.5 GB); on smaller cards the
planner leaves another 0.5 GB free. Weights in bf16 (fp8 halves what travels), 50 steps with a negative prompt, one
prompt after the other, 81 frames; each size of card as fast as the slowest card of the planner's list that has as much
memory. Files in main memory: with less of it than the weights take, blocks come from the disk. The VAE works in tiles
where a picture does not fit as a whole. `wanflow plan` tells it for your card, your size and your workflow.
"""


class Sketch:
    """What the conditions of a model take (see adapters.Condition)."""

    def __init__(self, row: Row):
        self.in_front, self.embedded = int("reference" in row.adapters), int("camera" in row.adapters)


def page() -> str:
    parts = [HEAD]
    models = [(names, model_of(rows[0]), Sketch(rows[0])) for names, rows in groups()]
    for size in SIZES:
        width, height, frames = size
        cards = " | ".join(f"{card} GB" for card in CARDS)
        parts += [f"\n## {width}x{height}, {frames} frames\n", f"| model | needs | {cards} |"]
        parts.append("|---|---|" + "---|" * len(CARDS))
        for names, model, sketch in models:
            phase = sampling_phase(model, latent_shape(*size), Settings(0, STEPS), [sketch])
            needs = outlook(phase, any_card(1024 * GIB)).vram / GIB
            cells = [cell(phase, machine(card)) for card in CARDS]
            parts.append(f"| {names} | {needs:.1f} GB | {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def groups() -> list[tuple[str, list[Row]]]:
    """Published models of the same shape together, with their names."""
    found: dict[tuple, list[Row]] = {}
    for row in PUBLISHED:
        found.setdefault((published_layout(row), "vace" in row.adapters), []).append(row)
    return [(", ".join(row.name.replace("Wan2.1-", "") for row in rows), rows) for rows in found.values()]


def model_of(row: Row) -> WanModel:
    return load_model(published_outline(row, "dit"), "bf16", device="cuda")


def machine(card: int) -> Machine:
    return any_card(card * GIB).with_sizes(ram=RAM * GIB)


def cell(phase: Phase, card: Machine) -> str:
    found = outlook(phase, card)
    if not found.fits:
        return "no"
    if not found.streamed:
        return "all"
    share = found.streamed / (found.streamed + found.resident)
    return f"{share:.0%}".replace("%", " %") + cost(found)


def cost(found: Outlook) -> str:
    slower = found.transfer_seconds / found.compute_seconds - 1
    return f", +{slower:.0%}".replace("%", " %") if slower > 0.005 else ""


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
