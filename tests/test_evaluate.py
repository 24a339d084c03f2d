"""The measured tables of docs/wantiny.md: what is put where, before any model is asked."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from comfyui_wanflow.wan_core.tiny import evaluate, world
from comfyui_wanflow.wan_core.tiny.perform import ROWS, SETTINGS, Studio
from comfyui_wanflow.wan_core.tiny.table import Row, sheet, table, write_section
from comfyui_wanflow.wan_core.tiny.tasks import TASKS, Encoders, samples, seen_drift
from comfyui_wanflow.wan_core.trajectory import trajectory


def test_scores_that_miss_their_target_are_bold():
    met = Row("model", "frames", {"first frame, dB": 25.04, "last frame, dB": 24.9, "followed": 0.9, "color": 0.89})
    assert (
        str(met) == "| model | frames | first frame 25.0 dB, last frame **24.9 dB**, followed 90% | **89%** |  |  |  |"
    )
    assert "| **0%** |" in str(Row("", "", {"shape": 0.0})) and "like none equal" in str(
        Row("", "", {"like none, dB": 120})
    )


def test_a_table_has_as_many_cells_in_each_line():
    lines = table(("model", "given", "met"), [Row("a", "b", {}), Row("c", "d", {"color": 1.0})]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


def test_a_section_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- end of one -->\n<!-- two -->\n<!-- end of two -->\nafter\n")
    write_section(page, "one", r"new \1")
    write_section(page, "two", "first")
    assert page.read_text() == (
        "before\n<!-- one -->\nnew \\1\n<!-- end of one -->\n<!-- two -->\nfirst\n<!-- end of two -->\nafter\n"
    )


def test_a_page_without_the_section_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("nothing\n")
    with pytest.raises(ValueError, match="<!-- one -->"):
        write_section(tmp_path / "page.md", "one", "new")


def test_cameras_are_called_after_where_they_turn():
    for name in TASKS["Control-Camera"].directions:
        scene = replace(world.Scene("red", "circle", "up", "blue"), drift=seen_drift(trajectory(name, 0.02, 17).poses))
        assert evaluate.heading(scene).title().replace(" ", "") == name


@pytest.mark.parametrize("name, kinds", [("T2V", 1), ("Control-Camera", 8), ("VACE", 4)])
def test_every_kind_of_sample_is_measured_as_often(name, kinds):
    found = evaluate.even(name, 24)
    assert [len(some) for some in found.values()] == [24 // kinds] * kinds


def test_rising_asks_for_every_step_of_a_column():
    assert evaluate.rising([[1, 1, 1, np.nan], [2, 3, 1, 2], [3, 2, 2, 3]]) == 0.25


class Mirror(Studio):
    """Shows in every pixel which sample it was asked for, by its caption."""

    def videos(self, captions, conditions=(), frames=17, changed=None):
        asked.append((len(captions), frames, self.settings.seed, [type(c).__name__ for c in conditions]))
        return np.stack([np.full((frames, 64, 64, 3), float(caption)) for caption in captions])


asked: list = []


@pytest.mark.parametrize("name", ["T2V", "Speed"])
def test_samples_of_one_kind_run_together_and_come_back_in_their_order(name):
    asked.clear()
    given = [replace(s, captions=(str(n),)) for n, s in enumerate(samples(TASKS[name], ROWS + 4, 0, held_out=True))]
    studio = Mirror(model=None, text_encoder=None, encoders=Encoders(vae=SimpleNamespace()))
    videos = studio.perform(TASKS[name], given)
    assert [video.flat[0] for video in videos] == list(range(ROWS + 4))
    assert [len(video) for video in videos] == [len(sample.clip) for sample in given]
    assert sum(count for count, *_ in asked) == ROWS + 4 and all(count <= ROWS for count, *_ in asked)
    assert len({(frames, seed) for _, frames, seed, _ in asked}) == len(asked)  # no two groups get the same noise
    assert studio.settings == SETTINGS
    assert all(kinds == (["SideBySide"] if name == "Speed" else []) for *_, kinds in asked)


def test_a_sheet_has_a_row_a_video():
    assert sheet([np.zeros((9, 8, 8, 3)), np.ones((17, 8, 8, 3))], columns=3).shape == (16, 24, 3)
