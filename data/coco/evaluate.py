"""
Did my run work? Draws real images again, from their embeddings and from their captions, and measures both.

    pip install --no-deps torch-fidelity==0.4.0 && pip install pycocoevalcap==1.2      # the latter runs Java
    torchrun --nproc_per_node=8 data/caption.py data/coco/shards --ckpt out/stage2 --out captions
    torchrun --nproc_per_node=8 data/coco/evaluate.py --ckpt out/stage2 --captions captions

writes results.json, a table and a sheet of pictures into --out. FID (Heusel et al. 2017) compares what is
drawn with the originals; CLIP similarity (100 x the cosine of CLIP's features) each drawn image with its
original and each caption with its image; CIDEr, BLEU-4 and ROUGE-L the captions with the five that people
wrote. Captions may be any program's: JSON lines {"image": NAME, "caption": TEXT}. Without any, the first
that people wrote is compared with their others. A killed run goes on where it was, by the same command.
"""

import hashlib
import importlib.util
import io
import json
import pickle
import sys
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))
from data import two_clips  # noqa: F401  for SDXL and SD 3
from data.coco.prepare import read_caption_lines
from data.distributed import RANK, WORLD_SIZE, all_gather, from_first, init_process_group
from data.distributed import run_and_exit, select_device, select_dtype
from data.loader import IMAGE_ENDINGS
from data.results import checkpoint_fingerprint, find_checkpoint, panel
from data.settings import Count, NonNegative, Pixels, Steps, read_settings, same_as_before, write_atomically
from data.settings import write_json
from vlv import VLV, load, load_config, to_pixels

SHOWN = 8  # images of the sheet


@dataclass
class EvaluateConfig:
    inception: Path = HERE / "pt_inception-2015-12-05-6726825d.pth"  # the weights of FID's network
    data: Path = HERE / "shards"  # made by prepare.py
    ckpt: str | None = None  # whose embeddings are drawn; None: only captions are
    captions: Path | None = None  # JSON lines, or a folder of such files; None: the first that people wrote
    draw_with: str | None = None  # any text-to-image pipeline, for captions; None: the checkpoint's decoder
    clip: str = "openai/clip-vit-large-patch14"
    guidance_scales: tuple[Annotated[float, 0, 1000], ...] = (1.0, 2.0, 3.0, 4.0)  # of the paper's table
    num_inference_steps: Steps = 50
    image_size: Pixels = 384  # the side of the originals
    batch_size: Count = 16
    seed: NonNegative = 0
    out: Path = Path("results")


def read_shard(path: Path, images: bool = True) -> list[tuple[str, bytes | None, list[str]]]:
    """(key, image file, captions) of each image, by key. images: read them, too."""
    with tarfile.open(path) as tar:
        members = [member for member in tar if images or member.name.endswith(".json")]
        files = {Path(member.name): tar.extractfile(member).read() for member in members}
    found = {path.stem: data for path, data in files.items() if path.suffix.lower() in IMAGE_ENDINGS}
    records = {path.stem: json.loads(data) for path, data in files.items() if path.suffix == ".json"}
    return [(key, found.get(key), record["captions"]) for key, record in sorted(records.items())]


def import_inception():
    """torch-fidelity's module of FID's network. Not the whole package: that needs torchvision, and one that
    does not fit the installed torch stops diffusers, too."""
    package = importlib.util.module_from_spec(importlib.util.find_spec("torch_fidelity"))
    sys.modules.setdefault("torch_fidelity", package)  # without running it
    return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")


class Networks:
    """What draws and what judges; each is loaded when it is first needed."""

    def __init__(self, args: EvaluateConfig, device: torch.device):
        self.args, self.device = args, device

    @cached_property
    def vlv(self) -> VLV:
        folder = find_checkpoint(self.args.ckpt)
        dtype = select_dtype("auto", self.device, folder)
        return VLV.from_pretrained(folder, dtype=dtype, device=self.device)

    @cached_property
    def pipeline(self):
        from diffusers import AutoPipelineForText2Image  # which imports every pipeline there is

        name, dtype = self.args.draw_with, select_dtype("auto", self.device)
        try:
            pipeline = AutoPipelineForText2Image.from_pretrained(name, dtype=dtype, local_files_only=True)
        except Exception as error:  # each part of a pipeline has errors of its own
            reason = " ".join(str(error).split())
            raise OSError(f"cannot load the pipeline {name!r} (--draw_with): {reason}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    @cached_property
    def inception(self):
        path = str(self.args.inception)
        try:
            torch.load(path, weights_only=True)  # the library unpickles the file: it must hold only tensors
            net = import_inception().FeatureExtractorInceptionV3
            net = net("inception", ["2048"], feature_extractor_weights_path=path)
            return net.to(self.device)
        except (RuntimeError, pickle.UnpicklingError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OSError(f"{path} holds no weights of FID's Inception network: {reason}") from error

    @cached_property
    def clip(self) -> tuple:
        """The model, its image processor and its tokenizer."""
        model = load(CLIPModel, self.args.clip, dtype=torch.float32)
        others = [load(cls, self.args.clip) for cls in (AutoImageProcessor, AutoTokenizer)]
        model = model.to(self.device).eval()
        return model, *others

    def inception_features(self, images: list[torch.Tensor]) -> torch.Tensor:
        """(3, S, S) uint8 images -> (B, 2048)."""
        return self.inception(torch.stack(images).to(self.device))[0].float().cpu()

    def image_features(self, images: list[torch.Tensor]) -> torch.Tensor:
        """CLIP's features of (3, S, S) uint8 images, (B, D), of length 1."""
        clip, processor, _ = self.clip
        pixels = processor(images, return_tensors="pt").pixel_values.to(self.device)
        features = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        return F.normalize(features, dim=-1).cpu()

    def text_features(self, texts: list[str]) -> torch.Tensor:
        """CLIP's features of texts, (B, D), of length 1; it reads their first 77 tokens."""
        clip, _, tokenizer = self.clip
        length = clip.config.text_config.max_position_embeddings
        tokens = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
        tokens = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        features = clip.text_projection(clip.text_model(**tokens).pooler_output)
        return F.normalize(features, dim=-1).cpu()

    def draw(self, kind: str, guidance_scale: float, images, captions: list[str], seeds: list[int]) -> list:
        """PIL images, drawn from the embeddings of images, (B, 3, S, S) uint8, or from B captions."""
        kwargs = dict(num_inference_steps=self.args.num_inference_steps, guidance_scale=guidance_scale)
        if kind == "caption" and self.args.draw_with:
            generator = [torch.Generator().manual_seed(seed) for seed in seeds]
            return self.pipeline(captions, generator=generator, **kwargs).images
        prompt = captions if kind == "caption" else self.vlv.embed(images.to(self.device))
        return self.vlv.decoder.reconstruct(prompt, seed=seeds, **kwargs)


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@torch.inference_mode()
def measure(networks: Networks, shard: Path, number: int, row: tuple, captions: dict | None) -> dict:
    """What a row of the table needs of one shard: Inception's "features", (n, 2048), CLIP's "similarities",
    (n,), and of the first shard "pictures" for the sheet."""
    (kind, guidance_scale), args, size = row, networks.args, networks.args.image_size
    samples, features, similarities, pictures = read_shard(shard), [], [], []
    for at in range(0, len(samples), args.batch_size):
        batch = samples[at : at + args.batch_size]
        originals = [to_pixels(io.BytesIO(data), size) for _, data, _ in batch]
        texts = [captions[key] if captions else people[0] for key, _, people in batch]
        if kind == "original":
            drawn, other = originals, networks.text_features(texts)
        else:
            seeds = [seed_of(args.seed, number, i) for i in range(at, at + len(batch))]
            drawn = networks.draw(kind, guidance_scale, torch.stack(originals), texts, seeds)
            drawn = [to_pixels(picture, picture.width) for picture in drawn]
            other = networks.image_features(originals)
        features.append(networks.inception_features(drawn))
        similarities.append(100 * (networks.image_features(drawn) * other).sum(-1))
        pictures += drawn[: SHOWN - len(pictures)] if number == 0 else []
    pictures = [to_pixels(picture, size) for picture in pictures]
    part = {"features": torch.cat(features), "similarities": torch.cat(similarities)}
    return part | ({"pictures": torch.stack(pictures)} if pictures else {})


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """FID of two sets of features, (n, D) each: the distance of the Gaussians with their means and
    covariances (Heusel et al. 2017, equation 6)."""
    means = [features.double().mean(0) for features in (a, b)]
    covariances = [torch.cov(features.double().T) for features in (a, b)]
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()  # trace of the square root
    return ((means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * root).item()


def score_captions(captions: dict[str, str], people: dict[str, list[str]]) -> dict[str, float]:
    """CIDEr, BLEU-4 and ROUGE-L of {key: caption} against {key: what people wrote}, by COCO's own code."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenize = PTBTokenizer().tokenize
    candidates = tokenize({key: [{"caption": caption}] for key, caption in captions.items()})
    references = tokenize({key: [{"caption": text} for text in people[key]] for key in captions})
    bleu = Bleu(4).compute_score(references, candidates, verbose=0)[0][3]
    scores = [scorer.compute_score(references, candidates)[0] for scorer in (Cider(), Rouge())]
    return {"CIDEr": float(scores[0]), "BLEU-4": float(bleu), "ROUGE-L": float(scores[1])}


def check(args: EvaluateConfig) -> tuple[list[Path], dict | None, dict]:
    """(shards, captions or None, what people wrote). Raises ValueError or OSError if something is missing."""
    for package, name in [("torch_fidelity", "torch-fidelity"), ("pycocoevalcap", "pycocoevalcap")]:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{name} is missing: install it as the top of {__file__} says")
    if not args.inception.is_file():
        raise ValueError(f"FID's Inception weights are not in {args.inception}; see data/coco/readme.md")
    shards = sorted(args.data.glob("*.tar"))
    if not shards:
        raise ValueError(f"{args.data} holds no shards; make them with: python {HERE / 'prepare.py'}")
    people = {key: texts for shard in shards for key, _, texts in read_shard(shard, images=False)}
    captions = read_caption_lines(args.captions) if args.captions else None
    missing = [key for key in people if captions is not None and key not in captions]
    if missing:
        raise ValueError(f"{args.captions} has no caption of {len(missing):,} of the {len(people):,} images,"
                         f" such as {missing[0]}")
    checkpoint = find_checkpoint(args.ckpt) if args.ckpt else None
    size = load_config(checkpoint).image_size if checkpoint else args.image_size
    if size != args.image_size:
        raise ValueError(f"image_size is {args.image_size}, but the checkpoint's is {size}: add --image_size")
    digest = hashlib.sha256(json.dumps(captions, sort_keys=True).encode()).hexdigest()[:16]
    ckpt = checkpoint_fingerprint(checkpoint) if checkpoint else None
    settings = dict(ckpt=ckpt, captions=digest, images=len(people))
    names = ("draw_with", "clip", "num_inference_steps", "image_size", "seed")
    settings |= {name: getattr(args, name) for name in names}
    same_as_before(args.out / "settings.json", settings, "choose another --out")
    return shards, captions, people


def part_path(args: EvaluateConfig, row: tuple, shard: Path) -> Path:
    return args.out / "parts" / f"{row[0]}-{row[1]:g}" / f"{shard.stem}.safetensors"


def read_parts(args: EvaluateConfig, row: tuple, shards: list[Path], name: str) -> torch.Tensor:
    """What `measure` found under this name in all the shards."""
    files = [safe_open(part_path(args, row, shard), "pt") for shard in shards]
    return torch.cat([file.get_tensor(name) for file in files])


def summarize(args: EvaluateConfig, rows: list, shards: list[Path], captions, people: dict) -> None:
    """Writes results.json and sheet.png, and prints the table."""
    references, shown = people, captions
    if captions is None:
        shown = {key: texts[0] for key, texts in people.items()}
        references = {key: texts[1:] for key, texts in people.items()}
    scores = score_captions({key: shown[key] for key in sorted(people) if references[key]}, references)
    scores["CLIP score"] = read_parts(args, rows[0], shards, "similarities").mean().item()
    drawn, features = [], read_parts(args, rows[0], shards, "features")
    words = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    print(f"{len(people):,} images; captions: {words}")
    print("drawn from  guidance      FID  CLIP similarity to the original")
    for row in rows[1:]:
        fid = frechet_distance(features, read_parts(args, row, shards, "features"))
        similarity = read_parts(args, row, shards, "similarities").mean().item()
        drawn.append(dict(kind=row[0], guidance_scale=row[1], FID=fid, CLIP_similarity=similarity))
        print(f"{row[0]:11} {row[1]:8.1f} {fid:8.2f}  {similarity:6.2f}", flush=True)
    write_json(args.out / "results.json", dict(images=len(people), captions=scores, drawn=drawn))
    columns = [read_parts(args, row, shards[:1], "pictures") for row in rows]
    keys = [key for key, _, _ in read_shard(shards[0], images=False)][:SHOWN]
    sheet = panel([list(pictures) for pictures in zip(*columns)], [shown[key] for key in keys])
    write_atomically(args.out / "sheet.png", lambda path: sheet.save(path, "png"))
    print(f"results.json and sheet.png are in {args.out}")


def main(argv=None) -> None:
    args = read_settings(EvaluateConfig, argv, __doc__)
    device = select_device("auto")
    init_process_group(device, hours=720)  # who is done waits for the others
    shards, captions, people = from_first("checked", lambda: check(args))
    rows = [("original", 0.0)] + [("embedding", g) for g in args.guidance_scales if args.ckpt]
    rows += [("caption", g) for g in args.guidance_scales if args.ckpt or args.draw_with]
    work = [(row, number) for row in rows for number in range(len(shards))]
    todo = all_gather([(row, n) for row, n in work if not part_path(args, row, shards[n]).exists()])[0]
    networks = Networks(args, device)
    bar = tqdm(todo[RANK::WORLD_SIZE], unit=" shards", disable=RANK > 0, smoothing=0.02)
    for row, number in bar:
        bar.set_description(f"{row[0]} {row[1]:g}")
        part = measure(networks, shards[number], number, row, captions)
        path = part_path(args, row, shards[number])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: save_file(part, file))
    all_gather(None)  # the others are done, too
    if RANK == 0:
        summarize(args, rows, shards, captions, people)


if __name__ == "__main__":
    run_and_exit(main)
