"""A second pack for the real ComfyUI of the tests, which imports this file as a custom node."""

import io

import comfy.model_management
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.wan as wan
import sentencepiece
import torch
from aiohttp import web
from server import PromptServer


@PromptServer.instance.routes.get("/probe/loaded")
async def loaded(request):
    """What ComfyUI's memory manager holds."""
    patchers = comfy.model_management.loaded_models()
    return web.json_response([[type(patcher).__name__, patcher.model_size()] for patcher in patchers])


class SmallWanClip:
    """A CLIP of type wan, made of core's own code, but small and random."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        pieces = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a red circle moves left on a blue background"]),
            model_writer=pieces,
            vocab_size=64,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        small = {"d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1, "vocab_size": 64}
        clip = comfy.sd.CLIP(
            comfy.supported_models_base.ClipTarget(wan.WanT5Tokenizer, wan.WanT5Model),
            tokenizer_data={"spiece_model": pieces.getvalue()},
            model_options={"umt5xxl_model_config": small},
        )
        torch.manual_seed(0)
        for weight in clip.cond_stage_model.parameters():
            weight.data.normal_(std=0.1)
        return (clip,)


NODE_CLASS_MAPPINGS = {"ProbeSmallWanClip": SmallWanClip}
