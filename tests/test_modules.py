"""VACE and the motion speed controller: from their files to a place beside the model, and into the answer."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.adapters.injection import Canvas, inject
from comfyui_wanflow.wan_core.adapters.speed import SpeedCondition
from comfyui_wanflow.wan_core.adapters.vace import VACECondition
from comfyui_wanflow.wan_core.errors import FileError, InputError, ModelError
from comfyui_wanflow.wan_core.loading.download import Library
from comfyui_wanflow.wan_core.loading.load import add_module, load_model
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.embedders import MotionController
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample
from safetensors import safe_open
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "data" / "golden" / "motion.safetensors"
LAYOUT = DiTLayout(dim=128, ffn_dim=32, layers=4, heads=1, text_dim=16, frequency_dim=32)
SIZE = (2, 4, 4)


def random_weights(module, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 + (1.0 if "norm" in name else 0.0)
        for name, tensor in module.state_dict().items()
    }


TRUNK = random_weights(DiT(LAYOUT), 0)
VACE_PART = random_weights(VACE(VACELayout(128, 32, 2, 1)), 1)
CONTROLLER = random_weights(MotionController(32, 128), 2)


@pytest.fixture
def files(tmp_path):
    """The trunk, the modules, each in a file, and a whole VACE model."""
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("trunk", "vace", "controller", "whole")}
    for path, tensors in zip(paths.values(), (TRUNK, VACE_PART, CONTROLLER, TRUNK | VACE_PART), strict=True):
        save_file(tensors, path)
    return paths


def condition():
    generator = torch.Generator().manual_seed(5)
    parts = (torch.randn(1, channels, *SIZE, generator=generator) for channels in (16, 16, 64))
    return VACECondition(*parts)


def video(model, *conditions):
    text = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(6))
    return sample(model, text, None, torch.zeros(1, 16, *SIZE), Settings(0, 2, cfg=1), conditions)


def test_a_whole_vace_model_has_its_part(files):
    model = load_model(files["whole"], device="cpu")
    assert model.module.vace.layout.layers == 2 and model.module.motion_controller is None
    assert model.total_bytes() == sum(tensor.numel() * 4 for tensor in (TRUNK | VACE_PART).values())
    plain = load_model(files["trunk"], device="cpu")
    torch.testing.assert_close(video(model), video(plain))  # silent without a condition
    assert (video(model, condition()) - video(model)).norm() > 1e-3 * video(model).norm()


@pytest.mark.parametrize("source", ["vace", "whole"])
def test_a_vace_module_is_added(files, source):
    base = load_model(files["trunk"], device="cpu")
    model = add_module(base, files[source])
    expected = video(load_model(files["whole"], device="cpu"), condition())
    torch.testing.assert_close(video(model, condition()), expected, rtol=1e-5, atol=1e-6)
    assert base.module.vace is None and model.trunk is base.trunk  # the handle before stays as it was


def test_published_modules_by_their_names(files, tmp_path):
    """The catalogue says where they lie; a row with a controller is loaded with it."""
    places = {
        "trunk": "Wan-AI/Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors",
        "controller": "DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1/model.safetensors",
        "whole": "Wan-AI/Wan2.1-VACE-1.3B/diffusion_pytorch_model.safetensors",
    }
    for name, place in places.items():
        (tmp_path / place).parent.mkdir(parents=True)
        files[name].rename(tmp_path / place)
    base = load_model("Wan2.1-T2V-1.3B", device="cpu", library=Library((tmp_path,)))
    assert base.module.vace is base.module.motion_controller is None
    assert add_module(base, "Wan2.1-VACE-1.3B", library=Library((tmp_path,))).module.vace is not None
    added = add_module(base, "Wan2.1-1.3b-speedcontrol-v1", library=Library((tmp_path,)))
    named = load_model("Wan2.1-1.3b-speedcontrol-v1", device="cpu", library=Library((tmp_path,)))
    slow, fast = (video(named, SpeedCondition(speed)) for speed in (0, 100))
    assert (slow - fast).norm() > 1e-4 * slow.norm()
    torch.testing.assert_close(video(added, SpeedCondition(100)), fast)


def test_both_modules_and_one_in_the_place_of_another(files):
    model = add_module(add_module(load_model(files["trunk"], device="cpu"), files["vace"]), str(files["controller"]))
    assert model.module.vace is not None and model.module.motion_controller is not None
    weights = (TRUNK, VACE_PART, CONTROLLER)
    assert model.total_bytes() == sum(tensor.numel() * 4 for group in weights for tensor in group.values())
    again = add_module(model, files["vace"])
    assert again.total_bytes() == model.total_bytes() and again.module.vace is not model.module.vace
    with model.attached("cpu") as network:
        assert network is model.module


def test_handles_that_share_a_trunk_hold_its_copies_once(files):
    """Shown on the meta device, which stands for a graphics card here."""
    base = load_model(files["trunk"], device="meta")
    model = add_module(base, files["vace"])
    base.ensure()
    assert model.resident_bytes() == base.resident_bytes() == base.total_bytes() > 0
    model.ensure()
    assert model.resident_bytes() == model.total_bytes() > base.resident_bytes() == base.total_bytes()
    assert model.release(1) > 0 and base.resident_bytes() == base.total_bytes()  # what was added goes first
    assert model.release() > 0 and model.resident_bytes() == base.resident_bytes() == 0
    model.ensure(base.total_bytes())
    assert model.resident_bytes() == base.resident_bytes()  # a small budget goes to the trunk


@pytest.mark.parametrize("what", ["vace", "controller"])
def test_modules_for_another_size_are_refused(files, tmp_path, what):
    other = DiT(DiTLayout(dim=256, ffn_dim=32, layers=4, heads=2, text_dim=16, frequency_dim=32))
    save_file(random_weights(other, 0), tmp_path / "other.safetensors")
    model = load_model(tmp_path / "other.safetensors", device="cpu")
    with pytest.raises(ModelError, match="made for models of width 128, but other is one of width 256 and 4 layers"):
        add_module(model, files[what])


def test_vace_for_other_layers_is_refused(files, tmp_path):
    short = {k: v for k, v in TRUNK.items() if not k.startswith(("blocks.1.", "blocks.2.", "blocks.3."))}
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(ModelError, match="This VACE module was made for .* short is one of width 128 and 1 layers"):
        add_module(load_model(tmp_path / "short.safetensors", device="cpu"), files["vace"])


def test_other_files_are_named(files):
    model = load_model(files["trunk"], device="cpu")
    with pytest.raises(FileError, match="is a Wan 2.1 diffusion model .*'Add Wan Module' needs a motion speed"):
        add_module(model, files["trunk"])
    for name in ("vace", "controller"):
        with pytest.raises(FileError, match="Load it with 'Add Wan Module'"):
            load_model(files[name])


# ---- the true sizes ---------------------------------------------------------------------------------------------

MANIFEST = json.loads((GOLDEN.parents[1] / "wan21_key_manifest.json").read_text())


def published(path, *rows):
    """A sparse file with the tensors of these rows of the manifest: it takes no room on the disk."""
    header, end = {}, 0
    for row in rows:
        for key, (shape, count) in MANIFEST[row]["keys"].items():
            for n in range(count):
                start, end = end, end + 2 * math.prod(shape)
                header[key.replace("{N}", str(n))] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def test_published_modules_fit_published_models(tmp_path):
    whole = load_model(published(tmp_path / "whole.safetensors", "t2v-1.3b", "vace-1.3b-module"), device="cpu")
    assert len(whole.module.vace.vace_blocks) == 15 and list(whole.module.vace.places(30)) == [*range(0, 30, 2)]
    large = load_model(published(tmp_path / "14b.safetensors", "t2v-14b"), device="cpu")
    module = published(tmp_path / "vace.safetensors", "vace-14b-module")
    assert list(add_module(large, module).module.vace.places(40)) == [*range(0, 40, 5)]
    with pytest.raises(ModelError, match=r"made for models of width 5120 \(14B\), but whole is one of width 1536"):
        add_module(whole, module)
    speed = published(tmp_path / "speed.safetensors", "motion-controller-1.3b")
    assert add_module(whole, speed).module.motion_controller is not None
    with pytest.raises(ModelError, match=r"width 1536 \(1.3B\), but 14b is one of width 5120 \(14B\)"):
        add_module(large, speed)


# ---- motion speed -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_motion_speed_equals_the_reference():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}
        config = json.loads(file.metadata()["config"])
    trunk = DiT(DiTLayout(  # heads cannot be read from the shapes: the recorded models have heads of 24
        config["dim"], config["ffn_dim"], config["num_layers"], config["num_heads"], text_dim=config["text_dim"],
        frequency_dim=config["freq_dim"],
    ))  # fmt: skip
    controller = MotionController(config["freq_dim"], config["dim"])
    for module, prefix in ((trunk, "w."), (controller, "motion_controller.")):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    network, canvas = Network(trunk, motion_controller=controller), Canvas(1, 3, 4, 6)
    speed = tensors["in.motion_bucket_id"].item()

    def answer(*conditions):
        injection = inject(conditions, network, canvas)
        return network(tensors["in.latents"], tensors["in.timestep"], tensors["in.context"], injection)

    expected = tensors["out"]
    assert (answer(SpeedCondition(speed)) - expected).norm() < 1e-5 * expected.norm()
    assert (answer() - expected).norm() > 1e-3 * expected.norm()
    with pytest.raises(InputError, match="Two conditions both set the motion speed"):
        answer(SpeedCondition(speed), SpeedCondition(1))


def test_motion_speed_needs_its_controller_and_a_number_it_knows(files):
    with pytest.raises(ModelError, match="no motion speed controller. Add one with Add Wan Module"):
        video(load_model(files["trunk"], device="cpu"), SpeedCondition(50))
    for speed in (-1, 101, float("nan")):
        with pytest.raises(InputError, match="motion_bucket_id is .* trained for 0 to 100"):
            SpeedCondition(speed)
