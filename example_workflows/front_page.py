"""Writes the table of models on the front pages, README.md and README_zh.md, from the catalog."""

from __future__ import annotations

import re
from pathlib import Path

from ..wan_core.loading import catalog

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(
    r"(?<=<!-- models: written by example_workflows/build.py -->\n).*?(?=<!-- end of models -->)", re.DOTALL
)
HEADS = {
    "README.md": "| model | takes, beside text | width x height x frames | steps | shift |",
    "README_zh.md": "| 模型 | 文本之外的输入 | 宽 x 高 x 帧数 | 步数 | shift |",
}
TAKES = {
    "image": ("first image", "首帧图像"),
    "last_image": ("last image", "尾帧图像"),
    "control": ("control video", "控制视频"),
    "reference": ("reference image", "参考图像"),
    "camera": ("camera", "镜头运动"),
    "vace": ("video, mask, reference images", "视频、遮罩、参考图像"),
    "speed": ("motion speed", "运动速度"),
}
JOINTS = (", ", "、")


def front_pages() -> dict[Path, str]:
    """Both pages with the tables as they should be."""
    pages = {}
    for language, name in enumerate(HEADS):
        text = (ROOT / name).read_text(encoding="utf-8")
        pages[ROOT / name] = TABLE.sub(lambda _, name=name, language=language: table(HEADS[name], language), text)
    return pages


def table(head: str, language: int) -> str:
    """language: 0 for English, 1 for Chinese."""
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for row in (catalog.BY_NAME["WanTiny-T2V"], *catalog.PUBLISHED):
        source, preset = row.files.get("motion_controller", row.files["dit"]), row.preset
        name = source.model_id or f"{row.name} {('(bundled)', '（内置）')[language]}"
        takes = JOINTS[language].join(TAKES[adapter][language] for adapter in row.adapters)
        size = f"{preset.width}x{preset.height}x{preset.num_frames}"
        lines.append(f"| {name} | {takes} | {size} | {preset.steps} | {preset.shift:g} |")
    return "\n".join(lines) + "\n"
