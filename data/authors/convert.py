"""
Turns the authors' released weights into a checkpoint folder, for sample.py --ckpt and train.py --init_from.

    python data/authors/convert.py DOWNLOADED_FOLDER --out out/authors

Takes their stage 1 (SDModel) or stage 2 (CLIPDecoder), as .safetensors files, or .pt or .bin ones, which are
opened without running code from them. Each weight is used, found equal to the pretrained models', or named.
"""

import dataclasses
import pickle
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Florence2Model

sys.path.insert(0, str(Path(__file__).parents[2]))
from data.distributed import quiet, select_dtype
from data.settings import Count, Pixels, printable, read_json, read_settings, write_json
from vlv import MODEL_CARD, VLV, CaptionHead, Encoder, VLVConfig, load, load_decoder, write_weights

LEARNED = [  # theirs -> ours
    (r"query_embed", "encoder.queries.weight"),
    (r"language_proj\.(.*)", r"encoder.projection.\1"),
    (r"model\.language_model\.model\.((?:encoder|decoder)\.(?!embed_tokens).*)", r"encoder.bart.\1"),
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
# BART's token table, under each of its tied names
TABLES = [f"model.language_model.{name}.weight"
          for name in ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")]
NOT_THEIRS = ("encoder.davit.", "decoder.")  # frozen, and so not in the checkpoint
WRAPPERS = r"(?<![^.])(module|_orig_mod)\."  # of DDP and torch.compile, anywhere in a name
THEIRS = r"(^|\.)(query_embed$|language_proj\.|mlp\.layers\.|qwen2_model\.|model\.language_model\.)"


@dataclass
class ConvertConfig:
    weights: Path  # their file, or the folder of their files
    out: Path = Path("out/authors")
    diffusion_model: str = VLVConfig.diffusion_model
    encoder: str = VLVConfig.encoder
    llm: str = VLVConfig.llm
    image_size: Pixels = VLVConfig.image_size
    encoder_image_size: Pixels = VLVConfig.encoder_image_size
    max_caption_tokens: Count = VLVConfig.max_caption_tokens
    precision: Literal["keep", "bf16", "fp16", "fp32"] = "keep"  # keep: that of their weights


def open_file(file: Path) -> dict:
    """Name -> tensor, or what reads it by [...]. Raises OSError or ValueError if there are none."""
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, "pt", backend="pread")
            return {name: opened.get_slice(name) for name in opened.keys()}
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = printable(str(error).strip().splitlines()[0])
        raise OSError(f"{file} cannot be opened as weights: {reason}") from error
    tensors = find_tensors(state)
    if not tensors:
        raise ValueError(f"{file} holds no weights, only {', '.join(map(str, list(state)[:5]))}")
    return tensors


def read(path: Path) -> tuple[dict, list[str]]:
    """Their weights, {name: tensor, or what reads it by [...]}, and a sentence for each file without any.
    Raises OSError or ValueError if there are none, or two of one name."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    for index in [file for file in files if file.name.endswith(".index.json")]:
        missing = {*read_json(index)["weight_map"].values()} - {file.name for file in files}
        if missing:
            raise OSError(f"{index} names {min(missing)}, which is not there: download it, too")
    files = [file for file in files if file.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    safe = {file.parent for file in files if file.suffix == ".safetensors"}
    is_copy = lambda file: file.parent in safe and re.fullmatch(r"pytorch_model.*\.bin", file.name)
    files = [file for file in files if not is_copy(file)]
    if not files:
        raise OSError(f"{path} has no .safetensors, .bin or .pt file: name what you have downloaded")
    found, sources, others = {}, {}, []
    for file in files:
        try:
            tensors = {re.sub(WRAPPERS, "", name): tensor for name, tensor in open_file(file).items()}
        except (OSError, ValueError) as error:
            if len(files) == 1:
                raise
            others.append(str(error))
            continue
        if len(files) > 1 and not any(re.search(THEIRS, name) for name in tensors):
            others.append(f"{file} holds none of their weights")
            continue
        for name, tensor in tensors.items():
            same = name if name in found else None
            if name.endswith("query_embed"):  # which is once in a stage, under other names in the other
                same = next((n for n in found if n.endswith("query_embed")), None)
            if same:
                raise ValueError(f"{sources[same]} and {file} both hold {name}: name one of the two")
            found[name], sources[name] = tensor, file
    if not found:
        raise ValueError("; ".join(others))
    return found, others


def find_tensors(state) -> dict[str, torch.Tensor]:
    """The weights in what torch.load returns, also below the usual keys; none: {}."""
    if not isinstance(state, dict):
        return {}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    for key in ("model_state_dict", "state_dict", "model", "module"):
        tensors = tensors or find_tensors(state.get(key))
    return tensors


def sort_weights(state: dict) -> tuple[int, dict, dict, dict, torch.Tensor]:
    """(their stage, learned weights by our names, {our name: theirs}, other weights by their names, BART's
    token table). Raises ValueError if they are not the authors' weights."""
    anchor = next((name for name in state if name.endswith("query_embed")), None)
    if anchor is None:
        raise ValueError(f"none of its {len(state):,} weights is called query_embed, as one of theirs is")
    stage = 2 if anchor.endswith("VLV_model.query_embed") else 1
    prefix = anchor.removesuffix("query_embed").removesuffix("VLV_model.")
    weights, names, others = {}, {}, {}
    for name, weight in state.items():
        bare = name.removeprefix(prefix).removeprefix("VLV_model.")
        ours = next((re.sub(p, new, bare) for p, new in LEARNED if re.fullmatch(p, bare)), None)
        if ours is None:
            others[bare] = weight
        else:
            weights[ours], names[ours] = weight, name
    table = next((name for name in TABLES if name in others), None)
    if table is None:
        raise ValueError(f"{TABLES[0]} is missing")
    head, embedding = (f"caption_head.llm.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    if head in weights and embedding not in weights:  # tied, and stored once
        weights[embedding], names[embedding] = weights.pop(head), names.pop(head)
    queries = weights["encoder.queries.weight"][...]
    if queries.ndim != 3:
        raise ValueError(f"{anchor} is {tuple(queries.shape)}, not (1, N, width)")
    weights["encoder.queries.weight"] = queries[0]
    return stage, weights, names, others, others[table][...]


def expected_model(config: VLVConfig, with_unet: bool) -> VLV:
    """The pretrained networks, and an LLM of names and shapes alone."""
    decoder, head = load_decoder(config, torch.float32, with_unet), None
    florence = load(Florence2Model, config.encoder, dtype=torch.float32)
    prompt_ids = load(AutoTokenizer, config.encoder)(config.prompt, return_tensors="pt").input_ids
    encoder = Encoder(config, florence, prompt_ids, decoder.embed_dim)
    if config.stage == 2:
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(load(AutoConfig, config.llm))
            head = CaptionHead(config, llm, load(AutoTokenizer, config.llm), decoder.embed_dim)
    return VLV(config, encoder, decoder, head)


def compare(others: dict, table: torch.Tensor, model: VLV) -> tuple[int, list[str], list[str]]:
    """(how many weights equal the pretrained models', but for rounding to half precision; names of those that
    do not; names without a place)."""
    state, equal, different, unknown = model.state_dict(), 0, [], []
    for name, weight in others.items():
        if name == TABLES[0] or re.fullmatch(UNUSED, name):
            continue
        our_name = name
        for pattern, new in FROZEN:
            our_name = re.sub(pattern, new, our_name)
        ours = table if name.endswith("embed_tokens.weight") else state.get(our_name)
        weight = weight[...].T if name == "model.image_projection" else weight[...]
        if ours is None:
            unknown.append(name)
        elif weight.shape == ours.shape and torch.allclose(weight.float(), ours.float(), 2**-8, 1e-7):
            equal += 1
        else:
            different.append(name)
    return equal, different, unknown


def convert(args: ConvertConfig) -> None:
    found, left_out = read(args.weights)
    if args.out.exists():
        raise FileExistsError(f"{args.out} is there already: choose another --out")
    stage, weights, names, others, table = sort_weights(found)
    caption_end = "full stop" if stage == 2 else "token"  # they never taught an end token
    fields = ("diffusion_model", "encoder", "llm", "image_size", "encoder_image_size", "max_caption_tokens")
    config = VLVConfig(**{name: getattr(args, name) for name in fields}, stage=stage, caption_end=caption_end,
                       num_queries=len(weights["encoder.queries.weight"]), resize="bilinear")
    # Their token table has learned, so the task prompt's embeddings come from it and are in the checkpoint.
    prompt_ids = load(AutoTokenizer, args.encoder)(config.prompt).input_ids
    weights["encoder.task_embeds"], names["encoder.task_embeds"] = table[prompt_ids][None], "the token table"
    bart = load(AutoConfig, args.encoder).text_config
    for name in weights:  # a Florence-2 of before December 2024 has fewer positions; none needs the others
        if name.endswith("embed_positions.weight"):
            positions = weights[name][...]
            more = bart.max_position_embeddings + 2 - len(positions)  # BART begins with the second
            if more > 0 and positions.shape[1:] == (bart.d_model,):
                weights[name] = F.pad(positions, (0, 0, 0, more))
    with_unet = any(name.startswith(("unet.", "vae.")) for name in others)  # to be compared
    model = expected_model(config, with_unet)
    shapes = {name: p.shape for name, p in model.named_parameters() if not name.startswith(NOT_THEIRS)}
    head, embedding = (f"caption_head.llm.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    if head in weights.keys() - shapes.keys() and torch.equal(weights[head][...], weights[embedding][...]):
        del weights[head]  # tied, and stored twice
    unused = [names[name] for name in weights.keys() - shapes.keys()]
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(f"{name} is missing")
        weights[name] = weights[name][...]
        if weights[name].shape != shape:
            raise ValueError(f"{names[name]} is {tuple(weights[name].shape)}, not {tuple(shape)} as {name} here")
    equal, different, unknown = compare(others, table, model)
    if different:
        raise ValueError(f"{len(different)} frozen weights are not those of {args.encoder} and"
                         f" {args.diffusion_model}, such as {different[0]}: name the models that they were"
                         " trained with by --encoder and --diffusion_model")
    dtype = weights["encoder.queries.weight"].dtype
    dtype = dtype if args.precision == "keep" else select_dtype(args.precision, torch.device("cpu"))
    metadata = dataclasses.asdict(config)
    unfinished = args.out.with_name(f".{args.out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors = {name: weights.pop(name).to(dtype).contiguous() for name in shapes}
    write_weights(unfinished / "model.safetensors", tensors, metadata)
    if stage == 2:
        load(AutoConfig, args.llm).save_pretrained(unfinished / "llm")
        load(AutoTokenizer, args.llm).save_pretrained(unfinished / "llm")
    (unfinished / "README.md").write_text(MODEL_CARD.format(**metadata), encoding="utf-8")
    write_json(unfinished / "config.json", metadata)
    unfinished.rename(args.out)
    print(f"{args.out}: stage {stage}, {dtype}, {len(shapes):,} of their weights used,"
          f" {equal:,} equal to the pretrained models', {len(unused + unknown)} without a place here")
    for name in unused + unknown + left_out:
        print(f"not used: {name}")


def main(argv=None) -> None:
    quiet()
    args = read_settings(ConvertConfig, argv, __doc__)
    try:
        convert(args)
    except OSError as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        sys.exit(f"error: {args.weights} does not fit: {error}")


if __name__ == "__main__":
    main()
