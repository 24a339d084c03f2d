"""Run by ComfyUI's own interpreter, in its folder: what its loader makes of a file.

Arguments: a diffusion model, a file with the inputs x, timestep and context, and the file to write: the model's output,
and each linear layer's weight as the layer computes with it.
"""

import sys

model_file, input_file, result_file = sys.argv[1:]
sys.argv[1:] = ["--cpu"]
sys.path.insert(0, ".")

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

inputs = load_file(input_file)
network = comfy.sd.load_diffusion_model(model_file).model.diffusion_model
linears = {name: layer for name, layer in network.named_modules() if hasattr(layer, "in_features")}
with torch.no_grad():
    results = {"output": network(inputs["x"], inputs["timestep"], inputs["context"])}
    for name, layer in linears.items():
        bias, layer.bias = layer.bias, None
        results[name] = layer(torch.eye(layer.in_features)[None])[0].T.float().contiguous()
        layer.bias = bias
save_file(results, result_file)
