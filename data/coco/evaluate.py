"""
Did my run work? Draws real images again, from their embeddings and from their captions, and measures both.

    pip install torch-fidelity pycocoevalcap                                                  # the latter runs Java
    torchrun --nproc_per_node=8 sample.py --captions_only data/coco/shards --ckpt out/stage2 --out captions
    torchrun --nproc_per_node=8 data/coco/evaluate.py --ckpt out/stage2 --captions captions

writes results.json, a table and a sheet of pictures into --out. FID (Heusel et al. 2017) compares what is drawn with the
originals; CLIP similarity (100 x the cosine of CLIP's embeddings) compares each drawn image with its original and each
caption with its image; CIDEr, BLEU-4 and ROUGE-L compare the captions with the five that people wrote. Captions may be any
program's: JSON lines {"image": NAME, "caption": TEXT}. None: the first that people wrote, against their others. A killed run
goes on where it was, by the same command, with any number of processes.
"""

import hashlib
import io
import json
import pickle
import sys
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
from data.quiet import quiet  # before what imports transformers
from data.checkpoint import find_checkpoint, fingerprint, write_json, write_whole
from data.loader import IMAGE_ENDINGS, crop_image, open_image, seeds_of
from data.pretrained import choose_dtype, load
from data.processes import gather, run, share_work, together
from data.results import panel, read_captions
from data.settings import Count, Guidance, Pixels, Seed, Settings, Steps, Text, parse_settings, same_as_before
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
from vlv import VLV, load_config

SHOWN = 8  # images of the sheet


@dataclass
class EvaluateConfig(Settings):
    inception: Path = HERE / "pt_inception-2015-12-05-6726825d.pth"  # the weights of FID's network
    data: Path = HERE / "shards"  # made by prepare.py
    ckpt: Text | None = None  # whose embeddings are drawn; None: only captions are
    captions: Path | None = None  # JSON lines, or a folder of such files; None: the first that people wrote
    draw_with: Text | None = None  # any text-to-image pipeline of diffusers, for captions; None: the checkpoint's decoder
    clip: Text = "openai/clip-vit-large-patch14"
    guidance_scales: Annotated[tuple[Guidance, ...], "that is not empty"] = (1.0, 2.0, 3.0, 4.0)  # of the paper's table
    num_inference_steps: Steps = 50
    image_size: Pixels = 384  # the side of the originals
    batch_size: Count = 16
    seed: Seed = 0
    out: Path = Path("results")


def read_shard(path: Path, images: bool = True) -> list[tuple[str, bytes | None, list[str]]]:
    """(key, image file, captions) of each image, by key. images: read them, too."""
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if images or member.name.endswith(".json")}
    keys = sorted(name.removesuffix(".json") for name in files if name.endswith(".json"))
    found = {Path(name).stem: data for name, data in files.items() if Path(name).suffix.lower() in IMAGE_ENDINGS}
    return [(key, found.get(key), json.loads(files[key + ".json"])["captions"]) for key in keys]


class Networks:
    """What draws and what judges; each is loaded when it is first needed."""

    def __init__(self, args: EvaluateConfig, device: torch.device):
        self.args, self.device = args, device

    @cached_property
    def vlv(self) -> VLV:
        folder = find_checkpoint(self.args.ckpt)
        return VLV.from_pretrained(folder, dtype=choose_dtype("auto", self.device, folder), device=self.device)

    @cached_property
    def pipeline(self):
        from diffusers import AutoPipelineForText2Image  # which imports every pipeline there is

        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            pipeline = AutoPipelineForText2Image.from_pretrained(self.args.draw_with, dtype=dtype, local_files_only=True)
        except Exception as error:  # each part of a pipeline has errors of its own
            reason = " ".join(str(error).split())
            raise OSError(f"cannot load the text-to-image pipeline (--draw_with) {self.args.draw_with!r}: {reason}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    @cached_property
    def inception(self):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = str(self.args.inception)
        try:
            torch.load(path, weights_only=True)  # the library unpickles the file: it must hold nothing but tensors
            return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path).to(self.device)
        except (RuntimeError, pickle.UnpicklingError, AttributeError) as error:
            raise OSError(f"{path} holds no weights of FID's Inception network: {' '.join(str(error).split())[:200]}") from error

    @cached_property
    def clip(self) -> tuple:
        """The model, its image processor and its tokenizer."""
        model, *others = (load(cls, self.args.clip, "CLIP (--clip)") for cls in (CLIPModel, AutoImageProcessor, AutoTokenizer))
        return model.to(self.device).eval(), *others

    def inception_features(self, images: list[torch.Tensor]) -> torch.Tensor:
        """(3, S, S) uint8 images -> (B, 2048)."""
        return self.inception(torch.stack(images).to(self.device))[0].float().cpu()

    def see(self, images: list[torch.Tensor]) -> torch.Tensor:
        """CLIP's features of (3, S, S) uint8 images, (B, D), of length 1."""
        clip, processor, _ = self.clip
        pixels = processor(images, return_tensors="pt").pixel_values.to(self.device)
        features = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        return F.normalize(features, dim=-1).cpu()

    def read(self, texts: list[str]) -> torch.Tensor:
        """CLIP's features of texts, (B, D), of length 1; it reads their first 77 tokens."""
        clip, _, tokenizer = self.clip
        tokens = tokenizer(texts, return_tensors="pt", padding=True, truncation=True,
                           max_length=clip.config.text_config.max_position_embeddings).to(self.device)  # fmt: skip
        features = clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return F.normalize(clip.text_projection(features), dim=-1).cpu()

    def draw(self, kind: str, guidance_scale: float, images: torch.Tensor, captions: list[str], seeds: list[int]) -> list:
        """PIL images of what the embeddings of the images, or the captions, make the decoder draw."""
        kwargs = dict(num_inference_steps=self.args.num_inference_steps, guidance_scale=guidance_scale)
        if kind == "caption" and self.args.draw_with:
            generator = [torch.Generator().manual_seed(seed) for seed in seeds]
            return self.pipeline(captions, generator=generator, **kwargs).images
        decoder = self.vlv.decoder
        prompt = captions if kind == "caption" else self.vlv.embed(images.to(self.device))
        return decoder.reconstruct(prompt, seed=seeds, **kwargs)


@torch.inference_mode()
def measure(networks: Networks, shard: Path, number: int, row: tuple, captions: dict[str, str] | None) -> dict[str, torch.Tensor]:
    """What one row of the table needs to know of one shard: Inception's features (n, 2048), CLIP similarities (n,), and for
    the sheet the first pictures."""
    (kind, guidance_scale), args = row, networks.args
    samples, features, similarities, pictures = read_shard(shard), [], [], []
    for at in range(0, len(samples), args.batch_size):
        some = samples[at : at + args.batch_size]
        originals = [crop_image(open_image(io.BytesIO(data), args.image_size), args.image_size) for _, data, _ in some]
        texts = [captions[key] if captions else people[0] for key, _, people in some]
        if kind == "original":
            drawn, other = originals, networks.read(texts)
        else:
            seeds = seeds_of(args.seed, number, range(at, at + len(some)))
            drawn = networks.draw(kind, guidance_scale, torch.stack(originals), texts, seeds)
            drawn = [crop_image(picture, picture.width) for picture in drawn]
            other = networks.see(originals)
        features.append(networks.inception_features(drawn))
        similarities.append(100 * (networks.see(drawn) * other).sum(-1))
        if number == 0 and at < SHOWN:
            pictures += [crop_image(Image.fromarray(d.permute(1, 2, 0).numpy()), args.image_size) for d in drawn]
    part = {"features": torch.cat(features), "similarities": torch.cat(similarities)}
    return part | ({"pictures": torch.stack(pictures[:SHOWN])} if pictures else {})


def read_part(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """FID of two sets of features, (n, D) each."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features.double()) for features in (a, b)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def score_captions(captions: dict[str, str], people: dict[str, list[str]]) -> dict[str, float]:
    """CIDEr, BLEU-4 and ROUGE-L of {key: caption} against {key: what people wrote}, by COCO's own code."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    said = tokenizer.tokenize({key: [{"caption": caption}] for key, caption in captions.items()})
    truth = tokenizer.tokenize({key: [{"caption": text} for text in people[key]] for key in captions})
    return {"CIDEr": float(Cider().compute_score(truth, said)[0]), "BLEU-4": float(Bleu(4).compute_score(truth, said, verbose=0)[0][3]),
            "ROUGE-L": float(Rouge().compute_score(truth, said)[0])}  # fmt: skip


def check(args: EvaluateConfig) -> tuple[list[Path], dict | None, dict]:
    """The shards, the captions (None: people's), and what people wrote. Raises ValueError or OSError for what is missing."""
    try:
        import pycocoevalcap  # noqa: F401
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is missing, install it with: pip install torch-fidelity pycocoevalcap") from None
    if not args.inception.is_file():
        raise ValueError(f"FID's Inception weights are not in {args.inception}; data/coco/readme.md says where they are")
    shards = sorted(args.data.glob("*.tar"))
    if not shards:
        raise ValueError(f"{args.data} holds no shards; make them with: python {HERE / 'prepare.py'}")
    people = {key: texts for shard in shards for key, _, texts in read_shard(shard, images=False)}
    captions = read_captions(args.captions) if args.captions else None
    missing = sorted(people.keys() - captions.keys()) if captions is not None else []
    if missing:
        raise ValueError(f"{args.captions} has no caption of {len(missing):,} of the {len(people):,} images, such as {missing[0]}")
    settings = dict(ckpt=fingerprint(find_checkpoint(args.ckpt)) if args.ckpt else None, draw_with=args.draw_with, clip=args.clip,
                    captions=hashlib.sha256(json.dumps(captions, sort_keys=True).encode()).hexdigest()[:16], images=len(people),
                    num_inference_steps=args.num_inference_steps, image_size=args.image_size, seed=args.seed)  # fmt: skip
    if args.ckpt:
        size = load_config(find_checkpoint(args.ckpt)).image_size
        if size != args.image_size:
            raise ValueError(f"image_size is {args.image_size}, but the checkpoint's is {size}: add --image_size {size}")
    same_as_before(args.out / "settings.json", settings, "choose another --out")
    return shards, captions, people


def summarize(args: EvaluateConfig, rows: list, part_of, shards: list[Path], captions: dict | None, people: dict) -> None:
    """Writes results.json and sheet.png, and prints the table."""
    whole = lambda row, name: torch.cat([read_part(part_of(row, shard), name) for shard in shards])
    original = whole(rows[0], "features")
    first = {key: texts[0] for key, texts in people.items()}
    scored = captions or first
    references = people if captions else {key: texts[1:] for key, texts in people.items()}
    scored = {key: scored[key] for key in sorted(people) if references[key]}
    result = dict(images=len(people), captions=score_captions(scored, references)
                  | {"CLIP score": whole(rows[0], "similarities").mean().item()}, drawn=[])  # fmt: skip
    print(f"{len(people):,} images; captions: " + ", ".join(f"{name} {value:.3f}" for name, value in result["captions"].items()))
    print("drawn from  guidance      FID  CLIP similarity to the original")
    for kind, guidance_scale in rows[1:]:
        fid = frechet_distance(original, whole((kind, guidance_scale), "features"))
        similarity = whole((kind, guidance_scale), "similarities").mean().item()
        result["drawn"].append(dict(kind=kind, guidance_scale=guidance_scale, FID=fid, CLIP_similarity=similarity))
        print(f"{kind:11} {guidance_scale:8.1f} {fid:8.2f}  {similarity:6.2f}", flush=True)
    write_json(args.out / "results.json", result)
    columns = [read_part(part_of(row, shards[0]), "pictures") for row in rows]
    shown = [key for key, _, _ in read_shard(shards[0], images=False)][: len(columns[0])]
    sheet = panel([list(row) for row in zip(*columns)], [(captions or first)[key] for key in shown])
    write_whole(args.out / "sheet.png", lambda path: sheet.save(path, "png"))
    print(f"results.json and sheet.png are in {args.out}; its columns: "
          + ", ".join(" ".join(str(part) for part in row if part) for row in rows))  # fmt: skip


def main(argv=None) -> None:
    args = parse_settings(EvaluateConfig, argv, __doc__)
    quiet()
    rank, world_size, device = share_work()
    shards, captions, people = gather(together(lambda: check(args) if rank == 0 else None))[0]
    rows = [("original", 0.0)] + [("embedding", g) for g in args.guidance_scales if args.ckpt]
    rows += [("caption", g) for g in args.guidance_scales if args.ckpt or args.draw_with]
    part_of = lambda row, shard: args.out / "parts" / f"{row[0]}-{row[1]:g}" / f"{shard.stem}.safetensors"
    work = [(row, number) for row in rows for number in range(len(shards))]
    left = gather([one for one in work if not part_of(one[0], shards[one[1]]).exists()] if rank == 0 else None)[0]
    networks = Networks(args, device)

    def do_my_share():
        bar = tqdm(left[rank::world_size], initial=(len(work) - len(left)) // world_size, total=len(work) // world_size,
                   unit=" shards", disable=rank > 0, smoothing=0.02)  # fmt: skip
        for row, number in bar:
            bar.set_description(f"{row[0]} {row[1]:g}")
            part = measure(networks, shards[number], number, row, captions)
            path = part_of(row, shards[number])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: save_file(part, file))

    together(do_my_share)
    if rank == 0:
        summarize(args, rows, part_of, shards, captions, people)


if __name__ == "__main__":
    run(main, "stopped; the same command goes on")
