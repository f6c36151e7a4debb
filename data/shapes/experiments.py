"""
The paper's experiments in miniature: what happens when one turns VLV's knobs, and what its embedding knows.

    python data/shapes/experiments.py                      # all eight, about four hours on two cores
    python data/shapes/experiments.py guidance mixing      # some; the last four use a checkpoint and take minutes

    queries     how many queries: 1 to as many as CLIP has positions                      trains
    parts       what stage 2 trains: the MLP, the LLM, BART with and without denoising    trains
    data        how many images in stage 1, how many captions in stage 2                  trains
    llm         how large a language model                                                trains
    guidance    classifier-free guidance 1 to 4
    words       what the embedding knows beyond words, drawn and by a linear probe
    mixing      some queries of one image, the rest of another
    knowledge   what each query knows, and where it looks

writes experiments.json and pictures into data/shapes/experiments/. The training runs, in out/experiments/, are ordinary runs
of train.py, as many at a time as there are cores; a killed call goes on by the same command. Figures are means over three
seeds of training with their standard deviation, or over scenes with the standard error of a bootstrap.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY))

import prepare
import torch
from evaluate import images_of, judge, parse, see, summarize
from PIL import Image, ImageDraw, ImageFont
from prepare import RESOLUTION, SPLITS, describe, scenes, validation_captions
from tqdm import tqdm

from data import latents
from data.checkpoint import find_checkpoint, fingerprint, write_json, write_whole
from data.plot import Plot, draw_plots
from data.results import panel
from data.settings import Processes, Settings, Text, parse_settings, read_json
from vlv import VLV, VLVConfig

CONFIG = HERE / "config.json"
RUNS = REPOSITORY / "out" / "experiments"
# of 32 images. Short: as long as it takes until a setting of stage 1 shows. Long: as in the main README, so that there is something to
# read aloud; what stage 2 is asked starts from there
STEPS = {"stage 1, short": 900, "stage 1, long": 1800, "stage 2": 400}
SEEDS = (0, 1, 2)
QUERIES = (1, 2, 4, 8, 16, 40)  # the toy's CLIP has 40 positions
AMOUNTS = (1_000, 3_000, 10_000, 30_000)
WITHOUT_STAGE_1 = (1_000, 30_000)  # the ends alone: such a run takes five times as long
LLMS = {"small": (64, 2), "medium": (128, 4), "large": (256, 6)}  # width and layers; medium is the bundled one's
PARTS = {
    "MLP": ["--stage2_trains", "mlp"],
    "MLP, LLM": ["--stage2_trains", "mlp", "llm"],
    "MLP, LLM, BART": [],
    "MLP, LLM, BART, no denoising": ["--no-stage2_denoises"],
}
FULL = "MLP, LLM, BART"
MINUTES = dict(queries=80, parts=40, data=95, llm=20, guidance=2, words=3, mixing=2, knowledge=10)  # on two cores
SCENES = 200  # of validation, that are drawn to measure something


# --- training runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run of one stage, and how its checkpoint measures. after: the run of stage 1 that it starts from; None in stage 2: the
    pretrained models."""

    seed: int
    queries: int = QUERIES[-1]
    images: int = 30_000
    length: str = "short"  # of stage 1
    stage: int = 1
    after: "Run | None" = None
    parts: str = FULL
    llm: str = "medium"

    @property
    def folder(self) -> Path:
        """Its name says what it is."""
        if self.stage == 1:
            return RUNS / f"{self.length}-{self.queries}-queries-{self.images}-images-seed-{self.seed}"
        words = [f"{self.images}-captions", self.parts.replace(", ", "-"), f"{self.llm}-llm"]
        base = self.after.folder if self.after else RUNS / f"no-stage-1-seed-{self.seed}"
        return base / "-".join(words).replace(" ", "-")

    def flags(self) -> list:
        flags = ["--num_queries", self.queries]
        if self.llm != "medium":
            flags += ["--llm", RUNS / "models" / self.llm]
        if self.stage == 1:
            return [*flags, "--max_steps", STEPS[f"stage 1, {self.length}"]]
        if self.after:
            return [*flags, *PARTS[self.parts], "--max_steps", STEPS["stage 2"], "--init_from", self.after.folder / "stage1"]
        # as many steps as both stages have, on captions alone, and everything of it learns
        return [*flags, "--max_steps", STEPS["stage 1, long"] + STEPS["stage 2"], "--init_from", RUNS / "untrained",
                "--no-stage2_denoises", "--stage2_trains", "bart", "queries", "projection", "mlp", "llm"]  # fmt: skip

    def commands(self) -> list[list[str]]:
        """What trains it, and what measures it then."""
        train = [REPOSITORY / "train.py", "--stage", self.stage, "--config", CONFIG, "--data", RUNS / "data" / str(self.images) / "train",
                 "--val_data", "", "--out_dir", self.folder, "--seed", self.seed, "--latents", "--resume", "--device", "cpu",
                 *self.flags()]  # fmt: skip
        measure = [HERE / "evaluate.py", "--ckpt", self.folder / f"stage{self.stage}", "--images", SCENES, "--rows", "embedding",
                   "--num_beams", 1, "--json", self.folder / "measured.json"]  # fmt: skip
        return [[str(part) for part in command] for command in (train, measure)]

    def train_and_measure(self) -> None:
        """Does what is left of it, in processes of one thread. Raises RuntimeError with the log's name when that fails."""
        result = self.folder / "result.json"
        if result.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.txt", "a") as log:
            for command in self.commands():
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                end = subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
                if end.returncode:
                    raise RuntimeError(f"{command[0]} failed: see {self.folder / 'log.txt'}")
        os.replace(self.folder / "measured.json", result)

    def result(self) -> dict:
        """{"denoising_loss", "psnr", "offset", ..., and in stage 2 "exact", "attributes"}"""
        measured = read_json(self.folder / "result.json")
        captions = measured.get("captions", {})
        return {"denoising_loss": measured["denoising_loss"]["embedding"], **measured["embedding"],
                **{name: captions[name] for name in ("exact", "attributes") if captions}}  # fmt: skip


def captioner(stage1: Run, **kwargs) -> Run:
    return Run(stage1.seed, stage=2, after=stage1, queries=stage1.queries, **kwargs)


def runs_of(experiment: str) -> list[tuple[dict, list[Run]]]:
    """The lines of an experiment: what is varied, and its runs, one a seed."""
    long = [Run(s, length="long") for s in SEEDS]
    if experiment == "queries":
        lines = [({"queries": n}, [captioner(Run(s, queries=n)) for s in SEEDS]) for n in QUERIES]
    elif experiment == "parts":
        lines = [({"trained": parts}, [captioner(run, parts=parts) for run in long]) for parts in PARTS]
        lines = [({"trained": "after stage 1"}, long), *lines]
    elif experiment == "data":
        lines = [({"images in stage 1": n}, [Run(s, images=n) for s in SEEDS]) for n in AMOUNTS]
        lines += [({"captions after stage 1": n}, [captioner(run, images=n) for run in long]) for n in AMOUNTS]
        lines += [({"captions without stage 1": n}, [Run(s, stage=2, images=n) for s in SEEDS]) for n in WITHOUT_STAGE_1]
    else:
        lines = [({"llm": llm}, [captioner(run, llm=llm) for run in long]) for llm in LLMS]
    return lines


def prepare_runs(runs: list[Run]) -> None:
    """What they start from: data with latents, an untrained checkpoint, language models of other sizes."""
    settings = read_json(CONFIG)
    for images in sorted({run.images for run in runs}):
        folder = RUNS / "data" / str(images)
        if not (folder / "complete").exists():
            prepare.main(["--out", str(folder), "--train", str(images)])
            latents.main([str(folder / "train"), "--image_size", str(RESOLUTION), "--diffusion_model", settings["diffusion_model"],
                          "--num_workers", "0"])  # fmt: skip
            (folder / "complete").touch()
    if any(run.stage == 2 and not run.after for run in runs) and not (RUNS / "untrained").exists():
        torch.manual_seed(0)
        model = {name: value for name, value in settings.items() if name in VLVConfig.__dataclass_fields__}
        VLV(VLVConfig(**model)).save_pretrained(RUNS / "untrained")
    for llm in sorted({run.llm for run in runs} - {"medium"}):
        folder = RUNS / "models" / llm
        if not folder.exists():
            from pretrain import PretrainConfig, save, train_qwen

            how = PretrainConfig()  # the medium one's
            texts = [describe(s) for s in scenes("pretrain", how.scenes, how.seed, exclude=validation_captions())]
            torch.manual_seed(how.seed)
            folder.parent.mkdir(parents=True, exist_ok=True)
            save(folder, *train_qwen(texts, how.qwen_steps, *LLMS[llm]))


def all_runs(experiments: list[str]) -> list[Run]:
    """Each run that the experiments need, once, after the one that it starts from."""
    runs = [run for experiment in experiments for _, line in runs_of(experiment) for run in line]
    return list(dict.fromkeys([run.after for run in runs if run.after] + runs))


def train_all(experiments: list[str], processes: int) -> None:
    """All runs of the experiments, `processes` at a time."""
    runs = all_runs(experiments)
    left = [run for run in runs if not (run.folder / "result.json").exists()]
    if not left:
        return
    with chdir(REPOSITORY):  # where the models' names are relative to
        prepare_runs(left)
    bar = tqdm(total=len(runs), initial=len(runs) - len(left), unit=" runs", smoothing=0)
    for stage in (1, 2):  # one starts from the other
        with ThreadPoolExecutor(processes) as pool:
            for _ in pool.map(Run.train_and_measure, [run for run in left if run.stage == stage]):
                bar.update()
    bar.close()


def over_seeds(experiment: str) -> list[dict]:
    """A row each line: what is varied, and (mean, standard deviation over seeds) of each measure."""
    rows = []
    for varied, line in runs_of(experiment):
        results = [run.result() for run in line]
        rows.append(varied | {name: [float(np.mean([r[name] for r in results])), float(np.std([r[name] for r in results], ddof=1))]
                              for name in results[0]})  # fmt: skip
    return rows


def lines_of(rows: list[dict], varied: str, names: dict[str, str]) -> dict[str, list[tuple]]:
    """For Plot: label -> [(x, mean, deviation), ...] of the measures that the rows have."""
    return {label: [(row[varied], *row[name]) for row in rows if varied in row and name in row] for name, label in names.items()}


ATTRIBUTE_LABELS = {"color": "colour", "shape": "shape", "size": "size", "place": "place"}


def plot_queries(rows):
    kwargs = dict(x_label="queries", log_x=True, dots=True, ticks=list(QUERIES))
    return [Plot("denoising loss", lines_of(rows, "queries", {"denoising_loss": "embedding"}), **kwargs),
            Plot("PSNR, dB", lines_of(rows, "queries", {"psnr": "redrawn"}), **kwargs),
            Plot("offset, pixels", lines_of(rows, "queries", {"offset": "redrawn"}), **kwargs),
            Plot("rightly drawn", lines_of(rows, "queries", ATTRIBUTE_LABELS), **kwargs),
            Plot("captions", lines_of(rows, "queries", {"exact": "exactly right", "attributes": "attributes right"}), **kwargs)]  # fmt: skip


def plot_data(rows):
    kwargs = dict(log_x=True, dots=True, ticks=list(AMOUNTS))
    captions = {}
    for how in ("after", "without"):
        measures = {"attributes": f"attributes right, {how} stage 1", "exact": f"exactly right, {how} stage 1"}
        captions |= lines_of(rows, f"captions {how} stage 1", measures)
    return [Plot("stage 1: denoising loss", lines_of(rows, "images in stage 1", {"denoising_loss": "embedding"}), "images", **kwargs),
            Plot("stage 1: PSNR, dB", lines_of(rows, "images in stage 1", {"psnr": "redrawn"}), "images", **kwargs),
            Plot("stage 2: captions", captions, "captions", **kwargs)]  # fmt: skip


# --- a checkpoint ---------------------------------------------------------------------------------------------------------


def bootstrap(items: list, summary, repeats: int = 200) -> dict[str, list[float]]:
    """{name: [value, standard error]} of summary(items), a dict, the error over resampled items."""
    rng = np.random.default_rng(0)
    again = [summary([items[i] for i in rng.integers(len(items), size=len(items))]) for _ in range(repeats)]
    return {name: [float(value), float(np.nanstd([a[name] for a in again], ddof=1))]
            for name, value in summary(items).items() if np.isfinite(value)}  # nothing found has no offset  # fmt: skip


class Subject:
    """The checkpoint that is looked at, on held-out scenes."""

    def __init__(self, ckpt: str, count: int):
        self.folder, self.count = find_checkpoint(ckpt), count
        self.truths = list(scenes("val", count))

    @cached_property
    def model(self) -> VLV:
        return VLV.from_pretrained(self.folder)

    @cached_property
    def originals(self) -> torch.Tensor:
        return images_of(self.truths)

    @cached_property
    def token_embeds(self) -> torch.Tensor:
        """ẑ, (count, N, D)"""
        return torch.cat([self.model.encoder(batch) for batch in self.originals.split(50)])

    @cached_property
    def nothing(self) -> torch.Tensor:
        """(D,): the token embedding with which CLIP pads a prompt; what stands where a query is taken away."""
        tokens = self.model.decoder.pipeline.tokenizer
        return self.model.decoder.text_encoder.get_input_embeddings().weight[tokens.pad_token_id]

    def redraw(self, prompt, guidance_scale: float = 2.0) -> list:
        """Pictures of c, (B, N, D), or of B texts."""
        pieces = [prompt[at : at + 50] for at in range(0, len(prompt), 50)]
        return [p for piece in tqdm(pieces, desc="drawing", leave=False)
                for p in self.model.decoder.reconstruct(piece, num_inference_steps=25, guidance_scale=guidance_scale)]  # fmt: skip

    def redraw_tokens(self, token_embeds: torch.Tensor) -> list:
        return self.redraw(self.model.decoder.encode_text(token_embeds))

    def judge(self, pictures: list) -> dict[str, list[float]]:
        return bootstrap([judge(truth, picture) for truth, picture in zip(self.truths, pictures)], summarize)


def guidance(subject: Subject) -> tuple[list[dict], dict]:
    rows, texts = [], [describe(truth) for truth in subject.truths]
    for scale in (1.0, 1.5, 2.0, 3.0, 4.0):
        for name, prompt in [("embedding", subject.model.decoder.encode_text(subject.token_embeds)), ("caption", texts)]:
            rows.append({"from": name, "guidance": scale, **subject.judge(subject.redraw(prompt, scale))})
    line = lambda name: {start: [(r["guidance"], *r[name]) for r in rows if r["from"] == start] for start in ("embedding", "caption")}
    return rows, {"guidance.png": draw_plots([Plot(title, line(name), "guidance", dots=True, ticks=[1, 1.5, 2, 3, 4])
                  for name, title in [("psnr", "PSNR, dB"), ("perfect", "nothing wrong"), ("offset", "offset, pixels")]])}  # fmt: skip


def words(subject: Subject) -> tuple[list[dict], dict]:
    """Offset and error of the half width, in pixels: of what is drawn; of the best guess that words allow; and of a linear
    regression (ridge) on c, the embedding's or the true caption's."""
    many = list(scenes("train", 8_000, exclude=validation_captions()))
    encode = lambda truths: torch.cat([subject.model.embed(batch).flatten(1) for batch in images_of(truths).split(50)])
    pipeline = subject.model.decoder.pipeline
    read = lambda truths: torch.cat([pipeline.encode_prompt([describe(t) for t in truths[at : at + 50]], "cpu", 1, False)[0].flatten(1)
                                     for at in range(0, len(truths), 50)])  # fmt: skip
    objects = lambda truths: [(number, o) for number, truth in enumerate(truths) for o in truth["objects"]]

    def errors(guesses: list[np.ndarray]) -> dict[str, list[float]]:
        """guesses: (x, y, r) of each object."""
        wrong = [(np.hypot(x - o["x"], y - o["y"]), abs(r - o["r"])) for (x, y, r), (_, o) in zip(guesses, objects(subject.truths))]
        return bootstrap(wrong, lambda pairs: dict(zip(("offset", "size_error"), np.mean(pairs, 0))))

    center = {}  # of all that fits the words
    for _, o in objects(many):
        center.setdefault((o["place"], o["size"]), []).append((o["x"], o["y"], o["r"]))
    center = {key: np.mean(values, 0) for key, values in center.items()}
    drawn = {}
    for name, prompt in [("embedding", subject.model.decoder.encode_text(subject.token_embeds)),
                         ("true caption", [describe(truth) for truth in subject.truths])]:  # fmt: skip
        judged = subject.judge(subject.redraw(prompt))
        drawn[name] = {key: judged[key] for key in ("offset", "size_error")}
    rows = [{"from": "drawn from the embedding"} | drawn["embedding"],
            {"from": "drawn from the true caption"} | drawn["true caption"],
            {"from": "the best that words allow"} | errors([center[o["place"], o["size"]] for _, o in objects(subject.truths)])]  # fmt: skip
    for name, features_of in [("linear probe of the embedding", encode), ("linear probe of the true caption's c", read)]:
        probes = {place: Ridge() for place in sorted({key[0] for key in center})}
        features, own = features_of(many).double().numpy(), features_of(subject.truths).double().numpy()
        for place, probe in probes.items():
            here = [(number, o) for number, o in objects(many) if o["place"] == place]
            probe.fit(features[[number for number, _ in here]], np.array([(o["x"], o["y"], o["r"]) for _, o in here]))
        guesses = [probes[o["place"]].predict(own[number]) for number, o in objects(subject.truths)]
        rows.append({"from": name} | errors(guesses))
    return rows, {}


class Ridge:
    """Linear regression with a penalty, which a fifth of the samples chooses; the other four fifths are fitted."""

    def fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        self.mean, self.offset = features.mean(0), targets.mean(0)
        x, y = features - self.mean, targets - self.offset
        held = len(x) // 5
        kernel = x[held:] @ x[held:].T  # in the dual: there are fewer samples than features
        best = None
        for penalty in np.trace(kernel) / len(kernel) * 10.0 ** np.arange(-6, 1):
            weights = x[held:].T @ np.linalg.solve(kernel + penalty * np.eye(len(kernel)), y[held:])
            error = np.square(x[:held] @ weights - y[:held]).mean()
            if best is None or error < best[0]:
                best = error, weights
        self.weights = best[1]

    def predict(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean) @ self.weights + self.offset


def shares(truth: dict, other: dict, found: dict) -> dict:
    """What of two scenes is in a picture or caption: whether its background is A's or B's, and which of their objects are
    there, by colour and place."""
    there = {(o["color"], o["place"]) for o in found["objects"]}
    share = lambda scene: [(o["color"], o["place"]) in there for o in scene["objects"]]
    return {"background": [found["background"] == scene["background"] for scene in (truth, other)],
            "objects": [share(truth), share(other)]}  # fmt: skip


def summarize_mix(items: list[dict]) -> dict[str, float]:
    result = {}
    for way in ("drawn", "said"):
        for number, name in enumerate("AB"):
            result[f"background of {name} {way}"] = float(np.mean([item[way]["background"][number] for item in items]))
            result[f"objects of {name} {way}"] = float(np.mean([v for item in items for v in item[way]["objects"][number]]))
    return result


def mixing(subject: Subject) -> tuple[list[dict], dict]:
    """The first queries of A, the rest of B: pairs of scenes with different backgrounds and no place in common."""
    places = [{o["place"] for o in truth["objects"]} for truth in subject.truths]
    pairs = []
    for a in range(0, subject.count - 1):
        b = next((b for b in range(a + 1, subject.count) if not places[a] & places[b]
                  and subject.truths[a]["background"] != subject.truths[b]["background"]), None)  # fmt: skip
        if b is not None:
            pairs.append((a, b))
    pairs = pairs[: subject.count // 2]
    number = subject.token_embeds.shape[1]
    splits = sorted({round(number * part / 8) for part in range(9)})
    rows, drawn, said, everything = [], {}, {}, []
    for split in splits:
        mixed = torch.stack([torch.cat([subject.token_embeds[a, :split], subject.token_embeds[b, split:]]) for a, b in pairs])
        embeds = subject.model.decoder.encode_text(mixed)
        drawn[split] = subject.redraw(embeds)
        said[split] = subject.model.caption_head.generate(embeds, num_beams=1)
        items = [{"drawn": shares(subject.truths[a], subject.truths[b], see(picture)),
                  "said": shares(subject.truths[a], subject.truths[b], parse(caption))}
                 for (a, b), picture, caption in zip(pairs, drawn[split], said[split])]  # fmt: skip
        everything.append(items)
        rows.append({"queries of A": split, **bootstrap(items, summarize_mix)})
    middle = splits.index(min(splits, key=lambda split: abs(split - number / 2)))
    quality = [np.mean([*i["drawn"]["objects"][0], *i["drawn"]["objects"][1]]) for i in everything[middle]]
    order = sorted(range(len(pairs)), key=lambda i: -quality[i])
    shown = order[:3] + order[len(order) // 2 - 1 : len(order) // 2 + 2]  # the best and the typical
    columns = [splits[len(splits) // 4], splits[middle], splits[3 * len(splits) // 4]]
    sheet = panel([[subject.originals[pairs[i][0]], *(drawn[split][i] for split in reversed(columns)), subject.originals[pairs[i][1]]]
                   for i in shown], [said[splits[middle]][i] for i in shown])  # fmt: skip
    line = lambda name: [(row["queries of A"], *row[name]) for row in rows]
    plots = [Plot(title, {f"{what} of {name}": line(f"{what} of {name} {way}") for what in ("background", "objects") for name in "AB"},
                  "queries taken from A", dots=True) for way, title in [("drawn", "drawn"), ("said", "captioned")]]  # fmt: skip
    return rows, {"mixing.png": draw_plots(plots), "mixing-examples.png": sheet}


def knowledge(subject: Subject) -> tuple[list[dict], dict]:
    number, rows = subject.token_embeds.shape[1], []
    for count in sorted({*range(5), *range(0, number + 1, max(1, number // 10)), number}):
        tokens = subject.token_embeds.clone()
        tokens[:, count:] = subject.nothing
        rows.append({"first queries": count, **subject.judge(subject.redraw_tokens(tokens))})
    without = []
    for left_out in range(number):
        tokens = subject.token_embeds.clone()
        tokens[:, left_out] = subject.nothing
        without.append(subject.redraw_tokens(tokens))
        rows.append({"without query": left_out + 1, **subject.judge(without[-1])})
    line = lambda varied, name: [(row[varied], *row[name]) for row in rows if varied in row]
    names = {"found": "found"} | ATTRIBUTE_LABELS
    plots = [Plot("from the first queries: PSNR, dB", {"redrawn": line("first queries", "psnr")}, "queries", dots=True),
             Plot("from the first queries: rightly drawn", {label: line("first queries", name) for name, label in names.items()}, "queries"),
             Plot("without one query: PSNR, dB", {"redrawn": line("without query", "psnr")}, "left out", dots=True),
             Plot("without one query: rightly drawn", {label: line("without query", name) for name, label in names.items()}, "left out")]  # fmt: skip
    pictures = {"knowledge.png": draw_plots(plots, columns=2), "attention.png": attention_sheet(subject, without)}
    return rows, pictures


def cross_attention(subject: Subject, images: torch.Tensor) -> torch.Tensor:
    """Where each query looks: (B, N, 8, 8), the decoder's cross-attention to the image's tokens, the mean over layers and heads."""
    bart, seen = subject.model.encoder.bart["decoder"], []
    bart.set_attn_implementation("eager")  # the one that tells
    hooks = [layer.encoder_attn.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[1])) for layer in bart.layers]
    subject.model.encoder(images)
    for hook in hooks:
        hook.remove()
    bart.set_attn_implementation("sdpa")
    side = RESOLUTION // 4
    weights = torch.stack(seen).mean((0, 2))[:, :, 1 : 1 + side * side]  # the first token is the mean of the others
    return weights.unflatten(-1, (side, side))


def attention_sheet(subject: Subject, without: list[list], columns: int = 8) -> Image.Image:
    """Of one image: for each query where it looks, over what is drawn without it."""
    scene = next((i for i, truth in enumerate(subject.truths) if len(truth["objects"]) == 3), 0)
    weights = cross_attention(subject, subject.originals[scene : scene + 1])[0]  # (N, 8, 8)
    redrawn = subject.redraw_tokens(subject.token_embeds[scene : scene + 1])[0]
    original = Image.fromarray(subject.originals[scene].permute(1, 2, 0).numpy())
    cells = [("image", original, redrawn)]
    for query, heat in enumerate(weights / weights.amax((1, 2), keepdim=True)):
        heat = torch.nn.functional.interpolate(heat[None, None], (RESOLUTION, RESOLUTION), mode="bilinear")[0, 0].numpy()
        light = np.asarray(original) * (0.25 + 0.75 * heat[..., None])
        cells.append((f"query {query + 1}", Image.fromarray(light.round().astype(np.uint8)), without[query][scene]))
    side, gap, label, font = 96, 6, 24, ImageFont.load_default(16)
    high = label + 2 * (side + gap)
    sheet = Image.new("RGB", ((columns + 1) * (side + gap), -(-len(weights) // columns) * high), "white")
    drawing = ImageDraw.Draw(sheet)
    for number, (name, above, below) in enumerate(cells):
        row, column = divmod(number - 1, columns) if number else (0, -1)  # the image has a column of its own
        left, top = (column + 1) * (side + gap), row * high
        drawing.text((left + side / 2, top + 2), name, "black", font, "ma")
        sheet.paste(above.resize((side, side), Image.Resampling.NEAREST), (left, top + label))
        sheet.paste(below.resize((side, side), Image.Resampling.NEAREST), (left, top + label + side + gap))
    return sheet


# --- all together ---------------------------------------------------------------------------------------------------------

TRAINED = {"queries": plot_queries, "parts": None, "data": plot_data, "llm": None}
LOOKED_AT = {"guidance": guidance, "words": words, "mixing": mixing, "knowledge": knowledge}


@dataclass
class ExperimentsConfig(Settings):
    experiments: tuple[Literal[tuple(MINUTES)], ...]  # none: all
    ckpt: Text = str(HERE / "vlv")  # for the last four
    scenes: Annotated[int, ">= 2", f"<= {SPLITS['val']}"] = SCENES  # that the last four look at
    processes: Processes = os.cpu_count()  # training runs at a time
    out: Path = HERE / "experiments"


def table(rows: list[dict]) -> str:
    """As Markdown, a value with its error behind ±."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    show = lambda value: "" if value is None else f"{value[0]:.3f} ± {value[1]:.3f}" if isinstance(value, list) else str(value)
    lines = [names, ["---"] * len(names)] + [[show(row.get(name)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv=None) -> None:
    args = parse_settings(ExperimentsConfig, argv, __doc__)
    file = args.out / "experiments.json"
    chosen = list(dict.fromkeys(args.experiments or MINUTES))
    args.out.mkdir(parents=True, exist_ok=True)
    results = read_json(file) if file.exists() else {}
    subject = Subject(args.ckpt, args.scenes)
    made_with = {name: dict(steps=STEPS, seeds=SEEDS, scenes=SCENES) if name in TRAINED
                 else dict(checkpoint=fingerprint(subject.folder), scenes=subject.count) for name in chosen}  # fmt: skip
    made_with = json.loads(json.dumps(made_with))
    left = [name for name in chosen if results.get(name, {}).get("made_with") != made_with[name]]
    minutes = sum(MINUTES[name] for name in left)
    print(f"to do: {', '.join(left) or 'nothing'}; about {minutes // 60} h {minutes % 60} min on two cores"
          f" (delete an entry of {file} to do it again)", flush=True)  # fmt: skip
    train_all([name for name in left if name in TRAINED], args.processes)
    for name in left:
        print(f"{name} ...", flush=True)
        if name in TRAINED:
            rows = over_seeds(name)
            pictures = {f"{name}.png": draw_plots(TRAINED[name](rows))} if TRAINED[name] else {}
        else:
            with torch.inference_mode():
                rows, pictures = LOOKED_AT[name](subject)
        for picture, image in pictures.items():
            write_whole(args.out / picture, lambda path: image.save(path, "png"))
        results[name] = {"made_with": made_with[name], "rows": rows}
        ordered = {key: results[key] for key in MINUTES if key in results}
        write_whole(file, lambda path: write_json(path, ordered))
    for name in chosen:
        print(f"\n{name}\n\n{table(results[name]['rows'])}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
