"""
Turns the authors' released weights into a checkpoint folder, for sample.py --ckpt and train.py --init_from. See readme.md.

    python data/authors/convert.py DOWNLOADED_FOLDER --out out/authors

Takes their stage 1 (SDModel) or stage 2 (CLIPDecoder), as .safetensors files, or .pt or .bin ones, which are opened without
running code from them. Each weight of theirs is used, or is found equal to the pretrained model that it was frozen from, or is
named.
"""

import pickle
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from safetensors import SafetensorError, safe_open

from data.settings import Count, Pixels, Settings, Text, parse_settings
from data.quiet import quiet  # before what imports transformers
from data.pretrained import Weights, choose_dtype, load
from transformers import AutoTokenizer
from vlv import VLV, VLVConfig

LEARNED = [  # theirs -> ours
    (r"query_embed", "encoder.queries.weight"),
    (r"language_proj\.(.*)", r"encoder.projection.\1"),
    (r"model\.language_model\.model\.((?:encoder|decoder)\..*)", r"encoder.bart.\1"),
    (r"mlp\.layers\.(.*)", r"caption_head.mlp.\1"),
    (r"qwen2_model\.(.*)", r"caption_head.llm.\1"),
]
FROZEN = [  # of microsoft/Florence-2-large, where the names differ from transformers' own
    (r"model\.vision_tower\.(.*)", r"encoder.davit.tower.\1"),
    (r"(convs\.\d+)\.proj\.", r"\1.conv."),
    (r"\.(conv[12])\.fn\.dw\.", r".\1."),
    (r"\.(window|channel)_attn\.norm\.", ".norm1."),
    (r"\.(window|channel)_attn\.fn\.", r".\1_attn."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.fn\.net\.", ".ffn."),
    (r"^model\.image_projection$", "encoder.davit.projector.image_projection.weight"),
    (r"^model\.image_pos_embed\.", "encoder.davit.projector.image_position_embed."),
    (r"^model\.(image_proj_norm|visual_temporal_embed)\.", r"encoder.davit.projector.\1."),
    (r"^text_encoder\.(?:text_model\.)?", "decoder.text_encoder."),
    (r"^(vae|unet)\.", r"decoder.\1."),
]
UNUSED = r"model\.language_model\.(lm_head\.weight|final_logits_bias)|text_encoder\..*position_ids"
SHARED = "model.language_model.model.shared.weight"


@dataclass
class ConvertConfig(Settings):
    weights: Path  # their file, or the folder of their files
    out: Path = Path("out/authors")
    diffusion_model: Text = VLVConfig.diffusion_model
    encoder: Text = VLVConfig.encoder
    llm: Text = VLVConfig.llm
    image_size: Pixels = VLVConfig.image_size
    encoder_image_size: Pixels = VLVConfig.encoder_image_size
    max_caption_tokens: Count = VLVConfig.max_caption_tokens
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"


def read(path: Path) -> dict:
    """Name -> tensor, or what reads it by [...]. Raises OSError for what cannot be opened, ValueError for other things."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    files = files or [p for p in sorted(path.rglob("*")) if p.suffix in (".bin", ".pt")]
    if not files:
        raise OSError(f"{path} has no .safetensors, .bin or .pt file: name the file, or the folder, that you have downloaded")
    found = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                opened = safe_open(file, "pt", backend="pread")
                found |= {name: opened.get_slice(name) for name in opened.keys()}
                continue
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise OSError(f"{file} cannot be opened as weights: {str(error).strip().splitlines()[0]}") from error
        while isinstance(state, dict) and not any(isinstance(value, torch.Tensor) for value in state.values()):
            inner = next((state[key] for key in ("model_state_dict", "state_dict", "model", "module") if key in state), None)
            if inner is None:
                raise ValueError(f"{file} holds no weights, only {', '.join(map(str, list(state)[:5]))}")
            state = inner
        found |= {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return found


def rename(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


class Theirs(Weights):
    """Their weights under our names."""

    def __init__(self, path: Path):
        super().__init__()
        self.folder, state = path, read(path)
        anchor = next((name for name in state if name.endswith("query_embed")), None)
        if anchor is None:
            raise ValueError(f"{path} is no checkpoint of theirs: none of its {len(state):,} weights is called query_embed")
        self.stage = 2 if anchor.endswith("VLV_model.query_embed") else 1
        prefix = anchor.removesuffix("query_embed").removesuffix("VLV_model.")
        self.names, self.others = {}, {}  # ours -> theirs; theirs -> weight
        for name, weight in state.items():
            bare = name.removeprefix(prefix).removeprefix("VLV_model.")
            ours = next((re.sub(p, new, bare) for p, new in LEARNED if re.fullmatch(p, bare)), None)
            if ours is None or ours.endswith("embed_tokens.weight") and "bart" in ours:
                self.others[bare] = weight
                continue
            self.names[ours] = name
            self.left[ours] = weight[...][0] if bare == "query_embed" else weight  # (1, N, width) there
        if SHARED not in self.others:
            raise self.problem(f"{SHARED} is missing")

    def problem(self, sentence: str) -> ValueError:
        name = sentence.split()[0]
        return ValueError(f"{self.folder} does not fit: {sentence.replace(name, self.names.get(name, name), 1)} ({name} here)")


def compare(theirs: Theirs, model: VLV) -> tuple[int, list[str], list[str]]:
    """How many of the other weights are equal to the pretrained models', the names of those that are not, and of those that
    have no place."""
    ours, equal, different, unknown = model.state_dict(), 0, [], []
    shared = theirs.others[SHARED][...].bfloat16()
    for name, weight in theirs.others.items():
        if name == SHARED or re.fullmatch(UNUSED, name):
            continue
        weight, here = weight[...].bfloat16(), ours.get(rename(name, FROZEN))
        if name.endswith("embed_tokens.weight"):
            here = shared
        elif name == "model.image_projection":
            weight = weight.T
        if here is None:
            unknown.append(name)
        elif weight.shape == here.shape and torch.equal(weight, here.bfloat16()):
            equal += 1
        else:
            different.append(name)
    return equal, different, unknown


def convert(args: ConvertConfig) -> None:
    theirs = Theirs(args.weights)
    if "encoder.queries.weight" not in theirs.left or theirs.left["encoder.queries.weight"].ndim != 2:
        raise theirs.problem("encoder.queries.weight should be (1, N, width)")
    config = VLVConfig(
        diffusion_model=args.diffusion_model, encoder=args.encoder, llm=args.llm, image_size=args.image_size,
        encoder_image_size=args.encoder_image_size, max_caption_tokens=args.max_caption_tokens, stage=theirs.stage,
        num_queries=len(theirs.left["encoder.queries.weight"]),
        # they never taught an end token
        caption_end="full stop" if theirs.stage == 2 else "token")  # fmt: skip
    # Their token table has learned, so the prompt's embeddings come from it, and travel with the checkpoint.
    tokenizer = load(AutoTokenizer, args.encoder, "vision encoder's tokenizer (--encoder)")
    theirs.left["encoder.prompt_embeds"] = theirs.others[SHARED][...][tokenizer(config.prompt).input_ids][None]
    head = theirs.left.pop("caption_head.llm.lm_head.weight", None)  # tied: left out, or there once more
    embeds = theirs.left.get("caption_head.llm.model.embed_tokens.weight")
    if head is not None and (embeds is None or not torch.equal(head[...], embeds[...])):
        theirs.left["caption_head.llm.lm_head.weight"] = head
    dtype = choose_dtype(args.precision, torch.device("cpu"), args.out)
    draws = any(name.startswith(("unet.", "vae.")) for name in theirs.others)  # to be compared
    model = VLV(config, with_unet=draws, dtype=dtype, weights=theirs).eval()
    unknown = [theirs.names.get(name, name) for name in theirs.left]
    equal, different, more = compare(theirs, model)
    if different:
        raise ValueError(
            f"{args.weights}: {len(different)} frozen weights are not those of {args.encoder} and {args.diffusion_model}, such as"
            f" {different[0]}: name the models that they were trained with by --encoder and --diffusion_model"
        )
    model.save_pretrained(args.out)
    print(f"{args.out}: stage {theirs.stage}, {len(theirs.names) - len(unknown):,} of their weights used, {equal:,} equal to the"
          f" pretrained models', {len(unknown + more)} without a place here")  # fmt: skip
    for name in unknown + more:
        print(f"not used: {name}")


def main(argv=None) -> None:
    quiet()
    try:
        convert(parse_settings(ConvertConfig, argv, __doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
