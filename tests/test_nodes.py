"""The nodes' face: ids and inputs are frozen once released, and explained in two languages."""

import asyncio
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.nodes import comfy_entrypoint, node_classes
from comfyui_wanflow.nodes.wires import conditioning_text, latent_samples, number_pair, refuse_noise_mask
from comfyui_wanflow.wan_core.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
NODES = {node.GET_SCHEMA().node_id: node for node in node_classes()}
INFOS = {name: node.GET_NODE_INFO_V1() for name, node in NODES.items()}

# id -> required inputs, optional inputs, output names. Saved workflows store widget values by position: append only.
RELEASED = {
    "WanFlowLoadModel": ("model weight_dtype attention", "files offload library fp8_matmul", "model"),
    "WanFlowLoadTextEncoder": ("text_encoder weight_dtype", "files offload library tokenizer", "text_encoder"),
    "WanFlowLoadVAE": ("vae weight_dtype", "files library offload", "vae"),
    "WanFlowLoadImageEncoder": ("image_encoder weight_dtype", "files library offload", "image_encoder"),
    "WanFlowImageToVideo": ("vae latent fit", "start_image end_image image_encoder conditions", "conditions"),
    "WanFlowControlVideo": ("vae latent control_video fit extend", "conditions", "conditions"),
    "WanFlowReferenceImage": ("vae latent image fit", "image_encoder conditions", "conditions"),
    "WanFlowCamera": ("latent direction speed", "origin trajectory conditions", "conditions preview"),
    "WanFlowVACE": (
        "vae latent strength fit extend mask_edges",
        "video mask reference_image conditions",
        "conditions preview",
    ),
    "WanFlowAddModule": ("model module", "files library", "model"),
    "WanFlowApplyLora": ("model lora_name strength", "lora part", "model report"),
    "WanFlowTeaCache": ("model threshold preset coefficients start end device", "", "model"),
    "WanFlowEasyCache": ("model threshold start end", "", "model"),
    "WanFlowMagCache": ("model threshold max_skip curve start end device", "", "model"),
    "WanFlowSlidingWindow": ("model window_size window_stride", "schedule fuse_method freenoise", "model"),
    "WanFlowRIFLEx": ("model frequency", "", "model"),
    "WanFlowCompile": ("model mode dynamic", "", "model"),
    "WanFlowOffload": ("rest_on rest_dtype vram_limit_gb vram_buffer_gb num_persistent_params", "", "offload"),
    "WanFlowInspect": ("file", "", "report"),
    "WanFlowLibrary": ("local_model_path skip_download redirect_common_files", "", "library"),
    "WanFlowPlan": (
        "model latent steps cfg cfg_merge card vram_gb ram_gb",
        "conditions text_encoder image_encoder vae",
        "report chart",
    ),
    "WanFlowMotionSpeed": ("motion_bucket_id", "conditions", "conditions"),
    "WanFlowEmptyLatent": ("width height num_frames batch_size", "", "latent"),
    "WanFlowFewSteps": ("preset", "", "steps cfg shift scheduler timesteps"),
    "WanFlowTextEncode": ("text_encoder text", "", "conditioning report"),
    "WanFlowSampler": (
        "model positive latent seed rand_device steps cfg cfg_merge shift scheduler denoise",
        "negative conditions denoise_as rounding cfg_start cfg_end timesteps",
        "latent",
    ),
    "WanFlowVAEEncode": ("vae images fit tiled tile_size tile_stride", "latent rounding", "latent"),
    "WanFlowVAEDecode": ("vae latent tiled tile_size tile_stride", "rounding", "images"),
    "WanFlowLoadVideo": ("video frame_rate num_frames size", "", "images fps"),
    "WanFlowSaveLora": ("lora filename_prefix key_format", "", "file"),
    "WanFlowDataset": (
        "folder metadata data_file_keys size num_frames frame_rate repeat caption_prefix caption_dropout flip sampling "
        "samples buckets",
        "",
        "dataset preview report",
    ),
    "WanFlowTrain": (
        "model vae text_encoder dataset folder mode parts rank alpha targets learning_rate epochs max_steps batch_size "
        "train_seed extra_inputs memory save_every sample_every sample_prompt also_full accumulation optimizer "
        "schedule warmup_steps weight_decay ema_decay max_grad_norm lora_plus timesteps weighting shift",
        "image_encoder held_out start_lora",
        "lora model loss folder",
    ),
    "WanFlowCheckpointGrid": (
        "model positive latent vae loras strengths seeds without steps cfg shift scheduler cell_height",
        "negative conditions",
        "images",
    ),
    "WanFlowSaveVideo": ("images filename_prefix frame_rate format quality", "audio", "file"),
    "WanFlowDecodeAndSave": (
        "vae latent filename_prefix frame_rate format quality tiled tile_size tile_stride", "audio", "file",
    ),
}


def test_names_and_order_are_frozen():
    found = {
        name: (
            " ".join(info["input_order"].get("required", [])),
            " ".join(info["input_order"].get("optional", [])),
            " ".join(info["output_name"]),
        )
        for name, info in INFOS.items()
    }
    assert found == RELEASED


def test_entrypoint_gives_every_node():
    assert asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list()) == list(NODES.values())


def test_node_list_for_scanners():
    """ComfyUI-Manager learns from this file which pack a missing node belongs to."""
    listed = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
    assert listed == {name: info["description"] for name, info in INFOS.items()}


def inputs_of(info):
    return {name: spec for group in ("required", "optional") for name, spec in info["input"].get(group, {}).items()}


@pytest.mark.parametrize("name", RELEASED)
def test_everything_is_explained(name):
    info = INFOS[name]
    assert info["description"] and info["display_name"] and info["category"].startswith("WanFlow/")
    assert all(info["output_tooltips"])
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {info['display_name']}\n")
    for wire in [*inputs_of(info), *info["output_name"]]:
        assert f"**{wire}**" in page, f"{name}: the help page does not explain {wire}"


@pytest.mark.parametrize("name", RELEASED)
def test_inputs_have_tooltips_bounds_and_defaults(name):
    for wire, (kind, options) in inputs_of(INFOS[name]).items():
        assert options["tooltip"].strip(), f"{wire} has no tooltip"
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], wire
        elif kind in ("STRING", "BOOLEAN"):
            assert "default" in options, wire
        elif kind == "COMBO" and wire != "video":  # the user's own files have no default
            assert options["default"] in options["options"], wire


def test_chinese_names_everything():
    chinese = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(chinese) == set(INFOS)
    for name, info in INFOS.items():
        entry = chinese[name]
        assert entry["display_name"] and entry["description"]
        assert set(entry["inputs"]) == set(inputs_of(info)), name
        assert set(entry["outputs"]) == {str(slot) for slot in range(len(info["output"]))}, name
        for wire in [*entry["inputs"].values(), *entry["outputs"].values()]:
            assert wire["name"] and wire["tooltip"]


# ---------------------------------------------------------------- what comes over the wires


def test_latents_of_other_models_are_refused():
    assert latent_samples({"samples": torch.zeros(1, 16, 3, 8, 8)}).shape == (1, 16, 3, 8, 8)
    with pytest.raises(InputError, match="not a Wan 2.1 video"):
        latent_samples({"samples": torch.zeros(1, 4, 64, 64)})
    with pytest.raises(InputError, match="noise mask"):
        refuse_noise_mask({"samples": torch.zeros(1, 16, 3, 8, 8), "noise_mask": torch.ones(1, 1, 64, 64)})


def test_conditioning(capsys):
    text = torch.zeros(1, 512, 4096)
    assert conditioning_text([[text, {"pooled_output": None}]], "positive") is text
    assert capsys.readouterr().err == ""
    conditioning_text([[text, {"concat_mask": torch.zeros(1)}]], "positive")
    assert "without effect: concat_mask" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds 2 conditionings"):
        conditioning_text([[text, {}], [text, {}]], "negative")


def test_number_pair():
    assert number_pair("30x52", "tile_size") == number_pair(" 30, 52 ", "tile_size") == (30, 52)
    for text in ("30", "0x5", "axb"):
        with pytest.raises(InputError, match="tile_size"):
            number_pair(text, "tile_size")


def test_empty_latent_is_rounded_up_and_says_so(capsys):
    node = NODES["WanFlowEmptyLatent"]
    (latent,) = node.execute(width=50, height=64, num_frames=8, batch_size=2).args
    assert latent["samples"].shape == (2, 16, 3, 8, 8) and not latent["samples"].any()
    said = capsys.readouterr().err
    assert "50x64 was rounded up to 64x64" in said and "8 frames was rounded up to 9" in said
    with pytest.raises(InputError, match="width"):
        node.execute(width=0, height=64, num_frames=9, batch_size=1)


class EchoVAE:
    """Stands in for a VAE where only the shapes matter: latents are the mean of their pixels."""

    def encoding_room(self, picture):
        return 0

    def decoding_room(self, picture):
        return 0

    def attached(self, device):
        return nullcontext(self)

    def encode(self, pixels, tiled, tile_size, tile_stride, sums):
        assert (tiled, tile_size, tile_stride, sums) == (False, (30, 52), (15, 26), torch.float32)
        batch, _, frames, height, width = pixels.shape
        return pixels.mean().expand(batch, 16, (frames - 1) // 4 + 1, height // 8, width // 8)

    def decode(self, latents, **_):
        batch, _, frames, height, width = latents.shape
        return latents.mean().expand(batch, 3, 4 * frames - 3, 8 * height, 8 * width).clone()


def encode(images, **inputs):
    tiling = {"tiled": False, "tile_size": "30x52", "tile_stride": "15x26"}
    return NODES["WanFlowVAEEncode"].execute(vae=EchoVAE(), images=images, fit="cover", **tiling, **inputs).args[0]


def test_vae_encode_fits_to_the_canvas(capsys):
    images = torch.full((7, 50, 60, 3), 0.75)
    assert encode(images)["samples"].shape == (1, 16, 3, 8, 8)  # 60x50 -> 64x64, 7 -> 9 frames
    assert "fitted to 64x64" in capsys.readouterr().err
    canvas = {"samples": torch.zeros(2, 16, 2, 4, 6)}
    samples = encode(images, latent=canvas)["samples"]
    assert samples.shape == (2, 16, 2, 4, 6)
    torch.testing.assert_close(samples, torch.full_like(samples, 0.5))  # 0..1 became -1..1
    assert "first 5" in capsys.readouterr().err


def test_vae_decode_strings_a_batch_together():
    latent = {"samples": torch.full((2, 16, 3, 8, 8), 0.5)}
    tiling = {"tiled": False, "tile_size": "30x52", "tile_stride": "15x26"}
    (images,) = NODES["WanFlowVAEDecode"].execute(vae=EchoVAE(), latent=latent, **tiling).args
    assert images.shape == (18, 64, 64, 3) and images.dtype == torch.float32
    torch.testing.assert_close(images, torch.full_like(images, 0.75))
