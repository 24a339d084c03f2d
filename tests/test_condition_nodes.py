"""The nodes Wan Camera, Wan VACE, Wan Motion Speed and Add Wan Module, as a user connects them."""

from contextlib import nullcontext

import pytest
import torch
from comfyui_wanflow.nodes import node_classes
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.wan_core.adapters.camera import CameraCondition
from comfyui_wanflow.wan_core.adapters.speed import SpeedCondition
from comfyui_wanflow.wan_core.adapters.vace import VACECondition
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.fit import FITS
from comfyui_wanflow.wan_core.models.vae import unnormalised

NODES = {node.GET_SCHEMA().node_id: node for node in node_classes()}
LATENT = {"samples": torch.zeros(1, 16, 3, 4, 6)}  # 9 frames of 48x32


class MeanVAE:
    """Latents are the mean colour of what lies under them."""

    def encoding_room(self, picture):
        return 0

    def attached(self, device=None):
        return nullcontext(self)

    def encode(self, pixels):
        first, rest = pixels[:, :, :1], pixels[:, :, 1:]
        grouped = torch.cat([first, rest.unflatten(2, (-1, 4)).mean(3)], dim=2).mean(1, keepdim=True)
        return torch.nn.functional.avg_pool3d(grouped, (1, 8, 8)).expand(-1, 16, -1, -1, -1)


def run(name, **inputs):
    return NODES[name].execute(**inputs).args


def vace(**inputs):
    settings = {"strength": 1.0, "fit": "cover", "extend": "hold", "mask_edges": "hard"}
    return run("WanFlowVACE", vae=MeanVAE(), latent=LATENT, **(settings | inputs))


# ---- camera -----------------------------------------------------------------------------------------------------


def test_camera_follows_the_latent_s_length():
    (first, second), pictures = run(
        "WanFlowCamera", latent=LATENT, direction="orbit left", speed=0.02, conditions=("before",)
    )
    assert first == "before" and isinstance(second, CameraCondition) and len(second.trajectory) == 9
    assert pictures.shape == (9, 32, 48, 3)


def test_camera_reads_a_trajectory_or_its_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "input_directory", tmp_path)
    line = "0 0.5 0.9 0.5 0.5 0 0 1 0 0 {} 0 1 0 0 0 0 1 0"
    text = "\n".join(line.format(-i) for i in range(3))  # the camera goes to the right
    (tmp_path / "way.txt").write_text("https://example.org/video\n" + text)
    for given in (text, " way.txt\n"):
        (condition,), _ = run("WanFlowCamera", latent=LATENT, direction="Left", speed=1.0, trajectory=given)
        assert condition.trajectory.poses[:, 0, 3].tolist() == [i / 4 for i in range(9)]
        assert "3 poses was spread over the 9 frames" in capsys.readouterr().err
    before = NODES["WanFlowCamera"].fingerprint_inputs(trajectory="way.txt", direction="Left")
    (tmp_path / "way.txt").write_text(text)  # another file of the same name is another input
    assert NODES["WanFlowCamera"].fingerprint_inputs(trajectory="way.txt", direction="Left") != before
    assert NODES["WanFlowCamera"].fingerprint_inputs(direction="Left") != before
    with pytest.raises(InputError, match="trajectory"):
        run("WanFlowCamera", latent=LATENT, direction="Left", speed=1.0, trajectory="to the left")


# ---- VACE -------------------------------------------------------------------------------------------------------


def test_vace_fits_everything_to_the_latent_and_says_so(capsys):
    video = torch.rand(5, 20, 30, 4)
    mask = torch.zeros(40, 60)
    mask[:, 30:] = 0.6
    (condition,), pictures = vace(video=video, mask=mask, strength=0.5)
    assert isinstance(condition, VACECondition) and condition.strength == 0.5
    assert condition.kept.shape == condition.changed.shape == (1, 16, 3, 4, 6)
    assert condition.mask.unique().tolist() == [0, 1]
    assert (condition.mask[..., :3] == 0).all() and (condition.mask[..., 3:] == 1).all()
    assert condition.references is None
    said = capsys.readouterr().err
    assert "video: The images of 30x20 were fitted to 48x32" in said and "mask: The images of 60x40" in said
    assert "5 frames are used, and the last of them held, to fill 9" in said
    assert pictures.shape == (9, 32, 3 * 48, 3)
    kept, changed, holes = pictures.split(48, dim=2)
    assert (kept[:, :, 24:] == 0.5).all() and (changed[:, :, :24] == 0.5).all()
    torch.testing.assert_close(kept[:, :, :24], (kept + changed - 0.5)[:, :, :24])
    assert (holes[:, :, 24:] == 1).all() and (holes[:, :, :24] == 0).all()
    (soft,), _ = vace(video=video, mask=mask, mask_edges="soft")
    assert soft.mask[..., 4:].unique().numpy() == pytest.approx(0.6)


def test_vace_shows_pictures_whole_on_white():
    tall = torch.zeros(2, 64, 32, 3)  # becomes 16 wide and 32 high, in the middle
    (condition,), _ = vace(reference_image=tall)
    colours = unnormalised(condition.references)[0, 0]
    assert condition.references.shape == (1, 16, 2, 4, 6)
    torch.testing.assert_close(colours[:, :, 2:4], torch.full((2, 4, 2), -1.0))
    torch.testing.assert_close(colours[:, :, [0, 1, 4, 5]], torch.full((2, 4, 4), 1.0))


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "neither a video nor a reference image"),
        ({"mask": torch.ones(9, 32, 48)}, "a mask but no video"),
        ({"video": torch.full((9, 32, 48, 3), 0.5)}, "grey everywhere"),
        ({"video": torch.rand(9, 32, 48, 3), "mask": torch.zeros(9, 32, 48)}, "black everywhere"),
    ],
)
def test_vace_says_what_is_hardly_meant(capsys, inputs, sentence):
    vace(**inputs)
    assert sentence in capsys.readouterr().err


def test_vace_puts_what_was_cut_out_on_white(capsys):
    cut_out = torch.zeros(1, 32, 48, 4)
    cut_out[:, :16, :, 3] = 1  # the upper half is black, the lower one transparent
    (condition,), _ = vace(reference_image=cut_out)
    colours = unnormalised(condition.references)[0, 0, 0]
    torch.testing.assert_close(colours, torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None].expand(-1, 6))
    assert "reference_image: What is transparent was made white." in capsys.readouterr().err


# What people connect, where 9 frames of 48x32 pixels are wanted: (frames, height, width, channels).
SHAPES = {
    "one picture": (1, 32, 48, 3), "transparent": (9, 32, 48, 4), "grey": (9, 32, 48, 1), "too many": (30, 32, 48, 3),
    "two": (2, 20, 20, 3), "upright": (9, 90, 20, 4), "tiny": (3, 1, 1, 1), "flat": (9, 1, 400, 3),
}  # fmt: skip
TAKERS = {
    "WanFlowImageToVideo": ("start_image", {}), "WanFlowControlVideo": ("control_video", {"extend": "loop"}),
    "WanFlowReferenceImage": ("image", {}), "WanFlowVACE": ("video", {"strength": 1.0, "extend": "hold"}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("node", TAKERS)
def test_every_picture_is_fitted(node, fit, shape, capsys):
    name, settings = TAKERS[node]
    images = torch.rand(SHAPES[shape], generator=torch.Generator().manual_seed(0))
    settings = {"vae": MeanVAE(), "latent": LATENT, "fit": fit, name: images} | settings
    if node == "WanFlowVACE":
        settings |= {"mask": images[..., 0], "reference_image": images, "mask_edges": "soft"}
    if node == "WanFlowImageToVideo" and len(images) > 9:
        with pytest.raises(InputError, match="30 [+] 0 frames, but the video only 9. Give fewer pictures"):
            run(node, **settings)
        return
    (condition,) = run(node, **settings)[0]
    for value in vars(condition).values():
        if isinstance(value, torch.Tensor):
            assert value.isfinite().all() and value.shape[-2:] == (4, 6)
    said = capsys.readouterr().err
    assert ("fitted to 48x32" in said) == (SHAPES[shape][1:3] != (32, 48))
    if node in ("WanFlowControlVideo", "WanFlowVACE"):
        assert ("to fill 9" in said or "the first 9 are used" in said) == (len(images) != 9)


@pytest.mark.parametrize("node", TAKERS)
def test_what_is_no_picture_is_refused(node):
    name, settings = TAKERS[node]
    settings = {"vae": MeanVAE(), "latent": LATENT, "fit": "cover", "mask_edges": "hard"} | settings
    settings = {k: v for k, v in settings.items() if k != "mask_edges" or node == "WanFlowVACE"}
    for shape in [(32, 48, 3), (9, 32, 48, 2), (0, 32, 48, 3), (1, 9, 32, 48, 3)]:
        with pytest.raises(InputError, match="The images have the shape .*Connect an IMAGE output"):
            run(node, **settings, **{name: torch.rand(shape)})


def test_vace_refuses_what_is_no_picture():
    with pytest.raises(InputError, match="The images have the shape"):
        vace(reference_image=torch.rand(32, 48, 3))
    with pytest.raises(InputError, match="fit is 'tile'"):
        vace(video=torch.rand(9, 10, 10, 3), fit="tile")
    with pytest.raises(InputError, match="mask_edges is 'round'"):
        vace(mask=torch.ones(9, 32, 48), mask_edges="round")


# ---- modules ----------------------------------------------------------------------------------------------------


def test_motion_speed():
    (conditions,) = run("WanFlowMotionSpeed", motion_bucket_id=70, conditions=("before",))
    assert conditions == ("before", SpeedCondition(70))


def test_modules_are_offered_by_name():
    options = NODES["WanFlowAddModule"].GET_NODE_INFO_V1()["input"]["required"]["module"][1]["options"]
    assert {"Wan2.1-VACE-1.3B", "Wan2.1-VACE-14B", "Wan2.1-1.3b-speedcontrol-v1"} <= set(options)
    assert "Wan2.1-T2V-1.3B" not in options
