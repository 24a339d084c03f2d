"""Make the WanTiny tokenizer and train its UMT5 encoder:
`python -m comfyui_wanflow.wan_core.tiny.train_text --out DIR`.

The tokenizer knows the toy world's words and falls back to single letters. The encoder learns to tell, at every
token, which role its word has in the caption: the shape's colour, the shape, the direction, the background, or none.
The residual stream keeps the word itself, so each row that the DiT attends to says what it is and what it is about,
and "red on blue" is not "blue on red". Roles follow from neighbours alone, so they hold for combinations never seen.
A minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.text_encoder import UMT5Encoder, UMT5Layout, position_buckets
from ..models.tokenizer import Tokenizer
from . import world

WORDS = (
    *world.ALL_COLORS, *world.SHAPES, *world.OTHER_SHAPES, *world.DIRECTIONS, "background", "moves", "moving", "a",
    "an", "the", "on", "in", "to", "from", "with", "and", "of", "is", "that", "over", "which", "front",
)  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-()"

TEMPLATES = (
    "a {color} {shape} moves {direction} on a {background} background",
    "a {color} {shape} moving {direction} on a {background} background",
    "{color} {shape} moving {direction}, {background} background",
    "on a {background} background a {color} {shape} moves {direction}",
    "the {color} {shape} moves to the {direction} over a {background} background",
    "a {background} background with a {color} {shape} that moves {direction}",
)
STILL = "a {color} {shape} on a {background} background"  # what is said of a shape that does not move by itself


def captions(facts: tuple[str, str, str, str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The same facts in every wording; the first is the scene's own caption."""
    names = dict(zip(("color", "shape", "direction", "background"), facts, strict=True))
    return [template.format(**names) for template in templates]


def write_tokenizer(folder: Path) -> int:
    """`tokenizer.json` in the form of google/umt5-xxl: a Unigram model over "▁"-marked words, `</s>` at the end.
    Returns the size of its vocabulary."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [("▁", -6.0)] + [(letter, -8.0) for letter in LETTERS]
    pieces = list(dict(pieces).items())  # "a" is a word and a letter, with different marks; nothing is twice
    tokenizer = FastTokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


NO_ROLE = 4  # after color, shape, direction, background


def tokenized(tokenizer: Tokenizer, facts: list, wording: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token numbers (b, L), mask (b, L) and the role of every token (b, L)."""
    tokens = tokenizer([captions(f, (*TEMPLATES, STILL))[w] for f, w in zip(facts, wording, strict=True)])
    words = tokenizer([" ".join(f) for f in facts]).ids[:, :4]  # each fact is one word and one token
    same = tokens.ids[:, :, None] == words[:, None]  # (b, L, 4)
    roles = torch.where(same.any(-1), same.int().argmax(-1), NO_ROLE)
    return tokens.ids, tokens.mask.bool(), roles


def new_encoder(vocabulary: int, seed: int) -> UMT5Encoder:
    torch.manual_seed(seed)
    encoder = UMT5Encoder(UMT5Layout(vocabulary, dim=4096, attention_dim=32, ffn_dim=32, heads=2, layers=1))
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        elif "embedding" in name:
            nn.init.normal_(parameter, std=1.0)
        else:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        if name.endswith("attn.q.weight"):  # T5 does not scale its scores: begin by looking at positions alone
            parameter.data.mul_(0.05)
    # One head begins at the next token, one at the token before: from even attention neighbours are found too late.
    table = encoder.blocks[0].pos_embedding.embedding.weight.data  # (buckets, heads)
    after, before = position_buckets(2, len(table), table.device)[[0, 1], [1, 0]]
    table[after, 0] += 5
    table[before, 1] += 5
    return encoder


def train(out: Path, steps: int, seed: int = 0) -> UMT5Encoder:
    vocabulary = write_tokenizer(out / "google" / "umt5-xxl")
    tokenizer = Tokenizer.open(out / "google" / "umt5-xxl")
    facts = [f for f in world.all_facts() if not world.is_held_out(f)]
    unseen = [f for f in world.all_facts() if world.is_held_out(f)]
    encoder = new_encoder(vocabulary, seed)
    head = nn.Linear(4096, NO_ROLE + 1)
    # One Adam step of size r moves a sum over 4096 inputs by up to 4096 r: larger steps wreck the attention at once.
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-5, weight_decay=0.0)
    generator = np.random.default_rng(seed)
    for step in range(steps):
        chosen = [facts[i] for i in generator.integers(len(facts), size=16)]
        ids, mask, roles = tokenized(tokenizer, chosen, list(generator.integers(len(TEMPLATES) + 1, size=16)))
        loss = F.cross_entropy(head(encoder(ids, mask))[mask], roles[mask])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            with torch.no_grad():
                ids, mask, roles = tokenized(tokenizer, unseen, [i % len(TEMPLATES) for i in range(len(unseen))])
                right = (head(encoder(ids, mask)).argmax(-1) == roles)[mask].float().mean()
            print(f"step {step}  loss {loss.item():.4f}  roles right in unseen captions {right:.3f}", flush=True)
    return encoder


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    encoder = train(arguments.out, arguments.steps)
    weights = {k: v.half().contiguous() for k, v in encoder.state_dict().items()}
    save_file(weights, arguments.out / "models_t5_umt5-xxl-enc-bf16.safetensors")


if __name__ == "__main__":
    main()
